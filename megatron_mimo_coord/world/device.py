"""Where the process group of all ranks expects tensors."""

import torch
import torch.distributed as dist


def world_device() -> torch.device:
    """The device that collectives over the world take: the GPU where NCCL serves it, else the CPU.

    ``get_backend`` has no name for a world that was made without one, and one with a backend for
    each device has several; the configuration tells in all cases.
    """
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    return torch.device("cuda" if "nccl" in backends.get("cuda", "") else "cpu")
