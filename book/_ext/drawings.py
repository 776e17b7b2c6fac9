"""Alternative texts of figures that a page holds as SVG.

A notebook offers a figure as a picture, to which MyST-NB gives the alternative text, and as a part
of a page, to which this module hands it on. A page that runs no code shows a picture; where a
drawing lies beside the file, as :func:`ewc_lib.figures.save` writes it, HTML has that one.
"""

from html import escape
from pathlib import Path

from docutils import nodes
from myst_nb.sphinx_ import SelectMimeType
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from translation import translated_part, translator

COVER = "book/foundations/ewc"  # whose cells draw what other pages show
UNNAMED = 'class="ewc-figure" role="img" aria-label="Figure"'

_LOGGER = logging.getLogger(__name__)


class NameDrawings(SphinxPostTransform):
    """Give each drawing the alternative text of the picture beside it."""

    default_priority = SelectMimeType.default_priority - 1

    def run(self, **kwargs: object) -> None:
        for drawing in self.document.findall(nodes.raw):
            if UNNAMED in drawing.astext():
                (picture,) = drawing.parent.parent.findall(nodes.image)
                if not picture.get("alt"):
                    _LOGGER.warning("a figure has no alternative text", location=drawing)
                text = _name(drawing.astext(), picture)
                drawing.replace_self(nodes.raw("", text, format="html", classes=drawing["classes"]))


class ShowDrawings(SphinxPostTransform):
    """Show a drawing in place of the picture beside it."""

    default_priority = SelectMimeType.default_priority
    formats = ("html",)

    def run(self, **kwargs: object) -> None:
        for picture in list(self.document.findall(nodes.image)):
            path = Path(self.env.srcdir, picture["uri"]).with_suffix(".html")
            if path.is_file():
                translate = translator(self.env, COVER)
                text = _name(translated_part(path.read_text("utf-8"), translate), picture)
                picture.replace_self(nodes.raw("", text, format="html"))


def _name(html: str, picture: nodes.image) -> str:
    """Give a drawing the alternative text of a picture."""
    named = UNNAMED.replace("Figure", escape(picture.get("alt", "Figure")))
    return html.replace(UNNAMED, named, 1)


def setup(app: Sphinx) -> dict[str, object]:
    app.add_post_transform(NameDrawings)
    app.add_post_transform(ShowDrawings)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
