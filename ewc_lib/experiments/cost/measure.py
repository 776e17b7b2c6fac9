"""Time and peak memory of one run, and where the time goes, on the processor and on an accelerator.

An accelerator works while the processor goes on, so that a clock must wait for it. Its memory has
counters of its own; that of the processor is known of whole processes only.
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch
from torch import nn

from ewc_lib.experiments.cost.benchmarks import Batches, Benchmark
from ewc_lib.experiments.cost.peers import CONTESTANTS, Contestant, plain_pass

__all__ = ["peak_bytes", "profile", "quiet", "require", "seconds", "synchronize"]


def require(device: str) -> None:
    """Raise an error if nothing can be measured on a device.

    Raises
    ------
    ValueError
        If PyTorch does not know the device, or if this machine does not have it.
    """
    if device == "cpu":
        return
    if device != "cuda":
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if not torch.cuda.is_available():
        raise ValueError("this machine has no CUDA device, or this PyTorch is built without CUDA")


def synchronize(device: torch.device | str) -> None:
    """Wait until a device has done what it was asked to do; the processor always has."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


@contextmanager
def quiet(threads: int) -> Iterator[None]:
    """Set the number of threads, and let the collector skip what is there already.

    Parameters
    ----------
    threads
        Threads of PyTorch, until the block ends.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)


def seconds(contestant: Contestant, model: nn.Module, batches: Batches) -> float:
    """Time one run, on a copy of the model because some libraries leave their hooks behind.

    Parameters
    ----------
    contestant
        What to run; its warnings are not shown.
    model, batches
        What to run it on, both on one device.
    """
    model, device = copy.deepcopy(model), batches[0][0].device
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        synchronize(device)
        start = time.perf_counter()
        contestant(model, batches)
        synchronize(device)
        return time.perf_counter() - start


def peak_bytes(contestant: Contestant, benchmark: Benchmark, n: int, threads: int) -> int:
    """Return the peak of the memory that a run takes, with its model and data.

    On the processor it is that of a process of its own, with all of its code. On an accelerator it
    is what PyTorch's allocator has handed out, above what was in use before.

    Parameters
    ----------
    contestant
        What to run.
    benchmark
        The model and its data.
    n
        Number of observations.
    threads
        Threads of PyTorch in the process.
    """
    if benchmark.device == "cpu":
        return _peak_of_a_process(contestant, benchmark, n, threads)
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds(contestant, benchmark.model(), benchmark.batches(n))
    return torch.cuda.max_memory_allocated() - before


def _peak_of_a_process(contestant: Contestant, benchmark: Benchmark, n: int, threads: int) -> int:
    """Return the peak of a process of its own.

    A server forks it: a process that is started in the usual way begins with the peak of the
    process that started it.
    """
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_of_this_process, contestant, benchmark, n, threads).result()


def _peak_of_this_process(
    contestant: Contestant, benchmark: Benchmark, n: int, threads: int
) -> int:
    import resource  # there is none on Windows

    torch.set_num_threads(threads)
    seconds(contestant, benchmark.model(), benchmark.batches(n))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def profile(benchmark: Benchmark, kind: str, threads: int = 2) -> str:
    """Return where the time of one run goes, operation by operation.

    Parameters
    ----------
    benchmark
        The model and its data.
    kind
        A kind of the Fisher information, or ``"plain"`` for the unit.
    threads
        Threads of PyTorch.

    Raises
    ------
    ValueError
        If the kind is unknown.
    """
    contestants: dict[str, Contestant] = {"plain": plain_pass, **CONTESTANTS["ewc_lib"]}
    if kind not in contestants:
        raise ValueError(f"unknown kind {kind!r}; there are {', '.join(contestants)}")
    model, batches = benchmark.model(), benchmark.batches(benchmark.n)
    with quiet(threads):
        seconds(contestants[kind], model, batches)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if benchmark.device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as found:
            contestants[kind](model, batches)
            synchronize(benchmark.device)
    order = f"self_{benchmark.device}_time_total"
    text: str = found.key_averages().table(sort_by=order, row_limit=25)
    return text
