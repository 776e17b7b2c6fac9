"""Tasks made from one data set."""

from __future__ import annotations

import torch

from ewc_lib.data import Images

__all__ = ["permute_pixels"]


def permute_pixels(images: Images, seed: int) -> Images:
    """Shuffle the pixels of all images by one fixed random permutation: a new task.

    The new task is exactly as hard as the old one for a network without convolutions, and what
    one of them taught about pixels is useless for the other (Goodfellow et al. 2014).

    Parameters
    ----------
    images
        The original task.
    seed
        Which permutation.

    Returns
    -------
    Images
        The same labels and images, with their pixels in another order.

    Examples
    --------
    >>> from ewc_lib import data
    >>> a = data.digits()
    >>> b = permute_pixels(a, seed=1)
    >>> bool((a.x_train.sum(1) - b.x_train.sum(1)).abs().max() < 1e-4)  # pixels only moved
    True
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(images.n_features, generator=generator)
    return images._replace(
        name=f"{images.name}, permuted by {seed}",
        x_train=images.x_train[:, order],
        x_test=images.x_test[:, order],
    )
