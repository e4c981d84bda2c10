"""How long the stages of one layout compute and their messages take: costs, dealt out to ranks."""

from collections.abc import Collection, Mapping
from functools import cache
from math import ceil

from attrs import frozen

from megatron_mimo_coord.layout import LANGUAGE, MAX_RANKS, ModuleGrid, ModuleParallelism, sharing
from megatron_mimo_coord.planning.costs import Cluster, ModuleCosts


@frozen
class Durations:
    """Seconds of whatever a stage does, in one layout; all replicas of a stage take the same.

    Args:
        modules: parallel sizes of each module.
        grids: where each module lies, with dims in the order of ``DIM_NAMES``.
        costs: what each module costs.
        cluster: how fast messages are.
        micro_batch_size: samples in a microbatch over all ranks.
        distributed_optimizer: whether data-parallel ranks share the optimizer's work.
    """

    modules: Mapping[str, ModuleParallelism]
    grids: Mapping[str, ModuleGrid]
    costs: Mapping[str, ModuleCosts]
    cluster: Cluster
    micro_batch_size: int
    distributed_optimizer: bool

    def forward(self, module: str, stage: int, together: int = 1) -> float:
        """Computing of a microbatch forward; ranks wait for each other after some ``together``."""
        costs, sizes = self.costs[module], self.modules[module]
        return costs.forward_seconds(sizes, stage, self.micro_batch_size, together)

    def backward(self, module: str, stage: int, together: int = 1) -> float:
        """Computing of a microbatch, backward."""
        return self.costs[module].backward_seconds(
            self.modules[module],
            stage,
            self.micro_batch_size,
            together,
            receives=self._receives(module, stage),
        )

    def has_backward(self, module: str, stage: int) -> bool:
        """Whether a stage computes backward: a weight of it learns, or an input of it wants to."""
        return not self.costs[module].frozen or self._receives(module, stage)

    def _receives(self, module: str, stage: int) -> bool:
        """Whether an input of a stage wants a gradient."""
        if stage > 0 or module != LANGUAGE:
            return stage > 0
        if shared := sharing(self.grids):
            return any(not self.costs[name].frozen for name in shared)
        return len(self.grids) > 1

    def between_stages(self, module: str, stage: int) -> float:
        """A message from a stage to the next of the same module, or back."""
        grid = self.grids[module]
        message = self.costs[module].activation_bytes_per_sample
        message *= self.micro_batch_size / grid.replicas
        length = grid.size // grid.dim("pp")
        first = grid.rank_offset + stage * length
        # Pairs of ranks repeat their place in the nodes: a node's worth of them is enough.
        senders = range(first, first + min(length, self.cluster.ranks_per_node or 1))
        receivers = range(senders.start + length, senders.stop + length)
        return self._slowest(senders, receivers, message)

    def over_bridge(self, encoder: str, *, forward: bool) -> float:
        """The messages of a microbatch over a bridge, forward or back, all under way at once.

        Each of the receiver's TP x CP ranks gets its own copy of what concerns its samples. The
        end that sends or receives most takes longest.
        """
        source, target = self.grids[encoder], self.grids[LANGUAGE]
        ends = [self.modules[encoder], self.modules[LANGUAGE]]
        parts = max(source.data_parallel_size, target.data_parallel_size)
        message = self.costs[encoder].output_bytes_per_sample * self.micro_batch_size / parts
        messages = busiest(*(ends if forward else reversed(ends))) * message
        senders, receivers = source.replica_starts(source.dim("pp") - 1), target.replica_starts(0)
        return self._slowest(senders, receivers, messages)

    def _slowest(self, senders: range, receivers: range, message_bytes: float) -> float:
        """Messages between the ranks of a link, all under way at once."""
        pairs = pairs_of_ranks(senders, receivers, self.cluster.ranks_per_node or MAX_RANKS)
        return max(self.cluster.message_seconds(pair, message_bytes) for pair in pairs)

    def exchange(self, encoder: str) -> float:
        """Tokens of an encoder, or their gradients, gathered where colocated modules differ in DP.

        Forward under fan-in, backward under fan-out; the other way each rank cuts out its part.
        """
        sizes = self.grids[encoder].data_parallel_size, self.grids[LANGUAGE].data_parallel_size
        parts, peers = max(sizes), max(sizes) // min(sizes)
        if peers == 1:
            return 0.0
        message = self.costs[encoder].output_bytes_per_sample * self.micro_batch_size / parts
        ranks = self.grids[encoder].ranks
        return (peers - 1) * self.cluster.message_seconds((ranks[0], ranks[-1]), message)

    def reduction(self, module: str, stage: int) -> float:
        """The sum of a stage's gradients over its replicas."""
        sizes, first = self.modules[module], self.grids[module].rank_at(pp=stage)
        return self.costs[module].reduction_seconds(sizes, stage, self.cluster, first)

    def optimizer(self, module: str, stage: int) -> float:
        """The optimizer's update of a stage."""
        costs, sizes = self.costs[module], self.modules[module]
        return costs.update_seconds(sizes, stage, self.distributed_optimizer)


@cache
def pairs_of_ranks(senders: range, receivers: range, per_node: int) -> Collection[tuple[int, int]]:
    """Two ranks of a link in one node and two in different nodes, as far as there are.

    Example:
        >>> pairs_of_ranks(range(4), range(6, 10, 2), per_node=8)
        dict_values([(1, 6), (3, 8)])
    """
    parts = max(len(senders), len(receivers))
    every = (
        (senders[part * len(senders) // parts], receivers[part * len(receivers) // parts])
        for part in range(parts)
    )
    return {left // per_node == right // per_node: (left, right) for left, right in every}.values()


def busiest(sender: ModuleParallelism, receiver: ModuleParallelism) -> int:
    """Messages of the rank of a bridge that sends or receives most.

    Example:
        >>> def module(dp, tp=1):
        ...     return ModuleParallelism(data_parallel_size=dp, tensor_model_parallel_size=tp)
        >>> busiest(module(4), module(2)), busiest(module(4), module(2, tp=8))
        (2, 8)
    """
    (tp, cp, dp, _), (their_tp, their_cp, their_dp, _) = sender.shape, receiver.shape
    parts = max(dp, their_dp)
    sent = parts // dp * ceil(their_tp * their_cp / (tp * cp))
    return max(sent, parts // their_dp)
