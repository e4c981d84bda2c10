"""Which process groups would be NCCL's, what they are called, and which of their names exist."""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from attrs import define
from megatron.core.hyper_comm_grid import HyperCommGrid
from torch.distributed import distributed_c10d

from megatron_mimo_coord.cpu.location import caller

_C: Any = torch._C._distributed_c10d


@define
class Group:
    """A process group that over GPUs would be NCCL's.

    Args:
        name: PyTorch's name of it, the same on all of its ranks.
        ranks: global ranks, in the group's order.
        text: what it is for, as far as known.
        takes_host_tensors: it has a backend for them besides NCCL.
        is_destroyed: ``destroy_process_group`` was called for it.
    """

    name: str
    ranks: tuple[int, ...]
    text: str
    takes_host_tensors: bool
    is_destroyed: bool = False

    def __str__(self) -> str:
        return f"{self.text} (ranks {', '.join(map(str, self.ranks))})"


_groups: dict[str, Group] = {}


def nccl_group(group: Any) -> Group | None:
    """What is known about a process group; None if it is a host group, made for gloo."""
    return _groups.get(group.group_name)


def forget_all() -> None:
    """Another world begins: names may come again."""
    _groups.clear()


def destroyed(name: str | None) -> None:
    """The group of a name was destroyed, or with the world all of them."""
    for group in _groups.values():
        group.is_destroyed |= name in (None, group.name)


def making_nccl_groups(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around what makes every group: NCCL's are made over gloo and keep NCCL's name."""

    def new_process_group(
        size: int, rank: int, ranks: list[int], backend: Any, store: Any, name: str, **options: Any
    ) -> Any:
        asked = str(backend).lower()
        if "nccl" not in asked and asked != "undefined":
            return original(size, rank, ranks, backend, store, name, **options)
        options |= {"backend_options": None, "device_id": None}  # NCCL's own
        group, prefix_store = original(size, rank, ranks, "gloo", store, name, **options)
        if isinstance(group, dist.ProcessGroup):
            world = distributed_c10d._world
            config = {"undefined": "cuda:nccl", "nccl": "cuda:nccl"}.get(asked, asked)
            world.pg_map[group] = (dist.Backend(asked), prefix_store)
            world.pg_backend_config[group] = config
            description = options.get("group_desc")
            if not ranks:
                description = "the world"
            _groups[name] = Group(
                name=name,
                ranks=tuple(ranks) or tuple(range(size)),
                text=description or f"the group made at {caller()}",
                takes_host_tensors="cpu:" in config,
            )
        return group, prefix_store

    return new_process_group


def describing_grids(create_pg: Callable[..., Any]) -> Callable[..., Any]:
    """Around ``HyperCommGrid.create_pg``: a group is called by its dims if nobody named it."""

    def described(grid: HyperCommGrid, dims: Any, **options: Any) -> Any:
        text = dims if isinstance(dims, str) else "-".join(dims)
        if options.get("view"):
            text = f"{text} of view {options['view']}"
        ranks = f"{grid.rank_offset}-{grid.rank_offset + grid.size - 1}"
        options.setdefault("group_desc", f"{text} of the grid on ranks {ranks}")
        return create_pg(grid, dims, **options)

    return described


def object_device(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around PyTorch's choice where to put pickled objects: NCCL's groups take device tensors."""

    def coll_device(group: Any = None) -> Any:
        known = nccl_group(group or dist.group.WORLD)
        return "cuda" if known and not known.takes_host_tensors else original(group)

    return coll_device


class PrivateMethod:
    """A method of process groups that PyTorch may use and others may not: NCCL's may lack it."""

    def __init__(self, name: str, original: Any) -> None:
        self._name = name
        self.original = original

    def __get__(self, group: Any, owner: Any = None) -> Any:
        if group is not None:
            module = sys._getframe(1).f_globals.get("__name__", "")
            known = None if module.startswith("torch.") else nccl_group(group)
            if known or self.original is None:
                raise AttributeError(
                    f"ProcessGroup.{self._name} at {caller()}: no public name of {known}, and "
                    f"NCCL's process groups need not have it; use what torch.distributed documents"
                )
        return self.original.__get__(group, owner)


def hide_private_methods() -> None:
    """Leave only the public names of NCCL's process groups."""
    for name in {*dir(dist.ProcessGroup), *dir(_C.Backend), *dir(_C.ProcessGroupGloo)}:
        if name.startswith("_") and not name.startswith(("__", "_pybind11")):
            original = dist.ProcessGroup.__dict__.get(name)
            if not isinstance(original, PrivateMethod):
                setattr(dist.ProcessGroup, name, PrivateMethod(name, original))


def timeout_of(group: Any) -> float:
    """Seconds for which a process group waits."""
    get_backend = dist.ProcessGroup.__dict__["_get_backend"].original.__get__(group)
    return float(get_backend(torch.device("cpu")).options._timeout.total_seconds())
