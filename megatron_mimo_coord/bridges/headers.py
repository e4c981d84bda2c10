"""What hosts tell each other about a tensor that travels between their devices.

A receiver has to know how much comes from whom before it can allocate. If that came through the
device, the host would have to wait for the device to read it. So it comes through a group of hosts:
the sender's host knows all of it when it launches the kernels, long before the device gets there.
"""

from collections import deque
from collections.abc import Sequence
from itertools import islice

import torch
import torch.distributed as dist
from attrs import frozen

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@frozen(kw_only=True)
class Header:
    """About one message: to one rank, of one microbatch.

    Args:
        microbatch: its number in the pass.
        dtype: of the tensor.
        shape: of the tensor that the message holds; if it has no elements, no message follows.
        wants_gradient: whether the sender waits for the gradient.
        digests: of each sample of the microbatch, if its images were assigned.
        runs: for each run of neighboring rows of the message (first row in the receiver's tensor,
            number of rows), if they go where an assignment says.
        total_rows: rows of the receiver's tensor then, from all senders; else 0.
        senders: data-parallel ranks that have rows for the receiver.
    """

    microbatch: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    wants_gradient: bool
    digests: tuple[int, ...] = ()
    runs: tuple[tuple[int, int], ...] = ()
    total_rows: int = 0
    senders: tuple[int, ...] = ()

    def pack(self) -> list[int]:
        """The header as integers."""
        runs = [number for run in self.runs for number in run]
        lists = [self.shape, runs, self.senders, self.digests]
        return [
            self.microbatch,
            DTYPES.index(self.dtype),
            self.wants_gradient,
            self.total_rows,
            *map(len, lists),
            *(number for each in lists for number in each),
        ]

    @classmethod
    def unpack(cls, numbers: Sequence[int]) -> "Header":
        """The header that was packed."""
        microbatch, dtype, wants_gradient, total_rows, *rest = numbers
        lengths, behind = rest[:4], iter(rest[4:])
        shape, runs, senders, digests = (tuple(islice(behind, length)) for length in lengths)
        return cls(
            microbatch=microbatch,
            dtype=DTYPES[dtype],
            shape=shape,
            wants_gradient=bool(wants_gradient),
            runs=tuple(zip(runs[::2], runs[1::2], strict=True)),
            total_rows=total_rows,
            senders=senders,
            digests=digests,
        )


class HostMessages:
    """Lists of integers between the hosts of a group.

    A list of up to 31 travels in one message of fixed size, since a receiver must know the size
    beforehand; what is left of a longer one in a second.

    Args:
        group: a gloo group.
        tag: tells messages between the same two hosts apart.
    """

    FIXED = 32

    def __init__(self, group: dist.ProcessGroup, tag: int = 0) -> None:
        self._group = group
        self._tag = tag
        self._own: deque[list[int]] = deque()  # from this rank to itself
        self._under_way: list[tuple[dist.Work, torch.Tensor]] = []

    def send(self, rank: int, numbers: Sequence[int]) -> None:
        """Send to a global rank; does not wait for it."""
        if rank == dist.get_rank():
            self._own.append(list(numbers))
            return
        first = [len(numbers), *numbers[: self.FIXED - 1]]
        first += [0] * (self.FIXED - len(first))
        for part in (first, numbers[self.FIXED - 1 :]):
            if part:
                message = torch.tensor(part, dtype=torch.int64, device="cpu")
                work = dist.isend(message, dst=rank, group=self._group, tag=self._tag)
                assert work is not None, "this rank is in the group"
                self._under_way.append((work, message))

    def receive(self, rank: int) -> list[int]:
        """Wait for what a global rank sends next."""
        if rank == dist.get_rank():
            return self._own.popleft()
        length, *numbers = self._receive(rank, self.FIXED)
        if length > len(numbers):
            numbers += self._receive(rank, length - len(numbers))
        return numbers[:length]

    def finish(self) -> None:
        """Wait until everything that was sent has been taken."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()

    def _receive(self, rank: int, length: int) -> list[int]:
        message = torch.empty(length, dtype=torch.int64, device="cpu")
        try:
            dist.recv(message, src=rank, group=self._group, tag=self._tag)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {dist.get_rank()} expected rank {rank} to say what it sends, in vain: look "
                f"for its error, or whether it runs another number of microbatches, or was left "
                f"out of an assign_images call"
            ) from error
        return message.tolist()
