"""Turns this process into a CPU rank: a laptop stands in for a cluster.

Megatron-Core writes ``device="cuda"`` and ``backend="nccl"`` into its own code. On a machine
without a GPU for each rank, :func:`enable_cpu_ranks` makes those words mean the CPU and gloo, so
that the real models, schedules, communicators and optimizers run as they are.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_mimo_coord.cpu.cuda_means_cpu import CudaMeansCpu, inside, replacements
from megatron_mimo_coord.cpu.rehearsal import Rehearsal
from megatron_mimo_coord.megatron.changes import Changes

_enabled: list[TorchFunctionMode] = []


def enable_cpu_ranks(rehearse: bool = False) -> None:
    """Make this process a CPU rank: "cuda" means the CPU, "nccl" means gloo.

    Call it once, before ``init_process_group`` and before building any model. It lasts for the life
    of the process; calling it again changes nothing.

    Args:
        rehearse: have every process group that would be NCCL's (made with "nccl" or without a
            backend; those made with "gloo" are the host's) demand what NCCL demands, see
            ``rehearsal.py``. All ranks must be on one machine. With ``CUDA_LAUNCH_BLOCKING=1`` in
            the environment every launch waits until it is done.

    Example:
        >>> enable_cpu_ranks()
        >>> torch.zeros(2, device="cuda").device.type
        'cpu'
    """
    if _enabled:
        return
    # Compiling takes longer than a laptop run itself, and TorchFunctionMode would break the graphs.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch._dynamo.config.disable = True
    rehearsal = Rehearsal() if rehearse else None
    changes = Changes()
    for owner, name, replacement in replacements():
        changes.set(owner, name, replacement)
    for owner, name, replacement in rehearsal.replacements() if rehearsal else ():
        changes.set(owner, name, replacement)
    mode = rehearsal.device_tensors if rehearsal else CudaMeansCpu()
    torch.autograd._engine_run_backward = inside(mode, torch.autograd._engine_run_backward)  # type: ignore[attr-defined]
    torch.autograd.graph.saved_tensors_hooks.__init__ = _hooked_inside(mode)  # type: ignore[method-assign]
    mode.__enter__()
    if rehearsal:
        rehearsal.__enter__()
    _enabled.append(mode)


def _hooked_inside(mode: TorchFunctionMode) -> Callable[..., None]:
    """How hooks of saved tensors are made: ``checkpoint``'s and ``save_on_cpu``'s name devices."""
    begin = torch.autograd.graph.saved_tensors_hooks.__init__

    def begin_inside(hooks: Any, pack: Callable[..., Any], unpack: Callable[..., Any]) -> None:
        begin(hooks, inside(mode, pack), inside(mode, unpack))

    return begin_inside
