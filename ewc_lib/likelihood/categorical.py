r"""A class label, whose logits the output holds on one axis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ewc_lib._checking import Problem, settle
from ewc_lib.likelihood.base import (
    OutputDistribution,
    check_real,
    first_bad,
    per_observation_sum,
    precise,
    uniform,
)


@dataclass(frozen=True)
class Categorical(OutputDistribution):
    r"""A class label; the output holds its logits on one axis.

    .. math:: \log p(y \mid x) = f_y(x) - \log \sum_c e^{f_c(x)}

    Parameters
    ----------
    ignore_index
        Positions with this label do not count. The default is that of
        :func:`torch.nn.functional.cross_entropy`.
    next_token
        Read position ``t`` of the output as what it says about label ``t + 1``, as causal
        language models with ``labels=input_ids`` do. Nothing is then said of the first label,
        and the last position says nothing. The name ``"next-token"`` stands for it.
    class_dim
        The axis of the logits. By default the last one; 1 for ``[N, C, H, W]``, the layout of
        segmentation and of :func:`torch.nn.functional.cross_entropy`. An output whose shape
        allows both is refused until one is chosen.

    Raises
    ------
    ValueError
        If ``class_dim`` is 0, the axis of the observations.

    Notes
    -----
    Output ``[N, C]`` with target ``[N]``, or ``[N, T, C]`` with ``[N, T]`` for sequences, or
    ``[N, C, H, W]`` with ``[N, H, W]`` for the pixels of images and ``class_dim=1``. The
    log-probability of an observation is the sum over its positions that count. Logits of minus
    infinity (classes that are masked out) are allowed.

    Examples
    --------
    >>> import torch
    >>> Categorical().log_prob(torch.zeros(1, 4), torch.tensor([2])).exp()
    tensor([0.2500])
    >>> text = torch.tensor([[3, 0, 2]])  # two of three tokens follow another one
    >>> Categorical(next_token=True).log_prob(torch.zeros(1, 3, 4), text).exp()
    tensor([0.0625])
    """

    ignore_index: int = -100
    next_token: bool = False
    class_dim: int | None = None

    def __post_init__(self) -> None:
        if self.class_dim == 0:
            raise ValueError("class_dim=0 is the axis of the observations; classes have another")

    def log_prob(self, output: Tensor, target: Tensor) -> Float[Tensor, " N"]:
        ignored = ~self.mask(target)
        label = self._at_positions(target).masked_fill(ignored, 0).unsqueeze(-1)
        log_p = self._classes_last(precise(output)).log_softmax(-1).gather(-1, label).squeeze(-1)
        return per_observation_sum(log_p.masked_fill(ignored, 0))

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        output = self._classes_last(output)
        cumulative = output.double().softmax(-1).cumsum(-1)
        u = uniform(output, generator, output.shape[:-1]).unsqueeze(-1) * cumulative[..., -1:]
        drawn = torch.searchsorted(cumulative, u, right=True).squeeze(-1)
        return F.pad(drawn[..., :-1], (1, 0)) if self.next_token else drawn

    def outcomes(self, output: Tensor) -> tuple[Tensor, Tensor]:
        p = self._classes_last(precise(output)).softmax(-1).movedim(-1, 0)
        if self.next_token:  # nothing is said of the first token, so it has one value
            p = F.pad(p[..., :-1], (1, 0))
            p[0, ..., 0] = 1
        labels = torch.arange(len(p), device=p.device).reshape(-1, *[1] * (p.dim() - 1))
        return labels.expand(p.shape), p

    def check(self, output: Tensor, target: Tensor, first: int = 0) -> None:
        settle(self.problems(output, target, first))

    def problems(self, output: Tensor, target: Tensor, first: int = 0) -> list[Problem]:
        check_real(output, self)
        if target.is_floating_point() and target.shape == output.shape:
            raise ValueError(
                "soft labels, one probability for each class, are no observed labels. The kinds "
                "'exact', 'sketch' and 'sampled' take labels from the model, so any integer "
                "labels do, such as the most probable ones"
            )
        self._check_shapes(output.shape, target.shape)
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise ValueError(f"class labels must be integers, got {target.dtype}")
        label, n_classes = self._at_positions(target), output.shape[self._class_dim]
        bad = ((label < 0) | (label >= n_classes)) & (label != self.ignore_index)

        def explain() -> None:
            raise ValueError(
                f"label {int(label[bad][0])} of observation {first_bad(bad, first)} is outside "
                f"the {n_classes} classes of the output"
            )

        return [Problem(bad.any(), explain)]

    def invalid(self, output: Tensor) -> Bool[Tensor, ...]:
        impossible = output.isneginf().all(self._class_dim, keepdim=True)
        return output.isnan() | output.isposinf() | impossible

    def mask(self, target: Tensor) -> Bool[Tensor, ...]:
        return self._at_positions(target) != self.ignore_index

    @property
    def _class_dim(self) -> int:
        return -1 if self.class_dim is None else self.class_dim

    def _classes_last(self, output: Tensor) -> Tensor:
        return output.movedim(self._class_dim, -1)

    def _at_positions(self, target: Tensor) -> Tensor:
        """Return the label that each position of the output is about, as a wide integer."""
        label = _wide(target)
        return F.pad(label[..., 1:], (0, 1), value=self.ignore_index) if self.next_token else label

    def _check_shapes(self, output: torch.Size, target: torch.Size) -> None:
        """Raise a ValueError unless the target has one label for each position of the output."""
        dims = range(1, len(output))
        fits = {dim for dim in dims if target == (*output[:dim], *output[dim + 1 :])}
        got = f"got {tuple(output)} and {tuple(target)}"
        if self.next_token and len(target) < 2:
            raise ValueError(f"the labels of next tokens must be [N, T], {got}")
        if self.class_dim is None and len(output) > 3 and {1, len(output) - 1} <= fits:
            raise ValueError(
                "the classes may be on axis 1 or on the last axis of the output: choose "
                f"Categorical(class_dim=1) or Categorical(class_dim=-1); {got}"
            )
        if fits & {self._class_dim, self._class_dim + len(output)}:
            return
        hint = "; for classes on axis 1 choose Categorical(class_dim=1)" if 1 in fits else ""
        axis = "" if self.class_dim is None else f" for class_dim={self.class_dim}"
        raise ValueError(
            f"a categorical output must be [N, ..., classes] and its target [N, ...]{axis}, "
            f"{got}{hint}"
        )


def _wide(labels: Tensor) -> Tensor:
    """Turn narrow integers into int64: in uint8 -100 is 156, and in int8 200 is -56."""
    return labels if labels.is_floating_point() else labels.long()
