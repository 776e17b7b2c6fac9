"""A matplotlib figure as a small piece of SVG that can stand in a page beside others."""

from __future__ import annotations

import io
import re
from xml.etree.ElementTree import Element, fromstring, tostring

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ewc_lib.figures.style import GREY

__all__ = ["inline"]

DECIMALS = {"d": 2, "transform": 2, "x": 1, "y": 1}
"""How finely the attributes with coordinates are written, in units of 1/72 inch."""

USED = re.compile(r"(?<=url\(#)[^)]+|(?<=^#).+")
"""An identity that an attribute refers to; a colour stands elsewhere."""


def inline(figure: Figure, prefix: str) -> str:
    """Draw a figure as SVG for a page that holds other drawings, too.

    What matplotlib writes is meant for a file of its own. Here all identities start with
    ``prefix``, no style reaches beyond the drawing, grey becomes the text colour of the page, the
    fonts are those of the page, and the width is that of what the drawing stands in.
    """
    drawn = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "ewc", "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    root = fromstring(drawn.getvalue())
    _drop(root, "metadata", "style")
    _rename(root, prefix)
    for element in root.iter():
        _shorten(element)
    for element in root.iter():
        _share_style(element)
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": root.attrib["viewBox"],
        "aria-hidden": "true",
        "style": "display:block;width:100%;height:auto;stroke-linejoin:round",
    }
    return tostring(root, encoding="unicode")


def _drop(root: Element, *tags: str) -> None:
    """Remove elements with these tags, and the namespace of all others."""
    for parent in root.iter():
        parent.tag = parent.tag.split("}")[-1]
        parent.attrib = {name.split("}")[-1]: text for name, text in parent.attrib.items()}
        for child in [child for child in parent if child.tag.split("}")[-1] in tags]:
            parent.remove(child)


def _rename(root: Element, prefix: str) -> None:
    """Number the identities that something refers to, and drop all others."""
    found = [name for e in root.iter() for text in e.attrib.values() for name in USED.findall(text)]
    names = {old: f"{prefix}{k}" for k, old in enumerate(dict.fromkeys(found))}
    for element in root.iter():
        old = element.attrib.pop("id", "")
        for key, text in element.attrib.items():
            element.set(key, USED.sub(lambda match: names[match[0]], text))
        if old in names:
            element.set("id", names[old])


def _shorten(element: Element) -> None:
    """Round coordinates, and drop what only helps who reads the file."""
    for key, text in element.attrib.items():
        if key in DECIMALS:
            element.set(key, _round(text, DECIMALS[key]))
    if "d" in element.attrib:
        element.set("d", re.sub(r"\s*([A-Za-z])\s*", r"\1", element.attrib["d"]))
    if "style" in element.attrib:
        style = element.attrib["style"].replace(GREY, "currentColor").replace(": ", ":")
        element.set("style", re.sub(r"font-family:[^;]*", "font-family:inherit", style))
    element.text, element.tail = (
        None if text and "\n" in text and not text.strip() else text
        for text in (element.text, element.tail)
    )


def _round(text: str, decimals: int) -> str:
    def brief(number: re.Match[str]) -> str:
        return f"{float(number[0]):.{decimals}f}".rstrip("0").rstrip(".")

    return re.sub(r"-?\d+\.\d+", brief, text)


def _share_style(group: Element) -> None:
    """Move a style that all markers of a group have to the group."""
    styles = {child.get("style") for child in group}
    if len(group) and {child.tag for child in group} == {"use"} and len(styles) == 1:
        group.set("style", str(styles.pop()))
        for child in group:
            child.attrib.pop("style", None)
