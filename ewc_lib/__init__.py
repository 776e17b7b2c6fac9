"""Fisher information and elastic weight consolidation.

The argument in four steps, one module each: :mod:`ewc_lib.likelihood`, :mod:`ewc_lib.score`,
:mod:`ewc_lib.fisher`, :mod:`ewc_lib.ewc`.
"""

from importlib import metadata as _metadata

from ewc_lib.ewc import EWC
from ewc_lib.fisher import Bernoulli, Categorical, Fisher, Gaussian, Poisson, fisher_information

try:
    __version__ = _metadata.version("ewc_lib")
except _metadata.PackageNotFoundError:  # a checkout on the path that was not installed
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
]
