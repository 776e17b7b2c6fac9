"""What the Fisher information should cost: time, communication and memory on an accelerator.

From the counts of :mod:`ewc_lib.experiments.cost.model` and the numbers of an accelerator a
forecast follows for models that nobody has measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ewc_lib.experiments.cost.model import Shape, Work
from ewc_lib.experiments.cost.report import Measured

__all__ = [
    "CARDS",
    "H100",
    "PROCESSOR",
    "Accelerator",
    "Check",
    "Forecast",
    "checks",
    "diagonal_seconds",
    "forecast",
    "numbers_of",
    "observations_needed",
    "plain_seconds",
]


class Accelerator(NamedTuple):
    """What a forecast needs to know of a machine.

    Parameters
    ----------
    name
        What it is called.
    peak
        Operations a second of the model's own passes; a multiply-add is two operations.
    peak_of_squares
        Operations a second of the products that are squared, which are formed in float32.
    utilisation
        Share of both that real training reaches.
    bandwidth
        Bytes a second between processor and memory.
    memory
        Bytes.
    link
        Bytes a second that one accelerator can send to others.
    """

    name: str
    peak: float
    peak_of_squares: float
    utilisation: float
    bandwidth: float
    memory: float
    link: float


H100 = Accelerator("H100 SXM", 989.4e12, 494.7e12, 0.4, 3.35e12, 80e9, 50e9)
"""NVIDIA (2023), dense: bfloat16, TF32 and HBM3.

The network of 400 Gbit/s for each accelerator is that of Llama 3, and so is the utilisation, of
38 to 41 % on 16,384 of them (Grattafiori et al. 2024, table 4).
"""

SINGLE = 66.9e12
"""Operations a second of an H100 or H200 in single precision without TF32.

PyTorch uses TF32 by default for convolutions only.
"""

CARDS = {
    "H100": H100._replace(name="H100", peak=SINGLE, peak_of_squares=SINGLE),
    "H200": H100._replace(
        name="H200", peak=SINGLE, peak_of_squares=SINGLE, bandwidth=4.8e12, memory=141e9
    ),
}
"""Graphics cards that measured tables may be from; the second is the first with more memory."""

PROCESSOR = Accelerator("processor", 1.0, 1.0, 1.0, *[math.inf] * 3)
"""One whose numbers are not known: all products at one speed, all squares in the cache."""

TOKENS_PER_PARAMETER = 20
"""On which a model is trained best for its cost (Hoffmann et al. 2022)."""

SUM_BYTES = 4
"""Sums are kept in float32."""

MOVES = 4
"""A product is written and read to be squared; its square is written and read to be added.

That is the most: a reduction, as on an accelerator, writes no squares.
"""


class Forecast(NamedTuple):
    """What the diagonal of the Fisher information should cost.

    Parameters
    ----------
    seconds
        Until every rank has the result.
    passes
        The same, in plain passes over the same data.
    communication
        Seconds of it for the all-reduce.
    of_training
        Share of the time for training, on as many accelerators.
    memory
        Bytes on each accelerator for the model in half precision, the sums in float32, and
        their mean or what is sent of it beside them.
    """

    seconds: float
    passes: float
    communication: float
    of_training: float
    memory: float


def plain_seconds(work: Work, accelerator: Accelerator) -> float:
    """Return the time of a plain pass for one observation."""
    return 2 * work.plain / (accelerator.utilisation * accelerator.peak)


def diagonal_seconds(work: Work, accelerator: Accelerator, columns: int = 1) -> float:
    """Return the time that the diagonal takes for one observation, with so many columns."""
    a = accelerator
    products = columns * work.shared + work.single
    computing = 2 * (work.forward + columns * work.backward) / (a.utilisation * a.peak)
    computing += 2 * products / (a.utilisation * a.peak_of_squares)
    return computing + MOVES * SUM_BYTES * columns * work.squares / a.bandwidth


def forecast(
    shape: Shape,
    accelerator: Accelerator = H100,
    *,
    observations: float,
    ranks: int = 1,
    columns: int = 1,
) -> Forecast:
    r"""Forecast time, communication and memory of a diagonal.

    .. math:: t = \frac NR \Big( \frac{2 (c_{\mathrm f} + K c_{\mathrm b})}{u \, \text{peak}}
              + \frac{2 (K c_T + c_1)}{u \, \text{peak}_{32}}
              + \frac{16 K c_{\mathrm s}}{\text{bandwidth}} \Big)
              + \frac{R - 1}{R} \frac{8 P}{\text{link}}

    This is :eq:`eq-forecast`: the products that are squared run in float32, nothing of them
    stays in a cache, nothing overlaps, and the ranks add their results in a ring (Patarasuk and
    Yuan 2009).

    Parameters
    ----------
    shape
        The model.
    accelerator
        The machine.
    observations
        Sequences in all.
    ranks
        Accelerators, each with the whole model and its share of the data.
    columns
        Backward passes for each sequence.

    Examples
    --------
    >>> from ewc_lib.experiments.cost.model import SHAPES
    >>> found = forecast(SHAPES["GPT-2"], observations=3000)
    >>> round(found.seconds), round(found.passes, 2), found.communication
    (10, 1.56, 0.0)
    """
    work, each = shape.work, observations / ranks
    plain = each * plain_seconds(work, accelerator)
    communication = 2 * (ranks - 1) / ranks * SUM_BYTES * shape.parameters / accelerator.link
    seconds = each * diagonal_seconds(work, accelerator, columns) + communication
    training = plain * TOKENS_PER_PARAMETER * shape.parameters / (observations * shape.length)
    return Forecast(
        seconds,
        seconds / plain,
        communication,
        seconds / training,
        (2 + 2 * SUM_BYTES) * shape.parameters,
    )


def observations_needed(error: float, draws: int = 1, effective: float = 1.0) -> float:
    r"""Return how many observations bring a sketch to a relative error of the whole diagonal.

    .. math:: N = \frac{1}{\varepsilon^2} \Big(1 + \frac2m\Big) \frac{N}{N_{\text{eff}}}

    The choice of the observations adds :math:`1 / N_{\text{eff}}` to the square of the error,
    and the sketch at most :math:`2 / (m N_{\text{eff}})`, by :eq:`eq-effective`.

    Parameters
    ----------
    error
        Relative error of the whole diagonal, as :eq:`eq-relative-error` defines it.
    draws
        Sketches of each observation.
    effective
        Effective observations for each one, between 0 and 1.

    Examples
    --------
    >>> round(observations_needed(0.1))
    300
    """
    return (1 + 2 / draws) / (error**2 * effective)


class Check(NamedTuple):
    """A forecast beside what was measured, both in plain passes.

    Parameters
    ----------
    model, kind
        What was measured.
    forecast, measured
        Plain passes.
    """

    model: str
    kind: str
    forecast: float
    measured: float

    @property
    def ratio(self) -> float:
        """Forecast over measured: below one where something costs that no term knows."""
        return self.forecast / self.measured


def checks(
    rows: Iterable[Measured], works: Mapping[str, tuple[Work, int]], accelerator: Accelerator
) -> list[Check]:
    """Compare the forecast with what was measured of this package.

    Parameters
    ----------
    rows
        Measurements; those of other libraries, and those that have no time, are left out.
    works
        What each model takes, as :func:`~ewc_lib.experiments.cost.executed.work_of` returns it.
    accelerator
        The machine that they are from. Only ratios of its numbers matter.

    Examples
    --------
    >>> from ewc_lib.experiments.cost.model import Layer
    >>> row = Measured("mlp", "ewc_lib", "exact", 100, passes=2.1)
    >>> work = Layer(400, 784, first=True).work
    >>> checks([row], {"mlp": (work, 9)}, PROCESSOR)[0].ratio < 1
    True
    """
    found = []
    for row in rows:
        if row.library == "ewc_lib" and row.reason is None and row.model in works:
            work, columns = works[row.model]
            columns = columns if row.kind == "exact" else 1
            plain = plain_seconds(work, accelerator)
            passes = diagonal_seconds(work, accelerator, columns) / plain
            found.append(Check(row.model, row.kind, passes, row.passes))
    return found


def numbers_of(device: str) -> Accelerator | None:
    """Return what is known of a device by its name, or None.

    Examples
    --------
    >>> numbers_of("NVIDIA H100 80GB HBM3").name, numbers_of("NVIDIA A100-SXM4-40GB")
    ('H100', None)
    """
    return next((card for name, card in CARDS.items() if name in device), None)
