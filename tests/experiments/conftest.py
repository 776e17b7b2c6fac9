import pytest


@pytest.fixture(autouse=True)
def no_mnist(monkeypatch):
    """Small images, also where there is a copy of MNIST."""
    monkeypatch.delenv("EWC_DATA", raising=False)
