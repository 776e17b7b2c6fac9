"""A sharded model run layer by layer, so that no process ever holds all of it.

In the place of each sharded parameter stands another one, whose values are there only while the
module that ``fully_shard`` was called with runs; at other times all of them read as NaN. What
autograd saves of these values is a note, from which they are gathered again on the way back.

The processes have other data, and batches of other sizes, so that none of them knows what the
others need next. So they meet again and again: each says what it needs, and all serve everybody.
Who is done goes on serving until all are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._pytree import tree_map_only

from ewc_lib._sharded import OWNER, is_sharded, part_like, sharding_modules, whole

DONE, GATHER, ADD = range(3)
"""What a process may need."""


class Saved(NamedTuple):
    """What is known of a tensor that autograd saves: a view of a parameter."""

    parameter: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class Layers:
    """The sharded parameters of a model, gathered module by module.

    Parameters
    ----------
    model
        The network. Its parameters are exchanged within :meth:`held`.
    group
        All processes that share it, and perhaps more.
    adds
        Whether sums are those of all processes of the group; else each has all data.
    wide
        Whether parameters in half precision are gathered in single precision.

    Attributes
    ----------
    given
        The sharded parameters, in the order of the model.
    """

    def __init__(
        self, model: nn.Module, group: dist.ProcessGroup | None, adds: bool, wide: bool
    ) -> None:
        self.model = model
        self.group = group
        self.adds = adds
        places = [
            (module, name, p)
            for module in model.modules()
            for name, p in module._parameters.items()
            if is_sharded(p)
        ]
        self._places = places
        self.given: list[Any] = list({id(p): p for _, _, p in places}.values())
        self._number = {id(p): i for i, p in enumerate(self.given)}
        self._dtypes = [_wide(p.dtype) if wide else p.dtype for p in self.given]
        self._widens = any(d != p.dtype for d, p in zip(self._dtypes, self.given, strict=True))
        self.stand_ins = [self._stand_in(i) for i in range(len(self.given))]
        self._number |= {id(p): i for i, p in enumerate(self.stand_ins)}
        self._modules = sharding_modules(model)
        self._layers = self._own_parameters()
        self._layer_of = {i: k for k, own in enumerate(self._layers) for i in own}
        self._uses = [0] * len(self._layers)
        self._here: dict[int, int] = {}
        self._behind: tuple[int | None, dict[int, Tensor]] = None, {}
        self._depth = self._at_once = 0
        self._sums: dict[int, Tensor] = {}
        self._saving = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _stand_in(self, i: int) -> nn.Parameter:
        given = self.given[i]
        found = nn.Parameter(self._absent(i), given.requires_grad)
        setattr(found, OWNER, self)
        return found

    def _absent(self, i: int) -> Tensor:
        given = self.given[i]
        nan = torch.full((), torch.nan, dtype=self._dtypes[i], device=given.to_local().device)
        return nan.expand(given.shape)

    def _own_parameters(self) -> list[list[int]]:
        """Return the parameters that are gathered with each module, and the others at the end."""
        owners = set(self._modules)

        def below(module: nn.Module) -> Iterator[nn.Module]:
            yield module
            for child in module.children():
                if child not in owners:
                    yield from below(child)

        found = [self._within(dict.fromkeys(below(module))) for module in self._modules]
        rest = set(range(len(self.given))).difference(*found)
        return [*found, sorted(rest)]

    def _within(self, modules: dict[nn.Module, None]) -> list[int]:
        own = [self._number[id(p)] for m, _, p in self._places if m in modules]
        return list(dict.fromkeys(own))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the model hold what stands for its parameters, and serve the others at the end."""
        handles = []
        for module, name, p in self._places:
            setattr(module, name, self.stand_ins[self._number[id(p)]])
        self._enter(len(self._modules))
        for k, module in enumerate(self._modules):
            enter, leave = self._hooks(k)
            handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        for module in dict.fromkeys(module for module, _, _ in self._places):
            again, done = self._hooks_of_a_part(module)
            handles.append(module.register_forward_pre_hook(again, prepend=True))
            handles.append(module.register_forward_hook(done, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, name, p in self._places:
                setattr(module, name, p)

    def _hooks(self, k: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            self._depth += 1
            if self._depth == 1:
                self._behind = None, {}
                if not self._at_once:  # else values stay, and transforms allow no notes
                    self._saving.__enter__()
            self._enter(k)
            if self._widens and self._depth == 1:
                return tree_map_only(Tensor, _widened, (args, kwargs))
            return None

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._leave(k)
            self._depth -= 1
            if self._depth == 0 and not self._at_once:
                self._saving.__exit__()

        return enter, leave

    def _hooks_of_a_part(self, part: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What holds parameters may run again on the way back, without the rest of its layer."""
        numbers = [self._number[id(p)] for module, _, p in self._places if module is part]
        layers = list(dict.fromkeys(self._layer_of[i] for i in numbers))

        def again(*_: Any) -> None:
            for k in layers:
                self._enter(k)

        def done(*_: Any) -> None:
            for k in layers:
                self._leave(k)

        return again, done

    @contextmanager
    def all_present(self) -> Iterator[None]:
        """Gather the whole model, for what cannot be done layer by layer."""
        self._behind = None, {}
        self._at_once += 1
        for k in range(len(self._layers)):
            self._enter(k)
        try:
            yield
        finally:
            self._at_once -= 1
            for k in range(len(self._layers)):
                self._leave(k)

    def _enter(self, k: int) -> None:
        self._uses[k] += 1
        if self._uses[k] == 1 and self._layers[k]:
            forward = self._depth or self._at_once
            values = self._ask(GATHER, k) if forward else self._on_the_way_back(k)
            for i, full in values.items():
                self.stand_ins[i].data = full
                self._here[full.untyped_storage().data_ptr()] = i

    def _leave(self, k: int) -> None:
        self._uses[k] -= 1
        if self._uses[k] == 0:
            for i in self._layers[k]:
                self._here.pop(self.stand_ins[i].untyped_storage().data_ptr(), None)
                self.stand_ins[i].data = self._absent(i)

    def _pack(self, tensor: Tensor) -> Tensor | Saved:
        """Save a note of where the values of a parameter were."""
        try:
            i = self._here.get(tensor.untyped_storage().data_ptr())
        except (RuntimeError, NotImplementedError):  # it has no memory of its own
            return tensor
        if i is None or not self._here or tensor.is_conj() or tensor.is_neg():
            return tensor
        where = tensor.size(), tensor.stride(), int(tensor.storage_offset()), tensor.dtype
        return Saved(i, *where)

    def _unpack(self, saved: Tensor | Saved) -> Tensor:
        """Return the values that a note is of."""
        if isinstance(saved, Tensor):
            return saved
        full: Tensor = self.stand_ins[saved.parameter].data
        k = self._layer_of[saved.parameter]
        if not self._uses[k]:
            full = self._on_the_way_back(k)[saved.parameter]
        place = torch.empty(0, dtype=saved.dtype, device=full.device)
        return place.set_(full.untyped_storage(), saved.offset, saved.size, saved.stride)

    def _on_the_way_back(self, k: int) -> dict[int, Tensor]:
        """Gather a layer, and keep it until another one is asked for."""
        if self._behind[0] != k:
            self._behind = None, {}  # before the next one is there
            self._behind = k, self._ask(GATHER, k)
        return self._behind[1]

    def add(self, stand_in: nn.Parameter, part: Tensor) -> None:
        """Add to a sum, of which this process keeps its part."""
        i = self._number[id(stand_in)]
        if self.adds:
            self._ask(ADD, i, part)
        else:
            with torch.no_grad():
                self._keep_part(i, part)

    def sum_of(self, i: int, dtype: torch.dtype) -> Any:
        """Return a sum, sharded like the parameter; zero if nobody has added anything."""
        from torch.distributed.tensor import DTensor

        given = self.given[i]
        part = self._sums.get(i)
        if part is None:
            part = torch.zeros_like(given.to_local(), dtype=dtype)
        form = {"shape": given.shape, "stride": given.stride(), "run_check": False}
        return DTensor.from_local(part, given.device_mesh, given.placements, **form)

    def _keep_part(self, i: int, total: Tensor) -> None:
        part: Any = part_like(self.given[i], total)
        own = part.to_local()
        if i in self._sums:
            self._sums[i] += own
        else:
            self._sums[i] = own.clone()

    def serve(self) -> None:
        """Serve the others until all are done."""
        self._behind = None, {}
        while not self._meet(DONE, 0)[0]:
            pass

    def _ask(self, kind: int, number: int, part: Tensor | None = None) -> dict[int, Tensor]:
        return self._meet(kind, number, part)[1]

    @torch.no_grad()
    def _meet(
        self, kind: int, number: int, part: Tensor | None = None
    ) -> tuple[bool, dict[int, Tensor]]:
        """Say what is needed here, and serve everybody; tell whether all are done."""
        found: dict[int, Tensor] = {}
        with _undisturbed():
            dtype = 0 if part is None else DTYPES.index(part.dtype)
            own = torch.tensor([kind, number, dtype], device=self.given[0].to_local().device)
            asked = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
            dist.all_gather(asked, own, group=self.group)
            needs = {tuple(need.tolist()) for need in asked}
            for need in sorted(needs):
                mine = need[:2] == (kind, number)
                if need[0] == GATHER:
                    found |= self._gathered(need[1], mine)
                elif need[0] == ADD:
                    self._added(need[1], DTYPES[need[2]], part if mine else None)
        return needs == {(DONE, 0, 0)}, found

    def _gathered(self, k: int, mine: bool) -> dict[int, Tensor]:
        found = {}
        for i in self._layers[k]:
            full = whole(self.given[i].detach())
            if mine:
                found[i] = full.contiguous().to(self._dtypes[i])
        return found

    def _added(self, i: int, dtype: torch.dtype, part: Tensor | None) -> None:
        given = self.given[i]
        if part is None:
            part = torch.zeros(given.shape, dtype=dtype, device=given.to_local().device)
        part = part.contiguous()
        dist.all_reduce(part, group=self.group)
        self._keep_part(i, part)

    def check_finite(self) -> None:
        """Raise a ValueError on all ranks if one has a NaN or infinity of some parameter."""
        numbers = self.names()
        finite = self.finite(self.given[i] for i in numbers.values())
        for name, fine in zip(numbers, finite, strict=True):
            if not fine:
                raise ValueError(f"parameter {name!r} holds NaN or infinite values")

    def finite(self, shared: Iterable[Any]) -> list[bool]:
        """Tell of sharded tensors whether all processes have finite numbers only."""
        found = torch.stack([tensor.to_local().isfinite().all() for tensor in shared]).int()
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
        return [bool(fine) for fine in found.tolist()]

    def names(self) -> dict[str, int]:
        """Return the numbers of the parameters, by their names in the model."""
        found = {name: self._number.get(id(p)) for name, p in self.model.named_parameters()}
        return {name: i for name, i in found.items() if i is not None}


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
"""Of sums."""


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let nobody who watches the operations of a model see those between processes."""
    with torch._C.DisableTorchFunction(), temporarily_clear_interpreter_stack():
        yield


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(_wide(tensor.dtype))
