"""Shows that the layout does not change what is learned: the digits model on several layouts.

    python examples/compare_layouts.py --steps 30

Runs ``train_digits_vlm.py`` on each layout with the same data and the same initial weights, and
prints the largest difference of the loss in any step as a Markdown table. Exit code 1 if one of
them is larger than the tolerance.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TRAINING = Path(__file__).with_name("train_digits_vlm.py")
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
    reference: list[float] = []
    worst = 0.0
    print("| layout | first loss | last loss | largest difference in a step |", flush=True)
    print("|---|---|---|---|", flush=True)
    for name, (ranks, arguments) in LAYOUTS.items():
        losses = train(ranks, arguments.split(), options.steps)
        reference = reference or losses
        differences = (abs(mine - first) for mine, first in zip(losses, reference, strict=True))
        difference = max(differences)
        worst = max(worst, difference)
        row = (name, f"{losses[0]:.6f}", f"{losses[-1]:.6f}", f"{difference:.1e}")
        print(f"| {' | '.join(row)} |", flush=True)
    sys.exit(worst > options.tolerance)


def train(ranks: int, arguments: list[str], steps: int) -> list[float]:
    """Losses of a run, step by step."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "losses"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(ranks), str(TRAINING)),
            *("--steps", str(steps), "--log-losses", str(log), *arguments),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if run.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{run.stdout}\n{run.stderr}")
        return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


if __name__ == "__main__":
    main()
