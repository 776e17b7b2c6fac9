"""What runs, and is seldom what was meant: warnings of a penalty that an optimizer gets."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ewc_lib._adapted.network import below_adapters
from ewc_lib._anchored import displacement
from ewc_lib._foreach import inner
from ewc_lib._names import listed
from ewc_lib._parameters import Vector
from ewc_lib._warning import Once, warn
from ewc_lib.attaching import own_parameters
from ewc_lib.fisher.estimate import STRUCTURES


def warn_of_adapters(say: Once, model: nn.Module, held: Set[str]) -> None:
    """Warn if adapters of peft change weights that are held, and nothing holds the adapters."""
    if below := below_adapters(model, held):
        say(
            "adapters",
            f"adapters of peft are trained beside {listed(below)}, which the penalty holds: these "
            "stay where they are, so the penalty does not see what changes, and holds nothing of "
            "it. ewc_lib.regularizers.AdapterEWC holds the weights that adapters make, and its "
            "remember() takes what is known of the weights below, as the precision of an EWC",
        )


def warn_of_unfrozen(
    optimizer: Optimizer,
    chosen: Mapping[str, nn.Parameter],
    known: dict[str, int],
    held: Collection[str],
) -> None:
    """Warn, once each, of what was there when a task was finished and is trained only now."""
    own = own_parameters(optimizer)
    free = [n for n, p in chosen.items() if n in known and n not in held and id(p) in own]
    if free:
        for name in free:
            del known[name]
        warn(
            f"{listed(free)} were frozen when the last task was finished, and are trained now: "
            "nothing holds them until the next task is finished. To hold them from the start, let "
            "them require grad while the Fisher information or importance is computed"
        )


def warn_of_replaced(
    say: Once, parameters: Mapping[str, Tensor], anchor: Vector, known: Mapping[str, int]
) -> None:
    """Warn of layers that are others than those of the task, and far from what these were.

    If all are others, the model is a copy; what is nearer to the anchor than zero has grown of it.
    """
    new = [n for n, p in parameters.items() if known.get(n, id(p)) != id(p)]
    if not 0 < len(new) < len(parameters):
        return
    moved = displacement({name: parameters[name] for name in new}, {n: anchor[n] for n in new})
    before = {name: anchor[name] * (x != 0) for name, x in moved.items()}
    if inner(moved, moved) > inner(before, before):
        say(
            "replaced",
            f"{listed(new)} are other parameters than those of the last task, and far from them: "
            "a new layer has the name of an old one, and the penalty pulls it to where that was. "
            f"ewc.forget({new}) sets it free",
        )


def warn_of_rates(say: Once, optimizer: Optimizer, structure: str) -> None:
    """Warn if a strength is not that of the loss, because parameters are coupled."""
    if structure in STRUCTURES and structure != "diagonal" and not isinstance(optimizer, SGD):
        name = type(optimizer).__name__
        say(
            "rates",
            f"structure={structure!r} couples parameters, so the proximal step after {name} goes "
            f"by the learning rate alone, without what {name} divides each entry by: a strength "
            "is a euclidean one here, larger than that of a diagonal by a factor of about one over "
            "the size of a gradient: search it anew. metric='euclidean' says that this is meant; "
            "in form='gradient' a strength is that of the loss",
        )


def warn_if_used_twice(say: Once, value: Tensor) -> Tensor:
    """Warn as soon as the gradient of a penalty is asked for that is attached as well."""
    if value.requires_grad:
        value.register_hook(lambda _: warn_of_twice(say))
    return value


def warn_of_twice(say: Once) -> None:
    """Warn that a penalty acts in the optimizer's step, and by hand as well."""
    say(
        "twice",
        "the penalty is attached to an optimizer, and is added by hand as well: it counts twice. "
        "Leave one of the two out",
    )
