"""A checkpoint on its way to disk: each rank writes a file of its own, the first joins them.

When a rank has written its tensors it lists them in a file of JSON. When all lists are there, the
first rank joins them, and declares the checkpoint whole by one rename. In the background threads do
it, which need no process group: the ranks meet in the folder, also when their trainer has ended.
"""

import json
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import define, evolve, field, frozen

from megatron_mimo_coord.megatron.checkpoints import Chunk, declare_format
from megatron_mimo_coord.megatron.optimizer_states import merge_settings
from megatron_mimo_coord.training import checkpoint_folder as folders
from megatron_mimo_coord.training.checkpoint_tensors import ChunkFile, Index
from megatron_mimo_coord.training.plain_data import Blobs
from megatron_mimo_coord.world.consistency import RankFacts, check_consistency

logger = logging.getLogger(__name__)

FORMAT = 4  # of what is written here
PATIENCE = 1800.0  # seconds that the first rank waits for the files of others, in the background
LAST_PATIENCE = 30.0  # the same once its trainer has ended


@frozen(eq=False)
class Part:
    """What one rank writes.

    Args:
        rank: this rank.
        chunks: tensors.
        objects: what Megatron keeps as objects, by their keys.
        blobs: what is written as it is, by digest.
        listed: what the first rank is to know of it: ``sizes`` of the modules on this rank,
            ``settings`` of their optimizers, ``states``, the digest of its random states.
    """

    rank: int
    chunks: list[Chunk]
    objects: Mapping[str, Any]
    blobs: Blobs
    listed: Mapping[str, Any]

    def copied(self) -> "Part":
        """With copies of the tensors in host memory."""
        chunks = [chunk.copied() for chunk in self.chunks]
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return evolve(
            self, chunks=chunks, blobs={key: bytes(data) for key, data in self.blobs.items()}
        )

    def write(self, folder: Path) -> None:
        """Write a file of everything, then the list of it."""
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} was made, but not here: all ranks must share it")
        name = f"__{self.rank}_0.distcp"
        file = ChunkFile(folder / name)
        listed = {
            **self.listed,
            "tensors": [file.write_tensor(chunk) for chunk in self.chunks],
            "objects": [file.write_object(key, value) for key, value in self.objects.items()],
            "blobs": {digest: file.write(data) for digest, data in self.blobs.items()},
        }
        listed["files"] = {name: file.close()}
        folders.write_durably(folder / f"rank-{self.rank}.json", json.dumps(listed))


def join_parts(folder: Path, content: Mapping[str, Any], keep: int) -> None:
    """Join the lists of all ranks, and declare the checkpoint whole.

    Args:
        folder: into which all ranks have written.
        content: what its manifest says of the training, the same on every rank.
        keep: how many checkpoints stay.
    """
    paths = _lists(folder, content)
    lists = [json.loads(path.read_text()) for path in paths]
    index = Index.merge(folder, lists)
    files = {name: found for each in lists for name, found in each["files"].items()}
    index.save_for_megatron()
    for name in (".metadata", declare_format(folder)):
        folders.put_on_disk(folder / name)
        files[name] = folders.describe_file(folder / name)
    for path in paths:
        path.unlink()
    sizes: dict[str, list[Any]] = {}
    for name, parts in (pair for each in lists for pair in each["sizes"].items()):
        known = sizes.setdefault(name, [])
        known += [part for part in parts if part not in known]
    found = {
        "sizes": sizes,
        "optimizer": merge_settings([each["settings"] for each in lists]),
        "states": [each["states"] for each in lists],
        "files": files,
        "tensors": index.tensors,
        "objects": index.objects,
        "blobs": index.blobs,
    }
    folders.finish(folder, {**content, **found}, keep)


def _lists(folder: Path, content: Mapping[str, Any]) -> list[Path]:
    """Where each rank lists what it has written."""
    return [folder / f"rank-{rank}.json" for rank in range(content["world_size"])]


@define(eq=False)
class CheckpointSave:
    """A checkpoint that is whole, or is being written in the background.

    Args:
        path: where it is once it is whole.
        step: of the checkpoint.
        holds: what it holds, such that equal things are the same.

    Attributes:
        failure: why it is not whole; empty if it is; None as long as nobody knows.
    """

    path: Path
    step: int = field(repr=False)
    holds: Any = field(repr=False)
    failure: str | None = field(default="", init=False, repr=False)
    _rank: int = field(default=0, init=False, repr=False)
    _thread: threading.Thread = field(init=False, repr=False)
    _errors: list[str] = field(factory=list, init=False, repr=False)
    _given_up: threading.Event = field(factory=threading.Event, init=False, repr=False)

    def start(self, part: Part, folder: Path, content: Mapping[str, Any], keep: int) -> None:
        """Write in a thread: this rank's part, and on the first rank what joins them.

        Args:
            part: what this rank writes, in host memory.
            folder: where all ranks write.
            content, keep: as :func:`join_parts` takes them.
        """
        self.failure, self._rank, parts = None, part.rank, [part]

        def write() -> None:
            try:
                parts.pop().write(folder)  # nothing holds its memory afterwards
                if self._rank == 0 and self._await(_lists(folder, content)):
                    join_parts(folder, content, keep)
            except BaseException as error:  # nobody hears it in a thread: told by wait
                self._errors.append(f"{type(error).__name__}: {error}")
                logger.error("the checkpoint %s could not be written: %s", self.path, error)

        # Not a daemon: a trainer that ends waits until its last checkpoint is there.
        self._thread = threading.Thread(target=write, daemon=False)
        self._thread.start()

    def wait(self) -> Path:
        """Wait until the checkpoint is whole. Collective, as it tells every rank what went wrong.

        Returns:
            Where it is.

        Raises:
            ValueError: on every rank, if a rank could not write its part; in every call.
        """
        if self.failure is None:
            headline = f"the checkpoint {self.path} could not be written"
            try:
                for is_over in (self._rank > 0, True):  # the first waits for the others
                    if is_over:
                        self._thread.join()
                    check_consistency(lambda: RankFacts({}, {}, self._errors), headline)
                self.failure = ""
            except ValueError as error:
                self.failure = str(error)
                self._given_up.set()
        if self.failure:
            raise ValueError(self.failure)
        return self.path

    def tell_failure(self) -> None:
        """Raise a ValueError if writing has failed on this rank, and ``wait`` has not said so."""
        if self._errors and self.failure is None:
            raise ValueError(
                f"the checkpoint {self.path} could not be written: rank {self._rank}: "
                f"{self._errors[0]}"
            )

    def _await(self, missing: list[Path]) -> bool:
        """Wait until every rank has written its list; whether it has, or one could not."""
        seconds, ended = 0.01, 0.0
        deadline = time.monotonic() + PATIENCE
        while missing := [path for path in missing if not path.exists()]:
            if self._given_up.wait(seconds):
                return False
            seconds = min(0.2, 1.5 * seconds)
            if not threading.main_thread().is_alive():
                ended = ended or time.monotonic()
                deadline = min(deadline, ended + LAST_PATIENCE)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{', '.join(path.name for path in missing[:8])} never came")
        return True
