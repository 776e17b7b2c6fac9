"""Two short texts in place of the long ones, and protocols that take a moment."""

from ewc_lib.experiments.language import fine_tuning
from ewc_lib.experiments.language.language_models import PROTOCOL

SHORT = {
    **PROTOCOL,
    "width": 8,
    "layers": 1,
    "heads": 2,
    "length": 8,
    "rank": 2,
    "steps_a": 4,
    "steps_b": 3,
    "grids": {"L2": [0.1, 1.0], "EWC": [10.0, 1000.0], "LoRA, EWC": [1.0]},
}

STRENGTHS = {"L2": [1.0], "EWC": [10.0, 1e12], "EWC, Kronecker": [10.0]}

FINE = {
    **fine_tuning.PROTOCOL,
    "digits": {
        **fine_tuning.PROTOCOL["digits"],
        "steps_a": [8, 2],
        "steps": 4,
        "rates": [1e-2],
        "strengths": STRENGTHS,
    },
    "texts": {
        **fine_tuning.PROTOCOL["texts"],
        "width": 8,
        "length": 8,
        "steps_a": [4, 2],
        "steps": 3,
        "rates": [1e-2],
        "strengths": STRENGTHS,
    },
    "old": 20,
    "plain_rates": [1e-2, 1e-3],
    "checkpoints": [0.5],
    "shares": [0.5],
    "few_shares": [0.5],
    "weights": [1.0],
}


def cut_short(monkeypatch):
    """Cut both texts short: what is tested does not depend on their length."""
    for name, times in (("documentation", 20), ("source_code", 40)):
        text = f"{name} of a few words, again and again. " * times
        monkeypatch.setattr(f"ewc_lib.experiments.language.model.{name}", lambda text=text: text)
