"""The book on paper: what LaTeX needs beyond what Sphinx and Jupyter Book set.

Jupyter Book's own document class loads fonts and macros that collide with ours, so the class is
Sphinx's manual, with the two environments of code cells that the other one would define.
"""

from sphinx.application import Sphinx
from sphinx.config import Config
from translation import LANGUAGE

# Inputs of cells have a grey frame, outputs none. Docstrings, which know no macros, say \top for
# the transpose.
_PREAMBLE = r"""
\usepackage{changepage}
\newenvironment{sphinxVerbatimInput}{}{}
\newenvironment{sphinxVerbatimOutput}
  {\sphinxsetup{VerbatimBorderColor={RGB}{255,255,255}}\begin{adjustwidth}{1em}{}}
  {\end{adjustwidth}}
\renewcommand{\top}{\mathsf{T}}
"""

# The glossary has Chinese terms.
_SOME_CHINESE = r"""
\newfontfamily\chinese{WenQuanYi Micro Hei}
\setTransitionsForCJK{\chinese}{\rmfamily}
"""

# In the Chinese edition xeCJK, which Sphinx loads, changes the fonts instead.
_ALL_CHINESE = r"""
\setCJKmainfont{WenQuanYi Micro Hei}
\setCJKsansfont{WenQuanYi Micro Hei}
\setCJKmonofont{WenQuanYi Micro Hei Mono}
"""
_SCRIPTS = r"\usepackage[Latin,Greek]{ucharclasses}"


def _set_paper(app: Sphinx, config: Config) -> None:
    config.latex_theme = "manual"
    config.latex_elements["papersize"] = "a4paper"
    is_chinese = config.language == LANGUAGE
    scripts = "" if is_chinese else _SCRIPTS.replace("Greek]", "Greek,CJK]")
    preamble = config.latex_elements["preamble"].replace(_SCRIPTS, scripts)
    fonts = _ALL_CHINESE if is_chinese else _SOME_CHINESE
    config.latex_elements["preamble"] = preamble + _PREAMBLE + fonts


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("config-inited", _set_paper, priority=900)  # after Jupyter Book's own settings
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
