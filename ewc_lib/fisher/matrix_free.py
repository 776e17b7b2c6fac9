"""Products with the Fisher information of a model that is too large for any matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ewc_lib._parameters import Vector
from ewc_lib._selecting import Selection, fixed, select_parameters
from ewc_lib.fisher.output import KINDS, Kind, columns, information_times
from ewc_lib.fisher.structures import check_shapes
from ewc_lib.likelihood.outputs import OutputDistribution, output_distribution
from ewc_lib.score.batch import BatchScores
from ewc_lib.score.batch_axis import weigh
from ewc_lib.score.memory import sum_dtype
from ewc_lib.score.network import NetworkScores


class MatrixFree:
    r"""The whole Fisher information as a linear map, never written down.

    .. math:: F v = \frac1N \sum_{n=1}^N J_n^\top \, H_n \, (J_n v)

    A product takes one forward and three backward network, whatever the number of classes: the
    Fisher information :math:`H_n` of the output distribution is multiplied in closed form, and
    :math:`J_n v` is the derivative of :math:`v^\top J_n^\top u` in :math:`u`, since only
    backward network know what every operation treats as constant (compare Schraudolph 2002, who
    uses forward derivatives). Memory is about twice that of training.

    Parameters
    ----------
    model, likelihood, params, n_samples, draws, progress
        As for :func:`~ewc_lib.fisher_information`. The model is run as it is when a product is
        asked for.
    data
        As there; it is read again for every product, so a generator is refused.
    kind
        ``"exact"`` by default. The random kinds are one fixed random matrix each, drawn from
        ``seed``; a shuffled loader changes which observation gets which draw.
    seed
        Of the random kinds.

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
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        likelihood: str | OutputDistribution = "categorical",
        *,
        kind: Kind = "exact",
        params: Selection = None,
        n_samples: int | None = None,
        draws: int = 1,
        seed: int = 0,
        progress: bool | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        if isinstance(data, Iterator):
            raise ValueError("data is an iterator, which can be read only once; give a list")
        self.model = model
        self.data = data
        self.distribution = output_distribution(likelihood)
        self.kind = kind
        self.params = fixed(model, params)
        self.n_samples = n_samples
        self.draws = draws
        self.seed = seed
        self.progress = progress
        select_parameters(model, self.params)  # refuses unknown names now, not later

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The chosen parameters of the model as it is, by name."""
        return select_parameters(self.model, self.params)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the parameters, by name."""
        return {name: p.shape for name, p in self.parameters.items()}

    def __matmul__(self, v: Vector) -> Vector:
        """Return the product with a vector."""
        check_shapes(self.shapes, {name: t.shape for name, t in v.items()})
        parameters = self.parameters
        network = NetworkScores(self.model, parameters, self.distribution)
        generator = torch.Generator(network.device).manual_seed(self.seed)
        n = 0
        with network.leaving_no_trace(), sdpa_kernel(SDPBackend.MATH):
            total = {
                name: torch.zeros(p.shape, dtype=sum_dtype(p), device=p.device)
                for name, p in parameters.items()
            }
            for batch in network.over(self.data, self.n_samples, self.progress):
                for name, g in self._product(batch, parameters, v, generator).items():
                    total[name] += g
                n += len(batch)
            return {name: t / n for name, t in total.items()}

    def quadratic(self, v: Vector) -> Float[Tensor, ""]:
        r"""Return :math:`v^\top F v`, a number without a graph: its gradient is :math:`2 F v`."""
        product = self @ v
        return torch.stack([(v[name].detach() * product[name]).sum() for name in product]).sum()

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
        if self.kind == "exact":
            return information_times(self.distribution, batch.output, batch.batch.target, u)
        total = torch.zeros_like(u)
        for column in columns(
            self.kind,
            self.distribution,
            batch.output,
            batch.batch.target,
            self.draws,
            generator,
        ):
            along = (column * u).reshape(len(batch), -1).sum(1)
            total += weigh(column, along)
        return total
