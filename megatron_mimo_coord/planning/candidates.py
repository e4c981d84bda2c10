"""The layouts of a request that fit and that no other beats, ranked by the formula.

Each begins with a choice for the language model, a microbatch, and whether the encoders share its
ranks; the encoders' choices follow from it. Of encoders that go with one language model only those
are looked at that are faster than all on fewer GPUs (on shared ranks: with less memory).
"""

from bisect import insort
from collections.abc import Callable, Iterator
from functools import cache
from math import inf
from operator import add

from attrs import evolve, frozen

from megatron_mimo_coord.layout import LANGUAGE, ModuleParallelism
from megatron_mimo_coord.planning.choices import Choice, Request, choices, side_by_side
from megatron_mimo_coord.planning.formula import pipeline_seconds, turn_seconds
from megatron_mimo_coord.planning.memory import stage_memory

ALIKE = 0.01
"""Steps that differ by a smaller part are equally long: no prediction is that exact."""

Combination = tuple[float, float, tuple[Choice, ...]]
"""Choices for some modules: (seconds, GPUs or bytes that they take, choices)."""


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

    @property
    def modules(self) -> dict[str, ModuleParallelism] | None:
        """Each module with its first rank; None if no order keeps TP groups inside a node."""
        language, *encoders = self.choices
        modules = {choice.name: choice.parallelism for choice in (*encoders, language)}
        if self.colocated:
            return {name: evolve(module, rank_offset=0) for name, module in modules.items()}
        return side_by_side(modules)


class Candidates:
    """All candidates of a request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.choices = {name: choices(request, name) for name in request.sizes}
        self.held = cache(self.held)  # type: ignore[method-assign]

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
        for samples in self.request.microbatches:
            number = self.request.global_batch_size // samples
            for language in self.choices[LANGUAGE]:
                if not self._fits(language, samples):
                    continue
                alone = pipeline_seconds(language, None, samples, number)
                yield Candidate(alone, language.gpus, (language,), samples, colocated=False)
                if self.request.encoders and language.stages == 1:
                    turn = turn_seconds(language, language, samples, number)
                    yield Candidate(turn, language.gpus, (language,), samples, colocated=True)

    def _with_encoders(self, root: Candidate) -> Iterator[Candidate]:
        (language,) = root.choices
        taken = self.held(language, root.samples) if root.colocated else root.gpus
        found: list[Combination] = [(root.seconds, taken, root.choices)]
        for name in self.request.encoders:
            found = self._combinations(root, found, list(self._options(root, name)))
        least, rented = 0.0, inf
        for seconds, taken, chosen in found:
            gpus = root.gpus if root.colocated else int(taken)
            allocated = self.request.allocated(gpus)
            if seconds > least * (1 + ALIKE) or allocated < rented:
                yield evolve(root, seconds=seconds, gpus=gpus, choices=chosen)
                least, rented = seconds, allocated

    def _options(self, root: Candidate, name: str) -> Iterator[Combination]:
        """Ways to lay out an encoder: on the language model's ranks, or on GPUs of its own."""
        (language,), samples = root.choices, root.samples
        number = self.request.global_batch_size // samples
        for encoder in self.choices[name]:
            replicas = encoder.replicas, language.replicas
            if max(replicas) % min(replicas) or samples % encoder.replicas:
                continue
            if not root.colocated and self._fits(encoder, samples, language.stages):
                seconds = pipeline_seconds(language, encoder, samples, number)
                yield seconds, encoder.gpus, (encoder,)
            elif root.colocated and (encoder.gpus, encoder.stages) == (language.gpus, 1):
                seconds = turn_seconds(encoder, language, samples, number)
                yield seconds, self.held(encoder, samples), (encoder,)

    def _combinations(
        self, root: Candidate, found: list[Combination], options: list[Combination]
    ) -> list[Combination]:
        """Choices for one more module, the fastest first; each next is slower and takes less."""
        combine: Callable[[float, float], float] = add if root.colocated else max
        most = self.request.memory_bytes if root.colocated else self.request.gpus
        combined = (
            (combine(seconds, more), taken + takes, chosen + choice)
            for seconds, taken, chosen in found
            for more, takes, choice in options
            if taken + takes <= most
        )
        least, kept = inf, []
        for combination in sorted(combined, key=lambda each: each[:2]):
            if combination[1] < least:
                least = combination[1]
                kept.append(combination)
        return kept

    def _fits(self, choice: Choice, samples: int, behind: int = 0) -> bool:
        """Whether a microbatch can be dealt out, and held."""
        return samples % choice.replicas == 0 and (
            self.held(choice, samples, behind) <= self.request.memory_bytes
        )

    def held(self, choice: Choice, samples: int, behind: int = 0) -> float:
        """Bytes on the fullest rank of the first and the last stage.

        Args:
            choice: for a module.
            samples: of a microbatch, over all ranks.
            behind: stages of the language model that follow.
        """
        number = self.request.global_batch_size // samples
        return max(
            stage_memory(
                choice.name,
                self.request.sizes,
                {choice.name: choice.parallelism},
                stage,
                micro_batch_size=samples,
                in_flight=min(number, behind + choice.stages - stage),
            ).total
            for stage in {0, choice.stages - 1}
        )
