"""A checkpoint on its way into a model, which changes only when all is known to be well."""

import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_version

from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.layout.problems import raise_problems
from megatron_mimo_coord.training import checkpoint_folder as folders
from megatron_mimo_coord.training.checkpoint_folder import Manifest
from megatron_mimo_coord.training.checkpoint_save import FORMAT, random_states_name
from megatron_mimo_coord.training.checkpoint_states import ModelState, OptimizerState
from megatron_mimo_coord.training.checkpoint_tensors import ChunkReader, Index, wanted
from megatron_mimo_coord.training.model_sizes import model_sizes, size_problems
from megatron_mimo_coord.training.plain_data import decode
from megatron_mimo_coord.training.random_states import restore_random_states
from megatron_mimo_coord.world.consistency import RankFacts
from megatron_mimo_coord.world.device import world_device


class CheckpointLoad:
    """Goes into the model, the optimizer and the random states of one rank.

    Args:
        job: the modules, and which of them are here.
        layout: where every module lies, in words.
        optimizer: the ``MimoOptimizer``, None for the weights alone.
    """

    def __init__(self, job: Job, layout: Mapping[str, str], optimizer: Any) -> None:
        self._job = job
        self._layout = layout
        self._optimizer = optimizer

    def prepare(self, manifest: Manifest) -> RankFacts:
        """Compare what the checkpoint holds with what there is here."""
        self._manifest, content = manifest, manifest.content
        path = {"checkpoint": str(manifest.path.absolute())}
        if content["format"] not in (1, FORMAT):
            return RankFacts(
                path, {}, [f"{manifest.path} has format {content['format']}, not 1 or {FORMAT}"]
            )
        problems = []
        if _series(content["megatron-core"]) != _series(megatron_version):
            problems.append(
                f"it was written with megatron-core {content['megatron-core']}, and this is "
                f"{megatron_version}: use one of the same series"
            )
        self._index = Index(content["tensors"], content["objects"])
        self._model = ModelState(self._job, stacked=content["format"] == 1)
        problems += self._model.problems()
        self._states: list[OptimizerState] = []
        if self._optimizer is not None:
            self._states = OptimizerState.collect(self._optimizer, self._job.ddps)
        self._chunks = [chunk for each in self._states for chunk in each.chunks(self._model)]
        for name, ddp in self._job.ddps.items():
            saved_sizes = content.get("sizes", {}).get(name, [])
            problems += size_problems(name, model_sizes(ddp.module), saved_sizes)
        problems += wanted([*self._model.chunks(), *self._chunks], self._index)
        for key, _, _ in self._model.objects():
            if key not in self._index.objects:
                problems.append(f"the checkpoint has no {key}")
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
            advice = f"; to go on from step {steps[-1]}, delete this one" if steps else ""
            found = [f"{problem}{advice}" for problem in found]
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
            text = (path / random_states_name(self._job.rank)).read_text()
            restore_random_states(json.loads(text))
        return RankFacts({}, {})

    def extra(self) -> dict[str, Any]:
        """What the trainer had given to save."""
        content, tensors = self._manifest.content, self._index.tensors
        count = sum(key.startswith("extra.") for key in tensors)
        found = [self._reader.tensor(f"extra.{number}") for number in range(count)]
        return dict(decode(content["extra"], found))


def _series(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _shortened(problems: list[str], most: int = 8) -> list[str]:
    if len(problems) <= most:
        return problems
    return [*problems[:most], f"and {len(problems) - most} more"]
