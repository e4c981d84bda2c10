"""How long a process group waits for a rank that is gone: as long as the world does.

A new group has its backend's default instead, 10 minutes for NCCL and 30 for gloo: that long its
ranks would wait, whatever ``init_process_group`` was told. A group's timeout is given when it is
made; what Megatron makes by itself is told afterwards. PyTorch's public ways to ask for a timeout
and to change one are young: where they are missing the job goes on, with one warning.
"""

import logging
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from megatron_mimo_coord.world.device import world_device

logger = logging.getLogger(__name__)


def world_timeout() -> timedelta | None:
    """The timeout that the world has now, None where PyTorch does not tell. Collective.

    Only an operation knows how long it would wait, so one is launched: a sum of one number.
    """
    work = dist.all_reduce(torch.zeros(1, device=world_device()), async_op=True)
    try:
        timeout: timedelta | None = getattr(work, "timeout", None)
    except RuntimeError:  # of a backend without timeouts
        timeout = None
    work.wait()
    if not timeout:
        _warn_once("does not tell the timeout of the world")
    return timeout or None


def inherit_timeout(*groups: Any) -> None:
    """Give process groups that someone else made the timeout of the world. Collective over it.

    Args:
        groups: process groups, or what stands for those that this rank is not in.
    """
    timeout = world_timeout()
    mine = [group for group in groups if isinstance(group, dist.ProcessGroup)]
    if timeout is None or not mine:
        return
    if not hasattr(dist, "set_timeout"):
        _warn_once("cannot change the timeout of a process group")
        return
    for group in mine:
        try:
            dist.set_timeout(timeout, group)
        except RuntimeError as error:  # of a backend without timeouts
            _warn_once(f"did not change the timeout of a process group ({error})")


@cache
def _warn_once(why: str) -> None:
    logger.warning(
        "PyTorch %s %s: some process groups wait for a rank that is gone as long as their backend "
        "does by default, and not as long as init_process_group was told",
        torch.__version__,
        why,
    )
