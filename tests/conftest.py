"""Settings for all tests."""

import gc


def pytest_collection_finish():
    """Keep what was imported and collected, a million objects, out of each garbage collection."""
    gc.freeze()
