"""How exactly products of matrices and convolutions are computed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

import torch

Precision: TypeAlias = Literal["highest", "high"]
"""Whether products are exact, or may be rounded to TF32."""

OPERATIONS = (
    *(("generic", "all"), ("cuda", "all"), ("mkldnn", "all")),
    *((backend, name) for backend in ("cuda", "mkldnn") for name in ("matmul", "conv", "rnn")),
)
"""What has a setting of its own since PyTorch 2.9. "none" stands for that of the whole backend,
and there for that of all, so the order is from the general to the special."""

HALF_SUMS = (
    "fp16_reduced_precision_reduction",
    "bf16_reduced_precision_reduction",
    "fp16_accumulation",
)
"""Ways to add up products in half precision, where they could overflow."""

_ROUNDED = ContextVar("products may be rounded to TF32", default=False)


def products_are_rounded() -> bool:
    """Whether products of float32 may be rounded to TF32, with the ten bits of float16."""
    return _ROUNDED.get()


@contextmanager
def products(precision: Precision) -> Iterator[None]:
    """Compute products in one precision, and give every setting back the value that it had.

    With "highest", products of float32 are not rounded further, and those in half precision are
    added up in float32. With "high", those of float32 may be rounded to TF32 where there is it.
    """
    before = _Settings.now()
    token = _ROUNDED.set(precision == "high")
    try:
        _Settings.of(precision).put()
        yield
    finally:
        _ROUNDED.reset(token)
        before.put()


@dataclass(frozen=True)
class _Settings:
    """All settings of PyTorch for products.

    Those of before 2.9 are still there, and reading one is an error where it contradicts a newer
    one. Writing one writes newer ones, too. So the newer ones are read first, and written last.
    """

    matmul: str
    cudnn: bool
    operations: dict[tuple[str, str], str]
    half_sums: dict[str, Any]

    @classmethod
    def of(cls, precision: Precision) -> _Settings:
        if precision == "high":
            return cls("high", True, dict.fromkeys(_operations(), "tf32"), {})
        exact = dict.fromkeys(_operations(), "ieee")
        return cls("highest", False, exact, dict.fromkeys(_half_sums(), False))

    @classmethod
    def now(cls) -> _Settings:
        """Read all settings; those of single operations are "none" afterwards."""
        operations = {}
        for operation in _operations():
            operations[operation] = torch._C._get_fp32_precision_getter(*operation)
            torch._C._set_fp32_precision_setter(*operation, "none")
        _hear_advice()
        matmul = torch.get_float32_matmul_precision()
        try:
            cudnn = torch.backends.cudnn.allow_tf32
        except RuntimeError:  # it contradicts "none"
            cudnn = True
        half_sums = {
            name: getattr(torch._C, f"_get_cublas_allow_{name}")() for name in _half_sums()
        }
        return cls(matmul, cudnn, operations, half_sums)

    def put(self) -> None:
        """Write all settings."""
        torch.set_float32_matmul_precision(self.matmul)
        torch.backends.cudnn.allow_tf32 = self.cudnn
        for operation, value in self.operations.items():
            torch._C._set_fp32_precision_setter(*operation, value)
        for name, value in self.half_sums.items():
            values = value if isinstance(value, tuple) else (value,)
            getattr(torch._C, f"_set_cublas_allow_{name}")(*values)


def _operations() -> tuple[tuple[str, str], ...]:
    return OPERATIONS if hasattr(torch._C, "_get_fp32_precision_getter") else ()


def _half_sums() -> list[str]:
    return [name for name in HALF_SUMS if hasattr(torch._C, f"_get_cublas_allow_{name}")]


@cache
def _hear_advice() -> None:
    """Let PyTorch say now, which it does once, that there are newer settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.get_float32_matmul_precision()
