"""The trainer that a reader copies: short, learns, and goes on from its checkpoint."""

import re
from pathlib import Path

from ranks import world

TRAINER = Path(__file__).parents[2] / "examples" / "minimal_trainer.py"
LINE = r"step (\d+): loss ([0-9.]+), held out ([0-9.]+)"


def _run(folder: str) -> str:
    """What a rank prints: the script as torchrun runs it, but for the world, which is there."""
    import os
    import runpy
    import sys
    from contextlib import redirect_stdout
    from io import StringIO
    from unittest.mock import patch

    import torch.distributed as dist

    environment = patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "0"})
    arguments = patch.object(sys, "argv", [str(TRAINER), folder])
    give_back = dist.destroy_process_group
    stays = {
        "init_process_group": lambda backend: None,
        "destroy_process_group": lambda group=None: group and give_back(group),
    }
    with redirect_stdout(StringIO()) as said, environment, arguments, patch.multiple(dist, **stays):
        runpy.run_path(str(TRAINER), run_name="__main__")
    return said.getvalue()


def _train(folder: str, steps: int) -> str:
    """What a rank prints of a training that goes on."""
    from contextlib import redirect_stdout
    from io import StringIO

    from minimal_trainer import train

    with redirect_stdout(StringIO()) as said:
        train(folder, steps)
    return said.getvalue()


def test_it_fits_on_a_page():
    assert len(TRAINER.read_text().splitlines()) <= 120


def test_it_learns_and_goes_on(tmp_path):
    said, *others = world(4).run("test_minimal_trainer:_run", str(tmp_path))
    steps = re.findall(LINE, said)
    assert [int(step) for step, _, _ in steps] == list(range(10, 40, 10))
    assert float(steps[-1][2]) < 0.1 < float(steps[0][2])
    assert "vision    0-1" in said
    assert others == [""] * 3, "one rank prints"
    said, *_ = world(4).run("test_minimal_trainer:_train", str(tmp_path), 40)
    ((step, loss, held_out),) = re.findall(LINE, said)
    assert step == "40"
    assert float(loss) < 0.1 and float(held_out) < 0.1
