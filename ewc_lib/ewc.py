r"""Elastic weight consolidation: hold important parameters near where they were.

.. math:: L(\theta) = L_B(\theta)
          + \frac{\lambda}{2} \sum_i F_i\, (\theta_i - \theta^*_{A,i})^2

The precision of the :mod:`quadratic penalty <ewc_lib.quadratic>` is a Fisher information.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib._adapted.network import factors
from ewc_lib._arguments import check_choice
from ewc_lib._forms import Pick
from ewc_lib._names import plain_name
from ewc_lib._precision import Precision
from ewc_lib._processes import Group, fisher_of_ranks
from ewc_lib._selecting import Selection
from ewc_lib._states import check_likelihood
from ewc_lib.fisher.estimate import AnyKind, Structure, check_request
from ewc_lib.fisher.output import KINDS
from ewc_lib.fisher.structures import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Fisher,
    LowRank,
    check_shapes,
)
from ewc_lib.likelihood.agreement import Criterion
from ewc_lib.likelihood.outputs import Likelihood, given_distribution, in_words_if_given
from ewc_lib.quadratic import QuadraticPenalty
from ewc_lib.score.plan import Certify

__all__ = ["EWC"]

ONE_TASK = frozenset[str]({"kronecker", "kronecker-reduce", "eigenkronecker"})
"""Structures without a sum: two tasks do not merge into one matrix of the same structure."""


CLASSES: dict[Structure, type[Fisher]] = {"diagonal": Diagonal, "dense": Dense, "lowrank": LowRank}
"""What holds a structure; all others are a :class:`BlockDiagonal`."""


class EWC(QuadraticPenalty):
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
        sweep over powers of ten around it is the practice. Either this or a budget.
    mode
        ``"separate"``: one penalty for each task (Kirkpatrick et al. 2017). They are merged
        into one quadratic exactly, so the memory does not grow with the number of tasks.
        ``"online"``: one running precision :math:`A \leftarrow \gamma A + F_t` with its anchor
        at the latest optimum (Schwarz et al. 2018; Huszár 2018).
    decay
        :math:`\gamma \in [0, 1]` of the online mode. The default 1 forgets nothing.
    likelihood, criterion, kind
        As in :func:`ewc_lib.fisher_information`, which computes every :math:`F_t`. With
        ``kind="second moments"`` nothing is computed: :meth:`remember` takes what
        :meth:`ewc_lib.fisher.Diagonal.from_optimizer` makes of the optimizer.
    structure
        As there. The Kronecker structures hold one task only, because the sum of two of them has
        another structure. With ``"lowrank"`` the rank, and so the memory, grows with every task.
        With all but the diagonal a strength under Adam is a euclidean one, in a proximal step
        (:meth:`attach`).
    params
        As there: the parameters that are held. All others are free.
    budget
        Instead of a strength: how much of the old tasks may be lost, in nats an observation,
        summed over tasks, as far as their Fisher information tells (:meth:`nats`). Every
        proximal step takes the smallest :math:`\lambda` that keeps it (:prf:ref:`thm-budget`),
        which may be 0; ``strength`` tells that of the last step, and :attr:`largest_strength`
        the largest one. It is not exceeded, and where it limits at all
        it is used to within half a percent, unless it cannot be kept: after several tasks even the
        common anchor may cost more. A warning says so.
    n_samples, draws, rank, certify, precision, dtype, device
        As there, for every task. They are settings: :meth:`state_dict` does not store them. What
        was summed on another ``device`` moves to the model's with the next penalty. The attribute
        ``precision`` is another thing, the matrix of the penalty; the setting is ``products``.

    Raises
    ------
    ValueError
        If not one of strength and budget is given, if it is negative or not finite, or a budget
        of 0, if the decay is outside [0, 1] or is given
        for the separate mode, if the mode or another word is unknown, if ``params`` chooses
        nothing, or if a number, precision or device is none that
        :func:`ewc_lib.fisher_information` takes.

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
        strength: float | None = None,
        mode: Literal["separate", "online"] = "separate",
        *,
        budget: float | None = None,
        decay: float = 1.0,
        likelihood: Likelihood | None = None,
        criterion: Criterion | None = None,
        kind: AnyKind | Literal["second moments"] = "exact",
        structure: Structure = "diagonal",
        params: Selection = None,
        n_samples: int | None = None,
        draws: int = 1,
        rank: int = 32,
        certify: Certify = "auto",
        precision: Precision = "highest",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_choice("mode", mode, ("separate", "online"))
        check_choice("kind", kind, (*KINDS, "batched", "second moments"))
        if kind == "second moments" and structure != "diagonal":
            raise ValueError(
                f"second moments are a diagonal, and {structure!r} is another structure"
            )
        known = "exact" if kind == "second moments" else kind  # these are remembered only
        check_request(known, structure, n_samples, draws, rank, certify, precision, dtype, device)
        given_distribution(likelihood)  # refuses an unknown word now, not later
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie between 0 and 1, got {decay}")
        if mode == "separate" and decay != 1:
            raise ValueError("decay belongs to mode='online'; separate penalties do not decay")
        if (strength is None) == (budget is None):
            raise ValueError("EWC needs either a strength or a budget")
        super().__init__(model, 0.0 if strength is None else strength, params=params)
        self.budget = budget
        self.mode = mode
        self.decay = decay
        self.likelihood = likelihood
        self.criterion = criterion
        self.kind: AnyKind | Literal["second moments"] = kind
        self.structure: Structure = structure
        self.n_samples = n_samples
        self.draws, self.rank, self.certify = draws, rank, certify
        self.products: Precision = precision
        self.dtype, self.device = dtype, device

    @property
    def budget(self) -> float | None:
        """What may be lost of the old tasks, in nats; it may be changed at any time.

        Rounding in float32 makes budgets below some 1e-6 meaningless.
        """
        return self._budget

    @budget.setter
    def budget(self, value: float | None) -> None:
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"a budget must be positive and finite, got {value}")
        self._budget, self._over_budget = value, False

    @property
    def largest_strength(self) -> float:
        """The largest strength of all steps that kept a budget, since the last task was finished.

        The last step alone tells little: at the end of a schedule it may need none.
        """
        return self._largest

    def nats(self) -> Float[Tensor, ""]:
        r"""Return what the old tasks are predicted to have lost, in nats an observation.

        .. math:: \frac12 \sum_t (\theta - \theta^*_t)^\top F_t (\theta - \theta^*_t)

        This is the penalty of strength one. To second order in the displacement, each term is
        the divergence of what the network says of an observation of that task from what it said
        (:prf:ref:`thm-kl`); for the whole matrix, that is: a diagonal leaves out what parameters
        do together, so it may be far off, and so may every quadratic form far from the anchor. It
        holds for the kinds exact, sketch and sampled. In the online mode it is measured from the
        latest anchor, with decayed matrices, so what earlier tasks had lost before does not count.

        Examples
        --------
        >>> import torch
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.arange(8) % 2
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> ewc = EWC(model, budget=0.01)
        >>> F, handle = ewc.consolidate((x, y)), ewc.attach(optimizer)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(x), 1 - y).backward()
        ...     optimizer.step()
        >>> 0.0099 < ewc.nats().item() <= 0.01
        True
        """
        return self._penalty(1.0)

    @property
    def _structure(self) -> str:
        return self.structure

    def _settings(self) -> dict[str, str]:
        decay = {"decay": repr(float(self.decay))} if self.mode == "online" else {}
        said = super()._settings() | {"mode": self.mode, "kind": self.kind} | decay
        return said | in_words_if_given(self.likelihood)

    def _shown(self) -> dict[str, Any]:
        limited = {} if self.budget is None else {"budget": self.budget}
        return super()._shown() | {"mode": self.mode, "kind": self.kind} | limited

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
        """Finish a task: compute its Fisher information and remember its parameters.

        Call it once, after training on the task, with the data of that task: a task that is
        consolidated twice counts twice. If it raises, nothing has changed.

        Parameters
        ----------
        data, batch, progress
            As in :func:`ewc_lib.fisher_information`.
        generator
            As there; by default a fresh one with the number of tasks so far as its seed, so that
            no two tasks have the same random numbers, nor two processes.
        n_samples
            As there, for this task; by default what the constructor was given. Of several
            processes, each takes so many.
        group
            Where ``torch.distributed`` is initialised, all processes of this group have to call
            this, each with its own part of the data, and all get the Fisher information of all
            data (:func:`ewc_lib.integrations.distributed.fisher_information`); by default all
            processes. ``False`` where each process has all the data, or a model of its own: then
            it works for itself.

        Returns
        -------
        Fisher
            The Fisher information of this task alone.

        Raises
        ------
        ValueError
            If this is the second task and the structure holds one only, if the kind is that of an
            optimizer, and as :func:`ewc_lib.fisher_information`. If no likelihood was given and
            the one that was found is not that of the tasks so far, also of those in a state. If
            processes have other parameters, or the structure is one that does not add up over
            processes.
        RuntimeError
            If another process has failed, or if this one is not in the group.

        Warns
        -----
        RuntimeWarning
            If it is zero everywhere, so that nothing would be protected; for a factor of an
            adapter, because the other factor is zero (:prf:ref:`thm-adapter-blind`); if a loader
            may repeat observations of another process, and which they are cannot be told; and,
            once, if the model has running statistics that will move with the next task
            (:func:`ewc_lib.freeze_norms`).
        """
        self._check_room()
        if self.kind == "second moments":
            raise ValueError(
                "second moments are those of an optimizer, not of data: call "
                "remember(Diagonal.from_optimizer(optimizer, model, batch_size=...))"
            )
        chosen = list(self._of_task())
        fisher = fisher_of_ranks(
            self.model,
            data,
            self.likelihood,
            group=group,
            seed=self.n_tasks,  # the random errors of two tasks are not to be the same
            criterion=self.criterion,
            kind=self.kind,
            structure=self.structure,
            params=chosen,
            n_samples=self.n_samples if n_samples is None else n_samples,
            batch=batch,
            draws=self.draws,
            rank=self.rank,
            certify=self.certify,
            precision=self.products,
            generator=generator,
            progress=progress,
            dtype=self.dtype,
            device=self.device,
        )
        check_likelihood(self.likelihood, self.precision, fisher)
        self._remember(self._plain(fisher))
        return fisher

    def remember(self, fisher: Fisher) -> None:
        """Finish a task whose Fisher information was computed elsewhere.

        :meth:`consolidate` computes it and calls this. Call it yourself if the data come in parts
        (:meth:`ewc_lib.Fisher.pool`). If it raises, nothing has changed.

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
            If it is zero everywhere, so that nothing would be protected; for a factor of an
            adapter, because the other factor is zero (:prf:ref:`thm-adapter-blind`); and, once,
            if the model has running statistics that will move with the next task
            (:func:`ewc_lib.freeze_norms`).

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
        fisher = self._plain(fisher)
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
        elif blind := self._blind(fisher):
            warnings.warn(
                f"the factors {blind} of adapters have no Fisher information at all, because "
                "what they are multiplied by is zero: they are free to change everything. "
                "ewc_lib.regularizers.AdapterEWC holds the weights that adapters make",
                RuntimeWarning,
                stacklevel=3,
            )
        with torch.autocast(fisher.device.type, enabled=False):
            if self.mode == "separate" or self.precision is None:
                self._merge(fisher)
            else:
                self._replace(self._joined(fisher, self.decay))
        self._largest = 0.0

    def _blind(self, fisher: Fisher) -> list[str]:
        """Return the factors of adapters that are used and do not change the output."""
        of_adapters = factors(self.model)
        if not of_adapters:
            return []
        used = [name for name, path in fisher.paths.items() if path != "unused"]
        found, diagonal = [n for n in used if plain_name(n) in of_adapters], fisher.diagonal()
        return [name for name in found if not diagonal[name].any()]

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
            the Fisher information was estimated on a part of the data, and for second moments,
            which count an observation again in each pass over the data.

        Raises
        ------
        ValueError
            If a number is not positive and finite, or if ``n_a`` is not given, though no task is
            consolidated or the kind is that of an optimizer.

        Examples
        --------
        >>> EWC(torch.nn.Linear(3, 2), strength=0.0).bayesian_strength(n_b=500, n_a=1000)
        2.0
        """
        if n_a is not None:
            old: float = n_a
        elif self.kind == "second moments":
            raise ValueError(
                "an optimizer counts an observation again in each pass over the data, so give n_a"
            )
        elif self.precision is not None:
            old = self.precision.n_samples / self.n_tasks
        else:
            raise ValueError("no task is consolidated yet, so give n_a")
        if not (1 <= n_b < math.inf and 0 < old < math.inf):
            raise ValueError(
                f"numbers of observations must be positive and finite, got {old} and {n_b}"
            )
        return old / n_b

    def _check_room(self) -> None:
        if self.n_tasks > 0 and self.structure in ONE_TASK:
            raise ValueError(
                f"structure={self.structure!r} holds one task: the sum of the matrices of two "
                "tasks has another structure. Any number of tasks is held by structure='diagonal', "
                "and by ewc_lib.regularizers.KroneckerLaplace, which averages the factors"
            )

    def _check_own(self, fisher: Fisher) -> None:
        """Raise a ValueError unless the Fisher information is one that this EWC could compute."""
        wanted = CLASSES.get(self.structure, BlockDiagonal)
        if not isinstance(fisher, wanted):
            raise ValueError(
                f"this EWC has structure={self.structure!r}, got a Fisher information that is a "
                f"{type(fisher).__name__}"
            )
        if fisher.kind != self.kind:
            raise ValueError(f"this EWC is of kind {self.kind!r}, got a Fisher of {fisher.kind!r}")
        self._of_task()
        every, chosen = self._choose.every(self.model), self._parameters()
        frozen = {n for n in fisher.shapes if n in self._anchor and not every[n].requires_grad}
        expected = {n: p.shape for n, p in every.items() if n in chosen or n in frozen}
        check_shapes(expected, fisher.shapes)
