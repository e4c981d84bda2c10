"""Saves a training and goes on with it, on the same ranks or others; whole or not at all."""

import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attrs import evolve
from megatron.core import __version__ as megatron_version
from megatron.core.models.mimo.optimizer import MimoOptimizer

from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.checks.replicas import copy_problems, differing_parameters
from megatron_mimo_coord.gradients.optimizer_steps import OptimizerSteps
from megatron_mimo_coord.megatron.checkpoints import ShardedWeights
from megatron_mimo_coord.megatron.optimizer_states import OptimizerStates, optimizer_problems
from megatron_mimo_coord.megatron.optimizers import optimizers_here
from megatron_mimo_coord.training import checkpoint_folder as folders
from megatron_mimo_coord.training.checkpoint_load import CheckpointLoad, LoadedCheckpoint
from megatron_mimo_coord.training.checkpoint_matching import model_sizes
from megatron_mimo_coord.training.checkpoint_save import FORMAT, CheckpointSave, Part, join_parts
from megatron_mimo_coord.training.plain_data import Blobs, encode, put
from megatron_mimo_coord.training.random_states import random_states
from megatron_mimo_coord.world.consistency import RankFacts, check_consistency

logger = logging.getLogger(__name__)

MAX_STEPS = 2**62  # what ranks can tell each other
_NOTHING, _MEGATRONS = MAX_STEPS, MAX_STEPS + 1  # in the place of a step

_in_background: list[CheckpointSave] = []
"""What this process writes, whichever coordinator does; the same on every rank."""


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

    def tell_failure(self) -> None:
        """Raise if what is being written in the background has failed here. Not collective.

        Raises:
            ValueError: on the ranks that know of it; a save, a load and ``wait`` tell all ranks.
        """
        if self._last is not None:
            self._last.tell_failure()

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
        _await_background()
        self._gather_params()
        job, last, blobs = self._job, self._last, Blobs()
        differing = differing_parameters(job.ddps, job.groups)

        def ask() -> tuple[RankFacts, tuple[CheckpointSave, ShardedWeights, dict[str, Any], Any]]:
            """Compare what the ranks were given."""
            weights = ShardedWeights(job.model, job.infra.pg_collections)
            problems = self._problems(optimizer)
            problems += copy_problems(job.ddps, job.groups, weights, differing)
            content = {
                "format": FORMAT,
                "step": _number("step", "a number of steps", step, 0),
                "extra": _encoded("extra", extra or {}, blobs),
                "trainable_only": bool(trainable_only),
                "has_rank_states": rank_state is not None,
                "megatron-core": megatron_version,
                "world_size": dist.get_world_size(),
                "layout": self._layout,
            }
            if job.rank > 0:
                blobs.clear()  # it is the same on every rank
            own = _encoded("rank_state", rank_state, blobs)
            path = folders.checkpoint_path(Path(folder).absolute(), step)
            saving = CheckpointSave(path, step, self._holds(path, optimizer, content, own))
            # Nothing has changed, if every step that changes what is saved is known.
            watched = self._optimizer_steps.optimizers
            if last is not None and (optimizer in watched if optimizer is not None else watched):
                saving = last if last.failure == "" and last.holds == saving.holds else saving
            facts = {
                "folder": path.parent,
                "step": step,
                "keep": _number("keep", "a number of checkpoints", keep, 1),
                "background": background,
                "trainable_only": content["trainable_only"],
                "with an optimizer": optimizer is not None,
                "with rank_state": rank_state is not None,
                "written already": saving is last,
                **{f"extra[{key!r}]": _shortened(each) for key, each in content["extra"].items()},
            }
            told = RankFacts({name: str(fact) for name, fact in facts.items()}, {}, problems)
            return told, (saving, weights, content, own)

        _, (saving, weights, content, own) = _agree(ask, headline)
        if saving is last:
            return saving

        def begin() -> tuple[RankFacts, Part | None]:
            """Make the folder to write into, and collect what this rank writes."""
            attempt = secrets.randbits(40)
            if job.rank == 0:
                problems = self._folder_problems(saving.path.parent, step)
                if problems:
                    return RankFacts({}, {}, problems), None
                folders.begin(saving.path.parent, step, attempt)
            part = self._part(weights, optimizer, content, own, blobs)
            return RankFacts({}, {}, flags=attempt), part.copied() if background else part

        (attempt, *_), part = _agree(begin, headline)
        assert part is not None, "nobody has a problem"
        unfinished = folders.unfinished_path(saving.path.parent, step, attempt)
        if background:
            saving.start(part, unfinished, content, keep)
            _in_background.append(saving)
        else:
            headline = f"the checkpoint {saving.path} could not be written"
            _all_do(partial(part.write, unfinished), headline)
            join = partial(join_parts, unfinished, content, keep)
            _all_do(join if job.rank == 0 else lambda: None, headline)
        self._last = saving
        return saving

    def _problems(self, optimizer: Any) -> list[str]:
        """What keeps this rank from saving or loading."""
        found = self._obstacles()
        if optimizer is not None:
            found = [*found, *optimizer_problems(optimizer, list(self._job.ddps))]
        return found

    def _holds(
        self, path: Path, optimizer: Any, content: Mapping[str, Any], rank_state: Any
    ) -> Any:
        """What a checkpoint holds of the training as it is now."""
        with_optimizer, changes = optimizer is not None, self._optimizer_steps.num_changes
        given = (content["trainable_only"], content["extra"], rank_state)
        return (path, with_optimizer, changes, *given)

    def _part(
        self,
        weights: ShardedWeights,
        optimizer: Any,
        content: Mapping[str, Any],
        rank_state: Any,
        blobs: Blobs,
    ) -> Part:
        """What this rank writes."""
        ddps = self._job.ddps
        states = OptimizerStates(optimizer, ddps, weights)
        left_out = weights.frozen_keys() if content["trainable_only"] else ()
        chunks = [chunk for chunk in weights.chunks() if chunk.key not in left_out]
        objects = {key: value for key, value, writes in weights.objects() if writes}
        if self._job.rank == 0:  # what Megatron's load looks for; here it is in the manifest
            objects["common_state/shard_0_1"] = {"iteration": content["step"]}
        own = {"random": encode(random_states(), "random", blobs), "rank_state": rank_state}
        listed = {
            "sizes": {name: model_sizes(ddp.module) for name, ddp in ddps.items()},
            "settings": encode(states.settings(), "optimizer", blobs),
            "states": put(json.dumps(own).encode(), blobs),
        }
        chunks = [chunk for chunk in [*chunks, *states.chunks()] if chunk.writes]
        return Part(self._job.rank, chunks, objects, blobs, listed)

    def _folder_problems(self, folder: Path, step: int) -> list[str]:
        """What keeps the first rank from writing there."""
        if not folders.claim(folder):
            return [
                f"another training writes into {folder}; end it (its torchrun may be gone "
                f"already), or give another folder"
            ]
        steps, last = folders.checkpoint_steps(folder), self._last
        if last is not None and last.path.parent == folder and steps and steps[-1] > last.step:
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
        _await_background()
        look = partial(self._look, folder, optimizer, step=step, strict=strict, names=names)
        (found, *_), path = _agree(look, headline)
        if found == _NOTHING:
            if self._job.rank == 0:
                logger.warning("no checkpoint in %s: this training starts from the beginning", path)
            return LoadedCheckpoint(0, {})
        loading = CheckpointLoad(self._job, self._layout, optimizer, strict, names or {})
        if found == _MEGATRONS:
            _agree(lambda: (loading.prepare_megatrons(path), None), headline)
            return self._fill(loading, headline, optimizer)
        path = folders.checkpoint_path(path, found)
        _agree(lambda: (loading.prepare(path), None), headline)
        loaded = self._fill(loading, headline, optimizer)
        holds = self._holds(path, optimizer, loading.content, loading.rank_state)
        self._last = CheckpointSave(path, found, holds)
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
        _await_background()
        loading = CheckpointLoad(self._job, self._layout, None, strict or False, names or {})

        def prepare() -> tuple[RankFacts, None]:
            said = loading.prepare_module(name, tensors)
            return evolve(said, problems=[*self._obstacles(), *said.problems]), None

        _agree(prepare, headline)
        return self._fill(loading, headline, None, name)

    def _fill(
        self, loading: CheckpointLoad, headline: str, optimizer: Any, module: str = ""
    ) -> LoadedCheckpoint:
        """Overwrite what is here; without an optimizer, also what others have copied of weights.

        Or those of one module: lest a step undo the load.
        """
        loading.tell_differences(headline)
        _all_do(loading.fill, headline)
        self._optimizer_steps.num_changes += 1
        for known in self._optimizer_steps.optimizers if optimizer is None else ():
            if module and isinstance(known, MimoOptimizer):
                known = optimizers_here(known).get(module)
            if known is not None:
                known.reload_model_params()
        return loading.loaded

    def _look(
        self, folder: Path | str, optimizer: Any, step: int | None, **options: Any
    ) -> tuple[RankFacts, Path]:
        """Which checkpoint to load, as a flag of the first rank, and in which folder.

        The others do not look, lest they see it as it was a moment ago.
        """
        problems, found, folder = self._problems(optimizer), _NOTHING, Path(folder).absolute()
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
        options |= {"folder": folder, "step": step, "with an optimizer": optimizer is not None}
        told = {name: str(option) for name, option in options.items()}
        return RankFacts(told, {}, problems, flags=found), folder


def _await_background() -> None:
    """Wait for what is being written. Collective; raises what all ranks have not heard yet."""
    while _in_background:
        saving = _in_background.pop(0)
        if saving.failure is None:
            saving.wait()


def _number(name: str, what: str, given: Any, least: int) -> int:
    if type(given) is not int or not least <= given < MAX_STEPS:
        raise ValueError(f"{name} must be {what}, {least} or more, not {given!r}")
    return given


def _encoded(name: str, given: Any, blobs: Blobs) -> Any:
    """What JSON says of a mapping, or of None.

    Raises:
        ValueError: it is none, or JSON cannot say something of it; names it.
    """
    if not isinstance(given, Mapping | None):
        raise ValueError(f"{name} is a {type(given).__name__}: give a dict with string keys")
    return encode(given, name, blobs)


def _agree[Result](
    make: Callable[[], tuple[RankFacts, Result]], headline: str
) -> tuple[list[int], Result]:
    """:func:`check_consistency`, but also the rank with an unforeseen error raises a ValueError.

    Args:
        make: what this rank says to the others, and what it makes at the same time.
        headline: how the error begins.

    Returns:
        The flags of every rank, and what was made here.
    """
    made: list[Result] = []

    def say() -> RankFacts:
        said, result = make()
        made.append(result)
        return said

    try:
        return check_consistency(say, headline), made[0]
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{headline}: {type(error).__name__}: {error}") from error


def _all_do(function: Callable[[], object], headline: str) -> None:
    """Have each rank do its part; all hear of those that could not. Collective."""
    _agree(lambda: (RankFacts({}, {}), function()), headline)


def _shortened(value: Any, most: int = 80) -> str:
    """What is the same only for the same value."""
    text = json.dumps(value)
    if len(text) <= most:
        return text
    return f"{text[:most]}... ({hashlib.sha256(text.encode()).hexdigest()[:16]})"
