"""Pictures of a layout: which ranks hold which module, pipeline stage and replica."""

from collections.abc import Mapping
from xml.etree import ElementTree as Xml

from attrs import frozen

from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid, is_colocated, span
from megatron_mimo_coord.layout.description import bridge
from megatron_mimo_coord.planning.svg import add, module_colors, new_svg, svg_text, write

SHOWN = 6  # stages or replicas of a module; of more, those in the middle are left out
GAP = "…"


@frozen
class Block:
    """The ranks of a module as a table.

    Args:
        name: the module.
        stages: title of each column.
        replicas: title of each row.
        cells: ranks of each stage in each replica, by row.
    """

    name: str
    stages: list[str]
    replicas: list[str]
    cells: list[list[str]]

    @classmethod
    def of(cls, grid: ModuleGrid) -> "Block":
        """The block of a grid whose dims are in the order of ``DIM_NAMES``.

        Example:
            >>> from megatron_mimo_coord.layout import DIM_NAMES
            >>> Block.of(ModuleGrid("language", (2, 1, 2, 2), DIM_NAMES, rank_offset=4)).cells
            [['4-5', '8-9'], ['6-7', '10-11']]
        """
        stages, replicas = _shown(grid.dim("pp")), _shown(grid.data_parallel_size)
        return cls(
            name=grid.name,
            stages=[GAP if stage is None else f"stage {stage}" for stage in stages],
            replicas=[GAP if replica is None else f"dp {replica}" for replica in replicas],
            cells=[[_ranks(grid, stage, replica) for stage in stages] for replica in replicas],
        )


def _shown(count: int) -> list[int | None]:
    """Which indexes to show, with None for those in between."""
    if count <= SHOWN:
        return list(range(count))
    half = SHOWN // 2
    return [*range(half), None, *range(count - half + 1, count)]


def _ranks(grid: ModuleGrid, stage: int | None, replica: int | None) -> str:
    if stage is None or replica is None:
        return GAP
    first = grid.rank_at(pp=stage, dp=replica)
    return span(range(first, first + grid.dim("tp") * grid.dim("cp")))


# -- SVG -------------------------------------------------------------------------------------------

CELL, LINE, LABELS, LETTER, SPACE, ARROW = 112, 26, 68, 8, 20, 80  # pixels


def to_svg(grids: Mapping[str, ModuleGrid]) -> str:
    """A layout as an SVG document: encoders on the left, the language model on the right."""
    svg = new_svg(f"Ranks of {', '.join(grids)}")
    encoders = {name: Block.of(grid) for name, grid in grids.items() if name != LANGUAGE}
    language = Block.of(grids[LANGUAGE])
    together = ", same ranks" if is_colocated(grids.values()) else ""
    titles = {
        name: f"{name}: {bridge(grids[name], grids[LANGUAGE])}{together}" for name in encoders
    }
    widths = [max(_width(encoders[name]), LETTER * len(titles[name])) for name in encoders]
    left = max(widths, default=-ARROW) + SPACE
    right = left + ARROW
    height = max(
        SPACE + sum(_height(block) + SPACE for block in encoders.values()),
        _height(language) + 2 * SPACE,
    )
    svg.set("viewBox", f"0 0 {right + _width(language) + SPACE} {height}")
    top = SPACE
    colors = module_colors(grids)
    for name, block in encoders.items():
        _draw_block(svg, block, titles[name], SPACE, top, colors[name])
        _draw_arrow(svg, left, top + _height(block) // 2, right, height // 2)
        top += _height(block) + SPACE
    _draw_block(svg, language, LANGUAGE, right, (height - _height(language)) // 2, colors[LANGUAGE])
    return svg_text(svg)


def _width(block: Block) -> int:
    return LABELS + CELL * len(block.stages)


def _height(block: Block) -> int:
    return LINE * (2 + len(block.replicas))


def _draw_block(
    svg: Xml.Element, block: Block, title: str, left: int, top: int, color: str
) -> None:
    """The title, a line of stages, then a line for each replica."""
    write(svg, title, left, top + LINE // 2, "start", color)
    for column, stage in enumerate(block.stages):
        write(svg, stage, left + LABELS + CELL * column + CELL // 2, top + LINE * 3 // 2)
    for row, (replica, cells) in enumerate(zip(block.replicas, block.cells, strict=True), 2):
        y = top + LINE * row
        write(svg, replica, left, y + LINE // 2, "start")
        for column, ranks in enumerate(cells):
            x = left + LABELS + CELL * column
            if ranks != GAP:
                box = {"x": x + 2, "y": y + 2, "width": CELL - 4, "height": LINE - 4, "rx": 4}
                look = {"fill": color, "fill-opacity": "0.25", "stroke": color}
                add(svg, "rect", **box, **look)
            write(svg, ranks, x + CELL // 2, y + LINE // 2)


def _draw_arrow(svg: Xml.Element, left: int, start: int, right: int, end: int) -> None:
    head = "m-8 -5l8 5l-8 5"
    add(svg, "path", d=f"M{left + 8} {start}L{right - 8} {end}{head}", fill="none", stroke="#777")
