"""Fisher information and elastic weight consolidation.

The argument in four steps, one module each: :mod:`ewc_lib.likelihood`, :mod:`ewc_lib.score`,
:mod:`ewc_lib.fisher`, :mod:`ewc_lib.ewc`.
"""

from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ewc_lib.ewc import EWC
    from ewc_lib.fisher import Bernoulli, Categorical, Fisher, Gaussian, Poisson, fisher_information
    from ewc_lib.norms import freeze_norms

try:
    __version__ = metadata.version("ewc_lib")
except metadata.PackageNotFoundError:  # a checkout on the path that was not installed
    __version__ = "0+unknown"

__all__ = [
    "EWC",
    "Bernoulli",
    "Categorical",
    "Fisher",
    "Gaussian",
    "Poisson",
    "__version__",
    "fisher_information",
    "freeze_norms",
]

if not TYPE_CHECKING:
    homes = {"EWC": "ewc_lib.ewc", "freeze_norms": "ewc_lib.norms"}

    def __getattr__(name: str) -> object:
        """Import a public name or a module when it is first asked for: PyTorch takes seconds."""
        if name in __all__:
            return getattr(import_module(homes.get(name, "ewc_lib.fisher")), name)
        if find_spec(f"ewc_lib.{name}"):
            return import_module(f"ewc_lib.{name}")
        raise AttributeError(f"module 'ewc_lib' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
