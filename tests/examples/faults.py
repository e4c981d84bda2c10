"""The digits example with faults in it: torchrun starts this file in the example's place.

``FAULTS`` names a fault for each start of the ranks, for torchrun may start them again.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import digits_trainer
import train_digits_vlm

from megatron_mimo_coord.training import checkpoint_folder

CAUSE = "the forward step of rank 1 failed"


def main() -> None:
    faults = os.environ["FAULTS"].split()
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if start < len(faults):
        globals()[faults[start]]()
    train_digits_vlm.main()


def killed_while_saving() -> None:
    """The first rank is gone when all have written their parts of the second checkpoint."""
    before_call(checkpoint_folder, "finish", 2, kill)


def killed_while_reading() -> None:
    """Rank 1 is gone when all steps are done."""
    if os.environ["RANK"] == "1":
        before_call(digits_trainer.Trainer, "read", 1, kill)


def raises_in_a_step() -> None:
    """Rank 1 raises in the second microbatch of the third step since the start."""
    if os.environ["RANK"] == "1":
        before_call(digits_trainer.Trainer, "_forward", 6, fail)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ArithmeticError(CAUSE)


def before_call(owner: Any, name: str, count: int, action: Callable[[], None]) -> None:
    """Have something happen before the ``count``-th call of a method."""
    method = getattr(owner, name)
    calls = 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            action()
        return method(*args, **kwargs)

    setattr(owner, name, counting)


if __name__ == "__main__":
    main()
