"""Do all ranks mean the same job? One small collective when a coordinator is built.

Every rank describes what it was given as facts: plain text under a name. Facts of the job must be
the same everywhere, facts of a module on all of its ranks. Only digests travel, a row of fixed size
a rank, so that ranks can disagree about anything, the number of modules included. Where digests
differ, or a rank has found a problem of its own, the texts follow, and every rank raises the same
error, which says which ranks say what.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
import torch.distributed as dist
from attrs import frozen

from megatron_mimo_coord.layout.problems import listed, raise_problems
from megatron_mimo_coord.world.device import world_device
from megatron_mimo_coord.world.gather import all_gather_text


@frozen
class RankFacts:
    """What one rank was given.

    Args:
        job: facts that must be the same on every rank.
        modules: for each module on this rank, facts that must be the same on all of its ranks.
        problems: what this rank already knows to be wrong.
        flags: 63 bits that the other ranks should know; they are not compared.
    """

    job: Mapping[str, str]
    modules: Mapping[str, Mapping[str, str]]
    problems: Sequence[str] = ()
    flags: int = 0

    def row(self) -> list[int]:
        """This statement in seven integers: (problem?, job, names of modules, modules, flags)."""
        return [
            int(bool(self.problems)),
            *_digest(self.job),
            _digest(sorted(self.modules))[0],
            *_digest(self.modules),
            self.flags,
        ]


CANNOT_START = "this job cannot start"


def check_consistency(
    make_facts: Callable[[], RankFacts], headline: str = CANNOT_START
) -> list[int]:
    """Compare what this rank was given with what all ranks were. Collective over the world.

    Args:
        make_facts: makes this rank's statement; if it raises, the others hear why.
        headline: how the error begins.

    Returns:
        The flags of every rank.

    Raises:
        ValueError: on every rank, if any two disagree or any rank has a problem.
    """
    try:
        statement = make_facts()
    except Exception as error:  # raised again: this is only so that nobody waits for this rank
        with suppress(ValueError):
            _compare(RankFacts({}, {}, [f"{type(error).__name__}: {error}"]), headline)
        raise
    return _compare(statement, headline)


def _compare(statement: RankFacts, headline: str) -> list[int]:
    row = torch.tensor([statement.row()], dtype=torch.int64, device=world_device())
    gathered = row.new_empty((dist.get_world_size(), row.shape[1]))
    dist.all_gather_into_tensor(gathered, row)
    rows = [tuple(row) for row in gathered.tolist()]
    # Rows without the flags: one a set of modules, if all is well.
    jobs = {row[1:3] for row in rows}
    modules = {row[3:6] for row in rows}
    sets_of_modules = {row[3] for row in rows}
    if any(row[0] for row in rows) or len(jobs) > 1 or len(modules) > len(sets_of_modules):
        text = json.dumps([statement.job, statement.modules, list(statement.problems)])
        texts = all_gather_text(text, device=world_device())
        raise_problems(headline, disagreements([RankFacts(*json.loads(text)) for text in texts]))
        raise AssertionError("digests differ, but what they were made of does not")
    return [row[6] for row in rows]


def disagreements(statements: Sequence[RankFacts]) -> list[str]:
    """Each problem that a rank found and each fact that ranks disagree about, with the ranks.

    Example:
        >>> here, there = RankFacts({"vision: tp": "1"}, {}), RankFacts({"vision: tp": "2"}, {})
        >>> disagreements([here, here, there])
        ['vision: tp: rank 2 has 2, ranks 0, 1 have 1']
    """
    found: dict[str, list[int]] = {}
    for rank, statement in enumerate(statements):
        for problem in statement.problems:
            found.setdefault(problem, []).append(rank)
    everyone = len(statements)
    problems = [
        problem if len(ranks) == everyone else f"{problem} (says {_ranks(ranks)})"
        for problem, ranks in found.items()
    ]
    for fact, ranks_by_value in _values(statements).items():
        if len(ranks_by_value) > 1:
            fewest_first = sorted(ranks_by_value.items(), key=lambda item: len(item[1]))
            sides = ", ".join(
                f"{_ranks(ranks)} {'has' if len(ranks) == 1 else 'have'} {value}"
                for value, ranks in fewest_first
            )
            problems.append(f"{fact}: {sides}")
    return problems


def _values(statements: Sequence[RankFacts]) -> dict[str, dict[str, list[int]]]:
    """For each fact, each value of it and the ranks that have it."""
    values: dict[str, dict[str, list[int]]] = {}
    of_job = sorted({fact for statement in statements for fact in statement.job})
    of_modules: dict[str, set[str]] = {}
    for statement in statements:
        for name, facts in statement.modules.items():
            of_modules.setdefault(name, set()).update(facts)
    for rank, statement in enumerate(statements):
        if not statement.job and statement.problems:
            continue  # it could not say more
        # Of a module that a rank does not know it has no fields: "the modules" says so, once.
        topics = {_topic(fact) for fact in statement.job}
        said = {
            fact: statement.job.get(fact, "nothing")
            for fact in of_job
            if _topic(fact) in topics or _topic(fact) == fact
        }
        for name, facts in statement.modules.items():
            said |= {
                f"{name}: {fact}": facts.get(fact, "nothing") for fact in sorted(of_modules[name])
            }
        for fact, value in said.items():
            values.setdefault(fact, {}).setdefault(value, []).append(rank)
    return values


def _topic(fact: str) -> str:
    """The module that a fact is about, or the fact itself."""
    return fact.partition(": ")[0]


def _ranks(ranks: Sequence[int]) -> str:
    """A list of ranks, cut after eight."""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {listed(ranks, most=8)}"


def _digest(value: object) -> tuple[int, ...]:
    """128 bits of SHA-256 over canonical JSON, as two signed integers."""
    text = json.dumps(value, sort_keys=True).encode()
    return struct.unpack(">qq", hashlib.sha256(text).digest()[:16])
