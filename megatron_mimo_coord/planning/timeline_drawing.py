"""A picture of a step: a row for each stage, with what it computes, what it waits for and gaps."""

from collections.abc import Mapping

from megatron_mimo_coord.planning.svg import INK, Picture, module_colors
from megatron_mimo_coord.planning.timeline import BACKWARD, COMPUTING, FORWARD, Span, Timeline

WIDTH, RIGHT, LETTER = 900, 80, 8  # pixels: the step, what part of it is busy, a letter of a name
ROW, BAR, LEGEND = 30, 22, 14
NUMBERED = 16  # pixels: a span as wide has the number of its microbatch written into it
TICKS = 8
REST, WAITING, IDLE = "#efb118", "#b0b0b0", "#f0f0f0"


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
    bottom = ROW * (0.5 + len(timeline.stages))
    left = LETTER * (2 + max(len(f"{module} {stage}") for module, stage in timeline.stages))
    title = f"A step of {timeline.seconds:.4g} s"
    picture = Picture(title, -left, left + WIDTH + RIGHT, bottom + 2 * ROW)
    colors = module_colors(module for module, _ in timeline.stages)
    scale = WIDTH / timeline.seconds if timeline.seconds else 0.0
    spans: dict[tuple[str, int], list[Span]] = {place: [] for place in timeline.stages}
    for span in timeline.spans:
        if span.end > span.start:
            spans[span.module, span.stage].append(span)
    for row, (place, shares) in enumerate(timeline.stages.items()):
        top, middle = ROW * (row + 0.25), ROW * (row + 0.25) + BAR / 2
        picture.text(f"{place[0]} {place[1]}", -LETTER, middle, "end", colors[place[0]][1])
        picture.text(f"{shares.busy * 100:.0f} % busy", WIDTH + LETTER, middle, "start")
        picture.boxes([(0.0, WIDTH)], top, BAR, IDLE)
        _draw_row(picture, spans[place], top, scale, colors[place[0]])
    for tick in range(TICKS + 1) if timeline.seconds else ():
        x = WIDTH * tick / TICKS
        picture.text(f"{timeline.seconds * tick / TICKS:.4g} s", x, bottom + ROW / 2)
    _draw_legend(picture, bottom + 1.5 * ROW, colors)
    return str(picture)


def _draw_row(
    picture: Picture, spans: list[Span], top: float, scale: float, colors: tuple[str, str]
) -> None:
    fills = {FORWARD: colors[0], BACKWARD: colors[1]}
    places: dict[str, list[tuple[float, float]]] = {}
    for span in spans:
        fill = fills.get(span.kind, REST) if span.kind in COMPUTING else WAITING
        if fill != WAITING or span.bridge:
            place = span.start * scale, (span.end - span.start) * scale
            places.setdefault(fill, []).append(place)
    for fill, boxes in places.items():
        picture.boxes(boxes, top, BAR, fill)
    for span in spans:
        if span.kind in fills and (span.end - span.start) * scale >= NUMBERED:
            ink = "#fff" if span.kind == BACKWARD else INK
            middle = (span.start + span.end) / 2 * scale
            picture.text(str(span.microbatch), middle, top + BAR / 2, fill=ink)


def _draw_legend(picture: Picture, y: float, colors: Mapping[str, tuple[str, str]]) -> None:
    light, dark = next(iter(colors.values()))
    x = 0.0
    for fill, text in (
        (light, "forward"),
        (dark, "backward"),
        (REST, "gradients, optimizer"),
        (WAITING, "waits on a bridge"),
        (IDLE, "idle"),
    ):
        picture.boxes([(x, LEGEND)], y - LEGEND / 2, LEGEND, fill)
        picture.text(text, x + 20, y, "start")
        x += 50 + 7 * len(text)
