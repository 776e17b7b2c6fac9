"""Where a measured number comes from: enough to judge it, and to measure it again."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["differences", "provenance"]

PACKAGE = Path(__file__).parents[2]

VARYING = ("command", "date", "wall_seconds")
"""What may differ between two parts of one result."""


def provenance(
    *, seeds: Iterable[int], wall_seconds: float, packages: Iterable[str] = ()
) -> dict[str, Any]:
    """Describe the code, the machine and the call behind a result.

    Parameters
    ----------
    seeds
        All seeds that were used.
    wall_seconds
        How long it took, in seconds.
    packages
        Names on PyPI of further packages whose versions matter.

    Returns
    -------
    dict
        Plain values, ready for JSON: ``commit`` (None outside a git repository), ``dirty``
        (whether the package differs from that commit), ``source`` (a hash of the package's
        code), ``versions`` (None for what is not installed), ``seeds``, ``hardware``,
        ``threads``, ``command``, ``date`` (UTC) and ``wall_seconds``.

    Examples
    --------
    >>> record = provenance(seeds=[0], wall_seconds=1.5)
    >>> record["seeds"], record["wall_seconds"], record["versions"]["torch"] == torch.__version__
    ([0], 1.5, True)
    """
    commit = _git("rev-parse", "HEAD")
    return {
        "commit": commit,
        "dirty": bool(_git("status", "--porcelain", "--", str(PACKAGE))) if commit else None,
        "source": _source_hash(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("ewc_lib", "numpy", *packages)},
            "torch": torch.__version__,  # with its build, which the package's metadata may omit
        },
        "seeds": list(seeds),
        "hardware": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(_memory() / 2**30, 1),
            "system": f"{platform.system()} {platform.machine()}",
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "threads": {
            "torch": torch.get_num_threads(),
            **{name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")},
        },
        "command": _command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": round(wall_seconds, 3),
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Say what differs between two records, and so forbids to mix their results.

    Examples
    --------
    >>> before = {"commit": "a", "versions": {"torch": "2.6", "numpy": "2"}, "date": "1 May"}
    >>> now = {"commit": "a", "versions": {"torch": "2.7", "numpy": "2"}, "date": "2 May"}
    >>> differences(before, now)
    ["versions.torch was '2.6' and is '2.7'"]
    """
    one, other = _flat(before), _flat(now)
    return [
        f"{name} was {one.get(name)!r} and is {other.get(name)!r}"
        for name in {**one, **other}
        if name not in VARYING and one.get(name) != other.get(name)
    ]


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(PACKAGE), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _source_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _command() -> str:
    """Return the command as someone else would type it, without the folders of this machine."""
    program, *arguments = sys.argv
    if Path(program).name == "__main__.py":
        program = f"python -m {PACKAGE.name}.{Path(program).parent.name}"
        return shlex.join([*program.split(), *arguments])
    return shlex.join([Path(program).name, *arguments])
