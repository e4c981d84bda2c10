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
from megatron_mimo_coord.bridges.routes import Lanes, Run, peers_in_turn, takers

Ops = list[dist.P2POp]
"""Sends and receives of one batch."""

Receipt = tuple[Ops, Callable[[], torch.Tensor]]
"""Receives that are to be launched, and what makes a tensor of what they bring."""


@frozen
class Part:
    """What one data-parallel rank on the other side sends or receives of a tensor.

    Args:
        peer: that rank.
        runs: which part, as (first row, number of rows) of each run of neighboring rows.
    """

    peer: int
    runs: tuple[Run, ...]

    def cut(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """These rows of the whole, contiguous; a view if they are already."""
        pieces = [tensor.narrow(dim, start, count) for start, count in self.runs]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)).contiguous()


@frozen
class Whole:
    """A tensor that is sent or received in parts.

    Args:
        shape: of the whole.
        parts: which cover it, in any order; a part without elements does not travel.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


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
    _under_way: tuple[Sequence[dist.Work], Ops] = field(init=False, default=((), []))

    def __attrs_post_init__(self) -> None:
        self.dp = next(dp for dp, lanes in enumerate(self.here) if self.rank in lanes)
        self.turn = peers_in_turn(self.dp, len(self.here), len(self.there))

    def takers(self, peer: int) -> list[int]:
        """Ranks of a data-parallel rank on the other side that take from this rank."""
        return takers(self.rank, self.here[self.dp], self.there[peer])

    def giver(self, peer: int) -> int:
        """The rank of a data-parallel rank on the other side that this one takes from."""
        there, lane = self.there[peer], self.here[self.dp].index(self.rank)
        return self.rank if self.rank in there else there[lane % len(there)]

    @property
    def is_within(self) -> bool:
        """Whether this rank alone has to do with itself, as long as nothing is assigned."""
        mine = [self.rank]
        return len(self.here) == len(self.there) and self.takers(self.turn[0]) == mine

    def finish(self) -> None:
        """Wait until what was sent last has been taken: one message under way, and no queue."""
        self._wait()
        self.hosts.finish()

    def launch(self, ops: Ops) -> None:
        """Start one batch. What it sends is kept alive until somebody waits for it."""
        self._under_way = (dist.batch_isend_irecv(ops) if ops else (), ops)

    def run(self, ops: Ops) -> None:
        """One batch; with NCCL it is the current stream that waits for it, and not the host."""
        self.launch(ops)
        self._wait()

    def _wait(self) -> None:
        works, _ = self._under_way
        for work in works:
            work.wait()
        self._under_way = ((), [])

    def sends(self, tensor: torch.Tensor, whole: Whole) -> Ops:
        """The parts of a tensor, to be sent to all who take from this rank."""
        messages = [(part.peer, part.cut(tensor, self.dim)) for part in whole.parts]
        return [
            dist.P2POp(dist.isend, message, rank, self.devices)
            for peer, message in messages
            for rank in self.takers(peer)
        ]

    def receipt(self, whole: Whole) -> Receipt:
        """The parts of a tensor, to be received."""
        if self.dim == 0 and all(len(part.runs) == 1 for part in whole.parts):
            tensor = self._empty(whole, whole.shape[0])
            buffers = [tensor.narrow(0, *part.runs[0]) for part in whole.parts]
        else:
            tensor = None
            rows = [sum(count for _, count in part.runs) for part in whole.parts]
            buffers = [self._empty(whole, number) for number in rows]
        ops = [
            dist.P2POp(dist.irecv, buffer, self.giver(part.peer), self.devices)
            for part, buffer in zip(whole.parts, buffers, strict=True)
        ]
        return ops, lambda: self._joined(whole, buffers) if tensor is None else tensor

    def _empty(self, whole: Whole, rows: int) -> torch.Tensor:
        shape = (*whole.shape[: self.dim], rows, *whole.shape[self.dim + 1 :])
        return torch.empty(shape, dtype=self.dtype, device=torch.cuda.current_device())

    def _joined(self, whole: Whole, buffers: Sequence[torch.Tensor]) -> torch.Tensor:
        """All runs in their order: one kernel, and no index that must get to the device."""
        pieces: list[tuple[int, torch.Tensor]] = []
        for part, message in zip(whole.parts, buffers, strict=True):
            starts, counts = zip(*part.runs, strict=True)
            pieces += zip(starts, message.split(counts, self.dim), strict=True)
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda p: p[0])], self.dim)
