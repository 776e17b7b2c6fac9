"""The diagonal Fisher information as this package and others compute it.

Each contestant is a small function of a model and its batches. It returns the mean over
observations by the name of the parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Protocol, TypeAlias, get_args

import torch
from torch import nn

from ewc_lib.experiments.cost._libraries import (
    JACOBIAN_BATCH,
    asdl,
    backpack,
    curvlinops,
    laplace,
    nngeometry_empirical,
    nngeometry_exact,
    opacus,
)
from ewc_lib.experiments.cost._plain import (
    Diagonal,
    func_empirical,
    func_exact,
    loop_empirical,
    loop_exact,
    plain_pass,
)
from ewc_lib.experiments.cost.benchmarks import Batches, Benchmark
from ewc_lib.fisher.estimate import fisher_information
from ewc_lib.fisher.output import Kind

__all__ = [
    "CONTESTANTS",
    "PEERS",
    "Contestant",
    "Contestants",
    "Diagonal",
    "answer",
    "error",
    "plain_pass",
]


CHECKED = 16
"""Observations on which answers are compared."""


class Contestant(Protocol):
    """What is measured."""

    def __call__(self, model: nn.Module, batches: Batches, /) -> Diagonal: ...


Contestants: TypeAlias = Mapping[str, Mapping[str, Contestant]]
"""By library and kind."""


def ours(model: nn.Module, batches: Batches, *, kind: Kind) -> Diagonal:
    """Run this package."""
    return fisher_information(model, batches, kind=kind, progress=False).diagonal()


PEERS: dict[str, dict[str, Contestant]] = {
    "nngeometry": {"empirical": nngeometry_empirical, "exact": nngeometry_exact},
    "BackPACK": {
        "empirical": partial(backpack, extension="SumGradSquared"),
        "exact": partial(backpack, extension="DiagGGNExact"),
    },
    "curvlinops": {"sketch": curvlinops},
    "laplace": {
        "empirical": partial(laplace, backend="CurvlinopsEF"),
        "exact": partial(laplace, backend="CurvlinopsGGN", batch_size=JACOBIAN_BATCH),
    },
    "laplace (BackPACK)": {
        "empirical": partial(laplace, backend="BackPackEF"),
        "exact": partial(laplace, backend="BackPackGGN"),
    },
    "ASDL": {
        "empirical": partial(asdl, fisher_type="fisher_emp"),
        "exact": partial(asdl, fisher_type="fisher_exact"),
    },
    "opacus": {"empirical": opacus},
    "torch.func": {"empirical": func_empirical, "exact": func_exact},
    "loop": {"empirical": loop_empirical, "exact": loop_exact},
}
"""What other libraries and plain PyTorch offer."""

CONTESTANTS: Contestants = {
    "ewc_lib": {kind: partial(ours, kind=kind) for kind in get_args(Kind)},
    **PEERS,
}
"""All that are measured."""


def answer(contestant: Contestant, benchmark: Benchmark) -> Diagonal:
    """Run a contestant on a few observations in two batches, in double precision.

    Parameters
    ----------
    contestant
        What to run; its warnings are not shown.
    benchmark
        The model and its data.
    """
    batches = benchmark._replace(batch_size=CHECKED // 2).batches(CHECKED)
    double = [(x.double() if x.is_floating_point() else x, y) for x, y in batches]
    model = benchmark.model().double()
    with _double_precision(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return contestant(model, double)


def error(contestant: Contestant, kind: str, benchmark: Benchmark) -> float | None:
    """Compare the answer of a contestant with the loop over single observations.

    Parameters
    ----------
    contestant
        What to judge.
    kind
        All but ``"empirical"`` are compared with the exact Fisher information.
    benchmark
        The model and its data.

    Returns
    -------
    float or None
        The largest error of any entry, relative to the largest entry of its parameter. A
        parameter that is missing counts as zero. None if the truth is out of reach.

    Raises
    ------
    ValueError
        If the answer is not finite.

    Examples
    --------
    >>> from ewc_lib.experiments.cost.benchmarks import BENCHMARKS
    >>> error(PEERS["torch.func"]["empirical"], "empirical", BENCHMARKS["mlp"]) < 1e-12
    True
    """
    found = answer(contestant, benchmark)
    if not all(f.isfinite().all() for f in found.values()):
        raise ValueError("the answer is not finite")
    expected = "empirical" if kind == "empirical" else "exact"
    if expected == "exact" and not benchmark.exact:
        return None
    truth = _truth(benchmark, expected)
    # Some entries are zero by symmetry, up to rounding: the bias of the keys of attention.
    tiny = 1e-12 * max(float(f.abs().max()) for f in truth.values())
    errors = (
        float((found.get(name, torch.zeros_like(f)) - f).abs().max())
        / max(float(f.abs().max()), tiny)
        for name, f in truth.items()
    )
    return max(errors)


@cache
def _truth(benchmark: Benchmark, kind: str) -> Diagonal:
    return answer(PEERS["loop"][kind], benchmark)


@contextmanager
def _double_precision() -> Iterator[None]:
    """Change the default: some libraries make buffers in it, whatever the model has."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
