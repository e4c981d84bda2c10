"""Teaches a vision encoder and a language model, each on its own ranks, to read handwritten digits.

    torchrun --nproc-per-node 4 examples/train_digits_vlm.py

The images are the 1,797 that scikit-learn ships. The model sees one, cut into patches, and spells
out which digit it is, letter by letter. At the end it reads images that it was never trained on.
"""

import argparse
import contextlib
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from megatron_mimo_coord.batch import batch_problems
from megatron_mimo_coord.layout import (
    LANGUAGE,
    ModuleParallelism,
    default_topology,
    pack,
)
from megatron_mimo_coord.problems import layout_problems

VISION = "vision"
HIDDEN, HEADS = 64, 4  # of either module
IS_MAIN = os.environ.get("RANK", "0") == "0"  # the rank that speaks for all


def main() -> None:
    """Check the options, train, read, tell."""
    with first_rank_speaks():
        options = parse_options()
        check_or_exit(options)
    with quiet():  # heavy imports wait until the options are known to be good
        import digits
        import digits_report
        from digits_trainer import Trainer, model_shape, train
        from job import start_ranks

        start_ranks()
        trainer = Trainer.build(parallelism(options), model_shape(options, HIDDEN, HEADS), options)
    learn, held_out = digits.load()
    steps = train(trainer, learn, held_out, options)
    if IS_MAIN:
        print(trainer.coordinator.describe(options.micro_batch_size))
        print(f"{len(learn.digits)} images to learn from, {len(held_out.digits)} held out\n")
        steps = digits_report.with_progress(steps, options.steps)
        if options.log_losses:
            steps = digits_report.with_log(steps, options.log_losses)
    history = list(steps)
    words = trainer.read(held_out.images)
    if IS_MAIN:
        digits_report.show_reading(held_out, words)
        if options.plot:
            digits_report.plot(history, options.plot)
    trainer.destroy()


# -- options: all checked before any process group exists ------------------------------------------


def parse_options() -> argparse.Namespace:
    """The command line, with None for what was left out and has no default."""

    class Formatter(
        argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    ): ...

    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=Formatter,
        epilog="examples:\n"
        "  two ranks for each module, the language model cut in two tensor-parallel parts:\n"
        "    torchrun --nproc-per-node 4 examples/train_digits_vlm.py \\\n"
        "      --language-tensor-parallel 2 --language-pipeline-parallel 1\n"
        "  both modules on the same two ranks:\n"
        "    torchrun --nproc-per-node 2 examples/train_digits_vlm.py --colocated \\\n"
        "      --language-pipeline-parallel 1 --language-data-parallel 2\n",
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
        help="images in an optimizer step",
    )
    training.add_argument(
        "--micro-batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="images in a microbatch, over all ranks; each module deals them out to its replicas",
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
    optional = ("vision_rank_offset", "language_rank_offset", "eval_interval", "plot", "log_losses")
    defaults = argparse.Namespace(**dict.fromkeys(optional))
    options = parser.parse_args(namespace=defaults)
    if options.plot and not options.eval_interval:
        options.eval_interval = max(1, options.steps // 10)
    return options


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, not {text!r}")
    return int(text)


def parallelism(options: argparse.Namespace) -> dict[str, ModuleParallelism]:
    """Parallel sizes of each module."""
    return {
        module: ModuleParallelism(
            tensor_model_parallel_size=getattr(options, f"{module}_tensor_parallel"),
            pipeline_model_parallel_size=getattr(options, f"{module}_pipeline_parallel"),
            data_parallel_size=getattr(options, f"{module}_data_parallel"),
            rank_offset=0 if options.colocated else getattr(options, f"{module}_rank_offset"),
        )
        for module in (VISION, LANGUAGE)
    }


def check_or_exit(options: argparse.Namespace) -> None:
    """Exit with code 2 and every problem that the options have; say how to start the ranks."""
    problems = option_problems(options)
    if not problems:
        grids = pack(parallelism(options))
        ranks = max(grid.ranks.stop for grid in grids.values())
        if "WORLD_SIZE" not in os.environ:
            command = " ".join(["torchrun --nproc-per-node", str(ranks), *sys.argv])
            exit_with(f"this layout takes {ranks} ranks, which torchrun starts:\n\n  {command}\n")
        problems = layout_problems(grids, default_topology(grids), int(os.environ["WORLD_SIZE"]))
        problems += batch_problems(
            grids.values(),
            options.global_batch_size,
            options.micro_batch_size,
            options.global_batch_size // options.micro_batch_size,
        )
    if problems:
        exit_with("\n".join(["these options cannot run:", *(f"  - {text}" for text in problems)]))


def option_problems(options: argparse.Namespace) -> list[str]:
    """What the options alone tell, without the number of ranks."""
    problems = []
    for module, sizes in parallelism(options).items():
        tp, pp = sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size
        layers = getattr(options, f"{module}_layers")
        if HEADS % tp:
            problems.append(
                f"{module} has TP {tp}, which does not divide its {HEADS} attention heads; use "
                f"--{module}-tensor-parallel 1, 2 or 4"
            )
        if layers % pp:
            problems.append(
                f"{module} has PP {pp}, which does not divide its {layers} layers; use "
                f"--{module}-layers {math.ceil(layers / pp) * pp} or another "
                f"--{module}-pipeline-parallel"
            )
        if options.colocated and getattr(options, f"{module}_rank_offset") is not None:
            problems.append(
                f"--colocated gives all ranks to both modules, so --{module}-rank-offset has no "
                f"meaning; leave one of the two out"
            )
        elif (getattr(options, f"{module}_rank_offset") or 0) < 0:
            problems.append(f"--{module}-rank-offset must be a rank, 0 or more")
    if options.global_batch_size % options.micro_batch_size:
        problems.append(
            f"--global-batch-size {options.global_batch_size} is not a multiple of "
            f"--micro-batch-size {options.micro_batch_size}; change one of the two"
        )
    if options.lr <= 0:
        problems.append(f"--lr must be more than 0, not {options.lr}")
    for name in ("plot", "log_losses"):
        path = getattr(options, name)
        if path and not path.absolute().parent.is_dir():
            problems.append(f"--{name.replace('_', '-')} {path}: there is no folder {path.parent}")
    return problems


def exit_with(message: str) -> None:
    """End this rank as argparse does."""
    print(message, file=sys.stderr, flush=True)
    sys.exit(2)


@contextlib.contextmanager
def first_rank_speaks() -> Iterator[None]:
    """Keep the other ranks silent, and alive until the first has spoken.

    torchrun ends all ranks as soon as one of them exits with an error.
    """
    if IS_MAIN:
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            yield
        except SystemExit:
            time.sleep(2)
            raise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, and while libraries are imported their log: none is about this training."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    main()
