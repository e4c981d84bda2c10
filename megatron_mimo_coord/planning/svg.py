"""SVG pictures out of boxes and lines of text, with two shades of a color for each module."""

from collections.abc import Iterable
from itertools import cycle
from xml.sax.saxutils import escape

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


def picture(title: str, left: float, width: float, height: float, parts: Iterable[str]) -> str:
    """A document of :func:`boxes` and :func:`text`; lengths are in pixels."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:g} 0 {width:g} {height:g}" '
        f'font-family="sans-serif" font-size="13">'
    )
    return "\n  ".join([head, f"<title>{escape(title)}</title>", *parts]) + "\n</svg>\n"


def boxes(places: Iterable[tuple[float, float]], top: float, height: float, fill: str) -> str:
    """Boxes (left, width) in a row, as one path: a long step has ten thousands of them."""
    path = "".join(f"M{x:.2f} {top:g}h{w:.2f}v{height:g}h{-w:.2f}z" for x, w in places)
    return f'<path d="{path}" fill="{fill}" stroke="#fff" stroke-width="0.5" />'


def text(said: str, x: float, y: float, anchor: str = "middle", fill: str = INK) -> str:
    """A line of text, centered vertically."""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" dominant-baseline="central" '
        f'fill="{fill}">{escape(said)}</text>'
    )
