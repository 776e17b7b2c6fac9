r"""Elastic weight consolidation: hold important parameters near where they were.

.. math:: L(\theta) = L_B(\theta)
          + \frac{\lambda}{2} \sum_i F_i\, (\theta_i - \theta^*_{A,i})^2

The penalty has three parts: an *anchor* (the parameters to stay near), a *precision* (how much
each matters, a Fisher information) and a *strength* :math:`\lambda`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib._model import Selection, select_parameters
from ewc_lib.distributions import OutputDistribution
from ewc_lib.fisher.estimate import Structure, fisher_information
from ewc_lib.fisher.output import Kind
from ewc_lib.fisher.structures import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Fisher,
    LowRank,
    Vector,
    check_shapes,
)
from ewc_lib.fisher.structures.base import decode, encode, under

__all__ = ["EWC"]

ONE_TASK = frozenset[str]({"kronecker", "kronecker-reduce", "eigenkronecker"})
"""Structures without a sum: two tasks do not merge into one matrix of the same structure."""


CLASSES: dict[Structure, type[Fisher]] = {"diagonal": Diagonal, "dense": Dense, "lowrank": LowRank}
"""What holds a structure; all others are a :class:`BlockDiagonal`."""


class EWC:
    r"""Keep what earlier tasks need while the network learns the next one.

    .. math:: \Omega(\theta) = \frac{\lambda}{2} \sum_t (\theta - \theta^*_t)^\top F_t
              (\theta - \theta^*_t)

    This is :eq:`eq-ewc-loss` without the loss of the new task (Kirkpatrick et al. 2017,
    equation 3), summed over finished tasks.

    Parameters
    ----------
    model
        The network that is being trained.
    strength
        :math:`\lambda \ge 0`, for a loss that is the *mean* over observations. There is no good
        default: :meth:`bayesian_strength` gives the value that the derivation implies, and a
        sweep over powers of ten around it is the practice.
    mode
        ``"separate"``: one penalty for each task (Kirkpatrick et al. 2017). They are merged
        into one quadratic exactly, so the memory does not grow with the number of tasks.
        ``"online"``: one running precision :math:`A \leftarrow \gamma A + F_t` with its anchor
        at the latest optimum (Schwarz et al. 2018; Huszár 2018).
    decay
        :math:`\gamma \in [0, 1]` of the online mode. The default 1 forgets nothing.
    likelihood, kind, structure, params
        As in :func:`ewc_lib.fisher_information`. The Kronecker structures hold one task only,
        because the sum of two of them has another structure. With ``"lowrank"`` the rank, and so
        the memory, grows with every task.

    Raises
    ------
    ValueError
        If the strength is negative or not finite, if the decay is outside [0, 1] or is given
        for the separate mode, if the mode is unknown, or if ``params`` chooses nothing.

    Notes
    -----
    Merging rests on the identity (:eq:`eq-ewc-merge`)

    .. math:: (\theta-m)^\top A (\theta-m) + (\theta-t)^\top F (\theta-t)
              = (\theta-m')^\top (A+F) (\theta-m') + c

    with :math:`m' = m + (A+F)^{-1} F (t-m)` and a constant :math:`c` that is kept as well, so
    that the penalty has the value of the sum.

    Examples
    --------
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> x, y = torch.randn(8, 3), torch.zeros(8, dtype=torch.long)
    >>> ewc = EWC(model, strength=10.0)
    >>> ewc.penalty()  # nothing to remember yet
    tensor(0.)
    >>> F = ewc.consolidate((x, y))  # the end of the first task
    >>> with torch.no_grad():
    ...     model.bias += 1.0
    >>> loss = torch.nn.functional.cross_entropy(model(x), y) + ewc.penalty()
    >>> loss.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float,
        mode: Literal["separate", "online"] = "separate",
        *,
        decay: float = 1.0,
        likelihood: str | OutputDistribution = "categorical",
        kind: Kind = "exact",
        structure: Structure = "diagonal",
        params: Selection = None,
    ) -> None:
        if mode not in ("separate", "online"):
            raise ValueError(f"mode must be 'separate' or 'online', got {mode!r}")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie between 0 and 1, got {decay}")
        if mode == "separate" and decay != 1:
            raise ValueError("decay belongs to mode='online'; separate penalties do not decay")
        self.model = model
        self.strength = strength
        self.mode = mode
        self.decay = decay
        self.likelihood = likelihood
        self.kind: Kind = kind
        self.structure: Structure = structure
        self.params = params
        self._precision: Fisher | None = None
        self._anchor: Vector = {}
        self._offset = torch.zeros(())
        self._n_tasks = 0
        self._n_observations = 0
        self._parameters()

    @property
    def strength(self) -> float:
        r"""The factor :math:`\lambda`; it may be changed at any time."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        if not 0 <= value < math.inf:
            raise ValueError(f"strength must be non-negative and finite, got {value}")
        self._strength = float(value)

    @property
    def precision(self) -> Fisher | None:
        """The merged Fisher information of all tasks so far; None before the first."""
        return self._precision

    @property
    def anchor(self) -> Vector:
        """The parameters where the penalty is smallest; empty before the first task."""
        return dict(self._anchor)

    @property
    def n_tasks(self) -> int:
        """Number of consolidated tasks."""
        return self._n_tasks

    def penalty(self) -> Float[Tensor, ""]:
        r"""Return :math:`\Omega(\theta)` at the model's parameters, differentiable.

        It is zero before the first task. Add it to the loss.

        Raises
        ------
        ValueError
            If the parameters no longer have the names and shapes of the consolidated ones.
        """
        if self._precision is None:
            return torch.zeros((), device=next(self.model.parameters()).device)
        displacement = self._displacement()
        assert self._precision is not None
        quadratic = self._precision.quadratic(displacement) + self._offset
        return 0.5 * self.strength * quadratic

    @torch.no_grad()
    def add_gradient_(self) -> None:
        r"""Add the gradient of the penalty, :math:`\lambda A (\theta - m)`, to ``.grad``.

        Call it after ``loss.backward()``. It equals putting :meth:`penalty` into the loss and
        builds no graph.
        """
        if self._precision is None:
            return
        displacement = self._displacement()
        assert self._precision is not None
        pull = self._precision @ displacement
        for name, parameter in self._parameters().items():
            gradient = (self.strength * pull[name]).to(parameter.dtype)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def consolidate(
        self,
        data: Any,
        *,
        n_samples: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool | None = None,
    ) -> Fisher:
        """Finish a task: compute its Fisher information and remember its parameters.

        Call it once, after training on the task, with the data of that task. If it raises,
        nothing has changed.

        Parameters
        ----------
        data, n_samples, generator, progress
            As in :func:`ewc_lib.fisher_information`.

        Returns
        -------
        Fisher
            The Fisher information of this task alone.

        Raises
        ------
        ValueError
            If this is the second task and the structure holds one only, and as
            :func:`ewc_lib.fisher_information`.

        Warns
        -----
        RuntimeWarning
            If it is zero everywhere, so that nothing would be protected.
        """
        self._check_room()
        fisher = fisher_information(
            self.model,
            data,
            self.likelihood,
            kind=self.kind,
            structure=self.structure,
            params=self.params,
            n_samples=n_samples,
            generator=generator,
            progress=progress,
        )
        self._remember(fisher)
        return fisher

    def remember(self, fisher: Fisher) -> None:
        """Finish a task whose Fisher information was computed elsewhere.

        :meth:`consolidate` computes it and calls this. Call it yourself if the data are spread
        over processes (:func:`ewc_lib.integrations.distributed.fisher_information`) or come in
        parts (:meth:`ewc_lib.Fisher.pool`). If it raises, nothing has changed.

        Parameters
        ----------
        fisher
            Of this task, at the present parameters of the model, in the structure of this EWC.

        Raises
        ------
        ValueError
            If its structure, its kind, or the names and shapes of its parameters are others, or
            if this is the second task and the structure holds one only.

        Warns
        -----
        RuntimeWarning
            If it is zero everywhere, so that nothing would be protected.

        Examples
        --------
        >>> import torch
        >>> from ewc_lib import fisher_information
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.arange(8) % 2
        >>> first, second = (fisher_information(model, (x[i::2], y[i::2])) for i in (0, 1))
        >>> ewc = EWC(model, strength=10.0)
        >>> ewc.remember(first.pool(second))
        >>> ewc.n_tasks
        1
        """
        self._check_room()
        self._check_own(fisher)
        self._remember(fisher)

    def _remember(self, fisher: Fisher) -> None:
        """Merge the penalty of a task; the caller's caller is warned if it is zero."""
        if not fisher.trace() > 0:
            warnings.warn(
                "the Fisher information of this task is zero everywhere: the penalty protects "
                "nothing. Is the model so confident that its probabilities are exactly 0 and 1?",
                RuntimeWarning,
                stacklevel=3,
            )
        dtypes = {name: d.dtype for name, d in fisher.diagonal().items()}
        optimum = {
            name: p.detach().to(dtypes[name], copy=True) for name, p in self._parameters().items()
        }
        self._merge(fisher, optimum)
        self._n_tasks += 1
        self._n_observations += fisher.n_samples

    def bayesian_strength(self, n_b: int, n_a: int | None = None) -> float:
        r"""Return the strength that Bayes' rule implies, :math:`N_A / N_B`.

        The posterior of task A, a Gaussian with precision :math:`N_A F`, is the prior of task B.
        Divided by :math:`N_B`, because the loss on task B is a mean, that is the penalty with
        :math:`\lambda = N_A / N_B` (:eq:`eq-bayesian-strength`).

        Parameters
        ----------
        n_b
            Number of observations of the new task.
        n_a
            Number of observations of one old task. By default the number that ``consolidate``
            saw, averaged over tasks: exact for one task and for tasks of one size. Give it if
            the Fisher information was estimated on a part of the data.

        Raises
        ------
        ValueError
            If a number is not positive, or if no task is consolidated and ``n_a`` not given.

        Examples
        --------
        >>> EWC(torch.nn.Linear(3, 2), strength=0.0).bayesian_strength(n_b=500, n_a=1000)
        2.0
        """
        if n_a is None and self._n_tasks == 0:
            raise ValueError("no task is consolidated yet, so give n_a")
        old = self._n_observations / self._n_tasks if n_a is None else n_a
        if n_b < 1 or old <= 0:
            raise ValueError(f"numbers of observations must be positive, got {old} and {n_b}")
        return old / n_b

    def state_dict(self) -> dict[str, Tensor]:
        """Return precision, anchor and counts as plain tensors.

        ``torch.save`` and safetensors can store them. The strength, the mode and the decay are
        settings, not state: give them to the constructor again.
        """
        state = {
            "n_tasks": torch.tensor(self._n_tasks),
            "n_observations": torch.tensor(self._n_observations),
            "offset": self._offset.clone(),
            "structure": encode(self.structure),
            **{f"anchor.{k}": v.clone().contiguous() for k, v in self._anchor.items()},
        }
        if self._precision is not None:
            precision = self._precision.state_dict()
            state |= {f"precision.{key}": value for key, value in precision.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned, on the model's device.

        Raises
        ------
        ValueError
            If it is not such a state, if it is of another structure, or if its parameters have
            other names or shapes than the model's. Nothing has changed then.
        """
        missing = {"n_tasks", "n_observations", "offset"} - state.keys()
        if missing:
            raise ValueError(f"this is not the state of an EWC: it has no {sorted(missing)}")
        device = next(self.model.parameters()).device
        anchor = {k: v.to(device, copy=True) for k, v in under("anchor.", state).items()}
        precision = None
        if int(state["n_tasks"]) > 0:
            precision = Fisher.from_state_dict(under("precision.", state)).to(device)
            by_type = encode(type(precision).__name__.lower())  # of states without this key
            structure = decode(state.get("structure", by_type))
            if structure != self.structure:
                raise ValueError(f"the state is {structure}, but this EWC is {self.structure}")
            shapes = {name: p.shape for name, p in self._parameters().items()}
            check_shapes(shapes, {name: value.shape for name, value in anchor.items()})
            check_shapes(shapes, precision.shapes)
        self._precision, self._anchor = precision, anchor
        self._offset = state["offset"].to(device, copy=True)
        self._n_tasks = int(state["n_tasks"])
        self._n_observations = int(state["n_observations"])

    def _check_room(self) -> None:
        if self._n_tasks > 0 and self.structure in ONE_TASK:
            raise ValueError(
                f"structure={self.structure!r} holds one task: the sum of the matrices of two "
                "tasks has another structure. Choose one that has sums, such as 'block'"
            )

    def _check_own(self, fisher: Fisher) -> None:
        """Raise a ValueError unless the Fisher information is one that this EWC could compute."""
        wanted = CLASSES.get(self.structure, BlockDiagonal)
        if not isinstance(fisher, wanted):
            raise ValueError(f"this EWC holds a {wanted.__name__}, got a {type(fisher).__name__}")
        if fisher.kind != self.kind:
            raise ValueError(f"this EWC is of kind {self.kind!r}, got a Fisher of {fisher.kind!r}")
        check_shapes({n: p.shape for n, p in self._parameters().items()}, fisher.shapes)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return select_parameters(self.model, self.params)

    def _displacement(self) -> Vector:
        """Parameters minus anchor, in the precision of the anchor."""
        parameters = self._parameters()
        self._follow(next(iter(parameters.values())).device)
        shapes = {name: value.shape for name, value in self._anchor.items()}
        check_shapes(shapes, {name: p.shape for name, p in parameters.items()})
        return {
            name: p.to(self._anchor[name].dtype) - self._anchor[name]
            for name, p in parameters.items()
        }

    def _follow(self, device: torch.device) -> None:
        """Move everything to where the model has gone."""
        if self._precision is not None and self._offset.device != device:
            self._precision = self._precision.to(device)
            self._anchor = {name: value.to(device) for name, value in self._anchor.items()}
            self._offset = self._offset.to(device)

    def _merge(self, fisher: Fisher, optimum: Vector) -> None:
        """Add the penalty of one task to the running one."""
        if self._precision is None:
            self._precision, self._anchor = fisher, optimum
            self._offset = fisher.trace().new_zeros(())
            return
        self._follow(fisher.trace().device)
        old, anchor = self._precision, self._anchor
        if self.mode == "online":
            self._precision, self._anchor = self.decay * old + fisher, optimum
            self._offset = torch.zeros_like(self._offset)
            return
        merged = old + fisher
        shift = merged.solve(fisher @ _minus(optimum, anchor))
        centre = {name: anchor[name] + shift[name] for name in anchor}
        self._offset = (
            self._offset
            + old.quadratic(_minus(centre, anchor))
            + fisher.quadratic(_minus(optimum, centre))
        )
        self._precision, self._anchor = merged, centre


def _minus(a: Vector, b: Vector) -> Vector:
    return {name: a[name] - b[name] for name in a}
