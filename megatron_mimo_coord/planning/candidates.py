"""The layouts of a request that fit and that no other beats, ranked by the formula.

Each begins with a choice for the language model, a microbatch, and whether and how the encoders
share its ranks; the encoders' choices follow from it. Of encoders that go with one language model
only those are looked at that are faster than all on fewer GPUs (on shared ranks: with less memory).
"""

from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from math import inf
from operator import add

from attrs import evolve, frozen

from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.planning.choices import Choice, Request, choices
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
        shared: whether encoders are on ranks of the language model.
        encoder_microbatches: as in :func:`simulate_step`.
    """

    seconds: float
    gpus: int
    choices: tuple[Choice, ...]
    samples: int
    shared: bool
    encoder_microbatches: int | None = None


class Candidates:
    """All candidates of a request.

    Args:
        request: what a layout is sought for.

    Attributes:
        memory_bytes, gpus: of a GPU, and most that a layout takes, as the request says; other
            memory or fewer GPUs may be set before all are listed again.
    """

    def __init__(self, request: Request) -> None:
        self.request, self.gpus, self.memory_bytes = request, request.gpus, request.memory_bytes
        self.choices = {name: choices(request, name) for name in request.sizes}
        self.held = cache(self.held)  # type: ignore[method-assign]
        self._fitting = cache(self._fitting)  # type: ignore[method-assign]
        self._options = cache(self._options)  # type: ignore[method-assign]

    def __iter__(self) -> Iterator[Candidate]:
        for root in self._roots():
            yield from self._with_encoders(root)

    def best_first(self, cost: Callable[[float, int], float]) -> Iterator[Candidate]:
        """The candidates, those that seem to be better before others.

        Args:
            cost: what (seconds, GPUs) cost; more of either costs no less.
        """

        def rank(candidate: Candidate) -> tuple[float, int]:
            return cost(candidate.seconds, candidate.gpus), candidate.gpus

        found: list[Candidate] = []
        for root in sorted(self._roots(), key=rank):
            while found and rank(found[0]) <= rank(root):
                yield found.pop(0)  # encoders, and what is recomputed, only add to a root
            for candidate in self._with_encoders(root):
                insort(found, candidate, key=rank)
        yield from found

    def _fitting(self, name: str, memory_bytes: float, gpus: int) -> list[Choice]:
        """Choices that fit alone, with the smallest microbatch: what a layout adds takes more."""
        return [
            choice
            for choice in self.choices[name]
            if choice.gpus <= gpus
            and any(self.held(way, choice.replicas) <= memory_bytes for way in choice.ways[::-1])
        ]

    def _roots(self) -> Iterator[Candidate]:
        """The language model in each layout, with each microbatch; perhaps it fits.

        The step is at least as long: all GPUs that encoders may be on share their work.
        """
        batch, limits = self.request.global_batch_size, (self.memory_bytes, self.gpus)
        work = batch * sum(
            min(
                (sum(each.work) * each.gpus / each.stages for each in self.choices[name]),
                default=0.0,
            )
            for name in self.request.encoders
        )
        for samples in self.request.microbatches:
            for language in self._fitting(LANGUAGE, *limits):
                if samples % language.replicas:
                    continue
                alone = pipeline_seconds(language, None, samples, batch // samples)
                gpus, others = language.gpus, self.gpus - language.gpus
                if not work or others:
                    seconds = max(alone, work / others) if work else alone
                    yield Candidate(seconds, gpus, (language,), samples, shared=False)
                if self.request.encoders:
                    yield Candidate(alone + work / gpus, gpus, (language,), samples, shared=True)

    def _with_encoders(self, root: Candidate) -> Iterator[Candidate]:
        """With as little recomputation as fits."""
        (base,) = root.choices
        runs_first = root.shared and base.stages > 1
        for kept in [None, 0] if runs_first else [None]:
            of_kept = evolve(root, encoder_microbatches=kept)
            found = (self._combinations(of_kept, language) for language in base.ways)
            yield from self._candidates(of_kept, next(filter(None, found), []))

    def _combinations(self, root: Candidate, language: Choice) -> list[Combination]:
        """Choices for all encoders that fit beside one for the language model."""
        (base,) = root.choices
        number, kept = self.request.global_batch_size // root.samples, root.encoder_microbatches
        waiting = number if root.shared and base.stages > 1 else 0
        held = self.held(language, root.samples, waiting=waiting)
        if held > self.memory_bytes:
            return []
        seconds = pipeline_seconds(language, None, root.samples, number)
        found: list[Combination] = [(seconds, held if root.shared else root.gpus, (language,))]
        combine: Callable[[float, float], float] = add if root.shared else max
        most = self.memory_bytes if root.shared else self.gpus
        for name in self.request.encoders:
            beside = base if root.shared else language  # whatever that recomputes
            how = root.samples, root.shared, kept, self.memory_bytes, self.gpus
            options = self._options(name, beside, *how)
            found = _front(
                (combine(seconds, more), taken + takes, chosen + choice)
                for seconds, taken, chosen in found
                for more, takes, choice in options
                if taken + takes <= most
            )
        return found

    def _candidates(self, root: Candidate, found: list[Combination]) -> Iterator[Candidate]:
        """Combinations that are slower on fewer nodes."""
        least, rented = 0.0, inf
        for seconds, taken, chosen in found:
            gpus = root.gpus if root.shared else int(taken)
            allocated = self.request.allocated(gpus)
            if seconds > least * (1 + ALIKE) or allocated < rented:
                yield evolve(root, seconds=seconds, gpus=gpus, choices=chosen)
                least, rented = seconds, allocated

    def _options(
        self,
        name: str,
        language: Choice,
        samples: int,
        shared: bool,
        kept: int | None,
        memory_bytes: float,
        gpus: int,
    ) -> list[Combination]:
        """Ways to lay out an encoder: on the language model's ranks, or on GPUs of its own."""
        found: list[Combination] = []
        number, repeated = self.request.global_batch_size // samples, kept is not None
        held = 1 if repeated or language.stages == 1 else number
        of_stage, fastest = language.gpus // language.stages, inf
        for encoder in self._fitting(name, memory_bytes, gpus):
            few, many = sorted((encoder.replicas, language.replicas))
            if samples % encoder.replicas or many % few:
                continue
            if shared and encoder.gpus <= language.gpus:
                if encoder.stages == 1 and encoder.gpus % of_stage == 0:
                    for way in encoder.ways:
                        seconds = turn_seconds(way, language, samples, number, repeated)
                        found.append((seconds, self.held(way, samples, held - 1), (way,)))
            elif not shared and encoder.gpus + language.gpus <= gpus:
                if pipeline_seconds(language, encoder, samples, number) >= fastest:
                    continue  # those with fewer GPUs are as fast
                for way in encoder.ways:
                    if self.held(way, samples, language.stages) <= memory_bytes:
                        fastest = min(fastest, pipeline_seconds(language, way, samples, number))
                        found.append((fastest, way.gpus, (way,)))
                        break
        return _front(found)

    def held(self, choice: Choice, samples: int, behind: int = 0, waiting: int = 0) -> float:
        """Bytes on the fullest rank: of the first, the second or the last stage.

        Args:
            choice: for a module.
            samples: of a microbatch, over all ranks.
            behind: stages of the language model that follow, or microbatches that are held besides.
            waiting: microbatches whose images' tokens wait on the first stage.
        """
        number = self.request.global_batch_size // samples
        return max(
            stage_memory(
                choice.name,
                {**self.request.sizes, choice.name: choice.sizes},
                choice.parallelism,
                stage,
                micro_batch_size=samples,
                in_flight=min(number, behind + choice.stages - stage),
                waiting=waiting or None,
            ).total
            for stage in {0, min(1, choice.stages - 1), choice.stages - 1}
        )


def _front(combinations: Iterable[Combination]) -> list[Combination]:
    """The fastest first; each next is slower and takes less."""
    least, kept = inf, []
    for combination in sorted(combinations, key=lambda each: each[:2]):
        if combination[1] < least:
            least = combination[1]
            kept.append(combination)
    return kept
