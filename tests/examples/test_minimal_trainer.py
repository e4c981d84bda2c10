"""The trainer that a reader copies: short, learns, and goes on from its checkpoint."""

import os
import re
import subprocess
import sys
from pathlib import Path

from ranks import world

TRAINER = Path(__file__).parents[2] / "examples" / "minimal_trainer.py"


def _train(folder: str, steps: int) -> list[str]:
    """What each rank prints."""
    from contextlib import redirect_stdout
    from io import StringIO

    from minimal_trainer import train

    with redirect_stdout(StringIO()) as said:
        train(folder, steps)
    return re.findall(r"step (\d+): loss ([0-9.]+), held out ([0-9.]+)", said.getvalue())


def test_it_fits_on_a_page():
    assert len(TRAINER.read_text().splitlines()) <= 120


def test_it_learns_and_goes_on(tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = subprocess.run(
        [*run, TRAINER, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"held out ([0-9.]+)", done.stdout)]
    assert len(losses) == 5
    assert losses[-1] < 0.1 < losses[0]
    first, *others = world(4).run("test_minimal_trainer:_train", str(tmp_path), 60)
    ((step, loss, held_out),) = first
    assert step == "60"
    assert float(loss) < 0.1 and float(held_out) < 0.1
    assert others == [[]] * 3, "one rank prints"
