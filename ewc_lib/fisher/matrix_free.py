"""Products with the Fisher information of a model that is too large for any matrix."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ewc_lib._arguments import check_choice, check_place, check_whole, random_source
from ewc_lib._checking import check_finite_sums, explaining
from ewc_lib._drawing import random_part
from ewc_lib._forms import Pick, picked
from ewc_lib._parameters import Vector, check_real
from ewc_lib._precision import Precision
from ewc_lib._selecting import Selection, fixed, select_parameters
from ewc_lib.fisher.linear_map import LinearMap
from ewc_lib.fisher.output import KINDS, Kind, columns, information_times
from ewc_lib.fisher.structures.vectors import V, in_form_of, named
from ewc_lib.fisher.sums.base import DIAGONAL_ONLY
from ewc_lib.likelihood.agreement import Criterion, agreed
from ewc_lib.likelihood.outputs import Likelihood, OutputDistribution, given_distribution
from ewc_lib.score.batch import BatchScores
from ewc_lib.score.batch_axis import weigh
from ewc_lib.score.memory import sum_dtype
from ewc_lib.score.network import NetworkScores


class MatrixFree(LinearMap):
    r"""The whole Fisher information as a linear map, never written down.

    .. math:: F v = \frac1N \sum_{n=1}^N J_n^\top \, H_n \, (J_n v)

    A product takes one forward and three backward passes, whatever the number of classes: the
    Fisher information :math:`H_n` of the output distribution is multiplied in closed form, and
    :math:`J_n v` is the derivative of :math:`v^\top J_n^\top u` in :math:`u`, since only
    backward passes know what every operation treats as constant (compare Schraudolph 2002, who
    uses forward derivatives). Memory is about twice that of training. Whatever else it answers,
    it answers by products: each is a pass over all data.

    Parameters
    ----------
    model
        As for :func:`~ewc_lib.fisher_information`. Each product is one with the Fisher
        information of the model as it is then: train it on, and the map is another.
    data
        As there, but they are read again for every product, so an iterator, which can be read
        only once, is refused.
    likelihood, criterion
        As there. The two are compared when the first product is asked for.
    kind
        As there. A random kind is one fixed random matrix: every product makes the same draws
        (in a shuffled loader they fall on other observations each time).
    params, batch, draws, precision, progress
        As there.
    n_samples
        As there; each product is of the same part, if the data have an order.
    generator
        As there, but its state is copied: every product begins from it anew, and the generator
        itself does not go on.
    dtype, device
        Of the sums, and of what is returned, as there.

    Raises
    ------
    ValueError
        As :func:`~ewc_lib.fisher_information`, and if the vector has other names or shapes.

    Examples
    --------
    >>> import torch
    >>> from ewc_lib import fisher_information
    >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(10, 3), torch.arange(10) % 2
    >>> F = MatrixFree(model, (x, y))
    >>> v = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    >>> G = fisher_information(model, (x, y), structure="dense")
    >>> torch.allclose((F @ v)["weight"], (G @ v)["weight"], atol=1e-6)
    True
    >>> trace, error = F.trace(n_probes=100)  # an estimate, from 100 products
    >>> abs(trace - G.trace()) < 4 * error
    tensor(True)
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        likelihood: Likelihood | None = None,
        *,
        criterion: Criterion | None = None,
        kind: Kind = "exact",
        params: Selection = None,
        n_samples: int | None = None,
        batch: Pick | None = None,
        draws: int = 1,
        precision: Precision = "highest",
        generator: torch.Generator | None = None,
        progress: bool | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_choice("kind", kind, KINDS)
        check_choice("precision", precision, get_args(Precision))
        check_whole(n_samples=n_samples, draws=draws)
        check_place(dtype, device)
        if isinstance(data, Iterator):
            raise ValueError("data is an iterator, which can be read only once; give a list")
        self.model = model
        self.data = picked(data, batch)
        self.likelihood = given_distribution(likelihood)
        self.criterion = criterion
        self.kind = kind
        self.params = fixed(model, params)
        self.n_samples = n_samples
        self.draws = draws
        self.precision: Precision = precision
        self.progress = progress
        self._found: tuple[Any, OutputDistribution] | None = None
        self._place = dtype, device
        parameters = self.parameters  # refuses unknown names now, not later
        check_real(parameters, DIAGONAL_ONLY)
        self._state: Tensor | None = None
        if generator is not None:
            device = next(iter(parameters.values())).device
            self._state = random_source(generator, device).get_state()

    def __repr__(self) -> str:
        size = sum(shape.numel() for shape in self.shapes.values())
        return (
            f"{type(self).__name__}(kind={self.kind!r}, n_samples={self.n_samples}, "
            f"parameters={size}, dtype={self.dtype}, device={str(self.device)!r})"
        )

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The chosen parameters of the model as it is, by name."""
        return select_parameters(self.model, self.params)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the parameters, by name."""
        return {name: p.shape for name, p in self.parameters.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Precision of a flat product; the widest, if that of the parameters differs."""
        dtypes = (self._place[0] or sum_dtype(p) for p in self.parameters.values())
        return reduce(torch.promote_types, dtypes)

    @property
    def device(self) -> torch.device:
        """Where products are."""
        return torch.device(self._place[1] or next(iter(self.parameters.values())).device)

    @property
    def _rounding(self) -> float:
        return max(torch.finfo(p.dtype).eps for p in self.parameters.values())

    def __matmul__(self, v: V) -> V:
        """Return the product with a vector, named or flat, in the same form.

        A flat vector ``[P]`` holds all parameters in the order of :attr:`shapes`.
        """
        shapes = self.shapes
        return in_form_of(v, self._times(named(v, shapes)), shapes)

    def _zeros(self, parameter: nn.Parameter) -> Tensor:
        dtype, device = self._place
        return torch.zeros(
            parameter.shape,
            dtype=dtype or sum_dtype(parameter),
            device=parameter.device if device is None else device,
        )

    def _times(self, v: Vector) -> Vector:
        """Return the product with named tensors."""
        network = NetworkScores(self.model, self.parameters, precision=self.precision)
        parameters = network.parameters
        generator = random_source(None, network.device)
        if self._state is not None:
            generator.set_state(self._state)
        data, n = random_part(self.data, self.n_samples, generator), 0
        with network.leaving_no_trace(), sdpa_kernel(SDPBackend.MATH):
            data, network.distribution = self._agreed(data)
            total = {name: self._zeros(p) for name, p in parameters.items()}
            for batch in explaining(network.over(data, self.n_samples, self.progress), self.model):
                for name, g in self._product(batch, parameters, v, generator).items():
                    total[name] += g.to(total[name])
                n += len(batch)
            check_finite_sums(total)
            return {name: t / n for name, t in total.items()}

    def _agreed(self, data: Any) -> tuple[Any, OutputDistribution]:
        """Compare the likelihood with the loss, once; the data are the same every time."""
        if self._found is None:
            self._found = agreed(self.model, data, self.likelihood, self.criterion)
        return self._found

    def _product(
        self,
        batch: BatchScores,
        parameters: dict[str, nn.Parameter],
        v: Vector,
        generator: torch.Generator,
    ) -> Vector:
        """Return the sum over a batch, for the parameters that its output depends on."""
        output = batch.forward.output
        if not output.requires_grad:
            return {}
        u = torch.zeros_like(output, requires_grad=True)
        back = torch.autograd.grad(
            output, list(parameters.values()), u, create_graph=True, allow_unused=True
        )
        used = {n: g for n, g in zip(parameters, back, strict=True) if g is not None}
        if not used:
            return {}
        (along,) = torch.autograd.grad(
            list(used.values()), u, [v[name].to(g) for name, g in used.items()], retain_graph=True
        )
        column = self._information_times(batch, along.to(batch.output), generator).to(output)
        chosen = [parameters[name] for name in used]
        return dict(zip(used, torch.autograd.grad(output, chosen, column), strict=True))

    def _information_times(
        self, batch: BatchScores, u: Tensor, generator: torch.Generator
    ) -> Tensor:
        assert self._found is not None
        distribution = self._found[1]
        if self.kind == "exact":
            return information_times(distribution, batch.output, batch.batch.target, u)
        total = torch.zeros_like(u)
        for block in columns(
            self.kind,
            distribution,
            batch.output,
            batch.batch.target,
            self.draws,
            generator,
        ):
            for column in block:
                along = (column * u).reshape(len(batch), -1).sum(1)
                total += weigh(column, along)
        return total
