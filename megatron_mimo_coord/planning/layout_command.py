"""Looks at a layout before it costs anything: what every rank would hold, or why it cannot run.

Neither torch nor Megatron-Core is imported. Installed as ``mimo-layout``.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from attrs import asdict, field, frozen

import megatron_mimo_coord
from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid, gradient_scaling_factor, pack
from megatron_mimo_coord.layout.batch import batch_problems
from megatron_mimo_coord.layout.description import headline, summarize, table
from megatron_mimo_coord.layout.problems import Problem, idle_ranks
from megatron_mimo_coord.layout.suggestions import Change, in_words, suggestions
from megatron_mimo_coord.layout.toml_file import LayoutFile
from megatron_mimo_coord.planning.drawing import Block, to_svg
from megatron_mimo_coord.planning.terminal import (
    STDOUT,
    answer,
    drawn,
    need_rich,
    positive,
    print_tables,
    write_file,
)

EXAMPLE = """\
a layout file has a table for each module, with the fields of ModuleParallelism:

  [vision]
  data_parallel_size = 4

  [language]
  tensor_model_parallel_size = 2
  pipeline_model_parallel_size = 2
  data_parallel_size = 2

and above the tables, if you like, global_batch_size, micro_batch_size and calculate_per_token_loss

exit code 0 if the layout can run, 2 if it cannot, 1 if the answer cannot be written
"""


BATCH_SIZES = ("global_batch_size", "micro_batch_size")


def main(arguments: Sequence[str] | None = None) -> None:
    """Check a layout and show it, as the command line wants it."""
    options = parse(arguments)
    answer(lambda: look(options))


def look(options: argparse.Namespace) -> None:
    """Show a layout, or end with code 2 and all that is wrong with it."""
    try:
        layout = LayoutFile.read(options.layout)
    except ValueError as error:
        end_with(Report(problems=[{"message": str(error), "places": []}]), options)
    job = {**layout.job, **given(options)}
    report = Report.of(layout, job, options)
    if report.problems:
        end_with(report, options)
    grids = pack(layout.modules)
    per_token = job.get("calculate_per_token_loss", False)
    global_batch_size, micro_batch_size = map(job.get, BATCH_SIZES)
    summary = summarize(
        grids,
        factors(grids, per_token),
        per_token=per_token,
        micro_batch_size=micro_batch_size,
        num_microbatches=global_batch_size and global_batch_size // micro_batch_size,
    )
    if options.svg:
        write_file("--svg", options.svg, to_svg(grids))
    if options.svg == STDOUT:
        return
    if options.json:
        stages = {name: {"stages": stage_ranks(grid)} for name, grid in grids.items()}
        modules = {name: module | stages[name] for name, module in summary["modules"].items()}
        print(json.dumps({**summary, "modules": modules, "problems": []}, indent=2))
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
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {megatron_mimo_coord.__version__}"
    )
    batch = parser.add_argument_group("the batch, to see what each rank reads; else as in FILE")
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
    parser.add_argument(
        "--svg",
        type=Path,
        metavar="FILE",
        help="draw a picture for a document; - prints it, and nothing else",
    )
    options = parser.parse_args(arguments)
    if options.svg == STDOUT and options.json:
        parser.error("--svg - and --json both print: give --svg a file")
    if options.svg and options.svg.resolve() == options.layout.resolve():
        parser.error(f"--svg {options.svg} is the layout itself: give another file")
    return options


def given(options: argparse.Namespace) -> dict[str, int | bool]:
    """What the command line says of the job, under the names that it has in a file."""
    fields = {name: getattr(options, name) for name in BATCH_SIZES}
    fields["calculate_per_token_loss"] = options.per_token_loss or None
    return {name: value for name, value in fields.items() if value is not None}


def factors(grids: dict[str, ModuleGrid], per_token: bool) -> dict[str, float]:
    """Gradient scaling factor of each module, where all have the same loss flag."""
    return {
        name: gradient_scaling_factor(
            grid.replicas, grids[LANGUAGE].replicas, ddp_sums=per_token, per_token=per_token
        )
        for name, grid in grids.items()
    }


# -- a layout that cannot run ----------------------------------------------------------------------


@frozen
class Report:
    """What keeps a layout from running, in types that JSON knows.

    Args:
        problems: the message of each, and its places in the file.
        idle_ranks: first and last of the ranks that are left over.
        fits: changes after which the layout takes all ranks of the world.
    """

    problems: list[dict[str, Any]]
    idle_ranks: list[list[int]] = field(factory=list)
    fits: list[Change] = field(factory=list)

    @classmethod
    def of(
        cls, layout: LayoutFile, job: Mapping[str, int], options: argparse.Namespace
    ) -> "Report":
        """Look at a layout and at the batch of a job, which the file or the options tell."""
        global_batch_size, micro_batch_size = map(job.get, BATCH_SIZES)

        def of_batch(grids: Sequence[ModuleGrid]) -> list[Problem]:
            if micro_batch_size is not None:
                found = batch_problems(grids, global_batch_size, micro_batch_size)
            elif global_batch_size is not None and not layout.problems:
                needs = "global_batch_size says nothing without micro_batch_size; give both"
                found = [Problem(needs, ("", "global_batch_size"))]
            else:
                found = []
            from_options = {("", name) for name in given(options)}
            return [
                Problem(problem, *(at for at in problem.places if at not in from_options))
                for problem in found
            ]

        grids = pack(layout.modules)
        sound = [grid for name, grid in grids.items() if name not in layout.broken]
        found = layout.problems_on(options.world_size) + of_batch(sound)
        problems = [
            {
                "message": problem,
                "places": [
                    {"module": module, "field": name, "line": line}
                    for module, name, line in layout.places(problem)
                ],
                "text": layout.located(problem),
            }
            for problem in found
        ]
        if not found or not options.world_size or layout.problems:
            return cls(problems)
        ranks_of = {name: grid.ranks for name, grid in grids.items()}
        return cls(
            problems,
            idle_ranks=[[r[0], r[-1]] for r in idle_ranks(ranks_of, options.world_size)],
            fits=suggestions(layout.modules, options.world_size, lambda grids: not of_batch(grids)),
        )


def end_with(report: Report, options: argparse.Namespace) -> NoReturn:
    """End with code 2, having told all problems."""
    if options.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        lines = [f"{options.layout} cannot run:"]
        lines += [f"  - {problem.get('text', problem['message'])}" for problem in report.problems]
        if report.fits:
            lines.append(f"what would take all {options.world_size} ranks:")
            lines += [f"  - {in_words(change)}" for change in report.fits]
        elif report.idle_ranks:
            lines.append(
                f"no other size of a module or two takes all {options.world_size} ranks: change "
                f"more of them, or launch another number"
            )
        print("\n".join(lines), file=sys.stderr)
    sys.exit(2)


# -- a layout that can -----------------------------------------------------------------------------


def stage_ranks(grid: ModuleGrid) -> list[list[int]]:
    """First and last rank of each pipeline stage."""
    length = grid.size // grid.dim("pp")
    return [[first, first + length - 1] for first in grid.ranks[::length]]


def show(summary: dict[str, Any], grids: dict[str, ModuleGrid]) -> None:
    """Numbers and a picture in the terminal."""
    need_rich()
    titles, *rows = table(summary)
    pictures = [
        drawn(
            ["", *block.stages],
            [[label, *cells] for label, cells in zip(block.replicas, block.cells, strict=True)],
            title=block.name,
        )
        for block in map(Block.of, grids.values())
    ]
    print_tables(headline(summary), drawn(titles, rows), beside=pictures)
