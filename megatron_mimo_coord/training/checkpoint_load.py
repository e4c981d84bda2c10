"""A checkpoint on its way into a model, which changes only when all is known to be well."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from attrs import evolve
from megatron.core import __version__ as megatron_version

from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.checks.replicas import copy_problems
from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.layout.problems import raise_problems
from megatron_mimo_coord.megatron.checkpoints import ShardedWeights
from megatron_mimo_coord.megatron.optimizer_states import OptimizerStates
from megatron_mimo_coord.training import checkpoint_folder as folders
from megatron_mimo_coord.training.checkpoint_matching import (
    Rules,
    match,
    model_sizes,
    size_problems,
)
from megatron_mimo_coord.training.checkpoint_save import FORMAT
from megatron_mimo_coord.training.checkpoint_tensors import Index
from megatron_mimo_coord.training.plain_data import decode
from megatron_mimo_coord.training.random_states import restore_random_states
from megatron_mimo_coord.world.consistency import RankFacts
from megatron_mimo_coord.world.device import world_device
from megatron_mimo_coord.world.gather import all_gather_text

logger = logging.getLogger(__name__)

_MODULE = re.compile(r"(?:^|\.)(language_model|modality_submodules\.([^.]+))\.")
_WRAPPERS = re.compile(r"((?:^|\.)(?:language_model|modality_submodules\.[^.]+)\.)(?:module\.)+")


class LoadedCheckpoint(NamedTuple("_Loaded", [("step", int), ("extra", dict[str, Any])])):
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


class CheckpointLoad:
    """Goes into the model, the optimizer and the random states of one rank.

    Each of the three ``prepare`` compares what there is to load with what there is here, and
    changes nothing; then :meth:`tell_differences` and :meth:`fill` follow.

    Args:
        job, layout: the modules, which of them are here, and where all lie, in words.
        optimizer: the ``MimoOptimizer``, None for the weights alone.
        strict: what may differ, as in ``Rules``.
        names: parts of names here, and what stands for each in the checkpoint.

    Attributes:
        content: what the manifest of this package's checkpoint says; empty of anything else.
        rank_state: what JSON says of what this rank had given to save; None on another layout.
        loaded: what was found, complete once all is filled.
    """

    def __init__(
        self,
        job: Job,
        layout: Mapping[str, str],
        optimizer: Any,
        strict: bool | None,
        names: Mapping[str, str],
    ) -> None:
        self._job = job
        self._layout = layout
        self._optimizer = optimizer
        self._rules = Rules(strict, names)
        self.content: dict[str, Any] = {}
        self.rank_state: Any = None
        self.loaded = LoadedCheckpoint(0, {})

    def prepare(self, path: Path) -> RankFacts:
        """Compare one of this package's, and this rank's share of its files with their digests."""
        self.content = content = folders.read_manifest(path)
        told = partial(RankFacts, {"checkpoint": str(path)}, {})
        if content["format"] != FORMAT:
            return told(
                [
                    f"{path} has format {content['format']}, and this release reads {FORMAT}: go "
                    f"on from it with the release that wrote it"
                ]
            )
        problems = []
        if _series(content["megatron-core"]) != _series(megatron_version):
            problems.append(
                f"it was written with megatron-core {content['megatron-core']}, and this is "
                f"{megatron_version}: use one of the same series"
            )
        self.loaded = LoadedCheckpoint(content["step"], {})
        self._rules = evolve(self._rules, without_frozen=content["trainable_only"])
        self._index = Index(path, content["tensors"], content["objects"], content["blobs"])
        for name, ddp in self._job.ddps.items():
            saved_sizes = content["sizes"].get(name, [])
            problems += size_problems(name, model_sizes(ddp.module), saved_sizes)
        problems += self._match(self._sharded())
        if not self._rules.may_lack(is_frozen=False):
            there = [self._rules.name_there(key) for key, _, _ in self._weights.objects()]
            objects = self._index.objects
            problems += [f"the checkpoint has no {key}" for key in there if key not in objects]
        if self._rules.strict:
            problems += self._states.unknown_groups(self._decoded(content["optimizer"]))
        if not problems:
            rank, world_size = self._job.rank, dist.get_world_size()
            problems = folders.damages(path, content["files"], rank, world_size)
            steps = folders.checkpoint_steps(path.parent)[:-1]
            advice = f"; to go on from step {steps[-1]}, delete this one" if steps else ""
            problems = [f"{problem}{advice}" for problem in problems]
        return told(_shortened(problems))

    def prepare_megatrons(self, path: Path) -> RankFacts:
        """Compare the weights of a ``MimoModel`` that ``dist_checkpointing`` saved.

        Its layers are of one tensor or one by one, as its trainer chose.
        """
        self._index = Index.of_megatron(path, _bare)
        weights = max(
            (self._sharded(stacked) for stacked in (False, True)),
            key=lambda each: sum(chunk.key in self._index.tensors for chunk in each.chunks()),
        )
        return RankFacts({}, {}, _shortened(self._match(weights)))

    def prepare_module(self, name: str, tensors: Mapping[str, torch.Tensor]) -> RankFacts:
        """Compare whole weights of a module."""
        if name not in self._job.grids:
            raise ValueError(f"there is no module {name!r}: there are {', '.join(self._job.grids)}")
        prefix = "language_model." if name == LANGUAGE else f"modality_submodules.{name}."
        whole = {prefix + key: each for key, each in _experts_joined(tensors).items()}
        self._index = Index.of_tensors(whole)
        problems = self._match(self._sharded(), prefix)
        shapes = {key: list(each.shape) for key, each in sorted(tensors.items())}
        return RankFacts({"module": name, "weights": str(shapes)}, {}, _shortened(problems))

    def _sharded(self, stacked: bool = False) -> ShardedWeights:
        return ShardedWeights(self._job.model, self._job.infra.pg_collections, stacked)

    def _match(self, weights: ShardedWeights, prefix: str = "") -> list[str]:
        """Find what there is for the weights, and for what the optimizer keeps.

        Args:
            weights: those of this rank.
            prefix: of a module's, the only ones, which are then called as in the whole model.
        """
        self._weights, chunks = weights, weights.chunks()
        if prefix:
            chunks = [chunk for chunk in chunks if chunk.key.startswith(prefix)]
            chunks = [evolve(chunk, key=weights.names[chunk.key]) for chunk in chunks]
        self._states = OptimizerStates(self._optimizer, self._job.ddps, weights)
        chunks += self._states.chunks()
        self._matches = match(chunks, weights.frozen_keys(), self._index.tensors, self._rules)
        return [*copy_problems(self._job.ddps, self._job.groups, weights), *self._matches.problems]

    def tell_differences(self, headline: str) -> None:
        """Raise if there are tensors that no rank has; say what is not as it was.

        Collective.
        """
        matches, keys = self._matches, sorted(self._index.tensors)
        if self._optimizer is None:
            keys = [key for key in keys if not key.startswith("optimizer.")]
        known = [key in matches.known for key in keys]
        flags = torch.tensor(known, dtype=torch.int32).to(world_device())
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        unknown = [key for key, flag in zip(keys, flags.tolist(), strict=True) if not flag]
        if self._rules.strict is not False:
            raise_problems(headline, _shortened([f"there is no {key} here" for key in unknown]))
        said = json.dumps([sorted(matches.missing), sorted(matches.fresh)])
        texts = map(json.loads, all_gather_text(said, device=world_device()))
        missing, fresh = (sorted(set().union(*each)) for each in zip(*texts, strict=True))
        unexpected = [key for key in unknown if not key.startswith("optimizer.")]
        self.loaded.missing_keys, self.loaded.unexpected_keys = missing, unexpected
        if self._job.rank == 0:
            for what, found in {
                "has no weights for": missing,
                "has no optimizer state, which begins anew, for": fresh,
                "has weights that are not here, for": unexpected,
            }.items():
                if found:
                    logger.warning("%s %s %s", headline.partition(" cannot")[0], what, _by(found))

    def fill(self) -> None:
        """Overwrite the weights; of this package's checkpoint, optimizer and random states too."""
        with torch.no_grad():
            for chunk in self._matches.begins:
                chunk.data.zero_()
        for chunk, key in self._matches.fills:
            self._index.fill(chunk, key)
        there = {key: self._rules.name_there(key) for key, _, _ in self._weights.objects()}
        objects = {
            here: self._index.object(key)
            for here, key in there.items()
            if key in self._index.objects
        }
        self._weights.load_filled(objects)
        if self.content:
            self._fill_states(self.content)

    def _fill_states(self, content: Mapping[str, Any]) -> None:
        settings = self._decoded(content["optimizer"])
        self._states.load_filled(settings, self._matches.fresh, self._rules.name_there)
        ranks, loaded = content["states"], self.loaded
        if (content["layout"], len(ranks)) == (self._layout, dist.get_world_size()):
            states = self._read(ranks[self._job.rank])
            restore_random_states(self._decoded(states["random"]))
            self.rank_state = states["rank_state"]
            loaded.rank_state = self._decoded(self.rank_state)
        elif content["has_rank_states"]:
            loaded.rank_states = [self._decoded(self._read(each)["rank_state"]) for each in ranks]
        loaded.extra.update(self._decoded(content["extra"]))

    def _read(self, digest: str) -> Any:
        """What JSON says of the states of a rank."""
        return json.loads(self._index.blob(digest).numpy().tobytes())

    def _decoded(self, value: Any) -> Any:
        return decode(value, self._index.blob)


def _experts_joined(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With experts that are one by one as one tensor: [expert, ...]."""
    experts: dict[str, dict[int, torch.Tensor]] = {}
    joined = {}
    for name, tensor in tensors.items():
        before, local, after = name.partition(".local_experts.")
        number, _, rest = after.partition(".")
        if local and number.isdecimal():
            experts.setdefault(f"{before}.{rest}", {})[int(number)] = tensor
        else:
            joined[name] = tensor
    for name, each in experts.items():
        joined[name] = torch.stack([each[number] for number in sorted(each)])
    return joined


def _bare(key: str) -> str:
    """A key as in bare modules, without what is before the model's name; empty if of no module."""
    key = _WRAPPERS.sub(r"\1", key)
    key = re.sub(r"^(?:model\d*|module)\.(?=language_model\.|modality_submodules\.)", "", key)
    return key if _MODULE.match(key) else ""


def _by(keys: list[str], most: int = 4) -> str:
    """How many parameters of which module, and some of their names."""
    modules: dict[str, list[str]] = {}
    for key in keys:
        found = _MODULE.search(key)
        module = (found[2] or LANGUAGE) if found else "none"
        modules.setdefault(module, []).append(key[found.end() :] if found else key)
    return "; ".join(
        f"{len(names)} parameters of module {module!r}: {', '.join(names[:most])}"
        + (", ..." if len(names) > most else "")
        for module, names in modules.items()
    )


def _series(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _shortened(problems: list[str], most: int = 8) -> list[str]:
    if len(problems) <= most:
        return problems
    return [*problems[:most], f"and {len(problems) - most} more"]
