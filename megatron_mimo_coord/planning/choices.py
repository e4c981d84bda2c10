"""All ways to lay out one module, and where modules lie side by side."""

from collections.abc import Iterator, Mapping
from itertools import permutations

from attrs import evolve, frozen

from megatron_mimo_coord.layout import ModuleParallelism
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


def divisors(number: int) -> list[int]:
    """All divisors, the smaller ones first.

    Example:
        >>> divisors(12)
        [1, 2, 3, 4, 6, 12]
    """
    small = [each for each in range(1, int(number**0.5) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})


def is_bridgeable(left: ModuleParallelism, right: ModuleParallelism) -> bool:
    """Whether one DP divides the other, so that a bridge can join two modules."""
    sizes = left.data_parallel_size, right.data_parallel_size
    return max(sizes) % min(sizes) == 0


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
                for expert_tp, ep in _expert_sizes(name, sizes, tp, dp):
                    yield evolve(
                        alone,
                        data_parallel_size=dp,
                        expert_model_parallel_size=ep,
                        expert_tensor_parallel_size=expert_tp,
                    )


def _expert_sizes(name: str, sizes: ModuleSizes, tp: int, dp: int) -> Iterator[tuple[int, int]]:
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

    Tried are all orders, that of the mapping first.

    Example:
        >>> vision = ModuleParallelism(data_parallel_size=2)
        >>> language = ModuleParallelism(tensor_model_parallel_size=4)
        >>> found = side_by_side({"vision": vision, "language": language}, 8)
        >>> [module.rank_offset for module in found.values()]
        [4, 0]
    """
    for order in permutations(modules):
        offset, placed = 0, {}
        for name in order:
            if offset % modules[name].tensor_model_parallel_size:
                break
            placed[name] = evolve(modules[name], rank_offset=offset)
            offset += modules[name].size
        else:
            return {name: placed[name] for name in modules}
    return None
