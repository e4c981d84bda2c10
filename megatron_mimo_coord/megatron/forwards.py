"""What ``MimoModel`` is given in a forward, told in one order to all who look at it.

Leans on the names and places of the arguments of ``MimoModel.forward``, and on padded bounds of
packed samples coming before others. Without these nobody reads a text, or sees that there is no
image.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from megatron.core.models.mimo import MimoModel
from torch.nn.functional import pad

from megatron_mimo_coord.megatron.changes import Changes

Given = Mapping[str, Any]
"""What a forward is given, by the names of ``MimoModel``'s arguments: ``input_ids``, ``labels``,
``loss_mask``, ``modality_inputs``, and ``packing_kwargs`` where samples are packed into one row."""

_ARGUMENTS = tuple(signature(MimoModel.forward).parameters)[1:]
_TEXTS = ("input_ids", "position_ids", "loss_mask", "labels")


def named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
    """The arguments of a forward."""
    return {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}


class Forwards:
    """Tells of each forward of a model before it runs.

    Example:
        >>> model = torch.nn.Identity()
        >>> forwards = Forwards(model, Changes())
        >>> forwards.watch(lambda given: {**given, "input_ids": 2 * given["input_ids"]})
        >>> forwards.watch(print)
        >>> model(1)
        {'input_ids': 2}
        2
    """

    def __init__(self, model: torch.nn.Module, changes: Changes) -> None:
        self._watchers: list[Callable[[Given], Given | None]] = []
        changes.on_close(model.register_forward_pre_hook(self._tell, with_kwargs=True).remove)

    def watch(self, look: Callable[[Given], Given | None]) -> None:
        """Have ``look`` told, after those who asked before; what it returns is given instead."""
        self._watchers.append(look)

    def _tell(
        self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        before = given = named(args, kwargs)
        for look in self._watchers:
            given = look(given) or given
        if given is before:
            return None
        placed = _ARGUMENTS[: len(args)]
        rest = {name: value for name, value in given.items() if name not in placed}
        return (*(given[name] for name in placed), *args[len(placed) :]), rest


def bounds_of(packing: Mapping[str, Any]) -> Any:
    """Where each packed sample begins, and the last one ends; None if that is not said."""
    padded = packing.get("cu_seqlens_q_padded")
    return packing.get("cu_seqlens_q") if padded is None else padded


def without_empty_inputs(given: Given) -> Given | None:
    """A forward that leaves out an encoder whose inputs are ``{}``, as if they were None.

    Its container would return nothing, which no stage and no bridge can carry.
    """
    inputs = given.get("modality_inputs") or {}
    empty = [name for name, each in inputs.items() if isinstance(each, Mapping) and not each]
    return {**given, "modality_inputs": {**inputs, **dict.fromkeys(empty)}} if empty else None


def as_one_text(given: Given, more: int) -> Given:
    """A forward without packing, of texts [..., token] with so many tokens more.

    These are 0, and do not count. A mask of other lengths would fail, and is left out.
    """
    texts = {name: given[name] for name in _TEXTS if torch.is_tensor(given.get(name))}
    longer = {name: pad(text, (0, more)) for name, text in texts.items()}
    return {**given, **longer, "attention_mask": None, "packing_kwargs": None}
