"""What a module costs, in seconds of computing and bytes of messages; what joins the ranks."""

from collections.abc import Sequence
from math import exp, inf
from statistics import NormalDist

from attrs import frozen

from megatron_mimo_coord.layout import ModuleParallelism
from megatron_mimo_coord.layout.fields import count, flag, is_number, list_of, number, positive

EULER = 0.5772
"""The mean of the largest of n is where 1 - exp(-EULER) / n of all are smaller, if n is large."""


_MEASURED = "give what was measured, or leave it out"
_SPEED_UP = "give the speed-up that was measured, divided by the ranks that share the work"


@frozen(kw_only=True)
class ModuleCosts:
    """What one module costs, whatever its layout.

    Seconds are those of the whole module on one rank, without tensor parallelism; stages share them
    by layers. A stage of a module with PP stages computes, for each microbatch,

        seconds per sample x (micro_batch_size / DP) x (its layers / all layers)
            x (r + (1 - r) / TP) / tensor_parallel_efficiency / (CP x context_parallel_efficiency)
            x imbalance x unevenness

    where r is the replicated share, an efficiency counts only if more than one rank shares the
    work, the imbalance only if DP is more than 1, and the unevenness is that of images, see
    :meth:`unevenness`. The efficiency is the textbook's, speed-up divided by ranks, of what they
    share. In each pass comes on top half of what ranks wait for a sample, times the same samples
    and layers, and half of what they wait for a microbatch, times the same layers.

    Args:
        forward_seconds_per_sample: forward pass of one sample of the batch, in seconds.
        backward_seconds_per_sample: backward pass of one sample: gradients of activations and of
            weights. Without the forward that ``recompute`` adds.
        output_bytes_per_sample: bytes of what an encoder sends to the language model for one
            sample; the gradient that comes back is as large.
        activation_bytes_per_sample: bytes between two pipeline stages of this module, one sample;
            the gradient that comes back is as large.
        gradient_bytes: bytes of the gradients of the whole module, as they are reduced.
        optimizer_seconds: the optimizer's update of the whole module on one rank, in seconds.
        tensor_parallel_efficiency: speed-up by TP ranks divided by TP, above 0 and at most 1.
        context_parallel_efficiency: the same for CP.
        tensor_parallel_replicated_share: part of the seconds that every TP rank repeats: norms,
            dropout and residuals. ``mimo-plan --measure`` times it, an estimate derives it from
            bytes and operations; 0 with sequence parallelism, which shares them out too.
        waiting_seconds_per_sample: what a rank waits in the messages of TP and CP for a sample of
            its replica, forward and back, as long as their bytes take.
        waiting_seconds_per_microbatch: the same for a microbatch, however few its samples are: what
            the latency of these messages takes.
        measured_tensor_parallel_size, measured_context_parallel_size: TP and CP at which seconds
            were measured, times which they are here: ``mimo-plan`` takes what so many ranks wait
            for out of them, and adds a layout's own.
        measured_seq_length: tokens of the samples that were measured, of a language model:
            ``mimo-plan`` scales seconds and bytes to the model's; None for as many as that has.
        measured_samples: samples of a microbatch on a rank that were measured: with others
            ``mimo-plan`` says that it extrapolates; None if nobody knows.
        frozen: no weight learns: no gradients of weights, no reduction, no optimizer. Gradients of
            activations still flow wherever something before the stage asks for them: see
            :meth:`backward_seconds`.
        activation_gradient_share: part of the backward pass that gradients of activations take.
            Half by default: the backward of a matrix product is two products of the same size, one
            for its input and one for its weight (Kaplan et al. 2020, arXiv 2001.08361, 2.1).
        recompute: activations are computed again: the backward of a stage, where there is one,
            begins with its forward.
        imbalance: largest work of a data-parallel rank, divided by the mean, 1 or more. For an
            encoder whose images are not assigned to ranks by their cost.
        images_per_sample, images_per_sample_deviation: mean and standard deviation over samples, of
            an encoder whose images are uneven; with 0 they are not.
        images_assigned: whether ``assign_images`` deals them out; else ranks read equal slices.
        layers_per_stage: layers of each pipeline stage where they differ; any numbers that say
            how much of the work a stage has, so that an embedding can count as half a layer.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> vision = ModuleCosts(forward_seconds_per_sample=0.01, backward_seconds_per_sample=0.02)
        >>> vision.forward_seconds(ModuleParallelism(data_parallel_size=2), 0, samples=8)
        0.04
    """

    forward_seconds_per_sample: float = number(cure=_MEASURED)
    backward_seconds_per_sample: float = number(cure=_MEASURED)
    output_bytes_per_sample: float = number(0.0, _MEASURED)
    activation_bytes_per_sample: float = number(0.0, _MEASURED)
    gradient_bytes: float = number(0.0, _MEASURED)
    optimizer_seconds: float = number(0.0, _MEASURED)
    tensor_parallel_efficiency: float = positive(1.0, _SPEED_UP, most=1)
    context_parallel_efficiency: float = positive(1.0, _SPEED_UP, most=1)
    tensor_parallel_replicated_share: float = number(0.0, "give a part of the whole", most=1)
    waiting_seconds_per_sample: float = number(0.0, _MEASURED)
    waiting_seconds_per_microbatch: float = number(0.0, _MEASURED)
    measured_tensor_parallel_size: int = count(1, "give a number of ranks")
    measured_context_parallel_size: int = count(1, "give a number of ranks")
    measured_seq_length: int | None = count(None, "give a number of tokens")
    measured_samples: float | None = positive(None, _MEASURED)
    frozen: bool = flag()
    activation_gradient_share: float = number(0.5, "give a part of the whole", most=1)
    recompute: bool = flag()
    imbalance: float = number(1.0, "give the largest work of a rank divided by the mean", least=1)
    images_per_sample: float = number(0.0, _MEASURED)
    images_per_sample_deviation: float = number(0.0, _MEASURED)
    images_assigned: bool = flag()
    layers_per_stage: Sequence[float] | None = list_of(
        lambda value: is_number(value) and value > 0,
        "a list with a number above 0 for each pipeline stage",
        "write (7, 8, 8, 7), say, or leave it out for equal stages",
        None,
    )

    def stage_share(self, stages: int, stage: int) -> float:
        """Part of the module's layers that a pipeline stage holds.

        Raises:
            ValueError: ``layers_per_stage`` is of another number of stages.

        Example:
            >>> costs = ModuleCosts(forward_seconds_per_sample=1, backward_seconds_per_sample=2)
            >>> costs.stage_share(4, 0)
            0.25
        """
        if self.layers_per_stage is None:
            return 1 / stages
        if len(self.layers_per_stage) != stages:
            raise ValueError(
                f"layers_per_stage {tuple(self.layers_per_stage)} is for "
                f"{len(self.layers_per_stage)} pipeline stages, but the module has PP {stages}; "
                f"give {stages} numbers, or leave it out for equal stages"
            )
        return self.layers_per_stage[stage] / sum(self.layers_per_stage)

    @property
    def is_uneven(self) -> bool:
        """Whether samples have different numbers of images."""
        return self.images_per_sample > 0 and self.images_per_sample_deviation > 0

    def unevenness(self, replicas: int, samples: float) -> float:
        """Largest number of images of a data-parallel rank, divided by the mean: what is expected.

        Of consecutive slices: the images of a rank as a gamma distribution, whose quantile that the
        largest of so many ranks has is Wilson and Hilferty's (1931, doi 10.1073/pnas.17.12.684).
        Assigned images are level but for half an image.

        Args:
            replicas: DP.
            samples: over all ranks, whose images are dealt out together.

        Example:
            >>> def costs(assigned):
            ...     return ModuleCosts(
            ...         forward_seconds_per_sample=1, backward_seconds_per_sample=2,
            ...         images_per_sample=2.6, images_per_sample_deviation=2.8,
            ...         images_assigned=assigned,
            ...     )
            >>> [round(costs(assigned).unevenness(4, 16), 2) for assigned in (False, True)]
            [1.57, 1.04]
        """
        if replicas == 1 or not self.is_uneven:
            return 1.0
        mean, deviation = self.images_per_sample, self.images_per_sample_deviation
        shape = samples / replicas * (mean / deviation) ** 2
        above = NormalDist().inv_cdf(1 - exp(-EULER) / replicas)
        largest = max(0.0, 1 - 1 / (9 * shape) + above / (3 * shape**0.5)) ** 3
        largest = min(max(largest, 1.0), replicas)
        if not self.images_assigned:
            return largest
        return min(largest, 1 + (1 - 1 / replicas) / 2 / (samples / replicas * mean))

    def forward_seconds(
        self, module: ModuleParallelism, stage: int, samples: float, together: int = 1
    ) -> float:
        """Seconds that the ranks of a stage compute forward for a microbatch of all ranks.

        Args:
            module: parallel sizes.
            stage: index of the pipeline stage.
            samples: ``micro_batch_size``, counted over all ranks.
            together: microbatches after which ranks wait for each other.
        """
        return self._seconds(self.forward_seconds_per_sample, 1, module, stage, samples, together)

    def backward_seconds(
        self,
        module: ModuleParallelism,
        stage: int,
        samples: float,
        together: int = 1,
        *,
        receives: bool,
    ) -> float:
        """Seconds that the ranks of a stage compute backward for a microbatch of all ranks.

        Megatron's communicators make every received tensor one that requires a gradient. So a
        frozen stage that receives pays for gradients of activations (and, with ``recompute``, for
        its forward), be it of the language model or behind an encoder's first stage; a frozen stage
        that only reads data has no backward at all.

        Args:
            module, stage, samples, together: as in :meth:`forward_seconds`.
            receives: whether an input of the stage wants a gradient.
        """
        if self.frozen and not receives:
            return 0.0
        seconds = self.backward_seconds_per_sample
        if self.frozen:
            seconds *= self.activation_gradient_share
        if self.recompute:
            seconds += self.forward_seconds_per_sample
        return self._seconds(seconds, 1 + self.recompute, module, stage, samples, together)

    def reduction_seconds(
        self, module: ModuleParallelism, stage: int, cluster: "Cluster", first_rank: int = 0
    ) -> float:
        """Seconds of the sum of a stage's gradients over its replicas; experts count as dense.

        Args:
            module, stage: as in :meth:`forward_seconds`.
            cluster: how fast messages are.
            first_rank: of the stage.
        """
        tp, cp, dp, pp = module.shape
        if self.frozen:
            return 0.0
        gradients = self.gradient_bytes * self.stage_share(pp, stage) / tp
        ranks = range(first_rank, first_rank + tp * cp * dp, tp)
        return cluster.reduction_seconds(ranks, gradients)

    def update_seconds(self, module: ModuleParallelism, stage: int, is_distributed: bool) -> float:
        """Seconds of the optimizer's update of a stage, whose work replicas share or not."""
        tp, cp, dp, pp = module.shape
        if self.frozen:
            return 0.0
        seconds = self.optimizer_seconds * self.stage_share(pp, stage) / tp
        return seconds / (cp * dp if is_distributed else 1)

    def _seconds(
        self,
        whole: float,
        passes: int,
        module: ModuleParallelism,
        stage: int,
        samples: float,
        together: int,
    ) -> float:
        """Of a stage, for some passes that take a sample so long on the whole module, undivided."""
        tp, cp, dp, pp = module.shape
        if tp > 1:
            repeated = self.tensor_parallel_replicated_share
            whole *= (repeated + (1 - repeated) / tp) / self.tensor_parallel_efficiency
        if cp > 1:
            whole /= cp * self.context_parallel_efficiency
        own = samples / dp * self.unevenness(dp, samples * together)
        own *= self.imbalance if dp > 1 else 1
        waiting = own * self.waiting_seconds_per_sample + self.waiting_seconds_per_microbatch
        return self.stage_share(pp, stage) * (own * whole + passes / 2 * waiting)


@frozen(kw_only=True)
class Cluster:
    """How fast messages are: latency + bytes / bandwidth, inside a node and between nodes.

    By default messages are free.

    Args:
        ranks_per_node: ranks that share the links inside a node; None for one node.
        node_latency_seconds: of a message inside a node.
        node_bytes_per_second: of a rank's link inside a node.
        network_latency_seconds: of a message between nodes.
        network_bytes_per_second: of a rank's link to other nodes.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> cluster = Cluster(ranks_per_node=8, network_bytes_per_second=50e9)
        >>> cluster.message_seconds([0, 8], 1e9)
        0.02
    """

    ranks_per_node: int | None = count(
        None, "give the ranks of a node, or leave it out for a cluster of one node"
    )
    node_latency_seconds: float = number(0.0, _MEASURED)
    node_bytes_per_second: float = positive(inf, _MEASURED)
    network_latency_seconds: float = number(0.0, _MEASURED)
    network_bytes_per_second: float = positive(inf, _MEASURED)

    def latency_and_bandwidth(self, ranks: Sequence[int]) -> tuple[float, float]:
        """(seconds, bytes per second) of messages between some ranks, the slowest of them."""
        per_node = self.ranks_per_node
        if per_node is None or min(ranks) // per_node == max(ranks) // per_node:
            return self.node_latency_seconds, self.node_bytes_per_second
        return self.network_latency_seconds, self.network_bytes_per_second

    def message_seconds(self, ranks: Sequence[int], message_bytes: float) -> float:
        """Seconds of a message from one of two ranks to the other."""
        latency, bandwidth = self.latency_and_bandwidth(ranks)
        return latency + message_bytes / bandwidth

    def reduction_seconds(self, ranks: Sequence[int], reduced_bytes: float) -> float:
        """Seconds of a sum over ranks: a ring, in which each sends 2 (n - 1) / n of the bytes.

        That is the least any algorithm can send (Patarasuk and Yuan 2009, doi
        10.1016/j.jpdc.2008.09.002), and what a reduction and a gather of shards send together.

        Example:
            >>> Cluster(node_bytes_per_second=1e9).reduction_seconds([0, 1, 2, 3], 1e9)
            1.5
        """
        count = len(ranks)
        if count == 1 or not reduced_bytes:
            return 0.0
        latency, bandwidth = self.latency_and_bandwidth(ranks)
        return 2 * (count - 1) * (latency + reduced_bytes / count / bandwidth)
