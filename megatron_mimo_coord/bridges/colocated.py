"""Bridges between modules on the same ranks, for modality tokens that vary between samples.

Where an encoder and the language model share their ranks with different DP sizes, Megatron gathers
encoder outputs (fan-in) or cuts them up (fan-out) in equal parts, and a rank without an image does
not take part at all. Here ranks tell each other how many tokens they have, and all take part. What
was assigned goes from any encoder rank to any language rank, and its gradient back.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from attrs import evolve, frozen
from megatron.core.models.mimo import MimoModel

from megatron_mimo_coord.bridges.assignments import PendingAssignments
from megatron_mimo_coord.bridges.statements import HostStatements, Statement, Statements
from megatron_mimo_coord.bridges.text_fit import TextFit
from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid
from megatron_mimo_coord.layout.image_assignment import ImageAssignment
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.mimo_model import input_ids_of
from megatron_mimo_coord.world.groups import ExtraGroups
from megatron_mimo_coord.world.timeouts import inherit_timeout

if TYPE_CHECKING:
    from megatron.core.models.mimo.comm.colocated_communicator import ColocatedBridgeCommunicator


def allow_varying_token_counts(
    model: MimoModel, assignments: PendingAssignments, fit: TextFit, changes: Changes
) -> None:
    """Make a model's colocated bridges exchange as many tokens as there are. Collective, once."""
    if "_apply_colocated_comms" not in vars(model):
        _Exchange(model, assignments, fit, changes)


class _Exchange:
    """Stands in for ``MimoModel._apply_colocated_comms``."""

    def __init__(
        self, model: MimoModel, assignments: PendingAssignments, fit: TextFit, changes: Changes
    ) -> None:
        self._model = model
        self._fit = fit
        self._input_ids: torch.Tensor | None = None
        changes.on_close(
            model.register_forward_pre_hook(self._remember_text, with_kwargs=True).remove
        )
        changes.set(model, "_apply_colocated_comms", self._between_modules)
        grid = model.mimo_config.module_to_grid_map[LANGUAGE]  # which is that of all ranks
        groups = ExtraGroups.shared(grid)
        inherit_timeout(*(bridge.gather_pg for bridge in model.colocated_comms.values()))
        self._bridges = {
            name: _Bridge(name, bridge, groups)
            for (name, _), bridge in model.colocated_comms.items()
        }
        hosts = _own([groups.hosts(ModuleGrid.of(LANGUAGE, grid).ranks)])
        self._everyone = HostStatements(hosts, list(self._bridges))
        groups.before_destroy(self._everyone.finish)
        self._pending = assignments
        self._pending.open(self._bridges)
        self._pass, self._microbatch = 0, -1

    def _remember_text(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._input_ids = input_ids_of(args, kwargs)

    def _between_modules(self, embeddings: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tokens [token, hidden] of each modality, from the encoder's layout to the language's."""
        microbatch = self._count()
        assignments = {name: self._pending.take(name) for name in self._bridges}
        mine = {
            name: self._statement(bridge, embeddings.get(name), assignments[name])
            for name, bridge in self._bridges.items()
        }
        self._everyone.send(mine, microbatch)
        slice_peers = {
            name: bridge.ask_slice_peers(mine[name], microbatch)
            for name, bridge in self._bridges.items()
        }
        everyone = self._everyone.read() if any(assignments.values()) else {}
        # The text's embeddings have the dtype of their weights, and so must all tokens, on all
        # ranks: whatever Float16Module made of an encoder's output, or Megatron in place of one.
        dtype = next(self._model.language_model.parameters()).dtype
        for name, bridge in self._bridges.items():
            if name in embeddings:
                embeddings[name] = embeddings[name].to(dtype)
            tokens, assignment = embeddings.get(name), assignments[name]
            if assignment is not None:
                remark = self._pending.remark(name)
                self._everyone.compare(assignment, bridge.owners, everyone[name], remark)
            said = slice_peers[name] if assignment is None else everyone[name]
            if all(statement.tokens <= 0 for statement in said):
                continue  # nobody whose tokens could come here has any
            if tokens is None:
                tokens = self._model._empty_encoder_output(name)
            tokens = _as_others(tokens.to(dtype), said)
            if assignment is not None:
                embeddings[name] = _RouteTokens.apply(tokens, bridge.route(assignment))
            else:
                embeddings[name] = bridge.exchange(
                    tokens, self._sizes(bridge, tokens, said, microbatch)
                )
        return embeddings

    def _sizes(
        self, bridge: "_Bridge", tokens: torch.Tensor, said: Statements, microbatch: int
    ) -> list[int]:
        """Tokens of each rank that they are gathered from, or cut up for."""
        if not bridge.is_fan_out:
            return [max(0, each.tokens) for each in said]
        assert self._input_ids is not None, "MimoModel.forward takes input_ids"
        in_texts = [max(0, each.in_text) for each in said]
        return self._fit.sizes(bridge.name, in_texts, len(tokens), microbatch, self._input_ids)

    def _count(self) -> int:
        """Number of the microbatch in the schedule's pass."""
        if self._pass != self._pending.passes:
            self._pass, self._microbatch = self._pending.passes, -1
        self._microbatch += 1
        return self._microbatch

    def _statement(
        self, bridge: "_Bridge", tokens: torch.Tensor | None, assignment: ImageAssignment | None
    ) -> Statement:
        statement = Statement(-1)
        if tokens is not None:
            statement = Statement(len(tokens), tokens.requires_grad)
        if assignment is not None:
            # Numbers have the same hash in every process; 1 and 1.0 too, which are dealt out apart.
            costs = hash((assignment.costs, assignment.owners))
            return evolve(statement, assigned=1, digest=assignment.digest, costs=costs)
        if bridge.is_fan_out and tokens is not None:
            return evolve(statement, in_text=self._tokens_in_text(bridge.name))
        return statement

    def _tokens_in_text(self, name: str) -> int:
        """How much of a shared output belongs to this rank's samples.

        Nobody's host knows, so this waits for the device; it is not asked where images are
        assigned.
        """
        assert self._input_ids is not None, "MimoModel.forward takes input_ids"
        return int((self._input_ids == self._model.special_token_ids[name]).sum())


class _Bridge:
    """One encoder's way to the language model, on this rank. Collective to build.

    Args:
        name: the encoder.
        bridge: Megatron's bridge.
        groups: where to get more groups.
    """

    def __init__(
        self, name: str, bridge: "ColocatedBridgeCommunicator", groups: ExtraGroups
    ) -> None:
        self.name = name
        self.is_fan_out = bridge.is_fan_out()
        self._bridge = bridge
        encoder_dp, language_dp = (
            {rank: dp for rank, (dp, _) in sorted(positions.items())}
            for positions in (bridge.rank_to_src_pos, bridge.rank_to_dest_pos)
        )
        self.owners = list(encoder_dp.values())
        rank = dist.get_rank()
        self._dp = encoder_dp[rank], language_dp[rank]
        self._language_dp_size = bridge.dest_dp_size
        # Tokens go out among data-parallel peers of the encoder, of whom there is one for each part
        # of the images; gradients come back among those of the language model.
        to_language = _peers(bridge.rank_to_src_pos)
        to_encoder = _peers(bridge.rank_to_dest_pos)
        self._to_language = _own([groups.devices(ranks) for ranks in to_language])
        self._to_encoder = _own([groups.devices(ranks) for ranks in to_encoder])
        self._receivers = [language_dp[peer] for peer in _own_ranks(to_language, rank)]
        self._returners = [encoder_dp[peer] for peer in _own_ranks(to_encoder, rank)]
        hosts = [groups.hosts(ranks) for ranks in bridge.gather_group_ranks]
        self._slice_peers = HostStatements(_own(hosts), [name]) if hosts else None

    def ask_slice_peers(self, mine: Statement, microbatch: int) -> Statements:
        """What ranks say with whom tokens are gathered or shared if nothing is assigned."""
        if self._slice_peers is None:
            return ()
        self._slice_peers.send({self.name: mine}, microbatch)
        return self._slice_peers.read()[self.name]

    def exchange(self, tokens: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Gather or cut what stayed with its slice."""
        return _ExchangeTokens.apply(tokens, self._bridge, sizes)

    def route(self, assignment: ImageAssignment) -> "_Route":
        """How this rank's tokens go out, and what comes to it."""
        encoder, language = self._dp
        samples = len(assignment.tokens) // self._language_dp_size
        sent, received = [0] * self._language_dp_size, [0] * assignment.data_parallel_size
        runs: list[tuple[int, int]] = []
        for sample, (tokens, owners) in enumerate(
            zip(assignment.tokens, assignment.owners, strict=True)
        ):
            reader = sample // samples
            for count, owner in zip(tokens, owners, strict=True):
                if owner == encoder:
                    sent[reader] += count
                if reader == language and count:
                    received[owner] += count
                    if runs and runs[-1][0] == owner:
                        runs[-1] = owner, runs[-1][1] + count
                    else:
                        runs.append((owner, count))
        return _Route(
            sent,
            received,
            runs,
            self._receivers,
            self._returners,
            self._to_language,
            self._to_encoder,
        )


@frozen
class _Route:
    """How an encoder's tokens reach the ranks that read their samples, and gradients come back.

    Args:
        sent: tokens of this rank's output for each data-parallel rank of the language model.
        received: tokens for this rank's samples from each data-parallel rank of the encoder.
        runs: the order of those: (data-parallel rank of the encoder, tokens).
        receivers: data-parallel rank, in the language model, of each rank of ``to_language``.
        returners: data-parallel rank, in the encoder, of each rank of ``to_encoder``.
        to_language: a rank for each data-parallel rank of the encoder, in order.
        to_encoder: a rank for each data-parallel rank of the language model, in order.
    """

    sent: Sequence[int]
    received: Sequence[int]
    runs: Sequence[tuple[int, int]]
    receivers: Sequence[int]
    returners: Sequence[int]
    to_language: dist.ProcessGroup
    to_encoder: dist.ProcessGroup


class _RouteTokens(torch.autograd.Function):
    """One message to each peer that has something to get, forward and backward."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, route: _Route) -> torch.Tensor:
        ctx.route = route
        for_readers = [[part] for part in tokens.split(list(route.sent))]
        theirs = _all_to_all(
            tokens, [for_readers[dp] for dp in route.receivers], route.received, route.to_language
        )
        if len(route.runs) <= 1 or route.runs == sorted(route.runs):
            return theirs
        parts, taken = theirs.split(list(route.received)), [0] * len(route.received)
        pieces = []
        for owner, count in route.runs:
            pieces.append(parts[owner][taken[owner] : taken[owner] + count])
            taken[owner] += count
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        route = ctx.route
        for_owners: list[list[torch.Tensor]] = [[] for _ in route.received]
        pieces = grad.split([count for _, count in route.runs]) if route.runs else ()
        for (owner, _), piece in zip(route.runs, pieces, strict=True):
            for_owners[owner].append(piece)
        outgoing = [for_owners[dp] for dp in route.returners]
        return _all_to_all(grad, outgoing, route.sent, route.to_encoder), None


def _all_to_all(
    like: torch.Tensor,
    outgoing: Sequence[Sequence[torch.Tensor]],
    sizes: Sequence[int],
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """What every rank of a group has for this one, one behind the other.

    Args:
        like: a tensor whose rows are like those that travel.
        outgoing: pieces for each rank.
        sizes: rows from each rank.
    """
    empty = like.new_empty((0, *like.shape[1:]))
    sent = torch.cat([empty, *(piece for pieces in outgoing for piece in pieces)])
    received = like.new_empty((sum(sizes), *like.shape[1:]))
    sent_sizes = [sum(map(len, pieces)) for pieces in outgoing]
    dist.all_to_all_single(received, sent, list(sizes), sent_sizes, group=group)
    return received


class _ExchangeTokens(torch.autograd.Function):
    """Gathers forward and cuts backward on fan-in; the reverse on fan-out."""

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, bridge: "ColocatedBridgeCommunicator", sizes: list[int]
    ) -> torch.Tensor:
        ctx.bridge, ctx.sizes = bridge, sizes
        exchange = _gather if bridge.is_fan_in() else _cut
        return exchange(tokens, bridge.gather_pg, sizes)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        exchange = _cut if ctx.bridge.is_fan_in() else _gather
        return exchange(grad, ctx.bridge.gather_pg, ctx.sizes), None, None


def _gather(tokens: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]) -> torch.Tensor:
    """The tokens of all ranks, one behind the other."""
    padded = tokens.new_zeros((max(sizes), *tokens.shape[1:]))
    padded[: len(tokens)] = tokens
    gathered = tokens.new_empty((len(sizes) * max(sizes), *tokens.shape[1:]))
    dist.all_gather_into_tensor(gathered, padded, group=group)
    parts = gathered.split(max(sizes)) if max(sizes) else [gathered] * len(sizes)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _cut(tokens: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]) -> torch.Tensor:
    """This rank's part."""
    start = sum(sizes[: group.rank()])
    return tokens[start : start + sizes[group.rank()]].contiguous()


def _as_others(tokens: torch.Tensor, said: Statements) -> torch.Tensor:
    """An output without tokens wants a gradient if the others do: all ranks have to return one."""
    wanted = any(statement.wants_gradient for statement in said)
    if len(tokens) or tokens.requires_grad is wanted:
        return tokens
    return tokens.detach().requires_grad_(wanted)


def _peers(positions: Mapping[int, tuple[int, int]]) -> list[list[int]]:
    """Ranks that differ in DP alone, ascending, from the (DP, TP) of each rank."""
    lines: dict[int, list[int]] = {}
    for rank, (_, tp) in sorted(positions.items()):
        lines.setdefault(tp, []).append(rank)
    return list(lines.values())


def _own_ranks(lines: Sequence[Sequence[int]], rank: int) -> Sequence[int]:
    return next(line for line in lines if rank in line)


def _own(groups: Sequence[dist.ProcessGroup | None]) -> dist.ProcessGroup:
    return next(group for group in groups if group is not None)
