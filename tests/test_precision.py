"""In which precision products are computed, and that every setting comes back."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from ewc_lib import EWC, Fisher, _precision, fisher_information
from ewc_lib._precision import products, products_are_rounded
from ewc_lib.fisher import MatrixFree
from ewc_lib.score import per_observation_gradients

cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
NEWER = pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="this PyTorch has no such settings"
)


def set_by_operation(**values):
    for name, value in values.items():
        backend, operation = name.split("_")
        torch._C._set_fp32_precision_setter(backend, operation, value)


CHOICES = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "cuBLAS": lambda: setattr(cuda, "allow_tf32", True),
    "not cuDNN": lambda: setattr(cudnn, "allow_tf32", False),
    "sums in half precision": lambda: setattr(
        cuda, "allow_bf16_reduced_precision_reduction", False
    ),
}
NEWER_CHOICES = {
    "all": lambda: set_by_operation(generic_all="tf32"),
    "one backend": lambda: set_by_operation(cuda_all="tf32", mkldnn_all="bf16"),
    "the exception": lambda: set_by_operation(generic_all="tf32", cuda_matmul="ieee"),
    "convolutions alone": lambda: set_by_operation(cuda_conv="ieee"),
    "medium, and then all": lambda: (CHOICES["medium"](), set_by_operation(cuda_matmul="ieee")),
}
every_choice = pytest.mark.parametrize(
    "choose",
    [*CHOICES.values(), *(pytest.param(choice, marks=NEWER) for choice in NEWER_CHOICES.values())],
    ids=[*CHOICES, *NEWER_CHOICES],
)
every_precision = pytest.mark.parametrize("precision", ["highest", "high"])


@pytest.fixture(autouse=True)
def _as_it_was():
    """Begin with the settings of a fresh process, and leave them."""

    def reset():
        newer = {"_".join(operation): "none" for operation in _precision._operations()}
        set_by_operation(**newer)
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = True
        set_by_operation(**newer | ({"cuda_conv": "tf32", "cuda_rnn": "tf32"} if newer else {}))
        cuda.allow_bf16_reduced_precision_reduction = True

    reset()
    yield
    reset()


def read(setting):
    try:
        return setting()
    except RuntimeError:
        return "contradiction"


def settings():
    """Return what can be read of all settings, the older ones and the newer ones."""
    found = {
        "matmul": read(torch.get_float32_matmul_precision),
        "cuda": read(lambda: cuda.allow_tf32),
        "cudnn": read(lambda: cudnn.allow_tf32),
        "bf16": cuda.allow_bf16_reduced_precision_reduction,
        "fp16": cuda.allow_fp16_reduced_precision_reduction,
        "on": cudnn.enabled,
    }
    for operation in _precision._operations():
        found[operation] = torch._C._get_fp32_precision_getter(*operation)
    return found


def exact():
    return dict.fromkeys(_precision._operations(), "ieee") | {
        "matmul": "highest",
        "cuda": False,
        "cudnn": False,
        "bf16": False,
        "fp16": False,
    }


def rounded():
    return dict.fromkeys(_precision._operations(), "tf32") | {
        "matmul": "high",
        "cuda": True,
        "cudnn": True,
    }


def holds(found, expected):
    return {key: found[key] for key in expected} == expected


@every_choice
def test_the_older_and_the_newer_settings_agree_inside_whatever_was_chosen(choose):
    choose()
    with products("highest"):
        assert holds(settings(), exact())
    with products("high"):
        assert holds(settings(), rounded())


@every_choice
@every_precision
def test_every_setting_comes_back_also_after_an_exception(choose, precision):
    choose()
    before = settings()
    with products(precision):
        pass
    assert settings() == before
    with pytest.raises(KeyError), products(precision):
        raise KeyError
    assert settings() == before


@NEWER
@every_precision
def test_what_followed_the_setting_of_all_still_follows_it(precision):
    set_by_operation(generic_all="tf32", cuda_conv="ieee")
    with products(precision):
        pass
    set_by_operation(generic_all="ieee")
    assert torch._C._get_fp32_precision_getter("cuda", "matmul") == "ieee"
    set_by_operation(generic_all="tf32")
    assert torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"
    assert torch._C._get_fp32_precision_getter("cuda", "conv") == "ieee"


def test_the_inner_precision_counts_where_one_is_in_another():
    assert not products_are_rounded()
    with products("high"):
        with products("highest"):
            assert holds(settings(), exact())
            assert not products_are_rounded()
        assert holds(settings(), rounded())
        assert products_are_rounded()
    assert not products_are_rounded()


@every_precision
def test_older_settings_are_enough_for_an_older_version(precision, monkeypatch):
    monkeypatch.setattr(_precision, "_operations", lambda: ())
    CHOICES["medium"]()
    before = settings()
    with products(precision):
        inside = {"highest": ("highest", False), "high": ("high", True)}[precision]
        assert (torch.get_float32_matmul_precision(), cudnn.allow_tf32) == inside
    assert settings() == before


@every_choice
def test_nobody_is_warned_of_settings_that_are_not_his(choose):
    choose()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with products("highest"):
            pass


class Watched(torch.autograd.Function):
    """Take note of all settings, on the way forward and on the way back."""

    seen: list = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        Watched.seen.append(settings())
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        Watched.seen.append(settings())
        return g.clone()


class Watching(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.layer(x.unsqueeze(1))
        h = h[0] if isinstance(h, tuple) else h
        return self.head(Watched.apply(h.squeeze(1)))


X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def gradients(model, **options):
    for _ in per_observation_gradients(model, (X, Y), max_bytes=100, **options):
        assert not products_are_rounded()


def product(model, **options):
    F = MatrixFree(model, (X, Y), **options)
    F @ {name: torch.ones_like(p) for name, p in model.named_parameters()}


ENTRIES = {
    "diagonal": lambda m, **o: fisher_information(m, (X, Y), **o),
    "kronecker": lambda m, **o: fisher_information(m, (X, Y), structure="kronecker", **o),
    "ewc": lambda m, **o: EWC(m, 1.0, **o).consolidate((X, Y)),
    "gradients": gradients,
    "product": product,
}


@pytest.mark.parametrize(
    "layer",
    [nn.Linear, partial(nn.LSTM, batch_first=True)],
    ids=["linear", "recurrent"],
)
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
@every_choice
def test_both_ways_through_a_model_are_in_full_precision_unless_the_caller_asks(
    entry, layer, choose
):
    choose()
    before = settings()
    for options, expected in (
        ({}, exact()),
        ({"precision": "highest"}, exact()),
        ({"precision": "high"}, rounded()),
    ):
        Watched.seen.clear()
        entry(Watching(layer(4, 4)), **options)
        assert len(Watched.seen) > 2
        assert all(holds(found, expected) for found in Watched.seen)
        assert settings() == before


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_an_unknown_precision_is_refused(entry):
    with pytest.raises(ValueError, match="precision must be one of 'highest', 'high'"):
        entry(nn.Linear(4, 3), precision="medium")


@pytest.mark.parametrize(
    ("precision", "dtype", "eps"),
    [
        ("highest", torch.float64, torch.finfo(torch.float64).eps),
        ("highest", torch.float32, torch.finfo(torch.float32).eps),
        ("high", torch.float32, torch.finfo(torch.float16).eps),
        ("high", torch.float64, torch.finfo(torch.float64).eps),
    ],
)
def test_the_result_tells_the_tolerance_of_the_certificate(precision, dtype, eps):
    CHOICES["high"]()
    F = fisher_information(nn.Linear(4, 3).to(dtype), (X.to(dtype), Y), precision=precision)
    assert math.isclose(F.tolerance, math.sqrt(eps))
    assert f"tolerance={math.sqrt(eps):.1e})" in repr(F)


def test_of_several_results_the_largest_tolerance_counts_and_is_stored():
    exact, rounded = (
        fisher_information(nn.Linear(4, 3), (X, Y), precision=p) for p in ("highest", "high")
    )
    assert exact.tolerance < rounded.tolerance
    for F in (exact + rounded, rounded.pool(exact), 2 * rounded, rounded.to(dtype=torch.float64)):
        assert F.tolerance == rounded.tolerance
        assert Fisher.from_state_dict(F.state_dict()).tolerance == rounded.tolerance
