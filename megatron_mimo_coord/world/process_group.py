"""How a script joins the other ranks of its job, and what they say where all of them fail alike."""

import os
import sys
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

ERROR = "error of rank 0"  # the store's key
SECONDS = timedelta(seconds=2)  # that a rank waits to hear whether rank 0 has its error too


def init_process_group(backend: str | None = None, **options: Any) -> None:
    """Join the other ranks: PyTorch's ``init_process_group``, for a script that torchrun starts.

    Two things are different. ``torchrun --max-restarts`` starts ranks again with the store of those
    that were lost, where PyTorch's call finds their addresses and waits in vain: each start has a
    part of the store to itself (on one machine; the agents of several count restarts differently).
    And an error that ends rank 0 and other ranks alike is printed by rank 0 alone.

    Args:
        backend: as in PyTorch; after ``enable_cpu_ranks()`` it is "gloo".
        options: ``timeout``, ``device_id`` and ``pg_options``, as in PyTorch.

    Raises:
        ValueError: torchrun's environment variables are missing (``RANK``, ``WORLD_SIZE``,
            ``MASTER_ADDR``, ``MASTER_PORT``).

    Example:
        In the place of ``torch.distributed.init_process_group("nccl")``::

            init_process_group("nccl")

        >>> import torch.distributed as dist
        >>> dist.is_initialized()  # here it was called before
        True
    """
    store, rank, world_size = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = PrefixStore(f"start {restarts}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, **options)
    print_errors_once(PrefixStore("errors", store), rank)


def print_errors_once(store: Store, rank: int) -> None:
    """Have a rank that ends with the same error as rank 0 leave the printing to rank 0."""
    printing = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or not _is_printed(store, rank, f"{kind}: {error}"):
            printing(kind, error, traceback)

    sys.excepthook = hook


def _is_printed(store: Store, rank: int, said: str) -> bool:
    """Whether rank 0 prints this; a store that is gone, or stays silent, says that it does not."""
    try:
        if rank == 0:
            store.set(ERROR, said)
            return False
        store.wait([ERROR], SECONDS)
        return bool(store.get(ERROR).decode() == said)
    except dist.DistError:
        return False
