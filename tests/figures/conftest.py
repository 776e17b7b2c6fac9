from collections.abc import Iterator

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from ewc_lib.figures import use_style


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    """Draw as the book does, and leave no figure open."""
    mpl.use("agg")
    with mpl.rc_context():
        use_style()
        yield
    plt.close("all")
