"""Process groups beside those of a grid: made once for a set of ranks, given back with the grid."""

import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from megatron_mimo_coord.world.device import world_device
from megatron_mimo_coord.world.timeouts import world_timeout


class ExtraGroups:
    """Process groups that somebody needs beside those which a grid makes for itself.

    Bridges and pipeline stages have two each: one of devices and one of hosts. They belong to a
    grid, the language model's, and go with it.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[str | None, tuple[int, ...]], dist.ProcessGroup | None] = {}
        self._before_destroy: list[Callable[[], None]] = []

    @classmethod
    def shared(cls, grid: Any) -> "ExtraGroups":
        """Those that belong to a ``HyperCommGrid``."""
        return _of_grid.setdefault(grid, cls())

    def hosts(self, ranks: Iterable[int]) -> dist.ProcessGroup | None:
        """A gloo group of ranks, for messages that need no device; None on others. Collective."""
        return self._get("gloo", ranks)

    def devices(self, ranks: Iterable[int]) -> dist.ProcessGroup | None:
        """One over the world's backend, connected; None on others. Collective."""
        return self._get(None, ranks)

    def _get(self, backend: str | None, ranks: Iterable[int]) -> dist.ProcessGroup | None:
        """Made once for a set of ranks."""
        key = backend, tuple(sorted(ranks))
        if key not in self._groups:
            group = dist.new_group(
                list(key[1]),
                timeout=self._timeout,
                backend=backend,
                group_desc="bridges and pipeline stages",
            )
            self._groups[key] = group if isinstance(group, dist.ProcessGroup) else None
            if backend is None and isinstance(group, dist.ProcessGroup):
                connect(group)
        return self._groups[key]

    @cached_property
    def _timeout(self) -> timedelta | None:
        """The world's, asked for when the first group is made."""
        return world_timeout()

    def before_destroy(self, finish: Callable[[], None]) -> None:
        """Have ``finish`` called before the groups go: a send may still be under way.

        After an error it is not: whoever was to take the message may be gone.
        """
        self._before_destroy.append(finish)

    def destroy(self) -> None:
        """Give all groups back."""
        for finish in self._before_destroy if sys.exception() is None else ():
            finish()
        for group in self._groups.values():
            if group is not None:
                dist.destroy_process_group(group)
        self._groups.clear()
        self._before_destroy.clear()


_of_grid: WeakKeyDictionary[Any, ExtraGroups] = WeakKeyDictionary()


def connect(group: dist.ProcessGroup) -> None:
    """Have all ranks of a group meet once, before two of them send to each other.

    NCCL sets a group up at its first operation and waits for all of its ranks there, also where
    only two of them send; the others might wait for a message from those two just then.
    """
    dist.all_reduce(torch.zeros(1, device=world_device()), group=group)
