"""Bridges between modules that share ranks: of a whole step at once, or a microbatch at a time.

Where encoders run before and after the language model, their outputs travel in one batch when all
microbatches are encoded, to the ranks of the language model's first stage, and wait there; their
gradients return in one batch when the last microbatch's backward has run. Nobody waits in between
for a rank that has more to encode. Where a forward runs all modules, it does the same with one
microbatch. What a rank has for itself is copied.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from attrs import field, frozen

from megatron_mimo_coord.bridges.agreement import Agreement, refuse_left_out
from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.bridges.headers import HostMessages
from megatron_mimo_coord.bridges.incoming import TargetEnd, sequence_peers
from megatron_mimo_coord.bridges.links import Link, Ops, Whole
from megatron_mimo_coord.bridges.outgoing import SourceEnd
from megatron_mimo_coord.bridges.routes import bridge_ends, in_turn
from megatron_mimo_coord.bridges.text_tokens import TextTokens
from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.layout.image_assignment import ImageAssignment
from megatron_mimo_coord.world.groups import ExtraGroups

ASSIGNED = -1
"""Said in place of a number of tokens, which nobody has to know where images were assigned."""


@frozen
class Output:
    """What a rank has of an encoder for a microbatch.

    Args:
        tokens: [token, hidden], without a graph; needs a gradient if the encoder waits for one.
            None on a rank that does not hold the encoder.
        assignment: of its images, None if they stayed with their slices.
        text: [sample, token], what the language model of this rank reads.
    """

    tokens: torch.Tensor | None
    assignment: ImageAssignment | None
    text: torch.Tensor | None

    @classmethod
    def of(cls, tokens: torch.Tensor | None, *more: Any) -> "Output":
        """The same of tokens with a graph."""
        given = tokens if tokens is None else tokens.detach().requires_grad_(tokens.requires_grad)
        return cls(given, *more)

    @property
    def rows(self) -> int:
        """Tokens that were made."""
        return 0 if self.tokens is None else len(self.tokens)


Tensors = Mapping[str, list[torch.Tensor | None]]
"""Of each encoder, of each microbatch."""


@frozen
class Delivered:
    """What came to the language model's first stage, for one microbatch after the other.

    Args:
        tokens: of each encoder, of each microbatch that has not run; empty on other stages.
        give_back: brings their gradients to the encoders of this rank; None where none is wanted.

    Attributes:
        gradients: of those whose backward has run.
    """

    tokens: Mapping[str, deque[torch.Tensor]]
    give_back: Callable[[Tensors], Tensors]
    gradients: dict[str, list[torch.Tensor | None]] = field(
        init=False, factory=lambda: defaultdict(list)
    )

    def next(self) -> dict[str, torch.Tensor]:
        """The next microbatch's tokens."""
        return {name: each.popleft().requires_grad_() for name, each in self.tokens.items()}

    def keep(self, gradients: Mapping[str, torch.Tensor | None]) -> None:
        """Those of the earliest tokens whose backward has run."""
        for name in self.tokens:
            self.gradients[name].append(gradients[name])


class SharedBridges:
    """The ways of all encoders to the language model and back. Collective to build.

    Args:
        job: in which every rank holds the language model.
        assignments: the model's.
        texts: compared with tokens.

    Attributes:
        encoders: all of them, in one order on every rank.
        dtype: in which tokens travel.
    """

    def __init__(self, job: Job, assignments: PendingAssignments, texts: TextTokens) -> None:
        model, grids, rank, ranks = job.model, job.grids, job.rank, job.grids[LANGUAGE].ranks
        groups = ExtraGroups.shared(job.infra.module_to_grid_map[LANGUAGE])
        peers = sequence_peers(job.infra.module_to_grid_map[LANGUAGE])
        hosts, devices = groups.hosts(ranks), groups.devices(ranks)
        assert hosts is not None and devices is not None, "every rank holds the language model"
        self._rank, self._devices = rank, devices
        self._texts = texts
        self._sources: dict[str, SourceEnd] = {}
        self._targets: dict[str, TargetEnd] = {}
        self.encoders = [name for name in grids if name != LANGUAGE]
        # That of the text's embeddings, which a model puts together with the tokens.
        self.dtype = next(model.language_model.parameters()).dtype
        for tag, name in enumerate(self.encoders):
            sources, targets = bridge_ends(grids[name], grids[LANGUAGE])
            way: dict[str, Any] = {
                "name": name,
                "rank": rank,
                "devices": devices,
                "hosts": HostMessages(hosts, tag),
                "dtype": self.dtype,
            }
            if rank in grids[name].ranks:
                self._sources[name] = SourceEnd(here=sources, there=targets, **way)
            if grids[LANGUAGE].coordinate(rank, "pp") == 0:
                self._targets[name] = TargetEnd(
                    here=targets, there=sources, sequence_peers=peers, **way
                )
        ends: list[Link] = [*self._sources.values(), *self._targets.values()]
        self._are_within = (
            len(ends) == 2 * len(self.encoders)
            and all(end.is_within for end in ends)
            and peers is None
        )
        holders = {name: [r for r in ranks if r in grids[name].ranks] for name in self.encoders}
        self._agreement = Agreement(hosts, holders, assignments.remark)
        groups.before_destroy(self._finish)
        groups.before_destroy(self._agreement.finish)

    def deliver(self, outputs: Mapping[str, Sequence[Output]], first: int = 0) -> Delivered:
        """Bring outputs to the language model's first stage.

        Args:
            outputs: of each encoder, of each microbatch.
            first: number of the first of these microbatches in the pass.

        Raises:
            RuntimeError: ranks that hold an encoder were not given the same images to deal out, or
                its output is not what was assigned.
        """
        self._finish()
        self.say(outputs, first)
        self._say_sizes(outputs)
        sent = [
            (source, *each)
            for source in self._sources.values()
            for each in self._announce(source, outputs[source.name], first)
        ]
        is_assigned = any(each.assignment for each in chain(*outputs.values()))
        if is_assigned or len(self._sources) < len(self.encoders):
            self._agreement.check()
        arrivals = [
            (target, *target.arrival(target.hear()))
            for target in self._targets.values()
            for _ in outputs[target.name]
        ]
        sends = [op for source, tokens, whole in sent for op in source.sends(tokens, whole)]
        self._run(sends + [op for _, ops, _, _ in arrivals for op in ops])
        received: dict[str, deque[torch.Tensor]] = {name: deque() for name in self._targets}
        for target, _, tensor, _ in arrivals:
            received[target.name].append(tensor())
        back = [(target, to_return) for target, _, _, to_return in arrivals]
        wanted = [(source, tokens.requires_grad, whole) for source, tokens, whole in sent]
        return Delivered(received, lambda gradients: self._give_back(back, wanted, gradients))

    def stays(self, outputs: Mapping[str, Sequence[Output]]) -> bool:
        """Whether this rank alone reads what it has encoded, and nothing else."""
        return self._are_within and not any(each.assignment for each in chain(*outputs.values()))

    def say(self, outputs: Mapping[str, Sequence[Output]], first: int) -> None:
        """Tell the other ranks how images were assigned, and how many tokens were made of them."""
        made = {name: [(each.assignment, each.rows) for each in outputs[name]] for name in outputs}
        self._agreement.send(made, first)

    def _give_back(
        self,
        back: Sequence[tuple[TargetEnd, Whole]],
        wanted: Sequence[tuple[SourceEnd, bool, Whole]],
        gradients: Tensors,
    ) -> Tensors:
        given = {name: iter(each) for name, each in gradients.items()}
        sends = [
            op
            for target, whole in back
            for op in target.returns(target.checked(next(given[target.name])), whole)
        ]
        receipts = [
            (source.name, *(source.receipt(whole) if is_wanted else ((), None)))
            for source, is_wanted, whole in wanted
        ]
        self._run(sends + [op for _, ops, _ in receipts for op in ops])
        received: dict[str, list[torch.Tensor | None]] = {name: [] for name in self._sources}
        for name, _, tensor in receipts:
            received[name].append(tensor and tensor())
        return received

    # -- what hosts say ----------------------------------------------------------------------------

    def _announce(
        self, source: SourceEnd, outputs: Sequence[Output], first: int
    ) -> Iterator[tuple[torch.Tensor, Whole]]:
        """Tell what comes of each output, and how it travels."""
        ranks = [source.giver(peer) for peer in source.turn]
        asked = [source.hosts.receive(rank) for rank in ranks] if len(ranks) > 1 else []
        for number, output in enumerate(outputs):
            microbatch, tokens = first + number, output.tokens
            assert tokens is not None, "the encoder is here"
            if output.assignment is not None:
                deliveries = source.assigned(output.assignment)
            elif asked:
                counts = [sizes[number] for sizes in asked]
                if ASSIGNED in counts:
                    with_one = ranks[counts.index(ASSIGNED)]
                    refuse_left_out(source.name, microbatch, with_one, self._rank)
                sizes = self._texts.sizes(source.name, counts, len(tokens), microbatch, output.text)
                deliveries = in_turn(source.turn, sizes)
            else:
                deliveries = in_turn(source.turn, [len(tokens)])
            yield tokens, source.announce(tokens, deliveries, microbatch, output.assignment)

    def _say_sizes(self, outputs: Mapping[str, Sequence[Output]]) -> None:
        """Tell encoder ranks that encode for several how many tokens this rank's texts have."""
        asking = [each for each in self._targets.values() if len(each.here) > len(each.there)]
        said = [[self._in_text(target, each) for each in outputs[target.name]] for target in asking]
        numbers = iter(self._read([each for each in chain(*said) if torch.is_tensor(each)]))
        for target, sizes in zip(asking, said, strict=True):
            (peer,) = target.turn
            read = [next(numbers) if torch.is_tensor(each) else each for each in sizes]
            for rank in target.takers(peer):
                target.hosts.send(rank, read)

    def _in_text(self, target: TargetEnd, output: Output) -> torch.Tensor | int:
        """How many of an encoder's tokens a text has."""
        (peer,) = target.turn
        if output.assignment is not None:
            return ASSIGNED
        if self._rank in target.there[peer] and not output.rows:
            return 0  # nor has anybody who shares the output
        if output.text is None:
            raise RuntimeError(
                f"rank {self._rank} was given no input_ids, which say how many tokens of "
                f"{target.name} are its own: pass them to the model's forward"
            )
        return self._texts.total(target.name, output.text)

    def _read(self, numbers: Sequence[torch.Tensor]) -> list[int]:
        """What only the device knows: this waits for it."""
        return torch.stack([*numbers]).tolist() if numbers else []

    def _finish(self) -> None:
        """Wait until hosts have heard what was said before."""
        for end in (*self._sources.values(), *self._targets.values()):
            end.finish()

    # -- what devices exchange ---------------------------------------------------------------------

    def _run(self, ops: Ops) -> None:
        """One batch of one message to each rank; what is for this rank itself is copied."""
        sent: dict[int, list[torch.Tensor]] = defaultdict(list)
        received: dict[int, list[torch.Tensor]] = defaultdict(list)
        for op in ops:
            (sent if op.op is dist.isend else received)[op.peer].append(op.tensor)
        own = zip(received.pop(self._rank, ()), sent.pop(self._rank, ()), strict=True)
        messages = {  # a tensor as it is, several in a copy
            peer: torch.cat([tensor.flatten() for tensor in each]) if len(each) > 1 else each[0]
            for peer, each in sent.items()
        }
        buffers = {
            peer: each[0].new_empty(sum(map(torch.numel, each))) if len(each) > 1 else each[0]
            for peer, each in received.items()
        }
        batch = [dist.P2POp(dist.isend, t, peer, self._devices) for peer, t in messages.items()]
        batch += [dist.P2POp(dist.irecv, t, peer, self._devices) for peer, t in buffers.items()]
        works = dist.batch_isend_irecv(batch) if batch else ()
        for buffer, tensor in own:
            buffer.copy_(tensor)
        for work in works:
            work.wait()
        for peer, each in received.items():
            if len(each) > 1:
                pieces = buffers[peer].split([tensor.numel() for tensor in each])
                for tensor, piece in zip(each, pieces, strict=True):
                    tensor.copy_(piece.view_as(tensor))
