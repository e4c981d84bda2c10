"""Do two ranks that launch together launch the same? NCCL does not ask: it hangs, or errs."""

from megatron_mimo_coord.cpu.launches import Message

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
