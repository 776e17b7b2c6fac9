"""How the parameters should change: the gradient of the log-likelihood, for each observation."""

from ewc_lib.score.definition import score, scores

__all__ = ["score", "scores"]
