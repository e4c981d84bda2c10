"""Megatron's pipeline communicator, for modality tokens that vary between samples.

Two things in Megatron 0.19 take it for granted that every sample has as many image tokens as the
next, when an encoder has more data-parallel ranks than the language model (fan-in):

- the receiver learns how much each encoder rank sent, but splits the gradient evenly on the way
  back; here it splits it as it was received;
- ``MimoModel`` refuses to attach split sizes to an encoder's output, although under fan-in a rank
  sends all of it to one receiver and needs none; here it is not asked to.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.mimo import MimoModel
from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator, CommRole
from megatron.core.pipeline_parallel.multimodule_communicator import (
    MultiModulePipelineCommunicator,
)

from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid, Topology, stages_behind
from megatron_mimo_coord.world.timeouts import inherit_timeout

# Language models exchange [sequence, batch, hidden]; for 2-dim messages Megatron splits dim 0.
DIM_MAPPING = {"s": 0, "b": 1, "h": 2}


def fan_in_encoders(grids: Mapping[str, ModuleGrid], topology: Topology) -> dict[str, int]:
    """Encoder ranks that send to one language model rank, for each encoder that has several."""
    ratios = {
        name: grids[name].data_parallel_size // grids[LANGUAGE].data_parallel_size
        for name, targets in topology.items()
        if LANGUAGE in targets
    }
    return {name: ratio for name, ratio in ratios.items() if ratio > 1}


class TokenCounts:
    """What a ``MimoModel`` does about samples with different numbers of tokens under fan-in.

    With Megatron's own communicator such samples fail far from their cause: a shape error inside
    backward, or a wait without end. So it refuses them with a sentence, until a communicator that
    can carry them is built.

    Args:
        model: the model; its forward is watched.
        fan_in: for each encoder that has several ranks for one of the language model's, how many.
    """

    def __init__(self, model: MimoModel, fan_in: Mapping[str, int]) -> None:
        self._model = model
        self._fan_in = fan_in
        self._may_vary = False
        self._watch = model.register_forward_pre_hook(self._refuse_uneven_ranks, with_kwargs=True)
        model._attach_modality_split_sizes = self._attach_split_sizes

    @classmethod
    def of(cls, model: MimoModel, fan_in: Mapping[str, int]) -> "TokenCounts":
        """The one of this model, whoever asked for it first."""
        if not hasattr(model, "_mimo_token_counts"):
            model._mimo_token_counts = cls(model, fan_in)
        return model._mimo_token_counts

    def allow_varying(self) -> None:
        """A communicator that carries them is built."""
        self._may_vary = True
        self._watch.remove()

    def _attach_split_sizes(
        self, output: torch.Tensor, input_ids: torch.Tensor | None, encoder_name: str
    ) -> None:
        """On an encoder rank: under fan-in it has one receiver, so there is nothing to split."""
        if encoder_name not in self._fan_in:
            MimoModel._attach_modality_split_sizes(self._model, output, input_ids, encoder_name)
        elif not self._may_vary and input_ids is not None:
            self._refuse_uneven(encoder_name, self._count(encoder_name, input_ids))

    def _refuse_uneven_ranks(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """On a language model rank: each encoder rank must have sent the same number of tokens."""
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        role = self._model.role
        if input_ids is None or not model.training or not role.is_first_stage(LANGUAGE):
            return
        for name, ratio in self._fan_in.items():
            if len(input_ids) % ratio == 0:
                counts = self._count(name, input_ids).view(ratio, -1)
                self._refuse_uneven(name, counts.sum(dim=1))

    def _count(self, name: str, input_ids: torch.Tensor) -> torch.Tensor:
        return (input_ids == self._model.special_token_ids.get(name)).sum(dim=1)

    def _refuse_uneven(self, name: str, counts: torch.Tensor) -> None:
        numbers = counts.tolist()
        if len(set(numbers)) > 1:
            raise RuntimeError(
                f"{self._fan_in[name]} ranks of {name} send to one language model rank, and their "
                f"samples have different numbers of {name} tokens ({numbers}): Megatron's own "
                f"communicator splits the gradient evenly and would fail in backward. Build the "
                f"schedule's p2p_communicator with coordinator.build_pipeline_communicator(config)"
            )


class VaryingTokensCommunicator(MultiModulePipelineCommunicator):
    """A ``MultiModulePipelineCommunicator`` whose bridges split gradients as they were received.

    Args:
        module_to_grid_map: grid of every module.
        topology: for each module, the modules that its output goes to; pass empty lists for
            colocated modules, which have no bridges.
        config: the language model's config.
        module_output_ndim: dims of each module's output.
    """

    def __init__(
        self,
        module_to_grid_map: Mapping[str, HyperCommGrid],
        topology: Topology,
        config: ModelParallelConfig,
        module_output_ndim: Mapping[str, int],
    ) -> None:
        super().__init__(
            dict(module_to_grid_map),
            {name: list(targets) for name, targets in topology.items()},
            config,
            dim_mapping=DIM_MAPPING,
            module_output_ndim=dict(module_output_ndim),
        )
        grids = {name: ModuleGrid.of(name, grid) for name, grid in module_to_grid_map.items()}
        name, here = next(iter(self.rank_module_map.items()))
        self._current_stage = self.total_stages - 1 - stages_behind(grids, name, here.pp_rank)

    @property
    def current_stage(self) -> int:
        """This rank's stage, counted from the end of the pipeline.

        Megatron counts each encoder's stages from its own first. An encoder with fewer stages than
        the deepest then runs further ahead than its bridge has exchanges for: it waits to send
        while the language model waits to return a gradient, for ever.
        """
        return self._current_stage

    def _build_bridge_comms(self) -> None:
        for source in self.module_to_grid_map:
            for target in self.topology.get(source, []):
                bridge = VaryingTokensBridge(
                    src_grid=self.module_to_grid_map[source],
                    dest_grid=self.module_to_grid_map[target],
                    dim_mapping=self.dim_mapping,
                    comm_dtype=self.config.pipeline_dtype,
                    src_module_name=source,
                    dest_module_name=target,
                    tensor_ndim=self.module_output_ndim.get(source, 3),
                )
                self.bridge_comms.append(bridge)


class VaryingTokensBridge(BridgeCommunicator):
    """A bridge whose receiver sends each encoder rank the gradient of just what that rank sent."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._received: list[int] = []
        # Split sizes of the microbatch whose backward has run and whose gradient is to be sent. Put
        # there by backward itself: a forward_only pass leaves nothing behind.
        self._to_return: deque[list[int]] = deque()

    @classmethod
    def _get_or_create_broadcast_pg(cls, ranks_list: list[list[int]]) -> dist.ProcessGroup:
        group = super()._get_or_create_broadcast_pg(ranks_list)
        inherit_timeout(group)
        return group

    @classmethod
    def _get_or_create_bridge_pg(cls, ranks: list[int]) -> dist.ProcessGroup:
        group = super()._get_or_create_bridge_pg(ranks)
        inherit_timeout(group)
        return group

    def recv_forward(self) -> torch.Tensor | None:
        """As Megatron's, and remembers how much came from each encoder rank."""
        return self._remember_split(super().recv_forward())

    def send_backward_recv_forward(
        self, grad_tensor: torch.Tensor, forward_shape: tuple[int, ...] | None = None
    ) -> torch.Tensor | None:
        """As Megatron's, and remembers how much came from each encoder rank."""
        return self._remember_split(super().send_backward_recv_forward(grad_tensor, forward_shape))

    def _communicate_shapes(self, *tensors: Any, **directions: Any) -> Any:
        forward_shapes, grad_shapes = super()._communicate_shapes(*tensors, **directions)
        if forward_shapes:
            self._received = [shape[self._batch_dim] for shape in forward_shapes]
        return forward_shapes, grad_shapes

    def _remember_split(self, activation: torch.Tensor | None) -> torch.Tensor | None:
        if self._is_receiver and activation is not None and activation.requires_grad:
            sizes = self._received

            def backward_has_run(_: torch.Tensor) -> None:
                self._to_return.append(sizes)

            activation.register_hook(backward_has_run)
        return activation

    def _split_tensor_at_batch_dim(
        self, aggregated_tensor: torch.Tensor, num_splits: int
    ) -> list[torch.Tensor]:
        """Called for everything that this rank sends, activations and gradients."""
        split_sizes = getattr(aggregated_tensor, "_mimo_bridge_split_sizes", None)
        if self._is_receiver and self._to_return:
            split_sizes = self._to_return.popleft()
        # The other side allocates comm_dtype, whatever Float16Module made of an output.
        tensor = aggregated_tensor.to(self.comm_dtype) if self.comm_dtype else aggregated_tensor
        if split_sizes is not None:
            tensor._mimo_bridge_split_sizes = split_sizes  # type: ignore[attr-defined]
        return super()._split_tensor_at_batch_dim(tensor, num_splits)

    @property
    def _is_receiver(self) -> bool:
        return self.comm_map[self.current_rank].role is CommRole.RECEIVER
