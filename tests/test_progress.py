"""The progress bar: silent unless someone is there to see it, and only where it takes long."""

import io
import sys
from types import SimpleNamespace

import pytest

from ewc_lib import _progress
from ewc_lib._progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_in_terminal(monkeypatch, **options):
    """Return what appears in a terminal."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal())
        list(progress(range(3), "Fisher", **options))
        return sys.stderr.getvalue()


@pytest.fixture
def no_delay(monkeypatch):
    monkeypatch.setattr(_progress, "DELAY", 0.0)


@pytest.fixture
def in_notebook(monkeypatch):
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


@pytest.mark.parametrize("show", [None, True, False])
def test_the_items_pass_through_unchanged(show):
    assert list(progress(iter(range(5)), "text", show)) == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("no_delay")
def test_silent_where_stderr_is_no_terminal(capsys):
    list(progress(range(3), "text"))
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("no_delay")
def test_shown_on_stderr_in_a_terminal(monkeypatch, capsys):
    shown = run_in_terminal(monkeypatch)
    assert "Fisher" in shown
    assert "/3" in shown
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("no_delay", "in_notebook")
def test_shown_in_a_notebook(capsys):
    list(progress(range(3), "Fisher"))
    assert "Fisher" in capsys.readouterr().err


@pytest.mark.usefixtures("no_delay")
@pytest.mark.parametrize("shell", [None, SimpleNamespace()])
def test_silent_in_a_shell_without_a_kernel(monkeypatch, capsys, shell):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    list(progress(range(3), "Fisher"))
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("no_delay")
def test_shown_without_a_terminal_when_forced(capsys):
    list(progress(range(3), "Fisher", show=True))
    assert "Fisher" in capsys.readouterr().err


@pytest.mark.usefixtures("no_delay")
def test_silent_in_a_terminal_when_switched_off(monkeypatch):
    assert run_in_terminal(monkeypatch, show=False) == ""


@pytest.mark.parametrize(("delay", "shown"), [(0.0, True), (3600.0, False)])
def test_shown_only_after_the_delay(monkeypatch, delay, shown):
    monkeypatch.setattr(_progress, "DELAY", delay)
    assert bool(run_in_terminal(monkeypatch)) == shown


def test_the_delay_is_two_seconds():
    assert _progress.DELAY == 2.0


@pytest.mark.usefixtures("no_delay")
def test_the_bar_is_wiped_off_at_the_end(monkeypatch):
    *_, last, cursor = run_in_terminal(monkeypatch).split("\r")
    assert (last.strip(), cursor) == ("", "")
