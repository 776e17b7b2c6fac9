"""What a page offers its reader: the executed notebook, and the way to the repository if known.

The address of the repository is taken from the environment of a GitHub workflow. Elsewhere it is
not known, and the pages show no button that leads nowhere.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config


def _add_address(app: Sphinx, config: Config) -> None:
    repository = os.environ.get("GITHUB_REPOSITORY")
    if not repository:
        return
    owner, name = repository.split("/")
    config.ogp_site_url = f"https://{owner}.github.io/{name}/"
    config.html_theme_options |= {
        "repository_url": f"https://github.com/{repository}",
        "repository_branch": os.environ.get("GITHUB_REF_NAME", "main"),
        "use_repository_button": True,
        "use_issues_button": True,
    }


def _offer_notebook(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Put the executed notebook of a chapter beside its source, for the download button."""
    executed = Path(app.outdir).parent / "jupyter_execute" / f"{page}.ipynb"
    if doctree is None or not executed.exists():
        return
    offered = Path(app.outdir) / "_sources" / f"{page}.ipynb"
    offered.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(executed, offered)
    context["ipynb_source"] = f"{page}.ipynb"


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("config-inited", _add_address)
    app.connect("html-page-context", _offer_notebook)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
