r"""The score: the gradient of the log-likelihood in the parameters.

.. math:: s(\theta) = \nabla_\theta \mathcal{L}(\theta \mid D)

Its direction says how to change the parameters so that the model explains the data better; its
size says how fast that improves.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.func import grad

from ewc_lib._parameters import Data, Params, ravel
from ewc_lib.likelihood.definition import LogProb, check_log_prob, per_observation

__all__ = ["score", "scores"]


def scores(log_prob: LogProb, theta: Params, data: Data) -> Float[Tensor, "N P"]:
    r"""Return the score of each observation, one row each.

    .. math:: s_n(\theta) = \nabla_\theta \log p(x_n \mid \theta)

    This is :eq:`eq-score-observation`.

    Parameters
    ----------
    log_prob
        Log-probability of one observation, ``log_prob(theta, x) -> scalar``.
    theta
        Parameters, ``[P]`` or a dict of tensors; a dict is flattened in its order.
    data
        Observations, ``[N, ...]`` or a tuple of such tensors.

    Returns
    -------
    Tensor
        ``[N, P]``, in nats per unit of each parameter.

    Raises
    ------
    ValueError
        If the data are empty or of unequal lengths, or if ``log_prob`` returns no scalar.

    Examples
    --------
    >>> import torch
    >>> gauss = lambda mu, x: torch.distributions.Normal(mu, 1.0).log_prob(x)
    >>> scores(gauss, torch.tensor(0.0), torch.tensor([1.0, -2.0]))
    tensor([[ 1.],
            [-2.]])
    """
    check_log_prob(log_prob, theta, data)
    flat, restore = ravel(theta)
    return per_observation(grad(lambda vector, x: log_prob(restore(vector), x)), flat, data)


def score(log_prob: LogProb, theta: Params, data: Data) -> Float[Tensor, " P"]:
    r"""Return the score of the data set, the sum over its observations.

    .. math:: s(\theta) = \nabla_\theta \mathcal{L}(\theta \mid D) = \sum_{n=1}^N s_n(\theta)

    This is :eq:`eq-score`. At the maximum of the likelihood it is zero; at the true parameters
    it is zero on average over data sets (:eq:`eq-score-zero`), not for the one in hand.

    Parameters
    ----------
    log_prob
        Log-probability of one observation, ``log_prob(theta, x) -> scalar``.
    theta
        Parameters, ``[P]`` or a dict of tensors; a dict is flattened in its order.
    data
        Observations, ``[N, ...]`` or a tuple of such tensors.

    Returns
    -------
    Tensor
        ``[P]``, in nats per unit of each parameter.

    Raises
    ------
    ValueError
        If the data are empty or of unequal lengths, or if ``log_prob`` returns no scalar.

    Examples
    --------
    >>> import torch
    >>> gauss = lambda mu, x: torch.distributions.Normal(mu, 1.0).log_prob(x)
    >>> score(gauss, torch.tensor(0.0), torch.tensor([1.0, -2.0]))
    tensor([-1.])
    """
    return scores(log_prob, theta, data).sum(0)
