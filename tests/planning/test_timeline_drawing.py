"""The picture of a step shows each stage's work to scale, and blank where it idles."""

import re
from xml.etree import ElementTree as Xml

import pytest
from layouts import parallel

from megatron_mimo_coord.planning import ModuleCosts, Timeline, simulate_step
from megatron_mimo_coord.planning.timeline_drawing import IDLE, WAITING, WIDTH, timeline_svg

SVG = "{http://www.w3.org/2000/svg}"


def widths(svg: Xml.Element) -> list[tuple[str, float]]:
    """(fill, pixels) of all bars."""
    return [
        (path.get("fill"), sum(map(float, re.findall(r"h(-?[\d.]+)v22", path.get("d")))))
        for path in svg.iter(f"{SVG}path")
        if "v22" in path.get("d")
    ]


@pytest.fixture(scope="module")
def timeline() -> Timeline:
    costs = ModuleCosts(forward_seconds_per_sample=1, backward_seconds_per_sample=2)
    modules = {"vision": parallel(dp=2), "language": parallel(pp=2)}
    return simulate_step(
        modules, dict.fromkeys(modules, costs), micro_batch_size=2, num_microbatches=3
    )


def test_bars_are_as_long_as_the_shares_say(timeline):
    svg = Xml.fromstring(timeline_svg(timeline))
    bars = widths(svg)
    assert sum(width for fill, width in bars if fill == IDLE) == pytest.approx(3 * WIDTH)
    busy = sum(shares.busy for shares in timeline.stages.values()) * WIDTH
    computed = sum(width for fill, width in bars if fill not in (IDLE, WAITING))
    assert computed == pytest.approx(busy, abs=0.2)
    waited = sum(shares.waiting for shares in timeline.stages.values()) * WIDTH
    assert sum(width for fill, width in bars if fill == WAITING) == pytest.approx(waited, abs=0.2)


def test_rows_have_names_and_microbatches_numbers(timeline):
    texts = [text.text for text in Xml.fromstring(timeline_svg(timeline)).iter(f"{SVG}text")]
    assert {"vision 0", "language 0", "language 1"} <= set(texts)
    assert [texts.count(str(index)) for index in range(3)] == [6, 6, 6]  # 3 rows, back and forth
    assert "0 s" in texts


def test_a_step_that_costs_nothing_can_be_drawn():
    free = ModuleCosts(forward_seconds_per_sample=0, backward_seconds_per_sample=0)
    timeline = simulate_step(
        {"language": parallel()}, {"language": free}, micro_batch_size=1, num_microbatches=1
    )
    assert widths(Xml.fromstring(timeline_svg(timeline))) == [(IDLE, WIDTH)]
