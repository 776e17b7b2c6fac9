"""Small models with data on which every method is run, in double precision.

Each function returns a model, its inputs, how to read its output, and observed targets. The
batch sizes that tests use are 1, 7 and ``N``; where a sequence has ``N`` positions too, guessing
the axis of the observations from its length is wrong on purpose.
"""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import Tensor, nn

from ewc_lib import fisher_information
from ewc_lib.fisher.definitions import every_label, score_covariance
from ewc_lib.fisher.structures import Fisher
from ewc_lib.likelihood import network_log_prob
from ewc_lib.likelihood.outputs import Categorical, Gaussian, OutputDistribution

N = 8
CLASSES = 3
BATCH_SIZES = (1, 7, N)

PROPERTY = settings(deadline=None, max_examples=25, derandomize=True, database=None)
"""How property tests run: the same examples every time, and no files left behind."""


class Scenario(NamedTuple):
    """A model with data."""

    model: nn.Module
    x: Any
    likelihood: str | OutputDistribution
    y: Tensor


SCENARIOS: dict[str, Callable[[], Scenario]] = {}


def scenario(make: Callable[[], Scenario]) -> Callable[[], Scenario]:
    """Register a scenario; it is the same every time, and the global random state is kept."""

    def seeded() -> Scenario:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, x, likelihood, y = make()
            return Scenario(_double(model), _double(x), likelihood, _double(y))

    SCENARIOS[make.__name__] = seeded
    return seeded


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, nn.Module) or value.is_floating_point() else value


def _labels(*shape: int, classes: int = CLASSES) -> Tensor:
    return torch.randint(0, classes, shape)


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))


@scenario
def mlp_categorical() -> Scenario:
    return Scenario(_network(), torch.randn(N, 4), "categorical", _labels(N))


@scenario
def mlp_bernoulli() -> Scenario:
    return Scenario(_network(), torch.randn(N, 4), "bernoulli", _labels(N, 3, classes=2).double())


@scenario
def mlp_gaussian() -> Scenario:
    return Scenario(_network(), torch.randn(N, 4), Gaussian(sigma=0.5), torch.randn(N, 3))


@scenario
def mlp_poisson() -> Scenario:
    return Scenario(_network(), torch.randn(N, 4), "poisson", _labels(N, 3, classes=5).double())


@scenario
def cnn_with_norms() -> Scenario:
    """Convolutions, a batch normalisation with running statistics, a group normalisation."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Conv2d(2, 4, 3),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 1.5)
    return Scenario(model, torch.randn(N, 1, 4, 4), "categorical", _labels(N))


class Bag(nn.Module):
    """The sum of some embeddings, and a head that may be tied to the table."""

    def __init__(self, tied: bool = False, **embedding: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, **embedding)
        self.head = nn.Linear(3, 5)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x).sum(1)))


def _tokens(*shape: int) -> Tensor:
    return torch.randint(0, 5, shape)


@scenario
def embedding() -> Scenario:
    return Scenario(Bag(), _tokens(N, 4), "categorical", _tokens(N))


@scenario
def embedding_with_padding() -> Scenario:
    return Scenario(Bag(padding_idx=0), _tokens(N, 4), "categorical", _tokens(N))


@scenario
def tied_weights() -> Scenario:
    """The table of the embedding is the weight of the head."""
    return Scenario(Bag(tied=True), _tokens(N, 4), "categorical", _tokens(N))


class EmbeddingBag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(5, CLASSES, mode="sum")

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x)


@scenario
def embedding_bag() -> Scenario:
    """An operation on an embedding that no rule knows."""
    return Scenario(EmbeddingBag(), _tokens(N, 4), "categorical", _labels(N))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


@scenario
def module_called_twice() -> Scenario:
    return Scenario(Twice(), torch.randn(N, 4), "categorical", _labels(N))


class Attention(nn.Module):
    """A block of hand-written linear maps with a layer normalisation and a residual."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ self.key(x).mT / 2).softmax(-1)
        x = self.norm(x + self.out(weights @ self.value(x)))
        return self.head(x.mean(1))


@scenario
def attention() -> Scenario:
    return Scenario(Attention(), torch.randn(N, 3, 4), "categorical", _labels(N))


class MultiHead(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


@scenario
def multihead_attention() -> Scenario:
    return Scenario(MultiHead(), torch.randn(N, 3, 4), "categorical", _labels(N))


class Raw(nn.Module):
    """Parameters without modules: products and sums with several broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 5))
        self.row = nn.Parameter(torch.randn(1, 5))
        self.column = nn.Parameter(torch.randn(3, 1))
        self.scalar = nn.Parameter(torch.randn(()))
        self.second = nn.Parameter(torch.randn(5, CLASSES))
        self.bias = nn.Parameter(torch.randn(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.scalar + x @ self.first + self.row + self.column).sum(1)
        h = torch.mm(h, self.second)
        h += self.bias
        return h


@scenario
def raw_parameters() -> Scenario:
    return Scenario(Raw(), torch.randn(N, 3, 4), "categorical", _labels(N))


class Addmm(nn.Module):
    """A linear map as older language models write it: flattened, and with the weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, CLASSES))
        self.bias = nn.Parameter(torch.randn(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, 4), self.weight)
        return torch.tanh(flat).reshape(*x.shape[:-1], -1).sum(1)


@scenario
def flattened_positions() -> Scenario:
    return Scenario(Addmm(), torch.randn(N, 3, 4), "categorical", _labels(N))


@scenario
def addmm() -> Scenario:
    return Scenario(Addmm(), torch.randn(N, 1, 4), "categorical", _labels(N))


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(2, 2, batch_first=True)
        self.head = nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


@scenario
def lstm() -> Scenario:
    return Scenario(LSTM(), torch.randn(N, 3, 2), "categorical", _labels(N))


class SequenceFirst(nn.Module):
    """Positions before observations, where both are ``N``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 4)
        self.scale = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x.transpose(0, 1)) + self.scale
        return self.head(torch.tanh(h).sum(0))


@scenario
def sequence_first() -> Scenario:
    return Scenario(SequenceFirst(), torch.randn(N, N, 2), "categorical", _labels(N))


class Positions(nn.Module):
    """Position embeddings, looked up and added, where there are ``N`` positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(N, 2)
        self.offset = nn.Parameter(torch.randn(N))
        self.head = nn.Linear(N, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x + self.table(torch.arange(N, device=x.device)))
        return self.head(torch.tanh(h.sum(-1) + self.offset))


@scenario
def position_embedding() -> Scenario:
    return Scenario(Positions(), torch.randn(N, N, 2), "categorical", _labels(N))


class FunctionalConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(CLASSES, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.conv1d(x, self.kernel)).sum(-1)


@scenario
def functional_convolution() -> Scenario:
    return Scenario(FunctionalConv(), torch.randn(N, 2, 4), "categorical", _labels(N))


@scenario
def circular_convolution() -> Scenario:
    model = nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )
    return Scenario(model, torch.randn(N, 2, 4), "categorical", _labels(N))


@scenario
def grouped_convolution() -> Scenario:
    model = nn.Sequential(
        nn.Conv1d(4, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES)
    )
    return Scenario(model, torch.randn(N, 4, 4), "categorical", _labels(N))


class SeenAndUnseen(nn.Module):
    """One weight, used by an operation with a rule and by one without."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, 4))

    def forward(self, x: Tensor) -> Tensor:
        seen = F.linear(x, self.weight)
        return seen + torch.tanh(torch.einsum("ni,oi->no", x, self.weight))


@scenario
def linear_and_einsum() -> Scenario:
    return Scenario(SeenAndUnseen(), torch.randn(N, 4), "categorical", _labels(N))


@scenario
def weight_norm() -> Scenario:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, CLASSES))
    return Scenario(model, torch.randn(N, 4), "categorical", _labels(N))


class HiddenLinear(torch.autograd.Function):
    """A linear map that no watcher of operations sees."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grad_outputs[0] @ weight, grad_outputs[0].mT @ x


class Hidden(nn.Module):
    """One weight that is only used unseen, and one that is also used seen."""

    def __init__(self) -> None:
        super().__init__()
        self.unseen = nn.Parameter(torch.randn(4, 4))
        self.both = nn.Parameter(torch.randn(CLASSES, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(HiddenLinear.apply(x, self.unseen))
        return F.linear(x, self.both) + HiddenLinear.apply(h, self.both)


@scenario
def custom_function() -> Scenario:
    return Scenario(Hidden(), torch.randn(N, 4), "categorical", _labels(N))


class Checked(nn.Module):
    """A weight that is only used unseen, in a model that looks at the values of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.unseen = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if max(x.flatten(1).sum(1).tolist()) > 100:  # no two observations have this in common
            raise ValueError("an input is too large")
        return self.head(torch.tanh(HiddenLinear.apply(x, self.unseen)))


@scenario
def checked_inputs() -> Scenario:
    """A model that has to be run one observation at a time."""
    return Scenario(Checked(), torch.randn(N, 4), "categorical", _labels(N))


@scenario
def frozen_parameters() -> Scenario:
    model = _network()
    model[0].weight.requires_grad_(False)
    return Scenario(model, torch.randn(N, 4), "categorical", _labels(N))


class Grid(nn.Module):
    """Linear maps at every point of a plane."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x))).mean((1, 2))


@scenario
def positions_in_a_plane() -> Scenario:
    return Scenario(Grid(), torch.randn(N, 3, 2, 2), "categorical", _labels(N))


@scenario
def sequence_of_labels() -> Scenario:
    """Several labels for one observation: its log-likelihood is their sum."""
    return Scenario(_network(), torch.randn(N, 2, 4), "categorical", _labels(N, 2))


@scenario
def next_tokens() -> Scenario:
    return Scenario(_network(), torch.randn(N, 3, 4), "next-token", _labels(N, 3))


@scenario
def classes_on_axis_one() -> Scenario:
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Tanh(), nn.Conv1d(4, CLASSES, 1))
    return Scenario(model, torch.randn(N, 2, 2), Categorical(class_dim=1), _labels(N, 2))


@scenario
def one_number_each() -> Scenario:
    """Outputs without an axis of their own, ``[N]``."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0))
    return Scenario(model, torch.randn(N, 4), Gaussian(sigma=2.0), torch.randn(N))


LOOPED = {"checked_inputs"}
"""Scenarios that vmap cannot follow, where a warning is due."""


def cut(x: Any, y: Tensor, *sizes: int) -> list[tuple[Any, Tensor]]:
    """Cut data into batches of the given sizes, the last of which is repeated."""
    batches, start = [], 0
    while start < len(y):
        size = sizes[min(len(batches), len(sizes) - 1)]
        part = slice(start, start + size)
        batches.append((tuple(t[part] for t in x) if isinstance(x, tuple) else x[part], y[part]))
        start += size
    return batches


@contextmanager
def slow_path_allowed() -> Iterator[None]:
    """Let the warnings of models that vmap cannot follow, or only slowly, pass."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "vmap cannot follow")
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


def estimate(case: Scenario, batch_size: int = N, **options: Any) -> Fisher:
    """Run the engine on a scenario."""
    with slow_path_allowed():
        return fisher_information(
            case.model, cut(case.x, case.y, batch_size), case.likelihood, **options
        )


def definition(case: Scenario, kind: str) -> Tensor:
    """Return the whole matrix by the definition: every label, or the observed ones."""
    log_prob, theta = network_log_prob(case.model, case.likelihood)
    with slow_path_allowed():
        if kind == "empirical":
            return score_covariance(log_prob, theta, (case.x, case.y))
        return score_covariance(log_prob, theta, *every_label(case.model, case.x, case.likelihood))


@cache
def oracle(name: str, kind: str) -> Tensor:
    """Return the matrix of a scenario by the definition, computed once."""
    return definition(SCENARIOS[name](), kind)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest entry."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def trace_of(model: nn.Module) -> dict[str, Any]:
    """Return all that a computation on a model could leave behind, as comparable values."""
    modules = dict(model.named_modules())
    return {
        "modes": {name: module.training for name, module in modules.items()},
        "attributes": {name: _held(vars(module)) for name, module in modules.items()},
        "hooks": {
            (name, key): list(value)
            for name, module in modules.items()
            for key, value in vars(module).items()
            if key.endswith("hooks")
        },
        "tensors": {
            name: (id(t), t.requires_grad, t.is_leaf, t.detach().clone())
            for name, t in [
                *model.named_parameters(remove_duplicate=False),
                *model.named_buffers(remove_duplicate=False),
            ]
        },
        "tensor_hooks": {name: p._backward_hooks for name, p in model.named_parameters()},
        "gradients": {
            name: None if p.grad is None else (id(p.grad), p.grad.clone())
            for name, p in model.named_parameters()
        },
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()),
        "switches": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


class Same:
    """Equal to the very same object only, or to a number or text of the same value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Same):
            return False
        plain = isinstance(self.value, int | float | str) and type(self.value) is type(other.value)
        return self.value is other.value or (plain and self.value == other.value)

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"Same({self.value!r})"


def _held(value: Any, inside: tuple[Any, ...] = ()) -> Any:
    """Return what something is and, of a container or a tensor, what it holds."""
    if type(value) in (Tensor, nn.Parameter):
        return Same(value), value.detach().clone()
    if any(value is container for container in inside):
        return Same(value)
    if isinstance(value, dict):
        return Same(value), {key: _held(v, (*inside, value)) for key, v in value.items()}
    if isinstance(value, list | tuple | deque):
        return Same(value), [_held(v, (*inside, value)) for v in value]
    if isinstance(value, set):
        return Same(value), set(value)
    return Same(value)


def same(a: Any, b: Any) -> bool:
    """Compare nested values; tensors and arrays bit by bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and _equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
