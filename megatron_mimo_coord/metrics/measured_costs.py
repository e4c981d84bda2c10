"""From recorded steps to what each module costs, for ``mimo-plan --costs``."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median

from attrs import frozen

from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid
from megatron_mimo_coord.layout.toml_tables import table_text
from megatron_mimo_coord.metrics.step_summary import Step, data_parallel_imbalance
from megatron_mimo_coord.planning.costs import ModuleCosts
from megatron_mimo_coord.planning.timeline import BACKWARD, FORWARD, OPTIMIZER


@frozen(kw_only=True)
class RankBytes:
    """Bytes that a rank holds and sends.

    Args:
        dense_gradients: of each module's gradient buffers.
        expert_gradients: of the experts' buffers, divided by the replicas of an expert.
        sent_forward: activations that it sent in a step, for each module that it speaks for.
        shards_optimizer: modules with the distributed optimizer.
    """

    dense_gradients: Mapping[str, float]
    expert_gradients: Mapping[str, float]
    sent_forward: Mapping[str, float]
    shards_optimizer: Sequence[str]


def measured_costs(
    steps: Sequence[Step],
    ranks: Sequence[RankBytes],
    grids: Mapping[str, ModuleGrid],
    *,
    micro_batch_size: int,
    num_microbatches: int,
    sequence_length: int,
) -> dict[str, ModuleCosts]:
    """What each module costs, as if the whole of it ran on one rank.

    Seconds are medians over microbatches. Tensor- and context-parallel ranks count as if they
    shared the work without loss; with how many, and of which samples that was, is told.

    Args:
        steps: the spans of every rank in each step.
        ranks: bytes of every rank.
        grids: where each module lies.
        micro_batch_size: samples in a microbatch over all ranks.
        num_microbatches: microbatches in a step.
        sequence_length: tokens of a sample.
    """
    samples = micro_batch_size * num_microbatches
    costs = {}
    for name, grid in grids.items():
        here = [(rank, ranks[rank]) for rank in grid.ranks]
        firsts = [pair for pair in here if grid.coordinate(pair[0], "tp") == 0]
        replica = [pair for pair in here if _is_first_replica(grid, pair[0])]
        gradients = sum(each.dense_gradients[name] for _, each in replica)
        gradients += sum(each.expert_gradients[name] for _, each in here)
        sent: dict[bool, float] = defaultdict(float)
        for rank, each in firsts:
            forwards = _forwards(steps, rank, name) / num_microbatches  # those again run twice
            sent[grid.is_on_last_stage(rank)] += each.sent_forward.get(name, 0.0) / forwards
        stages = grid.dim("pp")
        is_frozen = not gradients
        sharded = any(name in each.shards_optimizer for _, each in here)
        backward = _seconds_per_sample(steps, grid, BACKWARD, micro_batch_size)
        costs[name] = ModuleCosts(
            forward_seconds_per_sample=_seconds_per_sample(steps, grid, FORWARD, micro_batch_size),
            # Of a frozen module only gradients of activations were seen.
            backward_seconds_per_sample=backward / _ACTIVATIONS if is_frozen else backward,
            output_bytes_per_sample=0.0 if name == LANGUAGE else sent[True] / samples,
            activation_bytes_per_sample=sent[False] / samples / max(stages - 1, 1),
            gradient_bytes=gradients,
            optimizer_seconds=_optimizer_seconds(steps, grid, sharded),
            measured_tensor_parallel_size=grid.dim("tp"),
            measured_context_parallel_size=grid.dim("cp"),
            measured_seq_length=sequence_length if name == LANGUAGE else None,
            measured_samples=micro_batch_size / grid.data_parallel_size,
            frozen=is_frozen,
            imbalance=data_parallel_imbalance(steps, grid),
        )
    return costs


_ACTIVATIONS = 0.5  # the default of ModuleCosts.activation_gradient_share


def to_toml(costs: Mapping[str, ModuleCosts]) -> str:
    """A file for ``mimo-plan --costs``: a table for each module with the fields of ``ModuleCosts``.

    Example:
        >>> costs = ModuleCosts(forward_seconds_per_sample=0.01, backward_seconds_per_sample=0.02)
        >>> print(to_toml({"vision": costs}))
        [vision]
        forward_seconds_per_sample = 0.01
        backward_seconds_per_sample = 0.02
        <BLANKLINE>
    """
    return "\n".join(table_text(name, module) for name, module in costs.items())


def _forwards(steps: Sequence[Step], rank: int, name: str) -> float:
    """How often a rank runs a module forward in a step; once, if it was not seen."""
    seen = sum(
        span.kind == FORWARD and span.module == name for step in steps for span in step[rank]
    )
    return max(1, seen / len(steps))


def _is_first_replica(grid: ModuleGrid, rank: int) -> bool:
    return grid.coordinate(rank, "dp") == 0 and grid.coordinate(rank, "cp") == 0


def _seconds_per_sample(
    steps: Sequence[Step], grid: ModuleGrid, kind: str, micro_batch_size: int
) -> float:
    """Seconds of all stages together for a sample, as if one rank did the work of TP and CP."""
    seconds: dict[int, dict[tuple[int, int | None], float]] = defaultdict(
        lambda: defaultdict(float)
    )
    for index, step in enumerate(steps):
        for rank in grid.ranks:
            for span in step[rank]:
                if span.module == grid.name and span.kind == kind:
                    seconds[span.stage][index, span.microbatch] += span.end - span.start
    return sum(median(stage.values()) for stage in seconds.values()) / micro_batch_size


def _optimizer_seconds(steps: Sequence[Step], grid: ModuleGrid, sharded: bool) -> float:
    """Seconds of an update of the whole module by one rank."""
    seconds = [
        sum(
            span.end - span.start
            for rank in grid.ranks
            if sharded or _is_first_replica(grid, rank)
            for span in step[rank]
            if span.module == grid.name and span.kind == OPTIMIZER
        )
        for step in steps
    ]
    return median(seconds)
