"""One rank's end of a bridge, or of the way from one stage of a module to the next.

Hosts exchange headers, devices exchange tensors, and neither kind of message waits for the other:
a host waits for its peer's host alone. NCCL reads a tensor that is sent and writes one that is
received in the order of the current stream, so nothing here waits for the device either.

What is sent and received at once goes into one batch, in which NCCL lets each part proceed by
itself. The schedule calls both ends of a link in step, so batches match one to one.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from attrs import define, field, frozen

from megatron_mimo_coord.bridges.headers import HostMessages
from megatron_mimo_coord.bridges.parts import Whole
from megatron_mimo_coord.bridges.routes import Lanes, giver, peers_in_turn, place, takers

Ops = list[dist.P2POp]
"""Sends and receives of one batch."""


@frozen
class Receipt[T]:
    """Receives that are to be launched, and what makes a tensor of what they bring."""

    ops: Ops
    tensor: Callable[[], T]


@define(eq=False, kw_only=True)
class Link:
    """What both ends of a link have in common.

    Args:
        name: the module whose output goes over it.
        here, there: the ranks on this side and on the other, [data-parallel rank][lane].
        rank: this one.
        devices: the process group that tensors travel over, connected.
        hosts: the way of headers.
        dtype: in which tensors travel.
        dim: along which an output is cut if it goes to several ranks, or comes from several.

    Attributes:
        dp: data-parallel rank of this one.
        turn: those on the other side that it has to do with as long as nothing is assigned.
    """

    name: str
    here: Lanes
    there: Lanes
    rank: int
    devices: dist.ProcessGroup
    hosts: HostMessages
    dtype: torch.dtype
    dim: int = 0
    dp: int = field(init=False)
    turn: range = field(init=False)
    _lane: int = field(init=False)
    _under_way: tuple[Sequence[dist.Work], Ops] = field(init=False, default=((), []))

    def __attrs_post_init__(self) -> None:
        self.dp, self._lane = place(self.rank, self.here)
        self.turn = peers_in_turn(self.dp, len(self.here), len(self.there))

    def takers(self, peer: int) -> list[int]:
        """Ranks of a data-parallel rank on the other side that take from this rank."""
        return takers(self.rank, self.here[self.dp], self.there[peer])

    def giver(self, peer: int) -> int:
        """The rank of a data-parallel rank on the other side that this one takes from."""
        return giver(self.rank, self._lane, self.there[peer])

    @property
    def is_within(self) -> bool:
        """Whether this rank alone has to do with itself, as long as nothing is assigned."""
        mine = [self.rank]
        return len(self.here) == len(self.there) and self.takers(self.turn[0]) == mine

    def finish(self) -> None:
        """Wait until what was sent last has been taken: one message under way, and no queue."""
        works, _ = self._under_way
        for work in works:
            work.wait()
        self._under_way = ((), [])
        self.hosts.finish()

    def launch(self, ops: Ops) -> None:
        """Start one batch. What it sends is kept alive until somebody waits for it."""
        self._under_way = (dist.batch_isend_irecv(ops) if ops else (), ops)

    def run(self, ops: Ops) -> None:
        """One batch; with NCCL it is the current stream that waits for it, and not the host."""
        self.launch(ops)
        works, _ = self._under_way
        for work in works:
            work.wait()
        self._under_way = ((), [])

    def receipt(self, whole: Whole) -> Receipt[torch.Tensor]:
        """The parts of a tensor, to be received."""
        buffers, join = whole.buffers()
        pairs = zip(buffers, whole.parts, strict=True)
        return Receipt(
            [self.receive(buffer, self.giver(part.peer)) for buffer, part in pairs], join
        )

    def send(self, tensor: torch.Tensor, rank: int) -> dist.P2POp:
        """To a global rank, as a part of a batch."""
        return dist.P2POp(dist.isend, tensor, rank, self.devices)

    def receive(self, tensor: torch.Tensor, rank: int) -> dist.P2POp:
        """From a global rank, as a part of a batch."""
        return dist.P2POp(dist.irecv, tensor, rank, self.devices)
