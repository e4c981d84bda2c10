"""What this package once did and NCCL would not have forgiven: the rehearsal says so.

Each is the old code, cut down to what was wrong. Two need several ranks and are rules of their own
in test_rehearsal.py: a world sum before the reductions on one rank and behind them on another
(``_order``), and tokens in fp32 beside stand-ins in bf16 under colocated fan-in (``_dtype``).
Reductions that overlap too little hang nothing: they are counted, in tests/gradients/test_finalize.py.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from ranks import world
from test_rehearsal import message_of

from megatron_mimo_coord.cpu import end_of_step, no_host_sync
from megatron_mimo_coord.world.device import world_device


def _set_timeout() -> None:
    backend = dist.group.WORLD._get_backend(torch.device("cuda"))
    backend._set_default_timeout(timedelta(seconds=5))


def _compare(device: torch.device) -> None:
    row = torch.tensor([7], device=device)
    dist.all_gather_into_tensor(row.new_empty(dist.get_world_size()), row)


def _where_nccl_is_named() -> None:
    _compare(torch.device("cuda" if "nccl" in dist.get_backend() else "cpu"))


def _gather_with_forward_hooks_off() -> None:
    weights = torch.zeros(4, device="cuda")
    dist.all_gather_into_tensor(weights, torch.ones(4, device="cuda"), async_op=True)
    weights.sum()  # forward: the hook would have waited
    end_of_step()


def _gather_into_the_gradients() -> None:
    buffer = torch.zeros(4, device="cuda")
    dist.all_gather_into_tensor(buffer, torch.ones(4, device="cuda"), async_op=True)
    buffer.zero_()  # the next step begins
    end_of_step()


def _zero_what_is_reduced() -> None:
    buffer = torch.zeros(4, device="cuda")
    dist.all_reduce(buffer, async_op=True)  # then backward raises, and the trainer tries again
    buffer.zero_()
    end_of_step()


def _pickle_losses() -> None:
    with no_host_sync():
        dist.all_gather_object([None], {"loss": [1.0, 2.0]})


OLD: dict[Callable[[], None], str] = {
    _set_timeout: "ProcessGroup._get_backend at",
    _where_nccl_is_named: "all_gather_into_tensor on the world (ranks 0) at",
    _gather_with_forward_hooks_off: "nobody waited for all_gather_into_tensor",
    _gather_into_the_gradients: "nobody waited for all_gather_into_tensor",
    _zero_what_is_reduced: "nobody waited for all_reduce",
    _pickle_losses: "makes the host wait for the device",
}


def _old_and_new() -> list[str]:
    dist.destroy_process_group()
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)  # no backend named
    _compare(world_device())
    said = [message_of(old) for old in OLD]
    dist.destroy_process_group()
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    return said


def test_old_defects_are_told():
    [messages] = world(1, rehearse=True).run(_old_and_new)
    found: dict[str, Any] = {old.__name__: said for old, said in zip(OLD, messages, strict=True)}
    for old, expected in OLD.items():
        assert expected in found[old.__name__], old.__name__
        assert "test_defects.py:" in found[old.__name__]
