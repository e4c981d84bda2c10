"""An SVG picture out of boxes and lines of text, with two shades of a color for each module."""

from collections.abc import Iterable
from itertools import cycle
from xml.etree import ElementTree as Xml

from megatron_mimo_coord.layout import LANGUAGE

COLORS = (
    ("#b7c6ee", "#4269d0"),
    ("#b1ddb9", "#3ca951"),
    ("#ffc6bd", "#ff725c"),
    ("#dac1fb", "#a463f2"),
    ("#c1e7df", "#6cc5b0"),
)
INK = "#333"


def module_colors(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The light and the dark color of each module, the same in all pictures.

    Example:
        >>> module_colors(["vision", "language"])
        {'vision': ('#b1ddb9', '#3ca951'), 'language': ('#b7c6ee', '#4269d0')}
    """
    encoders = cycle(COLORS[1:])
    return {
        name: COLORS[0] if name == LANGUAGE else next(encoders) for name in dict.fromkeys(names)
    }


class Picture:
    """A document that is drawn bit by bit; lengths are in pixels."""

    def __init__(self, title: str, left: float, width: float, height: float) -> None:
        self._svg = Xml.Element("svg", xmlns="http://www.w3.org/2000/svg")
        self._add("title", title)
        for name, value in (
            ("viewBox", f"{left:g} 0 {width:g} {height:g}"),
            ("font-family", "sans-serif"),
            ("font-size", "13"),
        ):
            self._svg.set(name, value)

    def boxes(
        self, places: Iterable[tuple[float, float]], top: float, height: float, fill: str
    ) -> None:
        """Boxes (left, width) in a row, as one path: a long step has ten thousands of them."""
        path = "".join(f"M{x:.2f} {top:g}h{w:.2f}v{height:g}h{-w:.2f}z" for x, w in places)
        self._add("path", d=path, fill=fill, stroke="#fff", stroke_width="0.5")

    def text(self, text: str, x: float, y: float, anchor: str = "middle", fill: str = INK) -> None:
        """A line of text, centered vertically."""
        look = {"text_anchor": anchor, "dominant_baseline": "central", "fill": fill}
        self._add("text", text, x=f"{x:g}", y=f"{y:g}", **look)

    def _add(self, tag: str, text: str = "", **attributes: str) -> None:
        names = {name.replace("_", "-"): value for name, value in attributes.items()}
        Xml.SubElement(self._svg, tag, names).text = text or None

    def __str__(self) -> str:
        Xml.indent(self._svg)
        return Xml.tostring(self._svg, encoding="unicode") + "\n"
