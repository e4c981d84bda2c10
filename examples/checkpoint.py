"""Which checkpoints a folder holds. Each is there whole or not at all, however its writers end.

    step-00000050              whole: all ranks had written when it was given this name
    step-00000100.unfinished   being written, or left behind by ranks that were killed

Nothing here needs torch, so that options are checked before it is imported.
"""

import fcntl
import json
import os
import shutil
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

KEPT = 2  # whole ones: should the newest turn out to be unreadable, there is one before it
NAME = "step-" + "[0-9]" * 8
UNFINISHED = ".unfinished"
SETTINGS = "settings.json"
OPTIONS = (  # that a training must keep when it goes on: the others only change the way from there
    "seed",
    "loss",
    "global_batch_size",
    "micro_batch_size",
    "vision_layers",
    "language_layers",
    "distributed_optimizer",
)


@frozen
class Checkpoint:
    """A whole checkpoint: where it is, after which step, and of a training with which settings."""

    path: Path
    step: int
    settings: Mapping[str, Any]


def newest(folder: Path) -> Checkpoint | None:
    """The whole checkpoint of the last step; None where there is none, or no such folder."""
    found = _whole(folder)
    if not found:
        return None
    settings = json.loads((found[-1] / SETTINGS).read_text())
    return Checkpoint(found[-1], _step(found[-1]), settings)


def settings(options: Namespace) -> dict[str, Any]:
    """What is written into a checkpoint of a training with these options."""
    return {name: getattr(options, name) for name in OPTIONS}


def differences(found: Checkpoint, options: Namespace) -> list[str]:
    """Why a training with these options cannot go on from this checkpoint."""
    return [
        f"--{name.replace('_', '-')} is {given}, but {found.settings[name]} in the checkpoint "
        f"{found.path}; give the same, or another --load"
        for name, given in settings(options).items()
        if given != found.settings[name]
    ]


def claim(folder: Path) -> bool:
    """Whether this process may write there: a folder has one training at a time.

    Ranks whose torchrun was killed train on for a while, and would write what a new start writes.
    """
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)  # open, and so claimed, as long as this process lives
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return False
    return True


def begin(folder: Path, step: int) -> None:
    """Make the folder that all ranks then write into; one rank does this for all."""
    for leftover in folder.glob(f"step-*{UNFINISHED}"):
        shutil.rmtree(leftover)
    path = unfinished(folder, step)
    path.mkdir(parents=True)


def unfinished(folder: Path, step: int) -> Path:
    """Where the ranks write the checkpoint of this step."""
    return folder / f"step-{step:08}{UNFINISHED}"


def finish(folder: Path, step: int, settings: Mapping[str, Any]) -> None:
    """Declare whole what all ranks have written, by one rename; then delete what is too old."""
    path = unfinished(folder, step)
    (path / SETTINGS).write_text(json.dumps(settings, indent=2))
    path.rename(path.with_suffix(""))
    for old in _whole(folder)[:-KEPT]:
        _delete(old)


def _whole(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted((path.parent for path in folder.glob(f"{NAME}/{SETTINGS}")), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _delete(path: Path) -> None:
    """A checkpoint that is deleted in part is not whole: it loses that name first."""
    shutil.rmtree(path.rename(path.with_name(path.name + UNFINISHED)))
