r"""Weights between those before a training and those after it.

.. math:: \theta = (1 - \alpha)\, \theta_{\text{before}} + \alpha\, \theta_{\text{after}}
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ewc_lib._names import listed, plain_name
from ewc_lib._parameters import Vector
from ewc_lib.fisher.structures import Fisher

__all__ = ["averaged"]

FLOOR = 1e-6
"""Added to the Fisher information of every weight where it weighs an average."""


@torch.no_grad()
def averaged(
    model: nn.Module,
    before: nn.Module | Mapping[str, Tensor],
    share: float = 0.5,
    *,
    after: Mapping[str, Tensor] | None = None,
    fishers: tuple[Fisher, Fisher] | None = None,
) -> Vector:
    r"""Return the state of a model between two, on the line or weighed by Fisher informations.

    .. math:: \theta_i = \frac{(1 - \alpha)\, F_{A,i}\, \theta_{\text{before},i}
                            + \alpha\, F_{B,i}\, \theta_{\text{after},i}}
                            {(1 - \alpha)\, F_{A,i} + \alpha\, F_{B,i}}

    Without Fisher informations all :math:`F` are one, which is :eq:`eq-average`.

    Parameters
    ----------
    model
        Says what is a parameter, and nothing in it is changed: load what comes back. Usually it
        is the model after training.
    before
        Its state before, a copy of ``model.state_dict()``, or another such model.
    share
        :math:`\alpha`: 0 for before, 1 for after. Choose it on data that are not reported.
    after
        The state after; by default that of the model.
    fishers
        :math:`F_A` at the weights before, from data of the old task, and :math:`F_B` at those
        after, from data of the new one. Their diagonals count. A millionth is added to each, so
        that a weight that neither knows of is on the line. A parameter that is not in both, as
        one that is frozen, is on the line as well.

    Returns
    -------
    dict
        A state for ``model.load_state_dict``, which shares no memory with the others. Parameters
        are averaged, also tied and frozen ones; those that are equal stay as they are, an infinite
        one, too. Buffers are those of after: a mask or a counter has no average, and
        running statistics are of the weights that they were taken with. Those of batch
        normalisation do not fit the new weights: ``torch.optim.swa_utils.update_bn(loader, model)``
        takes them again, after the state is loaded.

    Raises
    ------
    ValueError
        If the share is not between 0 and 1, if states have other names or shapes than the model,
        or if the state before shares its memory with the one after, so that it has been trained.

    Notes
    -----
    An average of the factors of low-rank adapters is not that of the weights that they make:
    merge adapters into the weights before.

    References
    ----------
    Wortsman et al. 2022 for the line; Matena and Raffel 2022 for the weighted average.

    Examples
    --------
    >>> import copy, torch
    >>> model = torch.nn.Linear(1, 1)
    >>> before = copy.deepcopy(model.state_dict())
    >>> with torch.no_grad():
    ...     _ = model.weight.add_(1.0)  # or a training
    >>> half = averaged(model, before, 0.5)
    >>> (half["weight"] - before["weight"]).item()
    0.5
    >>> model.load_state_dict(half)
    <All keys matched successfully>
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}")
    old = before.state_dict() if isinstance(before, nn.Module) else before
    new = model.state_dict() if after is None else after
    first: dict[int, str] = {}  # a Fisher information knows a tied parameter by one name
    weights = dict(model.named_parameters(remove_duplicate=False))
    own = {name: first.setdefault(id(p), name) for name, p in weights.items() if _is_mean(p)}
    _check(old, new, own)
    F, G = (_by_plain_names(one) for one in fishers or (None, None))
    found: Vector = copy.deepcopy(dict(new))
    for name, known in own.items():
        a, b = old[name].to(new[name].device), new[name]
        pair = tuple(
            one[plain_name(known)].to(b.device) for one in (F, G) if plain_name(known) in one
        )
        mean = _weighed(a, b, share, *pair) if len(pair) == 2 else torch.lerp(a, b, share)
        found[name] = torch.where(a == b, b, mean)
    return found


def _weighed(a: Tensor, b: Tensor, share: float, F: Tensor, G: Tensor) -> Tensor:
    """Return the average of each entry by its Fisher informations."""
    f, g = (1 - share) * (F + FLOOR), share * (G + FLOOR)
    return ((f * a + g * b) / (f + g)).to(b.dtype)


def _is_mean(parameter: Tensor) -> bool:
    """Tell whether values have an average, as those of quantised weights have not."""
    return parameter.is_floating_point() or parameter.is_complex()


def _by_plain_names(fisher: Fisher | None) -> Vector:
    found = {} if fisher is None else fisher.diagonal()
    return {plain_name(name): value for name, value in found.items()}


def _check(old: Mapping[str, Tensor], new: Mapping[str, Tensor], names: Collection[str]) -> None:
    """Raise a ValueError unless both states have these parameters, each values of its own."""
    for state, what in ((old, "before"), (new, "after")):
        if missing := [name for name in names if name not in state]:
            raise ValueError(f"the state {what} has no {listed(missing)}, which the model has")
    if other := [name for name in names if old[name].shape != new[name].shape]:
        raise ValueError(f"{listed(other)} have another shape before than after")
    if names and all(old[name].is_set_to(new[name]) for name in names):
        raise ValueError(
            "the state before is the model's own, which training has changed: keep a copy, "
            "copy.deepcopy(model.state_dict())"
        )
