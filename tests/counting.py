"""Operations that compute something, counted: each is a kernel on an accelerator."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

FREE = {"alias", "as_strided", "detach", "empty", "empty_like", "expand", "lift_fresh", "permute"}
FREE |= {"select", "slice", "split", "split_with_sizes", "t", "transpose", "unsqueeze", "view"}
FREE |= {"promote_types", "result_type", "view_as_real", "_unsafe_view"}
"""Views, memory that is only taken, and questions about dtypes."""

WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero"}
"""What waits for a number of the device."""


class Operations(TorchDispatchMode):
    """Counts what is done within it."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(n for name, n in self.calls.items() if name not in FREE)

    @property
    def waits(self) -> int:
        return sum(n for name, n in self.calls.items() if name in WAITS)


def operations(function) -> int:
    """Return the number of operations of a call, none of which waits."""
    with Operations() as found:
        function()
    assert found.waits == 0
    return found.total
