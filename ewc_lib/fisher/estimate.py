"""The front door: the Fisher information of any network."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from ewc_lib._batches import batches
from ewc_lib._model import Selection, check_finite_parameters, select_parameters, untouched
from ewc_lib._progress import progress as show_progress
from ewc_lib.distributions import OutputDistribution, output_distribution
from ewc_lib.fisher.output import KINDS, Kind, columns
from ewc_lib.fisher.passes import Passes
from ewc_lib.fisher.structures import Fisher
from ewc_lib.fisher.sums import SUMS

Structure: TypeAlias = Literal["diagonal", "dense"]
STRUCTURES: tuple[str, ...] = get_args(Structure)


def fisher_information(
    model: nn.Module,
    data: Any,
    likelihood: str | OutputDistribution = "categorical",
    *,
    kind: Kind = "exact",
    structure: Structure = "diagonal",
    params: Selection = None,
    n_samples: int | None = None,
    draws: int = 1,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
    dtype: torch.dtype | None = None,
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
        Any module that maps a batch of inputs to a tensor ``[N, ...]``, or to an object with
        such ``.logits``. One entry of the first axis is one observation.
    data
        A DataLoader or any iterable of batches ``(inputs, targets)``, or of dicts with
        ``"labels"``; or one tuple of tensors ``(inputs, targets)``.
    likelihood
        How to read the output: ``"categorical"`` (logits), ``"bernoulli"`` (logits),
        ``"gaussian"`` (means), ``"poisson"`` (log rates), or an object such as
        ``Gaussian(sigma=0.5)``.
    kind
        Which expectation over labels :math:`y`.

        ``"exact"`` sums over the model's own distribution in closed form: ``C - 1`` backward
        passes for ``C`` classes, one for each real output. It is the default because it is the
        definition. More than 1,024 passes are refused.

        ``"sketch"`` replaces the columns by ``draws`` random sign combinations of them
        (Martens, Sutskever and Swersky 2012): unbiased, one backward pass each.

        ``"sampled"`` draws ``draws`` labels from the model: unbiased, one pass each, but with
        a large variance where the model is confident.

        ``"empirical"`` uses the observed labels. That is *not* the Fisher information unless
        the model is the truth (Kunstner et al. 2019).
    structure
        ``"diagonal"``, or ``"dense"`` for the whole matrix of a small model.
    params
        Names, glob patterns, or a predicate of ``(name, parameter)``. By default all parameters
        that require grad.
    n_samples
        Use exactly that many observations, then stop. By default all.
    draws
        Random columns for each observation, for ``"sketch"`` and ``"sampled"``.
    generator
        The source of randomness, on the model's device. By default a fresh one with seed 0, so
        that results repeat and the global random state is not used.
    progress
        True or False; by default a bar appears in terminals and notebooks after two seconds.
    dtype
        Precision of the sums. By default float32 for half-precision parameters, whose squares
        would underflow, else the dtype of the parameters.

    Returns
    -------
    Fisher
        In nats per squared unit of the parameters and per observation.

    Raises
    ------
    ValueError
        If the data are empty, of unequal lengths or hold NaN; a target is outside the support;
        an output or a parameter is not finite; no parameter is trainable or a name is unknown;
        a batch normalisation has no running statistics; or the model mixes observations.

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
    _check_choice("kind", kind, KINDS)
    _check_choice("structure", structure, STRUCTURES)
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    distribution = output_distribution(likelihood)
    parameters = select_parameters(model, params)
    check_finite_parameters(dict(model.named_parameters()))
    _check_batch_statistics(model)
    device = next(iter(parameters.values())).device
    generator = generator or torch.Generator(device).manual_seed(0)
    with untouched(model), torch.autocast(device.type, enabled=False):
        total = SUMS[structure](parameters, dtype)
        passes = Passes(model, parameters)
        for batch in show_progress(batches(data, device, n_samples), "Fisher", progress):
            output = passes.run(batch, distribution)
            found = columns(kind, distribution, output, batch.target, draws, generator)
            total.add(passes, found, len(batch))
        return total.mean(kind, passes.paths())


def _check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"{type(module).__name__} {name!r} has no running statistics, so it mixes "
                "observations: they have no scores of their own. Use track_running_stats=True"
            )
