"""Two short texts in place of the long ones, and protocols that take a moment."""

from ewc_lib.experiments.language import fine_tuning
from ewc_lib.experiments.language.language_models import PROTOCOL

SMALL = {"width": 8, "layers": 1, "heads": 2, "length": 8, "steps_a": [4, 2], "steps": 3}

SHORT = {
    **PROTOCOL,
    "texts": {**PROTOCOL["texts"], **SMALL, "rank": 2},
    "old": 20,
    "seen": 30,
    "rates": {name: [1e-2] for name in PROTOCOL["rates"]} | {"plain": [1e-2, 1e-3]},
    "settings": {
        "along": [1e-2],
        "early stopping": [0.5],
        "averaging": [0.5],
        "Fisher averaging": [0.5],
        "replay": [1.0],
        "joint": [1.0],
        "LoRA": [0.0],
        "LoRA, L2": [0.0, 1e3],
        "LoRA, EWC on factors": [1.0],
        "LoRA, EWC": [0.0, 1e3],
        "L2": [1.0],
        "EWC": [10.0, 1000.0],
        "EWC, euclidean": [1.0],
        "EWC, averaging": [[10.0, 0.5]],
    },
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
        **SMALL,
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
