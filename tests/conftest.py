"""Settings for all tests."""

import gc

collect_ignore = ["zoo"]
"""Models, and no tests: collected under another name, each would be registered twice."""


def pytest_collection_finish():
    """Keep what was imported and collected, a million objects, out of each garbage collection."""
    gc.freeze()
