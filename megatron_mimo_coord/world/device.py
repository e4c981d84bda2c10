"""Where the process group of all ranks expects tensors."""

import torch
import torch.distributed as dist


def world_device() -> torch.device:
    """Where the backend of the world expects tensors."""
    if "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
