"""The command line of train_digits_vlm.py, all of it checked before torch is imported."""

import argparse
import math
import os
import sys
from functools import cache
from pathlib import Path

import checkpoint

from megatron_mimo_coord.layout import (
    LANGUAGE,
    ModuleParallelism,
    default_topology,
    pack,
    ranks_taken,
)
from megatron_mimo_coord.layout.batch import batch_problems
from megatron_mimo_coord.layout.problems import layout_problems
from megatron_mimo_coord.layout.toml_file import LayoutFile
from megatron_mimo_coord.training.checkpoint_folder import checkpoint_steps

VISION = "vision"
HEADS = 4  # of attention, in either module
SAVE_INTERVAL = 50

layout_file = cache(LayoutFile.read)  # what was checked is what runs: the file is read once


def parse_options(description: str = "") -> argparse.Namespace:
    """The command line, with None for what was left out and has no default."""

    class Formatter(
        argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    ): ...

    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=Formatter,
        epilog="examples:\n"
        "  two ranks for each module, the language model cut in two tensor-parallel parts:\n"
        "    torchrun --nproc-per-node 4 examples/train_digits_vlm.py \\\n"
        "      --language-tensor-parallel 2 --language-pipeline-parallel 1\n"
        "  both modules on the same two ranks:\n"
        "    torchrun --nproc-per-node 2 examples/train_digits_vlm.py --colocated \\\n"
        "      --language-pipeline-parallel 1 --language-data-parallel 2\n"
        "  read pages with up to eight digits, which the encoder's ranks share evenly:\n"
        "    torchrun --nproc-per-node 4 examples/train_digits_vlm.py \\\n"
        "      --images-per-sample 8 --assign\n"
        "  start again by itself, up to three times, after a rank was lost:\n"
        "    torchrun --nproc-per-node 4 --max-restarts 3 examples/train_digits_vlm.py \\\n"
        "      --save checkpoints --load checkpoints\n",
    )
    for module, pipeline, data, layers in ((VISION, 1, 2, 2), (LANGUAGE, 2, 1, 2)):
        group = parser.add_argument_group(f"{module} module", "TP x PP x DP ranks of its own")
        for kind, letter, default, what in (
            ("tensor", "t", 1, "TP: ranks that share each layer's weights"),
            ("pipeline", "p", pipeline, "PP: stages that share the layers"),
            ("data", "d", data, "DP: replicas that share the batch"),
        ):
            group.add_argument(
                f"--{module}-{kind}-parallel",
                f"--{module}-{letter}p",
                type=positive,
                default=default,
                metavar="N",
                help=what,
            )
        group.add_argument(
            f"--{module}-rank-offset",
            type=int,
            default=argparse.SUPPRESS,
            metavar="RANK",
            help="first rank of the module; left out, vision starts at 0 and language behind it",
        )
        group.add_argument(
            f"--{module}-layers",
            type=positive,
            default=layers,
            metavar="N",
            help="transformer layers in the module",
        )
    parser.add_argument(
        "--layout",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="both modules' parallel sizes and ranks from a TOML file, as mimo-layout shows it; "
        "instead of the options above",
    )
    parser.add_argument(
        "--colocated",
        action="store_true",
        help="both modules share all ranks (each with PP 1) and take turns on them",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--loss",
        choices=("per-token", "mean"),
        default="per-token",
        help="what a step minimises: the mean over all letters of the global batch, or the mean "
        "over microbatches and replicas of each one's own mean",
    )
    training.add_argument(
        "--steps", type=positive, default=400, metavar="N", help="optimizer steps"
    )
    training.add_argument(
        "--global-batch-size",
        type=positive,
        default=256,
        metavar="N",
        help="samples in an optimizer step",
    )
    training.add_argument(
        "--micro-batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="samples in a microbatch, over all ranks; each module deals them out to its replicas",
    )
    training.add_argument(
        "--images-per-sample",
        type=positive,
        default=1,
        metavar="N",
        help="1: an image, whose name is spelled out; more: a page of 0 to N digits, most pages "
        "with few, and a numeral is written for each",
    )
    training.add_argument(
        "--assign",
        action="store_true",
        help="deal images out to the encoder's ranks by cost, not in slices of samples",
    )
    training.add_argument(
        "--lr", type=float, default=3e-3, help="highest learning rate, between warmup and decay"
    )
    training.add_argument(
        "--seed", type=int, default=1, help="of the weights and of the order of the images"
    )
    training.add_argument(
        "--distributed-optimizer",
        action="store_true",
        help="each replica keeps the optimizer's state of only its share of the weights",
    )
    training.add_argument(
        "--overlap-grad-reduce",
        action="store_true",
        help="reduce gradients while backward still computes others",
    )

    training.add_argument(
        "--rehearse",
        action="store_true",
        help="on CPU ranks that demand what NCCL demands: what would hang on GPUs is an error",
    )

    add_checkpoint_options(parser)

    output = parser.add_argument_group("output")
    output.add_argument(
        "--eval-interval",
        type=positive,
        default=argparse.SUPPRESS,
        metavar="STEPS",
        help="read the held-out images every so many steps too (default: ten times in all with "
        "--plot, else only at the end)",
    )
    output.add_argument(
        "--plot",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="draw loss and accuracy over the steps (.png, .svg, .pdf)",
    )
    output.add_argument(
        "--log-losses",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="write one JSON line a step with the loss and the gradient norm, at full precision",
    )
    output.add_argument(
        "--timeline",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="record what every rank does in the last three steps: a trace for Perfetto, a table "
        "at the end, and costs.toml beside the trace for mimo-plan",
    )
    optional = ("vision_rank_offset", "language_rank_offset", "eval_interval", "plot", "log_losses")
    optional += ("timeline",)
    optional += ("layout", "save", "save_interval", "load")
    defaults = argparse.Namespace(**dict.fromkeys(optional))
    options = parser.parse_args(namespace=defaults)
    if options.layout:
        clashing = [
            name
            for name in vars(options)
            if (name.endswith(("_parallel", "_rank_offset")) or name == "colocated")
            and getattr(options, name) not in (None, parser.get_default(name))
        ]
        if clashing:
            parser.error(
                f"--layout has all parallel sizes: leave out "
                f"{', '.join('--' + name.replace('_', '-') for name in clashing)}"
            )
    if options.plot and not options.eval_interval:
        options.eval_interval = max(1, options.steps // 10)
    if options.save and not options.save_interval:
        options.save_interval = SAVE_INTERVAL
    return options


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Where checkpoints are kept, and where training goes on from."""
    checkpoints = parser.add_argument_group("checkpoints")
    checkpoints.add_argument(
        "--save",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="keep the last two checkpoints in this folder, which all ranks must share; the last "
        "step makes one too",
    )
    checkpoints.add_argument(
        "--save-interval",
        type=positive,
        default=argparse.SUPPRESS,
        metavar="STEPS",
        help=f"make a checkpoint every so many steps (default: {SAVE_INTERVAL})",
    )
    checkpoints.add_argument(
        "--load",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="go on from the newest checkpoint in this folder, on the same layout or another; "
        "from the beginning if there is none yet and this is also the folder of --save",
    )


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, not {text!r}")
    return int(text)


def parallelism(options: argparse.Namespace) -> dict[str, ModuleParallelism]:
    """Parallel sizes of each module."""
    if options.layout:
        return layout_file(options.layout).modules
    return {
        module: ModuleParallelism(
            tensor_model_parallel_size=getattr(options, f"{module}_tensor_parallel"),
            pipeline_model_parallel_size=getattr(options, f"{module}_pipeline_parallel"),
            data_parallel_size=getattr(options, f"{module}_data_parallel"),
            rank_offset=0 if options.colocated else getattr(options, f"{module}_rank_offset"),
        )
        for module in (VISION, LANGUAGE)
    }


def what_is_wrong(options: argparse.Namespace) -> str:
    """Every problem that the options have, or how to start the ranks; empty if all is well."""
    problems = file_problems(options) or option_problems(options)
    if not problems:
        grids = pack(parallelism(options))
        ranks = ranks_taken(grids.values())
        if "WORLD_SIZE" not in os.environ:
            command = " ".join(["torchrun --nproc-per-node", str(ranks), *sys.argv])
            return f"this layout takes {ranks} ranks, which torchrun starts:\n\n  {command}\n"
        problems = [
            *layout_problems(grids, default_topology(grids), int(os.environ["WORLD_SIZE"])),
            *batch_problems(grids.values(), options.global_batch_size, options.micro_batch_size),
        ]
    if not problems:
        return ""
    return "\n".join(["these options cannot run:", *(f"  - {problem}" for problem in problems)])


def file_problems(options: argparse.Namespace) -> list[str]:
    """What keeps the file of ``--layout`` from being a layout of these two modules."""
    if not options.layout:
        return []
    try:
        layout = layout_file(options.layout)
    except ValueError as error:
        return [str(error)]
    world_size = os.environ.get("WORLD_SIZE")
    problems: list[str] = [
        layout.located(problem)
        for problem in layout.problems_on(int(world_size) if world_size else None)
    ]
    if set(layout.modules) != {VISION, LANGUAGE}:
        problems.append(
            f"{options.layout} has the modules {', '.join(layout.modules) or 'of nobody'}; this "
            f"example trains [{VISION}] and [{LANGUAGE}]"
        )
    return problems


def option_problems(options: argparse.Namespace) -> list[str]:
    """What the options alone tell, without the number of ranks."""
    problems = []
    for module, sizes in parallelism(options).items():
        tp, pp = sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size
        layers = getattr(options, f"{module}_layers")
        if HEADS % tp:
            problems.append(
                f"{module} has TP {tp}, which does not divide its {HEADS} attention heads; use "
                f"tensor-parallel size 1, 2 or 4"
            )
        if layers % pp:
            problems.append(
                f"{module} has PP {pp}, which does not divide its {layers} layers; use "
                f"--{module}-layers {math.ceil(layers / pp) * pp} or another pipeline-parallel size"
            )
        if options.colocated and getattr(options, f"{module}_rank_offset") is not None:
            problems.append(
                f"--colocated gives all ranks to both modules, so --{module}-rank-offset has no "
                f"meaning; leave one of the two out"
            )
        elif (getattr(options, f"{module}_rank_offset") or 0) < 0:
            problems.append(f"--{module}-rank-offset must be a rank, 0 or more")
    if options.lr <= 0:
        problems.append(f"--lr must be more than 0, not {options.lr}")
    for name in ("plot", "log_losses", "save"):
        path = getattr(options, name)
        if path and not path.absolute().parent.is_dir():
            problems.append(f"--{name.replace('_', '-')} {path}: there is no folder {path.parent}")
    return problems + checkpoint_problems(options)


def checkpoint_problems(options: argparse.Namespace) -> list[str]:
    """What the options and the checkpoints already there tell."""
    save, load = options.save, options.load
    goes_on = save is not None and load is not None and save.resolve() == load.resolve()
    problems = []
    if options.save_interval and not save:
        problems.append("--save-interval has no meaning without --save; give that a folder")
    if save and save.exists() and not save.is_dir():
        problems.append(f"--save {save} is not a folder; give one that is, or a new name")
    if save and not goes_on and checkpoint_steps(save):
        problems.append(
            f"--save {save} already has checkpoints; add --load {save} to go on from the newest, "
            f"or give another folder"
        )
    if save and not goes_on and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        problems.append(
            f"--max-restarts starts the same command again, which must then go on from its own "
            f"checkpoints: add --load {save}"
        )
    if load and checkpoint_steps(load):
        problems += checkpoint.problems(load, options)
    elif load and not goes_on:
        problems.append(
            f"--load {load} has no whole checkpoint; give a folder that has, or the same one as "
            f"--save to start from the beginning"
        )
    return problems
