"""The layouts of a task that fit and that no other beats, ranked by the formula.

Each begins with a choice for the language model, a microbatch, and whether the encoders share its
ranks; the encoders' choices follow from it. Of encoders that go with one language model only those
are looked at that are faster than all on fewer GPUs (on shared ranks: with less memory).
"""

from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from math import inf
from operator import add

from attrs import evolve, frozen

from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.planning.choices import Choice, Task
from megatron_mimo_coord.planning.formula import pipeline_seconds, turn_seconds
from megatron_mimo_coord.planning.memory import stage_memory

ALIKE = 0.01
"""Steps that differ by a smaller part are equally long: no prediction is that exact."""


@frozen(eq=False)
class Candidate:
    """A layout that is not simulated yet.

    Args:
        seconds: of a step, by the formula.
        gpus: that it takes.
        choices: for the language model, and then for each encoder.
        samples: of a microbatch, over all ranks.
        colocated: whether all modules are on the same ranks.
    """

    seconds: float
    gpus: int
    choices: tuple[Choice, ...]
    samples: int
    colocated: bool


Options = list[tuple[float, float, Choice]]
"""Ways to lay out a module: (seconds, what it takes of what is limited, choice)."""

Combination = tuple[float, float, tuple[Choice, ...]]
"""The same for several modules."""


class Candidates:
    """All candidates of a task."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.choices = {name: task.choices(name) for name in task.sizes}
        self.held = cache(self.held)  # type: ignore[method-assign]
        self._sharing = cache(self._sharing)  # type: ignore[method-assign]

    def __iter__(self) -> Iterator[Candidate]:
        for root in self._roots():
            yield from self._with_encoders(root)

    def best(self, count: int, cost: Callable[[float, int], float]) -> list[Candidate]:
        """The candidates that seem to be best, the best first.

        Args:
            count: how many.
            cost: what (seconds, GPUs) cost; more of either costs no less.
        """

        def rank(candidate: Candidate) -> tuple[float, int]:
            return cost(candidate.seconds, candidate.gpus), candidate.gpus

        found: list[Candidate] = []
        for root in sorted(self._roots(), key=rank):
            if len(found) >= count and rank(root) > rank(found[count - 1]):
                break  # the encoders only add to it
            for candidate in self._with_encoders(root):
                insort(found, candidate, key=rank)
        return found[:count]

    def _roots(self) -> Iterator[Candidate]:
        """The language model alone, in each layout that fits, with each microbatch."""
        for samples in self.task.microbatches:
            number = self.task.num_microbatches(samples)
            for language in self._sharing(samples, LANGUAGE):
                if self.held(language, samples) > self.task.memory_bytes:
                    continue
                alone = pipeline_seconds(language, None, samples, number)
                yield Candidate(alone, language.gpus, (language,), samples, colocated=False)
                if self.task.encoders and language.stages == 1:
                    turn = turn_seconds(language, language, samples, number)
                    yield Candidate(turn, language.gpus, (language,), samples, colocated=True)

    def _with_encoders(self, root: Candidate) -> Iterator[Candidate]:
        if root.colocated:
            options, combine, most = self._on_the_same_ranks(root), add, self.task.memory_bytes
        else:
            options, combine, most = self._on_their_own(root), max, self.task.room.gpus
        least, nodes = 0.0, inf
        for seconds, taken, chosen in _combinations(options, combine, most):
            gpus = root.gpus if root.colocated else int(taken)
            allocated = self.task.room.allocated(gpus)
            if seconds > least * (1 + ALIKE) or allocated < nodes:
                yield evolve(root, seconds=seconds, gpus=gpus, choices=chosen)
                least, nodes = seconds, allocated

    def _on_their_own(self, root: Candidate) -> Iterator[Options]:
        """Ways to lay out each module on ranks of its own: they take GPUs."""
        (language,), samples = root.choices, root.samples
        number = self.task.num_microbatches(samples)
        yield [(root.seconds, root.gpus, language)]
        for name in self.task.encoders:
            fastest = inf
            found: Options = []
            for encoder in self._sharing(samples, name):
                if encoder.gpus > self.task.room.gpus - root.gpus:
                    break
                if not _is_bridgeable(encoder, language):
                    continue
                seconds = pipeline_seconds(language, encoder, samples, number)
                if seconds < fastest and self._fits(encoder, samples, language.stages):
                    fastest = seconds
                    found.append((seconds, encoder.gpus, encoder))
            yield found

    def _on_the_same_ranks(self, root: Candidate) -> Iterator[Options]:
        """Ways to lay out each module on the language model's ranks: they take memory."""
        (language,), samples = root.choices, root.samples
        number = self.task.num_microbatches(samples)
        yield [(root.seconds, self.held(language, samples), language)]
        for name in self.task.encoders:
            yield [
                (
                    turn_seconds(encoder, language, samples, number),
                    self.held(encoder, samples),
                    encoder,
                )
                for encoder in self._sharing(samples, name)
                if (encoder.gpus, encoder.stages) == (language.gpus, 1)
                and _is_bridgeable(encoder, language)
            ]

    def _sharing(self, samples: int, name: str) -> list[Choice]:
        """The choices of a module whose replicas can share a microbatch."""
        return [choice for choice in self.choices[name] if samples % choice.replicas == 0]

    def _fits(self, choice: Choice, samples: int, behind: int) -> bool:
        return self.held(choice, samples, behind) <= self.task.memory_bytes

    def held(self, choice: Choice, samples: int, behind: int = 0) -> float:
        """Bytes on the fullest rank of the first and the last stage.

        Args:
            choice: for a module.
            samples: of a microbatch, over all ranks.
            behind: stages of the language model that follow.
        """
        number = self.task.num_microbatches(samples)
        return max(
            stage_memory(
                choice.name,
                self.task.sizes,
                {choice.name: choice.parallelism},
                stage,
                micro_batch_size=samples,
                in_flight=min(number, behind + choice.stages - stage),
            ).total
            for stage in {0, choice.stages - 1}
        )


def _is_bridgeable(one: Choice, other: Choice) -> bool:
    """Whether one DP divides the other, so that a bridge can join two modules."""
    return max(one.replicas, other.replicas) % min(one.replicas, other.replicas) == 0


def _combinations(
    options: Iterable[Options], combine: Callable[[float, float], float], most: float
) -> Sequence[Combination]:
    """A choice for each module, the fastest first; each next one is slower and takes less."""
    found: list[Combination] = [(0.0, 0, ())]
    for of_module in options:
        combined = (
            (combine(seconds, more), taken + takes, (*chosen, choice))
            for seconds, taken, chosen in found
            for more, takes, choice in of_module
            if taken + takes <= most
        )
        least, kept = inf, []
        for combination in sorted(combined, key=lambda each: each[:2]):
            if combination[1] < least:
                least = combination[1]
                kept.append(combination)
        found = kept
    return found
