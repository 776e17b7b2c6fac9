"""Errors that a program may want to tell from others."""

__all__ = ["EmptyData"]


class EmptyData(ValueError):  # noqa: N818
    """There is no observation to compute anything from.

    A process whose share of the data is empty may go on where a mistake in the data may not.

    Examples
    --------
    >>> from ewc_lib import fisher_information
    >>> import torch
    >>> try:
    ...     fisher_information(torch.nn.Linear(3, 2), [])
    ... except EmptyData as error:
    ...     print(error)
    data is empty: it yielded no observation (was an iterator used up?)
    """
