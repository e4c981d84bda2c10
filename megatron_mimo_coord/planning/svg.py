"""What all SVG pictures of this package share: the document, text, and a color for each module."""

from collections.abc import Iterable
from itertools import cycle
from xml.etree import ElementTree as Xml

from megatron_mimo_coord.layout import LANGUAGE

COLORS = ("#4269d0", "#3ca951", "#ff725c", "#a463f2", "#6cc5b0", "#efb118")


def new_svg(title: str) -> Xml.Element:
    """An empty document; its ``viewBox`` is still to be set."""
    svg = Xml.Element("svg", xmlns="http://www.w3.org/2000/svg")
    svg.set("font-family", "sans-serif")
    svg.set("font-size", "13")
    add(svg, "title").text = title
    return svg


def svg_text(svg: Xml.Element) -> str:
    """The document as text."""
    Xml.indent(svg)
    return Xml.tostring(svg, encoding="unicode") + "\n"


def module_colors(names: Iterable[str]) -> dict[str, str]:
    """The color of each module, the same in all pictures.

    Example:
        >>> module_colors(["vision", "language"])
        {'vision': '#3ca951', 'language': '#4269d0'}
    """
    encoders = cycle(COLORS[1:])
    return {name: COLORS[0] if name == LANGUAGE else next(encoders) for name in names}


def add(parent: Xml.Element, tag: str, **attributes: str | float) -> Xml.Element:
    """A new element below another."""
    return Xml.SubElement(parent, tag, {name: str(value) for name, value in attributes.items()})


def write(
    svg: Xml.Element,
    text: str,
    x: float,
    y: float,
    anchor: str = "middle",
    color: str = "#333",
) -> None:
    """A line of text, centered vertically."""
    look = {"text-anchor": anchor, "dominant-baseline": "central", "fill": color}
    add(svg, "text", x=x, y=y, **look).text = text
