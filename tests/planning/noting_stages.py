"""Megatron's schedule and the communicator on real ranks, with stages that only note what they do."""

from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from attrs import frozen
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import MultiModuleProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_mimo_coord import MegatronMIMOInfra, ModuleParallelism
from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.bridges.communicator import PipelineCommunicator
from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid, is_colocated
from megatron_mimo_coord.megatron.mimo_model import set_split_sizes

METHODS = (
    "recv_forward",
    "send_forward",
    "recv_backward",
    "send_backward",
    "send_forward_recv_backward",
    "send_backward_recv_forward",
)
Event = tuple[str, str]
"""(forward or backward, module), or (method of the communicator, "")."""


@frozen
class Job:
    """A job of stages that compute nothing.

    Args:
        modules: parallel sizes.
        frozen: modules without a weight that learns.
        micro_batch_size: samples in a microbatch over all ranks.
        num_microbatches: microbatches in a step.
    """

    modules: Mapping[str, ModuleParallelism]
    frozen: frozenset[str]
    micro_batch_size: int
    num_microbatches: int


def run_step(job: Job) -> list[Event]:
    """What this rank did in a step."""
    infra = MegatronMIMOInfra.build(job.modules)
    grids = {name: ModuleGrid.of(name, grid) for name, grid in infra.module_to_grid_map.items()}
    config = TransformerConfig(
        num_layers=1,
        hidden_size=2,
        num_attention_heads=1,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        pipeline_dtype=torch.float32,
    )
    communicator = PipelineCommunicator(
        infra.module_to_grid_map,
        dict.fromkeys(grids, ()) if is_colocated(grids.values()) else infra.topology,
        config,
        infra.module_output_ndim,
        PendingAssignments(),
    )
    events: list[Event] = []
    for name in METHODS:
        setattr(communicator, name, _noted(getattr(communicator, name), events))
    stage = NotingStage(config, job, grids, events)
    groups = MultiModuleProcessGroupCollection(
        module_pgs={name: group for name, group in infra.pg_collections.items() if group},
        language_model_module_name=LANGUAGE if LANGUAGE in stage.modules else None,
    )
    forward_backward_pipelining_without_interleaving(
        forward_step_func=lambda data, model: (model(), _loss),
        data_iterator=None,
        model=[stage],
        num_microbatches=job.num_microbatches,
        seq_length=1,
        micro_batch_size=job.micro_batch_size,
        p2p_communicator=communicator,
        pg_collection=groups,
    )
    infra.destroy()
    return events


def _noted(method: Any, events: list[Event]) -> Any:
    @wraps(method)
    def noted(*args: Any, **kwargs: Any) -> Any:
        events.append((method.__name__, ""))
        return method(*args, **kwargs)

    return noted


def _loss(output: torch.Tensor) -> Any:
    return output.sum(), torch.tensor(1, dtype=torch.int, device="cuda"), {}


class NotingStage(torch.nn.Module):
    """What a rank holds: a stage of one module, or of several one after the other."""

    def __init__(
        self, config: Any, job: Job, grids: Mapping[str, ModuleGrid], events: list[Event]
    ) -> None:
        super().__init__()
        self.config, self.job, self.grids, self.events = config, job, grids, events
        rank = dist.get_rank()
        here = [name for name, grid in grids.items() if rank in grid.ranks]
        self.modules = sorted(here, key=lambda name: name == LANGUAGE)
        self.index = grids[here[0]].coordinate(rank, "pp")
        self.received: dict[str, torch.Tensor] = {}

    def set_input_tensor(self, tensors: list[Any]) -> None:
        self.received = tensors[0] or {}

    def forward(self) -> Any:
        """What each module sends on, [1, sample, 2] between its stages, [sample, 2] to a bridge."""
        taken: dict[str, torch.Tensor] = {}
        for name in self.modules:
            # A weight that learns, and whatever comes from other modules or the stage before.
            inputs = [torch.ones((), device="cuda", requires_grad=name not in self.job.frozen)]
            if name == LANGUAGE and self.index == 0:
                inputs += [tensor.sum() for tensor in (*self.received.values(), *taken.values())]
            elif self.index:
                received = self.received[name]
                inputs.append((received[0] if isinstance(received, list) else received).sum())
            taken[name] = _Noted.apply(torch.stack(inputs).sum(), name, self.events)
        if LANGUAGE in taken and self._is_last(LANGUAGE):
            return taken[LANGUAGE]
        return {name: self._message(name, output) for name, output in taken.items()}

    def _is_last(self, name: str) -> bool:
        return self.index == self.grids[name].dim("pp") - 1

    def _message(self, name: str, output: torch.Tensor) -> torch.Tensor:
        samples = self.job.micro_batch_size // self.grids[name].data_parallel_size
        to_bridge = self._is_last(name) and name != LANGUAGE
        message = output.expand((samples, 2) if to_bridge else (1, samples, 2)).contiguous()
        if to_bridge:
            set_split_sizes(message, [1] * samples)  # as a MimoModel's text would say
        return message


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, events: list[Event]) -> torch.Tensor:
        ctx.noted = name, events
        events.append(("forward", name))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        name, events = ctx.noted
        events.append(("backward", name))
        return grad, None, None
