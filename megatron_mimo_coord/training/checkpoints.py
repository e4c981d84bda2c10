"""Saves a training and goes on with it, on the same ranks or others; whole or not at all."""

import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_version
from megatron.core.models.mimo.optimizer import MimoOptimizer

from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.gradients.optimizer_steps import OptimizerSteps
from megatron_mimo_coord.megatron.optimizers import optimizers_here
from megatron_mimo_coord.training import checkpoint_folder as folders
from megatron_mimo_coord.training.boxes import Box
from megatron_mimo_coord.training.checkpoint_folder import Manifest
from megatron_mimo_coord.training.checkpoint_load import CheckpointLoad
from megatron_mimo_coord.training.checkpoint_save import FORMAT, RANK_STATE, CheckpointSave
from megatron_mimo_coord.training.checkpoint_states import (
    ModelState,
    OptimizerState,
    optimizer_problems,
)
from megatron_mimo_coord.training.checkpoint_tensors import Chunk
from megatron_mimo_coord.training.model_sizes import model_sizes
from megatron_mimo_coord.training.plain_data import encode
from megatron_mimo_coord.training.random_states import random_states
from megatron_mimo_coord.world.consistency import RankFacts, exchange_flags

logger = logging.getLogger(__name__)


_NOTHING, _MEGATRONS = 2**62, 2**62 + 1  # in the place of a step

_in_background: dict[Path, CheckpointSave] = {}
"""What this process writes into each folder, whichever coordinator does."""


class _StepAndExtra(NamedTuple):
    step: int
    extra: dict[str, Any]


class LoadedCheckpoint(_StepAndExtra):
    """What :meth:`MultiModuleCoordinator.load_checkpoint` found: ``step`` and ``extra``.

    Attributes:
        step: after which step it was saved; 0 where there was no checkpoint.
        extra: what the trainer had given to save; empty where there was nothing.
        rank_state: what this rank had given to save; None on another layout.
        rank_states: on another layout, what all ranks had given, in their order.
        missing_keys: weights here that the checkpoint lacks, and that stay as they were.
        unexpected_keys: weights of the checkpoint that are not here.
    """

    rank_state: Any = None
    rank_states: Sequence[Any] = ()
    missing_keys: Sequence[str] = ()
    unexpected_keys: Sequence[str] = ()


class Checkpoints:
    """Saves and loads the training of one coordinator.

    Args:
        job: the modules, their grids, and which of them are here.
        gather_params: makes this rank's weights those of the last step, where they come late.
        optimizer_steps: knows the optimizers of the model.
        obstacles: what keeps this rank from saving or loading between these two steps.
    """

    def __init__(
        self,
        job: Job,
        gather_params: Callable[[], None],
        optimizer_steps: OptimizerSteps,
        obstacles: Callable[[], list[str]],
    ) -> None:
        self._job = job
        self._obstacles = obstacles
        self._gather_params = gather_params
        self._optimizer_steps = optimizer_steps
        self._layout = {name: str(grid) for name, grid in job.grids.items()}
        self._last: CheckpointSave | None = None  # saved or loaded by this coordinator

    # -- save --------------------------------------------------------------------------------------

    def save(
        self,
        folder: Path | str,
        optimizer: Any,
        *,
        step: int,
        extra: Mapping[str, Any] | None,
        rank_state: Mapping[str, Any] | None,
        trainable_only: bool,
        keep: int,
        background: bool,
    ) -> CheckpointSave:
        """Write a checkpoint. Collective."""
        headline = f"the checkpoint of step {step} cannot be saved"
        folder = self._agreed_path(folder, headline)
        self._wait(folder)
        saving = CheckpointSave(folder, step, self._job.rank, keep)
        saving.content = {"trainable_only": bool(trainable_only)}
        self._gather_params()
        models: list[ModelState] = []
        _agree(partial(self._read_model, models), headline)
        problems = models[0].differing_replicas()
        given = (extra or {}, rank_state)
        request = partial(self._begin, saving, models[0], problems, optimizer, given, background)
        flags = _agree(request, headline)
        if saving.is_whole:
            return saving
        saving.start(attempt=flags[0], background=background)
        self._last = saving
        if background:
            _in_background[folder] = saving
        else:
            saving.wait()
        return saving

    def _agreed_path(self, folder: Path | str, headline: str) -> Path:
        """The same folder on every rank, absolute."""
        path = Path(folder).absolute()
        _agree(lambda: RankFacts({"folder": str(path)}, {}, self._obstacles()), headline)
        return path

    def _wait(self, folder: Path) -> None:
        """Wait for what is being written by this coordinator, or into the folder by another."""
        for saving in (self._last, _in_background.pop(folder, None)):
            if saving is not None and not saving.is_over:
                saving.wait()

    def tell_failure(self) -> None:
        """Raise if what is being written in the background has failed here. Not collective.

        Raises:
            ValueError: on the ranks that know of it; a save, a load and ``wait`` tell all ranks.
        """
        if self._last is not None:
            self._last.tell_failure()

    def _read_model(self, models: list[ModelState]) -> RankFacts:
        models.append(ModelState(self._job))
        return RankFacts({}, {}, [*models[0].problems()])

    def _begin(
        self,
        saving: CheckpointSave,
        model: ModelState,
        differing: list[str],
        optimizer: Any,
        given: tuple[Mapping[str, Any], Mapping[str, Any] | None],
        background: bool,
    ) -> RankFacts:
        """Compare what the ranks were given; collect it, and make the folder to write into.

        Where the checkpoint is there already, and nothing has changed since, it is whole.
        """
        problems = [*saving.problems(), *differing]
        if optimizer is not None:
            problems += optimizer_problems(optimizer, list(self._job.ddps))
        for name, each in zip(("extra", "rank_state"), given, strict=True):
            if not isinstance(each, Mapping | None):
                raise ValueError(f"{name} is a {type(each).__name__}: give a dict with string keys")
        tensors: list[torch.Tensor] = []
        said, own = encode(given[0], tensors), encode(given[1], where="rank_state")
        facts = _facts(saving, optimizer, said, tensors, given[1] is not None)
        saving.holds = (dict(facts), own, self._optimizer_steps.num_changes)
        last = self._last
        if last is not None and last.is_whole and self._watches(optimizer):
            saving.is_over = saving.is_whole = last.holds == saving.holds
        options = {"keep": saving.keep, "background": background, "saved": saving.is_whole}
        facts |= {name: str(option) for name, option in options.items()}
        attempt = secrets.randbits(40)
        if not problems and not saving.is_whole:
            self._collect(saving, model, optimizer, tensors, background)
            saving.random_states[RANK_STATE] = own
            saving.content |= {
                "has_rank_states": given[1] is not None,
                "format": FORMAT,
                "step": saving.step,
                "extra": said,
                "megatron-core": megatron_version,
                "world_size": dist.get_world_size(),
                "layout": self._layout,
            }
            if self._job.rank == 0:
                problems += self._folder_problems(saving.path.parent, saving.step)
                if not problems:
                    folders.begin(saving.path.parent, saving.step, attempt)
        return RankFacts(facts, {}, problems, flags=attempt)

    def _watches(self, optimizer: Any) -> bool:
        """Whether every step that changes what is saved is known."""
        known = self._optimizer_steps.optimizers
        return bool(known) if optimizer is None else optimizer in known

    def _collect(
        self,
        saving: CheckpointSave,
        model: ModelState,
        optimizer: Any,
        extra: list[torch.Tensor],
        background: bool,
    ) -> None:
        """What this rank writes; copies of it, if the training goes on meanwhile."""
        states = OptimizerState.collect(optimizer, self._job.ddps) if optimizer else []
        left_out = model.frozen_keys() if saving.content["trainable_only"] else ()
        chunks = [chunk for chunk in model.chunks() if chunk.key not in left_out]
        chunks += [chunk for each in states for chunk in each.chunks(model)]
        if self._job.rank == 0:
            chunks += [_extra_chunk(index, tensor) for index, tensor in enumerate(extra)]
        chunks = [chunk for chunk in chunks if chunk.writes]
        saving.chunks = [chunk.copied() for chunk in chunks] if background else chunks
        saving.objects = {key: value for key, value, writes in model.objects() if writes}
        saving.sizes = {name: model_sizes(ddp.module) for name, ddp in self._job.ddps.items()}
        saving.settings = {each.name: each.settings(model) for each in states}
        saving.random_states = random_states()

    # -- load --------------------------------------------------------------------------------------

    def load(
        self,
        folder: Path | str,
        optimizer: Any,
        *,
        step: int | None,
        strict: bool | None,
        names: Mapping[str, str] | None,
    ) -> LoadedCheckpoint:
        """Go on from a checkpoint, the newest if none is chosen. Collective."""
        headline = f"the checkpoint in {folder} cannot be loaded"
        folder = self._agreed_path(folder, headline)
        self._wait(folder)
        # The first rank looks, lest others see the folder as it was a moment ago.
        options = {"step": step, "strict": strict, "names": dict(names or {})}
        found, *_ = _agree(partial(self._look, folder, optimizer, options), headline)
        if found == _NOTHING:
            if self._job.rank == 0:
                logger.warning(
                    "no checkpoint in %s: this training starts from the beginning", folder
                )
            return LoadedCheckpoint(0, {})
        loading = CheckpointLoad(self._job, self._layout, optimizer, strict, names or {})
        if found == _MEGATRONS:
            _agree(lambda: loading.prepare_megatrons(folder), headline)
            return self._load_weights(loading, headline)
        path = folders.checkpoint_path(folder, found)
        _agree(lambda: loading.prepare(Manifest.read(path)), headline)
        loading.tell_differences(headline)
        _agree(loading.verify_files, headline)
        _agree(loading.fill, headline)
        self._optimizer_steps.num_changes += 1
        if optimizer is None:
            self._reload_optimizers()
        loaded = LoadedCheckpoint(found, loading.extra())
        if loading.is_same_layout:
            (loaded.rank_state,) = loading.rank_states
        else:
            loaded.rank_states = loading.rank_states
        loaded.missing_keys, loaded.unexpected_keys = loading.missing, loading.unexpected
        self._last = CheckpointSave(folder, found, is_over=True, is_whole=True)
        self._last.content = {"trainable_only": loading.has_trainable_only}
        tensors: list[torch.Tensor] = []
        said, own = encode(loaded.extra, tensors), encode(loaded.rank_state)
        facts = _facts(self._last, optimizer, said, tensors, own is not None)
        self._last.holds = (facts, own, self._optimizer_steps.num_changes)
        return loaded

    def load_module(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        strict: bool,
        names: Mapping[str, str] | None,
    ) -> LoadedCheckpoint:
        """Fill the weights of one module with whole ones. Collective."""
        headline = f"the weights of module {name!r} cannot be loaded"
        _agree(lambda: RankFacts({}, {}, self._obstacles()), headline)
        self._wait(Path())
        loading = CheckpointLoad(self._job, self._layout, None, strict or False, names or {})
        _agree(lambda: loading.prepare_module(name, tensors), headline)
        return self._load_weights(loading, headline, name)

    def _load_weights(
        self, loading: CheckpointLoad, headline: str, module: str = ""
    ) -> LoadedCheckpoint:
        """Overwrite weights alone, and what optimizers have copied of them."""
        loading.tell_differences(headline)
        _agree(loading.fill_weights, headline)
        self._optimizer_steps.num_changes += 1
        self._reload_optimizers(module)
        loaded = LoadedCheckpoint(0, {})
        loaded.missing_keys, loaded.unexpected_keys = loading.missing, loading.unexpected
        return loaded

    def _reload_optimizers(self, module: str = "") -> None:
        """Have optimizers, or those of one module, take the weights, lest a step undo the load."""
        for known in self._optimizer_steps.optimizers:
            if module and isinstance(known, MimoOptimizer):
                known = optimizers_here(known).get(module)
            if known is not None:
                known.reload_model_params()

    def _look(self, folder: Path, optimizer: Any, options: Mapping[str, Any]) -> RankFacts:
        """Which checkpoint to load, as a flag of the first rank."""
        problems, found = [], _NOTHING
        step = options["step"]
        if optimizer is not None:
            problems += optimizer_problems(optimizer, list(self._job.ddps))
        if self._job.rank == 0:
            steps = folders.checkpoint_steps(folder)
            foreign = folders.foreign_files(folder)
            if step is not None and step not in steps:
                problems.append(f"{folder} has no checkpoint of step {step!r}, but of {steps}")
            elif steps:
                found = steps[-1] if step is None else step
            elif ".metadata" in foreign and folders.MANIFEST not in foreign:
                found = _MEGATRONS
                if optimizer is not None:
                    problems.append(
                        f"{folder} is of Megatron's dist_checkpointing, of which the weights are "
                        f"loaded alone: give None in the place of the optimizer"
                    )
            elif foreign:
                problems.append(
                    f"{folder} has {', '.join(foreign[:8])}, but no checkpoint of this package: "
                    f"give the folder that save_checkpoint was given, or an empty one to start; "
                    f"of another trainer's checkpoint, the folder with .metadata in it"
                )
        facts = {"with an optimizer": str(optimizer is not None)}
        facts |= {name: str(option) for name, option in options.items()}
        return RankFacts(facts, {}, problems, flags=found)

    def _folder_problems(self, folder: Path, step: int) -> list[str]:
        """What keeps the first rank from writing there."""
        if not folders.claim(folder):
            return [
                f"another training writes into {folder}; end it (its torchrun may be gone "
                f"already), or give another folder"
            ]
        steps, last = folders.checkpoint_steps(folder), self._last
        if last is not None and last.parent == folder and steps and steps[-1] > last.step:
            return [
                f"{folder} has a checkpoint of step {steps[-1]}, and this training goes on from "
                f"step {last.step}: give another folder, or delete what is later"
            ]
        if steps and steps[-1] >= step:
            return [
                f"{folder} already has a checkpoint of step {steps[-1]}: go on from it with "
                f"load_checkpoint, or give another folder"
            ]
        return []


def _agree(make_facts: Callable[[], RankFacts], headline: str) -> list[int]:
    """:func:`exchange_flags`, but also the rank with an unforeseen error raises a ValueError."""
    try:
        return exchange_flags(make_facts, headline)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{headline}: {type(error).__name__}: {error}") from error


def _facts(
    saving: CheckpointSave,
    optimizer: Any,
    extra: Mapping[str, Any],
    tensors: list[torch.Tensor],
    has_rank_state: bool,
) -> dict[str, str]:
    """What a trainer has asked to save, in words."""
    return {
        "folder": str(saving.path.parent),
        "step": str(saving.step),
        "with an optimizer": str(optimizer is not None),
        "with rank_state": str(has_rank_state),
        "trainable_only": str(saving.content["trainable_only"]),
        **{f"extra[{name!r}]": json.dumps(value) for name, value in extra.items()},
        "tensors in extra": str([_fingerprint(tensor) for tensor in tensors]),
    }


def _extra_chunk(index: int, tensor: torch.Tensor) -> Chunk:
    shape = tuple(tensor.shape)
    return Chunk(f"extra.{index}", shape, Box([0] * len(shape), shape), tensor)


def _fingerprint(tensor: torch.Tensor) -> str:
    data = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()[:16]}"
