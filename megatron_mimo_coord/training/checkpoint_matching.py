"""What a model finds in a checkpoint, and what it does not: names, shapes, data types, sizes.

Weights that are not there are refused, or stay as they are; what an optimizer lacks begins anew. A
weight in fp32 is filled with the optimizer's fp32 copy of it where the model was in bf16, and such
a copy with the weight where the model was in fp32.
"""

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from attrs import field, frozen

from megatron_mimo_coord.megatron.checkpoints import Chunk
from megatron_mimo_coord.megatron.module_configs import SIZES, configs_inside

_STATE = "optimizer.state."
_MASTER = "optimizer.state.fp32_param."
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_MAX_PADDING = 1024  # most rows for each tensor-parallel rank that a vocabulary is padded by


@frozen
class Rules:
    """What may differ between a model and a checkpoint.

    Args:
        strict: True, nothing; None, what is trained, and in which precision; False, the weights
            that there are, too.
        names: parts of names here, and what stands for each in the checkpoint.
        without_frozen: the checkpoint has only what was trained.
    """

    strict: bool | None = None
    names: Mapping[str, str] = field(factory=dict)
    without_frozen: bool = False

    def may_lack(self, is_frozen: bool) -> bool:
        """Whether a checkpoint need not have a weight."""
        return self.strict is False or (self.strict is None and self.without_frozen and is_frozen)

    def name_there(self, key: str) -> str:
        """What the checkpoint calls something."""
        for here, there in self.names.items():
            key = key.replace(here, there)
        return key


@frozen
class Matches:
    """What one rank finds in a checkpoint for its chunks of weights, and of what optimizers keep.

    Args:
        fills: chunks of this rank, and under which key there is what is to be copied into each.
        begins: chunks of the optimizer that are to be zero.
        missing: keys of weights here that the checkpoint lacks.
        fresh: keys of weights here of which it has no optimizer state.
        known: keys of the checkpoint that this rank has, or knows why it has not.
        problems: what does not fit.
    """

    fills: list[tuple[Chunk, str]] = field(factory=list)
    begins: list[Chunk] = field(factory=list)
    missing: set[str] = field(factory=set)
    fresh: set[str] = field(factory=set)
    known: set[str] = field(factory=set)
    problems: list[str] = field(factory=list)


def match(
    chunks: list[Chunk], frozen_keys: Set[str], tensors: Mapping[str, Any], rules: Rules
) -> Matches:
    """Look for each chunk of this rank: it has one key here, and in the checkpoint one of several.

    Args:
        chunks: of weights, and of what the optimizer keeps for them.
        frozen_keys: of the weights that are not trained.
        tensors: of the checkpoint, as in ``Index``.
        rules: what may differ.
    """
    found, strict, there = Matches(), rules.strict, rules.name_there
    kept: dict[str, set[str]] = {}  # what the checkpoint has of the optimizer beside fp32 copies
    for key in tensors:
        if key.startswith(_STATE) and not key.startswith(_MASTER):
            kept.setdefault(key.removeprefix(_STATE).partition(".")[2], set()).add(key)
    for chunk in chunks:
        if _is_moment(chunk) and there(chunk.key) not in tensors:
            found.fresh.add(chunk.weight)
    for chunk in chunks:
        key, weight, is_frozen = there(chunk.key), there(chunk.weight), chunk.key in frozen_keys
        candidates = [key]
        if chunk.key.startswith(_MASTER):
            candidates = [key, weight]
        elif chunk.weight in found.fresh:
            candidates = []
        elif not strict and chunk.dtype == "float32" != tensors.get(key, {}).get("dtype"):
            candidates = [_MASTER + key, key]
        sources = [each for each in candidates if each in tensors]
        found.known.update([key, *sources[:1]])
        if is_frozen and not strict:
            found.known.update([_MASTER + key, *kept.get(key, ())])
        is_missed = False
        if sources:
            found.fills.append((chunk, sources[0]))
            found.problems.extend(_misfits(chunk, sources[0], tensors[sources[0]], bool(strict)))
        elif _is_moment(chunk):
            found.begins.append(chunk)
            is_missed = key not in tensors and (strict or (strict is None and weight in kept))
        elif not chunk.weight:
            found.missing.add(chunk.key)
            is_missed = not rules.may_lack(is_frozen)
        if is_missed:
            found.problems.append(f"the checkpoint has no {key}")
    return found


def _is_moment(chunk: Chunk) -> bool:
    """Whether it is what an optimizer keeps for a weight, and no fp32 copy of it."""
    return bool(chunk.weight) and not chunk.key.startswith(_MASTER)


def _misfits(chunk: Chunk, key: str, found: Mapping[str, Any], strict: bool) -> Iterator[str]:
    """Why a chunk cannot be filled."""
    dtypes = {found["dtype"], chunk.dtype}
    if len(dtypes) > 1 and (strict or not dtypes <= {*_FLOATS}):
        yield f"{key} is {found['dtype']} in the checkpoint, {chunk.dtype} here"
    elif tuple(found["shape"]) != chunk.shape and not _is_other_padding(found, chunk):
        yield f"{key} is {list(found['shape'])} in the checkpoint, {list(chunk.shape)} here"


def _is_other_padding(found: Mapping[str, Any], chunk: Chunk) -> bool:
    """Whether both can be one vocabulary, padded for one TP in the checkpoint and for another here.

    Megatron pads to a multiple of TP times a number that no model knows, by default 128.
    """
    if not chunk.padded_for or tuple(found["shape"][1:]) != chunk.shape[1:]:
        return False
    sizes = (found["shape"][0], chunk.shape[0])
    if not found.get("padded_for"):  # it may be as long as the vocabulary
        return 0 <= sizes[1] - sizes[0] < _MAX_PADDING * chunk.padded_for
    tps = (found["padded_for"], chunk.padded_for)
    multiple = min(_MAX_PADDING, math.gcd(sizes[0] // tps[0], sizes[1] // tps[1]))
    return max(sizes) - min(sizes) < multiple * tps[sizes.index(max(sizes))]


# -- sizes -----------------------------------------------------------------------------------------


def model_sizes(module: torch.nn.Module) -> list[dict[str, Any]]:
    """Those of each part of a module that has a config of its own. JSON."""
    found: list[dict[str, Any]] = []
    for config in configs_inside(module):
        sizes = {name: getattr(config, name, None) for name in SIZES}
        sizes = {name: value for name, value in sizes.items() if value is not None}
        if sizes not in found:
            found.append(sizes)
    return found


def size_problems(
    name: str, here: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """What differs between a module and the one that was saved.

    Args:
        name: of the module.
        here: its parts on this rank.
        saved: its parts on all ranks that saved it; nothing is compared where there is none.
    """
    for sizes in here:
        differences = [[size for size in SIZES if sizes.get(size) != e.get(size)] for e in saved]
        fewest = min(differences, key=len, default=[])
        for size in fewest:
            alike = saved[differences.index(fewest)]
            yield (
                f"{size} of module {name!r} is {alike.get(size)} in the checkpoint, "
                f"{sizes.get(size)} here"
            )
