"""How the parameters should change: the gradient of the log-likelihood, for each observation."""

from ewc_lib.score.definition import score, scores
from ewc_lib.score.network import per_observation_gradients

__all__ = ["per_observation_gradients", "score", "scores"]
