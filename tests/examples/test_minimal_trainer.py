"""The trainer that a reader copies: short, learns, and goes on from its checkpoint."""

import re
from pathlib import Path
from typing import Any

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
    from cases import not_rehearsed

    from megatron_mimo_coord.world import process_group

    environment = patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "0"})
    arguments = patch.object(sys, "argv", [str(TRAINER), folder])
    give_back = dist.destroy_process_group
    there = patch.object(process_group, "init_process_group", lambda backend: None)
    stays = patch.object(
        dist, "destroy_process_group", lambda group=None: group and give_back(group)
    )
    # Twice as fast; what goes on from a checkpoint, in _train, is rehearsed.
    with redirect_stdout(StringIO()) as said, environment, arguments, there, stays, not_rehearsed():
        runpy.run_path(str(TRAINER), run_name="__main__")
    return said.getvalue()


def _train(folder: str, steps: int) -> str:
    """What a rank prints of a training that goes on, with launches that block."""
    import os
    from contextlib import redirect_stdout
    from io import StringIO
    from unittest.mock import patch

    from minimal_trainer import train

    blocking = patch.dict(os.environ, {"CUDA_LAUNCH_BLOCKING": "1"})
    with redirect_stdout(StringIO()) as said, blocking:
        train(folder, steps)
    return said.getvalue()


def _run_until_killed(folder: str) -> None:
    """As :func:`_run`; rank 1 is killed in the first step behind the first checkpoint."""
    import os
    import signal

    import torch.distributed as dist

    from megatron_mimo_coord import MultiModuleCoordinator

    zero_grad_buffer = MultiModuleCoordinator.zero_grad_buffer

    def killed(self: MultiModuleCoordinator) -> Any:
        if dist.get_rank() == 1 and Path(folder, "step-00000010").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return zero_grad_buffer(self)

    MultiModuleCoordinator.zero_grad_buffer = killed
    _run(folder)


def test_it_learns_and_survives_the_loss_of_a_rank(tmp_path):
    """Started again, it goes on with the numbers that an undisturbed job has."""
    said, *others = world(4).run("test_minimal_trainer:_run", str(tmp_path / "undisturbed"))
    steps = re.findall(LINE, said)
    assert [int(step) for step, _, _ in steps] == list(range(10, 40, 10))
    assert float(steps[-1][2]) < 0.1 < float(steps[0][2])
    assert "vision    0-1" in said
    assert others == [""] * 3, "one rank prints"
    folder = tmp_path / "disturbed"
    _, errors = world(4).try_run("test_minimal_trainer:_run_until_killed", str(folder))
    assert errors[1][0] == "ProcessDied"
    assert (folder / "step-00000010").exists()
    said, *_ = world(4).run("test_minimal_trainer:_train", str(folder), 20)
    assert re.findall(LINE, said) == steps[1:2]


def test_it_fits_on_a_page():
    assert len(TRAINER.read_text().splitlines()) <= 125
