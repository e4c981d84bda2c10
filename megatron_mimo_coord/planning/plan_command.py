"""Proposes layouts for a model and some GPUs: step time, idle time, memory, empty GPUs.

Every layout whose sizes divide is considered, on ranks of its own or colocated, with every
microbatch; steps are simulated, seconds estimated from the model's sizes or read from a file of
measured costs. Neither torch nor Megatron-Core is imported. Installed as mimo-plan.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_mimo_coord import __version__
from megatron_mimo_coord.layout.toml_file import layout_text
from megatron_mimo_coord.planning.closest import closest, shortages
from megatron_mimo_coord.planning.plan_inputs import Inputs
from megatron_mimo_coord.planning.plan_report import as_json, headline, memory_rows, rows
from megatron_mimo_coord.planning.search import Proposal, cost, propose
from megatron_mimo_coord.planning.terminal import (
    answer,
    drawn,
    end,
    need_rich,
    positive,
    print_tables,
    write_problem,
)
from megatron_mimo_coord.planning.timeline_drawing import timeline_svg
from megatron_mimo_coord.planning.trace import chrome_trace, stage_threads

EXAMPLE = """\
a model file has a table for each module, with the names and the defaults of Megatron's
TransformerConfig, GPTModel and DistributedDataParallelConfig; above the tables stands what all
modules have:

  params_dtype = "bf16"              # or "fp16", "fp32"
  use_distributed_optimizer = true
  grad_reduce_in_fp32 = true

  [vision]
  num_layers = 24
  hidden_size = 1024
  num_attention_heads = 16
  patch_size = 588                   # numbers of a patch, which a linear layer embeds
  tokens_per_image = 576             # inside the encoder; output_tokens_per_image if fewer come out
  images_per_sample = 1.5            # on average; max_images_per_sample for the memory
  frozen = false

  [language]
  num_layers = 32
  hidden_size = 4096
  num_attention_heads = 32
  num_query_groups = 8
  ffn_hidden_size = 14336
  gated_linear_unit = true
  vocab_size = 128256                # with padding
  seq_length = 4096

what else there is: kv_channels, add_bias_linear, add_qkv_bias, normalization, qk_layernorm,
hidden_dropout, attention_dropout, attention_backend, bias_activation_fusion,
masked_softmax_fusion, sequence_parallel, position_embedding_type,
share_embeddings_and_output_weights, num_moe_experts, moe_layer_freq, moe_ffn_hidden_size,
moe_router_topk, moe_shared_expert_intermediate_size, recompute_granularity, recompute_method,
recompute_num_layers, recompute_modules, deallocate_pipeline_outputs, overlap_grad_reduce,
bucket_size, pad_buckets_for_high_nccl_busbw, projection_hidden_size

exit code 0 if a layout fits (with --layout, that one), 2 if none does or something is wrong, 1 if
the answer cannot be written
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Propose layouts, as the command line wants it."""
    options = parse(arguments)
    answer(lambda: plan(options))


def plan(options: argparse.Namespace) -> None:
    """Show the best layouts, or what one costs; end with code 2 if there is none."""
    if not options.json:
        need_rich()
    inputs = Inputs.of(options)
    if inputs.problems:
        end_with(inputs.problems, f"{options.model} cannot be planned:", options)
    assert inputs.task, "there are no problems"
    if inputs.modules:
        assert inputs.micro_batch_size, "there are no problems"
        proposals = [cost(inputs.task, inputs.modules, inputs.micro_batch_size)]
    else:
        proposals = propose(inputs.task, options.count, per_gpu=options.per_gpu)
    if not proposals:
        found = closest(inputs.task)
        head = f"no layout fits into {options.gpus} GPUs of {options.memory}:"
        end_with(as_problems(found.reasons), head, options, found.layout, inputs.assumptions)
    problems = as_problems(
        [
            *(f"the layout does not fit: {why}" for why in shortages(proposals[0])),
            *write_files(proposals[0], options),
        ]
    )
    if options.json:
        print_json(problems, proposals, assumptions=inputs.assumptions)
    else:
        show(inputs, proposals)
    if problems and not options.json:
        end("\n".join(problem["text"] for problem in problems))
    if problems:
        raise SystemExit(2)


def show(inputs: Inputs, proposals: Sequence[Proposal]) -> None:
    """Numbers in the terminal."""
    assert inputs.task, "there are no problems"
    titles, *table = rows(proposals)
    parts = [drawn(titles, table, numbers=True)]
    memory_titles, *memory = memory_rows(proposals[0])
    title = "memory of a GPU in GB" if inputs.modules else "memory of a GPU in GB, layout 1"
    parts.append(drawn(memory_titles, memory, title=title, numbers=True))
    print_tables(headline(inputs.task.room, len(proposals), bool(inputs.modules)), *parts)
    print("\n".join(["assumed:", *(f"  - {line}" for line in inputs.assumptions)]))


def write_files(best: Proposal, options: argparse.Namespace) -> Iterator[str]:
    """Write the files that options ask for; what went wrong."""
    job = {
        "global_batch_size": best.room.global_batch_size,
        "micro_batch_size": best.micro_batch_size,
    }
    texts: dict[str, Callable[[], str]] = {
        "write": lambda: layout_text(best.modules, job),
        "trace": lambda: json.dumps(chrome_trace(stage_threads(best.timeline))),
        "svg": lambda: timeline_svg(best.timeline),
    }
    for name, text in texts.items():
        path = getattr(options, name)
        if path and (problem := write_problem(f"--{name}", path, text())):
            yield problem


def as_problems(messages: Iterable[str]) -> list[dict[str, Any]]:
    """Problems that are in no file, in types that JSON knows."""
    return [{"message": message, "places": [], "text": message} for message in messages]


def print_json(
    problems: Sequence[dict[str, Any]],
    proposals: Sequence[Proposal] = (),
    nearest: Proposal | None = None,
    assumptions: Sequence[str] = (),
) -> None:
    """The answer for scripts, with the same keys whatever it is."""
    said = {
        "proposals": list(map(as_json, proposals)),
        "closest": nearest and as_json(nearest),
        "assumptions": list(assumptions),
        "problems": list(problems),
    }
    print(json.dumps(said, indent=2))


def end_with(
    problems: Sequence[dict[str, Any]],
    head: str,
    options: argparse.Namespace,
    nearest: Proposal | None = None,
    assumptions: Sequence[str] = (),
) -> NoReturn:
    """End with code 2, having told all problems."""
    if options.json:
        print_json(problems, nearest=nearest, assumptions=assumptions)
        raise SystemExit(2)
    end("\n".join([head, *(f"  - {problem['text']}" for problem in problems)]))


# -- the command line ------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Ends with JSON where that is asked for, be it that the rest is wrong."""

    is_json = False

    def error(self, message: str) -> NoReturn:
        """End with code 2 and a message."""
        if not self.is_json:
            super().error(message)
        print_json(as_problems([message]))
        raise SystemExit(2)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="mimo-plan",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.is_json = "--json" in (sys.argv if arguments is None else arguments)
    parser.add_argument("model", type=Path, metavar="MODEL", help="the model, as TOML")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    _add_room(parser.add_argument_group("what there is"))
    _add_assumptions(parser.add_argument_group("what is assumed"))
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--layout", type=Path, metavar="FILE", help="cost this layout alone")
    asked.add_argument(
        "--count", type=positive, default=10, metavar="N", help="layouts to list (default: 10)"
    )
    asked.add_argument(
        "--per-gpu",
        action="store_true",
        help="best are most samples per second and allocated GPU, not the shortest step",
    )
    for name, what in (
        ("write", "write the best layout, for mimo-layout and read_layout"),
        ("trace", "write its step as Chrome Trace JSON, for Perfetto"),
        ("svg", "draw its step"),
    ):
        asked.add_argument(f"--{name}", type=Path, metavar="FILE", help=what)
    asked.add_argument("--json", action="store_true", help="print JSON, for scripts")
    options = parser.parse_args(arguments)
    if options.layout is None:
        for name in ("gpus", "global_batch_size"):
            if getattr(options, name) is None:
                parser.error(f"--{name.replace('_', '-')} is needed, unless --layout tells")
    _refuse_same_files(parser, options)
    return options


def _refuse_same_files(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """No file is written over another."""
    known: dict[Path, str] = {}
    for name in ("model", "layout", "costs", "write", "trace", "svg"):
        path = getattr(options, name)
        if path is None:
            continue
        if path.resolve() in known and name in ("write", "trace", "svg"):
            parser.error(f"--{name} {path} is {known[path.resolve()]} too: give another file")
        known[path.resolve()] = f"--{name}" if name != "model" else "the model"


def _add_room(group: Any) -> None:
    group.add_argument(
        "--gpus",
        type=positive,
        metavar="N",
        help="GPUs that can be rented: whole nodes, and what is left over of a last one",
    )
    group.add_argument(
        "--gpus-per-node", type=positive, default=8, metavar="N", help="GPUs of a node (default: 8)"
    )
    group.add_argument(
        "--memory",
        type=size,
        default=size("80GB"),
        metavar="BYTES",
        help="memory of a GPU, such as 80GB or 80GiB (default: 80GB)",
    )
    group.add_argument(
        "--global-batch-size",
        type=positive,
        metavar="N",
        help="samples in an optimizer step, over all ranks; else as in --layout",
    )
    group.add_argument(
        "--micro-batch-size",
        type=positive,
        metavar="N",
        help="samples in a microbatch over all ranks; else as in --layout, or every one is tried",
    )


def _add_assumptions(group: Any) -> None:
    group.add_argument("--costs", type=Path, metavar="FILE", help="measured costs, as TOML")
    for name, default, unit, what in (
        ("flops", 400.0, "TFLOP/S", "what a GPU achieves in training, in TFLOP/s"),
        ("memory-bandwidth", 2000.0, "GB/S", "of a GPU's memory"),
        ("node-bandwidth", 300.0, "GB/S", "of a GPU's link inside its node"),
        ("network-bandwidth", 40.0, "GB/S", "of a GPU's link to other nodes"),
        ("node-latency", 10.0, "US", "of a message inside a node, in microseconds"),
        ("network-latency", 20.0, "US", "of a message between nodes, in microseconds"),
    ):
        group.add_argument(
            f"--{name}",
            type=number,
            default=default,
            metavar=unit,
            help=f"{what} (default: {default:g})",
        )
    group.add_argument(
        "--reserve",
        type=size,
        default=size("4GB"),
        metavar="BYTES",
        help="memory for CUDA, NCCL and fragmentation (default: 4GB)",
    )


class Bytes(float):
    """A number of bytes that remembers how it was written."""

    text: str

    def __str__(self) -> str:
        return self.text


def size(text: str) -> Bytes:
    """An argument that is a size of memory."""
    units = {"B": 1, "MB": 1e6, "GB": 1e9, "MiB": 2**20, "GiB": 2**30, "TB": 1e12}
    digits = text.rstrip("BiGMT")
    try:
        value = Bytes(float(digits) * units[text[len(digits) :]])
    except (ValueError, KeyError):
        value = Bytes("nan")
    if not 0 <= value < 1e18:
        raise argparse.ArgumentTypeError(f"must be a size such as 80GB or 80GiB, not {text!r}")
    value.text = text
    return value


def number(text: str) -> float:
    """An argument that is a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e12:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value
