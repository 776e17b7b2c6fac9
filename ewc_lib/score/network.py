"""The scores of a network, batch after batch."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib._arguments import check_choice
from ewc_lib._batches import Batch, batches, join, marking_last
from ewc_lib._calling import Caller, forward
from ewc_lib._checking import Problem, check_finite_parameters, check_modules, settle
from ewc_lib._forms import Pick, picked
from ewc_lib._parameters import Vector
from ewc_lib._precision import Precision, products
from ewc_lib._progress import progress as show_progress
from ewc_lib._restoring import untouched
from ewc_lib._selecting import Selection, select_parameters
from ewc_lib._sharded import is_absent
from ewc_lib._single_precision import SinglePrecision
from ewc_lib.likelihood.agreement import Criterion, agreed, ready
from ewc_lib.likelihood.outputs import Likelihood, OutputDistribution
from ewc_lib.score import memory
from ewc_lib.score.batch import BatchScores
from ewc_lib.score.by_vmap import VmapGradients
from ewc_lib.score.forward_pass import ForwardPass
from ewc_lib.score.memory import sum_dtype
from ewc_lib.score.plan import Certify, Planner
from ewc_lib.score.record import Recorder

Direction: TypeAlias = Callable[[Float[Tensor, "N ..."], Any], Float[Tensor, "N ..."]]
"""From the output and the target of a batch to a direction in the space of outputs."""


def per_observation_gradients(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood | None = None,
    *,
    criterion: Criterion | None = None,
    direction: Direction | None = None,
    params: Selection = None,
    n_samples: int | None = None,
    batch: Pick | None = None,
    max_bytes: int | None = None,
    certify: Certify = "auto",
    precision: Precision = "highest",
    progress: bool | None = None,
) -> Iterator[dict[str, Float[Tensor, "n ..."]]]:
    r"""Return the scores of a network for every observation, batch after batch.

    .. math:: s_n(\theta) = \nabla_\theta \log p(y_n \mid f_\theta(x_n))

    This is the gradient of :eq:`eq-network-likelihood` for each observation: minus the gradient
    of its loss (:math:`-\log p`), and for a sequence the sum over its positions. With a direction
    :math:`v_n` of the outputs it is :math:`J_n^\top v_n` instead, with the Jacobian :math:`J_n`
    of the outputs in the parameters. One forward and one backward pass serve a whole batch, and
    for each new form of a batch (other operations, or on other parameters) the gradients are
    compared with autograd's. The model is run in eval mode and left exactly as it was.

    Parameters
    ----------
    model
        Any module that maps a batch of inputs to a tensor ``[N, ...]``, to a tuple that begins
        with one, or to an object or dict with such ``logits``. One entry of the first axis is one
        observation.
    data, batch
        As in :func:`ewc_lib.fisher_information`.
    likelihood, criterion
        How to read the output, as there. Not used if a direction is given.
    direction
        A function ``direction(output, target)`` that returns :math:`v_n`, a tensor like the
        output. It gets the output without its graph. With ``lambda output, target: 2 * output``
        the gradients are those of the squared length of each output.
    params
        The parameters, as in :func:`ewc_lib.fisher_information`.
    n_samples
        Use the first so many observations, where :func:`ewc_lib.fisher_information` would draw
        them: the gradients come in the order of the data. By default all.
    max_bytes
        Cut batches into pieces whose gradients take no more memory than this; a piece has one
        observation at least. By default no batch is cut; then the model may be changed between
        two of them, as by an optimizer. One tuple of tensors is read in batches of 128
        observations.
    certify, precision
        As in :func:`ewc_lib.fisher_information`.
    progress
        True or False; by default a bar appears in terminals and notebooks after two seconds.

    Returns
    -------
    iterator of dict of Tensor
        For each batch, or piece of one, the gradients ``[n, *shape]`` of each parameter, in the
        order of the observations, in float32 where the parameters have half of it. Parameters
        that the output does not depend on have zeros. The tensors are the reader's own.

    Raises
    ------
    ValueError
        As :func:`ewc_lib.fisher_information`: if the data or the outputs are not finite, a target
        is outside the support, or the model mixes observations. Also if a direction is not like
        the output, or if the model was changed within a batch or holds other parameters.

    References
    ----------
    Goodfellow 2015 has the rule for linear layers.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    >>> for gradients in per_observation_gradients(model, (x, y)):
    ...     norms = sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()
    >>> norms.shape, {name: tuple(g.shape) for name, g in gradients.items()}
    (torch.Size([5]), {'weight': (5, 2, 3), 'bias': (5, 2)})
    >>> torch.nn.functional.cross_entropy(model(x), y).backward()
    >>> torch.allclose(-gradients["weight"].mean(0), model.weight.grad, atol=1e-6)
    True
    """
    if max_bytes is not None and (not isinstance(max_bytes, int) or max_bytes < 1):
        raise ValueError(f"max_bytes must be a positive whole number or None, got {max_bytes!r}")
    data, parameters = picked(data, batch), select_parameters(model, params)
    network = NetworkScores(model, parameters, certify=certify, precision=precision)
    if direction is None:
        with network.leaving_no_trace():
            data, network.distribution = agreed(model, data, likelihood, criterion)
        direction = partial(output_score, network.distribution)
    else:
        data = ready(model, data)
    shown = show_progress(batches(data, network.device, n_samples), "gradients", progress)
    room = sys.maxsize if max_bytes is None else max_bytes
    return _gradients(network, marking_last(shown), direction, room)


def _gradients(
    network: NetworkScores, data: Iterable[Batch], along: Direction, max_bytes: int
) -> Iterator[Vector]:
    """Yield the gradients of each batch, or piece of one; whoever reads finds the model alone."""
    row_bytes = sum(p.numel() * sum_dtype(p).itemsize for p in network.parameters.values())
    for batch in data:
        network.check_same_parameters()
        with network.leaving_no_trace():
            scores = network.run(batch)
        output = scores.output
        column = _checked(along(output, batch.target), output).unsqueeze(0)
        versions = network.versions()
        with network.leaving_no_trace():
            by_rule = scores.by_rule(column)
        for part in memory.pieces(len(batch), row_bytes, max_bytes):
            if network.versions() != versions:
                raise ValueError(
                    "the model was changed between two pieces of one batch; change it between "
                    "batches, and leave out max_bytes"
                )
            with network.leaving_no_trace(), torch.no_grad():
                found = _own(scores.gradients(by_rule, column, part))
            yield found
        del scores, by_rule, found  # and with them the graph, before the next one grows


def _checked(direction: object, output: Tensor) -> Tensor:
    """Return a direction, or raise a ValueError unless it is one for each output."""
    if not isinstance(direction, Tensor) or direction.shape != output.shape:
        form = tuple(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
        raise ValueError(
            f"direction must return a tensor like the output, {tuple(output.shape)}, got {form}"
        )
    if direction.is_complex() or not direction.isfinite().all():
        raise ValueError("direction must return real and finite numbers")
    return direction.detach().to(output)


def _own(gradients: Vector) -> Vector:
    """Give each gradient memory of its own, so that whoever changes one changes no other."""
    seen = set[int]()
    for name, g in gradients.items():
        storage = g.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != g.nbytes:
            gradients[name] = g.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
    return gradients


def output_score(
    distribution: OutputDistribution, output: Float[Tensor, "N ..."], target: Tensor
) -> Float[Tensor, "N ..."]:
    """Gradient of the log-probability in the output."""
    output = output.detach().requires_grad_()
    with torch.enable_grad():
        total = distribution.log_prob(output, target).sum()
    return torch.autograd.grad(total, output)[0]


class NotTogetherError(RuntimeError):
    """Batches that were joined, and that the model cannot take so."""


class NetworkScores:
    """One model, batch after batch.

    Parameters
    ----------
    model
        The network.
    parameters
        The parameters whose gradients are wanted, by name.
    distribution
        How its output is read; None if nobody asks for the likelihood.
    certify
        Which batches are checked.
    precision
        Of products.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        distribution: OutputDistribution | None = None,
        certify: Certify = "auto",
        precision: Precision = "highest",
    ) -> None:
        check_choice("precision", precision, get_args(Precision))
        check_modules(model)
        check_finite_parameters(dict(parameters))
        self.model = model
        self._given, self.parameters = parameters, dict(parameters)
        self._single = SinglePrecision(model, self.parameters, refused=precision == "high")
        self.distribution = distribution
        self.precision: Precision = precision
        self.device = next(iter(parameters.values())).device
        self.caller = Caller(model)
        by_vmap = VmapGradients(self.caller, self.parameters)
        own = weakref.proxy(self)  # else only the collector could let go of it, and of copies
        self.planner = Planner(self.parameters, by_vmap, lambda x: own._forward(x), certify)
        self._originals: dict[int, tuple[Tensor, Tensor]] = {}
        self._enough = 0
        self._joins = True

    @contextmanager
    def leaving_no_trace(self) -> Iterator[None]:
        """Run in eval mode, without autocast or compiled code, and leave all as it was."""
        with (
            self._single.held(),
            untouched(self.model),
            torch.autocast(self.device.type, enabled=False),
            _eager(),
            products(self.precision),
        ):
            try:
                yield
            finally:
                for parameter, value in self._originals.values():
                    if not is_absent(parameter) and not torch.equal(parameter, value):
                        parameter.data.copy_(value)
                self._originals = {}

    def versions(self) -> list[int]:
        """Count the changes of all parameters and buffers so far."""
        return [tensor._version for tensor in self.caller.constants()]

    def check_same_parameters(self) -> None:
        """Raise a ValueError if the model holds other parameters than it did."""
        now = dict(self.model.named_parameters())
        for name, parameter in self._given.items():
            if now.get(name) is not parameter or not parameter.requires_grad:
                raise ValueError(f"parameter {name!r} was exchanged or frozen between two batches")

    def over(
        self, data: Any, n_samples: int | None, progress: bool | None
    ) -> Iterator[BatchScores]:
        """Run the model on all batches, small ones joined."""
        pieces = show_progress(batches(data, self.device, n_samples), "scores", progress)
        joined = join(marking_last(pieces), lambda: self._enough)
        return chain.from_iterable(map(self._run_joined, joined))

    def _run_joined(self, batch: Batch) -> Iterator[BatchScores]:
        """Run a batch, or the ones it was joined from if the model cannot take them together.

        Lengths that are in order in each of them are in none when these are joined.
        """
        try:
            yield self.run(batch)
        except NotTogetherError:
            self._joins = False
            yield from map(self.run, batch.apart())

    def run(self, batch: Batch) -> BatchScores:
        """Run the model on one batch, check its output, and plan its backward passes."""
        self.planner.look_ahead(batch)
        whole = self._forward_of(batch)
        settle([*self._problems(whole, batch), *self.planner.problems(whole)])
        scores = self.planner.scores(batch, whole)
        room = memory.budget(self.device).batch if self._joins else 0
        self._enough = room * len(batch) // max(1, whole.nbytes)
        return scores

    def whole_batches(
        self, data: Any, n_samples: int | None, progress: bool | None
    ) -> Iterator[tuple[Batch, ForwardPass]]:
        """Run the model on each batch as it comes, and check its output; nothing is planned."""
        for batch in show_progress(batches(data, self.device, n_samples), "batches", progress):
            whole = self._forward(batch.inputs)
            settle([*self._problems(whole, batch)])
            self.planner.check_apart(whole)
            yield batch, whole

    def _forward_of(self, batch: Batch) -> ForwardPass:
        try:
            return self._forward(batch.inputs)
        except Exception as error:
            if not batch.sizes:
                raise
            raise NotTogetherError from error

    def _problems(self, whole: ForwardPass, batch: Batch) -> Iterator[Problem]:
        """Yield what may be wrong with the numbers of a batch, in the order they were computed."""
        output = whole.output.detach()
        if output.shape[:1] != (len(batch),):
            raise ValueError(
                f"the model must return one row per observation, got {tuple(output.shape)} for "
                f"a batch of {len(batch)}"
            )
        yield from batch.problems
        if self.distribution is not None:
            yield from self.distribution.problems(output, batch.target, batch.first)
        # Of a sum that is a number, and not infinite, all terms are.
        yield Problem((output.sum() * 0).isnan(), partial(self._refuse_output, output, batch))

    def _refuse_output(self, output: Tensor, batch: Batch) -> None:
        known = self.distribution
        invalid = ~output.isfinite() if known is None else known.invalid(output)
        if invalid.any():
            bad = invalid.reshape(len(output), -1).any(1).nonzero()[0]
            raise ValueError(f"the output of observation {batch.first + int(bad)} is not finite")

    def _forward(self, inputs: Any) -> ForwardPass:
        with self._single.called(), self.caller.prepared(inputs) as given:
            before, constants = self.caller.state(given), self.caller.constants()
            with Recorder(dict(self.parameters), constants, given) as recorder:
                output = forward(self.model, given)
            edited = self.caller.state(given) != before
        self._originals = recorder.originals | self._originals
        self.caller.learn(inputs, harmless=not edited and recorder.rows.in_place)
        if not self._single.has_run(output):
            return self._forward(inputs)
        return ForwardPass(inputs, output, recorder)

    def paths(self) -> dict[str, str]:
        """Say how each parameter was computed."""
        return self.planner.paths()


def _eager() -> AbstractContextManager[Any]:
    """Run what was compiled operation by operation, so that all of them are seen."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and the import takes seconds
        return nullcontext()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager
