"""What a step of a layout takes at least, without simulating it.

The bounds hold for :func:`~megatron_mimo_coord.planning.simulation.simulate_step` because of what
one stage does alone and what each microbatch passes through. Let a stage take f forward and b
backward, let n be the microbatches and k the stages behind it.

- Serial: the first microbatch reaches the stage after all stages before it ran forward. Then it
  runs n forwards and n backwards and takes part in n - 1 messages with what is before it and n with
  what is behind. Then the stages before it run backward, one after the other.
- Fill: its first backward waits for one round trip through everything behind; before it run at most
  k + 1 forwards, so n backwards and n - k - 1 forwards are still to come.
- Drain: after its last forward comes one round trip through everything behind; before it run at
  least n - k - 1 backwards.

After its last backward each stage reduces its gradients. When all have reduced comes the slowest
optimizer. Modules on the same ranks take turns, so that theirs add up. Where a message's ranks are
not known, it takes the faster link.
"""

from collections.abc import Mapping
from functools import cached_property
from math import inf

from attrs import evolve, frozen

from megatron_mimo_coord.layout import LANGUAGE, ModuleParallelism, pack
from megatron_mimo_coord.planning.costs import Cluster, ModuleCosts
from megatron_mimo_coord.planning.durations import Durations, busiest


def fastest(cluster: Cluster) -> Cluster:
    """A cluster whose links inside nodes are as fast as any of its links."""
    return evolve(
        cluster,
        node_latency_seconds=min(cluster.node_latency_seconds, cluster.network_latency_seconds),
        node_bytes_per_second=max(cluster.node_bytes_per_second, cluster.network_bytes_per_second),
    )


@frozen(slots=False, eq=False)
class Choice:
    """One way to lay out one module, and what it costs.

    Args:
        name: of the module.
        parallelism: its sizes.
        costs: of the module in this layout.
        cluster: the links, as fast as they can be wherever the module lies.
        receives: whether the module's first stage gets something that wants a gradient.
        distributed_optimizer: whether replicas share the optimizer's work.
    """

    name: str
    parallelism: ModuleParallelism
    costs: ModuleCosts
    cluster: Cluster
    receives: bool
    distributed_optimizer: bool

    @cached_property
    def gpus(self) -> int:
        """Ranks."""
        return self.parallelism.size

    @cached_property
    def stages(self) -> int:
        """PP."""
        return self.parallelism.pipeline_model_parallel_size

    @cached_property
    def replicas(self) -> int:
        """DP."""
        return self.parallelism.data_parallel_size

    @cached_property
    def forwards(self) -> list[float]:
        """Seconds of a sample of the batch on each stage, forward."""
        stages = range(self.stages)
        return [self.costs.forward_seconds(self.parallelism, stage, 1) for stage in stages]

    @cached_property
    def backwards(self) -> list[float]:
        """Seconds of a sample of the batch on each stage, backward."""
        return [
            self.costs.backward_seconds(
                self.parallelism, stage, 1, receives=stage > 0 or self.receives
            )
            for stage in range(self.stages)
        ]

    def has_backward(self, stage: int) -> bool:
        """Whether a stage computes backward, and so gets gradients from the one behind it."""
        return not self.costs.frozen or stage > 0 or self.receives

    @cached_property
    def slowest(self) -> float:
        """Seconds of a sample of the batch on the slowest stage, both ways."""
        return max(map(sum, zip(self.forwards, self.backwards, strict=True)))

    @cached_property
    def reductions(self) -> list[float]:
        """Seconds of each stage's sum of gradients."""
        if self.costs.frozen:
            return [0.0] * self.stages
        tp = self.parallelism.tensor_model_parallel_size
        ranks = range(0, tp * self.replicas, tp)
        return [
            self.cluster.reduction_seconds(
                ranks, self.costs.gradient_bytes * self.costs.stage_share(self.stages, stage) / tp
            )
            for stage in range(self.stages)
        ]

    @cached_property
    def optimizer(self) -> float:
        """Seconds of the optimizer on the stage with the largest share."""
        if self.costs.frozen:
            return 0.0
        share = max(self.costs.stage_share(self.stages, stage) for stage in range(self.stages))
        seconds = self.costs.optimizer_seconds * share / self.parallelism.tensor_model_parallel_size
        return seconds / (self.replicas if self.distributed_optimizer else 1)

    def message(self, samples: int) -> float:
        """Seconds of a message between two stages, for a microbatch of so many samples."""
        length = self.gpus // self.stages
        message = self.costs.activation_bytes_per_sample * samples / self.replicas
        return self.cluster.message_seconds((0, length), message)


@frozen
class Load:
    """What microbatches of some size cost a choice, in seconds.

    Args:
        forwards: all stages, forward, with the messages between them.
        forward: the last stage, forward.
        backward: the last stage, backward.
        backwards: all stages, backward, with the messages between them.
        finish: from the gradient's arrival behind the last stage until all stages have run their
            last backward and reduced.
        serial: of a step, until the first stage has run its last backward.
        reduced: of a step, until all stages have reduced.
    """

    forwards: float
    forward: float
    backward: float
    backwards: float
    finish: float
    serial: float
    reduced: float

    @classmethod
    def of(cls, choice: Choice, samples: int, microbatches: int) -> "Load":
        """The load of a choice by microbatches of so many samples over all ranks."""
        between = choice.message(samples) if choice.stages > 1 else 0.0
        ahead = back = serial = reduced = forward = backward = 0.0
        reducing = (
            -inf
        )  # from a stage's last backward until those before it have reduced, less back
        last = choice.stages - 1
        for stage in range(choice.stages):
            forward = choice.forwards[stage] * samples
            backward = choice.backwards[stage] * samples
            busy = microbatches * (forward + backward)
            if stage > 0:
                busy += (microbatches - 1) * between
                back += between if choice.has_backward(stage - 1) else 0.0
            if stage < last and choice.has_backward(stage):
                busy += microbatches * between
            reducing = max(reducing, choice.reductions[stage] - back)
            serial = max(serial, ahead + busy + back)
            reduced = max(reduced, ahead + busy + back + reducing)
            ahead, back = ahead + forward, back + backward
            if stage < last:
                ahead += between
        return cls(ahead, forward, backward, back, back + reducing, serial, reduced)


def bridge_seconds(encoder: Choice, language: Choice, samples: int) -> tuple[float, float]:
    """A message over the bridge from an encoder at its fastest, forward and backward.

    Replicas that reach over a node, or one from its end on, have a message between nodes.
    """
    sizes = [choice.parallelism for choice in (encoder, language)]
    ends = [
        (each.data_parallel_size, each.tensor_model_parallel_size * each.context_parallel_size)
        for each in sizes
    ]
    part = encoder.costs.output_bytes_per_sample * samples / max(ends)[0]
    ahead, back = (busiest(*way) * part for way in (ends, ends[::-1]))
    cluster = encoder.cluster
    reach = 1 + max((replicas - 1) * ranks for replicas, ranks in ends)
    return cluster.message_seconds((0, reach), ahead), cluster.message_seconds((0, reach), back)


@frozen
class LeastDurations(Durations):
    """Durations that no place of the modules makes shorter.

    Args:
        chosen: a choice for each module.
    """

    chosen: Mapping[str, Choice]

    @classmethod
    def of(cls, chosen: Mapping[str, Choice], samples: int) -> "LeastDurations":
        """Those of some modules side by side, for microbatches of so many samples."""
        names = [*(name for name in chosen if name != LANGUAGE), LANGUAGE]
        modules = {name: chosen[name].parallelism for name in names}
        language = chosen[LANGUAGE]
        return cls(
            modules=modules,
            grids=pack(modules),
            costs={name: choice.costs for name, choice in chosen.items()},
            cluster=language.cluster,
            micro_batch_size=samples,
            distributed_optimizer=language.distributed_optimizer,
            chosen=chosen,
        )

    def between_stages(self, module: str, stage: int) -> float:
        """A message from a stage to the next of the same module, or back."""
        return self.chosen[module].message(self.micro_batch_size)

    def over_bridge(self, encoder: str, *, forward: bool) -> float:
        """The messages of a microbatch over a bridge, forward or back."""
        ways = bridge_seconds(self.chosen[encoder], self.chosen[LANGUAGE], self.micro_batch_size)
        return ways[0 if forward else 1]

    def reduction(self, module: str, stage: int) -> float:
        """The sum of a stage's gradients over its replicas."""
        return self.chosen[module].reductions[stage]


def disjoint_bound(
    chosen: Mapping[str, Choice], loads: Mapping[str, Load], samples: int, microbatches: int
) -> float:
    """What a step takes at least with modules on ranks of their own.

    Args:
        chosen: a choice for the language model and for some encoders; others only add to the step.
        loads: of each.
        samples: of a microbatch, over all ranks.
        microbatches: in a step.
    """
    language, its_load = chosen[LANGUAGE], loads[LANGUAGE]
    before = after = seconds = 0.0
    for name, encoder in chosen.items():
        if name == LANGUAGE:
            continue
        load = loads[name]
        ahead, back = bridge_seconds(encoder, language, samples)
        before = max(before, load.forwards + ahead)
        seconds = max(seconds, load.reduced)
        if not encoder.has_backward(encoder.stages - 1):
            continue
        after = max(after, back + load.finish)
        round_trip = ahead + its_load.forwards + its_load.backwards + back
        forward, backward = load.forward, load.backward
        rest = max(microbatches - 1 - language.stages, 0)
        fill = forward + (microbatches - 1) * backward + rest * forward
        drain = microbatches * forward + rest * backward
        waits = load.forwards - forward + round_trip + max(fill, drain) + load.finish
        seconds = max(seconds, waits)
    seconds = max(seconds, before + its_load.serial + after, before + its_load.reduced)
    return seconds + max(each.optimizer for each in chosen.values())


def colocated_bound(chosen: Mapping[str, Choice], samples: int, microbatches: int) -> float:
    """What a step takes at least with all modules on the same ranks: they take turns.

    Args:
        chosen: a choice for the language model and for some encoders; others only add to the step.
        samples: of a microbatch, over all ranks.
        microbatches: in a step.
    """
    language, seconds = chosen[LANGUAGE], 0.0
    for name, choice in chosen.items():
        seconds += microbatches * samples * choice.slowest
        seconds += choice.reductions[0] + choice.optimizer
        if name != LANGUAGE:
            passes = 2 if choice.has_backward(0) else 1
            seconds += passes * microbatches * exchange_seconds(choice, language, samples)
    return seconds


def exchange_seconds(encoder: Choice, language: Choice, samples: int) -> float:
    """What colocated modules with different DP pass on, at its fastest, forward or backward."""
    parts = max(encoder.replicas, language.replicas)
    peers = parts // min(encoder.replicas, language.replicas)
    message = encoder.costs.output_bytes_per_sample * samples / parts
    return (peers - 1) * encoder.cluster.message_seconds((0, encoder.gpus - 1), message)
