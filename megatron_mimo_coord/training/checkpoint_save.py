"""A checkpoint on its way to disk: each rank writes a file of its own, the first joins them.

When a rank has written its tensors it lists them in a file of JSON. When all lists are there, the
first rank joins them, and declares the checkpoint whole by one rename. So a thread does it, which
needs no process group: the ranks meet in the folder, also when their trainer has ended.
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
from megatron_mimo_coord.world.consistency import RankFacts, check_consistency

logger = logging.getLogger(__name__)

FORMAT = 3  # of what is written here
RANK_STATE = "rank_state"  # beside the random states: what this rank's trainer had given
MAX_STEPS = 2**62  # what ranks can tell each other
PATIENCE = 1800.0  # seconds that the first rank waits for the files of others, in the background
LAST_PATIENCE = 30.0  # the same once its trainer has ended


@frozen(eq=False)
class Share:
    """What one rank writes.

    Args:
        chunks: tensors.
        objects: what Megatron keeps as objects, by their keys.
        states: random states, and what this rank's trainer had given.
        modules: ``sizes`` of those on this rank, and ``settings`` of their optimizers.
    """

    chunks: list[Chunk]
    objects: dict[str, Any]
    states: dict[str, Any]
    modules: dict[str, Any]

    def copied(self) -> "Share":
        """With copies of the tensors in host memory, complete once the GPU has come this far."""
        return evolve(self, chunks=[chunk.copied() for chunk in self.chunks])


@define(eq=False)
class CheckpointSave:
    """A checkpoint that is being written, or was.

    Args:
        parent: the folder of checkpoints.
        step: of the checkpoint.
        rank: this rank.
        keep: how many checkpoints the folder keeps.
        is_over: whether there is nothing to wait for.
        is_whole: whether it is known to be whole, on this rank as on all.

    Attributes:
        holds: what it holds, such that equal things are the same.
    """

    parent: Path
    step: int
    rank: int = field(default=0, repr=False)
    keep: int = field(default=1, repr=False)
    is_over: bool = field(default=False, repr=False)
    is_whole: bool = False
    holds: Any = field(default=None, init=False, repr=False)
    _share: Share | None = field(default=None, init=False, repr=False)
    _folder: Path = field(factory=Path, init=False, repr=False)
    _content: Mapping[str, Any] = field(factory=dict, init=False, repr=False)
    _thread: threading.Thread | None = field(default=None, init=False, repr=False)
    _written: threading.Event = field(factory=threading.Event, init=False, repr=False)
    _others: threading.Event = field(factory=threading.Event, init=False, repr=False)
    _errors: list[str] = field(factory=list, init=False, repr=False)
    _failure: str = field(default="", init=False, repr=False)

    @property
    def path(self) -> Path:
        """Where it is once it is whole."""
        return folders.checkpoint_path(self.parent, self.step)

    def problems(self) -> list[str]:
        """What is wrong with what a trainer has asked for."""
        found = []
        if type(self.step) is not int or not 0 <= self.step < MAX_STEPS:
            found.append(f"step must be a number of steps, 0 or more, not {self.step!r}")
        if type(self.keep) is not int or self.keep < 1:
            found.append(f"keep must be a number of checkpoints, 1 or more, not {self.keep!r}")
        return found

    def prepare(self, share: Share, content: Mapping[str, Any]) -> None:
        """Take what this rank writes, and what the manifest says of the training."""
        self._share, self._content = share, content

    def start(self, attempt: int) -> None:
        """Write this rank's part in a thread of its own.

        Args:
            attempt: the number that the first rank has given to the folder it has made.
        """
        self._folder = folders.unfinished_path(self.parent, self.step, attempt)
        copied = None
        if torch.cuda.is_available():
            copied = torch.cuda.Event()
            copied.record()
        # Not a daemon: a trainer that ends waits until its last checkpoint is there.
        self._thread = threading.Thread(
            target=self._run, args=(copied,), name=f"save {self.path.name}", daemon=False
        )
        self._thread.start()

    def wait(self) -> Path:
        """Wait until the checkpoint is whole. Collective, as it tells every rank what went wrong.

        Returns:
            Where it is.

        Raises:
            ValueError: on every rank, if a rank could not write its part; in every call.
        """
        if not self.is_over:
            self.is_over = True
            headline = f"the checkpoint {self.path} could not be written"
            try:
                self._written.wait()
                check_consistency(lambda: RankFacts({}, {}, self._errors), headline)
                self._others.set()
                if self.rank == 0 and self._thread is not None:
                    self._thread.join()
                check_consistency(lambda: RankFacts({}, {}, self._errors), headline)
                self.is_whole = True
            except ValueError as error:
                self._failure = str(error)
                self._others.set()
        if self._failure:
            raise ValueError(self._failure)
        return self.path

    def tell_failure(self) -> None:
        """Raise a ValueError if writing has failed on this rank, and ``wait`` has not said so."""
        if self._errors and not self.is_over:
            raise ValueError(
                f"the checkpoint {self.path} could not be written: rank {self.rank}: "
                f"{self._errors[0]}"
            )

    def _run(self, copied: Any) -> None:
        """The thread."""
        try:
            if copied is not None:
                copied.synchronize()
            self._write()
            self._written.set()
            if self.rank == 0 and self._await_others():
                self._finish()
        except BaseException as error:  # nobody hears it in a thread: told by wait
            self._errors.append(f"{type(error).__name__}: {error}")
            logger.error("the checkpoint %s could not be written: %s", self.path, self._errors[0])
        finally:
            self._written.set()

    def _write(self) -> None:
        """This rank's part: a file of tensors, one of random states, and the list of both."""
        folder, rank = self._folder, self.rank
        share, self._share = self._share, None  # nothing holds its memory, also after an error
        assert share is not None, "prepared"
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} was made, but not here: all ranks must share it")
        file = ChunkFile(folder / f"__{rank}_0.distcp")
        tensors = [file.write_tensor(chunk) for chunk in share.chunks]
        objects = [file.write_object(key, value) for key, value in share.objects.items()]
        if rank == 0:  # what Megatron's load looks for; here it is in the manifest
            objects.append(file.write_object("common_state/shard_0_1", {"iteration": self.step}))
        files = {f"__{rank}_0.distcp": file.close()}
        states = folder / random_states_name(rank)
        folders.write_durably(states, json.dumps(share.states))
        files[states.name] = folders.describe_file(states)
        listed = {"tensors": tensors, "objects": objects, "files": files, **share.modules}
        folders.write_durably(folder / f"rank-{rank}.json", json.dumps(listed))

    def _lists(self) -> list[Path]:
        return [self._folder / f"rank-{rank}.json" for rank in range(self._content["world_size"])]

    def _await_others(self) -> bool:
        """Wait until every rank has written its list; whether it has, or one could not."""
        missing, seconds, ended = self._lists(), 0.01, 0.0
        deadline = time.monotonic() + PATIENCE
        while missing := [path for path in missing if not path.exists()]:
            self._others.wait(seconds)  # at most, until all have written or one could not
            if self._failure:
                return False
            self._others.clear()
            seconds = min(1.0, 1.5 * seconds)
            if not threading.main_thread().is_alive():
                ended = ended or time.monotonic()
                deadline = min(deadline, ended + LAST_PATIENCE)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{', '.join(path.name for path in missing[:8])} never came")
        return not self._failure

    def _finish(self) -> None:
        """Join the lists of all ranks, and declare the checkpoint whole."""
        lists = [json.loads(path.read_text()) for path in self._lists()]
        folder = self._folder
        index = Index.merge(folder, lists)
        files = {name: found for each in lists for name, found in each["files"].items()}
        index.save_for_megatron()
        for name in (".metadata", declare_format(folder)):
            folders.put_on_disk(folder / name)
            files[name] = folders.describe_file(folder / name)
        for path in self._lists():
            path.unlink()
        sizes: dict[str, list[Any]] = {}
        for name, parts in (pair for each in lists for pair in each["sizes"].items()):
            known = sizes.setdefault(name, [])
            known += [part for part in parts if part not in known]
        content = {
            **self._content,
            "sizes": sizes,
            "optimizer": merge_settings([each["settings"] for each in lists]),
            "files": files,
            "tensors": index.tensors,
            "objects": index.objects,
        }
        folders.finish(folder, content, self.keep)


def random_states_name(rank: int) -> str:
    """Name of the file with the random states of a rank."""
    return f"random_states_{rank}.json"
