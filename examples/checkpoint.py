"""With which options the training of a checkpoint began, and whether another can go on from it.

Nothing here needs torch, so that options are checked before it is imported.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_mimo_coord.training.checkpoint_folder import (
    checkpoint_path,
    checkpoint_steps,
    read_manifest,
)

OPTIONS = (  # that a training must keep when it goes on: the others only change the way from there
    "seed",
    "loss",
    "global_batch_size",
    "micro_batch_size",
    "images_per_sample",
    "vision_layers",
    "language_layers",
    "distributed_optimizer",
)


def settings(options: Namespace) -> dict[str, Any]:
    """What is written into a checkpoint of a training with these options."""
    return {name: getattr(options, name) for name in OPTIONS}


def problems(folder: Path, options: Namespace) -> list[str]:
    """Why a training with these options cannot go on from the newest checkpoint in a folder."""
    path = checkpoint_path(folder, checkpoint_steps(folder)[-1])
    try:
        content = read_manifest(path)
        found = content["extra"]["settings"]
    except ValueError as error:
        return [str(error)]
    except KeyError:
        return [f"{path} is a checkpoint of another program; give another --load"]
    different = [
        f"--{name.replace('_', '-')} is {given}, but {found.get(name)} in the checkpoint "
        f"{path}; give the same, or another --load"
        for name, given in settings(options).items()
        if given != found.get(name)
    ]
    if content["step"] > options.steps:
        different.append(
            f"--steps is {options.steps}, but the checkpoint {path} has more of them behind it; "
            f"raise --steps, or give another --load"
        )
    return different
