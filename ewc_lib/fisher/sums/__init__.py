"""Sums over observations of the outer products of their gradients, one class a structure."""

from ewc_lib.fisher.sums.base import ParameterSpace, Sum
from ewc_lib.fisher.sums.diagonal import DiagonalSum
from ewc_lib.fisher.sums.kronecker import EigenKroneckerSum, KroneckerSum
from ewc_lib.fisher.sums.rows import BlockSum, DenseSum, LowRankSum

__all__ = [
    "BlockSum",
    "DenseSum",
    "DiagonalSum",
    "EigenKroneckerSum",
    "KroneckerSum",
    "LowRankSum",
    "ParameterSpace",
    "Sum",
]
