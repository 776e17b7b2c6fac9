"""Fewer searches for garbage.

A build makes millions of nodes, most of which stay until its end. To search all of them for garbage
again and again, as Python does by itself, took about half of the time.
"""

import gc

from sphinx.application import Sphinx

NEW_OBJECTS = 500_000
"""How many objects come before the next search; a build grows by about a gigabyte for it."""


def setup(app: Sphinx) -> dict[str, object]:
    gc.set_threshold(NEW_OBJECTS, 50, 100)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
