"""A model out of stock Megatron parts, with Megatron's own initialisation, and its oracle.

``StockCase`` makes it as the README does. Each module has a ``TransformerConfig`` of its own. The
oracle knows the weights that the ranks really have: they are gathered before the first step, when
replicas must hold the same values and shards different ones. Then whole steps are compared, the
update included.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import cases
import torch
import torch.distributed as dist
import vlm
import weights
from attrs import evolve, field, frozen
from cases import PATCH_DIM, TOLERANCE, VOCABULARY, Case, Oracle, alone, not_rehearsed
from context_attention import ContextAttention
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import MegatronModule, ModuleSpec, TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_mimo_coord import MegatronMIMOInfra, ModuleParallelism

HIDDEN, ENCODER_HIDDEN = 16, 8
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SEQUENCE_PARALLEL = {"sequence_parallel": True}
_OF_A_LAYOUT = (*SEQUENCE_PARALLEL, *RECOMPUTE)


@frozen(kw_only=True)
class StockCase(Case):
    """A training job of the stock model.

    Args:
        configs: settings of each module's ``TransformerConfig``.
        multiple: what the number of tokens of a sample is a multiple of.
        max_sequence: how many the language model takes; as many as there are if 0.
        meets: whether the encoders meet their replicas in their forward, over a "group" or one of a
            "collection" that they hold.
    """

    configs: Mapping[str, Mapping[str, Any]] = field(factory=dict)
    multiple: int = 4
    max_sequence: int = 0
    meets: str = ""

    @property
    def sequence(self) -> int:
        """Tokens of a sample; tensor-parallel ranks share them."""
        return -(-Case.sequence.fget(self) // self.multiple) * self.multiple

    def build_model(self, infra: MegatronMIMOInfra) -> MimoModel:
        """As the README does; ``Float16Module`` around the whole model if it is to wrap it."""
        infra.initialize_megatron(weights.SEED)
        model = self.bare(infra)
        self.wrap_modules(infra, model)
        return model

    def bare(self, infra: MegatronMIMOInfra) -> MimoModel:
        """The model on this rank without DDP."""
        places = {name: infra.stage_arguments(name) for name in self.modules}
        return self._bare(places, infra.module_to_grid_map)

    def wrap_modules(self, infra: MegatronMIMOInfra, model: MimoModel) -> None:
        """Freeze what is frozen, and put DDP around each module."""
        for name, module in vlm.submodules(model).items():
            self._freeze(name, module, infra.pg_collections[name])
        wrapped = Float16Module(model.config, model) if self.wrap else model
        infra.wrap_in_ddp(wrapped, DistributedDataParallelConfig(**self.ddp))

    def build_whole_model(self) -> MimoModel:
        """All of it on this rank."""
        place = {"pre_process": True, "post_process": True, "pg_collection": alone()}
        return self._bare(dict.fromkeys(self.modules, place), None)

    def encoder_inputs(self, images: torch.Tensor) -> dict[str, Any] | None:
        """What ``VisionModalitySubmodules`` is given."""
        return {"encoder": {"images": images}} if len(images) else None

    def _freeze(
        self, name: str, module: torch.nn.Module, groups: ProcessGroupCollection | None
    ) -> None:
        for whole_name, parameter, _ in weights.named_shards(name, module, groups):
            parameter.requires_grad = not self.is_frozen(whole_name)

    def _bare(self, places: Mapping[str, dict[str, Any]], grids: Any) -> MimoModel:
        groups = {name: place["pg_collection"] for name, place in places.items()}
        language_pg = groups[vlm.LANGUAGE]
        config = self._config(vlm.LANGUAGE, language_pg, HIDDEN)
        language = ModuleSpec(
            GPTModel,
            {
                "config": config,
                "transformer_layer_spec": _layer(config),
                "vocab_size": VOCABULARY,
                "max_sequence_length": self.max_sequence or self.sequence,
                "share_embeddings_and_output_weights": self.tied_embeddings,
                "scatter_embedding_sequence_parallel": False,
                **places[vlm.LANGUAGE],
            },
        )
        return MimoModel(
            MimoModelConfig(
                language_model_spec=language,
                modality_submodules_spec={
                    name: self._encoder(name, groups[name]) for name in self.encoders
                },
                special_token_ids={
                    name: VOCABULARY - 1 - index for index, name in enumerate(self.encoders)
                },
                module_to_grid_map=grids,
            ),
            tp_group=language_pg and language_pg.tp,
            cp_group=language_pg and language_pg.cp,
        ).cuda()

    def _encoder(self, name: str, groups: ProcessGroupCollection | None) -> ModuleSpec:
        projection = ModuleSpec(
            MultimodalProjector,
            {
                "config": self._config(name, groups, HIDDEN, is_projection=True),
                "submodules": MLPSubmodules(ColumnParallelLinear, RowParallelLinear),
                "projector_type": "mlp",
                "input_size": ENCODER_HIDDEN,
                "tp_group": groups and groups.tp,
            },
        )
        config = self._config(name, groups, ENCODER_HIDDEN)
        kind = {"": Encoder, "group": MeetingEncoder, "collection": CollectingEncoder}[self.meets]
        encoder = ModuleSpec(kind, {"config": config, "pg_collection": groups})
        return ModuleSpec(
            VisionModalitySubmodules,
            {"pg_collection": groups},
            {"encoders": {"encoder": encoder}, "input_projections": [projection]},
        )

    def _config(
        self,
        name: str,
        groups: ProcessGroupCollection | None,
        hidden: int,
        is_projection: bool = False,
    ) -> TransformerConfig:
        """A module's own, on these groups."""
        settings = dict(self.configs.get(name, {}))
        if is_projection:
            settings = {}
        sizes = ModuleParallelism() if groups is alone() else self.modules[name]
        if groups is alone():
            for setting in _OF_A_LAYOUT:
                settings.pop(setting, None)
        if self.wrap:
            settings |= {"bf16": True, "params_dtype": torch.bfloat16}
        experts = settings.get("num_moe_experts")
        config = TransformerConfig(
            hidden_size=hidden,
            num_attention_heads=2,
            tensor_model_parallel_size=sizes.tensor_model_parallel_size,
            pipeline_model_parallel_size=sizes.pipeline_model_parallel_size,
            context_parallel_size=sizes.context_parallel_size,
            expert_model_parallel_size=sizes.expert_model_parallel_size if experts else 1,
            expert_tensor_parallel_size=sizes.expert_tensor_parallel_size if experts else 1,
            calculate_per_token_loss=self.per_token.get(
                vlm.LANGUAGE if groups is alone() else name, False
            ),
            pipeline_dtype=torch.bfloat16 if self.wrap else torch.float32,
            moe_token_dispatcher_type="alltoall",
            **{"hidden_dropout": 0.0, "attention_dropout": 0.0, "init_method_std": 0.2}
            | {
                "moe_router_load_balancing_type": "none",
                "num_layers": self.layers or self.layers_of(name),
            }
            | settings,
        )
        config.variable_seq_lengths = True
        return config


def mixture(**more: Any) -> dict[str, Any]:
    """Settings of a module whose layers are mixtures of experts."""
    return {"num_moe_experts": 4, "add_bias_linear": False, **more}


def _layer(config: TransformerConfig) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    if config.context_parallel_size > 1:
        spec.submodules.self_attention.submodules.core_attention = ContextAttention
    return spec


class Encoder(MegatronModule):
    """Megatron's transformer block over the patches of images."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        self.embed = torch.nn.Linear(PATCH_DIM, config.hidden_size)
        self.block = TransformerBlock(
            config=config, spec=_layer(config), pg_collection=pg_collection
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """``images``: [image, patch, number]; returns [image, patch, hidden]."""
        images = images.to(self.embed.weight.dtype)
        hidden_PNH = self.embed(images).transpose(0, 1).contiguous()
        if self.config.sequence_parallel:
            hidden_PNH = scatter_to_sequence_parallel_region(hidden_PNH, group=self.tp_group)
        hidden_PNH = self.block(hidden_PNH, attention_mask=None)
        if self.config.sequence_parallel:
            hidden_PNH = gather_from_sequence_parallel_region(
                hidden_PNH, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return hidden_PNH.transpose(0, 1).contiguous()


class MeetingEncoder(Encoder):
    """One that takes the mean of all replicas' images away."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config, pg_collection)
        self.dp_group = pg_collection.dp

    def replicas(self) -> dist.ProcessGroup:
        """Those that it meets."""
        return self.dp_group

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """``images``: [image, patch, number]; returns [image, patch, hidden]."""
        total, number = images.sum(0), torch.tensor(len(images), device=images.device)
        for each in (total, number):
            dist.all_reduce(each, group=self.replicas())
        return super().forward(images - total / number)


class CollectingEncoder(MeetingEncoder):
    """One that holds all of its groups."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config, pg_collection)
        del self.dp_group
        self.pg_collection = pg_collection

    def replicas(self) -> dist.ProcessGroup:
        """Those that it meets."""
        return self.pg_collection.dp


# -- what the ranks hold ---------------------------------------------------------------------------


def gather(infra: MegatronMIMOInfra, model: MimoModel) -> dict[str, torch.Tensor]:
    """The whole weights, of what all ranks hold, on the first rank; nothing elsewhere. Collective.

    Raises:
        AssertionError: replicas hold different values, or shards the same.
    """
    here = {}
    for name, module in vlm.submodules(model).items():
        while hasattr(module, "module"):
            module = module.module
        for whole_name, parameter, shard in weights.named_shards(
            name, module, infra.pg_collections[name]
        ):
            here[whole_name] = shard, parameter.detach().float().numpy()  # quickly unpickled
    everywhere: list[Any] = [None] * dist.get_world_size()
    is_first = dist.get_rank() == 0
    dist.gather_object(here, everywhere if is_first else None, 0, group=cases._hosts())
    return _whole(everywhere) if is_first else {}


def _whole(everywhere: list[dict[str, tuple[weights.Shard, Any]]]) -> dict[str, torch.Tensor]:
    """The weights of which each rank holds a shard."""
    whole = {}
    for name in sorted({name for each in everywhere for name in each}):
        held = [(rank, *each[name]) for rank, each in enumerate(everywhere) if name in each]
        parts: dict[int, torch.Tensor] = {}
        for rank, shard, array in held:
            values = torch.from_numpy(array)
            first = parts.setdefault(shard.index, values)
            assert torch.equal(first, values), f"{name}: rank {rank} holds another replica"
        shard = held[0][1]
        assert len(parts) == shard.count, f"{name}: {len(parts)} of {shard.count} shards"
        if shard.count > 1 and len(parts[0].unique()) > 1:
            for index in range(1, shard.count):
                assert not torch.equal(parts[0], parts[index]), f"{name}: shards are the same"
        whole[name] = torch.cat([parts[i] for i in range(shard.count)], shard.dim)
    return whole


def auxiliary_scale(case: StockCase, step: int) -> float:
    """What an auxiliary loss of a microbatch weighs: as much as the loss of a microbatch, or token."""
    if not case.per_token.get(vlm.LANGUAGE):
        return 1 / case.num_microbatches
    masks = [cases.draw(case, step, index).mask for index in range(case.num_microbatches)]
    return 1 / sum(int(mask.sum()) for mask in masks)


def check(case: StockCase, then: StockCase | None = None, folder: str = "") -> int:
    """Train on this rank and alone; returns how many parameters were compared.

    Args:
        case: the job.
        then: how it goes on from its last checkpoint, on another layout, if it does.
        folder: of the checkpoint.

    Raises:
        AssertionError: a gradient, the reported loss, or a weight after an update differs.
    """
    case = evolve(case, is_thin=True)
    with nullcontext() if case.rehearse else not_rehearsed():
        return _check(case, then, folder)


def _check(case: StockCase, then: StockCase | None, folder: str) -> int:
    with not_rehearsed():
        oracle = Oracle(case)
    tolerance, rounding = (0.1, 0.1) if case.wrap else (TOLERANCE, 1e-5)
    step = 0
    MoEAuxLossAutoScaler.main_loss_backward_scale = None

    def load(infra: Any, model: MimoModel) -> None:
        whole = gather(infra, model)
        assert dist.get_rank() > 0 or whole.keys() == oracle.parameters.keys()
        with torch.no_grad():
            for name, weight in whole.items():
                oracle.parameters[name].copy_(weight)

    def compare_weights(infra: Any, model: MimoModel) -> None:
        wrong = []
        for name, weight in gather(infra, model).items():
            want = oracle.parameters[name].detach()
            error = (weight - want).norm()
            if error > rounding * want.norm() + 1e-6:
                wrong.append(f"{name} is off by {error:.3g} of {want.norm():.3g}")
        assert not wrong, f"after step {step - 1}: " + ", ".join(wrong)

    compared = 0
    for each in (case, then) if then else (case,):
        oracle.case = each
        built = load if each is case else compare_weights
        for infra, model, metrics in cases.train(each, built, compare_weights, folder):
            with not_rehearsed():
                MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([auxiliary_scale(each, step)]))
                expected = oracle.backward(step)
                compared += cases.compare_step(
                    infra, model, metrics, expected, oracle, step, tolerance
                )
                oracle.update()
            step += 1
    return compared


def check_equal(case: StockCase, other: StockCase, folder: str) -> None:
    """Train twice: one starts again from a checkpoint before its last step.

    Raises:
        AssertionError: a loss or a weight after an update differs, or those of replicas do.
    """
    losses, weights = _trained([evolve(case, steps=case.steps - 1), case], folder)
    with not_rehearsed():
        other_losses, others = _trained([other], "")
    torch.testing.assert_close(losses, other_losses, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(weights, others, rtol=1e-5, atol=1e-6)


def _trained(
    parts: list[StockCase], folder: str
) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Each step's loss, and the whole weights after it."""
    weights: list[dict[str, torch.Tensor]] = []

    def updated(infra: Any, model: MimoModel) -> None:
        weights.append(gather(infra, model))

    losses = [
        metrics["loss"]
        for part in parts
        for _, _, metrics in cases.train(part, gather, updated, folder)
    ]
    return losses, weights


def train_consistently(case: StockCase) -> float:
    """Train; returns the last loss.

    Raises:
        AssertionError: after an update, replicas hold different values.
    """
    loss = 0.0
    for _, _, metrics in cases.train(case, gather, gather):
        loss = metrics["loss"]
    return loss
