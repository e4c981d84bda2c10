"""Were all ranks that hold an encoder given the same images to deal out, and did they encode them?

They say so between hosts. A rank that was assigned images waits for the others, since it exchanges
tokens with them; one that was not goes on, and reads what they say when it has come.
"""

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from attrs import astuple, frozen

from megatron_mimo_coord.layout.image_assignment import ImageAssignment
from megatron_mimo_coord.world.gather import all_gather_text

# A rank that does not wait is at most so many deliveries ahead of the others.
MAX_UNREAD = 64

Made = tuple[ImageAssignment | None, int]
"""Of one microbatch how images were assigned, if they were, and how many tokens were made."""


@frozen
class Statement:
    """What one rank says about one encoder, of all microbatches that are exchanged at once.

    Args:
        assigned: 1 + the first microbatch whose images were assigned; 0 if none were.
        samples: hash of the tokens and ids of all samples, the same in every process.
        dealt: hash of who encodes which image, and of the costs.
        misfits: microbatches of which the encoder made another number of tokens than was assigned.
    """

    assigned: int
    samples: int
    dealt: int
    misfits: int

    @classmethod
    def of(cls, made: Sequence[Made], first: int) -> "Statement":
        """About these microbatches, which are numbered from ``first`` on."""
        assigned = [(n, given, rows) for n, (given, rows) in enumerate(made, first) if given]
        return cls(
            assigned[0][0] + 1 if assigned else 0,
            hash(tuple((n, given.digest) for n, given, _ in assigned)),
            hash(tuple((given.costs, given.owners) for _, given, _ in assigned)),
            sum(given.tokens_here not in (None, rows) for _, given, rows in assigned),
        )


WIDTH = len(Statement.__attrs_attrs__)


class Agreement:
    """Statements of the ranks of a group, compared.

    Args:
        group: a gloo group.
        holders: of each encoder the ranks that hold it, in one order on all ranks.
        remark: what else to say of an encoder that made another number of tokens.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        holders: Mapping[str, Sequence[int]],
        remark: Callable[[str], str],
    ) -> None:
        self._group = group
        self._remark = remark
        self._ranks = dist.get_process_group_ranks(group)
        self._holders = holders
        self._made: Mapping[str, Sequence[Made]] = {}
        self._first = 0
        self._unread: deque[tuple[dist.Work, torch.Tensor, torch.Tensor]] = deque()

    def send(self, made: Mapping[str, Sequence[Made]], first: int) -> None:
        """Tell the other ranks; reads what has come meanwhile. Collective.

        Args:
            made: of each encoder, of each microbatch that is exchanged.
            first: number of the first of these microbatches.

        Raises:
            RuntimeError: of earlier microbatches, some ranks assigned images and some did not.
        """
        unread = self._unread
        while unread and (len(unread) == MAX_UNREAD or unread[0][0].is_completed()):
            self._read_next()
        self._made, self._first = made, first
        said = [astuple(Statement.of(made[name], first)) for name in self._holders]
        row = torch.tensor(said, dtype=torch.int64, device="cpu")
        rows = row.new_empty((len(self._ranks) * len(row), WIDTH))
        work = dist.all_gather_into_tensor(rows, row, group=self._group, async_op=True)
        assert work is not None, "this rank is in the group"
        unread.append((work, rows, row))

    def check(self) -> None:
        """Wait for what all ranks say. Collective if they do not agree.

        Raises:
            RuntimeError: names two ranks and the first sample that differs, or a rank that made
                another number of tokens.
        """
        while self._unread:
            self._read_next()

    def finish(self) -> None:
        """Wait for what is under way, whatever it says."""
        for work, _, _ in self._unread:
            work.wait()
        self._unread.clear()

    def _read_next(self) -> None:
        work, rows, _ = self._unread.popleft()
        work.wait()
        everyone = [Statement(*row) for row in rows.tolist()]
        for place, (name, holders) in enumerate(self._holders.items()):
            said = dict(zip(self._ranks, everyone[place :: len(self._holders)], strict=True))
            firsts = [(said[rank].assigned or inf, rank) for rank in holders]
            (first, with_one), (latest, without) = min(firsts), max(firsts)
            if first < latest:
                refuse_left_out(name, int(first) - 1, with_one, without)
            if first < inf:  # else what was assigned to others does no harm
                samples = {each.samples for each in said.values() if each.assigned}
                dealt = {said[rank].dealt for rank in holders}
                misfits = [rank for rank in holders if said[rank].misfits]
                if len(samples) > 1 or len(dealt) > 1 or misfits:
                    self._refuse(name)

    def _refuse(self, name: str) -> None:
        """Have the ranks show what they were given, and name two of them, or one."""
        mine = json.dumps([_shown(*each) for each in self._made[name]])
        everyone = [json.loads(text) for text in all_gather_text(mine, self._group)]
        shown = dict(zip(self._ranks, everyone, strict=True))
        holders = [(rank, shown.pop(rank)) for rank in self._holders[name]]
        (rank, given), *_ = holders
        for number, one in enumerate(given):
            at = f"microbatch {self._first + number}: "
            for other, theirs in holders:
                if (one is None) is not (theirs[number] is None):
                    with_one, without = (other, rank) if one is None else (rank, other)
                    refuse_left_out(name, self._first + number, with_one, without)
            if one is None:
                continue
            for other, theirs in (*holders, *shown.items()):
                difference = _difference(one, theirs[number] or one, rank, other)
                if difference:
                    raise RuntimeError(
                        f"{at}ranks {rank} and {other} called assign_images({name!r}, ...) with "
                        f"different numbers: {difference}. Pass the same on every rank, once a "
                        f"microbatch, in the same order; if the samples differ, have all ranks' "
                        f"samplers draw the same"
                    )
            for other, theirs in holders:
                made, expected = theirs[number]["made"]
                if made != expected:
                    raise RuntimeError(
                        f"{at}the {name} encoder returned {made} tokens on rank {other}, but "
                        f"assign_images gave that rank images of {expected} tokens; feed it the "
                        f"images of assignment.local in that order, and pass assign_images the "
                        f"number of tokens that the encoder makes of each image{self._remark(name)}"
                    )
        raise RuntimeError(
            f"ranks deal out images of {name} differently: call assign_images with the same "
            f"numbers in the same order on all of them"
        )


def _shown(assignment: ImageAssignment | None, rows: int) -> dict[str, Any] | None:
    """In JSON: what a rank was given, and what it made of it."""
    if assignment is None:
        return None
    ids = assignment.sample_ids or (None,) * len(assignment.tokens)
    samples = zip(assignment.tokens, ids, assignment.costs, strict=True)
    made = (rows, assignment.tokens_here)
    return {"samples": [list(map(repr, sample)) for sample in samples], "made": made}


def _difference(
    one: Mapping[str, Any], other: Mapping[str, Any], rank: int, other_rank: int
) -> str:
    """The first sample whose tokens or id differ, else whose costs do; empty if none does."""
    mine, theirs = one["samples"], other["samples"]
    if len(mine) != len(theirs):
        return f"{len(mine)} samples on rank {rank}, {len(theirs)} on rank {other_rank}"
    for said, what in (("tokens {} and id {}", slice(2)), ("costs {}", slice(2, 3))):
        for sample, (here, there) in enumerate(zip(mine, theirs, strict=True)):
            if here[what] != there[what]:
                here, there = said.format(*here[what]), said.format(*there[what])
                return f"sample {sample} has {here} on rank {rank}, {there} on rank {other_rank}"
    return ""


def refuse_other_samples(
    encoder: str,
    microbatch: int,
    one: tuple[int, Sequence[int]],
    other: tuple[int, Sequence[int]],
) -> None:
    """Compare what two ranks were given, each as (rank, digest of each sample).

    Raises:
        RuntimeError: they differ; names the ranks, the microbatch and the first sample.

    Example:
        >>> refuse_other_samples("vision", 2, (0, [11, 12]), (3, [11, 13]))
        Traceback (most recent call last):
        RuntimeError: microbatch 2: ranks 0 and 3 were given different samples for vision, the \
first that differs is sample 1 of 2 (in its id or in the tokens of its images): read the same \
samples in the same order on both
    """
    (rank, digests), (other_rank, other_digests) = one, other
    if tuple(digests) == tuple(other_digests):
        return
    if not digests or not other_digests:
        with_one, without = (rank, other_rank) if digests else (other_rank, rank)
        refuse_left_out(encoder, microbatch, with_one, without)
    if len(digests) != len(other_digests):
        what = f"{len(digests)} and {len(other_digests)} of them"
    else:
        pairs = zip(digests, other_digests, strict=True)
        first = next(sample for sample, (here, there) in enumerate(pairs) if here != there)
        what = (
            f"the first that differs is sample {first} of {len(digests)} (in its id or in the "
            f"tokens of its images)"
        )
    raise RuntimeError(
        f"microbatch {microbatch}: ranks {rank} and {other_rank} were given different samples for "
        f"{encoder}, {what}: read the same samples in the same order on both"
    )


def refuse_left_out(encoder: str, microbatch: int, with_one: int, without: int) -> NoReturn:
    """Of two ranks that hold an encoder, one was given an assignment and the other was not."""
    raise RuntimeError(
        f"microbatch {microbatch}: images of {encoder} were assigned on rank {with_one}, but not "
        f"on rank {without}: call assign_images once a microbatch, in the same order, on every "
        f"rank that holds {encoder}"
    )
