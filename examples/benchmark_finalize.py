"""Times how gradients are finalized: by the coordinator, by a functional API, and by DDP alone.

    torchrun --nproc-per-node 4 examples/benchmark_finalize.py

Three finalizers treat the same gradients on the same ranks, in turns:

    bare         Megatron's finalize_model_grads for each module, no normalization: the limit
    functional   the same, then passes over whole buffers and a broadcast of the token count
    coordinator  coordinator.finalize_model_grads

A time is that of the slowest rank of a module, its median over all rounds. A ratio is the median
over rounds of the ratio of two neighbouring runs, so that a machine that slows down slows down
both; behind it stands the interval in which the true median lies 19 times in 20. Where that is too
wide, raise --rounds, or use --clock cpu, which other jobs on the machine disturb less.
"""

import argparse
import itertools
import logging
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence

from attrs import frozen
from benchmark_layouts import (
    IS_MAIN,
    Layout,
    exit_with,
    layout_parser,
    layouts_that_fit,
    note,
    number_of_ranks,
    positive,
)
from tables import interval, show, with_interval

from megatron_mimo_coord.layout import LANGUAGE

BARE, FUNCTIONAL, COORDINATOR = "bare", "functional", "coordinator"
GOALS = {"mean": 1.02, "per-token": 1.05}  # coordinator / bare


@frozen(kw_only=True)
class Case:
    """One way to train."""

    layout: Layout
    loss: str
    overlap: bool
    distributed_optimizer: bool


@frozen
class Measurement:
    """Seconds that a module of a case took in each round, by finalizer."""

    case: Case
    module: str
    seconds: Mapping[str, Sequence[float]]

    @property
    def replicas(self) -> int:
        """Ranks that the module's gradients are reduced over."""
        layout = self.case.layout
        return layout.language_dp if self.module == LANGUAGE else layout.encoder_dp

    def milliseconds(self, finalizer: str) -> float:
        """Median over the rounds."""
        return 1e3 * statistics.median(self.seconds[finalizer])

    def ratios(self, finalizer: str) -> list[float]:
        """Coordinator's time over the finalizer's, round by round."""
        pairs = zip(self.seconds[COORDINATOR], self.seconds[finalizer], strict=True)
        return [coordinator / other for coordinator, other in pairs]


def main() -> None:
    """Check the options, measure, print."""
    options = parse_options()
    layouts = choose_layouts(options)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import finalizers  # torch and Megatron, which take seconds to import
    from job import start_ranks, stop_ranks

    start_ranks()
    measurements: list[Measurement] = []
    findings: list[str] = []
    cases = list(all_cases(layouts, options))
    for layout, group in itertools.groupby(cases, key=lambda case: case.layout):
        with finalizers.process_groups(layout.modules()) as infra:
            for case in group:
                note(f"case {cases.index(case) + 1} of {len(cases)}: {' '.join(cells(case))}")
                bench = finalizers.Bench.build(case, infra, options)
                seconds = bench.measure(options.rounds)
                measured = [Measurement(case, *found) for found in seconds.items()]
                for found in measured:  # at once: what is there stays there, should a run be cut
                    note(f"  {'  '.join(row(found)[len(cells(case)) :])}")
                measurements += measured
                findings += bench.check_on_gpu()
    if IS_MAIN:
        print(finalizers.machine())
        show(HEADER, [row(measurement) for measurement in measurements])
        print("\n".join([*verdicts(measurements), *dict.fromkeys(findings)]))
    stop_ranks()


# -- options: all checked before torch is imported -------------------------------------------------


def parse_options() -> argparse.Namespace:
    """The command line; a layout that is left out is chosen later."""
    parser, layout = layout_parser(__doc__)
    layout.add_argument(
        "--colocated", action="store_true", help="both modules on all ranks, with equal DP"
    )
    cases = parser.add_argument_group("cases (all by default)")
    for name, choices, text in (
        ("loss", ("mean", "per-token"), "the loss's normalization"),
        ("overlap", ("off", "on"), "overlap_grad_reduce"),
        ("optimizer", ("plain", "distributed"), "use_distributed_optimizer"),
    ):
        cases.add_argument(f"--{name}", nargs="+", choices=choices, default=choices, help=text)
    sizes = parser.add_argument_group("sizes: a module has about 12 x layers x hidden^2 weights")
    for module in ("encoder", "language"):
        sizes.add_argument(f"--{module}-hidden", type=positive, default=512, metavar="N", help=" ")
        sizes.add_argument(f"--{module}-layers", type=positive, default=4, metavar="N", help=" ")
    sizes.add_argument(
        "--buckets", type=positive, default=4, metavar="N", help="of a module, where overlap is on"
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=60,
        metavar="N",
        help="runs of each finalizer in a case, 6 or more",
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="wall: from the common start until the rank is done; cpu: the time for which the rank "
        "and its communication threads were running, so without waiting",
    )
    return parser.parse_args()


def choose_layouts(options: argparse.Namespace) -> list[Layout]:
    """Layouts for the ranks that there are; exit with what to do where there is none."""
    world_size = number_of_ranks("torchrun --nproc-per-node 4")
    wanted = [(options.encoder_dp, options.language_dp)]
    if wanted == [(None, None)]:
        wanted = [(4, 2), (4, 1), (2, 1), (2, 2)]
    if options.colocated or world_size < 3:
        return [Layout(encoder_dp=world_size, language_dp=world_size, colocated=True)]
    layouts = [
        layout
        for layout in layouts_that_fit(world_size, wanted)
        if not options.language_layers % layout.language_pp
    ]
    if not layouts:
        exit_with(
            f"no such layout on {world_size} ranks: give both --encoder-dp and --language-dp, one "
            f"a multiple of the other; the ranks that the encoder leaves must be a multiple of "
            f"--language-dp, and its --language-layers (now {options.language_layers}) a multiple "
            f"of the pipeline stages that this makes"
        )
    return layouts[:2]


def all_cases(layouts: Sequence[Layout], options: argparse.Namespace) -> Iterator[Case]:
    """Every combination that the options ask for."""
    for layout, loss, overlap, optimizer in itertools.product(
        layouts, options.loss, options.overlap, options.optimizer
    ):
        yield Case(
            layout=layout,
            loss=loss,
            overlap=overlap == "on",
            distributed_optimizer=optimizer == "distributed",
        )


# -- what it tells ---------------------------------------------------------------------------------


HEADER = (
    *("DP", "loss", "overlap", "optimizer", "module"),
    *("bare ms", "functional ms", "coordinator ms", "coordinator/bare", "coordinator/functional"),
)


def cells(case: Case) -> tuple[str, ...]:
    """A case in words."""
    return (
        str(case.layout),
        case.loss,
        "on" if case.overlap else "off",
        "distributed" if case.distributed_optimizer else "plain",
    )


def row(measurement: Measurement) -> list[str]:
    """A line of the table."""
    times = [f"{measurement.milliseconds(name):.2f}" for name in (BARE, FUNCTIONAL, COORDINATOR)]
    ratios = [with_interval(measurement.ratios(name)) for name in (BARE, FUNCTIONAL)]
    return [*cells(measurement.case), measurement.module, *times, *ratios]


def verdicts(measurements: Sequence[Measurement]) -> Iterator[str]:
    """How many lines of the table reach the goals."""
    reducing = [found for found in measurements if found.replicas > 1]
    for loss, goal in GOALS.items():
        yield verdict(loss, BARE, goal, reducing)
        yield verdict(loss, FUNCTIONAL, 1.0, measurements)
    if len(reducing) < len(measurements):
        yield "(a module with DP 1 has nothing to reduce: its bare time is no measure)"


def verdict(loss: str, finalizer: str, limit: float, measurements: Sequence[Measurement]) -> str:
    """How many lines reach one goal."""
    ratios = [found.ratios(finalizer) for found in measurements if found.case.loss == loss]
    reached = sum(statistics.median(values) <= limit for values in ratios)
    missed = sum(interval(values)[0] > limit for values in ratios)
    return (
        f"{loss}: coordinator <= {limit:.2f} x {finalizer} in {reached} of {len(ratios)} lines, "
        f"and slower beyond the noise in {missed}"
    )


if __name__ == "__main__":
    main()
