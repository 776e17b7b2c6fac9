"""What a page offers its reader: the executed notebook, and the way to the repository if known.

The address of the repository is taken from the environment of a GitHub workflow, or from the place
that git cloned from. Elsewhere it is not known, and the pages show no button that leads nowhere.
"""

import json
import os
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from notebook_pairs import say_plainly
from sphinx.application import Sphinx
from sphinx.config import Config
from translation import LANGUAGE


def _add_address(app: Sphinx, config: Config) -> None:
    repository = os.environ.get("GITHUB_REPOSITORY") or _remote(Path(app.srcdir))
    if not repository:
        return
    owner, name = repository.split("/")
    edition = "zh/" if config.language == LANGUAGE else ""
    config.ogp_site_url = f"https://{owner}.github.io/{name}/{edition}"
    config.ogp_social_cards = {**config.ogp_social_cards, "enable": True}
    config.html_theme_options |= {
        "repository_url": f"https://github.com/{repository}",
        "repository_branch": os.environ.get("GITHUB_REF_NAME", "main"),
        "use_repository_button": True,
        "use_issues_button": True,
        "launch_buttons": {
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
        },
    }


def _remote(folder: Path) -> str | None:
    """Return the owner and name of the repository on GitHub that a folder was cloned from."""
    command = ["git", "-C", str(folder), "remote", "get-url", "origin"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?$", found)
    return match[1] if match else None


def _offer_notebook(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Give the page of a chapter a button that downloads its notebook."""
    if doctree is not None and (_executed(app) / f"{page}.ipynb").exists():
        context["ipynb_source"] = f"{page}.ipynb"


def _offer_paper(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Link the book on paper from the first page, if `make pdf` has made it."""
    if page == app.config.root_doc and _paper(app).exists():
        text = "本书的 PDF" if app.config.language == LANGUAGE else "The book as a PDF"
        context["body"] += f'<p><a href="../{_paper(app).name}">{text}</a></p>'


def _paper(app: Sphinx) -> Path:
    return Path(app.outdir).parent / "latex" / "ewc_lib.pdf"


def _copy_paper(app: Sphinx, error: Exception | None) -> None:
    if not error and app.builder.format == "html" and _paper(app).exists():
        shutil.copy2(_paper(app), Path(app.outdir))


def _executed(app: Sphinx) -> Path:
    return Path(app.outdir).parent / "jupyter_execute"


def _write_notebooks(app: Sphinx, error: Exception | None) -> None:
    """Write the notebooks to download: executed, and in plain Markdown."""
    if error or app.builder.format != "html":
        return
    for executed in _executed(app).rglob("*.ipynb"):
        notebook = nbformat.read(executed, as_version=4)
        say_plainly(notebook, _computed(executed))
        offered = Path(app.outdir) / "_sources" / executed.relative_to(_executed(app))
        offered.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, offered)


def _computed(notebook: Path) -> dict[str, float]:
    """Return the numbers that the cells of an executed notebook have computed for its text."""
    path = notebook.with_suffix(".glue.json")
    glued = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    values = {}
    for name, output in glued.items():
        with suppress(ValueError):
            values[name] = float(output["data"].get("text/plain", ""))
    return values


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("config-inited", _add_address)
    app.connect("html-page-context", _offer_notebook)
    app.connect("html-page-context", _offer_paper)
    app.connect("build-finished", _write_notebooks)
    app.connect("build-finished", _copy_paper)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
