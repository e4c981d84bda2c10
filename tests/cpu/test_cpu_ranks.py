"""CPU ranks are turned on by one call, and by nothing else."""

import os
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks import world

import megatron_mimo_coord.cpu.cuda_means_cpu
import megatron_mimo_coord.cpu.rehearsal


def test_only_the_call_changes_anything():
    """Only ranks make it: here all of the package may be imported (test_rooms: nobody imports cpu)."""
    list(megatron_mimo_coord.cpu.cuda_means_cpu.replacements())
    for function in (torch.cuda.current_device, torch.cuda.Event, dist.new_group, dist.all_reduce):
        assert function.__module__.startswith("torch.")
    assert torch.overrides._get_current_function_mode() is None


@pytest.mark.parametrize("rehearse", [False, True])
def test_cuda_means_the_cpu(rehearse):
    ((devices, types, host, count),) = world(1, rehearse).run(_make_tensors)
    assert count == 3, "a device for each rank of the machine"
    assert devices == {"cpu"} and types == {"torch.cuda.FloatTensor"}
    assert host == ("torch.FloatTensor" if rehearse else "torch.cuda.FloatTensor")


def _make_tensors():
    """The devices of tensors that are made for a GPU in all ways, after a second call."""
    from megatron_mimo_coord.cpu import enable_cpu_ranks

    enable_cpu_ranks()
    tensors = [
        torch.zeros(2, device="cuda"),
        torch.zeros(2, device=torch.device("cuda", 0)),
        torch.zeros(2).cuda(),
        torch.zeros(2).to("cuda"),
        torch.zeros(2, pin_memory=True).cuda(non_blocking=True),
        torch.zeros(2).pin_memory().to("cuda", non_blocking=True),
        torch.zeros(2, device=torch.cuda.current_device()),
        torch.nn.Linear(1, 1).cuda().weight,
    ]
    devices = {tensor.device.type for tensor in tensors}
    types = {tensor.type() for tensor in tensors}
    with patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "3"}):
        count = torch.cuda.device_count()
    return devices, types, torch.zeros(2).type(), count
