"""What a step of a layout takes at least, without simulating it.

The bounds hold for :func:`~megatron_mimo_coord.planning.simulation.simulate_step` because of what
one stage does alone and what each microbatch passes through. Let a stage take f forward and b
backward, let n be the microbatches and k the stages behind it.

- Serial: the first microbatch reaches the stage after all stages before it ran forward. Then it
  runs n forwards and n backwards and takes part in n - 1 messages with what is before it and n with
  what is behind. Then all stages before it run backward, while it reduces its gradients.
- Fill: its first backward waits for one round trip through everything behind; before it run at most
  k + 1 forwards, so n backwards and n - k - 1 forwards are still to come.
- Drain: after its last forward comes one round trip through everything behind; before it run at
  least n - k - 1 backwards.

After fill and drain, too, the stages before it run backward while it reduces. When all have reduced
comes the slowest optimizer. Modules on the same ranks take turns, so that theirs add up. Where a
message's ranks are not known, it takes the faster link.
"""

from collections.abc import Mapping
from functools import cached_property

from attrs import evolve, frozen

from megatron_mimo_coord.layout import LANGUAGE, ModuleParallelism
from megatron_mimo_coord.planning.costs import Cluster, ModuleCosts


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
        backwards: all stages, backward, with the messages between them.
        forward: the last stage, forward.
        backward: the last stage, backward.
        serial: of a step, all forwards and backwards of the busiest stage and what one microbatch
            passes before and after.
        reduced: the same until that stage has reduced its gradients.
        reduction: of the last stage.
    """

    forwards: float
    backwards: float
    forward: float
    backward: float
    serial: float
    reduced: float
    reduction: float

    @classmethod
    def of(cls, choice: Choice, samples: int, microbatches: int) -> "Load":
        """The load of a choice by microbatches of so many samples over all ranks."""
        between = choice.message(samples) if choice.stages > 1 else 0.0
        ahead = back = serial = reduced = forward = backward = 0.0
        last = choice.stages - 1
        for stage in range(choice.stages):
            forward = choice.forwards[stage] * samples
            backward = choice.backwards[stage] * samples
            busy = microbatches * (forward + backward)
            if stage > 0:
                busy += (microbatches - 1) * between
            if stage < last:
                busy += microbatches * between
            serial = max(serial, ahead + busy + back)
            sent = between if stage > 0 else 0.0
            reduced = max(reduced, ahead + busy + sent + choice.reductions[stage])
            ahead, back = ahead + forward, back + backward
            if stage < last:
                ahead, back = ahead + between, back + between
        return cls(ahead, back, forward, backward, serial, reduced, choice.reductions[last])


def bridge_seconds(encoder: Choice, language: Choice, samples: int) -> tuple[float, float]:
    """A message over the bridge from an encoder at its fastest, forward and backward."""
    cluster = encoder.cluster
    replicas = encoder.replicas, language.replicas
    parts, peers = max(replicas), max(replicas) // min(replicas)
    message = encoder.costs.output_bytes_per_sample * samples / parts
    seconds = peers * cluster.message_seconds((0, 0), message)
    ways = []
    for receiver in (language, encoder):
        ranks = receiver.parallelism.tensor_model_parallel_size
        handed_on = message * parts / receiver.replicas
        inside = cluster.message_seconds((0, 0), handed_on) if ranks > 1 else 0.0
        ways.append(seconds + inside)
    return ways[0], ways[1]


def disjoint_bound(
    chosen: Mapping[str, Choice], loads: Mapping[str, Load], samples: int, microbatches: int
) -> float:
    """What a step takes at least with modules on ranks of their own."""
    language, its_load = chosen[LANGUAGE], loads[LANGUAGE]
    before = after = seconds = 0.0
    for name, encoder in chosen.items():
        if name == LANGUAGE:
            continue
        load = loads[name]
        ahead, back = bridge_seconds(encoder, language, samples)
        before = max(before, load.forwards + ahead)
        after = max(after, load.backwards + back)
        round_trip = ahead + its_load.forwards + its_load.backwards + back
        forward, backward = load.forward, load.backward
        rest = max(microbatches - 1 - language.stages, 0)
        fill = forward + microbatches * backward + rest * forward
        drain = microbatches * forward + backward + rest * backward
        done = load.forwards - forward + round_trip + max(fill, drain)
        last = max(load.backwards - backward, load.reduction)
        seconds = max(seconds, load.serial, load.reduced, done + last)
    seconds = max(seconds, before + its_load.serial + after, before + its_load.reduced)
    return seconds + max(each.optimizer for each in chosen.values())


def colocated_bound(chosen: Mapping[str, Choice], samples: int, microbatches: int) -> float:
    """What a step takes at least with all modules on the same ranks: they take turns."""
    return sum(
        microbatches * samples * choice.slowest + choice.reductions[0] + choice.optimizer
        for choice in chosen.values()
    )
