"""Pictures of a layout: which ranks hold which module, pipeline stage and replica."""

from collections.abc import Iterator, Mapping

from attrs import frozen

from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid, is_colocated, span
from megatron_mimo_coord.layout.description import bridge
from megatron_mimo_coord.planning.svg import boxes, module_colors, picture, text

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

    @property
    def rows(self) -> list[list[str]]:
        """A row for each replica, its title first."""
        return [[title, *cells] for title, cells in zip(self.replicas, self.cells, strict=True)]


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


CELL, LINE, LABELS, LETTER, SPACE = 104, 26, 56, 8, 24  # pixels


def to_svg(grids: Mapping[str, ModuleGrid]) -> str:
    """A layout as an SVG document: encoders on the left, the language model on the right."""
    together = ", same ranks" if is_colocated(grids.values()) else ""
    names = sorted(grids, key=lambda name: name == LANGUAGE)
    titles = {
        name: name if name == LANGUAGE else f"{name}: {bridge(grids[name], grids[LANGUAGE])} \u2192"
        for name in names
    }
    blocks = {name: Block.of(grids[name]) for name in names}
    widths = {
        name: SPACE + max(LABELS + CELL * len(block.stages), LETTER * len(titles[name] + together))
        for name, block in blocks.items()
    }
    height = LINE * (2 + max(len(block.replicas) for block in blocks.values()))
    parts, colors, left = [], module_colors(grids), SPACE
    for name, block in blocks.items():
        parts.append(text(titles[name] + together, left, LINE / 2, "start", colors[name][1]))
        parts += _drawn(block, left, colors[name][0])
        left += widths[name]
    return picture(f"Ranks of {', '.join(grids)}", 0, sum(widths.values()), height, parts)


def _drawn(block: Block, left: int, fill: str) -> Iterator[str]:
    """A line of stages, then a line for each replica."""
    for column, stage in enumerate(block.stages):
        yield text(stage, left + LABELS + CELL * (column + 0.5), LINE * 1.5)
    for row, (replica, cells) in enumerate(zip(block.replicas, block.cells, strict=True), 2):
        yield text(replica, left, LINE * (row + 0.5), "start")
        for column, ranks in enumerate(cells):
            x = left + LABELS + CELL * column
            if ranks != GAP:
                yield boxes([(x + 2, CELL - 4)], LINE * row + 2, LINE - 4, fill)
            yield text(ranks, x + CELL / 2, LINE * (row + 0.5))
