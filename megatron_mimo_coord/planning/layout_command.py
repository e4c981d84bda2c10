"""Looks at a layout before it costs anything: what every rank would hold, or why it cannot run.

Neither torch nor Megatron-Core is imported. Installed as ``mimo-layout``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_mimo_coord.layout import (
    LANGUAGE,
    ModuleGrid,
    gradient_scaling_factor,
    pack,
)
from megatron_mimo_coord.layout.batch import batch_problems
from megatron_mimo_coord.layout.description import headline, module_rows, summarize
from megatron_mimo_coord.layout.problems import Problem, idle_ranks
from megatron_mimo_coord.layout.suggestions import in_words, suggestions
from megatron_mimo_coord.layout.toml_file import DESCRIPTION, LayoutFile
from megatron_mimo_coord.layout.toml_tables import as_problem
from megatron_mimo_coord.planning.drawing import blocks, to_svg
from megatron_mimo_coord.planning.terminal import (
    STDOUT,
    Parser,
    answer,
    beside,
    end,
    positive,
    print_json,
    print_parts,
    table,
    write_problem,
)

EXAMPLE = f"""{DESCRIPTION}
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
        end_with([as_problem(str(error))], options)
    job = {**layout.job, **given(options)}
    if found := problems(layout, job, options):
        end_with([layout.as_json(each) for each in found], options, *fits(layout, job, options))
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
    if options.svg and (problem := write_problem("--svg", options.svg, to_svg(grids))):
        end(problem)
    if options.svg == STDOUT:
        return
    if options.json:
        for name, grid in grids.items():
            length = grid.size // grid.dim("pp")
            stages = [[first, first + length - 1] for first in grid.ranks[::length]]
            summary["modules"][name]["stages"] = stages
        print_json({**summary, "problems": []})
    else:
        ranks = [table([["", *each.stages], *each.rows], each.name) for each in blocks(grids)]
        print_parts([headline(summary)], table(module_rows(summary)), beside(ranks))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("mimo-layout", __doc__, EXAMPLE)
    parser.add_argument("layout", type=Path, metavar="FILE", help="the layout, as TOML")
    batch = parser.add_argument_group("the batch, to see what each rank reads; else as in FILE")
    for name, what in (
        ("global", "samples in an optimizer step, over all ranks"),
        ("micro", "samples in a microbatch over all ranks, before modules deal them out"),
    ):
        batch.add_argument(f"--{name}-batch-size", type=positive, metavar="N", help=what)
    size = "ranks of the job; left out, as many as the layout takes"
    parser.add_argument("--world-size", type=positive, metavar="RANKS", help=size)
    loss = "every module's config has calculate_per_token_loss, which changes the scaling"
    parser.add_argument("--per-token-loss", action="store_true", help=loss)
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    svg = "draw a picture for a document; - prints it, and nothing else"
    parser.add_argument("--svg", type=Path, metavar="FILE", help=svg)
    options = parser.read(arguments)
    if options.svg == STDOUT and options.json:
        parser.error("--svg - and --json both print: give --svg a file")
    parser.refuse_same_files(options, ["layout"], ["svg"])
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


def problems(layout: LayoutFile, job: dict[str, Any], options: argparse.Namespace) -> list[Problem]:
    """What keeps a layout from running on a world, with the batch of a job."""
    grids = pack(layout.modules)
    sound = [grid for name, grid in grids.items() if name not in layout.broken]
    found = layout.problems_on(options.world_size)
    global_batch_size, micro_batch_size = map(job.get, BATCH_SIZES)
    from_options = {("", name) for name in given(options)}
    if micro_batch_size is not None:
        found += [
            Problem(each, *(at for at in each.places if at not in from_options))
            for each in batch_problems(sound, global_batch_size, micro_batch_size)
        ]
    elif global_batch_size is not None and not layout.problems:
        needs = "global_batch_size says nothing without micro_batch_size; give both"
        found.append(Problem(needs, *({("", "global_batch_size")} - from_options)))
    return found


def fits(
    layout: LayoutFile, job: dict[str, Any], options: argparse.Namespace
) -> tuple[list[list[int]], list[Any]]:
    """First and last of the ranks of the world that are left over, and what would take all."""
    if not options.world_size or layout.problems:
        return [], []
    ranks_of = {name: grid.ranks for name, grid in pack(layout.modules).items()}
    idle = [[ranks[0], ranks[-1]] for ranks in idle_ranks(ranks_of, options.world_size)]
    batch, samples = map(job.get, BATCH_SIZES)

    def takes_batch(grids: Sequence[ModuleGrid]) -> bool:
        return samples is None or not batch_problems(grids, batch, samples)

    return idle, suggestions(layout.modules, options.world_size, takes_batch)


def end_with(
    found: list[dict[str, Any]],
    options: argparse.Namespace,
    idle: Sequence[list[int]] = (),
    changes: Sequence[Any] = (),
) -> NoReturn:
    """End with code 2, having told all problems, ranks that are left over, and what would help."""
    if options.json:
        print_json({"problems": found, "idle_ranks": idle, "fits": changes})
        end()
    lines = [f"  - {problem['text']}" for problem in found]
    if changes:
        lines.append(f"what would take all {options.world_size} ranks:")
        lines += [f"  - {in_words(change)}" for change in changes]
    elif idle:
        lines.append(
            f"no other size of a module or two takes all {options.world_size} ranks: change more "
            f"of them, or launch another number"
        )
    end("\n".join([f"{options.layout} cannot run:", *lines]))
