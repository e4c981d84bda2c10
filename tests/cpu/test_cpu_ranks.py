"""CPU ranks are turned on by one call, and by nothing else."""

import subprocess
import sys


def run(code: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


def test_importing_the_package_patches_nothing():
    code = """
import torch, torch.distributed as dist
before = [torch.cuda.current_device, torch.cuda.Stream, dist.new_group, dist.all_reduce]
import megatron_mimo_coord, megatron_mimo_coord.cpu
from megatron_mimo_coord import MultiModuleCoordinator
after = [torch.cuda.current_device, torch.cuda.Stream, dist.new_group, dist.all_reduce]
print(before == after, torch.overrides._get_current_function_mode())
"""
    assert run(code) == "True None"


def test_nothing_but_the_call_imports_it():
    code = """
import sys
from megatron_mimo_coord import MultiModuleCoordinator
print("megatron_mimo_coord.cpu" in sys.modules)
"""
    assert run(code) == "False"


def test_cuda_means_the_cpu():
    code = """
import torch
from megatron_mimo_coord.cpu import enable_cpu_ranks
enable_cpu_ranks()
enable_cpu_ranks()
tensors = [
    torch.zeros(2, device="cuda"),
    torch.zeros(2, device=torch.device("cuda", 0)),
    torch.zeros(2).cuda(),
    torch.zeros(2).to("cuda"),
    torch.zeros(2, device=torch.cuda.current_device()),
    torch.nn.Linear(1, 1).cuda().weight,
]
print({tensor.device.type for tensor in tensors}, torch.zeros(2).type())
"""
    assert run(code) == "{'cpu'} torch.cuda.FloatTensor"
