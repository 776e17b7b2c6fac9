"""The Fisher information: two definitions, one fast estimate, and what can be done with it."""

from ewc_lib.fisher.definitions import every_label, negative_expected_hessian, score_covariance
from ewc_lib.fisher.estimate import fisher_information
from ewc_lib.fisher.iterative import Estimate
from ewc_lib.fisher.matrix_free import MatrixFree
from ewc_lib.fisher.structures import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenKronecker,
    Fisher,
    Kronecker,
    LowRank,
)
from ewc_lib.likelihood.outputs import Bernoulli, Categorical, Gaussian, Poisson

__all__ = [
    "Bernoulli",
    "BlockDiagonal",
    "Categorical",
    "Dense",
    "Diagonal",
    "EigenKronecker",
    "Estimate",
    "Fisher",
    "Gaussian",
    "Kronecker",
    "LowRank",
    "MatrixFree",
    "Poisson",
    "every_label",
    "fisher_information",
    "negative_expected_hessian",
    "score_covariance",
]
