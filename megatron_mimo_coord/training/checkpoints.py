"""Saves a training and goes on with it, on the same ranks or others; whole or not at all.

A save is one small collective, in which the ranks compare what they were given; then each rank
writes its own file, and lists in another what is inside. When all lists are there, the first rank
joins them, and declares the checkpoint whole by one rename. So in the background nothing needs a
process group: the ranks meet in the folder.
"""

import hashlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from attrs import define, field
from megatron.core import __version__ as megatron_version
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.layout.problems import raise_problems
from megatron_mimo_coord.training import checkpoint_folder as folders
from megatron_mimo_coord.training.boxes import Box
from megatron_mimo_coord.training.checkpoint_folder import Manifest
from megatron_mimo_coord.training.checkpoint_tensors import (
    Chunk,
    ChunkFile,
    ChunkReader,
    Index,
    wanted,
)
from megatron_mimo_coord.training.plain_data import decode, encode
from megatron_mimo_coord.training.random_states import random_states, restore_random_states
from megatron_mimo_coord.training.training_state import (
    ModelState,
    OptimizerState,
    merge_settings,
    optimizer_problems,
)
from megatron_mimo_coord.world.consistency import RankFacts, check_consistency
from megatron_mimo_coord.world.device import world_device

logger = logging.getLogger(__name__)

FORMAT = 1  # of what this file writes
PATIENCE = 1800.0  # seconds that the first rank waits for the files of others, in the background
LAST_PATIENCE = 30.0  # the same once its trainer has ended


class LoadedCheckpoint(NamedTuple):
    """What :meth:`MultiModuleCoordinator.load_checkpoint` found.

    Args:
        step: after which step it was saved; 0 where there was no checkpoint.
        extra: what the trainer had given to save; empty where there was nothing.
    """

    step: int
    extra: dict[str, Any]


class Checkpoints:
    """Saves and loads the training of one coordinator.

    Args:
        job: the modules, their grids, and which of them are here.
        gather_params: makes this rank's weights those of the last step, where they come late.
    """

    def __init__(self, job: Job, gather_params: Callable[[], None]) -> None:
        self._job = job
        self._gather_params = gather_params
        self._layout = {name: str(grid) for name, grid in job.grids.items()}
        self._last: CheckpointSave | None = None  # saved or loaded here

    # -- save --------------------------------------------------------------------------------------

    def save(
        self,
        folder: Path | str,
        optimizer: Any,
        *,
        step: int,
        extra: Mapping[str, Any] | None,
        keep: int,
        background: bool,
    ) -> "CheckpointSave":
        """Write a checkpoint. Collective."""
        folder = Path(folder)
        path = folders.checkpoint_path(folder, step)
        if self._last is not None:
            self._last.wait()
            if self._last.is_whole and self._last.path.resolve() == path.resolve():
                return self._last
        self._gather_params()
        saving = CheckpointSave(path, self._job.rank, keep)
        facts = partial(self._begin, saving, folder, optimizer, step, extra, keep, background)
        flags = check_consistency(facts, f"the checkpoint of step {step} cannot be saved")
        saving.folder = folders.unfinished_path(folder, step, attempt=flags[0])
        saving.start(background)
        self._last = saving
        if not background:
            saving.wait()
        return saving

    def _begin(
        self,
        saving: "CheckpointSave",
        folder: Path,
        optimizer: Any,
        step: int,
        extra: Mapping[str, Any] | None,
        keep: int,
        background: bool,
    ) -> RankFacts:
        """Collect what is to be written, and make the folder to write into."""
        job = self._job
        problems = [] if optimizer is None else optimizer_problems(optimizer, list(job.ddps))
        if type(step) is not int or step < 0 or type(keep) is not int or keep < 1:
            problems.append(f"step must be 0 or more and keep 1 or more, not {step!r} and {keep!r}")
        tensors: list[torch.Tensor] = []
        said = encode(dict(extra or {}), tensors)
        facts = {"folder": str(folder.absolute()), "step": str(step), "keep": str(keep)}
        facts["background"] = str(background)
        facts |= {f"extra[{name!r}]": json.dumps(value) for name, value in said.items()}
        facts["tensors in extra"] = str([_fingerprint(tensor) for tensor in tensors])
        if problems:
            return RankFacts(facts, {}, problems)
        model = ModelState(job.model)
        states = OptimizerState.collect(optimizer, job.ddps) if optimizer else []
        chunks = [chunk for chunk in model.chunks() if chunk.writes]
        chunks += [chunk for each in states for chunk in each.chunks(model) if chunk.writes]
        if job.rank == 0:
            chunks += [_extra_chunk(index, tensor) for index, tensor in enumerate(tensors)]
            problems += _folder_problems(folder, step)
        attempt = secrets.randbits(40)
        if not problems and job.rank == 0:
            folders.begin(folder, step, attempt)
        saving.chunks = [chunk.copied() for chunk in chunks] if background else chunks
        saving.objects = {each.unique_key: each.data for each in model.objects()}
        saving.settings = {each.name: each.settings() for each in states}
        saving.random_states = random_states()
        saving.content = {
            "format": FORMAT,
            "step": step,
            "extra": said,
            "megatron-core": megatron_version,
            "world_size": dist.get_world_size(),
            "layout": self._layout,
        }
        return RankFacts(facts, {}, problems, flags=attempt)

    # -- load --------------------------------------------------------------------------------------

    def load(self, folder: Path | str, optimizer: Any) -> LoadedCheckpoint:
        """Go on from the newest checkpoint. Collective."""
        folder = Path(folder)
        if self._last is not None:
            self._last.wait()
        headline = f"the checkpoint in {folder} cannot be loaded"
        # The first rank looks, lest others see the folder as it was a moment ago.
        flags = check_consistency(partial(self._look, folder, optimizer), headline)
        if flags[0] == 0:
            if self._job.rank == 0:
                logger.warning(
                    "no checkpoint in %s: this training starts from the beginning", folder
                )
            return LoadedCheckpoint(0, {})
        path = folders.checkpoint_path(folder, flags[0] - 1)
        manifest_of = partial(Manifest.read, path)
        loading = _Loading(self._job, self._layout, optimizer)
        check_consistency(lambda: loading.prepare(manifest_of()), headline)
        loading.refuse_unknown_tensors(headline)
        check_consistency(loading.verify_files, headline)
        check_consistency(loading.fill, headline)
        self._last = CheckpointSave(path, is_over=True, is_whole=True)
        return loading.result()

    def _look(self, folder: Path, optimizer: Any) -> RankFacts:
        """The newest checkpoint's step, plus 1, as a flag of the first rank."""
        problems, steps = [], []
        if optimizer is not None:
            problems += optimizer_problems(optimizer, list(self._job.ddps))
        if self._job.rank == 0:
            steps = folders.whole_steps(folder)
            foreign = folders.foreign_files(folder)
            if not steps and foreign:
                problems.append(
                    f"{folder} has {', '.join(foreign[:8])}, but no checkpoint of this package: "
                    f"give the folder that save_checkpoint was given, or an empty one to start"
                )
        facts = {"folder": str(folder.absolute()), "with an optimizer": str(optimizer is not None)}
        return RankFacts(facts, {}, problems, flags=steps[-1] + 1 if steps else 0)


def _folder_problems(folder: Path, step: int) -> list[str]:
    """What keeps the first rank from writing there."""
    if not folders.claim(folder):
        return [
            f"another training writes into {folder}; end it (its torchrun may be gone already), or "
            f"give another folder"
        ]
    steps = folders.whole_steps(folder)
    if steps and steps[-1] >= step:
        return [
            f"{folder} already has a checkpoint of step {steps[-1]}: go on from it with "
            f"load_checkpoint, or give another folder"
        ]
    return []


def _extra_chunk(index: int, tensor: torch.Tensor) -> Chunk:
    shape = tuple(tensor.shape)
    return Chunk(f"extra.{index}", shape, Box([0] * len(shape), shape), tensor)


def _fingerprint(tensor: torch.Tensor) -> str:
    data = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()[:16]}"


# -- a save under way ------------------------------------------------------------------------------


@define(eq=False)
class CheckpointSave:
    """A checkpoint that is being written, or was.

    Args:
        path: where it is once it is whole.
        rank: this rank.
        keep: how many checkpoints the folder keeps.
        is_over: whether there is nothing to wait for.
        is_whole: whether it is known to be whole, on this rank as on all.
    """

    path: Path
    _rank: int = 0
    _keep: int = 1
    is_over: bool = field(default=False, repr=False)
    is_whole: bool = False
    folder: Path = field(factory=Path, init=False, repr=False)
    chunks: list[Chunk] = field(factory=list, init=False, repr=False)
    objects: dict[str, Any] = field(factory=dict, init=False, repr=False)
    settings: dict[str, Any] = field(factory=dict, init=False, repr=False)
    random_states: dict[str, Any] = field(factory=dict, init=False, repr=False)
    content: dict[str, Any] = field(factory=dict, init=False, repr=False)
    _thread: threading.Thread | None = field(default=None, init=False, repr=False)
    _written: threading.Event = field(factory=threading.Event, init=False, repr=False)
    _abandoned: threading.Event = field(factory=threading.Event, init=False, repr=False)
    _errors: list[Exception] = field(factory=list, init=False, repr=False)

    def start(self, background: bool) -> None:
        """Write this rank's part, now or in a thread of its own."""
        if not background:
            self._attempt(self._write)
            return
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
            ValueError: on every rank, if a rank could not write its part.
        """
        if self.is_over:
            return self.path
        self.is_over = True
        headline = f"the checkpoint {self.path} could not be written"
        if self._thread is not None:
            self._written.wait()
        try:
            check_consistency(self._report, headline)
        except ValueError:
            self._abandoned.set()
            raise
        if self._rank == 0:
            if self._thread is None:
                self._attempt(self._finish)
            else:
                self._thread.join()
        check_consistency(self._report, headline)
        self.is_whole = True
        return self.path

    def _run(self, copied: Any) -> None:
        """The thread."""
        if copied is not None:
            copied.synchronize()
        self._attempt(self._write)
        self._written.set()
        if self._rank == 0 and not self._errors:
            self._attempt(self._await_others)
        if self._rank == 0 and not self._errors and not self._abandoned.is_set():
            self._attempt(self._finish)
        for error in self._errors:
            logger.error("the checkpoint %s could not be written: %s", self.path, error)

    def _attempt(self, action: Callable[[], None]) -> None:
        """Keep an error until all ranks can hear of it."""
        try:
            action()
        except Exception as error:  # told by wait, which every save and load begins with
            self._errors.append(error)

    def _report(self) -> RankFacts:
        return RankFacts({}, {}, [f"{type(each).__name__}: {each}" for each in self._errors])

    def _write(self) -> None:
        """This rank's part: a file of tensors, one of random states, and the list of both."""
        folder, rank = self.folder, self._rank
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} was made, but not here: all ranks must share it")
        file = ChunkFile(folder / f"__{rank}_0.distcp")
        tensors = [file.write_tensor(chunk) for chunk in self.chunks]
        objects = [file.write_object(key, value) for key, value in self.objects.items()]
        if rank == 0:  # what Megatron's load looks for; here it is in the manifest
            objects.append(file.write_object("common_state/shard_0_1", {"iteration": self._step}))
        self.chunks, self.objects = [], {}
        files = {f"__{rank}_0.distcp": file.close()}
        states = folder / _random_states_name(rank)
        folders.write_durably(states, json.dumps(self.random_states))
        files[states.name] = folders.describe_file(states)
        listed = {"tensors": tensors, "objects": objects, "files": files, "settings": self.settings}
        folders.write_durably(folder / f"rank-{rank}.json", json.dumps(listed))

    @property
    def _step(self) -> int:
        return int(self.content["step"])

    def _lists(self) -> list[Path]:
        return [self.folder / f"rank-{rank}.json" for rank in range(self.content["world_size"])]

    def _await_others(self) -> None:
        """Wait until every rank has written its list."""
        missing, seconds, ended = self._lists(), 0.01, 0.0
        deadline = time.monotonic() + PATIENCE
        while missing := [path for path in missing if not path.exists()]:
            if self._abandoned.wait(seconds):
                return
            seconds = min(1.0, 1.5 * seconds)
            if not threading.main_thread().is_alive():
                ended = ended or time.monotonic()
                deadline = min(deadline, ended + LAST_PATIENCE)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{', '.join(path.name for path in missing[:8])} never came")

    def _finish(self) -> None:
        """Join the lists of all ranks, and declare the checkpoint whole."""
        lists = [json.loads(path.read_text()) for path in self._lists()]
        index = Index.merge(lists)
        folder = self.folder
        index.save_for_megatron(folder)
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        folders.put_on_disk(folder / "metadata.json")
        files = {name: found for each in lists for name, found in each["files"].items()}
        for name in (".metadata", "metadata.json"):
            files[name] = folders.describe_file(folder / name)
        for path in self._lists():
            path.unlink()
        modules = {name for each in lists for name in each["settings"]}
        settings = {
            name: merge_settings([e["settings"][name] for e in lists if name in e["settings"]])
            for name in sorted(modules)
        }
        content = {
            **self.content,
            "optimizer": settings,
            "files": files,
            "tensors": index.tensors,
            "objects": index.objects,
        }
        folders.finish(folder, content, self._keep)


def _random_states_name(rank: int) -> str:
    return f"random_states_{rank}.json"


# -- a load under way ------------------------------------------------------------------------------


class _Loading:
    """The way from a checkpoint's manifest into the model, which changes only at its end."""

    def __init__(self, job: Job, layout: Mapping[str, str], optimizer: Any) -> None:
        self._job = job
        self._layout = layout
        self._optimizer = optimizer

    def prepare(self, manifest: Manifest) -> RankFacts:
        """Compare what the checkpoint holds with what there is here."""
        self._manifest, content = manifest, manifest.content
        path = {"checkpoint": str(manifest.path.absolute())}
        if content["format"] != FORMAT:
            return RankFacts(
                path, {}, [f"{manifest.path} has format {content['format']}, not {FORMAT}"]
            )
        problems = []
        if _series(content["megatron-core"]) != _series(megatron_version):
            problems.append(
                f"it was written with megatron-core {content['megatron-core']}, and this is "
                f"{megatron_version}: use one of the same series"
            )
        self._index = Index(content["tensors"], content["objects"])
        self._model = ModelState(self._job.model)
        self._states: list[OptimizerState] = []
        if self._optimizer is not None:
            self._states = OptimizerState.collect(self._optimizer, self._job.ddps)
        self._chunks = [chunk for each in self._states for chunk in each.chunks(self._model)]
        problems += wanted([*self._model.chunks(), *self._chunks], self._index)
        for each in self._model.objects():
            if each.unique_key not in self._index.objects:
                problems.append(f"the checkpoint has no {each.unique_key}")
        for state in self._states:
            problems += state.problems(content["optimizer"].get(state.name))
        return RankFacts(path, {}, _shortened(problems))

    def refuse_unknown_tensors(self, headline: str) -> None:
        """Raise if the checkpoint holds tensors that no rank has. Collective."""
        keys = [key for key in sorted(self._index.tensors) if not key.startswith("extra.")]
        if self._optimizer is None:
            keys = [key for key in keys if not key.startswith("optimizer.")]
        here = {chunk.key for chunk in (*self._model.chunks(), *self._chunks)}
        known = torch.tensor([key in here for key in keys], dtype=torch.int32).to(world_device())
        dist.all_reduce(known, op=dist.ReduceOp.MAX)
        unknown = [key for key, flag in zip(keys, known.tolist(), strict=True) if not flag]
        raise_problems(headline, _shortened([f"there is no {key} here" for key in unknown]))

    def verify_files(self) -> RankFacts:
        """Read this rank's share of the files, and compare them with their digests."""
        found = folders.damages(self._manifest, self._job.rank, dist.get_world_size())
        if found:
            steps = folders.whole_steps(self._manifest.path.parent)[:-1]
            cure = f"; to go on from step {steps[-1]}, delete this one" if steps else ""
            found = [f"{problem}{cure}" for problem in found]
        return RankFacts({}, {}, found)

    def fill(self) -> RankFacts:
        """Overwrite model, optimizer and random states."""
        content, path = self._manifest.content, self._manifest.path
        self._reader = ChunkReader(path, self._index)
        self._model.load(self._reader)
        for chunk in self._chunks:
            self._reader.fill(chunk)
        for state in self._states:
            state.hand_back()
            state.load_settings(content["optimizer"][state.name])
        if content["layout"] == self._layout and content["world_size"] == dist.get_world_size():
            text = (path / _random_states_name(self._job.rank)).read_text()
            restore_random_states(json.loads(text))
        return RankFacts({}, {})

    def result(self) -> LoadedCheckpoint:
        """What the trainer gets back."""
        content, index = self._manifest.content, self._index
        count = sum(key.startswith("extra.") for key in index.tensors)
        tensors = [self._reader.tensor(f"extra.{number}") for number in range(count)]
        return LoadedCheckpoint(content["step"], decode(content["extra"], tensors))


def _series(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _shortened(problems: list[str], most: int = 8) -> list[str]:
    if len(problems) <= most:
        return problems
    return [*problems[:most], f"and {len(problems) - most} more"]
