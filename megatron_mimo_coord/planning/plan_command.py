"""Proposes layouts for a model and some GPUs: step time, idle time, memory, empty GPUs.

Every layout whose sizes divide is ranked, on ranks of its own or colocated, with every microbatch;
the steps of the best hundred are simulated. Seconds are estimated from the model's sizes or
read from a file of measured costs. Neither torch nor Megatron-Core is imported. Installed as
mimo-plan.
"""

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NoReturn

from attrs import evolve, fields_dict

from megatron_mimo_coord.layout.toml_file import layout_text
from megatron_mimo_coord.layout.toml_tables import as_problem
from megatron_mimo_coord.planning.layouts import Layout
from megatron_mimo_coord.planning.model_file import DESCRIPTION, read_model
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.openings import openings
from megatron_mimo_coord.planning.plan_inputs import Inputs, assumptions
from megatron_mimo_coord.planning.plan_report import as_json, headline, memory_rows, rows, settings
from megatron_mimo_coord.planning.search import cheapest, closest, propose
from megatron_mimo_coord.planning.terminal import (
    Parser,
    answer,
    end,
    number,
    positive,
    print_json,
    print_parts,
    size,
    table,
    write_problem,
)
from megatron_mimo_coord.planning.timeline_drawing import timeline_svg
from megatron_mimo_coord.planning.trace import chrome_trace

FIELDS = fill(", ".join(fields_dict(ModuleSizes)), 80)
EXAMPLE = f"""{DESCRIPTION}
what else there is:
{FIELDS}

exit code 0 if a layout fits (with --layout, that one), 2 if none does or something is wrong, 1 if
the answer cannot be written
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Propose layouts, as the command line wants it."""
    options = parse(arguments)
    answer(lambda: plan(options))


def plan(options: argparse.Namespace) -> None:
    """Show the best layouts, or what one costs; end with code 2 if there is none."""
    if options.measure:
        measure(options)
        return
    inputs = Inputs(options)
    if wrong := inputs.problems():
        end_with(f"{options.model} cannot be planned:", as_answer(wrong), options)
    request, opened, assumed = inputs.request(), list[str](), list(assumptions(inputs))
    if inputs.layout:
        how = {"encoders_first": False} if options.inside_first_stage else {}
        layouts = [cheapest(request, inputs.layout.modules, **how)]
    else:
        layouts = propose(request, options.count, per_gpu=options.per_gpu)
        best = layouts[0] if layouts else None
        opened += openings(request, best, per_gpu=options.per_gpu)
    if not layouts:
        nearest, reasons = closest(request)
        gpus = f"{options.gpus} GPU{'s' if options.gpus > 1 else ''}"
        head = f"no layout fits into {gpus} of {options.memory / 1e9:g} GB:"
        answer = as_answer(map(as_problem, reasons), [], nearest, assumed, opened)
        end_with(head, answer, options)
    best = layouts[0]
    assumed = [*if_gpus_are_slower(best, inputs), *extrapolated(best), *assumed]
    lacks = (f"the layout does not fit: {why}" for why in best.shortages())
    unable = [*lacks, *write_files(best, options)]
    if options.json:
        print_json(as_answer(map(as_problem, unable), layouts, None, assumed, opened))
    else:
        show(layouts, opened, assumed, is_given=bool(inputs.layout))
    if unable:
        end() if options.json else end("\n".join(unable))


def end_with(head: str, answer: dict[str, Any], options: argparse.Namespace) -> NoReturn:
    """End with code 2, having told why there is no plan."""
    if options.json:
        print_json(answer)
        end()
    end(head, [*(problem["text"] for problem in answer["problems"]), *answer["openings"]])


def measure(options: argparse.Namespace) -> None:
    """Write costs of the model on the device at hand; end with code 2 if that cannot be done."""
    from megatron_mimo_coord.planning.measure import measured_costs  # needs torch

    try:
        text = measured_costs(read_model(options.model))
    except ValueError as error:
        end(str(error))
    is_first = os.getenv("RANK", "0") == "0"
    if is_first and (problem := write_problem("--measure", options.measure, text)):
        end(problem)


def show(
    layouts: Sequence[Layout], opened: Sequence[str], assumed: Sequence[str], is_given: bool
) -> None:
    """Numbers in the terminal."""
    said = [*settings(layouts), *opened]
    whose = "" if is_given else ", layout 1"
    print_parts(
        [headline(layouts[0].request, len(layouts), is_given)],
        [*table(rows(layouts), numbers=True), *(["", *said] if said else [])],
        table(memory_rows(layouts[0]), f"memory of a GPU in GB{whose}", numbers=True),
        ["assumed:", *(f"  - {line}" for line in assumed)],
    )


def if_gpus_are_slower(best: Layout, inputs: Inputs) -> Iterator[str]:
    """By how much the step of a layout changes if a GPU achieves less or more than assumed.

    Nothing where all costs were measured.
    """
    slower, faster = (
        evolve(best, request=inputs.request(part)).timeline.seconds for part in (0.8, 1.2)
    )
    if slower == faster:
        return
    yield (
        f"if GPUs compute 20 % slower than assumed, the step of layout 1 takes {slower:.4g} s, and "
        f"{faster:.4g} s if 20 % faster: measure (--measure, or record_timeline), and give --costs"
    )


def extrapolated(best: Layout) -> Iterator[str]:
    """What was measured of other samples than those of a layout."""
    for name, module in best.modules.items():
        measured = best.request.costs(name, best.sizes[name], module)
        samples, length = measured.measured_samples, best.sizes[name].seq_length
        here = best.micro_batch_size / module.data_parallel_size
        if samples not in (None, here):
            yield (
                f"extrapolated: {name} was measured with {samples:g} samples of a microbatch on a "
                f"rank, layout 1 has {here:g}; a sample takes as long"
            )
        if length and measured.measured_seq_length not in (None, length):
            yield (
                f"extrapolated: {name} was measured with {measured.measured_seq_length:,} tokens a "
                f"sample, and has {length:,}; seconds grow as the operations do"
            )


def write_files(best: Layout, options: argparse.Namespace) -> Iterator[str]:
    """Write the files that options ask for; what went wrong."""
    job = {
        "global_batch_size": best.request.global_batch_size,
        "micro_batch_size": best.micro_batch_size,
    }

    def trace() -> str:
        spans = best.timeline.spans
        return json.dumps(chrome_trace(("stage", span.stage, 0.0, [span]) for span in spans))

    for name, text in (
        ("write", lambda: layout_text(best.modules, job)),
        ("trace", trace),
        ("svg", lambda: timeline_svg(best.timeline)),
    ):
        path = getattr(options, name)
        if path and (problem := write_problem(f"--{name}", path, text())):
            yield problem


def as_answer(
    problems: Iterable[dict[str, Any]],
    layouts: Sequence[Layout] = (),
    nearest: Layout | None = None,
    assumptions: Sequence[str] = (),
    opened: Sequence[str] = (),
) -> dict[str, Any]:
    """The answer for scripts, with the same keys whatever it is."""
    return {
        "proposals": list(map(as_json, layouts)),
        "closest": nearest and as_json(nearest),
        "openings": list(opened),
        "assumptions": list(assumptions),
        "problems": list(problems),
    }


# -- the command line ------------------------------------------------------------------------------

READ, WRITTEN = ("model", "layout", "costs"), ("write", "trace", "svg", "measure")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("mimo-plan", __doc__, EXAMPLE, lambda said: as_answer([as_problem(said)]))
    parser.add_argument("model", type=Path, metavar="MODEL", help="the model, as TOML")
    for title, arguments_of in ARGUMENTS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, unit, what in arguments_of:
            shown = "" if default is None else f" (default: {default})"
            kind_of = {"type": kind, "default": default, "metavar": unit}
            group.add_argument(f"--{name}", help=what + shown, **kind_of)
    flags = parser.add_argument_group("how it is told")
    inside = "with --layout: encoders on ranks of the language model's first stage run inside it"
    flags.add_argument("--inside-first-stage", action="store_true", help=inside)
    per_gpu = "best are most samples per second and allocated GPU, not the shortest step"
    flags.add_argument("--per-gpu", action="store_true", help=per_gpu)
    flags.add_argument("--json", action="store_true", help="print JSON, for scripts")
    options = parser.read(arguments)
    if options.layout is None and options.measure is None:
        for name in ("gpus", "global_batch_size"):
            if getattr(options, name) is None:
                parser.error(f"--{name.replace('_', '-')} is needed, unless --layout tells")
    parser.refuse_same_files(options, READ, WRITTEN)
    return options


ARGUMENTS: dict[str, tuple[tuple[str, Any, Any, str, str], ...]] = {
    "what there is": (
        ("gpus", positive, None, "N", "GPUs to rent: whole nodes, and what is left of a last one"),
        ("gpus-per-node", positive, 8, "N", "GPUs of a node"),
        ("memory", size, "80GB", "BYTES", "memory of a GPU, such as 80GB or 80GiB"),
        ("global-batch-size", positive, None, "N", "samples in an optimizer step, over all ranks; "
         "else as in --layout"),
        ("micro-batch-size", positive, None, "N", "samples in a microbatch over all ranks; else "
         "as in --layout, or every one is tried"),
    ),
    "what is assumed": (
        ("costs", Path, None, "FILE", "measured costs, as TOML"),
        ("flops", number, "400", "TFLOP/S", "what a GPU achieves in training, in TFLOP/s"),
        ("memory-bandwidth", number, "2000", "GB/S", "of a GPU's memory"),
        ("node-bandwidth", number, "300", "GB/S", "of a GPU's link inside its node"),
        ("network-bandwidth", number, "40", "GB/S", "of a GPU's link to other nodes"),
        ("node-latency", number, "10", "US", "of a message inside a node, in microseconds"),
        ("network-latency", number, "20", "US", "of a message between nodes, in microseconds"),
        ("reserve", size, "4GB", "BYTES", "memory for CUDA, NCCL and fragmentation"),
    ),
    "what is asked": (
        ("layout", Path, None, "FILE", "cost this layout alone"),
        ("count", positive, 10, "N", "layouts to list"),
        ("write", Path, None, "FILE", "write the best layout, for mimo-layout and read_layout"),
        ("trace", Path, None, "FILE", "write its step as Chrome Trace JSON, for Perfetto"),
        ("svg", Path, None, "FILE", "draw its step"),
        ("measure", Path, None, "FILE", "only time the model's layers on this device, for "
         "--costs, and under torchrun sums over its ranks"),
    ),
}  # fmt: skip
"""Options: name, type, default, unit, and what it is."""
