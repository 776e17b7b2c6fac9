"""A matplotlib figure as a small piece of SVG that can stand in a page beside others."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from itertools import groupby
from unicodedata import category
from xml.etree.ElementTree import Element, fromstring, tostring

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ewc_lib.figures._colors import on_page
from ewc_lib.figures._panels import Window

__all__ = ["ID", "ROW", "identify", "inline"]

ID = "FIGUREID"
"""Stands for the identity of a part of a page until :func:`identify` gives it one."""

ROW = "display:flex;flex-wrap:wrap;align-items:flex-start;justify-content:center"
"""Style of what holds the windows of a drawing."""

LARGEST = 1.4
"""How many pixels of the page 1/72 inch of a figure takes at most; the least in a row is one."""

DECIMALS = {"d": 2, "transform": 2, "x": 1, "y": 1}
"""How finely the attributes with coordinates are written, in units of 1/72 inch."""

USED = re.compile(r"(?<=url\(#)[^)]+|(?<=^#).+")
"""An identity that an attribute refers to; a colour stands elsewhere."""


def inline(figure: Figure, prefix: str, windows: Sequence[Window]) -> str:
    """Draw a figure as SVG for a page that holds other drawings, too.

    What matplotlib writes is meant for a file of its own. Here all identities start with
    ``prefix``; what has one with ``prefix-`` keeps it. No style reaches beyond the drawing, a page
    chooses the colours, and the fonts are those of the page. Each window is an element of its own
    onto the same drawing. Side by side in a :data:`ROW` they show the whole, and they stand below
    each other where the row would shrink a text of 11 points to less than 11 pixels.
    """
    drawn = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "ewc", "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    root = fromstring(drawn.getvalue())
    height = root.attrib["viewBox"].split()[-1]
    _drop(root, "metadata", "style")
    _rename(root, prefix)
    for element in root.iter():
        _shorten(element)
    for element in root.iter():
        _share_style(element)
    drawing = Element("g", id=f"{prefix}-all")
    drawing.extend(root)
    parts = [drawing, *(Element("use", href=f"#{prefix}-all") for _ in windows[1:])]
    pairs = zip(windows, parts, strict=True)
    return "".join(_show(part, window, height) for window, part in pairs)


def identify(html: str) -> str:
    """Name a part of a page by a hash of all that it holds."""
    return html.replace(ID, "f" + hashlib.sha256(html.encode()).hexdigest()[:8])


def _show(part: Element, window: Window, height: str) -> str:
    left, width = window
    size = f"flex:{width:g} 1 {width:g}px;min-width:0;max-width:{LARGEST * width:.0f}px"
    svg = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"{left:g} 0 {width:g} {height}",
            "aria-hidden": "true",
            "style": f"{size};height:auto;fill:currentColor;stroke-linejoin:round",
        },
    )
    svg.append(part)
    return tostring(svg, encoding="unicode")


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
        if old in names or old.startswith(f"{prefix}-"):
            element.set("id", names.get(old, old))


def _shorten(element: Element) -> None:
    """Round coordinates, and drop what only helps who reads the file."""
    for key, text in element.attrib.items():
        if key in DECIMALS:
            element.set(key, _round(text, DECIMALS[key]))
    if "d" in element.attrib:
        element.set("d", re.sub(r"\s*([A-Za-z])\s*", r"\1", element.attrib["d"]))
    if "style" in element.attrib:
        style = on_page(element.attrib["style"], is_text=element.tag in ("text", "tspan"))
        style = re.sub(r"([:;]) ", r"\1", style)
        element.set("style", re.sub(r"font-family:[^;]*", "font-family:inherit", style))
    if element.tag == "image":
        element.set("style", "image-rendering:pixelated")
    if element.tag == "text":
        _join_letters(element)
    element.text, element.tail = (
        None if text and "\n" in text and not text.strip() else text
        for text in (element.text, element.tail)
    )


def _join_letters(text: Element) -> None:
    """Write formulas, of which matplotlib places each letter, as words in the font of the page."""

    def kind(letter: Element) -> tuple[object, ...]:  # there is space, but no letter, around a "="
        return letter.get("style"), letter.get("y"), category((letter.text or " ")[0]) == "Sm"

    for _, run in groupby(sorted(text, key=lambda letter: float(letter.get("x", 0))), key=kind):
        first, *others = run
        first.text = "".join(letter.text or "" for letter in (first, *others))
        for letter in others:
            text.remove(letter)


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
