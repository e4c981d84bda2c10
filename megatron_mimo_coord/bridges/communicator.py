"""The schedule's ``p2p_communicator``: Megatron's, with links that never stop the device."""

from collections.abc import Callable, Mapping
from itertools import chain, pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.multimodule_communicator import (
    MultiModulePipelineCommunicator,
)

from megatron_mimo_coord.bridges.agreement import Agreement
from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.bridges.colocated import carry_in_forward
from megatron_mimo_coord.bridges.headers import HostMessages
from megatron_mimo_coord.bridges.incoming import Incoming, sequence_peers
from megatron_mimo_coord.bridges.outgoing import Outgoing
from megatron_mimo_coord.bridges.routes import Lanes, bridge_ends
from megatron_mimo_coord.bridges.shared_bridges import Delivered, SharedBridges
from megatron_mimo_coord.bridges.text_tokens import TextTokens
from megatron_mimo_coord.checks.job import Job
from megatron_mimo_coord.infra import default_output_ndim
from megatron_mimo_coord.layout import (
    LANGUAGE,
    ModuleGrid,
    Topology,
    is_colocated,
    runs_encoders_first,
    stages_behind,
)
from megatron_mimo_coord.megatron.mimo_model import carries_between_modules
from megatron_mimo_coord.world.groups import ExtraGroups, connect

# Language models exchange [sequence, batch, hidden].
DIM_MAPPING = {"s": 0, "b": 1, "h": 2}

Tensors = Mapping[str, torch.Tensor]


class PipelineCommunicator(MultiModulePipelineCommunicator):
    """A ``MultiModulePipelineCommunicator`` that never makes a rank wait for its own device.

    Which rank sends when is Megatron's; how is that of :mod:`megatron_mimo_coord.bridges.links`.
    Samples may have any number of tokens, and with an assignment any rank may have encoded them.

    Args:
        module_to_grid_map: grid of every module.
        topology: for each module, the modules that its output goes to; pass empty lists for
            colocated modules, which have no bridges.
        config: the language model's config.
        module_output_ndim: dims of each module's output.
        assignments: the model's, which the bridges take.

    Attributes:
        after_backward: called when a backward pass has run, on every rank alike, also where there
            is no gradient to send.
        before_forward: called before anything is received.
        shared_bridges: those of encoders that share ranks with the language model.
        delivered: what came over them in a step that is under way.
    """

    def __init__(
        self,
        module_to_grid_map: Mapping[str, HyperCommGrid],
        topology: Topology,
        config: ModelParallelConfig,
        module_output_ndim: Mapping[str, int],
        assignments: PendingAssignments,
    ) -> None:
        self._grids = {n: ModuleGrid.of(n, grid) for n, grid in module_to_grid_map.items()}
        self.after_backward: Callable[[], None] = lambda: None
        self.before_forward: Callable[[], None] = lambda: None
        self.shared_bridges: SharedBridges | None = None
        self.delivered: Delivered | None = None
        self._assignments = assignments
        self._extra_groups = ExtraGroups.shared(module_to_grid_map[LANGUAGE])
        self._incoming: list[Incoming] = []
        self._outgoing: list[Outgoing] = []
        super().__init__(
            dict(module_to_grid_map),
            {name: list(targets) for name, targets in topology.items()},
            config,
            dim_mapping=DIM_MAPPING,
            module_output_ndim=dict(module_output_ndim),
        )
        name, here = next(iter(self.rank_module_map.items()))
        behind = stages_behind(self._grids, name, here.pp_rank)
        self._current_stage = self.total_stages - 1 - behind

    # -- construction: in one order on every rank --------------------------------------------------

    def _build_bridge_comms(self) -> None:
        for name in self._grids:
            self._link_stages(name)
        for source, targets in self.topology.items():
            for target in targets:
                self._link_modules(source, target)
        for link in (*self._incoming, *self._outgoing):
            self._extra_groups.before_destroy(link.finish)

    def _link_stages(self, name: str) -> None:
        """Each stage of a module with the next."""
        grid = self.module_to_grid_map[name]
        if self._grids[name].dim("pp") == 1:
            return
        for stages in grid.get_rank_enum("pp"):
            hosts = self._extra_groups.hosts(stages)
            if hosts is not None:
                devices = grid.get_pg("pp")
                connect(devices)
                for here, there in pairwise(stages):
                    self._link(name, (((here,),), ((there,),)), devices, hosts, dim=0)

    def _link_modules(self, source: str, target: str) -> None:
        """The last stage of one module with the first stage of another."""
        ends = bridge_ends(self._grids[source], self._grids[target])
        senders, receivers = ([*chain(*end)] for end in ends)
        senders_hosts = self._extra_groups.hosts(senders)
        ranks = {*senders, *receivers}
        hosts, devices = self._extra_groups.hosts(ranks), self._extra_groups.devices(ranks)
        if hosts is None or devices is None:
            return
        dim = 0 if self.module_output_ndim.get(source, 3) == 2 else DIM_MAPPING["b"]
        more: dict[str, Any] = {}
        if senders_hosts is not None:
            remark = self._assignments.remark
            more["agreement"] = Agreement(senders_hosts, {source: senders}, remark)
        else:
            more["sequence_peers"] = sequence_peers(self.module_to_grid_map[target])
        self._link(source, ends, devices, hosts, dim, **more)

    def _link(
        self,
        name: str,
        ends: tuple[Lanes, Lanes],
        devices: dist.ProcessGroup,
        hosts: dist.ProcessGroup,
        dim: int,
        **more: Any,
    ) -> None:
        """This rank's end of the way of a module's output, if it is at one."""
        sources, targets = ends
        more |= {
            "name": name,
            "rank": self.current_rank,
            "devices": devices,
            "hosts": HostMessages(hosts),
            "dtype": self.config.pipeline_dtype,
            "dim": dim,
            "assignments": self._assignments,
        }
        if self.current_rank in chain(*sources):
            self._outgoing.append(Outgoing(here=sources, there=targets, **more))
            self._assignments.open([name])
        elif self.current_rank in chain(*targets):
            self._incoming.append(Incoming(here=targets, there=sources, **more))
            self._assignments.expect(name)

    def destroy(self) -> None:
        """Give the groups of the links back; ``MegatronMIMOInfra.destroy`` does it as well."""
        self._extra_groups.destroy()

    # -- what the schedule calls -------------------------------------------------------------------

    @property
    def current_stage(self) -> int:
        """This rank's stage, counted from the end of the pipeline.

        Megatron counts each encoder's stages from its own first. An encoder with fewer stages than
        the deepest then runs further ahead than its bridge has exchanges for: it waits to send
        while the language model waits to return a gradient, for ever.
        """
        return self._current_stage

    def recv_forward(
        self, tensor_shape: Any = None, is_first_stage: bool = False
    ) -> dict[str, torch.Tensor]:
        """Receive what the stages before this one send, by module."""
        self.before_forward()
        arrived = {link.name: link.recv_forward() for link in self._incoming}
        return arrived | self._next_delivered()

    def send_forward(self, output_dict: Tensors, is_last_stage: bool = False) -> None:
        """Send outputs on."""
        for link in self._outgoing:
            link.send_forward(output_dict[link.name])

    def recv_backward(
        self, tensor_shape: Any = None, is_last_stage: bool = False
    ) -> dict[str, torch.Tensor | None]:
        """Receive the gradients of the earliest outputs that have none yet."""
        return {link.name: link.recv_backward() for link in self._outgoing}

    def send_backward(self, grad_dict: Tensors, is_first_stage: bool = False) -> None:
        """Send the gradients of what was received back."""
        self._keep_gradients(grad_dict)
        for link in self._incoming:
            link.send_backward(grad_dict[link.name])

    def send_forward_recv_backward(
        self, output_dict: Tensors, tensor_shape: Any = None, is_last_stage: bool = False
    ) -> dict[str, torch.Tensor | None]:
        """Both, in one batch a link."""
        return {
            link.name: link.send_forward_recv_backward(output_dict[link.name])
            for link in self._outgoing
        }

    def send_backward_recv_forward(
        self, grad_dict: Tensors, tensor_shape: Any = None, is_first_stage: bool = False
    ) -> dict[str, torch.Tensor]:
        """Both, in one batch a link."""
        self._keep_gradients(grad_dict)
        arrived = {
            link.name: link.send_backward_recv_forward(grad_dict[link.name])
            for link in self._incoming
        }
        return arrived | self._next_delivered()

    def _next_delivered(self) -> dict[str, torch.Tensor]:
        return {} if self.delivered is None else self.delivered.next()

    def _keep_gradients(self, gradients: Tensors) -> None:
        self.after_backward()
        if self.delivered is not None:
            self.delivered.keep(gradients)


def build_communicator(
    job: Job, config: ModelParallelConfig, assignments: PendingAssignments, texts: TextTokens
) -> PipelineCommunicator:
    """The communicator of a layout, disjoint or colocated. Collective.

    Args:
        job: whose model's colocated bridges carry varying numbers of tokens from now on.
        config: the language model's config.
        assignments: the model's.
        texts: compared with tokens.

    Raises:
        ValueError: ranks send to each other and ``pipeline_dtype`` is not set.
    """
    grids, infra = job.grids, job.infra
    colocated, encoders_first = is_colocated(grids.values()), runs_encoders_first(grids)
    has_stages = any(grid.dim("pp") > 1 for grid in grids.values())
    if config.pipeline_dtype is None and (has_stages or not colocated):
        raise ValueError(
            "config.pipeline_dtype is None, so a receiver cannot know what it is sent: set it "
            "to the dtype of the activations, such as torch.bfloat16"
        )
    linked = [LANGUAGE] if encoders_first else list(grids)
    communicator = PipelineCommunicator(
        {name: infra.module_to_grid_map[name] for name in linked},
        {name: [] if colocated else infra.topology.get(name, []) for name in linked},
        config,
        getattr(infra, "module_output_ndim", None) or default_output_ndim(grids),
        assignments,
    )
    if encoders_first or colocated:
        bridges = SharedBridges(job, assignments, texts)
        communicator.shared_bridges = bridges
        if encoders_first or carries_between_modules(job.model):
            assignments.open(bridges.encoders)
        if not encoders_first:
            carry_in_forward(job, bridges, assignments)
    return communicator
