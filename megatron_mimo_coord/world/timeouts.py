"""How long a process group waits for a rank that is gone."""

from typing import Any

import torch.distributed as dist

from megatron_mimo_coord.world.device import world_device


def inherit_timeout(group: Any) -> None:
    """Give a process group the timeout that ``init_process_group`` was given.

    A new group has its backend's default instead, 10 minutes for NCCL and 30 for gloo: that long
    its ranks would wait for one that is gone, whatever the user asked for.

    Args:
        group: a process group, or what stands for one that this rank is not in.
    """
    world = dist.group.WORLD
    if isinstance(group, dist.ProcessGroup) and world is not None:
        device = world_device()
        timeout = world._get_backend(device).options._timeout
        group._get_backend(device)._set_default_timeout(timeout)
