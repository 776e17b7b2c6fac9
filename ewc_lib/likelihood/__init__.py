"""What a model says about data, and the parameters that say it best."""

from ewc_lib.likelihood.definition import LogProb, likelihood, log_likelihood, network_log_prob
from ewc_lib.likelihood.maximum import MLE, maximum_likelihood
from ewc_lib.likelihood.outputs import (
    Bernoulli,
    Categorical,
    Gaussian,
    OutputDistribution,
    Poisson,
    TorchDistribution,
)

__all__ = [
    "MLE",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "LogProb",
    "OutputDistribution",
    "Poisson",
    "TorchDistribution",
    "likelihood",
    "log_likelihood",
    "maximum_likelihood",
    "network_log_prob",
]
