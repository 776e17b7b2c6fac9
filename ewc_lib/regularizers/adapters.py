r"""Low-rank adapters: the weights stay, and a product of two small matrices is learned beside them.

.. math:: W = W_0 + B A
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib._adapted._twin import wide
from ewc_lib._adapted.choosing import chooser
from ewc_lib._adapted.low_rank import LowRankUpdate, add_adapters
from ewc_lib._adapted.network import Unit, has_adapters, units, without_adapters
from ewc_lib._arguments import check_choice
from ewc_lib._foreach import each
from ewc_lib._forms import Pick
from ewc_lib._names import plain_names
from ewc_lib._parameters import Vector
from ewc_lib._precision import Precision
from ewc_lib._processes import Group, over_ranks, share_of, taking_part
from ewc_lib._selecting import Selection
from ewc_lib._sharded import any_sharded
from ewc_lib._states import check_chosen, check_settings, settings_of
from ewc_lib._warning import warn
from ewc_lib.attaching import accumulate_
from ewc_lib.files import card_of_penalty, read, write
from ewc_lib.fisher import Diagonal, fisher_information
from ewc_lib.fisher.estimate import AnyKind, check_request
from ewc_lib.fisher.structures import Fisher, check_shapes
from ewc_lib.fisher.structures.states import under
from ewc_lib.likelihood.agreement import Criterion
from ewc_lib.likelihood.outputs import Likelihood, given_distribution, in_words_if_given
from ewc_lib.regularizers._function import FunctionPenalty
from ewc_lib.score.plan import Certify

__all__ = ["AdapterEWC", "LowRankUpdate", "add_adapters"]


class AdapterEWC(FunctionPenalty):
    r"""Elastic weight consolidation of the weights that adapters change.

    .. math:: \Omega(A, B) = \frac{\lambda}{2} \sum_{ij} F_{ij} (W - W^*)_{ij}^2 ,
              \qquad W = W_0 + B A

    Each layer has its own :math:`W`, and :math:`F` is the diagonal of the Fisher information of
    these weights, not of :math:`A` and :math:`B` (:eq:`eq-adapter-ewc`). At the beginning
    :math:`B = 0`, where :math:`A` has no Fisher information at all (:prf:ref:`thm-adapter-blind`).

    Whatever else is trained is held, too: biases, normalisations, a head. So this is the
    :class:`ewc_lib.EWC` of the network that the adapters make. The parameters of that network
    have the names of one without adapters. So adapters may be merged, taken out and added again
    between two tasks.

    Parameters
    ----------
    model
        A network that :func:`add_adapters` has changed, or one of the library peft.
    strength
        :math:`\lambda \ge 0`, for a loss that is the *mean* over observations.
    mode, decay
        As in :class:`ewc_lib.EWC`, but for the default: ``"online"`` with :math:`\gamma = 1` sums
        the Fisher information of all tasks, and holds the weights where the last one left them.
    likelihood, criterion, kind, n_samples, draws, certify, precision
        As in :class:`ewc_lib.EWC`. ``precision`` is that of products; the attribute of that name
        is the matrix of the penalty.
    budget, structure
        Here for comparison with :class:`ewc_lib.EWC`: there is no budget, and the diagonal only.
    params
        What to hold: names or glob patterns of a network without adapters (``"*.q_proj.weight"``),
        modules of the model, or a predicate of ``(name, tensor)``. By default all that changes.

    Raises
    ------
    ValueError
        If there is no strength, or it is negative or not finite, if a word or number cannot be
        meant, if the model has no adapters, or if a layer is no linear map with one weight, by
        its name.

    Notes
    -----
    The layers of peft that are known are linear ones (also with 4 or 8 bits of bitsandbytes),
    embeddings and convolutions with LoRA (also rsLoRA, DoRA, biases, several adapters), LoHa and
    LoKr; and linear ones with other adapters, to which the identity matrix is shown: as much
    work in each step as a batch of as many rows as the layer has inputs. Adapters that are active
    count. Every layer is compared with its weight in :meth:`consolidate`.

    The penalty needs as much memory as the weights themselves, twice for all that is held and
    once more for the layer that is at hand in :meth:`add_gradient_`.

    References
    ----------
    Hu et al. 2022 for LoRA.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> add_adapters(model, ["0"], rank=2)
    >>> ewc = AdapterEWC(model, strength=10.0)
    >>> F = ewc.consolidate((torch.randn(16, 8), torch.arange(16) % 4))
    >>> list(F.diagonal())
    ['0.weight']
    >>> with torch.no_grad():
    ...     _ = model[0].parametrizations.weight[0].B.add_(0.1)
    >>> ewc.penalty().item() > 0
    True
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float | None = None,
        mode: Literal["separate", "online"] = "online",
        *,
        budget: None = None,
        decay: float = 1.0,
        likelihood: Likelihood | None = None,
        criterion: Criterion | None = None,
        kind: AnyKind = "exact",
        structure: Literal["diagonal"] = "diagonal",
        params: Selection = None,
        n_samples: int | None = None,
        draws: int = 1,
        certify: Certify = "auto",
        precision: Precision = "highest",
    ) -> None:
        check_choice("mode", mode, ("separate", "online"))
        if structure != "diagonal":
            raise ValueError(
                "AdapterEWC holds the diagonal of the weights that adapters make, and no "
                f"structure={structure!r}"
            )
        if strength is None or budget is not None:
            raise ValueError(
                "AdapterEWC needs a strength: a budget is kept by a proximal step, and there is "
                "none for what adapters train"
            )
        check_request(kind, "diagonal", n_samples, draws, 1, certify, precision, None, None)
        given_distribution(likelihood)  # refuses an unknown word now, not later
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie between 0 and 1, got {decay}")
        if mode == "separate" and decay != 1:
            raise ValueError("decay belongs to mode='online'; separate penalties do not decay")
        super().__init__(model, strength)
        self.params = params
        self._wrapped = model  # which says whose running statistics count
        self.mode, self.decay = mode, decay
        self.likelihood, self.criterion = likelihood, criterion
        self.kind: AnyKind = kind
        self.n_samples, self.draws, self.certify = n_samples, draws, certify
        self.products: Precision = precision
        self._precision: Diagonal | None = None
        self._anchor: Vector = {}
        self._offset = torch.zeros(())
        if not has_adapters(model):
            raise ValueError(
                "the model has no adapters: call add_adapters or peft.get_peft_model first, or "
                "hold it with EWC"
            )
        self._is_chosen = chooser(model, params)
        if not self._names():
            raise ValueError("params chooses no parameter")

    @property
    def precision(self) -> Fisher | None:
        """The Fisher information of the weights, summed over tasks; None before the first."""
        return self._precision

    @property
    def anchor(self) -> Vector:
        """The weights where the penalty is smallest; empty before the first task."""
        return dict(self._anchor)

    def before_step(self, inputs: Any = None) -> None:
        """Do nothing: the penalty does not depend on the data of a step."""

    def consolidate(
        self,
        data: Any,
        *,
        n_samples: int | None = None,
        batch: Pick | None = None,
        generator: torch.Generator | None = None,
        progress: bool | None = None,
        group: Group = None,
    ) -> Fisher:
        """Finish a task: add the Fisher information of the weights, and hold them where they are.

        Parameters
        ----------
        data, n_samples, batch, generator, progress, group
            As in :meth:`ewc_lib.EWC.consolidate`.

        Returns
        -------
        Fisher
            The Fisher information of this task alone, with the names of a network without
            adapters.

        Raises
        ------
        ValueError
            As :func:`ewc_lib.fisher_information`, or if a layer computes something else than a
            linear map with one weight, if processes have other parameters, or if they share one
            parameter in parts. Nothing has changed then.
        RuntimeError
            If another process has failed, or if this one is not in the group.

        Warns
        -----
        RuntimeWarning
            If it is zero everywhere, so that nothing would be protected.
        """
        if any_sharded(self.model.parameters()):
            raise ValueError("the parameters are sharded, and AdapterEWC needs whole ones")
        ranks = taking_part(group)
        size, rank = (ranks.size, ranks.rank) if ranks else (1, 0)
        if generator is None:  # the random errors of two tasks and ranks are not to be the same
            generator = torch.Generator(self._device).manual_seed(self.n_tasks * size + rank)

        def compute() -> Fisher:
            return self._fisher(
                share_of(data, self.model) if ranks else data,
                n_samples=self.n_samples if n_samples is None else n_samples,
                batch=batch,
                generator=generator,
                progress=progress or False if rank else progress,
            )

        is_wrapped = getattr(self._wrapped, "module", None) is self.model
        new = over_ranks(self._wrapped if is_wrapped else self.model, compute, ranks)
        assert isinstance(new, Diagonal)
        self._remember(new)
        return new

    def remember(self, fisher: Fisher) -> None:
        """Finish a task whose Fisher information was computed elsewhere, as that of a base model.

        Before adapters are trained they change nothing, so the Fisher information of the model
        without them is that of the weights that they make: also one from a file, or the
        ``precision`` of an :class:`ewc_lib.EWC`.

        Parameters
        ----------
        fisher
            A diagonal, at the present weights, with the names of a network without adapters. What
            it has of parameters that nothing trains is left out.

        Raises
        ------
        ValueError
            If it is not diagonal, of another kind than this penalty, or has not all that is to be
            held, in its shape. Nothing has changed then.

        Warns
        -----
        RuntimeWarning
            If it is zero everywhere, so that nothing would be protected.

        Examples
        --------
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> F = fisher_information(model, (torch.randn(16, 8), torch.arange(16) % 4))
        >>> add_adapters(model, ["0"], rank=2)
        >>> ewc = AdapterEWC(model, strength=10.0)
        >>> ewc.remember(F)
        >>> list(ewc.anchor)
        ['0.weight']
        """
        if not isinstance(fisher, Diagonal):
            raise ValueError(f"AdapterEWC holds a diagonal, got a {type(fisher).__name__}")
        if fisher.kind != self.kind:
            raise ValueError(
                f"this AdapterEWC is of kind {self.kind!r}, got a Fisher of {fisher.kind!r}"
            )
        fisher = fisher._renamed(plain_names(fisher.shapes))
        with torch.no_grad():
            held = {name: w.shape for name, w in self._weights(set(self._names())).items()}
        check_shapes(held, {n: shape for n, shape in fisher.shapes.items() if n in held})
        self._remember(replace(fisher, values={name: fisher.values[name] for name in held}))

    def nats(self) -> Float[Tensor, ""]:
        """Return what the old tasks are predicted to have lost, as :meth:`ewc_lib.EWC.nats`."""
        return self._loss() if self._precision is not None else torch.zeros((), device=self._device)

    def _fisher(self, data: Any, **options: Any) -> Diagonal:
        """Return the Fisher information of what is held, in the network that adapters make."""
        names = self._names()
        with without_adapters(self.model, in_own_dtype=self.products == "high") as network:
            held = {name: network.parameters[name] for name in names}
            frozen = [p for p in held.values() if not p.requires_grad]
            for parameter in frozen:
                parameter.requires_grad_(True)
            try:
                found = fisher_information(
                    network.model,
                    data,
                    self.likelihood,
                    criterion=self.criterion,
                    kind=self.kind,
                    params=list(held.values()),
                    draws=self.draws,
                    certify=self.certify,
                    precision=self.products,
                    **options,
                )
                assert isinstance(found, Diagonal)
                return _renamed(found, network.model, held)
            finally:
                for parameter in frozen:
                    parameter.requires_grad_(False)

    def _remember(self, new: Diagonal) -> None:
        """Take the Fisher information of one more task around the present weights."""
        if not new.trace() > 0:
            warn(
                "the Fisher information of the weights is zero everywhere: the penalty protects "
                "nothing"
            )
        with torch.no_grad():
            now = self._weights({*new.values, *self._anchor})
        optimum = {name: w.detach().clone() for name, w in now.items()}
        new = _filled(new, optimum)
        offset = new.trace().new_zeros(())
        if self._precision is None:
            precision, anchor = new, optimum
        else:
            old = _filled(self._precision, optimum)
            if self.mode == "online":
                precision, anchor = self.decay * old + new, optimum
            else:  # as EWC merges the penalties of two tasks into one
                before = optimum | {n: w.to(optimum[n]) for n, w in self._anchor.items()}
                precision = old + new
                shift = precision.solve(new @ each("sub", optimum, before))
                anchor = each("add", before, shift)
                offset = self._offset.to(offset)
                offset = offset + old.quadratic(shift)
                offset = offset + new.quadratic(each("sub", optimum, anchor))
        self._precision, self._anchor, self._offset = precision, anchor, offset
        self._n_tasks += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return precision, anchor and number of tasks as plain tensors.

        They have the names of a network without adapters.
        """
        precision = {} if self._precision is None else self._precision.state_dict()
        return {
            **self._state(),
            **settings_of(self._settings(), self._precision),
            "offset": self._offset.clone(),
            **{f"anchor.{name}": value.clone() for name, value in self._anchor.items()},
            **{f"precision.{key}": value for key, value in precision.items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned, on the model's device.

        The state of an :class:`ewc_lib.EWC` of the network without adapters is one as well, if
        it is diagonal and the settings are the same: its mode is another one by default.

        Raises
        ------
        ValueError
            If it is not such a state, if it says other settings, if its weights have other names
            or shapes than those of the model, or if ``params`` does not choose one that is
            trained. Nothing has changed then.
        """
        state = {"heads": torch.zeros(0, 2, dtype=torch.long), **state}
        self._check_state(state, "offset")
        check_settings(state, self._settings(), type(self).__name__)
        anchor = {k: v.to(self._device, copy=True) for k, v in under("anchor.", state).items()}
        precision: Diagonal | None = None
        if int(state["n_tasks"]) > 0:
            found = Fisher.from_state_dict(under("precision.", state)).to(self._device)
            if not isinstance(found, Diagonal):
                raise ValueError("this is not the state of AdapterEWC: it is not diagonal")
            precision = found
            with torch.no_grad():
                shapes = {name: w.shape for name, w in self._weights(set(anchor)).items()}
            check_shapes(shapes, {name: value.shape for name, value in anchor.items()})
            check_shapes(shapes, precision.shapes)
            if self.params is not None:
                check_chosen(anchor, self._trained(), self._names())
        self._load(state)
        self._anchor, self._precision = anchor, precision
        self._offset = state["offset"].to(self._device, copy=True)

    def save(self, path: str | os.PathLike[str], *, data: Any = None) -> None:
        """Write the state as a file with a card, as :meth:`ewc_lib.EWC.save` does."""
        card = card_of_penalty(self, {"structure": "diagonal", **self._settings()}, data)
        write(path, self.state_dict(), card)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Restore what :meth:`save` has written, as :meth:`ewc_lib.EWC.load` does.

        Raises
        ------
        ImportError
            If safetensors is not installed, the extra ``files``.
        ValueError
            If it is no such file, and as :meth:`load_state_dict`. Nothing has changed then.
        """
        self.load_state_dict(read(path, type(self).__name__)[0])

    def _settings(self) -> dict[str, str]:
        """Return what a state says of itself and must agree on, beside names and shapes."""
        decay = {"decay": repr(float(self.decay))} if self.mode == "online" else {}
        said = {"mode": self.mode, "kind": self.kind} | decay
        return said | in_words_if_given(self.likelihood)

    def _add_gradient(self, share: float, own: set[int] | None) -> None:
        """Add the gradient for one layer after the other: one weight is made at a time."""
        if self._precision is None:
            return
        strength = share * (self.n_tasks if self.strength is None else self.strength)
        with torch.enable_grad(), self._uncast():
            for unit in self._held_units():
                pulls = [
                    (weight, (strength * precision * moved.detach()).to(weight.dtype))
                    for name, weight in unit.tensors().items()
                    if name in self._anchor and weight.requires_grad
                    for precision, moved in [self._moved(name, weight)]
                ]
                if pulls:
                    weights, directions = zip(*pulls, strict=True)
                    trained = [p for p in unit.trainable() if own is None or id(p) in own]
                    if trained:
                        found = torch.autograd.grad(weights, trained, directions, allow_unused=True)
                        accumulate_(trained, found)

    def _loss(self) -> Float[Tensor, ""]:
        with self._uncast():
            terms = [self._offset]
            for unit in self._held_units():
                for name, weight in unit.tensors().items():
                    if name in self._anchor:
                        precision, moved = self._moved(name, weight)
                        terms.append((precision * moved.square()).sum())
            return 0.5 * torch.stack([term.to(terms[-1]) for term in terms]).sum()

    def _moved(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the precision of a weight and how far it is from its anchor, where it is."""
        assert self._precision is not None
        for held in (self._precision.values, self._anchor):
            if held[name].device != weight.device:
                held[name] = held[name].to(weight.device)
        anchor = self._anchor[name]
        return self._precision.values[name], weight.to(anchor.dtype) - anchor

    def _held_units(self) -> list[Unit]:
        """Return what makes the tensors that are held."""
        found = [
            unit for unit in units(self.model) if not self._anchor.keys().isdisjoint(unit.names)
        ]
        if lost := self._anchor.keys() - {name for unit in found for name in unit.names}:
            raise ValueError(f"the penalty holds {sorted(lost)}, which the model does not have")
        return found

    def _weights(self, names: set[str]) -> Vector:
        """Return the tensors of those names, in a precision in which they can be compared."""
        found: Vector = {}
        for unit in units(self.model):
            if not names.isdisjoint(unit.names):
                found |= {n: wide(w) for n, w in unit.tensors().items() if n in names}
        return found

    def _names(self) -> list[str]:
        """Return what is held from the next task on: what has been, and what training changes."""
        found = []
        for unit in units(self.model):
            trained = set(unit.trained())
            for name, tensor in unit.tensors().items():
                if name in self._anchor or (name in trained and self._is_chosen(name, tensor)):
                    found.append(name)
        return found

    def _trained(self) -> set[str]:
        """Return the names of all that training changes."""
        return {name for unit in units(self.model) for name in unit.trained()}

    def _uncast(self) -> AbstractContextManager[Any]:
        """Let no region of autocast round the product of two factors."""
        return torch.autocast(self._device.type, enabled=False)


def _renamed(fisher: Diagonal, model: nn.Module, held: dict[str, nn.Parameter]) -> Diagonal:
    """Give each parameter the name that it has without adapters and wrappers."""
    plain = {id(p): name for name, p in reversed(held.items())}
    names = {name: plain[id(p)] for name, p in model.named_parameters() if id(p) in plain}
    values = {names.get(name, name): value for name, value in fisher.values.items()}
    paths = {names.get(name, name): path for name, path in fisher.paths.items()}
    return replace(fisher, values=values, paths=paths)


def _filled(fisher: Diagonal, like: Vector) -> Diagonal:
    """Put zeros for what has no Fisher information because it was not held."""
    values = {
        name: fisher.values[name].to(w.device) if name in fisher.values else torch.zeros_like(w)
        for name, w in like.items()
    }
    return replace(fisher, values=values, paths={n: fisher.paths.get(n, "unused") for n in like})
