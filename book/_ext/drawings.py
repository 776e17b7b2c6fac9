"""Alternative texts of figures that a page holds as SVG.

A notebook offers a figure as a picture, to which MyST-NB gives the alternative text, and as a part
of a page, to which this module hands it on.
"""

from html import escape

from docutils import nodes
from myst_nb.sphinx_ import SelectMimeType
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging

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
                name = escape(picture.get("alt", "Figure"))
                named = UNNAMED.replace('"Figure"', f'"{name}"')
                text = drawing.astext().replace(UNNAMED, named, 1)
                drawing.replace_self(nodes.raw("", text, format="html", classes=drawing["classes"]))


def setup(app: Sphinx) -> dict[str, object]:
    app.add_post_transform(NameDrawings)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
