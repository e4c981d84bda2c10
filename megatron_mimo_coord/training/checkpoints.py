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
from megatron.core import __version__ as megatron_version
from megatron.core.models.mimo.optimizer import MimoOptimizer

from megatron_mimo_coord.checks.copies import copy_problems, differing_buffers, differing_copies
from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.gradients.optimizer_steps import OptimizerSteps
from megatron_mimo_coord.megatron.checkpoints import ShardedWeights
from megatron_mimo_coord.megatron.optimizer_states import OptimizerStates, optimizer_problems
from megatron_mimo_coord.megatron.optimizers import optimizers_here
from megatron_mimo_coord.training import checkpoint_folder as folders
from megatron_mimo_coord.training.checkpoint_folder import Manifest
from megatron_mimo_coord.training.checkpoint_load import CheckpointLoad, LoadedCheckpoint
from megatron_mimo_coord.training.checkpoint_save import (
    FORMAT,
    RANK_STATE,
    CheckpointSave,
    Share,
)
from megatron_mimo_coord.training.model_sizes import model_sizes
from megatron_mimo_coord.training.plain_data import encode
from megatron_mimo_coord.training.random_states import random_states
from megatron_mimo_coord.world.consistency import RankFacts, check_consistency

logger = logging.getLogger(__name__)


_NOTHING, _MEGATRONS = 2**62, 2**62 + 1  # in the place of a step

_in_background: dict[Path, CheckpointSave] = {}
"""What this process writes into each folder, whichever coordinator does."""


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
        self._gather_params()
        weights = self._agreed_weights(headline)
        saving = CheckpointSave(folder, step, rank=self._job.rank, keep=keep)
        differing = differing_copies(self._job, weights)
        for remark in differing_buffers(self._job):
            logger.warning("%s", remark)

        def begin() -> RankFacts:
            content = {
                "trainable_only": bool(trainable_only),
                "has_rank_states": rank_state is not None,
                "format": FORMAT,
                "step": step,
                "extra": _encoded("extra", extra or {}),
                "megatron-core": megatron_version,
                "world_size": dist.get_world_size(),
                "layout": self._layout,
            }
            own = _encoded("rank_state", rank_state)
            return self._begin(saving, weights, differing, optimizer, content, own, background)

        flags = _agree(begin, headline)
        if saving.is_whole:
            return saving
        saving.start(attempt=flags[0])
        self._last = saving
        if background:
            _in_background[folder] = saving
        else:
            saving.wait()
        return saving

    def _agreed_path(self, folder: Path | str, headline: str) -> Path:
        """The same folder on every rank, absolute."""
        _agree(
            lambda: RankFacts({"folder": str(Path(folder).absolute())}, {}, self._obstacles()),
            headline,
        )
        return Path(folder).absolute()

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

    def _agreed_weights(self, headline: str) -> ShardedWeights:
        """Where the weights lie; every rank is told if Megatron cannot say so on one."""
        found: list[ShardedWeights] = []

        def read() -> RankFacts:
            found.append(ShardedWeights(self._job.model, self._job.infra.pg_collections))
            return RankFacts({}, {}, [*copy_problems(self._job, found[0])])

        _agree(read, headline)
        return found[0]

    def _begin(
        self,
        saving: CheckpointSave,
        weights: ShardedWeights,
        differing: list[str],
        optimizer: Any,
        content: dict[str, Any],
        rank_state: Any,
        background: bool,
    ) -> RankFacts:
        """Compare what the ranks were given; collect it, and make the folder to write into.

        Where the checkpoint is there already, and nothing has changed since, it is whole.
        """
        problems = [*saving.problems(), *differing]
        if optimizer is not None:
            problems += optimizer_problems(optimizer, list(self._job.ddps))
        facts = self._remember(saving, optimizer, content, rank_state)
        last, watched = self._last, self._optimizer_steps.optimizers
        # Whether every step that changes what is saved is known.
        is_watched = bool(watched) if optimizer is None else optimizer in watched
        if last is not None and last.is_whole and is_watched:
            saving.is_over = saving.is_whole = last.holds == saving.holds
        options = {"keep": saving.keep, "background": background, "saved": saving.is_whole}
        facts |= {name: str(option) for name, option in options.items()}
        attempt = secrets.randbits(40)
        if not problems and not saving.is_whole:
            share = self._share(weights, optimizer, content["trainable_only"], rank_state)
            saving.prepare(share.copied() if background else share, content)
            if self._job.rank == 0:
                problems += self._folder_problems(saving.parent, saving.step)
                if not problems:
                    folders.begin(saving.parent, saving.step, attempt)
        return RankFacts(facts, {}, problems, flags=attempt)

    def _remember(
        self, saving: CheckpointSave, optimizer: Any, content: Mapping[str, Any], rank_state: Any
    ) -> dict[str, str]:
        """Have a checkpoint know what it holds; what of it all ranks must give alike, in words."""
        facts = {
            "folder": str(saving.parent),
            "step": str(saving.step),
            "with an optimizer": str(optimizer is not None),
            "with rank_state": str(rank_state is not None),
            "trainable_only": str(content["trainable_only"]),
        }
        facts |= {f"extra[{key!r}]": _shortened(each) for key, each in content["extra"].items()}
        saving.holds = (facts, rank_state, self._optimizer_steps.num_changes)
        return dict(facts)

    def _share(
        self, weights: ShardedWeights, optimizer: Any, trainable_only: bool, rank_state: Any
    ) -> Share:
        """What this rank writes."""
        ddps = self._job.ddps
        states = OptimizerStates(optimizer, ddps, weights)
        left_out = weights.frozen_keys() if trainable_only else ()
        chunks = [chunk for chunk in weights.chunks() if chunk.key not in left_out]
        chunks += states.chunks()
        return Share(
            chunks=[chunk for chunk in chunks if chunk.writes],
            objects={key: value for key, value, writes in weights.objects() if writes},
            states={**encode(random_states()), RANK_STATE: rank_state},
            modules={
                "sizes": {name: model_sizes(ddp.module) for name, ddp in ddps.items()},
                "settings": encode(states.settings(), where="optimizer"),
            },
        )

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
        self._last = CheckpointSave(folder, found, is_over=True, is_whole=True)
        own = encode(loading.loaded.rank_state, where="rank_state")
        self._remember(self._last, optimizer, loading.manifest.content, own)
        return loading.loaded

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
        return loading.loaded

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


def _encoded(name: str, given: Any) -> Any:
    """What JSON says of a mapping, or of None.

    Raises:
        ValueError: it is none, or JSON cannot say something of it; names it.
    """
    if not isinstance(given, Mapping | None):
        raise ValueError(f"{name} is a {type(given).__name__}: give a dict with string keys")
    return encode(given, where=name)


def _agree(make_facts: Callable[[], RankFacts], headline: str) -> list[int]:
    """:func:`check_consistency`, but also the rank with an unforeseen error raises a ValueError."""
    try:
        return check_consistency(make_facts, headline)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{headline}: {type(error).__name__}: {error}") from error


def _shortened(value: Any, most: int = 80) -> str:
    """What is the same only for the same value."""
    text = json.dumps(value)
    if len(text) <= most:
        return text
    return f"{text[:most]}... ({hashlib.sha256(text.encode()).hexdigest()[:16]})"
