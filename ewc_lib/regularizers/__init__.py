"""Methods that elastic weight consolidation is compared with.

Those with a quadratic penalty around earlier parameters, as :class:`ewc_lib.EWC` itself:

- :class:`L2`: all parameters matter alike;
- :class:`SI`: a parameter matters as much as the loss fell along its path;
- :class:`MAS`: as much as the outputs react to it;
- :class:`RWalk`: as its squared gradients and its path tell together (with EWC++);
- :class:`EWCDR`: as its squared gradients tell after the logits have changed their sign;
- :class:`KroneckerLaplace`: the parameters of a layer matter together.

Those that hold the function instead:

- :class:`LwF`: new inputs shall have the old outputs;
- :class:`Replay`: stored observations are trained on again; all of them in joint training.

For low-rank adapters (:func:`add_adapters`):

- :class:`AdapterEWC`: EWC of the weights that the adapters change.

:class:`Regularizer` is what a training loop may ask of each.
"""

from ewc_lib.regularizers.adapters import AdapterEWC, LowRankUpdate, add_adapters
from ewc_lib.regularizers.ewcdr import EWCDR
from ewc_lib.regularizers.kronecker import KroneckerLaplace
from ewc_lib.regularizers.l2 import L2
from ewc_lib.regularizers.lwf import LwF
from ewc_lib.regularizers.mas import MAS
from ewc_lib.regularizers.protocol import Regularizer
from ewc_lib.regularizers.replay import Replay
from ewc_lib.regularizers.rwalk import RWalk
from ewc_lib.regularizers.si import SI

__all__ = [
    "EWCDR",
    "L2",
    "MAS",
    "SI",
    "AdapterEWC",
    "KroneckerLaplace",
    "LowRankUpdate",
    "LwF",
    "RWalk",
    "Regularizer",
    "Replay",
    "add_adapters",
]
