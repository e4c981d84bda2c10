"""A picture of a step: a row for each stage, with what it computes, what it waits for and gaps."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from megatron_mimo_coord.planning.svg import INK, boxes, module_colors, picture, text
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
    left = LETTER * (2 + max(len(f"{module} {stage}") for module, stage in timeline.stages))
    height = ROW * (2.5 + len(timeline.stages))
    title = f"A step of {timeline.seconds:.4g} s"
    return picture(title, -left, left + WIDTH + RIGHT, height, _parts(timeline))


def _parts(timeline: Timeline) -> Iterator[str]:
    colors = module_colors(module for module, _ in timeline.stages)
    scale = WIDTH / timeline.seconds if timeline.seconds else 0.0
    spans = defaultdict(list)
    for span in timeline.spans:
        if span.end > span.start:
            spans[span.module, span.stage].append(span)
    for row, ((module, stage), shares) in enumerate(timeline.stages.items()):
        top, middle = ROW * (row + 0.25), ROW * (row + 0.25) + BAR / 2
        yield text(f"{module} {stage}", -LETTER, middle, "end", colors[module][1])
        yield text(f"{shares.busy * 100:.0f} % busy", WIDTH + LETTER, middle, "start")
        yield boxes([(0.0, WIDTH)], top, BAR, IDLE)
        yield from _row(spans[module, stage], top, scale, colors[module])
    bottom = ROW * (0.5 + len(timeline.stages))
    for tick in range(TICKS + 1) if timeline.seconds else ():
        seconds = f"{timeline.seconds * tick / TICKS:.4g} s"
        yield text(seconds, WIDTH * tick / TICKS, bottom + ROW / 2)
    light, dark = next(iter(colors.values()))
    x, y = 0.0, bottom + 1.5 * ROW
    for fill, meaning in (
        (light, "forward"),
        (dark, "backward"),
        (REST, "gradients, optimizer"),
        (WAITING, "waits on a bridge"),
        (IDLE, "idle"),
    ):
        yield boxes([(x, LEGEND)], y - LEGEND / 2, LEGEND, fill)
        yield text(meaning, x + 20, y, "start")
        x += 50 + 7 * len(meaning)


def _row(spans: Sequence[Span], top: float, scale: float, colors: tuple[str, str]) -> Iterator[str]:
    fills = {FORWARD: colors[0], BACKWARD: colors[1]}
    places = defaultdict(list)
    for span in spans:
        fill = fills.get(span.kind, REST) if span.kind in COMPUTING else WAITING
        if fill != WAITING or span.bridge:
            places[fill].append((span.start * scale, (span.end - span.start) * scale))
    for fill, bars in places.items():
        yield boxes(bars, top, BAR, fill)
    for span in spans:
        if span.kind in fills and (span.end - span.start) * scale >= NUMBERED:
            ink, middle = "#fff" if span.kind == BACKWARD else INK, (span.start + span.end) / 2
            yield text(str(span.microbatch), middle * scale, top + BAR / 2, fill=ink)
