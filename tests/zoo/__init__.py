"""Small models of every kind that people bring, with data, in double precision.

Each entry is one layer, or one way of using a parameter, and holds eight observations, so that
sequence lengths, channels and batch sizes are often the same number on purpose. ``truth`` is
the slow answer: every observation by itself, by plain autograd. Each module holds one kind.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from tests.zoo.attention import Attend
from tests.zoo.experts import Experts
from tests.zoo.paths import COMPLEX, PATHS, SINGLE_PRECISION, slower_than_expected
from tests.zoo.registry import REFUSED, ZOO, Functional, read, stir
from tests.zoo.running import Saving
from tests.zoo.sharing import Branches, Tied
from tests.zoo.truth import Truth, call, cut, error, measure, set_mode, truth

__all__ = [
    "COMPLEX",
    "PATHS",
    "REFUSED",
    "SINGLE_PRECISION",
    "ZOO",
    "Attend",
    "Branches",
    "Experts",
    "Functional",
    "Saving",
    "Tied",
    "call",
    "cut",
    "error",
    "measure",
    "read",
    "set_mode",
    "slower_than_expected",
    "stir",
    "truth",
    "zoo_truth",
]

for _kind in iter_modules(__path__, f"{__name__}."):
    import_module(_kind.name)


@cache
def zoo_truth(name: str) -> Truth:
    """Return the slow answer for an entry, computed once."""
    return truth(ZOO[name]())
