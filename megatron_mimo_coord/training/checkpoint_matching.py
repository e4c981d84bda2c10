"""What a model finds in a checkpoint, and what it does not: names, shapes and data types.

Weights that are not there are refused, or stay as they are; what an optimizer lacks begins anew. A
weight in fp32 is filled with the optimizer's fp32 copy of it where the model was in bf16, and such
a copy with the weight where the model was in fp32.
"""

import math
from collections.abc import Iterator, Mapping, Set
from typing import Any

from attrs import evolve, field, frozen

from megatron_mimo_coord.megatron.checkpoints import Chunk
from megatron_mimo_coord.training.checkpoint_tensors import Index

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


class Matches:
    """What one rank finds in a checkpoint for its chunks of weights, and of what optimizers keep.

    Attributes:
        fills: chunks of this rank, under the key of what is to be copied into each.
        begins: chunks of the optimizer that are to be zero.
        missing: keys of weights here that the checkpoint lacks.
        fresh: keys of weights here of which it has no optimizer state.
        known: keys of the checkpoint that this rank has, or knows why it has not.
        problems: what does not fit.
    """

    def __init__(
        self,
        weights: list[Chunk],
        states: list[Chunk],
        frozen_keys: Set[str],
        index: Index,
        rules: Rules,
    ) -> None:
        self._index, self._rules, self._kept = index, rules, _kept(index)
        self.fills: list[Chunk] = []
        self.begins: list[Chunk] = []
        self.missing: set[str] = set()
        self.known: set[str] = set()
        self.problems: list[str] = []
        for chunk in weights:
            self._add_weight(chunk, is_frozen=chunk.key in frozen_keys)
        self.fresh = {
            chunk.weight
            for chunk in states
            if rules.name_there(chunk.key) not in index.tensors and not _is_master(chunk)
        }
        for chunk in states:
            self._add_state(chunk)

    def _add_weight(self, chunk: Chunk, is_frozen: bool) -> None:
        rules, tensors, key = self._rules, self._index.tensors, self._rules.name_there(chunk.key)
        self.known.add(key)
        if is_frozen and not rules.strict:
            self.known.update(f"{_STATE}{name}.{key}" for name in self._kept.get(key, ()))
        if key not in tensors:
            self.missing.add(chunk.key)
            if not rules.may_lack(is_frozen):
                self.problems.append(f"the checkpoint has no {key}")
            return
        is_wider = chunk.dtype == "float32" != tensors[key]["dtype"]
        if is_wider and not rules.strict and _MASTER + key in tensors:
            key = _MASTER + key
            self.known.add(key)
        self._fill(chunk, key)

    def _add_state(self, chunk: Chunk) -> None:
        rules, tensors = self._rules, self._index.tensors
        key, weight = rules.name_there(chunk.key), rules.name_there(chunk.weight)
        self.known.add(key)
        if chunk.weight in self.fresh and not _is_master(chunk):
            self.begins.append(chunk)
            others = self._kept.get(weight, set()) - {"fp32_param"}
            if key not in tensors and (rules.strict or (rules.strict is None and others)):
                self.problems.append(f"the checkpoint has no {key}")
        elif key in tensors:
            self._fill(chunk, key)
        elif weight in tensors:  # else the copy stays, as the weight does
            self._fill(chunk, weight)

    def _fill(self, chunk: Chunk, key: str) -> None:
        found, strict = self._index.tensors[key], bool(self._rules.strict)
        self.problems.extend(_misfits(chunk, key, found, strict))
        self.fills.append(evolve(chunk, key=key))


def _is_master(chunk: Chunk) -> bool:
    return chunk.key.startswith(_MASTER)


def _kept(index: Index) -> dict[str, set[str]]:
    """Names of what the checkpoint has of the optimizer, for each weight."""
    kept: dict[str, set[str]] = {}
    for key in index.tensors:
        if key.startswith(_STATE):
            name, _, weight = key.removeprefix(_STATE).partition(".")
            kept.setdefault(weight, set()).add(name)
    return kept


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
