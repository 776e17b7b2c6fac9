"""Accuracies that others have published, in percent, beside which ours are shown.

They are those of tables, except for Zenke et al. (2017), whose figure has no numbers: the two are
means over the results that the authors publish beside their code.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PUBLISHED", "Published", "published"]


class Published(NamedTuple):
    """One number of a publication.

    Parameters
    ----------
    experiment
        The name of our experiment.
    row
        What identifies the row of our table, as ``"task EWC"``.
    value
        Average accuracy over all tasks after the last, in percent.
    error
        Standard error of the mean over seeds, where it is given.
    source
        The key of the publication in the bibliography.
    """

    experiment: str
    row: str
    value: float
    error: float | None
    source: str


def _table(
    experiment: str, source: str, rows: dict[str, tuple[float, float | None]]
) -> list[Published]:
    return [Published(experiment, row, *numbers, source) for row, numbers in rows.items()]


PUBLISHED = [
    *_table(
        "split-mnist",
        "vandeVen2022",
        {
            "task none": (84.32, 0.99),
            "task EWC": (99.06, 0.15),
            "task SI": (99.20, 0.11),
            "task LwF": (99.60, 0.03),
            "task joint": (99.67, 0.03),
            "domain none": (60.13, 1.66),
            "domain EWC": (63.03, 1.58),
            "domain SI": (66.94, 1.13),
            "domain LwF": (71.18, 1.42),
            "domain joint": (98.59, 0.05),
            "class none": (19.89, 0.02),
            "class EWC": (20.64, 0.52),
            "class SI": (21.20, 0.57),
            "class LwF": (21.89, 0.32),
            "class joint": (98.17, 0.04),
        },
    ),
    *_table(
        "fisher-variants",
        "vandeVen2025",
        {
            "none": (85.41, 0.88),
            "exact": (99.12, 0.16),
            "exact, n = 500": (98.93, 0.15),
            "sampled": (99.12, 0.12),
            "empirical": (99.12, 0.12),
            "batch means": (99.11, 0.16),
        },
    ),
    *_table(
        "split-cifar10",
        "vandeVen2025",
        {
            "none": (69.53, 1.34),
            "exact": (84.91, 0.65),
            "exact, n = 500": (84.57, 0.72),
            "sampled": (83.77, 0.72),
            "empirical": (83.28, 0.77),
            "batch means": (83.38, 0.66),
        },
    ),
    *_table(
        "permuted-mnist three-scenarios",
        "vandeVen2019",
        {
            "none": (78.51, 0.24),
            "EWC": (94.31, 0.11),
            "online EWC": (94.42, 0.13),
            "SI": (95.33, 0.11),
            "joint": (97.59, 0.01),
            "arg-max EWC": (94.31, 0.11),
            "arg-max online EWC": (94.42, 0.13),
        },
    ),
    *_table("permuted-mnist zenke", "Zenke2017", {"none": (57.41, None), "SI": (96.94, None)}),
]
"""All of them; the bibliography has the sources."""


def published(experiment: str, row: str) -> Published | None:
    """Return the published number for a row of our table, if there is one.

    Examples
    --------
    >>> published("fisher-variants", "exact").value
    99.12
    >>> published("fisher-variants", "sketch") is None
    True
    """
    found = (p for p in PUBLISHED if (p.experiment, p.row) == (experiment, row))
    return next(found, None)
