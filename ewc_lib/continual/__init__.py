"""Tasks one after another: streams, a training loop, metrics."""

from ewc_lib.continual.metrics import accuracy
from ewc_lib.continual.streams import permute_pixels
from ewc_lib.continual.training import mlp, train

__all__ = ["accuracy", "mlp", "permute_pixels", "train"]
