r"""One network at many strengths at once.

.. math:: \Omega_k(\theta) = \frac{\lambda_k}{2} \Delta^\top \hat F \Delta, \qquad
          \Delta = \theta - \theta^*, \quad k = 1, \dots, K

Copies of one network that differ in the strength alone read the same batches, and share every
call: the rows of a matrix ``[K, P]`` are their parameters, and the product of all displacements
with :math:`\hat F` is one product of two matrices. Every structure is a whole matrix here, so
that it costs the same, and ends where :func:`ewc_lib.continual.train` would have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ewc_lib._parameters import unravel
from ewc_lib.continual._reading import batches

__all__ = ["Form", "HeldPredictions", "Quadratic", "kl", "outputs", "train_stack"]

Form: TypeAlias = Literal["gradient", "proximal"]
"""Whether a penalty adds its gradient before a step, or minimises itself after it."""

PRECISE = 1e-4
"""What conjugate gradients leave of a right-hand side."""

FEW = 0.1
"""Rank over size below which the equation is solved for the rank alone."""

TINY = 1e-12
"""Eigenvalues that are zero, as a share of the largest."""

MOST = 300
"""Products of conjugate gradients in a step."""


class Penalty(Protocol):
    """What holds on to a finished task, without its strength."""

    def gradient(self, stack: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]: ...


class Quadratic:
    r"""The penalty :math:`\frac12 \Delta^\top \hat F \Delta` for a stack of parameters.

    Parameters
    ----------
    matrix
        :math:`\hat F`, ``[P, P]``, or ``[P]`` if it is diagonal.
    anchor
        :math:`\theta^*`, ``[P]``.

    Examples
    --------
    >>> import torch
    >>> penalty = Quadratic(torch.tensor([1.0, 4.0]), torch.zeros(2))
    >>> penalty.gradient(torch.tensor([[1.0, 1.0], [2.0, 0.0]]))
    tensor([[1., 4.],
            [2., 0.]])
    >>> penalty.proximal(torch.ones(1, 2), torch.tensor([[0.25]]))
    tensor([[0.8000, 0.5000]])
    """

    def __init__(self, matrix: Tensor, anchor: Float[Tensor, " P"]) -> None:
        self.matrix, self.anchor = matrix, anchor
        self._guess: Tensor | None = None

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        return tuple(torch.linalg.eigh(self.matrix))

    @cached_property
    def _root(self) -> Float[Tensor, "P r"]:
        """Return columns whose products make up the matrix, one for each direction it knows."""
        values, vectors = self._spectrum
        known = values > TINY * values[-1]
        root: Tensor = vectors[:, known] * values[known].sqrt()
        return root

    def _product(self, moved: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        return moved * self.matrix if self.matrix.dim() == 1 else moved @ self.matrix

    def gradient(self, stack: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        r"""Return :math:`\hat F \Delta`."""
        return self._product(stack - self.anchor)

    def proximal(
        self,
        stack: Float[Tensor, "K P"],
        factors: Float[Tensor, "K 1"],
        metric: Tensor | None = None,
    ) -> Float[Tensor, "K P"]:
        r"""Return where the proximal step ends, :eq:`eq-proximal-step`.

        .. math:: \theta^* + (M + f \hat F)^{-1} M (\theta - \theta^*)

        Parameters
        ----------
        stack
            :math:`\theta`, ``[K, P]``.
        factors
            :math:`f`, learning rate times strength, ``[K, 1]``.
        metric
            The diagonal of :math:`M`, ``[K, P]``; by default the identity.
        """
        moved = stack - self.anchor
        if self.matrix.dim() == 1:
            return self.anchor + moved / (
                1 + factors * self.matrix / (1 if metric is None else metric)
            )
        if metric is not None and self._root.shape[1] < FEW * len(self.matrix):
            return self.anchor + self._solved_by_root(factors, metric, moved)
        if metric is not None:
            self._guess = self._solved(factors, metric, moved, self._guess)
            return self.anchor + self._guess
        values, vectors = self._spectrum
        return self.anchor + (moved @ vectors / (1 + factors * values)) @ vectors.mT

    def _solved_by_root(
        self, f: Float[Tensor, "K 1"], metric: Tensor, moved: Tensor
    ) -> Float[Tensor, "K P"]:
        """Solve for a matrix of low rank, by the identity of Woodbury."""
        scaled = self._root / metric[..., None]
        inner = self._root.mT @ scaled + torch.eye(self._root.shape[1]).to(moved) / f[..., None]
        turned = torch.linalg.solve(inner, (moved @ self._root)[..., None])
        left: Tensor = moved - (scaled @ turned)[..., 0]
        return left

    def _solved(
        self, f: Float[Tensor, "K 1"], metric: Tensor, moved: Tensor, guess: Tensor | None
    ) -> Float[Tensor, "K P"]:
        """Solve by conjugate gradients with a diagonal preconditioner, each row for itself."""
        diagonal = metric + f * self.matrix.diagonal()
        b = metric * moved
        x = moved.clone() if guess is None else guess.clone()
        r = b - metric * x - f * self._product(x)
        z = r / diagonal
        p, rz = z.clone(), (r * z).sum(1, keepdim=True)
        enough = PRECISE**2 * (b * b / diagonal).sum(1, keepdim=True)
        for _ in range(MOST):
            if not (rz > enough).any():
                break
            along = metric * p + f * self._product(p)
            size = torch.where(rz > enough, rz / (p * along).sum(1, keepdim=True), 0.0)
            x += size * p
            r -= size * along
            z = r / diagonal
            rz, last = (r * z).sum(1, keepdim=True), rz
            p = z + rz / last * p
        return x


class HeldPredictions:
    r"""Hold the predictions on the inputs of a task, which are kept.

    .. math:: \frac1N \sum_n \mathrm{KL}\big(p(\cdot \mid x_n, \theta^*) \,\big\|\,
              p(\cdot \mid x_n, \theta)\big)

    This is functional regularisation (Buzzega et al. 2020, Pan et al. 2020): what is held is what
    the network says, not where its parameters are. Those methods keep some inputs; this keeps all
    of them and looks at all in every step, so that it shows what the quadratic penalties, which
    approximate it, could reach. :class:`.LwF` holds predictions on inputs of the *new* task.

    Parameters
    ----------
    model
        A classifier that returns logits, at :math:`\theta^*`; it is not changed.
    inputs
        Those of the old task, ``[N, D]``.
    """

    def __init__(self, model: nn.Module, inputs: Float[Tensor, "N D"]) -> None:
        self.model, self.inputs = model, inputs
        with torch.no_grad():
            self.old: Tensor = model(inputs)

    def gradient(self, stack: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        """Return the gradient of the divergence for each row."""
        with torch.enable_grad():
            leaf = stack.detach().requires_grad_()
            lost = kl(self.old, outputs(self.model, leaf, self.inputs))
            return torch.autograd.grad(lost.sum(), leaf)[0]


def outputs(
    model: nn.Module, stack: Float[Tensor, "K P"], inputs: Float[Tensor, "N D"]
) -> Float[Tensor, "K N C"]:
    """Return what a model says with each row of parameters, in the order of the model."""
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def one(row: Float[Tensor, " P"]) -> Float[Tensor, "N C"]:
        found: Tensor = functional_call(model, unravel(row, shapes), (inputs,))
        return found

    found: Tensor = vmap(one)(stack)
    return found


def kl(old: Float[Tensor, "*K N C"], new: Float[Tensor, "*K N C"]) -> Float[Tensor, "*K"]:
    """Return the divergence of new predictions from old ones, the mean over inputs, from logits.

    Examples
    --------
    >>> import torch
    >>> kl(torch.zeros(5, 2), torch.tensor([0.0, 1.0]).expand(3, 5, 2)).shape
    torch.Size([3])
    """
    old, new = torch.broadcast_tensors(old.log_softmax(-1), new.log_softmax(-1))
    return F.kl_div(new, old, reduction="none", log_target=True).sum(-1).mean(-1)


def train_stack(
    model: nn.Module,
    task: tuple[Float[Tensor, "N D"], Tensor],
    penalty: Penalty,
    strengths: Sequence[float],
    *,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    form: Form,
    steps: int,
    batch_size: int,
    seed: int,
) -> Float[Tensor, "K P"]:
    r"""Train copies of a network on one task, each with its own strength of one penalty.

    Parameters
    ----------
    model
        A network without dropout and its like; it is not changed.
    task
        Inputs and labels.
    penalty
        For the form ``"proximal"`` a :class:`Quadratic`.
    strengths
        :math:`\lambda_k`.
    optimizer
        Makes SGD or Adam from the stack.
    form
        With Adam, the proximal step is that in its own metric,
        :math:`M = \operatorname{diag}(\sqrt{\hat v} + \epsilon)`.
    steps, batch_size, seed
        As in :func:`ewc_lib.continual.train`.

    Returns
    -------
    Tensor
        The parameters in the end, one row for each strength.
    """
    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    stack = nn.Parameter(start.repeat(len(strengths), 1))
    weights = start.new_tensor(strengths)[:, None]
    algorithm = optimizer([stack])
    rate = algorithm.param_groups[0]["lr"]
    inputs, labels = task
    for rows in batches(len(labels), batch_size, steps, seed):
        algorithm.zero_grad()
        logits = outputs(model, stack, inputs[rows])
        targets = labels[rows].repeat(len(strengths))
        loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / batch_size
        loss.backward()  # the sum over networks of their mean losses
        with torch.no_grad():
            if form == "gradient":
                assert stack.grad is not None
                stack.grad += weights * penalty.gradient(stack)
            algorithm.step()
            if form == "proximal":
                assert isinstance(penalty, Quadratic)
                metric = _metric(algorithm, stack)
                stack.copy_(penalty.proximal(stack, rate * weights, metric))
    return stack.detach()


def _metric(optimizer: torch.optim.Optimizer, stack: nn.Parameter) -> Tensor | None:
    """Return by what an adaptive optimizer divides, None for SGD."""
    state, group = optimizer.state[stack], optimizer.param_groups[0]
    if "exp_avg_sq" not in state:
        return None
    corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
    metric: Tensor = corrected.sqrt() + group["eps"]
    return metric
