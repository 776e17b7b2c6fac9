"""What an accelerator is asked to do: kernels to start and numbers to wait for, counted anywhere.

The processor starts a kernel on the accelerator for each operation that computes, and stands still
wherever it needs a number from there. In models of moderate size these two decide how long a run
takes, and not arithmetic. Both are exact numbers, whatever else the machine does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ewc_lib.experiments.cost.benchmarks import Benchmark
from ewc_lib.experiments.cost.peers import CONTESTANTS, Contestant, plain_pass
from ewc_lib.score import memory

__all__ = ["KINDS", "Asked", "Count", "asked", "count", "count_all", "table"]

KINDS = ("empirical", "sketch", "exact")
"""The kinds that are counted."""

EMPTY = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
MEMORY = EMPTY | {"_unsafe_view", "resize_", "set_"}
"""Operations that only ask for memory, or hand it on. Views cost nothing either."""

NUMBER = "_local_scalar_dense"
"""The copy of one number to the processor, in which ``item``, ``bool`` and ``float`` end."""

SIZES = {"_unique2", "masked_select", "nonzero", "unique_consecutive", "unique_dim"}
WAITS = SIZES | {NUMBER, "equal", "is_nonzero"}
"""Operations whose result, or its size, the processor must have before it goes on."""


class Asked(TorchDispatchMode):
    """Count what is asked for inside of the block.

    Its ``operations`` are kernels to start, its ``calls`` all calls by their name.

    Examples
    --------
    >>> with Asked() as found:
    ...     bool((torch.ones(2, 3).mT @ torch.ones(2, 3)).sum() > 0)
    True
    >>> found.calls["view"], found.calls["mm"], found.operations, found.waits
    (0, 1, 5, 1)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.operations = 0
        self.masks = 0
        self._lists = _Lists()

    def __enter__(self) -> Self:
        self._lists.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._lists.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        self.masks += name.startswith("index") and any(map(_is_mask, args[1:2]))
        found = func(*args, **(kwargs or {}))
        # What answers with a number, as the types of a sum, is looked up or waited for.
        number = isinstance(found, int | float | complex | torch.dtype)
        self.operations += not (number or func.is_view or name in MEMORY)
        return found

    @property
    def waits(self) -> int:
        """Numbers to wait for. Who selects by a mask waits for the number of what is selected."""
        by_name = sum(n for name, n in self.calls.items() if name in WAITS)
        return self._lists.count + self.masks + by_name


class _Lists(TorchFunctionMode):
    """Count the lists that are made of tensors, of which no operation tells on the processor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func is Tensor.tolist
        return func(*args, **(kwargs or {}))


def _is_mask(indices: Any) -> bool:
    found = indices if isinstance(indices, list | tuple) else ()
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in found)


def asked(run: Callable[[], object]) -> Asked:
    """Return what a function without arguments asks for."""
    found = Asked()
    with found:
        run()
    return found


class Count(NamedTuple):
    """What a contestant asks for; kernels in multiples of those of a plain pass over one batch.

    Parameters
    ----------
    each
        For each further batch of data.
    waits
        Numbers to wait for, for each further batch.
    once
        However many batches there are: what is paid for once, as the certificate.
    waits_once
        Numbers to wait for, however many batches there are.
    """

    each: float
    waits: float
    once: float
    waits_once: float


def count(contestant: Contestant, benchmark: Benchmark, few: int = 2, many: int = 4) -> Count:
    """Count on two sizes of the data: what grows belongs to the batches, the rest is paid once.

    Pieces of the work have the sizes that they have on an accelerator, wherever the model is.

    Parameters
    ----------
    contestant
        What to count.
    benchmark
        The model and its data.
    few, many
        Numbers of batches.

    Examples
    --------
    >>> from ewc_lib.experiments.cost.benchmarks import BENCHMARKS
    >>> count(plain_pass, BENCHMARKS["mlp"], 1, 3)
    Count(each=1.0, waits=0.0, once=0.0, waits_once=0.0)
    """
    model = benchmark.model()

    def ask(run: Contestant, batches: int) -> tuple[int, int]:
        data = benchmark.batches(batches * benchmark.batch_size)
        with memory.as_on("cuda"):
            found = asked(lambda: run(model, data))
        return found.operations, found.waits

    ask(contestant, 1)  # what is done once in a process is no part of it
    unit = ask(plain_pass, 2)[0] - ask(plain_pass, 1)[0]
    less, more = ask(contestant, few), ask(contestant, many)
    each, waits = ((b - a) / (many - few) for a, b in zip(less, more, strict=True))
    once, waits_once = less[0] - few * each, less[1] - few * waits
    return Count(each / unit, waits, once / unit, waits_once)


def count_all(benchmarks: Mapping[str, Benchmark]) -> dict[tuple[str, str], Count]:
    """Count every kind of this package on every model, by the names of both."""
    ours = CONTESTANTS["ewc_lib"]
    return {
        (name, kind): count(ours[kind], benchmark)
        for name, benchmark in benchmarks.items()
        for kind in KINDS
        if benchmark.exact or kind != "exact"
    }


def table(counts: Mapping[tuple[str, str], Count]) -> str:
    """Return counts as text.

    Parameters
    ----------
    counts
        By the names of a model and a kind.
    """
    head = (
        f"{'':24}{'for each batch':^22}{'once':^22}\n{'':24}" + 2 * f"{'passes':>11}{'waits':>11}"
    )
    lines = (
        f"{model:14}{kind:10}{c.each:11.2f}{c.waits:11.1f}{c.once:11.1f}{c.waits_once:11.0f}"
        for (model, kind), c in counts.items()
    )
    return "\n".join([head, *lines])
