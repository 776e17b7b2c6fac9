"""Ways to keep task A while a model is fine-tuned on task B, each at all its settings."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from ewc_lib.continual import averaged
from ewc_lib.ewc import EWC
from ewc_lib.experiments.language.model import adaptable
from ewc_lib.experiments.language.starts import (
    Examples,
    Start,
    State,
    measured,
    rows_of,
    tuned,
)
from ewc_lib.experiments.runs.store import Run
from ewc_lib.fisher import Diagonal, fisher_information
from ewc_lib.fisher.estimate import Structure
from ewc_lib.quadratic import QuadraticPenalty
from ewc_lib.regularizers import L2, AdapterEWC, add_adapters

__all__ = ["TRAINED", "diagonal", "points"]

TRAINED: Mapping[str, tuple[str, ...]] = {
    "plain": ("learning rate", "early stopping", "averaging", "Fisher averaging"),
    "EWC": ("EWC", "EWC, averaging"),
}
"""The ways that come out of one training without more work; any other has its own name."""


def points(
    start: Start, own: Mapping[str, Any], settings: Mapping[str, Sequence[Any]], run: Run
) -> Iterator[dict[str, Any]]:
    """Fine-tune with one way and one learning rate, once for each setting.

    Parameters
    ----------
    start
        The model and both tasks.
    own
        ``steps``, ``batch``, ``metric`` (of proximal steps) and, for adapters, ``rank``.
    settings
        For each way: shares of the updates, for early stopping; how far to go from before to after,
        for averaging; weights of the old observations, for replay and for joint training, which
        has all of them; strengths; for EWC with averaging, pairs of a strength and a share. What
        comes out of plain training may be limited to the rates ``along``.
    run
        ``trained`` (a key of :data:`TRAINED`, or the name of a way), ``rate`` and ``seed``.

    Yields
    ------
    dict
        ``method``, ``setting``; ``losses`` and ``kl`` as :func:`.measured` returns them; and
        ``nats``, what each structure of the Fisher information says is lost on A, for each term
        of its loss.
    """
    trained = run["trained"]
    ends = {"plain": _plain, "replay": _replay, "joint": _replay}.get(trained, _penalized)
    if trained.startswith("LoRA"):
        ends = _adapters
    for method, setting, weights in ends(start, own, settings, run):
        yield {
            "method": method,
            "setting": setting,
            **measured(start, weights),
            "nats": _nats(start, weights),
        }


End = tuple[str, Any, State]


def _plain(
    start: Start, own: Mapping[str, Any], settings: Mapping[str, Any], run: Run
) -> Iterator[End]:
    before = copy.deepcopy(start.model.state_dict())
    shares = settings.get("early stopping", ())
    at = {share: max(1, round(share * own["steps"])) for share in shares}
    options = {"rate": run["rate"], "seed": run["seed"] + 1}
    passed = tuned(start, own, None, at.values(), **options)
    after = passed[own["steps"]]
    yield "learning rate", 1.0, after
    if run["rate"] not in settings.get("along", [run["rate"]]):
        return
    for steps in at.values():
        yield "early stopping", steps, passed[steps]
    for share in settings.get("averaging", ()):
        yield "averaging", share, averaged(start.model, before, share, after=after)
    if shares := settings.get("Fisher averaging", ()):
        seen = rows_of(start.b.train, slice(len(start.seen[0])))
        fishers = start.fisher["diagonal"], diagonal(start, after, seen)
        for share in shares:
            weights = averaged(start.model, before, share, after=after, fishers=fishers)
            yield "Fisher averaging", share, weights


def diagonal(start: Start, weights: State, examples: Examples) -> Diagonal:
    """Return the diagonal of the Fisher information at some weights, of the kind of the start."""
    model = copy.deepcopy(start.model)
    model.load_state_dict(weights)
    found = fisher_information(model, examples, start.likelihood, kind=start.kind, progress=False)
    assert isinstance(found, Diagonal)
    return found


def _replay(
    start: Start, own: Mapping[str, Any], settings: Mapping[str, Any], run: Run
) -> Iterator[End]:
    method = run["trained"]
    old = start.old if method == "replay" else start.a.train
    for weight in settings[method]:
        rehearsal = _Rehearsal(start.model, old, weight, own["batch"], run["seed"])
        passed = tuned(start, own, rehearsal, rate=run["rate"], seed=run["seed"] + 1)
        yield method, weight, passed[own["steps"]]


def _penalized(
    start: Start, own: Mapping[str, Any], settings: Mapping[str, Any], run: Run
) -> Iterator[End]:
    before, method = copy.deepcopy(start.model.state_dict()), run["trained"]
    held = _penalty(method, start)
    pairs = settings.get(f"{method}, averaging", ())
    for held.strength in settings[method]:
        form = "euclidean" if "euclidean" in method else own["metric"]
        options = {"rate": run["rate"], "seed": run["seed"] + 1, "proximal": form}
        after = tuned(start, own, held, **options)[own["steps"]]
        yield method, held.strength, after
        for strength, share in pairs:
            if strength == held.strength:
                weights = averaged(start.model, before, share, after=after)
                yield f"{method}, averaging", [strength, share], weights


def _penalty(method: str, start: Start) -> QuadraticPenalty:
    """Return a penalty around the start, its strength still 0."""
    if "EWC" in method:
        structure: Structure = "kronecker" if "Kronecker" in method else "diagonal"
        ewc = EWC(start.model, 0.0, kind=start.kind, structure=structure)
        ewc.remember(start.fisher[structure])
        return ewc
    l2 = L2(start.model, 0.0)
    l2.consolidate(start.old)
    return l2


class _Rehearsal:
    """The mean loss on old observations, times a weight, in every update."""

    def __init__(self, model: nn.Module, old: Examples, weight: float, batch: int, seed: int):
        self.model, self.old, self.weight, self.batch = model, old, weight, batch
        self.generator = torch.Generator().manual_seed(seed)

    def before_task(self) -> None: ...

    def before_step(self, inputs: Any = None) -> None: ...

    def after_step(self) -> None: ...

    def add_gradient_(self) -> None:
        drawn = torch.randint(len(self.old[0]), (self.batch,), generator=self.generator)
        x, y = rows_of(self.old, drawn)
        (self.weight * cross_entropy(self.model(x), y)).backward()


def _adapters(
    start: Start, own: Mapping[str, Any], settings: Mapping[str, Any], run: Run
) -> Iterator[End]:
    """Train low-rank adapters, and yield the weights that they make."""
    model, method = copy.deepcopy(start.model), run["trained"]
    layers = [f"model.{name}" for name in adaptable(start.model.get_submodule("model"))]
    add_adapters(model, layers, own["rank"], generator=torch.Generator().manual_seed(run["seed"]))
    adapted = start._replace(model=model)
    held = _adapter_penalty(method, adapted)
    for strength in settings[method]:
        if held is not None:
            held.strength = strength
        options = {"rate": run["rate"], "seed": run["seed"] + 1, "proximal": False}
        after = tuned(adapted, own, held, **options)[own["steps"]]
        yield method, strength, _merged(start, model, after)


def _adapter_penalty(method: str, start: Start) -> Any:
    """Return what holds a network with adapters: by their products, or by their factors."""
    options: dict[str, Any] = {"kind": start.kind, "likelihood": start.likelihood}
    if method == "LoRA":
        return None
    if method == "LoRA, EWC on factors":
        factors = EWC(start.model, 0.0, **options)
        with warnings.catch_warnings(action="ignore"):  # that it does not see the factor A
            factors.consolidate(start.seen)
        return factors
    held = AdapterEWC(start.model, 0.0, **options)
    held.consolidate(start.seen)
    if method == "LoRA, L2":  # the same penalty, with the same precision for all weights
        alike = {
            name: torch.ones_like(value) if name.startswith("precision.diagonal.") else value
            for name, value in held.state_dict().items()
        }
        held.load_state_dict(alike)
    return held


@torch.no_grad()
def _merged(start: Start, adapted: nn.Module, state: State) -> State:
    """Return the weights that a network with adapters computes with."""
    model = copy.deepcopy(adapted)
    model.load_state_dict(state)
    places = (name.rpartition(".") for name in start.model.state_dict())
    return {
        f"{module}.{leaf}": getattr(model.get_submodule(module), leaf).clone()
        for module, _, leaf in places
    }


def _nats(start: Start, after: State) -> dict[str, float]:
    """Return what each structure says is lost on A, for each term of its loss."""
    before = start.model.state_dict()
    step = {name: after[name] - before[name] for name in start.whole.shapes}
    found: dict[str, Tensor] = {s: F.quadratic(step) for s, F in start.fisher.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no derivative of this kind
        found["whole"] = start.whole.quadratic(step)
    return {name: value.item() / (2 * start.terms) for name, value in found.items()}
