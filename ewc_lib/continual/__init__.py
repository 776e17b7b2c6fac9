"""Tasks one after another: streams, a training loop, metrics."""

from ewc_lib.continual.averaging import averaged
from ewc_lib.continual.learning import Learned, learn
from ewc_lib.continual.metrics import (
    accuracy,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
    min_accuracy,
)
from ewc_lib.continual.streams import permute_pixels, permuted, rotated, split
from ewc_lib.continual.tasks import Scenario, Stream, Task
from ewc_lib.continual.together import Together, learn_together
from ewc_lib.continual.training import mlp, train
from ewc_lib.heads import MultiHead

__all__ = [
    "Learned",
    "MultiHead",
    "Scenario",
    "Stream",
    "Task",
    "Together",
    "accuracy",
    "average_accuracy",
    "averaged",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "learn",
    "learn_together",
    "learning_accuracy",
    "min_accuracy",
    "mlp",
    "permute_pixels",
    "permuted",
    "rotated",
    "split",
    "train",
]
