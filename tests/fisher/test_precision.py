"""Precision and place of the sums, and how the data that they take are counted."""

import copy
from functools import reduce

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ewc_lib import Fisher, Gaussian, fisher_information

HALF = (torch.bfloat16, torch.float16)
STRUCTURES = ("diagonal", "block", "module", "dense", "kronecker", "kronecker-reduce")
ALL_STRUCTURES = (*STRUCTURES, "eigenkronecker", "lowrank")
N = 24
FAINT = 1e5
"""With this standard deviation of the output, gradients are about 1e-5, and squares 1e-10."""


class Power(nn.Module):
    """An operation without a rule."""

    def __init__(self):
        super().__init__()
        self.exponent = nn.Parameter(torch.full((3,), 1.5))

    def forward(self, x):
        return x.sigmoid() ** self.exponent


class Autocast(nn.Module):
    """Run a model in half precision, as many models do inside their forward pass."""

    def __init__(self, model, dtype):
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, x):
        with torch.autocast("cpu", dtype=self.dtype):
            return self.model(x)


def linear():
    return nn.Sequential(
        nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def convolution():
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 5)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(80, 3),
    )


def without_a_rule():
    return nn.Sequential(linear(), Power())


MODELS = (linear, convolution, without_a_rule)


def seeded(make, n=N):
    torch.manual_seed(0)
    return make(), torch.randn(n, 20), torch.arange(n) % 3


def small():
    return nn.Sequential(nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 3))


def flat(F):
    return torch.cat([d.flatten().double() for d in F.diagonal().values()])


def relative_error(found, expected):
    """Return the norm of the difference over the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())


both = pytest.mark.parametrize("precision", ["highest", "high"])


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("dtype", HALF)
class TestHalfPrecision:
    """Within 1 % of the float32 result, where the squares themselves have no half precision.

    A model in half precision is run in it with ``precision="high"`` alone.
    """

    def expected(self, make, dtype):
        model, x, y = seeded(make)
        F = fisher_information(model, (x, y.float().expand(3, N).mT), Gaussian(FAINT))
        assert F.trace() > 0
        assert not flat(F).to(torch.float16).any()
        return model, x, y, F

    def found(self, model, x, y, dtype, precision="highest"):
        target = y.to(dtype).expand(3, N).mT
        F = fisher_information(model, (x, target), Gaussian(FAINT), precision=precision)
        assert {d.dtype for d in F.diagonal().values()} == {torch.float32}
        assert flat(F).isfinite().all()
        return F

    @both
    def test_a_model_in_half_precision(self, make, dtype, precision):
        model, x, y, expected = self.expected(make, dtype)
        found = self.found(copy.deepcopy(model).to(dtype), x.to(dtype), y, dtype, precision)
        assert relative_error(flat(found), flat(expected)) < 0.01
        assert found.paths == expected.paths
        assert (set(found.paths.values()) == {"rule"}) == (make is not without_a_rule)

    @both
    def test_a_model_that_uses_autocast(self, make, dtype, precision):
        model, x, y, expected = self.expected(make, dtype)
        found = self.found(Autocast(model, dtype), x, y, torch.float32, precision)
        assert relative_error(flat(found), flat(expected)) < 0.01
        assert list(found.paths.values()) == list(expected.paths.values())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("sigma", [1e-6, 1e8])
@both
def test_gradients_that_half_precision_cannot_hold_are_taken_in_other_units(
    make, dtype, sigma, precision
):
    """Columns of the output are 1e6 or 1e-8; the largest float16 is 65504, the smallest 6e-8."""
    model, x, _ = seeded(make)
    target = torch.zeros(N, 3)
    expected = fisher_information(model, (x, target), Gaussian(sigma))
    for half, data in (
        (copy.deepcopy(model).to(dtype), (x.to(dtype), target)),
        (Autocast(model, dtype), (x, target)),
    ):
        found = fisher_information(half, data, Gaussian(sigma), precision=precision)
        assert relative_error(flat(found), flat(expected)) < 0.01
        assert list(found.paths.values()) == list(expected.paths.values())


class Rounding(TorchDispatchMode):
    """Round the operands of products and convolutions to TF32, as an accelerator does."""

    OPERATIONS = (
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.convolution.default,
        torch.ops.aten.convolution_backward.default,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.OPERATIONS:
            args = tree_map_only(torch.Tensor, self._round, args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _round(x):
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("make", [linear, convolution])
def test_products_that_are_rounded_to_tf32_keep_their_rules(make):
    model, x, y = seeded(make, 256)
    expected = fisher_information(model, (x, y), kind="empirical")
    with Rounding():
        found = fisher_information(model, (x, y), kind="empirical", precision="high")
    assert set(found.paths.values()) == {"rule"}
    assert 1e-6 < relative_error(flat(found), flat(expected)) < 0.01


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("structure", ALL_STRUCTURES)
@both
def test_every_structure_of_a_model_in_half_precision_is_kept_in_single(
    structure, dtype, precision
):
    model, x, y = seeded(small)
    options = {"structure": structure, "kind": "empirical"}
    expected = fisher_information(model, (x, y), **options)
    data = x.to(dtype), y
    found = fisher_information(model.to(dtype), data, precision=precision, **options)
    assert found.to_dense().dtype == torch.float32
    assert set(found.paths.values()) == {"rule"}
    assert relative_error(found.to_dense(), expected.to_dense()) < 0.02


class TestDtypeOfTheSums:
    def test_double_sums_keep_what_single_ones_lose(self):
        """One large input and three small ones: 1e8 + 3 is no number of single precision."""
        model = nn.Linear(1, 1, bias=False)
        x = torch.tensor([[1e4], [1.0], [1.0], [1.0]])
        batches = [(x[:1], x[:1]), (x[1:], x[1:])]

        def total(dtype):
            F = fisher_information(model, batches, "gaussian", dtype=dtype)
            return 4 * F.diagonal()["weight"].item()

        assert total(torch.float64) == 1e8 + 3
        assert total(None) != 1e8 + 3

    @pytest.mark.parametrize("structure", ALL_STRUCTURES)
    def test_every_structure_has_it(self, structure):
        model, x, y = seeded(small)
        expected = fisher_information(model, (x, y), structure=structure)
        found = fisher_information(model, (x, y), structure=structure, dtype=torch.float64)
        assert found.to_dense().dtype == torch.float64
        assert {d.dtype for d in found.diagonal().values()} == {torch.float64}
        assert relative_error(found.to_dense(), expected.to_dense().double()) < 1e-5


class TestDeviceOfTheSums:
    @pytest.mark.parametrize("structure", ALL_STRUCTURES)
    def test_the_device_of_the_model_changes_nothing(self, structure):
        model, x, y = seeded(small)
        expected = fisher_information(model, (x, y), structure=structure)
        found = fisher_information(model, (x, y), structure=structure, device="cpu")
        assert torch.equal(found.to_dense(), expected.to_dense())

    @pytest.mark.parametrize("make", MODELS)
    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_sums_are_kept_on_another_device_only(self, structure, make):
        """The meta device stands for another one: what it holds mixes with nothing of the CPU."""
        model, x, y = seeded(make)
        F = fisher_information(model, (x, y), structure=structure, device="meta")
        kept = [t for name, t in F.state_dict().items() if t.is_floating_point()]
        assert kept
        assert {t.device.type for t in kept} == {"meta"}
        assert F.shapes == {name: p.shape for name, p in model.named_parameters()}


class TestCount:
    @pytest.mark.parametrize("progress", [False, True])
    @pytest.mark.parametrize(("wanted", "batches"), [(1, 1), (5, 1), (7, 2), (10, 2)])
    def test_exactly_so_many_observations_are_used_and_no_batch_more_is_read(
        self, wanted, batches, progress
    ):
        model, x, y = seeded(small)
        read = []

        def data():
            for number, batch in enumerate(zip(x.split(5), y.split(5), strict=True)):
                read.append(number)
                yield batch

        F = fisher_information(model, data(), n_samples=wanted, progress=progress)
        expected = fisher_information(model, (x[:wanted], y[:wanted]))
        assert F.n_samples == wanted
        assert read == list(range(batches))
        assert relative_error(flat(F), flat(expected)) < 1e-6


class TestResuming:
    @pytest.mark.parametrize("kind", ["exact", "empirical"])
    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_parts_that_were_saved_and_pooled_are_one_run(self, structure, kind, tmp_path):
        model, x, y = seeded(small)
        model, x = model.double(), x.double()
        options = {"structure": structure, "kind": kind}
        for number, part in enumerate([slice(0, 4), slice(4, 5), slice(5, None)]):
            F = fisher_information(model, (x[part], y[part]), **options)
            torch.save(F.state_dict(), tmp_path / f"{number}.pt")
        parts = [torch.load(tmp_path / f"{number}.pt") for number in range(3)]
        found = reduce(lambda F, G: F.pool(G), map(Fisher.from_state_dict, parts))
        expected = fisher_information(model, (x, y), **options)
        assert (found.n_samples, found.paths) == (N, expected.paths)
        assert relative_error(found.to_dense(), expected.to_dense()) < 1e-12
