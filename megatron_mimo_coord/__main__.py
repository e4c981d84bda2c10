"""Looks at a layout before it costs anything: what every rank would hold, or why it cannot run.

Neither torch nor Megatron-Core is imported. Installed as ``mimo-layout``.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_mimo_coord.batch import batch_problems
from megatron_mimo_coord.cures import ways_to_fit
from megatron_mimo_coord.description import headline, summarize, table
from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid, gradient_scaling_factor, pack
from megatron_mimo_coord.layout_file import LayoutFile
from megatron_mimo_coord.picture import Block, to_svg
from megatron_mimo_coord.problems import idle_ranks

EXAMPLE = """\
a layout file has a table for each module, with the fields of ModuleParallelism:

  [vision]
  data_parallel_size = 4

  [language]
  tensor_model_parallel_size = 2
  pipeline_model_parallel_size = 2
  data_parallel_size = 2

exit code 0 if the layout can run, 2 if it cannot
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Check a layout and show it, as the command line wants it."""
    options = parse(arguments)
    try:
        layout = LayoutFile.read(options.layout)
    except ValueError as error:
        refuse({"problems": [str(error)]}, options)
    refuse(faults(layout, options), options)
    grids = pack(layout.modules)
    summary = summarize(
        grids,
        factors(grids, options.per_token_loss),
        per_token=options.per_token_loss,
        micro_batch_size=options.micro_batch_size,
        num_microbatches=num_microbatches(options),
    )
    if options.svg:
        options.svg.write_text(to_svg(grids), encoding="utf-8")
    if options.json:
        print(json.dumps(summary, indent=2))
    else:
        show(summary, grids)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="mimo-layout",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("layout", type=Path, metavar="FILE", help="the layout, as TOML")
    batch = parser.add_argument_group("the batch, to see what each rank reads")
    for name, what in (
        ("global", "samples in an optimizer step, over all ranks"),
        ("micro", "samples in a microbatch over all ranks, before modules deal them out"),
    ):
        batch.add_argument(f"--{name}-batch-size", type=positive, metavar="N", help=what)
    parser.add_argument(
        "--world-size",
        type=positive,
        metavar="RANKS",
        help="ranks of the job; left out, as many as the layout takes",
    )
    parser.add_argument(
        "--per-token-loss",
        action="store_true",
        help="every module's config has calculate_per_token_loss, which changes the scaling",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw a picture for a document")
    options = parser.parse_args(arguments)
    if (options.global_batch_size is None) != (options.micro_batch_size is None):
        parser.error("--global-batch-size and --micro-batch-size belong together: give both")
    if options.svg and not options.svg.absolute().parent.is_dir():
        parser.error(f"--svg {options.svg}: there is no folder {options.svg.parent}")
    if not options.json and find_spec("rich") is None:
        parser.error(
            "the tables are drawn by rich, which is not installed: pip install rich (this "
            "package's extra 'cli'), or ask for --json"
        )
    return options


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, not {text!r}")
    return int(text)


def num_microbatches(options: argparse.Namespace) -> int | None:
    """Microbatches in an optimizer step, if the batch is known."""
    if options.micro_batch_size is None:
        return None
    return options.global_batch_size // options.micro_batch_size


def factors(grids: dict[str, ModuleGrid], per_token: bool) -> dict[str, float]:
    """Gradient scaling factor of each module, where all have the same loss flag."""
    return {
        name: gradient_scaling_factor(
            grid.replicas, grids[LANGUAGE].replicas, ddp_sums=per_token, per_token=per_token
        )
        for name, grid in grids.items()
    }


# -- a layout that cannot run ----------------------------------------------------------------------


def faults(layout: LayoutFile, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that keeps the layout from running, and changes that would let it."""

    def deals_out(grids: Sequence[ModuleGrid]) -> bool:
        return not _batch_problems(grids, options)

    grids = pack(layout.modules)
    problems = layout.problems_on(options.world_size)
    if not layout.problems:
        problems += _batch_problems(list(grids.values()), options)
    found: dict[str, Any] = {"problems": [layout.locate(problem) for problem in problems]}
    world_size = options.world_size
    if world_size and not layout.problems:
        idle = idle_ranks({name: grid.ranks for name, grid in grids.items()}, world_size)
        found["idle_ranks"] = [[ranks[0], ranks[-1]] for ranks in idle]
        found["fits"] = ways_to_fit(layout.modules, world_size, deals_out) if problems else []
    return found


def _batch_problems(grids: Sequence[ModuleGrid], options: argparse.Namespace) -> list[Any]:
    if options.micro_batch_size is None:
        return []
    number = max(1, num_microbatches(options) or 0)
    return batch_problems(grids, options.global_batch_size, options.micro_batch_size, number)


def refuse(found: dict[str, Any], options: argparse.Namespace) -> None:
    """End with code 2 if there are problems, and tell them all."""
    if not found["problems"]:
        return
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        lines = [f"{options.layout} cannot run:"]
        lines += [f"  - {problem}" for problem in found["problems"]]
        if found.get("fits"):
            lines.append(f"what would take all {options.world_size} ranks:")
            lines += [f"  - {way}" for way in found["fits"]]
        print("\n".join(lines), file=sys.stderr)
    sys.exit(2)


# -- a layout that can -----------------------------------------------------------------------------


def show(summary: dict[str, Any], grids: dict[str, ModuleGrid]) -> None:
    """Numbers and a picture in the terminal."""
    from rich import box
    from rich.columns import Columns
    from rich.console import Console
    from rich.table import Table

    def drawn(titles: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Table:
        result = Table(*titles, title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for row in rows:
            result.add_row(*row)
        return result

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    titles, *rows = table(summary)
    console.print(headline(summary))
    console.print(drawn(titles, rows))
    blocks = [Block.of(grid) for grid in grids.values()]
    console.print(
        Columns(
            drawn(
                ["", *block.stages],
                [[label, *cells] for label, cells in zip(block.replicas, block.cells, strict=True)],
                title=block.name,
            )
            for block in blocks
        )
    )


if __name__ == "__main__":
    main()
