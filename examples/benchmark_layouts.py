"""What both benchmarks share: their layouts, the options that choose one, and who speaks.

Nothing here needs torch, so that options are checked before it is imported.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator

from attrs import frozen

from megatron_mimo_coord.layout import LANGUAGE, ModuleParallelism

VISION = "vision"
MEGATRON, SLICES, ASSIGNED, AHEAD = "Megatron", "slices", "assigned", "ahead"  # ways to run a step
NO_IMAGES = "without images"
IS_MAIN = os.environ.get("RANK", "0") == "0"  # the rank that speaks for all


@frozen(kw_only=True)
class Layout:
    """Data-parallel sizes of the modules; the language model's stages take the ranks left over."""

    encoder_dp: int
    language_dp: int
    language_pp: int = 1
    colocated: bool = False

    def modules(self) -> dict[str, ModuleParallelism]:
        """Parallel sizes of each module."""
        offset = 0 if self.colocated else None
        return {
            VISION: ModuleParallelism(data_parallel_size=self.encoder_dp, rank_offset=offset),
            LANGUAGE: ModuleParallelism(
                data_parallel_size=self.language_dp,
                pipeline_model_parallel_size=self.language_pp,
                rank_offset=offset,
            ),
        }

    def __str__(self) -> str:
        stages = f" PP {self.language_pp}" if self.language_pp > 1 else ""
        return f"{self.encoder_dp} -> {self.language_dp}{stages}"


def layouts_that_fit(
    world_size: int, wanted: Iterable[tuple[int | None, int | None]]
) -> Iterator[Layout]:
    """Of (encoder DP, language DP) those that fill the ranks with pipeline stages."""
    for encoder, language in wanted:
        if not (encoder and language) or (encoder % language and language % encoder):
            continue
        ranks = world_size - encoder
        if ranks > 0 and not ranks % language:
            yield Layout(encoder_dp=encoder, language_dp=language, language_pp=ranks // language)


# -- options ---------------------------------------------------------------------------------------


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the description as it stands, and the defaults."""


def layout_parser(
    description: str | None,
) -> tuple[argparse.ArgumentParser, argparse._ArgumentGroup]:
    """A parser with --encoder-dp and --language-dp, None if left out, and the group they are in."""
    parser = argparse.ArgumentParser(description=description, formatter_class=Formatter)
    parser.set_defaults(encoder_dp=None, language_dp=None)
    layout = parser.add_argument_group("layout (left out: several that fit the ranks)")
    for module in ("encoder", "language"):
        layout.add_argument(
            f"--{module}-dp",
            type=positive,
            metavar="N",
            default=argparse.SUPPRESS,
            help=f"data-parallel ranks of the {module} module",
        )
    return parser, layout


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, not {text!r}")
    return int(text)


def number_of_ranks(command: str) -> int:
    """How many ranks torchrun has started; exit with the command if it has not."""
    if "WORLD_SIZE" not in os.environ:
        started = " ".join([command, *sys.argv])
        exit_with(f"the benchmark runs on several ranks, which torchrun starts:\n\n  {started}\n")
    return int(os.environ["WORLD_SIZE"])


# -- the rank that speaks for all ------------------------------------------------------------------


def exit_with(message: str) -> None:
    """End this rank as argparse does; torchrun ends all ranks once one has failed."""
    if IS_MAIN:
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(1)
    sys.exit(2)


def note(text: str) -> None:
    """Progress, kept out of the table's way."""
    if IS_MAIN:
        print(text, file=sys.stderr, flush=True)
