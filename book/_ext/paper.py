"""The book on paper: what LaTeX needs beyond what Sphinx and Jupyter Book set.

Jupyter Book's own document class loads fonts and macros that collide with ours, so the class is
Sphinx's manual, with the two environments of code cells that the other one would define.
"""

from sphinx.application import Sphinx
from sphinx.config import Config

# Inputs of cells have a grey frame, outputs none. The glossary has Chinese terms. Docstrings, which
# know no macros, say \top for the transpose.
_PREAMBLE = r"""
\usepackage{changepage}
\newenvironment{sphinxVerbatimInput}{}{}
\newenvironment{sphinxVerbatimOutput}
  {\sphinxsetup{VerbatimBorderColor={RGB}{255,255,255}}\begin{adjustwidth}{1em}{}}
  {\end{adjustwidth}}
\newfontfamily\chinese{WenQuanYi Micro Hei}
\setTransitionsForCJK{\chinese}{\rmfamily}
\renewcommand{\top}{\mathsf{T}}
"""


def _set_paper(app: Sphinx, config: Config) -> None:
    config.latex_theme = "manual"
    config.latex_elements["papersize"] = "a4paper"
    preamble = config.latex_elements["preamble"]
    scripts = preamble.replace("[Latin,Greek]{ucharclasses}", "[Latin,Greek,CJK]{ucharclasses}")
    config.latex_elements["preamble"] = scripts + _PREAMBLE


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("config-inited", _set_paper, priority=900)  # after Jupyter Book's own settings
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
