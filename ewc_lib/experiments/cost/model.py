"""What the Fisher information costs by count.

The operations of a layer follow from its shape, those of a transformer from its layers; both can
be compared with what is really executed, by :mod:`ewc_lib.experiments.cost.executed`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ewc_lib.fisher.sums.kronecker import MAX_VECTOR

__all__ = ["SHAPES", "Layer", "Shape", "Work", "total"]


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
