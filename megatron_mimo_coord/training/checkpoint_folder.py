"""Which checkpoints a folder holds. Each is there whole or not at all, however its writers end.

    step-00000050                   whole: every file was on disk before it was given this name
    step-00000100.1f3a.unfinished   being written, or left behind by ranks that were killed

Nothing here needs torch, so that options can be checked before it is imported.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")
_UNFINISHED = ".unfinished"

_claimed: dict[tuple[int, int], int] = {}
"""Folders that this process writes into, and the open files that say so to others."""


def checkpoint_steps(folder: Path) -> list[int]:
    """After which steps there are whole checkpoints, oldest first; none if there is no folder.

    Example:
        >>> checkpoint_steps(Path("nowhere"))
        []
    """
    names = (_NAME.fullmatch(path.name) for path in Path(folder).glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the whole checkpoint of a step is.

    Example:
        >>> checkpoint_path(Path("saved"), 50).name
        'step-00000050'
    """
    return Path(folder) / f"step-{step:08}"


def foreign_files(folder: Path) -> list[str]:
    """Names of what is in a folder that has no checkpoint of this package, whole or unfinished.

    Raises:
        NotADirectoryError: it is a file.
    """
    if not Path(folder).exists():
        return []
    names = sorted(path.name for path in Path(folder).iterdir())
    ours = re.compile(rf"{_NAME.pattern}(\..*)?")
    return [] if any(ours.fullmatch(name) for name in names) else names


def read_manifest(path: Path) -> dict[str, Any]:
    """What a whole checkpoint says of itself, as :func:`finish` was given it.

    Raises:
        ValueError: there is nothing, or it is damaged.
    """
    try:
        document = json.loads((path / MANIFEST).read_text())
        content: dict[str, Any] = document["content"]
        digest = document["sha256"]
    except FileNotFoundError:
        raise ValueError(f"{path} has no {MANIFEST}: it is no checkpoint of this package") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path / MANIFEST} is damaged: it cannot be read") from None
    if digest != _digest(content):
        raise ValueError(f"{path / MANIFEST} is damaged: it is not as it was written")
    return content


def damages(path: Path, files: dict[str, Any], rank: int = 0, world_size: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint, of which each rank reads its share.

    Args:
        path: the checkpoint.
        files: what its manifest says of each.
        rank, world_size: which share.
    """
    found = []
    for name in sorted(files)[rank::world_size]:
        file, expected = path / name, files[name]
        if not file.is_file():
            found.append(f"{file} is missing")
        elif file.stat().st_size != expected["bytes"]:
            size = file.stat().st_size
            found.append(f"{file} is damaged: it has {size} bytes, not {expected['bytes']}")
        elif describe_file(file) != expected:
            found.append(f"{file} is damaged: its bytes are not those that were written")
    return found


def describe_file(path: Path) -> dict[str, Any]:
    """Size and digest of a file, as a manifest lists it."""
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


# -- writing ---------------------------------------------------------------------------------------


def claim(folder: Path) -> bool:
    """Whether this process may write there: a folder has one training at a time.

    Ranks whose torchrun was killed train on for a while, and would write what a new start writes.
    Makes the folder if there is none.

    Example:
        >>> claim(Path(folder) / "saved")
        True
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    put_on_disk(folder.parent)
    handle = os.open(folder, os.O_RDONLY)
    status = os.fstat(handle)
    identity = (status.st_dev, status.st_ino)
    if identity in _claimed:
        os.close(handle)
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return False
    except OSError as error:
        logger.warning(
            "%s cannot be locked (%s): see that one training writes there", folder, error
        )
    _claimed[identity] = handle  # open, and so claimed, as long as this process lives
    return True


def unfinished_path(folder: Path, step: int, attempt: int) -> Path:
    """Where the ranks write the checkpoint of a step.

    No other attempt has this one's number: ranks that outlive their job may still write.
    """
    path = checkpoint_path(folder, step)
    return path.with_name(f"{path.name}.{attempt:x}{_UNFINISHED}")


def begin(folder: Path, step: int, attempt: int) -> Path:
    """Make the folder that all ranks then write into; one rank does this for all."""
    for leftover in Path(folder).glob(f"step-*{_UNFINISHED}"):
        shutil.rmtree(leftover, ignore_errors=True)
    path = unfinished_path(folder, step, attempt)
    path.mkdir()
    return path


def write_durably(path: Path, text: str) -> None:
    """Write a small file that is there whole or not at all, even if the machine stops."""
    unfinished = path.with_name(path.name + _UNFINISHED)
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def finish(path: Path, content: dict[str, Any], keep: int) -> Path:
    """Declare whole what all ranks have written, by one rename; then delete what is too old.

    Args:
        path: where the ranks have written, each file already on disk.
        content: what the manifest says, its files included.
        keep: how many whole checkpoints stay.
    """
    document = {"content": content, "sha256": _digest(content)}
    write_durably(path / MANIFEST, json.dumps(document))
    put_on_disk(path)
    whole = path.rename(path.with_name(path.name.partition(".")[0]))
    put_on_disk(whole.parent)
    for step in checkpoint_steps(whole.parent)[:-keep]:
        _delete(checkpoint_path(whole.parent, step))
    return whole


def put_on_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _delete(path: Path) -> None:
    """A checkpoint that is deleted in part is not whole: it loses that name first."""
    shutil.rmtree(path.rename(path.with_name(path.name + _UNFINISHED)))


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
