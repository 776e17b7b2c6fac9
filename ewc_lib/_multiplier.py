r"""The smallest strength at which a proximal step keeps a quadratic below a limit.

With rates :math:`D` and :math:`u = D^{-1/2} (z - m)`, the step goes to
:math:`x(\lambda) = (I + \lambda D A)^{-1} (z - m)` from the anchor, and

.. math:: q(\lambda) = x^\top A x = \sum_i \frac{\kappa_i\, \bar u_i^2}{(1 + \lambda \kappa_i)^2}

with the eigenvalues :math:`\kappa_i` of :math:`D^{1/2} A D^{1/2}`. It falls, and
:math:`1 / \sqrt{q}` is a concave function that rises: Newton's method for it never goes beyond the
solution, and is there in a few steps (Moré and Sorensen 1983, for trust regions).
"""

from __future__ import annotations

import math
from collections.abc import Callable

SLACK = 1e-3
"""How far below the limit the solution is sought, as a share of it, so that rounding does not
cross it."""

MOST = 1e30
"""What stands for infinity; times a precision of zero it is still zero."""

STEPS = 100
"""Newton's steps at most; four or so are taken."""


def multiplier(at: Callable[[float], tuple[float, float]], limit: float, start: float) -> float:
    r"""Return the smallest :math:`\lambda \ge 0` with :math:`q(\lambda)` at most a limit.

    Parameters
    ----------
    at
        Returns :math:`q(\lambda)` and its derivative.
    limit
        More than 0; or 0 or less, which :data:`MOST` comes nearest to.
    start
        A guess, as the one of the step before; it changes the time, not the result.
    """
    if at(0.0)[0] <= limit:
        return 0.0
    if not limit > 0:
        return MOST
    found, aim = start, (1 - SLACK) * limit
    for _ in range(STEPS):
        q, slope = at(found)
        if not q > 0:  # the guess was far too large
            found = 0.0
            continue
        if (1 - 4 * SLACK) * limit <= q <= (1 - SLACK / 2) * limit:
            return found
        found = max(0.0, found + 2 * q / slope * (1 - math.sqrt(q / aim)))
    return found
