"""How ranks join, and what they print when they end: as torchrun starts and shows them."""

import pytest
from jobs import run_job

SCRIPT = """
import os
import torch.distributed as dist
from megatron_mimo_coord import MegatronMIMOInfra, ModuleParallelism, init_process_group
from megatron_mimo_coord.cpu import enable_cpu_ranks

enable_cpu_ranks()
init_process_group("gloo")
rank = dist.get_rank()
"""
ALIKE = """
MegatronMIMOInfra.build({"language": ModuleParallelism(data_parallel_size=2)})  # of four ranks
"""
EACH_ITS_OWN = """
raise ValueError(f"this is what rank {rank} says")
"""
ONE_ALONE = """
if rank == 2:
    raise ValueError("this is what rank 2 says")
dist.barrier()
"""


@pytest.mark.parametrize(
    ("end", "sentence", "printed"),
    [
        (ALIKE, "ValueError: ", {"[rank0]: "}),
        (EACH_ITS_OWN, "ValueError: this is what rank ", {f"[rank{n}]: " for n in range(4)}),
        (ONE_ALONE, "ValueError: this is what rank 2 says", {"[rank2]: "}),
    ],
)
def test_an_error_of_all_ranks_is_printed_once(end, sentence, printed, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + end)
    code, output = run_job(script, ranks=4)
    assert code != 0
    lines = [line for line in output.splitlines() if sentence in line and line.startswith("[rank")]
    assert {line.partition(sentence)[0] for line in lines} <= printed
    if end == EACH_ITS_OWN:  # torchrun ends the others as soon as the first has ended
        assert lines
    else:
        assert {line.partition(sentence)[0] for line in lines} == printed
