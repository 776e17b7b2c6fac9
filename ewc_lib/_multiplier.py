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
        A guess, as the one of the step before; it changes the time, not the result. Rounding
        may hide the slope, or that anything is left: then the solution is halved in.
    """
    q, slope = at(0.0)
    if q <= limit:
        return 0.0
    if not limit > 0:
        return MOST
    aim, enough, too_far = (1 - SLACK) * limit, (1 - SLACK / 2) * limit, (1 - 4 * SLACK) * limit
    low, high, after_low = 0.0, MOST, _newton(0.0, q, slope, aim)
    found = start if 0 < start < MOST else after_low
    for _ in range(STEPS):
        q, slope = at(found)
        after = _newton(found, q, slope, aim)
        if q > enough:
            low, after_low = found, after
        elif q >= too_far:
            return found
        else:
            high = found
        found = next(x for x in (after, after_low, _between(low, high)) if low < x < high)
        if high - low <= SLACK**2 * high:
            break
    return high


def _newton(at: float, q: float, slope: float, aim: float) -> float:
    """Return where the tangent of the inverse root is at the aim; where there is none, infinity."""
    return at + 2 * q / slope * (1 - math.sqrt(q / aim)) if q > 0 > slope else math.inf


def _between(low: float, high: float) -> float:
    """Return a number in the middle of two, by their sizes where these differ much."""
    return math.sqrt(low * high) if low > 0 else high / 1024
