"""Models in half precision are run in float32, and left in half precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ewc_lib import EWC, fisher_information
from ewc_lib.fisher import MatrixFree
from ewc_lib.score import per_observation_gradients

N, CLASSES = 12, 3
HALF = (torch.bfloat16, torch.float16)
SEEN = []
"""Types that models have seen; a list of their own would be given its content back."""

halves = pytest.mark.parametrize("dtype", HALF)


class Words(nn.Module):
    """An embedding, attention with a norm before it, and a head that is the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        h = self.embedding(tokens)
        x = self.norm(h)
        return self.head(h + self.attention(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.lstm(x.unflatten(1, (2, 4)))[0][:, -1])


class Scales(nn.Module):
    """An operation without a rule."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x):
        return x.sigmoid() ** self.w


def images():
    model = nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)),
        nn.Conv2d(2, 4, 2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, CLASSES),
    )
    nn.init.uniform_(model[2].running_mean)
    nn.init.uniform_(model[2].running_var, 0.5, 2.0)
    return model


def deep():
    """ReLUs whose signs change with a small error, and gradients that float16 cannot hold."""
    layers = [layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(8, CLASSES))


def confident():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    with torch.no_grad():
        model[2].weight *= 60
    return model


def without_a_rule():
    return nn.Sequential(nn.Linear(8, 8), Scales(), nn.Linear(8, CLASSES))


MODELS = {
    "images": images,
    "recurrent": Recurrent,
    "deep": deep,
    "confident": confident,
    "without a rule": without_a_rule,
    "words": Words,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def seeded(make, dtype):
    """Return a model in half precision, the same values in float32, and data for each."""
    torch.manual_seed(0)
    half, x, y = make().to(dtype), torch.randn(N, 8).to(dtype), torch.arange(N) % CLASSES
    if make is Words:
        x = torch.randint(0, 7, (N, 5))
        y = x.roll(1, 1)
    single = x.float() if x.is_floating_point() else x
    return half, copy.deepcopy(half).float(), (x, y), (single, y)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value)


@every_model
@halves
@pytest.mark.parametrize("kind", ["exact", "sketch", "sampled", "empirical"])
def test_the_diagonal_is_that_of_the_same_values_in_single_precision(make, dtype, kind):
    half, single, data, as_single = seeded(make, dtype)
    found = fisher_information(half, data, kind=kind)
    expected = fisher_information(single, as_single, kind=kind)
    assert found.trace() > 0
    same(found.diagonal(), expected.diagonal())
    assert (found.paths, found.tolerance) == (expected.paths, expected.tolerance)


@every_model
@halves
@pytest.mark.parametrize("structure", ["block", "kronecker", "eigenkronecker", "lowrank"])
def test_every_structure_is_that_of_single_precision(make, dtype, structure):
    half, single, data, as_single = seeded(make, dtype)
    found = fisher_information(half, data, structure=structure, kind="empirical")
    expected = fisher_information(single, as_single, structure=structure, kind="empirical")
    assert found.keeps == expected.keeps
    same(found.diagonal(), expected.diagonal())


@every_model
@halves
def test_single_gradients_and_products_are_those_of_single_precision(make, dtype):
    half, single, data, as_single = seeded(make, dtype)
    of_half, of_single = (
        next(iter(per_observation_gradients(*given)))
        for given in ((half, data), (single, as_single))
    )
    same(of_half, of_single)
    v = {name: torch.ones_like(p, dtype=torch.float32) for name, p in half.named_parameters()}
    same(MatrixFree(half, data) @ v, MatrixFree(single, as_single) @ v)


@halves
def test_what_overflows_in_half_precision_is_finite(dtype):
    """The hidden layer reaches 60,000, and its products with the head are far beyond 65,504."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1, bias=False)).to(dtype)
    with torch.no_grad():
        model[0].weight.fill_(1500.0)
        model[2].weight.copy_(torch.tensor([[3.0, -3.0, 1.0]]))
    x, y = torch.full((N, 4), 10.0, dtype=dtype), torch.zeros(N, 1)
    found = fisher_information(model, (x, y), "gaussian").diagonal()
    assert all(value.isfinite().all() for value in found.values())
    assert torch.allclose(found["2.weight"], torch.full((1, 3), 6e4**2), rtol=1e-2)


@every_model
@halves
def test_the_model_is_left_with_its_own_parameters_also_after_an_exception(make, dtype):
    half, _, data, _ = seeded(make, dtype)
    half.forward = lambda *args, forward=half.forward: forward(*args)  # an attribute of its own
    arrived, own = [], half.forward
    first = next(half.parameters())
    node = first.expand_as(first).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: arrived.append(1))  # as data in parallel have
    tensors = [*half.parameters(), *half.buffers()]
    places = [id(t) for t in tensors]
    memory = [t.data_ptr() for t in tensors]
    values = [t.clone() for t in tensors]

    def check():
        now = [*half.parameters(), *half.buffers()]
        assert [id(t) for t in now] == places
        assert [t.data_ptr() for t in now] == memory
        assert all(torch.equal(t, value) for t, value in zip(now, values, strict=True))
        assert half.forward is own
        for module in half.modules():
            if isinstance(module, nn.RNNBase):
                named = dict(module.named_parameters())
                flat = zip(module._flat_weights, module._flat_weights_names, strict=True)
                assert all(weight is named[name] for weight, name in flat)

    fisher_information(half, data)
    check()
    with pytest.raises(ValueError, match="different lengths"):
        fisher_information(half, (data[0], data[1][1:]))
    check()
    half(data[0]).float().sum().backward()
    assert arrived


@halves
def test_the_forward_method_of_the_class_is_not_hidden_for_good(dtype):
    half, _, data, _ = seeded(images, dtype)
    fisher_information(half, data)
    assert "forward" not in vars(half)


@halves
def test_gradients_of_each_batch_are_those_of_the_values_it_finds(dtype):
    half, single, data, as_single = seeded(deep, dtype)
    batches = [tuple(t[part] for t in data) for part in (slice(0, 6), slice(6, None))]
    for number, found in enumerate(per_observation_gradients(half, batches)):
        part = slice(6 * number, 6 * number + 6)
        expected = next(
            iter(per_observation_gradients(single, [(as_single[0][part], data[1][part])]))
        )
        same(found, expected)
        with torch.no_grad():
            for p, q in zip(half.parameters(), single.parameters(), strict=True):
                p.mul_(1.25)
                q.copy_(p)


class Converts(nn.Module):
    """It knows in which precision it wants to compute."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.dtype = dtype

    def forward(self, x):
        SEEN.append(self.first.weight.dtype)
        return self.second(torch.tanh(self.first(x).to(self.dtype)))


class Keeps(nn.Module):
    """It has one of its parameters in a list of its own, where no module finds it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.held = [self.scale]

    def forward(self, x):
        return self.second(torch.tanh(self.first(x) * self.held[0]))


def hooked():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    model[0].weight.register_hook(lambda g: None)
    return model


def refused(make):
    half, single, data, as_single = seeded(make, torch.bfloat16)
    if make is Keeps:
        half.held, single.held = [half.scale], [single.scale]
    if make is Converts:
        single.dtype = torch.float32
    return half, single, data, as_single


@pytest.mark.parametrize("make", [Converts, Keeps, hooked])
@pytest.mark.parametrize("certify", ["auto", "always"])
def test_a_model_that_insists_on_half_precision_is_run_in_it(make, certify):
    half, single, data, as_single = refused(make)
    before = list(half.parameters())
    found = fisher_information(half, data, certify=certify)
    expected = fisher_information(single, as_single)
    assert all(p is q for p, q in zip(half.parameters(), before, strict=True))
    assert found.tolerance == torch.finfo(torch.bfloat16).eps ** 0.5
    assert found.paths == expected.paths
    whole, of_single = (
        torch.cat([d.flatten() for d in F.diagonal().values()]) for F in (found, expected)
    )
    assert (whole - of_single).norm() < 0.02 * of_single.norm()
    for gradients in per_observation_gradients(half, data, max_bytes=1000):
        assert all(g.any() for g in gradients.values())
    v = {name: torch.ones_like(p, dtype=torch.float32) for name, p in half.named_parameters()}
    assert all(g.any() for g in (MatrixFree(half, data) @ v).values())


def test_a_model_that_insists_is_compared_with_its_criterion_and_read_once():
    half, _, (x, y), _ = refused(Converts)
    found = fisher_information(half, iter([(x, y)]), criterion=nn.CrossEntropyLoss())
    assert found.n_samples == N


def test_a_program_is_run_in_its_own_precision():
    half, _, data, _ = seeded(deep, torch.bfloat16)
    program = torch.jit.trace(half, data[0])
    found = fisher_information(program, data, kind="empirical")
    assert found.tolerance == torch.finfo(torch.bfloat16).eps ** 0.5


def test_a_model_that_insists_later_says_how_to_run_it():
    class Later(Converts):
        def forward(self, x):
            return super().forward(x) if len(x) < 4 else self.second(self.first(x))

    half, _, (x, y), _ = seeded(Later, torch.bfloat16)
    batches = [(x[:8], y[:8]), (x[:8], y[:8]), (x[:2], y[:2])]
    with pytest.raises(RuntimeError) as raised:
        for _ in per_observation_gradients(half, batches):
            pass
    assert any("precision='high'" in note for note in raised.value.__notes__)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())


@halves
@pytest.mark.parametrize(("precision", "single"), [("highest", True), ("high", False)])
def test_only_the_caller_can_ask_for_a_run_in_half_precision(dtype, precision, single):
    half, _, data, _ = seeded(lambda: Converts(torch.float32), dtype)
    half.second.float()
    SEEN.clear()
    fisher_information(half, data, precision=precision)
    EWC(half, 1.0, precision=precision).consolidate(data)
    assert set(SEEN) == {torch.float32 if single else dtype}


@halves
def test_autocast_of_the_caller_changes_no_gradient_and_no_product(dtype):
    _, single, _, data = seeded(images, torch.bfloat16)
    v = {name: torch.ones_like(p) for name, p in single.named_parameters()}
    gradients = next(iter(per_observation_gradients(single, data)))
    product = MatrixFree(single, data) @ v
    diagonal = fisher_information(single, data, structure="kronecker").diagonal()
    with torch.autocast("cpu", dtype=dtype):
        assert F.linear(data[0], torch.ones(2, 8)).dtype == dtype
        same(next(iter(per_observation_gradients(single, data))), gradients)
        same(MatrixFree(single, data) @ v, product)
        same(fisher_information(single, data, structure="kronecker").diagonal(), diagonal)


class Autocast(nn.Module):
    """It opens a region of autocast, and one without in it."""

    def __init__(self, model, dtype):
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, x):
        with torch.autocast("cpu", dtype=self.dtype):
            with torch.autocast("cpu", enabled=False):
                x = x + 0
            output = self.model(x)
            SEEN.append(output.dtype)
        return output


@every_model
@halves
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_autocast_inside_a_model_is_closed(make, dtype, kind):
    _, single, _, data = seeded(make, dtype)
    model = Autocast(single, dtype)
    SEEN.clear()
    found = fisher_information(model, data, kind=kind)
    expected = fisher_information(single, data, kind=kind)
    assert set(SEEN) == {torch.float32}
    same({n.removeprefix("model."): d for n, d in found.diagonal().items()}, expected.diagonal())
    assert found.tolerance == expected.tolerance
    assert list(found.paths.values()) == list(expected.paths.values())
    assert not torch.is_autocast_enabled("cpu")


@halves
def test_only_the_caller_can_ask_for_autocast_inside_a_model(dtype):
    _, single, _, data = seeded(deep, torch.bfloat16)
    model = Autocast(single, dtype)
    SEEN.clear()
    found = fisher_information(model, data, precision="high")
    assert set(SEEN) == {dtype}
    assert found.tolerance == torch.finfo(dtype).eps ** 0.5


def test_a_model_that_needs_its_autocast_has_it():
    _, single, _, data = seeded(lambda: Converts(torch.bfloat16), torch.bfloat16)
    model = Autocast(single, torch.bfloat16)
    found = fisher_information(model, data)
    assert SEEN[-1] == torch.bfloat16
    assert found.tolerance == torch.finfo(torch.bfloat16).eps ** 0.5
    assert all(value.any() for value in found.diagonal().values())


def test_a_model_that_fails_in_any_precision_fails_once():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x):
            SEEN.append(x.dtype)
            raise KeyError("broken")

    SEEN.clear()
    with pytest.raises(KeyError, match="broken"):
        fisher_information(Broken(), (torch.ones(4, 3), torch.zeros(4).long()))
    assert len(SEEN) == 1


@halves
def test_data_of_another_type_are_refused_with_the_type_of_the_model(dtype):
    half, _, (x, y), _ = seeded(deep, dtype)
    with pytest.raises(ValueError, match=f"with parameters of {dtype}, cannot take inputs"):
        fisher_information(half, (x.double(), y))
