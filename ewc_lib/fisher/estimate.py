"""The front door: the Fisher information of any network."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from ewc_lib._arguments import check_choice, check_place, check_whole, random_source
from ewc_lib._checking import check_finite_sums, explaining
from ewc_lib._drawing import random_part
from ewc_lib._forms import Pick, picked
from ewc_lib._precision import Precision
from ewc_lib._selecting import Selection, select_parameters
from ewc_lib.fisher.batched import BatchedSum, add_batches, in_many
from ewc_lib.fisher.output import KINDS, Kind, columns
from ewc_lib.fisher.structures import Fisher
from ewc_lib.fisher.sums.base import ParameterSpace, Sum
from ewc_lib.fisher.sums.diagonal import DiagonalSum
from ewc_lib.fisher.sums.kronecker import EigenKroneckerSum, KroneckerSum
from ewc_lib.fisher.sums.rows import BlockSum, DenseSum, LowRankSum
from ewc_lib.likelihood.agreement import Criterion, agreed
from ewc_lib.likelihood.outputs import Likelihood, in_words
from ewc_lib.score.network import NetworkScores
from ewc_lib.score.plan import Certify

Structure: TypeAlias = Literal[
    "diagonal",
    "block",
    "module",
    "dense",
    "kronecker",
    "kronecker-reduce",
    "eigenkronecker",
    "lowrank",
]
STRUCTURES: tuple[str, ...] = get_args(Structure)

AnyKind: TypeAlias = Kind | Literal["batched"]
"""Also the one without gradients of observations, of which there is a diagonal only."""


def fisher_information(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood | None = None,
    *,
    criterion: Criterion | None = None,
    kind: AnyKind = "exact",
    structure: Structure = "diagonal",
    params: Selection = None,
    n_samples: int | None = None,
    batch: Pick | None = None,
    draws: int = 1,
    certify: Certify = "auto",
    precision: Precision = "highest",
    rank: int = 32,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Fisher:
    r"""Return the Fisher information of a network, the mean over observations.

    .. math:: F = \frac1N \sum_{n=1}^N J_n^\top H_n J_n
              = \frac1N \sum_{n=1}^N \sum_k (J_n^\top s_{nk})(J_n^\top s_{nk})^\top

    This is :eq:`eq-fisher-network` with the Jacobian :math:`J_n` of the outputs in the
    parameters and a root :math:`H_n = \sum_k s_{nk} s_{nk}^\top` of the Fisher information of
    the output distribution: one backward pass without weight gradients for each column
    :math:`k`. The model is run in eval mode and left exactly as it was: modes, gradients,
    buffers and random state. The result does not depend on how the data are batched.

    Parameters
    ----------
    model
        Any module that maps a batch of inputs to a tensor ``[N, ...]``, to a tuple that begins
        with one, or to an object or dict with such ``logits``. One entry of the first axis is one
        observation.
    data
        A DataLoader or any iterable of batches ``(inputs, targets)``, or of dicts with
        ``"labels"``; or one tuple of tensors ``(inputs, targets)``. A dict of inputs is passed
        to the model by name, a tuple by position. NumPy arrays of numbers may take the place of
        tensors, in the precision of the model. The values of the targets matter to
        ``"empirical"`` alone; labels that do not count (``ignore_index``) matter to every kind.
    likelihood
        How to read the output: ``"categorical"`` (logits), ``"next-token"`` (logits of the label
        that follows), ``"bernoulli"`` (logits), ``"gaussian"`` (means), ``"poisson"`` (log
        rates), an object such as ``Gaussian(sigma=0.5)`` or ``Categorical(class_dim=1)``, or a
        function from the output to a distribution of :mod:`torch.distributions`.

        Where the loss of the training is known, the likelihood is compared with it on the first
        batch, and one that does not agree is refused. It is known if a criterion is given, or if
        batches are dicts and the model, called with their labels, returns its own ``loss``, as
        models of Hugging Face do. Give a model that is trained by another loss its data as
        pairs.

        By default the likelihood that agrees with the known loss; ``"categorical"`` where none
        is known.
    criterion
        The loss ``criterion(output, target)`` of the training, such as
        ``torch.nn.CrossEntropyLoss()``. It is compared with the likelihood, and used for
        nothing else.
    kind
        Which expectation over labels :math:`y`.

        ``"exact"`` sums over the model's own distribution in closed form: ``C - 1`` backward
        passes for ``C`` classes, one for each real output; of a sequence, as many for each
        position, where ``"sketch"`` needs one. It is the default because it is the definition.
        More than 1,024 passes are refused.

        ``"sketch"`` replaces the columns by ``draws`` random sign combinations of them
        (Martens, Sutskever and Swersky 2012): unbiased, one backward pass each.

        ``"sampled"`` draws ``draws`` labels from the model: unbiased, one pass each, but with
        a large variance where the model is confident.

        ``"empirical"`` uses the observed labels. That is *not* the Fisher information unless
        the model is the truth (Kunstner et al. 2019).

        ``"batched"`` squares one gradient of each batch, of the sum of the sketches of its
        observations (:eq:`eq-batched`; Liu et al. 2024 draw labels instead): unbiased, and no
        gradient of a single observation is needed. It is for models on the path ``"generic"`` or
        ``"loop"``, where every other kind is slow, and gives the diagonal only. Its noise, other
        than its mean, depends on the batches: it falls with their number, not with that of the
        observations, so give at least some thirty. They are taken as they come. One tuple of
        tensors makes at least 32 batches, of 2 to 128 observations, or as many as it has pairs.
    structure
        What is kept. ``"diagonal"``; ``"block"``, one matrix for each parameter; ``"module"``,
        one for all parameters of a module; ``"dense"``, the whole matrix of a small model.

        ``"kronecker"``, two small factors for each weight matrix and its bias (KFAC; Martens and
        Grosse 2015), with sums over shared positions as in "KFAC-expand", or
        ``"kronecker-reduce"`` as in "KFAC-reduce" (Eschenhagen et al. 2023);
        ``"eigenkronecker"``, exact second moments in the eigenvectors of these factors (George
        et al. 2018), which reads the data twice. What has factors:

        * the weight of a linear map or of a convolution, with the bias that the same operations
          add; a grouped convolution has two factors for each group, nothing between groups;
        * the weights of a recurrent layer or cell, one for its inputs and one for its states,
          which are linear maps used at every position;
        * the weight of a transposed convolution, grouped or not, with one factor for the input
          channels and one for the windows of outputs that an input position reaches. Its bias
          stands alone, unless the windows are single positions.

        Other parameters of at most one axis and 4,096 entries (biases that stand alone,
        normalisations) keep their whole block. All others keep their diagonal only: embeddings,
        longer vectors, and matrices that are used in another operation (as ``einsum`` or a
        bilinear map), in several ways, or in a form that is computed from the parameter (as by
        weight normalisation). :meth:`ewc_lib.Fisher.report` names what each keeps.

        ``"lowrank"``, the ``rank`` largest eigenvalues and their eigenvectors over all
        parameters, from the Gram matrix of the gradients, which are all held in memory.
    params
        Names, glob patterns (``"head.*"``), modules (``model.head``: its parameters that require
        grad) and parameters, one or several; or a predicate of ``(name, parameter)``. By default
        all parameters that require grad.
    n_samples
        Use that many observations, and no others: the mean is over these. By default all.

        They are drawn by ``generator``, without replacement, from data that can be indexed: one
        tuple of tensors, or a DataLoader that goes through a map-style data set in order (no
        ``shuffle``, no sampler of its own, no ``drop_last``). An error then counts among those
        that were drawn. Of other data (a list or a generator of batches, a loader that
        shuffles) they are the first ones that come.
    batch
        A function that picks ``(inputs, targets)``, or a dict with ``"labels"``, from a batch
        that holds more, as ``lambda b: (b[0], b[2])``. One tuple of tensors is one batch.
    draws
        Random columns for each observation, for ``"sketch"``, ``"sampled"`` and ``"batched"``.
    certify
        Which batches are compared with autograd's gradients. By default those whose plan is not
        known to hold: the first of each form, the last, a sixteenth of the others, and all in
        which values may decide which row goes where, as in masks, sorting and mixtures of
        experts. ``"always"`` compares every batch, and the output of each half of it with that
        of the whole, for the price of two to five more passes forward and backward. The gradients
        of ``kind="batched"`` are autograd's own: there only outputs are compared, those of some
        observations alone with those in their batch, for the first batch or for all.
    precision
        With ``"highest"``, products of matrices and convolutions are as precise as float32,
        whatever PyTorch is set to: they are not rounded to TF32, as convolutions of cuDNN are by
        default. A model in half precision is run in float32, on copies of its parameters, and the
        result is that of ``model.float()``. Regions of ``torch.autocast`` have no effect, open
        outside or inside the model. (A model that cannot be run so is run as it is: one that
        insists on its dtype, is a program of TorchScript, or whose parameters have hooks.)

        With ``"high"``, products of float32 are rounded to TF32 where the device can, and a model
        in half precision, or with autocast inside, is run as it is. That is faster on an
        accelerator and spares the copies, 4 bytes a parameter. The diagonal as a whole was within
        1 % of that in float32 for most models that were tried in bfloat16, but up to 17 % away
        for confident ones, and that of one parameter up to 20 %, where rounding changes the sign
        of a ReLU; in float16 the gradients of the first of many layers can vanish. The
        certificate allows for it: :attr:`ewc_lib.Fisher.tolerance` says what it let pass.
    rank
        How many eigenvalues ``"lowrank"`` keeps at most.
    generator
        The source of randomness, a ``torch.Generator`` on the model's device. By default a fresh
        one with seed 0, so that results repeat and the global random state is not used. A
        generator of your own goes on from call to call, so that two tasks get different draws;
        a bare number, which could not, is refused.
    progress
        True or False; by default a bar appears in terminals and notebooks after two seconds.
    dtype
        Precision of the sums. By default float32 for half-precision parameters, whose squares
        would underflow, else the dtype of the parameters.
    device
        Where the sums are kept. By default with the parameters; ``"cpu"`` spares the memory of
        an accelerator.

    Returns
    -------
    Fisher
        In nats per squared unit of the parameters and per observation.

    Raises
    ------
    ValueError
        If the data are empty, of unequal lengths or hold NaN; a target is outside the support;
        an output, a parameter or a sum is not finite; the likelihood is not the one of the loss
        that the model or the criterion has; no parameter is trainable, a name is unknown, or a
        module or parameter is not of this model;
        a batch normalisation has no running statistics; an embedding renormalises its rows;
        the model mixes observations; a matrix would be larger than 16 GiB; or the data cannot
        be read twice where the structure needs that.

    Warns
    -----
    RuntimeWarning
        If the model can only be run one observation at a time, which is slow.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> x, y = torch.ones(8, 3), torch.zeros(8, dtype=torch.long)
    >>> F = fisher_information(model, (x, y))
    >>> F.n_samples, {name: tuple(f.shape) for name, f in F.diagonal().items()}
    (8, {'weight': (2, 3), 'bias': (2,)})
    >>> p = model(x).softmax(-1)[0]  # closed form of softmax regression at x = 1
    >>> torch.allclose(F.diagonal()["bias"], p * (1 - p))
    True
    """
    check_request(kind, structure, n_samples, draws, rank, certify, precision, dtype, device)
    parameters = select_parameters(model, params)
    network = NetworkScores(model, parameters, certify=certify, precision=precision)
    generator = random_source(generator, network.device)
    data = random_part(picked(data, batch), n_samples, generator)
    if kind == "batched":
        data = in_many(data)

    def finished(total: Sum, paths: dict[str, str], rounding: float) -> Fisher:
        found = total.mean(kind, paths)
        check_finite_sums(found.diagonal())
        words = in_words(distribution)
        return replace(found, tolerance=math.sqrt(rounding) or None, likelihood=words)

    def accumulate(total: Sum) -> Fisher:
        rounding = 0.0
        assert kind != "batched"
        for batch in explaining(network.over(data, n_samples, progress), model):
            target = batch.batch.target
            total.add(batch, columns(kind, distribution, batch.output, target, draws, generator))
            rounding = max(rounding, batch.forward.graph.eps())
            del batch  # and with it the graph, before the next one grows
        return finished(total, network.paths(), rounding)

    space = ParameterSpace(
        network.parameters, dtype, None if device is None else torch.device(device)
    )
    with network.leaving_no_trace():
        data, distribution = agreed(model, data, likelihood, criterion)
        network.distribution = distribution
        if kind == "batched":
            batches = BatchedSum(space)
            eps = add_batches(batches, network, data, n_samples, draws, generator, progress)
            return finished(batches, batches.paths(), eps)
        if structure == "eigenkronecker":
            start = generator.get_state()
            factors = KroneckerSum(space)
            accumulate(factors)
            generator.set_state(start)
            return accumulate(EigenKroneckerSum(space, factors))
        return accumulate(_sum(structure, space, rank))


def check_request(
    kind: str,
    structure: str,
    n_samples: int | None,
    draws: int,
    rank: int,
    certify: str,
    precision: str,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> None:
    """Raise a ValueError that names the first argument that cannot be meant."""
    if kind == "second moments":
        raise ValueError(
            "second moments are those of an optimizer, not of data: "
            "ewc_lib.fisher.Diagonal.from_optimizer(optimizer, model, batch_size=...)"
        )
    check_choice("kind", kind, (*KINDS, "batched"))
    check_choice("structure", structure, STRUCTURES)
    if kind == "batched" and structure != "diagonal":
        raise ValueError(
            f"kind='batched' gives structure='diagonal' only, not {structure!r}: other entries "
            "need the gradients of observations, as kind='sketch' computes them"
        )
    check_choice("certify", certify, get_args(Certify))
    check_choice("precision", precision, get_args(Precision))
    check_whole(n_samples=n_samples, draws=draws, rank=rank)
    check_place(dtype, device)


def _sum(structure: Structure, space: ParameterSpace, rank: int) -> Sum:
    """Return the sum that a structure needs."""
    match structure:
        case "diagonal":
            return DiagonalSum(space, in_parts=True)
        case "block":
            return BlockSum(space, groups=[[name] for name in space.parameters])
        case "module":
            return BlockSum(space, groups=by_module(space.parameters))
        case "dense":
            return DenseSum(space)
        case "lowrank":
            return LowRankSum(space, rank)
        case _:
            return KroneckerSum(space, reduce=structure == "kronecker-reduce")


def by_module(names: Iterable[str]) -> list[list[str]]:
    """Group the parameters of each module."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return list(groups.values())
