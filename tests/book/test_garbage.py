"""Searches for garbage: seldom enough that they do not take half of a build."""

import gc

from garbage import NEW_OBJECTS, setup
from sphinx.application import Sphinx


def test_a_build_searches_for_garbage_seldom_but_does_search() -> None:
    before = gc.get_threshold()
    try:
        setup(Sphinx.__new__(Sphinx))
        assert gc.isenabled()
        assert gc.get_threshold()[0] == NEW_OBJECTS >= 500 * before[0]
    finally:
        gc.set_threshold(*before)
