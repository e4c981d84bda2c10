"""What NCCL demands of launches: of one alone, and of two ranks that launch together.

Two ranks launch the same, and launch on the groups that they share in one order. NCCL does not ask
whether they do: it hangs, or errs.
"""

import torch

from megatron_mimo_coord.cpu.device_tensors import is_on_device
from megatron_mimo_coord.cpu.launches import Launch, Message, dtype_name, memory_format
from megatron_mimo_coord.cpu.location import caller

NCCL_DTYPES = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
}
_PARTNER = {"send": "recv", "recv": "send"}


def disagreement(mine: Message, theirs: Message, rank: int, other: int) -> str:
    """What NCCL would not forgive about two launches that meet; empty if all is well.

    Args:
        mine: the next launch of this rank that concerns the other one.
        theirs: its next launch that concerns this one.
        rank: this rank.
        other: the other.

    Example:
        >>> mine = Message("1", "the world", "all_reduce", (("dtype", "float32"),), where="a.py:1")
        >>> theirs = Message("1", "the world", "all_reduce", (("dtype", "int64"),), where="a.py:2")
        >>> print(disagreement(mine, theirs, 0, 1))
        dtype differs: rank 0 launches all_reduce (dtype float32) on the world at a.py:1, \
and rank 1 launches all_reduce (dtype int64) on the world at a.py:2
    """
    both = f"rank {rank} launches {mine}, and rank {other} launches {theirs}"
    if mine.group != theirs.group:
        return (
            f"{both}: two ranks that share several groups must launch on them in one order, or "
            f"each waits for the other for ever"
        )
    if mine.operation != _PARTNER.get(theirs.operation, theirs.operation):
        if mine.operation == theirs.operation:
            return f"{both}: put sends and receives that cross into one batch_isend_irecv"
        return f"the operations differ: {both}"
    for (what, value), (_, others) in zip(mine.agree, theirs.agree, strict=False):
        if value != others:
            return f"{what} differs: {both}"
    for sent, taken in ((mine.sends, theirs.takes), (theirs.sends, mine.takes)):
        if sent != taken:
            return f"what is sent is not what is taken: {both}"
    return ""


def refuse_what_nccl_refuses(launch: Launch) -> None:
    """Raise for tensors and groups that NCCL would not take.

    Raises:
        RuntimeError: a tensor is on the host, not contiguous or of a dtype that NCCL lacks, NCCL
            has no such operation or reduction, or the group was destroyed.
    """
    reason = _reason_to_refuse(launch)
    if reason:
        others = ", ".join(map(str, sorted(launch.messages)))
        several = len(launch.messages) > 1
        waiting = f"; rank{'s' * several} {others} wait{'s' * (not several)} for it"
        raise RuntimeError(
            f"rank {launch.rank} launches {launch.name} on {launch.group} at {caller()}: {reason}"
            f"{waiting if others else ''}"
        )


def _reason_to_refuse(launch: Launch) -> str:
    if launch.group.is_destroyed:
        return "the group was destroyed before"
    if launch.name == "recv from any rank":
        return "NCCL receives from a rank that is named: give src"
    if launch.reduction in ("BAND", "BOR", "BXOR"):
        return f"NCCL has no reduction {launch.reduction}"
    for tensor in (*launch.reads, *launch.writes):
        what = f"a tensor of shape {tuple(tensor.shape)} and dtype {dtype_name(tensor)}"
        if not is_on_device(tensor):
            return (
                f"{what} is in the host's memory, and NCCL takes device tensors: make it for the "
                f"device or move it there"
            )
        if memory_format(tensor) is None:
            return (
                f"{what} is not contiguous, and NCCL takes contiguous tensors: call .contiguous() "
                f"first"
            )
        if tensor.dtype not in NCCL_DTYPES:
            return f"{what}: NCCL does not know this dtype"
    return ""
