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
from megatron_mimo_coord.bridges.routes import Ends

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
        ends: the ranks on both sides.
        rank: this one.
        devices: the process group that tensors travel over, connected.
        hosts: the way of headers.
        dtype: in which tensors travel.
        dim: along which an output is cut if it goes to several ranks, or comes from several.
    """

    name: str
    ends: Ends
    rank: int
    devices: dist.ProcessGroup
    hosts: HostMessages
    dtype: torch.dtype
    dim: int = 0
    _under_way: tuple[Sequence[dist.Work], Ops] = field(init=False, default=((), []))

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

    def send(self, tensor: torch.Tensor, rank: int) -> dist.P2POp:
        """To a global rank, as a part of a batch."""
        return dist.P2POp(dist.isend, tensor, rank, self.devices)

    def receive(self, tensor: torch.Tensor, rank: int) -> dist.P2POp:
        """From a global rank, as a part of a batch."""
        return dist.P2POp(dist.irecv, tensor, rank, self.devices)
