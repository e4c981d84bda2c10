"""All ways to lay out one module, what each costs, and where modules lie side by side."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import permutations

from attrs import evolve, frozen

from megatron_mimo_coord.layout import LANGUAGE, ModuleParallelism
from megatron_mimo_coord.planning.costs import Cluster, ModuleCosts
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.size_problems import sharding_problems


@frozen
class Room:
    """The GPUs and the batch that a layout is sought for.

    Args:
        gpus: most ranks of a layout.
        gpus_per_node: ranks that share a node.
        global_batch_size: samples in a step.
    """

    gpus: int
    gpus_per_node: int
    global_batch_size: int

    def allocated(self, ranks: int) -> int:
        """GPUs that must be rented for so many ranks: whole nodes, as far as there are."""
        nodes = -(-ranks // self.gpus_per_node)
        return min(self.gpus, nodes * self.gpus_per_node)


@frozen(kw_only=True)
class Task:
    """What a layout is sought for.

    Args:
        sizes: of each module.
        room: the GPUs and the batch.
        memory_bytes: of a GPU, for one rank.
        costs: what a module costs in a layout.
        cluster: the links between ranks.
        micro_batch_size: the only microbatch to consider, over all ranks; None for every one.
    """

    sizes: Mapping[str, ModuleSizes]
    room: Room
    memory_bytes: float
    costs: Callable[[str, ModuleParallelism], ModuleCosts]
    cluster: Cluster
    micro_batch_size: int | None = None

    @property
    def encoders(self) -> list[str]:
        """All modules but the language model."""
        return [name for name in self.sizes if name != LANGUAGE]

    @property
    def microbatches(self) -> list[int]:
        """Samples that a microbatch over all ranks may have."""
        if self.micro_batch_size is not None:
            return [self.micro_batch_size]
        return divisors(self.room.global_batch_size)

    def num_microbatches(self, samples: int) -> int:
        """Microbatches of so many samples in a step."""
        return self.room.global_batch_size // samples

    @property
    def distributed_optimizer(self) -> bool:
        """Whether replicas share the optimizer's work, as far as all modules say so."""
        return all(sizes.use_distributed_optimizer for sizes in self.sizes.values())

    def choices(self, name: str) -> "list[Choice]":
        """Every way to lay out a module whose costs are known, those on fewer GPUs first."""
        found = []
        for parallelism in choices(name, self.sizes[name], self.room):
            costs = self.costs(name, parallelism)
            # Costs of unequal stages are of one number of stages.
            pp, layers = parallelism.pipeline_model_parallel_size, costs.layers_per_stage
            if layers is None or len(layers) == pp:
                found.append(
                    Choice(name, parallelism, costs, self.cluster, self.distributed_optimizer)
                )
        return sorted(found, key=lambda choice: choice.gpus)


@frozen(slots=False, eq=False)
class Choice:
    """One way to lay out one module, and what it costs.

    Args:
        name: of the module.
        parallelism: its sizes.
        costs: of the module in this layout.
        cluster: the links between ranks.
        distributed_optimizer: whether replicas share the optimizer's work.
    """

    name: str
    parallelism: ModuleParallelism
    costs: ModuleCosts
    cluster: Cluster
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
    def receivers(self) -> int:
        """Ranks of a replica's stage, each of which gets its own copy of a message."""
        return self.parallelism.tensor_model_parallel_size * self.parallelism.context_parallel_size

    @cached_property
    def work(self) -> list[float]:
        """Seconds of a sample of the batch on each stage, forward and back."""
        module, costs = self.parallelism, self.costs
        return [
            costs.forward_seconds(module, stage, 1)
            + costs.backward_seconds(module, stage, 1, receives=stage > 0 or self.name == LANGUAGE)
            for stage in range(self.stages)
        ]

    @cached_property
    def whole(self) -> float:
        """Seconds of a sample on all stages, one after the other."""
        return sum(self.work)

    @cached_property
    def slowest(self) -> float:
        """Seconds of a sample on the slowest stage."""
        return max(self.work)

    @cached_property
    def has_backward(self) -> bool:
        """Whether the last stage sends gradients back to whom it has its input from."""
        return not self.costs.frozen or self.stages > 1

    @cached_property
    def reduction(self) -> float:
        """Seconds of the first stage's sum of gradients."""
        if self.costs.frozen:
            return 0.0
        tp = self.parallelism.tensor_model_parallel_size
        gradients = self.costs.gradient_bytes * self.costs.stage_share(self.stages, 0) / tp
        return self.cluster.reduction_seconds(range(0, tp * self.replicas, tp), gradients)

    @cached_property
    def optimizer(self) -> float:
        """Seconds of the optimizer on the stage with the largest share."""
        if self.costs.frozen:
            return 0.0
        share = max(self.costs.stage_share(self.stages, stage) for stage in range(self.stages))
        seconds = self.costs.optimizer_seconds * share / self.parallelism.tensor_model_parallel_size
        return seconds / (self.replicas if self.distributed_optimizer else 1)

    def hop(self, samples: int) -> float:
        """Seconds of a message between two stages, for a microbatch of so many samples."""
        if self.stages == 1:
            return 0.0
        message = self.costs.activation_bytes_per_sample * samples / self.replicas
        return self.cluster.message_seconds((0, self.gpus // self.stages), message)


def divisors(number: int) -> list[int]:
    """All divisors, the smaller ones first.

    Example:
        >>> divisors(12)
        [1, 2, 3, 4, 6, 12]
    """
    small = [each for each in range(1, int(number**0.5) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})


def choices(name: str, sizes: ModuleSizes, room: Room) -> Iterator[ModuleParallelism]:
    """Every way to lay out a module: sizes that divide, tensor parallelism inside a node.

    TP divides the GPUs of a node, PP the layers, DP the global batch. CP is 1, as bridges need.
    Experts are whole or shared like the rest of a layer: expert TP is 1 or TP.

    Example:
        >>> sizes = ModuleSizes(num_layers=2, hidden_size=64, num_attention_heads=4)
        >>> found = choices("vision", sizes, Room(4, gpus_per_node=2, global_batch_size=3))
        >>> [choice.shape for choice in found]
        [(1, 1, 1, 1), (1, 1, 3, 1), (1, 1, 1, 2), (2, 1, 1, 1), (2, 1, 1, 2)]
    """
    for tp in divisors(room.gpus_per_node):
        for pp in divisors(sizes.num_layers):
            alone = ModuleParallelism(
                tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp
            )
            if tp * pp > room.gpus or sharding_problems(name, sizes, alone):
                continue
            for dp in divisors(room.global_batch_size):
                if tp * pp * dp > room.gpus:
                    break
                for expert_tp, ep in _expert_sizes(sizes, tp, dp):
                    yield evolve(
                        alone,
                        data_parallel_size=dp,
                        expert_model_parallel_size=ep,
                        expert_tensor_parallel_size=expert_tp,
                    )


def _expert_sizes(sizes: ModuleSizes, tp: int, dp: int) -> Iterator[tuple[int, int]]:
    """Pairs of (expert TP, EP) that divide the experts and the ranks of a stage."""
    if sizes.num_moe_experts is None:
        yield tp, 1
        return
    for expert_tp in sorted({1, tp}):
        for ep in divisors(sizes.num_moe_experts):
            if sizes.moe_ffn_hidden_size % expert_tp == 0 and tp * dp % (expert_tp * ep) == 0:
                yield expert_tp, ep


def side_by_side(
    modules: Mapping[str, ModuleParallelism], gpus_per_node: int
) -> dict[str, ModuleParallelism] | None:
    """Modules on ranks of their own, every tensor-parallel group inside a node; None if none is so.

    Tried are all orders, first the one with larger modules before smaller ones: they then begin
    where nodes do.

    Example:
        >>> vision = ModuleParallelism(data_parallel_size=2)
        >>> language = ModuleParallelism(tensor_model_parallel_size=4)
        >>> found = side_by_side({"vision": vision, "language": language}, 8)
        >>> [module.rank_offset for module in found.values()]
        [4, 0]
    """
    for order in permutations(sorted(modules, key=lambda name: -modules[name].size)):
        offset, placed = 0, {}
        for name in order:
            if offset % modules[name].tensor_model_parallel_size:
                break
            placed[name] = evolve(modules[name], rank_offset=offset)
            offset += modules[name].size
        else:
            return {name: placed[name] for name in modules}
    return None
