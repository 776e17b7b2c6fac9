"""Only the diagonal."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib._arguments import check_whole, is_number
from ewc_lib._foreach import each
from ewc_lib._parameters import Vector, ravel
from ewc_lib._selecting import Selection, select_parameters
from ewc_lib._sharded import total
from ewc_lib.fisher.structures.base import Fisher, Join
from ewc_lib.fisher.structures.vectors import divide, padded


@dataclass(frozen=True, eq=False, repr=False)
class Diagonal(Fisher):
    """Only the diagonal; everything off it is taken as zero.

    Attributes
    ----------
    values
        One tensor for each parameter, of its shape.
    """

    values: Vector

    @classmethod
    def from_optimizer(
        cls,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        batch_size: int,
        positions: float = 1,
        params: Selection = None,
        n_samples: int | None = None,
    ) -> Self:
        r"""Return Adam's second moments, times the batch size: no pass over the data.

        .. math:: B\, T^2 \,\hat v, \qquad
                  \hat v = \frac{1 - \beta_2}{1 - \beta_2^T}
                  \sum_{t \le T} \beta_2^{T-t} \, \bar s_t^{\,2}

        with the gradients :math:`\bar s_t` of the mean loss of each batch, the latest of which
        count most. Li et al. (2025) take such moments for the Fisher information. What they are
        on average says :eq:`eq-batch-mean`, at the parameters of each step and for
        :math:`T = 1`: :math:`B\,\hat v` is the *empirical* Fisher :math:`\tilde F` plus
        :math:`(B-1)\,\mu^2`, with the mean score :math:`\mu` of the data. That is close to
        :math:`\tilde F` only if training has come to rest, so that
        :math:`\mu^2 \ll \tilde F / B`, and to the Fisher information only if, in
        addition, the observed labels are as the model predicts them.

        Parameters
        ----------
        optimizer
            Adam, AdamW, NAdam or RAdam, after some steps with ``model``. The moments are those of
            the gradients that it was given: a penalty or a weight decay in the loss, and clipped
            gradients, are part of them. The average is bias-corrected; of ``amsgrad``, too, it is
            the average, not its maximum. If the optimizer goes on from task to task, so do the
            moments.
        model
            Names the parameters.
        batch_size
            :math:`B`, the observations of one step of the optimizer, whose loss was their mean:
            of all processes, and with gradient accumulation of all batches of the step.
        positions
            :math:`T`, of how many terms the loss of one observation is the mean: of a language
            model that is trained by the mean over tokens, the tokens of a sequence that count,
            on average. The score of a sequence is the sum over its tokens
            (:eq:`eq-lm-sequence`), which that mean divides by :math:`T`, and its square
            by :math:`T^2`.
        params
            As in :func:`ewc_lib.fisher_information`.
        n_samples
            Observations that it shall count for, as in :meth:`pool`. By default all that the
            optimizer has seen, repeated ones included: the batch size times the steps.

        Returns
        -------
        Diagonal
            Of the kind ``"second moments"``. An :class:`ewc_lib.EWC` of that kind remembers it. A
            parameter that never had a gradient has zero.

        Raises
        ------
        ValueError
            If the optimizer has made no step, holds no second moments of each entry, or does not
            have one of the parameters; or if a number is not positive.

        Examples
        --------
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> for x in (1.0, 3.0):
        ...     optimizer.zero_grad()
        ...     model(torch.full((4, 1), x)).mean().backward()  # its gradient is x
        ...     optimizer.step()
        >>> F = Diagonal.from_optimizer(optimizer, model, batch_size=4)
        >>> round(F.values["weight"].item(), 3)  # about 4 (1 + 9) / 2
        20.008
        >>> F.kind, F.n_samples
        ('second moments', 8)
        """
        check_whole(batch_size=batch_size, n_samples=n_samples)
        if not (is_number(positions) and 0 < positions < math.inf):
            raise ValueError(f"positions must be a positive number, got {positions!r}")
        chosen = select_parameters(model, params)
        found = {name: _second_moment(optimizer, name, p) for name, p in chosen.items()}
        n_steps = max(n for _, n in found.values())
        if not n_steps:
            raise ValueError("the optimizer has made no step with these parameters")
        return cls(
            batch_size * n_steps if n_samples is None else n_samples,
            "second moments",
            {name: "rule" if n else "unused" for name, (_, n) in found.items()},
            {name: batch_size * positions**2 * moment for name, (moment, _) in found.items()},
        )

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in self.values.items()}

    def diagonal(self) -> Vector:
        return dict(self.values)

    def to_dense(self) -> Float[Tensor, "P P"]:
        return ravel(self.values)[0].diag()

    def _product(self, v: Vector) -> Vector:
        return each("mul", self.values, v)

    def _solve(self, v: Vector, damping: float) -> Vector:
        return {name: divide(v[name], value + damping) for name, value in self.values.items()}

    def _logdet(self, damping: float) -> Float[Tensor, ""]:
        return total([(d + damping).log().sum() for d in self.values.values()])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, values={name: change(d) for name, d in self.values.items()})

    def _times(self, factor: float) -> Self:
        return self._map(lambda d: factor * d)

    def _plus(self, other: Self) -> Self:
        return replace(self, values={k: d + other.values[k] for k, d in self.values.items()})

    def _renamed(self, names: Mapping[str, str]) -> Self:
        values = {names[name]: value for name, value in self.values.items()}
        return replace(
            self, paths={names[n]: path for n, path in self.paths.items()}, values=values
        )

    def _embedded(self, shapes: dict[str, torch.Size]) -> Self:
        nothing = torch.zeros((), dtype=self.dtype, device=self.device)
        values = {
            name: padded(self.values[name], shape)
            if name in self.values
            else nothing.new_zeros(shape)
            for name, shape in shapes.items()
        }
        return replace(self, paths=self._paths_of(shapes), values=values)

    def _congruent(self, scales: Mapping[str, float]) -> Self:
        values = {name: d * scales[name] ** 2 for name, d in self.values.items() if name in scales}
        return replace(self, paths=self._paths_of(values), values=values)

    def _united(
        self, other: Self, shapes: dict[str, torch.Size], join: Join = operator.add
    ) -> Self:
        """Join what both hold; the others stay where they are, in their own precision."""
        like = {**self.values, **other.values}
        ours, theirs = (
            replace(
                one,
                paths=one._paths_of(shapes),
                values={n: one.values.get(n, torch.zeros_like(like[n])) for n in shapes},
            )
            for one in (self, other)
        )
        found: Self = join(ours, theirs)
        return found

    def _tensors(self) -> dict[str, Tensor]:
        return {f"diagonal.{name}": d for name, d in self.values.items()}

    @classmethod
    def _from_tensors(
        cls, state: dict[str, Tensor], n_samples: int, kind: str, paths: dict[str, str]
    ) -> Self:
        values = {name: state[f"diagonal.{name}"].clone() for name in paths}
        return cls(n_samples, kind, paths, values)


def _second_moment(
    optimizer: torch.optim.Optimizer, name: str, parameter: nn.Parameter
) -> tuple[Tensor, int]:
    """Return the bias-corrected mean square of the gradients of a parameter, of how many steps."""
    groups = (g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    if (group := next(groups, None)) is None:
        raise ValueError(
            f"the optimizer does not have parameter {name!r}; params= chooses those that it has"
        )
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    if not state and "betas" in group:
        return torch.zeros_like(parameter, dtype=parameter.dtype.to_real()).detach(), 0
    if not {"exp_avg_sq", "step"} <= state.keys() or "betas" not in group:
        raise ValueError(
            f"{type(optimizer).__name__} holds no second moment of each entry of {name!r}, as "
            "Adam and AdamW do"
        )
    n_steps = int(state["step"])
    moment = state["exp_avg_sq"] / (1 - group["betas"][1] ** n_steps)
    return torch.view_as_real(moment).sum(-1) if moment.is_complex() else moment, n_steps
