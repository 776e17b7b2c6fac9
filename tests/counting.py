"""How many operations a call takes: each is a kernel on an accelerator."""

from ewc_lib.experiments.cost.counts import asked


def operations(function) -> int:
    """Return the number of operations of a call, none of which waits."""
    found = asked(function)
    assert found.waits == 0
    return found.operations
