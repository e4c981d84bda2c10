"""What ranks that share modules tell each other about a microbatch, and what is wrong with it.

Statements travel between hosts. A rank that was assigned images waits for those of all ranks, since
it exchanges tokens with them; one that was not goes on and reads them when they have come.
"""

import json
from collections import deque
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from attrs import astuple, field, frozen

from megatron_mimo_coord.layout.image_assignment import ImageAssignment
from megatron_mimo_coord.world.gather import all_gather_text

# A rank that does not wait is at most so many microbatches ahead of the others.
MAX_UNREAD = 64


@frozen
class Statement:
    """What one rank says about one encoder's output for a microbatch.

    Args:
        tokens: in this rank's output; -1 if the encoder was not fed.
        wants_gradient: whether the output needs one.
        in_text: tokens in this rank's text, where the others have to know; else 0.
        assigned: whether the images were assigned.
        digest: of the assignment's tokens and sample ids.
        costs: hash of the assignment's costs and owners, the same in every process.
    """

    tokens: int
    wants_gradient: int = field(default=0, converter=int)
    in_text: int = 0
    assigned: int = 0
    digest: int = 0
    costs: int = 0


WIDTH = len(astuple(Statement(0)))
Statements = Sequence[Statement]
_Given = Sequence[tuple[str, str, str]]  # of each sample the tokens, the id and the costs


class HostStatements:
    """Statements of the ranks of a group about each of some encoders.

    Args:
        group: a gloo group.
        encoders: their names, in one order on all ranks.
    """

    def __init__(self, group: dist.ProcessGroup, encoders: Sequence[str]) -> None:
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)
        self._encoders = encoders
        self._microbatch = -1
        self._unread: deque[tuple[int, dist.Work | None, torch.Tensor, torch.Tensor]] = deque()

    def send(self, mine: Mapping[str, Statement], microbatch: int) -> None:
        """Tell the other ranks about a microbatch; reads what has come meanwhile.

        Raises:
            RuntimeError: for an earlier microbatch, some ranks assigned images and some did not.
        """
        while len(self._unread) == MAX_UNREAD or (self._unread and _is_here(self._unread[0][1])):
            self._read_next()
        self._microbatch = microbatch
        said = [astuple(mine[name]) for name in self._encoders]
        row = torch.tensor(said, dtype=torch.int64, device="cpu")
        rows = row.new_empty((len(self._ranks) * len(row), WIDTH))
        work = dist.all_gather_into_tensor(rows, row, group=self._group, async_op=True)
        self._unread.append((self._microbatch, work, rows, row))

    def read(self) -> dict[str, Statements]:
        """Wait for what all ranks say about this microbatch; for each encoder, of each rank.

        Raises:
            RuntimeError: some ranks assigned images and some did not.
        """
        while self._unread:
            latest = self._read_next()
        return latest

    def finish(self) -> None:
        """Wait for what is under way, whatever it says."""
        for _, work, _, _ in self._unread:
            if work is not None:
                work.wait()
        self._unread.clear()

    def _read_next(self) -> dict[str, Statements]:
        microbatch, work, rows, _ = self._unread.popleft()
        if work is not None:
            work.wait()
        said = [Statement(*row) for row in rows.tolist()]
        statements: dict[str, Statements] = {
            name: said[place :: len(self._encoders)] for place, name in enumerate(self._encoders)
        }
        for name in self._encoders:
            calls = [statement.assigned for statement in statements[name]]
            if len(set(calls)) > 1:
                raise RuntimeError(
                    f"microbatch {microbatch}: assign_images({name!r}, ...) was called on rank "
                    f"{self._ranks[calls.index(1)]} and not on rank {self._ranks[calls.index(0)]}; "
                    f"call it on all ranks that hold {name}, once a microbatch, in the same order"
                )
        return statements

    def compare(
        self,
        assignment: ImageAssignment,
        owners: Sequence[int],
        said: Statements,
        remark: str = "",
    ) -> None:
        """Whether all ranks assigned the same, and fed their encoder what was assigned.

        Collective if they did not.

        Args:
            assignment: this rank's.
            owners: data-parallel rank of the encoder on each rank of the group.
            said: of each rank of the group, about this encoder.
            remark: what else to say where an encoder made another number of tokens.

        Raises:
            RuntimeError: they did not; names two ranks and the first sample that differs.
        """
        for place, statement in enumerate(said):
            if (statement.digest, statement.costs) != (said[0].digest, said[0].costs):
                self._refuse_other_assignment(assignment, place)
        expected = assignment.tokens_of_ranks
        for rank, owner, statement in zip(self._ranks, owners, said, strict=True):
            if max(statement.tokens, 0) != expected[owner]:
                returned = (
                    f"returned {statement.tokens} tokens"
                    if statement.tokens >= 0
                    else "was not fed"
                )
                raise RuntimeError(
                    f"microbatch {self._microbatch}: the {assignment.module} encoder {returned} on "
                    f"rank {rank}, but assign_images gave that rank images of {expected[owner]} "
                    f"tokens; feed it the images of assignment.local in that order, and pass "
                    f"assign_images the number of tokens that the encoder makes of each "
                    f"image{remark}"
                )

    def _refuse_other_assignment(self, assignment: ImageAssignment, place: int) -> None:
        """Have the ranks show what they were given; only this rank 0 and ``place`` are named."""
        ids = assignment.sample_ids or (None,) * len(assignment.tokens)
        samples = zip(assignment.tokens, ids, assignment.costs, strict=True)
        mine = json.dumps([list(map(repr, sample)) for sample in samples])
        given = [json.loads(text) for text in all_gather_text(mine, self._group)]
        raise RuntimeError(
            f"microbatch {self._microbatch}: rank {self._ranks[0]} and rank {self._ranks[place]} "
            f"called assign_images({assignment.module!r}, ...) with different numbers: "
            f"{_first_difference(given[0], given[place], self._ranks[0], self._ranks[place])}. "
            f"Pass the same on every rank, once a microbatch, in the same order; if the samples "
            f"differ, have all ranks' samplers draw the same"
        )


def _first_difference(one: _Given, other: _Given, rank: int, other_rank: int) -> str:
    """The first sample whose tokens or id differ, else whose costs do."""
    if len(one) != len(other):
        return f"{len(one)} samples on rank {rank}, {len(other)} on rank {other_rank}"
    pairs = enumerate(zip(one, other, strict=True))
    differing = [(sample, *pair) for sample, pair in pairs if pair[0] != pair[1]]
    for sample, mine, theirs in differing:
        if mine[:2] != theirs[:2]:
            return (
                f"sample {sample} has tokens {mine[0]} and id {mine[1]} on rank {rank}, tokens "
                f"{theirs[0]} and id {theirs[1]} on rank {other_rank}"
            )
    sample, mine, theirs = differing[0]
    return f"sample {sample} has costs {mine[2]} on rank {rank}, {theirs[2]} on rank {other_rank}"


def _is_here(work: dist.Work | None) -> bool:
    return work is None or work.is_completed()
