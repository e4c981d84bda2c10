"""Pictures of a layout: which ranks hold which module, pipeline stage and replica."""

from collections.abc import Iterator, Mapping, Sequence

from attrs import frozen

from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid, overlap, sharing, span
from megatron_mimo_coord.layout.description import bridge
from megatron_mimo_coord.planning.svg import boxes, module_colors, picture, text

SHOWN = 6  # stages or replicas of a module; of more, those in the middle are left out
GAP = "…"


@frozen
class Block:
    """The ranks of a module as a table; those of the language model with the encoders on them.

    Args:
        name: the module, and those on its ranks.
        stages: title of each column.
        rows: title of each replica, and for each stage its ranks, with a line for each encoder
            there.
    """

    name: str
    stages: list[str]
    rows: list[list[str]]

    @classmethod
    def of(cls, grid: ModuleGrid, guests: Sequence[ModuleGrid] = ()) -> "Block":
        """The block of a grid whose dims are in the order of ``DIM_NAMES``.

        Example:
            >>> from megatron_mimo_coord.layout import DIM_NAMES
            >>> language = ModuleGrid("language", (2, 1, 2, 2), DIM_NAMES)
            >>> Block.of(language, [ModuleGrid("vision", (1, 1, 4, 1), DIM_NAMES)]).rows
            [['dp 0', '0-1\\nvision dp 0-1', '4-5'], ['dp 1', '2-3\\nvision dp 2-3', '6-7']]
        """
        stages, replicas = _shown(grid.dim("pp")), _shown(grid.data_parallel_size)
        return cls(
            name=", ".join(each.name for each in (grid, *guests)),
            stages=[GAP if stage is None else f"stage {stage}" for stage in stages],
            rows=[
                [
                    GAP if replica is None else f"dp {replica}",
                    *(_cell(grid, guests, stage, replica) for stage in stages),
                ]
                for replica in replicas
            ],
        )

    @property
    def height(self) -> int:
        """Lines of a row."""
        return max(cell.count("\n") + 1 for row in self.rows for cell in row)


def blocks(grids: Mapping[str, ModuleGrid]) -> list[Block]:
    """A block for each module, encoders before the language model; one for all on its ranks."""
    shared = sharing(grids)
    apart = [Block.of(grid) for name, grid in grids.items() if name not in (LANGUAGE, *shared)]
    return [*apart, Block.of(grids[LANGUAGE], [grids[name] for name in shared])]


def _shown(count: int) -> list[int | None]:
    """Which indexes to show, with None for those in between."""
    if count <= SHOWN:
        return list(range(count))
    half = SHOWN // 2
    return [*range(half), None, *range(count - half + 1, count)]


def _cell(
    grid: ModuleGrid, guests: Sequence[ModuleGrid], stage: int | None, replica: int | None
) -> str:
    if stage is None or replica is None:
        return GAP
    first = grid.rank_at(pp=stage, dp=replica)
    ranks = range(first, first + grid.dim("tp") * grid.dim("cp"))
    lines = [span(ranks)]
    for guest in guests:
        if here := overlap(guest.ranks, ranks):
            replicas = range(guest.coordinate(here[0], "dp"), guest.coordinate(here[-1], "dp") + 1)
            lines.append(f"{guest.name} dp {span(replicas)}")
    return "\n".join(lines)


CELL, LINE, LABELS, LETTER, SPACE = 104, 26, 56, 8, 24  # pixels


def to_svg(grids: Mapping[str, ModuleGrid]) -> str:
    """A layout as an SVG document: encoders on the left, the language model on the right."""
    bridges = {
        name: f"{name}: {bridge(grid, grids[LANGUAGE])} \u2192"
        for name, grid in grids.items()
        if name != LANGUAGE
    }
    parts, colors, left = [], module_colors(grids), SPACE
    for block in (every := blocks(grids)):
        names = block.name.split(", ")
        title = ", ".join(bridges.get(name, name) for name in reversed(names))
        parts.append(text(title, left, LINE / 2, "start", colors[names[0]][1]))
        parts += _drawn(block, left, colors[names[0]][0])
        left += SPACE + max(LABELS + CELL * len(block.stages), LETTER * len(title))
    height = LINE * (2 + max(block.height * len(block.rows) for block in every))
    return picture(f"Ranks of {', '.join(grids)}", 0, left - SPACE, height, parts)


def _drawn(block: Block, left: int, fill: str) -> Iterator[str]:
    """A line of stages, then a box for each replica and stage."""
    height = LINE * block.height
    for column, stage in enumerate(block.stages):
        yield text(stage, left + LABELS + CELL * (column + 0.5), LINE * 1.5)
    for row, (replica, *cells) in enumerate(block.rows):
        top = 2 * LINE + height * row
        yield text(replica, left, top + height / 2, "start")
        for column, cell in enumerate(cells):
            x, lines = left + LABELS + CELL * column, cell.split("\n")
            if cell != GAP:
                yield boxes([(x + 2, CELL - 4)], top + 2, height - 4, fill)
            for number, line in enumerate(lines, 1):
                yield text(line, x + CELL / 2, top + height * (number - 0.5) / len(lines))
