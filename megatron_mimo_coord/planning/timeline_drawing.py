"""A picture of a step: a row for each stage, with what it computes, what it waits for and gaps."""

from collections.abc import Iterable, Mapping
from xml.etree import ElementTree as Xml

from megatron_mimo_coord.planning.svg import add, module_colors, new_svg, svg_text, write
from megatron_mimo_coord.planning.timeline import BACKWARD, COMPUTING, FORWARD, Span, Timeline

WIDTH, RIGHT, LETTER = 900, 80, 8  # pixels: the step, what part of it is busy, a letter of a name
ROW, BAR, MARGIN = 30, 22, 12
NUMBERED = 16  # pixels: a span as wide has the number of its microbatch written into it
TICKS = 10
OPACITY = {FORWARD: "0.45", BACKWARD: "0.85"}
REST, WAITING, IDLE = "#efb118", "url(#waiting)", "#f3f3f3"


def timeline_svg(timeline: Timeline) -> str:
    """A step as an SVG document; where a row is blank, the stage idles.

    Example:
        >>> from megatron_mimo_coord.planning.timeline import StageShares
        >>> spans = [Span("forward", "language", stage=0, start=0.0, end=1.0, microbatch=0)]
        >>> shares = {("language", 0): StageShares(busy=0.5, waiting=0.0, idle=0.5)}
        >>> picture = timeline_svg(Timeline(2.0, shares, lambda: spans))
        >>> "language 0" in picture, "50 % busy" in picture
        (True, True)
    """
    svg = new_svg(f"A step of {timeline.seconds:.4g} s")
    _define_hatching(svg)
    bottom = MARGIN + ROW * len(timeline.stages)
    height = bottom + 2 * ROW + MARGIN
    names = {place: f"{place[0]} {place[1]}" for place in timeline.stages}
    left = MARGIN + LETTER * max(map(len, names.values()))  # of the step, which begins at 0
    svg.set("viewBox", f"{-left} 0 {left + WIDTH + RIGHT} {height}")
    colors = module_colors(dict.fromkeys(module for module, _ in timeline.stages))
    scale = WIDTH / timeline.seconds if timeline.seconds else 0.0
    spans: dict[tuple[str, int], list[Span]] = {place: [] for place in timeline.stages}
    for span in timeline.spans:
        if span.end > span.start:
            spans[span.module, span.stage].append(span)
    for row, (place, shares) in enumerate(timeline.stages.items()):
        top, color = MARGIN + ROW * row, colors[place[0]]
        write(svg, names[place], -LETTER, top + BAR / 2, "end", color)
        write(svg, f"{shares.busy * 100:.0f} % busy", WIDTH + 6, top + BAR / 2, "start")
        _draw_row(svg, spans[place], top, scale, color)
    _draw_axis(svg, timeline.seconds, scale, bottom)
    _draw_legend(svg, bottom + ROW, colors)
    return svg_text(svg)


def _draw_row(svg: Xml.Element, spans: list[Span], top: float, scale: float, color: str) -> None:
    _draw_bars(svg, [(0.0, WIDTH)], top, fill=IDLE)
    bars: dict[str, list[tuple[float, float]]] = {}
    for span in spans:
        look = span.kind if span.kind in COMPUTING else WAITING if span.bridge else ""
        bars.setdefault(look, []).append((span.start * scale, (span.end - span.start) * scale))
    for look, places in bars.items():
        if look == WAITING:
            _draw_bars(svg, places, top, fill=WAITING)
        elif look:
            fill = color if look in OPACITY else REST
            _draw_bars(svg, places, top, fill=fill, fill_opacity=OPACITY.get(look, "1"))
    for span in spans:
        width = (span.end - span.start) * scale
        if span.kind in OPACITY and width >= NUMBERED:
            ink = "#fff" if span.kind == BACKWARD else "#333"
            middle = round((span.start + span.end) / 2 * scale, 2)
            write(svg, str(span.microbatch), middle, top + BAR / 2, color=ink)


def _draw_bars(
    svg: Xml.Element, bars: Iterable[tuple[float, float]], top: float, **look: str
) -> None:
    """Bars (left, width) as one path: a long step has ten thousands of them."""
    path = "".join(f"M{left:.2f} {top:g}h{width:.2f}v{BAR}h{-width:.2f}z" for left, width in bars)
    attributes = {name.replace("_", "-"): value for name, value in look.items()}
    attributes |= {"stroke": "#fff", "stroke-width": "0.5"}
    add(svg, "path", d=path, **attributes)


def _draw_axis(svg: Xml.Element, seconds: float, scale: float, top: float) -> None:
    """Round numbers of seconds, at most ten."""
    if not seconds:
        return
    step = _round_up(seconds / TICKS)
    for index in range(int(seconds / step) + 1):
        x = round(index * step * scale, 2)
        add(svg, "path", d=f"M{x} {top - ROW + BAR}v6", stroke="#777")
        write(svg, f"{index * step:.4g} s", x, top + 6, color="#777")


def _round_up(seconds: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0
    while power > seconds:
        power /= 10
    while power * 10 <= seconds:
        power *= 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= seconds)


def _draw_legend(svg: Xml.Element, top: float, colors: Mapping[str, str]) -> None:
    first = next(iter(colors.values()))
    x = 0.0
    for fill, opacity, text in (
        (first, OPACITY[FORWARD], "forward"),
        (first, OPACITY[BACKWARD], "backward"),
        (REST, "1", "gradients, optimizer"),
        (WAITING, "1", "waits on a bridge"),
        (IDLE, "1", "idle"),
    ):
        look = {"fill": fill, "fill-opacity": opacity, "stroke": "#999", "stroke-width": "0.5"}
        add(svg, "path", d=f"M{x} {top + 4}h14v14h-14z", **look)
        write(svg, text, x + 20, top + 11, "start")
        x += 50 + 7 * len(text)


def _define_hatching(svg: Xml.Element) -> None:
    pattern = add(add(svg, "defs"), "pattern", id="waiting", width=6, height=6)
    pattern.set("patternUnits", "userSpaceOnUse")
    add(pattern, "rect", width=6, height=6, fill="#e4e4e4")
    add(pattern, "path", d="M0 6L6 0", stroke="#888", **{"stroke-width": "1"})
