"""Shows that a step takes as long as planning says: costs measured on one layout, others predicted.

    python examples/predict_and_measure.py              # layers that sleep
    python examples/predict_and_measure.py --compute    # layers that compute

Every layout is a training job of its own, timed_job.py: Megatron's schedule and optimizer, the
coordinator, a small vision-language model. On the first, ``coordinator.record_timeline`` measures
what each module costs, and ``mimo-plan --measure`` what a sum over two ranks takes, and which part
of a module TP ranks repeat. From that ``mimo-plan --costs`` predicts the others, and they run.

Layers that sleep take a known time however few cores there are. Layers that compute share the
cores, and a machine computes for at most as many ranks at once as it has cores: layouts with more
ranks are shown, but say nothing about the prediction.

Exit code 1 if the median error is above 10 %, or if two layouts whose predictions differ by more
than that come out in the other order.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from itertools import combinations, islice
from pathlib import Path
from statistics import median

from attrs import frozen

from megatron_mimo_coord.layout import pack, ranks_taken
from megatron_mimo_coord.layout.toml_file import read_layout

TIMED_JOB = Path(__file__).with_name("timed_job.py")
MIMO_PLAN = Path(sys.executable).with_name("mimo-plan")
TOLERANCE = 0.1
MICRO_BATCH_SIZE = 4
DP, TP, PP = "data_parallel_size", "tensor_model_parallel_size", "pipeline_model_parallel_size"
SHARED = {"rank_offset": 0}
REPEATED = "tensor_parallel_replicated_share"
LAYOUTS: dict[str, dict[str, dict[str, int]]] = {  # costs are measured on the first
    "vision → language": {"vision": {}, "language": {}},
    "the same 2 ranks, DP 2": {"vision": {DP: 2, **SHARED}, "language": {DP: 2, **SHARED}},
    "the same 2 ranks, DP 2 and TP 2": {"vision": {DP: 2, **SHARED}, "language": {TP: 2, **SHARED}},
    "vision DP 2 → language": {"vision": {DP: 2}, "language": {}},
    "vision → language PP 2": {"vision": {}, "language": {PP: 2}},
    "vision → language TP 2": {"vision": {}, "language": {TP: 2}},
    "vision PP 2 → language DP 2": {"vision": {PP: 2}, "language": {DP: 2}},
    "vision DP 2 → language PP 2": {"vision": {DP: 2}, "language": {PP: 2}},
    "vision → language PP 4": {"vision": {}, "language": {PP: 4}},
    "vision DP 2 → language PP 2, DP 2": {"vision": {DP: 2}, "language": {PP: 2, DP: 2}},
    "vision DP 2 on the ranks of PP 2": {
        "vision": {DP: 2, **SHARED},
        "language": {PP: 2, **SHARED},
    },
    "vision DP 4 on the ranks of PP 2, DP 2": {
        "vision": {DP: 4, **SHARED},
        "language": {PP: 2, DP: 2, **SHARED},
    },
}
MODEL = """\
num_layers = 4
hidden_size = {hidden}
num_attention_heads = 4
hidden_dropout = 0
[vision]
patch_size = 16
tokens_per_image = {patches}
[language]
vocab_size = 32
seq_length = {sequence}
"""


@frozen
class Comparison:
    """One layout's step, in seconds."""

    layout: str
    ranks: int
    predicted: float
    measured: float
    counts: bool

    @property
    def error(self) -> float:
        """Of the prediction, as a part of what was measured."""
        return self.predicted / self.measured - 1

    def row(self) -> str:
        """A line of the table."""
        error = f"{self.error:+.1%}" if self.counts else f"({self.error:+.1%}: too few cores)"
        return (
            f"| {self.layout} | {self.ranks} | {self.predicted:.3f} | {self.measured:.3f} "
            f"| {error} |"
        )


def main() -> None:
    """Measure, predict, measure, compare."""
    options = parse_options()
    cores = len(os.sched_getaffinity(0))
    print("| layout | ranks | predicted, s | measured, s | error |\n|---|---|---|---|---|")
    comparisons: list[Comparison] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for layout, modules in islice(LAYOUTS.items(), options.layouts):
            file = folder / "layout.toml"
            file.write_text(as_toml(modules), encoding="utf-8")
            sizes = read_layout(file)
            ranks = ranks_taken(pack(sizes).values())
            record = [] if comparisons else ["--record", str(folder / "timeline.json")]
            measured = run(ranks, [str(file), *record], options)
            if not comparisons:
                measure_links(folder, options)
            predicted = predict(file, folder, options)
            counts = bool(comparisons) and (not options.compute or ranks <= cores)
            comparisons.append(Comparison(layout, ranks, predicted, measured, counts))
            print(comparisons[-1].row() if comparisons[1:] else measured_row(comparisons[0]))
    sys.exit(judge([each for each in comparisons if each.counts]))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compute", action="store_true", help="layers compute, and do not sleep")
    parser.add_argument("--num-microbatches", type=int, default=4, metavar="N", help="(default: 4)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="timed (default: 3)")
    parser.add_argument("--layouts", type=int, metavar="N", help="the first N (default: all)")
    return parser.parse_args()


def as_toml(modules: dict[str, dict[str, int]]) -> str:
    """A layout file."""
    return "\n".join(
        f"[{name}]\n" + "".join(f"{field} = {size}\n" for field, size in sizes.items())
        for name, sizes in modules.items()
    )


def run(ranks: int, arguments: list[str], options: argparse.Namespace) -> float:
    """Seconds of a step of the job on real ranks."""
    said = launch(
        ranks,
        *(str(TIMED_JOB), *arguments),
        *("--micro-batch-size", str(MICRO_BATCH_SIZE), "--steps", str(options.steps)),
        *("--num-microbatches", str(options.num_microbatches)),
        *(["--compute"] if options.compute else []),
    )
    return float(said.split()[-1])


def launch(ranks: int, *command: str) -> str:
    """What a program says that runs on some ranks, or on none of torchrun's if these are 0."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    arguments = [sys.executable, *(torchrun if ranks else []), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def measure_links(folder: Path, options: argparse.Namespace) -> None:
    """Write the model's file, and into its costs what links do and what TP ranks repeat."""
    hidden, patches = (256, 64) if options.compute else (16, 4)
    sizes = MODEL.format(hidden=hidden, patches=patches, sequence=2 * patches)
    (folder / "model.toml").write_text(sizes, encoding="utf-8")
    launch(2, str(MIMO_PLAN), str(folder / "model.toml"), "--measure", str(folder / "layers.toml"))
    layers = (folder / "layers.toml").read_text(encoding="utf-8")
    costs = (folder / "costs.toml").read_text(encoding="utf-8")
    for name in ("vision", "language"):  # TP ranks repeat nothing of layers that sleep
        share = tomllib.loads(layers)[name][REPEATED] if options.compute else 0
        costs = costs.replace(f"[{name}]", f"[{name}]\n{REPEATED} = {share}")
    costs += "\n" + "".join(layers.partition("[cluster]")[1:])
    (folder / "costs.toml").write_text(costs, encoding="utf-8")


def predict(layout: Path, folder: Path, options: argparse.Namespace) -> float:
    """Seconds of a step as ``mimo-plan`` sees it."""
    samples = MICRO_BATCH_SIZE * options.num_microbatches
    said = launch(
        0,
        *(str(MIMO_PLAN), str(folder / "model.toml"), "--json"),
        *("--layout", str(layout), "--costs", str(folder / "costs.toml")),
        *("--micro-batch-size", str(MICRO_BATCH_SIZE), "--global-batch-size", str(samples)),
    )
    return float(json.loads(said)["proposals"][0]["step_seconds"])


def measured_row(first: Comparison) -> str:
    """The line of the layout that costs were measured on."""
    cells = first.row().split("|")
    return "|".join([*cells[:-2], f" ({first.error:+.1%}) costs measured here ", cells[-1]])


def judge(comparisons: list[Comparison]) -> bool:
    """Say how good the predictions were; whether they were not good enough."""
    error = median(abs(each.error) for each in comparisons)
    apart = [
        pair
        for pair in combinations(comparisons, 2)
        if abs(pair[0].predicted - pair[1].predicted) > TOLERANCE * min(p.predicted for p in pair)
    ]
    wrong = [
        (one.layout, other.layout)
        for one, other in apart
        if (one.predicted < other.predicted) != (one.measured < other.measured)
    ]
    print(
        f"\nmedian error {error:.1%} of {len(comparisons)} layouts; {len(apart) - len(wrong)} of "
        f"{len(apart)} pairs that differ by more than {TOLERANCE:.0%} in the predicted order"
    )
    for one, other in wrong:
        print(f"not in order: {one}; {other}")
    return error > TOLERANCE or bool(wrong)


if __name__ == "__main__":
    main()
