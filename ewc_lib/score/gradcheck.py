r"""The gradient check: every result is compared with autograd on the user's own model.

Reading per-observation gradients off an operation needs a guess of which axis holds the
observations, and that every use of a parameter was seen. For random weights :math:`w_n` and a
random output direction :math:`s_n`, compare

.. math:: \nabla_\theta \sum_n w_n\, s_n^\top f(x_n)
          \quad\text{with}\quad \sum_n w_n\, G_n ,

where plain autograd gives the left side and the per-observation gradients :math:`G_n`, built
from *unweighted* output gradients, give the right one. The two sides are polynomials in the
random numbers. They agree only if every use was seen, every axis was guessed right and no
observation leaks into another; otherwise they differ with probability one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ewc_lib.score.batch_axis import BatchAxis, batch_axes, weigh
from ewc_lib.score.gradients import ParameterGradients
from ewc_lib.score.memory import sum_dtype
from ewc_lib.score.record import pull_through


@dataclass(frozen=True, eq=False)
class GradientCheck:
    """A random question about one batch, and autograd's answer.

    Attributes
    ----------
    direction
        The output direction ``s``, in the shape of the output.
    weights
        One weight for each observation.
    answer
        The weighted gradient of each parameter, by autograd. A parameter that the output does
        not depend on is left out.
    conclusive
        Whether every parameter has a gradient. A batch of blank inputs may have none, and then
        any rule gives the right answer.
    eps
        Machine precision of the coarsest operation of the model.
    """

    direction: Float[Tensor, "N ..."]
    weights: Float[Tensor, " N"]
    answer: dict[str, Tensor]
    conclusive: bool
    eps: float = 0.0

    @classmethod
    def pose(
        cls, output: Tensor, parameters: dict[str, torch.nn.Parameter], eps: float = 0.0
    ) -> GradientCheck:
        """Draw the random numbers and ask autograd."""
        generator = torch.Generator().manual_seed(0)
        direction, weights = (
            torch.randn(shape, generator=generator).to(output)
            for shape in (output.shape, output.shape[:1])
        )
        if not output.requires_grad:  # it depends on none of the parameters
            return cls(direction, weights, {}, conclusive=False, eps=eps)
        gradients = pull_through(output, list(parameters.values()), weigh(direction, weights))
        answer = {
            name: g.to_dense() if g.is_sparse else g
            for name, g in zip(parameters, gradients, strict=True)
            if g is not None
        }
        conclusive = len(answer) == len(parameters) and all(map(_norm, answer.values()))
        return cls(direction, weights, answer, conclusive, eps)

    @property
    def weighted(self) -> Float[Tensor, "N ..."]:
        """The direction, with the weight of each observation."""
        return weigh(self.direction, self.weights)

    def batch_axis(
        self, input: Tensor, plain: Tensor | None, weighted: Tensor | None
    ) -> BatchAxis | None:
        """Find where the observations lie, from output gradients without and with the weights.

        Along the right axis, each observation of the second is that of the first times its weight.
        """
        if plain is None or weighted is None:
            return None
        n = len(self.weights)
        for axis in batch_axes(plain.shape, n):
            if not axis.fits(input.shape, n):
                continue
            expected = weigh(axis.split(plain, n), self.weights)
            if _agree(axis.split(weighted, n), expected, self.eps):
                return axis
        return None

    def passes_rule(self, name: str, gradients: ParameterGradients | None) -> bool:
        """Whether the sum of the gradients by rule is autograd's, up to rounding of its terms."""
        expected = self.answer.get(name)
        if gradients is None or expected is None:
            return expected is None
        weighted = gradients.weighted(self.weights)
        try:
            found = self._total(weighted, expected)
        except RuntimeError:  # the tensors have other shapes than the rule expects
            return False
        if _agree(found, expected, self.eps):
            return True
        if any(use.source is not gradients.parameter for use in gradients.uses):
            return False  # the signs of what was computed from the parameter are not known
        # Terms may cancel, as in the bias of the keys of attention: then both are but rounding.
        noise = 8 * self._unit(expected) * _norm(self._total(weighted.absolute(), expected))
        return max(_norm(found), _norm(expected)) <= noise

    @staticmethod
    def _total(gradients: ParameterGradients, like: Tensor) -> Tensor:
        total = torch.zeros(like.shape, dtype=sum_dtype(like), device=like.device)
        gradients.add_total(total)
        return total

    def _unit(self, tensor: Tensor) -> float:
        return max(self.eps, torch.finfo(tensor.dtype).eps)

    def check_vmap(self, name: str, weighted: Tensor) -> None:
        """Raise a ValueError if observations taken one by one give another answer."""
        expected = self.answer.get(name, torch.zeros_like(weighted))
        largest = max((_norm(g) for g in self.answer.values()), default=0.0)
        noise = 100 * self._unit(expected) * largest
        if not _agree(weighted, expected, self.eps, noise):
            raise ValueError(
                f"the model mixes observations: the gradient of parameter {name!r} is not a sum "
                f"of contributions of single observations, {_NO_SCORES}"
            )


_NO_SCORES = (
    "so they have no scores of their own. Batch statistics, contrastive terms and random numbers "
    "drawn in eval mode do that"
)


def check_alone(alone: Tensor, together: Tensor, eps: float = 0.0) -> None:
    """Raise a ValueError if observations have another output without the rest of their batch.

    No gradient shows a mixture of the inputs, before the first parameter.
    """
    a, b = (output.detach().nan_to_num(neginf=0.0) for output in (alone, together))
    if a.numel() != b.numel() or not _agree(a.reshape(b.shape), b, eps):
        raise ValueError(
            "the model mixes observations: the output of the first ones is another without the "
            f"rest of their batch, {_NO_SCORES}"
        )


def _agree(a: Tensor, b: Tensor, eps: float, noise: float = 0.0) -> bool:
    """Compare up to rounding, which is far below any wrong axis or missed use."""
    tolerance = max(eps, torch.finfo(b.dtype).eps) ** 0.5
    return bool(_norm(a.to(sum_dtype(b)) - b) <= tolerance * _norm(b) + noise)


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=sum_dtype(values)))
