r"""Low-rank adapters: the weights stay, and a product of two small matrices is learned beside them.

.. math:: W = W_0 + B A
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ewc_lib._arguments import check_choice, random_source
from ewc_lib._foreach import each
from ewc_lib._parameters import Vector
from ewc_lib._states import (
    Loader,
    by_plain_names,
    check_settings,
    precision_state,
    settings_of,
)
from ewc_lib.fisher import Diagonal, fisher_information
from ewc_lib.fisher.output import KINDS, Kind
from ewc_lib.fisher.structures import Fisher, check_shapes
from ewc_lib.fisher.structures.states import under
from ewc_lib.likelihood.outputs import Likelihood, given_distribution, in_words_if_given
from ewc_lib.regularizers._function import FunctionPenalty

__all__ = ["AdapterEWC", "LowRankUpdate", "add_adapters"]


class LowRankUpdate(nn.Module):
    r"""A weight plus a product of two small matrices, a parametrization of PyTorch.

    .. math:: W = W_0 + B A

    Parameters
    ----------
    weight
        :math:`W_0`, of shape ``[O, D]``.
    rank
        Number of columns of :math:`B` and of rows of :math:`A`.
    generator
        For the first :math:`A`, uniform in :math:`\pm 1/\sqrt D`. The first :math:`B` is zero, so
        that the weight begins as it was.

    References
    ----------
    Hu et al. 2022, section 4.1, without their constant factor.
    """

    def __init__(self, weight: Float[Tensor, "O D"], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        n_out, n_in = weight.shape
        drawn = 2 * torch.rand(rank, n_in, generator=generator) - 1
        self.A = nn.Parameter(drawn.to(weight) / math.sqrt(n_in))
        self.B = nn.Parameter(weight.new_zeros(n_out, rank))

    def forward(self, weight: Float[Tensor, "O D"]) -> Float[Tensor, "O D"]:
        return weight + self.B @ self.A


def add_adapters(
    model: nn.Module,
    layers: Iterable[str],
    rank: int,
    *,
    generator: torch.Generator | None = None,
) -> None:
    r"""Freeze a network and put a trainable low-rank update beside the weight of some layers.

    The network computes what it did, because the update begins at zero. To make the updates part
    of the weights, call ``torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")``.

    Parameters
    ----------
    model
        Changed in place.
    layers
        Names of modules with a ``weight`` of two dimensions, as linear layers.
    rank
        Of each update.
    generator
        Of the first values, on the processor. By default a fresh one with seed 0; the global
        random state is not used.

    Raises
    ------
    ValueError
        If the rank is not positive, if there is no layer, or if a weight has not two dimensions.
    AttributeError
        If the model has no such layer.

    References
    ----------
    Hu et al. 2022.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    >>> add_adapters(model, ["0", "2"], rank=2)
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # 2 * (8 + 6 + 6 + 4)
    48
    """
    modules = {name: model.get_submodule(name) for name in layers}
    if rank < 1 or not modules:
        raise ValueError(f"adapters need layers and a positive rank, got {list(modules)}, {rank}")
    if wrong := [name for name, module in modules.items() if _weight(module).dim() != 2]:
        raise ValueError(f"the weights of {wrong} have not two dimensions")
    generator = random_source(generator, torch.device("cpu"))
    model.requires_grad_(False)
    for module in modules.values():
        update = LowRankUpdate(_weight(module), rank, generator)
        parametrize.register_parametrization(module, "weight", update)


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.get_parameter("weight")
    return weight


class AdapterEWC(FunctionPenalty):
    r"""Elastic weight consolidation of the weights that adapters change.

    .. math:: \Omega(A, B) = \frac{\lambda}{2} \sum_{ij} F_{ij} (W - W^*)_{ij}^2 ,
              \qquad W = W_0 + B A

    Each layer has its own :math:`W`, and :math:`F` is the diagonal of the Fisher information of
    these weights, not of :math:`A` and :math:`B` (:eq:`eq-adapter-ewc`). At the beginning
    :math:`B = 0`, where :math:`A` has no Fisher information at all (:prf:ref:`thm-adapter-blind`).

    Parameters
    ----------
    model
        A network that :func:`add_adapters` has changed.
    strength
        :math:`\lambda \ge 0`, for a loss that is the *mean* over observations.
    likelihood, kind
        As in :func:`ewc_lib.fisher_information`.

    Raises
    ------
    ValueError
        If the strength is negative or not finite, if a word is unknown, or if the model has no
        adapters.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> add_adapters(model, ["0"], rank=2)
    >>> ewc = AdapterEWC(model, strength=10.0)
    >>> ewc.consolidate((torch.randn(16, 8), torch.arange(16) % 4))
    >>> with torch.no_grad():
    ...     _ = model[0].parametrizations.weight[0].B.add_(0.1)
    >>> ewc.penalty().item() > 0
    True
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float,
        *,
        likelihood: Likelihood | None = None,
        kind: Kind = "exact",
    ) -> None:
        check_choice("kind", kind, KINDS)
        given_distribution(likelihood)  # refuses an unknown word now, not later
        super().__init__(model, strength)
        self.likelihood = likelihood
        self.kind: Kind = kind
        self._precision: Fisher | None = None
        self._anchor: Vector = {}
        if not self._weights():
            raise ValueError("the model has no adapters: call add_adapters first")

    @property
    def precision(self) -> Fisher | None:
        """The Fisher information of the weights, summed over tasks; None before the first."""
        return self._precision

    def before_step(self, inputs: Any = None) -> None:
        """Do nothing: the penalty does not depend on the data of a step."""

    def consolidate(
        self,
        data: Any,
        *,
        n_samples: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool | None = None,
    ) -> None:
        """Finish a task: add the Fisher information of the weights, and hold them where they are.

        Parameters
        ----------
        data, n_samples, generator, progress
            As in :func:`ewc_lib.fisher_information`.

        Warns
        -----
        RuntimeWarning
            If it is zero everywhere, so that nothing would be protected.
        """
        names = list(self._weights())
        frozen = [self.model.get_parameter(name) for name in names]
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            new = fisher_information(
                self.model,
                data,
                self.likelihood,
                kind=self.kind,
                params=names,
                n_samples=n_samples,
                generator=generator,
                progress=progress,
            )
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        if not new.trace() > 0:
            warnings.warn(
                "the Fisher information of the weights is zero everywhere: the penalty protects "
                "nothing",
                RuntimeWarning,
                stacklevel=2,
            )
        self._precision = new if self._precision is None else self._precision + new
        self._anchor = {name: w.detach().clone() for name, w in self._weights().items()}
        self._n_tasks += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return precision, anchor and number of tasks as plain tensors."""
        return {
            **self._state(),
            **settings_of(self._settings(), self._precision),
            **{f"anchor.{name}": value for name, value in by_plain_names(self._anchor).items()},
            **{f"precision.{key}": v for key, v in precision_state(self._precision).items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned, on the model's device.

        Raises
        ------
        ValueError
            If it is not such a state, if it says another kind or likelihood, or if its weights
            have other names or shapes than those of the model. Nothing has changed then.
        """
        self._check_state(state)
        check_settings(state, self._settings(), type(self).__name__)
        loader = Loader(self._weights(), self._device)
        anchor = loader.vector(under("anchor.", state))
        precision = None
        if int(state["n_tasks"]) > 0:
            precision = loader.precision(under("precision.", state))
            shapes = {name: w.shape for name, w in self._weights().items()}
            check_shapes(shapes, {name: value.shape for name, value in anchor.items()})
            check_shapes(shapes, precision.shapes)
        self._load(state)
        self._anchor, self._precision = anchor, precision

    def _settings(self) -> dict[str, str]:
        return {"kind": self.kind} | in_words_if_given(self.likelihood)

    def _loss(self) -> Float[Tensor, ""]:
        assert isinstance(self._precision, Diagonal)
        return 0.5 * self._precision.quadratic(each("sub", self._weights(), self._anchor))

    def _weights(self) -> Vector:
        """Return the weights in use, each by the name of the frozen parameter within it.

        Where the update is added, a step of the frozen parameter is the same step of the weight:
        the two have the same Fisher information.
        """
        found: Vector = {}
        for name, module in self.model.named_modules():
            if parametrize.is_parametrized(module, "weight"):
                (update, *others) = module.parametrizations.weight
                if isinstance(update, LowRankUpdate) and not others:
                    prefix = f"{name}." if name else ""
                    found[f"{prefix}parametrizations.weight.original"] = module.weight
        return found
