"""CPU ranks are turned on by one call, and by nothing else."""

import os
import subprocess
import sys
from unittest.mock import patch

import pytest
from ranks import world


def test_only_the_call_changes_anything():
    code = """
import sys
import torch, torch.distributed as dist
before = [torch.cuda.current_device, torch.cuda.Stream, dist.new_group, dist.all_reduce]
from megatron_mimo_coord import MultiModuleCoordinator
print("megatron_mimo_coord.cpu" in sys.modules)
import megatron_mimo_coord.cpu
after = [torch.cuda.current_device, torch.cuda.Stream, dist.new_group, dist.all_reduce]
print(before == after, torch.overrides._get_current_function_mode())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines() == ["False", "True None"]


@pytest.mark.parametrize("rehearse", [False, True])
def test_cuda_means_the_cpu(rehearse):
    ((devices, types, host, count),) = world(1, rehearse).run(_make_tensors)
    assert count == 3, "a device for each rank of the machine"
    assert devices == {"cpu"} and types == {"torch.cuda.FloatTensor"}
    assert host == ("torch.FloatTensor" if rehearse else "torch.cuda.FloatTensor")


def _make_tensors():
    """The devices of tensors that are made for a GPU in all ways, after a second call."""
    import torch

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
