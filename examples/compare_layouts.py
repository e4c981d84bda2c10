"""Shows that the layout does not change what is learned: the digits model on several layouts.

    python examples/compare_layouts.py --steps 30

One rank draws the weights as Megatron does and saves them as a checkpoint of step 0. Each layout
starts from it and trains on the same data. The largest difference of the loss in any step is
printed as a Markdown table; exit code 1 if one of them is larger than the tolerance.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ALONE = "--colocated --vision-dp 1 --language-pp 1"
LAYOUTS = {  # name: (ranks, options)
    "vision DP 2 → language PP 2": (4, ""),
    "vision DP 1 → language DP 2 (fan-out)": (3, "--vision-dp 1 --language-pp 1 --language-dp 2"),
    "vision DP 2 → language TP 2": (4, "--language-pp 1 --language-tp 2"),
    "both on the same 2 ranks": (2, "--colocated --language-pp 1 --language-tp 2"),
    "vision PP 2 → language DP 2, sharded optimizer": (
        4,
        "--vision-pp 2 --vision-dp 1 --language-pp 1 --language-dp 2 "
        "--distributed-optimizer --overlap-grad-reduce",
    ),
}


def main() -> None:
    """Train on every layout and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps (default: 30)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference allowed (default: 1e-4)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder, "start")
        run(1, [*ALONE.split(), "--save", str(start)])
        worst = compare(start, options.steps)
    sys.exit(worst > options.tolerance)


def compare(start: Path, steps: int) -> float:
    """Train on every layout and print how; the largest difference of the loss in any step."""
    reference: list[float] = []
    worst = 0.0
    print("| layout | first loss | last loss | largest difference in a step |", flush=True)
    print("|---|---|---|---|", flush=True)
    for name, (ranks, arguments) in LAYOUTS.items():
        log = start.with_name("losses")
        run(
            ranks,
            [
                *arguments.split(),
                *("--steps", str(steps), "--load", str(start), "--log-losses", str(log)),
            ],
        )
        losses = json.loads(log.read_text())
        reference = reference or losses
        difference = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
        worst = max(worst, difference)
        print(f"| {name} | {losses[0]:.6f} | {losses[-1]:.6f} | {difference:.1e} |", flush=True)
    return worst


def run(ranks: int, arguments: list[str]) -> None:
    """Start ranks that do :func:`work`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), __file__, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")


def work() -> None:
    """What a rank does: save the start, or train from it and log the loss of each step."""
    import digits
    from digits_options import parse_options
    from digits_trainer import Trainer, train
    from job import start_ranks
    from train_digits_vlm import IS_MAIN

    options = parse_options()
    start_ranks()
    trainer = Trainer.build(options)
    if options.save:
        trainer.coordinator.save_checkpoint(options.save, None, step=0)
    else:
        done, _ = trainer.coordinator.load_checkpoint(options.load, None)
        steps = train(trainer, *digits.load(), options, done)
        losses = [step.loss for step in steps]
        if IS_MAIN:
            options.log_losses.write_text(json.dumps(losses))
    trainer.destroy()


if __name__ == "__main__":
    work() if "RANK" in os.environ else main()
