r"""What a Fisher information can do, and the forms in which it is kept.

Every form answers the same questions: :meth:`Fisher.diagonal`, ``F @ v``,
:meth:`Fisher.quadratic`, :meth:`Fisher.solve`, :meth:`Fisher.trace`, :meth:`Fisher.logdet`,
:meth:`Fisher.to_dense`, ``F + G``, ``F - G``, ``2 * F``, ``F / 2``, :meth:`Fisher.pool`,
:meth:`Fisher.to`, :meth:`Fisher.state_dict`. Vectors are dicts of tensors with the names and
shapes of the parameters, or one flat tensor in their order.
"""

from ewc_lib._parameters import Vector
from ewc_lib.fisher.structures.base import Fisher, ReportRow
from ewc_lib.fisher.structures.block import BlockDiagonal
from ewc_lib.fisher.structures.dense import Dense
from ewc_lib.fisher.structures.diagonal import Diagonal
from ewc_lib.fisher.structures.kronecker import EigenKronecker, Kronecker
from ewc_lib.fisher.structures.lowrank import LowRank
from ewc_lib.fisher.structures.vectors import check_shapes

__all__ = [
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "EigenKronecker",
    "Fisher",
    "Kronecker",
    "LowRank",
    "ReportRow",
    "Vector",
    "check_shapes",
]
