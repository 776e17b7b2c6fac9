"""Two short texts in place of the long ones, and a protocol that takes a moment."""

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


def cut_short(monkeypatch):
    """Cut both texts short: what is tested does not depend on their length."""
    for name, times in (("documentation", 20), ("source_code", 40)):
        text = f"{name} of a few words, again and again. " * times
        monkeypatch.setattr(f"ewc_lib.experiments.language.model.{name}", lambda text=text: text)
