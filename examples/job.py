"""How a script joins the other ranks of its torchrun job, and leaves them."""

import os

import torch
import torch.distributed as dist

from megatron_mimo_coord import init_process_group


def start_ranks(rehearse: bool = False) -> None:
    """Join the other ranks: on a GPU each if this machine has as many, else on its CPU.

    Args:
        rehearse: on the CPU in any case, where ranks then demand what NCCL demands.
    """
    backend = "nccl"
    if not rehearse and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        from megatron_mimo_coord.cpu import enable_cpu_ranks

        enable_cpu_ranks(rehearse)
        torch.set_num_threads(1)  # the ranks already share the cores
        backend = "nccl" if rehearse else "gloo"
    init_process_group(backend)


def stop_ranks() -> None:
    """Leave together: a rank that goes first closes connections that others still use."""
    dist.barrier()
    dist.destroy_process_group()
