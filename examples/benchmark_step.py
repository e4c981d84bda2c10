"""Times whole steps: images in consecutive slices against images that are dealt out by cost.

    torchrun --nproc-per-node 6 examples/benchmark_step.py
    torchrun --nproc-per-node 4 examples/benchmark_step.py --encoder real
    torchrun --nproc-per-node 4 examples/benchmark_step.py --shared
    torchrun --nproc-per-node 4 examples/benchmark_step.py --ahead 2 --microbatches 8

Three ways to run the same steps on the same ranks, in turns:

    Megatron  consecutive slices of samples, Megatron's own communicator; where an encoder has more
              data-parallel ranks than the language model (fan-in), it cannot carry uneven samples
    slices    the same, with coordinator.build_pipeline_communicator
    assigned  coordinator.assign_images, and that communicator

Images per sample are the same (none), or log-normal(0.6, sigma) and at most 16, with sigma 0.5
(mild) or 1.0 (strong, and sorted, where samples with many images come first, as a loader may have
it that batches like with like). A sleeping encoder takes a fixed time for each image and no core,
as on a device of its own, so that a few cores can show many ranks; a real one computes.

A time is that of the slowest rank, its median over the rounds. A ratio is the median over rounds of
the ratio of two neighbouring runs on the same data; behind it stands the interval in which the true
median lies 19 times in 20. What can be reached is mean / largest: the load of an encoder rank in a
step, on average over the ranks, and of the one that has most. (Ranks run ahead of each other by as
many microbatches as the pipeline is deep, so skew that changes sides evens out in part.)

With --shared four ranks hold both an encoder of DP 4 and a language model of PP 2 x DP 2, whose
layers sleep too: coordinator.forward_backward_func runs the encoders before and after the pipeline.
At best a step takes what it takes without images, and a fourth of the encoder's work. Beside it
stand layouts on which the modules have ranks of their own.

With --ahead the encoder is frozen and runs ahead by so many microbatches, or not, and the language
model's layers sleep as long for a microbatch, forward and backward. Each step that is timed comes
behind another one.
"""

import argparse
import itertools
import logging
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence

from attrs import frozen
from benchmark_layouts import (
    AHEAD,
    ASSIGNED,
    IS_MAIN,
    MEGATRON,
    NO_IMAGES,
    SLICES,
    Layout,
    exit_with,
    layout_parser,
    layouts_that_fit,
    note,
    number_of_ranks,
    positive,
)
from tables import interval, show, with_interval

SKEWS = ("none", "mild", "strong", "sorted")
SKEWED_GOAL, EVEN_GOAL = 1.15, 1.02


@frozen(kw_only=True)
class Case:
    """One kind of steps."""

    layout: Layout
    skew: str

    @property
    def ways(self) -> tuple[str, ...]:
        """Which of the three ways can run it."""
        is_fan_in = self.layout.encoder_dp > self.layout.language_dp
        uneven = is_fan_in and self.skew != "none"
        return (SLICES, ASSIGNED) if uneven else (MEGATRON, SLICES, ASSIGNED)


@frozen(kw_only=True)
class Measurement:
    """What each round of a case gave.

    Args:
        case: the kind of steps.
        seconds: for each way, the time of the slowest rank in each round.
        imbalance: for ``slices`` and ``assigned``, largest / mean load in each round.
        encoder: the seconds that the encoder takes in each round if its ranks share it evenly.
    """

    case: Case
    seconds: Mapping[str, Sequence[float]]
    imbalance: Mapping[str, Sequence[float]]
    encoder: Sequence[float]

    def ratios(self, way: str, other: str) -> list[float]:
        """One way's time over another's, round by round."""
        return [a / b for a, b in zip(self.seconds[way], self.seconds[other], strict=True)]

    @property
    def goal(self) -> float:
        """What assigned / slices must not exceed."""
        if self.case.skew == "none":
            return EVEN_GOAL
        return SKEWED_GOAL / statistics.median(self.imbalance[SLICES])


def main() -> None:
    """Check the options, measure, print."""
    options = parse_options()
    layouts = shared_layouts() if options.shared else choose_layouts(options)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import steps  # torch and Megatron, which take seconds to import
    from job import start_ranks, stop_ranks

    start_ranks()
    if options.shared or options.ahead:
        compare = compare_shared if options.shared else compare_ahead
        compare(layouts, options)
        stop_ranks()
        return
    measurements = []
    for layout in layouts:
        with steps.Bench.build(layout.modules(), options) as bench:
            for skew in options.skew:
                case = Case(layout=layout, skew=skew)
                found = Measurement(case=case, **bench.measure(case.ways, skew))
                measurements.append(found)
                note("  ".join(row(found)))  # at once, should the run be cut
    if IS_MAIN:
        print(steps.machine(options))
        show(HEADER, [row(found) for found in measurements])
        print("\n".join(verdicts(measurements)))
    stop_ranks()


# -- options: all checked before torch is imported -------------------------------------------------


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser, _ = layout_parser(__doc__)
    work = parser.add_argument_group("work")
    work.add_argument("--skew", nargs="+", choices=SKEWS, default=SKEWS, help="of the images")
    work.add_argument(
        "--encoder",
        choices=("sleeping", "real"),
        default="sleeping",
        help="what an image costs the encoder: time, or computation",
    )
    work.add_argument(
        "--milliseconds",
        type=float,
        default=8.0,
        help="that a sleeping encoder takes forward for each image, and twice that backward",
    )
    work.add_argument(
        "--encoder-hidden", type=positive, default=256, metavar="N", help="width of a real encoder"
    )
    work.add_argument(
        "--micro-batch-size", type=positive, default=16, metavar="N", help="samples of all ranks"
    )
    work.add_argument(
        "--microbatches", type=positive, default=3, metavar="N", help="microbatches in a step"
    )
    work.add_argument(
        "--shared", action="store_true", help="on four ranks: both modules on all, or on their own"
    )
    work.add_argument(
        "--ahead", type=int, default=0, metavar="N", help="microbatches that a frozen encoder runs"
    )
    parser.add_argument(
        "--rounds", type=positive, default=10, metavar="N", help="steps of each way and case"
    )
    return parser.parse_args()


def choose_layouts(options: argparse.Namespace) -> list[Layout]:
    """Layouts for the ranks that there are; exit with what to do where there is none."""
    world_size = number_of_ranks("torchrun --nproc-per-node 6")
    wanted = [(options.encoder_dp, options.language_dp)]
    if wanted == [(None, None)]:
        wanted = [(4, 2), (2, 2), (4, 1), (2, 1)]
    layouts = [
        layout
        for layout in layouts_that_fit(world_size, wanted)
        if not options.micro_batch_size % max(layout.encoder_dp, layout.language_dp)
    ]
    if not layouts:
        exit_with(
            f"no such layout on {world_size} ranks: give both --encoder-dp and --language-dp, one "
            f"a multiple of the other and both dividing --micro-batch-size "
            f"{options.micro_batch_size}; the ranks that the encoder leaves must be a multiple of "
            f"--language-dp"
        )
    return layouts[:2]


# -- encoders on ranks of a pipelined language model -----------------------------------------------


def shared_layouts() -> list[Layout]:
    """The one that shares its ranks, then others on as many."""
    world_size = number_of_ranks("torchrun --nproc-per-node 4")
    if world_size != 4:
        exit_with(f"--shared compares layouts of 4 ranks, and there are {world_size}: start 4")
    return [
        Layout(encoder_dp=4, language_dp=2, language_pp=2, colocated=True),
        Layout(encoder_dp=2, language_dp=1, language_pp=2),
        Layout(encoder_dp=2, language_dp=2),
    ]


def compare_shared(layouts: Sequence[Layout], options: argparse.Namespace) -> None:
    """Measure and print: each layout in turn on the same data."""
    import steps

    columns = {}
    for layout in layouts:
        ways = (NO_IMAGES, SLICES, ASSIGNED) if layout.colocated else (ASSIGNED,)
        with steps.Bench.build(layout.modules(), options) as bench:
            for skew in options.skew:
                columns[layout, skew] = bench.measure(ways, skew)
                note(f"{layout} {skew}")
    if not IS_MAIN:
        return
    shared, *others = layouts
    rows = []
    for skew in options.skew:
        found = columns[shared, skew]
        best = [a + b for a, b in zip(found["seconds"][NO_IMAGES], found["encoder"], strict=True)]
        own = [columns[layout, skew]["seconds"][ASSIGNED] for layout in others]
        series = [best, found["seconds"][SLICES], found["seconds"][ASSIGNED], *own]
        times = [f"{1e3 * statistics.median(seconds):.0f}" for seconds in series]
        ratio = statistics.median(a / b for a, b in zip(series[2], best, strict=True))
        rows.append([skew, *times, f"{ratio:.3f}"])
    print(steps.machine(options))
    header = ["skew", "at best ms", "shared, slices", "shared, assigned"]
    show([*header, *(f"own ranks {layout}" for layout in others), "assigned / best"], rows)


# -- a frozen encoder that runs ahead --------------------------------------------------------------


def compare_ahead(layouts: Sequence[Layout], options: argparse.Namespace) -> None:
    """Measure and print: steps whose encoder has run ahead in the step before, and others."""
    import steps

    rows = []
    for layout in layouts:
        with steps.Bench.build(layout.modules(), options) as bench:
            for skew in options.skew:
                seconds = bench.measure((SLICES, AHEAD), skew)["seconds"]
                times = [f"{1e3 * statistics.median(seconds[way]):.0f}" for way in (SLICES, AHEAD)]
                ratios = [a / b for a, b in zip(seconds[AHEAD], seconds[SLICES], strict=True)]
                rows.append([str(layout), skew, *times, with_interval(ratios)])
                note("  ".join(rows[-1]))
    if IS_MAIN:
        print(steps.machine(options))
        show(["DP", "skew", "ms", "ms, running ahead", "running ahead / not"], rows)


# -- what it tells ---------------------------------------------------------------------------------


HEADER = (
    *("DP", "skew", "largest/mean, slices", "assigned"),
    *("Megatron ms", "slices ms", "assigned ms", "slices/Megatron", "assigned/slices", "goal"),
)


def row(found: Measurement) -> list[str]:
    """A line of the table."""
    ways = found.case.ways
    imbalance = [f"{statistics.median(found.imbalance[way]):.2f}" for way in (SLICES, ASSIGNED)]
    times = [
        f"{1e3 * statistics.median(found.seconds[way]):.0f}" if way in ways else "cannot"
        for way in (MEGATRON, SLICES, ASSIGNED)
    ]
    ours = with_interval(found.ratios(SLICES, MEGATRON)) if MEGATRON in ways else "-"
    gain = with_interval(found.ratios(ASSIGNED, SLICES))
    layout, goal = str(found.case.layout), f"<= {found.goal:.3f}"
    return [layout, found.case.skew, *imbalance, *times, ours, gain, goal]


def verdicts(measurements: Sequence[Measurement]) -> Iterator[str]:
    """How many lines of the table reach the goals."""
    by_skew = sorted(measurements, key=lambda found: SKEWS.index(found.case.skew))
    for skew, group in itertools.groupby(by_skew, key=lambda found: found.case.skew):
        lines = [(found.ratios(ASSIGNED, SLICES), found.goal) for found in group]
        reached = sum(statistics.median(ratios) <= goal for ratios, goal in lines)
        missed = sum(interval(ratios)[0] > goal for ratios, goal in lines)
        limit = f"{EVEN_GOAL}" if skew == "none" else f"{SKEWED_GOAL} x mean / largest"
        yield (
            f"{skew} skew: assigned <= {limit} x slices in {reached} of {len(lines)} lines, and "
            f"slower beyond the noise in {missed}"
        )


if __name__ == "__main__":
    main()
