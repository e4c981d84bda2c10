"""Bridges between modules that share ranks, for all microbatches of a step at once.

Where encoders run before and after the language model, their outputs travel in one batch when all
microbatches are encoded, to the ranks of the language model's first stage, and wait there; their
gradients return in one batch when the last microbatch's backward has run. Nobody waits in between
for a rank that has more to encode. What a rank has for itself is copied.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from attrs import define, field, frozen

from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.bridges.headers import HostMessages
from megatron_mimo_coord.bridges.incoming import Incoming
from megatron_mimo_coord.bridges.links import Ops, Receipt
from megatron_mimo_coord.bridges.outgoing import Outgoing
from megatron_mimo_coord.bridges.routes import Ends, giver, takers
from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid
from megatron_mimo_coord.layout.image_assignment import ImageAssignment
from megatron_mimo_coord.world.groups import ExtraGroups


@frozen
class Output:
    """What an encoder made of a microbatch.

    Args:
        tokens: [token, hidden], without a graph; needs a gradient if the encoder waits for one.
        assignment: of its images, None if they stayed with their slices.
    """

    tokens: torch.Tensor
    assignment: ImageAssignment | None


@define(eq=False, kw_only=True)
class StepOutgoing(Outgoing):
    """An encoder's end: sends the outputs of all microbatches, and receives their gradients."""

    _asked: list[dict[int, int]] = field(init=False, factory=list)

    def sends(self, outputs: Sequence[Output]) -> Ops:
        """The outputs, to be sent; hosts hear of them at once."""
        self._sent.clear()  # of a step that an exception cut short
        self._microbatch = 0
        self._hear_sizes(len(outputs))
        return [op for each in outputs for op in self._forward(each.tokens, each.assignment)]

    def gradients(self, number: int) -> list[Receipt[torch.Tensor | None]]:
        """Of so many microbatches, to be received; None for one that needs none."""
        return [self._backward() for _ in range(number)]

    def _hear_sizes(self, number: int) -> None:
        """How much of each output belongs to whom, which the targets read in their texts."""
        if len(self._turn) == 1:
            return
        self._asked = [{} for _ in range(number)]
        for target in self._turn:
            lanes = self.ends.targets[target]
            sizes = self.peers.receive(giver(self.rank, self._lane, lanes))
            for asked, size in zip(self._asked, sizes, strict=True):
                asked[target] = size

    def _sizes(self, output: torch.Tensor) -> Sequence[int]:
        if len(self._turn) == 1:
            return [len(output)]
        asked = [self._asked[self._microbatch][target] for target in self._turn]
        if sum(asked) != len(output) or min(asked) < 0:
            raise RuntimeError(
                f"microbatch {self._microbatch}: the encoder {self.name} returned {len(output)} "
                f"tokens on rank {self.rank}, but the texts of the ranks of the language model "
                f"that read its samples have {asked} (-1 where images were assigned): feed it the "
                f"images of its slice, or call assign_images on all ranks"
            )
        return asked

    def _drop_dead_references(self) -> None:
        """Outputs are gone as soon as they are sent; their gradients come all the same."""


@define(eq=False, kw_only=True)
class StepIncoming(Incoming):
    """The language model's end: receives all microbatches' tokens, and hands out one at a time."""

    _waiting: deque[torch.Tensor] = field(init=False, factory=deque)
    _returning: Ops = field(init=False, factory=list)

    def say_sizes(self, sizes: Sequence[int], hosts: HostMessages) -> None:
        """Tell each encoder rank that encodes for several how many tokens this text has.

        Args:
            sizes: of each microbatch.
            hosts: the way to them.
        """
        (source,) = self._turn
        for rank in takers(self.rank, self.ends.targets[self._dp], self.ends.sources[source]):
            hosts.send(rank, sizes)

    @property
    def asks(self) -> bool:
        """Whether its encoder's outputs go to several ranks."""
        return len(self.ends.sources) < len(self.ends.targets)

    def receives(self, number: int) -> list[Receipt[torch.Tensor]]:
        """The tokens of so many microbatches, to be received."""
        self._to_return.clear()
        return [self._forward() for _ in range(number)]

    def keep(self, tokens: Sequence[Receipt[torch.Tensor]]) -> None:
        """What was received waits for the language model."""
        self._waiting, self._returning = deque(each.tensor() for each in tokens), []

    def recv_forward(self) -> torch.Tensor:
        """The next microbatch's tokens."""
        return self._waiting.popleft()

    def send_backward(self, gradient: torch.Tensor | None) -> None:
        """Keep the gradient of the earliest tokens whose backward has run."""
        self._returning += self._backward(gradient)

    def send_backward_recv_forward(self, gradient: torch.Tensor | None) -> torch.Tensor:
        """Both."""
        self.send_backward(gradient)
        return self.recv_forward()

    def returns(self) -> Ops:
        """The gradients of all microbatches, to be sent."""
        returning, self._returning = self._returning, []
        return returning


class StepBridges:
    """The ways of all encoders to the language model and back. Collective to build.

    Args:
        grids: where each module lies; every rank holds the language model.
        rank: this one.
        groups: where to get more groups.
        dtype: of the language model's weights, in which tokens travel.
        sequence_peers: ranks that read other positions of the same samples, if there are any.
        assignments: the model's.
        checks_samples: whether assigned samples are compared with those that the language model's
            ranks are given.

    Attributes:
        incoming: on the language model's first stage, each encoder's end.
    """

    def __init__(
        self,
        grids: Mapping[str, ModuleGrid],
        rank: int,
        groups: ExtraGroups,
        dtype: torch.dtype,
        sequence_peers: dist.ProcessGroup | None,
        assignments: PendingAssignments,
        checks_samples: bool,
    ) -> None:
        ranks = grids[LANGUAGE].ranks
        hosts, devices = groups.hosts(ranks), groups.devices(ranks)
        assert hosts is not None and devices is not None, "every rank holds the language model"
        self._rank, self._devices = rank, devices
        self._outgoing: dict[str, StepOutgoing] = {}
        self.incoming: dict[str, StepIncoming] = {}
        self._peers: dict[str, HostMessages] = {}
        encoders = [name for name in grids if name != LANGUAGE]
        for tag, name in enumerate(encoders):
            ends = Ends.of_bridge(grids[name], grids[LANGUAGE])
            headers = HostMessages(hosts, 2 * tag)
            self._peers[name] = peers = HostMessages(hosts, 2 * tag + 1)
            way: dict[str, Any] = {
                "name": name,
                "ends": ends,
                "rank": rank,
                "devices": devices,
                "dtype": dtype,
            }
            if rank in grids[name].ranks:
                assignments.open([name])
                self._outgoing[name] = StepOutgoing(
                    **way, hosts=headers, peers=peers, assignments=assignments
                )
            if grids[LANGUAGE].coordinate(rank, "pp") == 0:
                check = assignments.check(name) if checks_samples else None
                self.incoming[name] = StepIncoming(
                    **way, hosts=headers, check=check, sequence_peers=sequence_peers
                )
            groups.before_destroy(headers.finish)
            groups.before_destroy(peers.finish)

    @property
    def asking(self) -> list[str]:
        """Encoders that must hear from this rank how many tokens of theirs its text has."""
        return [name for name, end in self.incoming.items() if end.asks]

    def deliver(
        self,
        outputs: Mapping[str, Sequence[Output]],
        sizes: Mapping[str, Sequence[int]],
        number: int,
    ) -> None:
        """Bring the outputs of a step to the language model's first stage.

        Args:
            outputs: of each encoder on this rank, of each microbatch.
            sizes: of each encoder that is asking, its tokens in each microbatch's text.
            number: of microbatches.
        """
        self._finish_headers()
        for name, said in sizes.items():
            self.incoming[name].say_sizes(said, self._peers[name])
        sends = [op for name, end in self._outgoing.items() for op in end.sends(outputs[name])]
        tokens = {name: end.receives(number) for name, end in self.incoming.items()}
        self._run(sends + [op for each in tokens.values() for some in each for op in some.ops])
        for name, received in tokens.items():
            self.incoming[name].keep(received)

    def give_back(self, number: int) -> dict[str, list[torch.Tensor | None]]:
        """Bring the gradients back: of each encoder on this rank, of each microbatch.

        Args:
            number: of microbatches.
        """
        sends = [op for end in self.incoming.values() for op in end.returns()]
        gradients = {name: end.gradients(number) for name, end in self._outgoing.items()}
        self._run(sends + [op for each in gradients.values() for some in each for op in some.ops])
        return {name: [each.tensor() for each in some] for name, some in gradients.items()}

    def _finish_headers(self) -> None:
        for end in (*self._outgoing.values(), *self.incoming.values()):
            end.finish()
        for peers in self._peers.values():
            peers.finish()

    def _run(self, ops: Ops) -> None:
        """One batch of one message to each rank; what is for this rank itself is copied."""
        sent: dict[int, list[torch.Tensor]] = defaultdict(list)
        received: dict[int, list[torch.Tensor]] = defaultdict(list)
        for op in ops:
            (sent if op.op is dist.isend else received)[op.peer].append(op.tensor)
        own = zip(received.pop(self._rank, ()), sent.pop(self._rank, ()), strict=True)
        messages = {peer: torch.cat([t.flatten() for t in each]) for peer, each in sent.items()}
        buffers = {peer: each[0].new_empty(_elements(each)) for peer, each in received.items()}
        batch = [dist.P2POp(dist.isend, t, peer, self._devices) for peer, t in messages.items()]
        batch += [dist.P2POp(dist.irecv, t, peer, self._devices) for peer, t in buffers.items()]
        works = dist.batch_isend_irecv(batch) if batch else ()
        for buffer, tensor in own:
            buffer.copy_(tensor)
        for work in works:
            work.wait()
        for peer, each in received.items():
            pieces = buffers[peer].split([tensor.numel() for tensor in each])
            for tensor, piece in zip(each, pieces, strict=True):
                tensor.copy_(piece.view_as(tensor))


def _elements(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
