"""What the Fisher information costs by count: operations, bytes, communication.

The operations of a layer follow from its shape, those of a transformer from its layers; both can
be compared with what is really executed. From these numbers and from those of an accelerator a
forecast follows for models that nobody has measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ewc_lib.experiments.cost.benchmarks import Batches
from ewc_lib.fisher.sums.kronecker import MAX_VECTOR

__all__ = [
    "H100",
    "SHAPES",
    "Accelerator",
    "Forecast",
    "Layer",
    "Shape",
    "Work",
    "executed",
    "forecast",
    "observations_needed",
    "total",
]


class Work(NamedTuple):
    """Multiply-adds for one observation, by the part of a pass that they belong to.

    Parameters
    ----------
    forward
        The forward pass.
    backward
        The backward pass to the outputs of all layers, without gradients of parameters.
    single
        Gradients of the parameters of layers with one position.
    shared
        Gradients of the parameters of layers with several positions.
    squares
        Entries of a gradient that is formed for each observation, squared and added up.

    Examples
    --------
    >>> work = total([Layer(400, 784, first=True).work, Layer(10, 400).work])
    >>> work.plain, work.diagonal()
    (639200, 639200)
    >>> round(work.ratio(columns=9), 2)
    1.05
    """

    forward: int
    backward: int
    single: int = 0
    shared: int = 0
    squares: int = 0

    @property
    def plain(self) -> int:
        """A forward pass, and a backward pass with the gradients of all parameters."""
        return self.forward + self.backward + self.single + self.shared

    def diagonal(self, columns: int = 1) -> int:
        r"""Return what the diagonal of the Fisher information takes, for so many columns.

        .. math:: c_{\mathrm f} + K (c_{\mathrm b} + c_T + c_{\mathrm s}) + c_1

        This is :eq:`eq-diagonal-cost`: forward, backward, shared, squares and single.
        """
        each = self.backward + self.shared + self.squares
        return self.forward + columns * each + self.single

    def ratio(self, columns: int = 1) -> float:
        """Return the cost of the diagonal in plain passes."""
        return self.diagonal(columns) / self.plain


def total(works: Iterable[Work]) -> Work:
    """Add the work of several layers."""
    return Work(*map(sum, zip(*works, strict=True)))


class Layer(NamedTuple):
    """A matrix that maps the inputs of each position to outputs, as if it were the whole model.

    A convolution is one too: its inputs are the entries of a window, its positions the windows.

    Parameters
    ----------
    outputs, inputs
        The shape ``[O, I]`` of the matrix.
    positions
        How often it is used for one observation.
    bias
        Whether a vector is added to the outputs.
    first
        Whether its inputs are data, so that no gradient flows further back.

    Examples
    --------
    >>> Layer(10, 64).work
    Work(forward=640, backward=640, single=640, shared=0, squares=0)
    >>> Layer(10, 64, positions=8).work
    Work(forward=5120, backward=5120, single=0, shared=5120, squares=650)
    """

    outputs: int
    inputs: int
    positions: int = 1
    bias: bool = True
    first: bool = False

    @property
    def parameters(self) -> int:
        """Entries of the matrix and of the bias."""
        return self.outputs * (self.inputs + self.bias)

    @property
    def work(self) -> Work:
        """Multiply-adds for one observation."""
        product = self.positions * self.outputs * self.inputs
        backward = 0 if self.first else product
        if self.positions == 1:
            return Work(product, backward, single=product)
        return Work(product, backward, shared=product, squares=self.parameters)

    def stored(self, structure: str, rank: int = 32) -> int:
        """Return how many numbers a structure keeps of the Fisher information of this layer.

        Parameters
        ----------
        structure
            As in :func:`~ewc_lib.fisher_information`, or ``"matrix-free"``.
        rank
            Of ``"lowrank"``, if there are as many gradients.

        Raises
        ------
        ValueError
            If the structure is unknown.

        Examples
        --------
        >>> layer = Layer(10, 64)
        >>> layer.stored("diagonal"), layer.stored("kronecker"), layer.stored("dense")
        (650, 4325, 422500)
        """
        outputs, columns = self.outputs, self.inputs + self.bias
        match structure:
            case "diagonal":
                return self.parameters
            case "block":
                return (outputs * self.inputs) ** 2 + self.bias * outputs**2
            case "module" | "dense":
                return self.parameters**2
            case "kronecker" | "kronecker-reduce":
                return outputs**2 + columns**2
            case "eigenkronecker":
                return self.parameters + outputs**2 + columns**2
            case "lowrank":
                return rank * (self.parameters + 1)
            case "matrix-free":
                return 0
        raise ValueError(f"unknown structure {structure!r}")


class Shape(NamedTuple):
    """The sizes of a language model built as GPT-2 is, its head tied to its embedding.

    Parameters
    ----------
    layers
        Number of blocks.
    width
        Size of the vector of a token.
    vocabulary
        Number of tokens.
    length
        Tokens of a sequence.

    Examples
    --------
    >>> SHAPES["GPT-2"].parameters
    124439808
    >>> tokens = SHAPES["GPT-2"].length
    >>> round(SHAPES["GPT-2"].work.plain / (tokens * SHAPES["GPT-2"].parameters), 1)
    3.4
    """

    layers: int
    width: int
    vocabulary: int
    length: int

    @property
    def matrices(self) -> list[Layer]:
        """The linear maps of all blocks; not the head."""
        d, t = self.width, self.length
        block = Layer(3 * d, d, t), Layer(d, d, t), Layer(4 * d, d, t), Layer(d, 4 * d, t)
        return [*block] * self.layers

    @property
    def norms(self) -> int:
        """Vectors that scale or shift what has been normalised."""
        return 2 * (2 * self.layers + 1)

    @property
    def parameters(self) -> int:
        """All of them, the embedding once."""
        tables = (self.vocabulary + self.length) * self.width
        return tables + sum(m.parameters for m in self.matrices) + self.norms * self.width

    @property
    def work(self) -> Work:
        """Multiply-adds for one sequence.

        Attention multiplies queries by keys, and its weights by values; it has no parameters.
        """
        head = Layer(self.vocabulary, self.width, self.length, bias=False)
        attention = 2 * self.layers * self.length**2 * self.width
        found = total([*(m.work for m in self.matrices), head.work, Work(attention, 2 * attention)])
        return found._replace(squares=found.squares + self.norms * self.width)

    def stored(self, structure: str, rank: int = 32) -> int:
        """Return how many numbers a structure keeps.

        The factors of ``"kronecker"`` and ``"eigenkronecker"`` belong to the linear maps. The
        tables keep their diagonal, and so do vectors, unless they are short.
        """
        if structure in ("kronecker", "kronecker-reduce", "eigenkronecker"):
            factors = sum(m.stored(structure) for m in self.matrices)
            vector = self.width ** (2 if self.width <= MAX_VECTOR else 1)
            return factors + (self.vocabulary + self.length) * self.width + self.norms * vector
        return Layer(1, self.parameters, bias=False).stored(structure, rank)


SHAPES = {
    "tiny": Shape(4, 128, 1000, 128),
    "measured here": Shape(6, 256, 1000, 128),
    "GPT-2": Shape(12, 768, 50_257, 1024),
    "GPT-2 XL": Shape(48, 1600, 50_257, 1024),
    "GPT-3 13B": Shape(40, 5140, 50_257, 2048),
    "GPT-3 175B": Shape(96, 12_288, 50_257, 2048),
}
"""From 10⁶ to 10¹¹ parameters (Radford et al. 2019; Brown et al. 2020, table 2.1)."""


def executed(
    run: Callable[[Batches], object], batches: Callable[[int], Batches], n: int = 16
) -> float:
    """Return the multiply-adds for one observation, counted while they are executed.

    Two runs are compared, so that what does not depend on the number of observations, as the
    certificate, is left out. Attention is run written out, because fused code hides its
    operations from the counter.

    Parameters
    ----------
    run
        What to count: a function of the batches.
    batches
        Returns so many observations in batches.
    n
        Observations of the smaller run; the other one has twice as many.

    Examples
    --------
    >>> import torch
    >>> from ewc_lib import fisher_information
    >>> model = torch.nn.Linear(64, 10)
    >>> def draw(n):
    ...     return [(torch.randn(n, 64), torch.zeros(n, dtype=torch.long))]
    >>> executed(lambda data: fisher_information(model, data), draw)
    1280.0
    >>> Layer(10, 64, first=True).work.diagonal(columns=9)
    1280
    """

    def count(size: int) -> int:
        data = batches(size)
        counter = FlopCounterMode(display=False, custom_mapping=_IN_PLACE)
        with sdpa_kernel(SDPBackend.MATH), counter:
            run(data)
        return int(counter.get_total_flops())

    return (count(2 * n) - count(n)) / (2 * n)


def _flops(out: Any, left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    """Count a product of matrices, or of a matrix and a vector, from the shapes of both."""
    return 2 * math.prod(left) * (right[-1] if len(right) > 1 else 1)


_IN_PLACE = {
    operation: _flops
    for operation in (torch.ops.aten.addmm_, torch.ops.aten.baddbmm_, torch.ops.aten.addmv_)
}
"""Operations that PyTorch's counter does not know."""


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

TOKENS_PER_PARAMETER = 20
"""On which a model is trained best for its cost (Hoffmann et al. 2022)."""

SUM_BYTES = 4
"""Sums are kept in float32."""

MOVES = 4
"""A product is written and read to be squared; its square is written and read to be added."""


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
    >>> found = forecast(SHAPES["GPT-2"], observations=3000)
    >>> round(found.seconds), round(found.passes, 2), found.communication
    (10, 1.56, 0.0)
    """
    a, work = accelerator, shape.work
    products = columns * work.shared + work.single
    moved = MOVES * SUM_BYTES * columns * work.squares
    plain = 2 * work.plain / (a.utilisation * a.peak) * observations / ranks
    computing = 2 * (work.forward + columns * work.backward) / (a.utilisation * a.peak)
    computing += 2 * products / (a.utilisation * a.peak_of_squares) + moved / a.bandwidth
    communication = 2 * (ranks - 1) / ranks * SUM_BYTES * shape.parameters / a.link
    seconds = computing * observations / ranks + communication
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
