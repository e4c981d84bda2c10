"""A small vision-language model out of Megatron-Core's own parts, on any layout.

``build_model`` makes what a trainer has before it meets the coordinator: a ``MimoModel`` whose
submodules are Megatron transformer blocks, each on its own grid and wrapped in Megatron's DDP.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from attrs import field, frozen
from context_attention import ContextAttention
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock

LANGUAGE = "language"
Groups = Mapping[str, ProcessGroupCollection | None]


@frozen(kw_only=True)
class EncoderShape:
    """Sizes of an encoder: ``patches`` vectors of ``patch_dim`` numbers in, as many tokens out."""

    patches: int
    patch_dim: int
    token_id: int
    layers: int = 2
    hidden: int = 64
    heads: int = 4


@frozen(kw_only=True)
class LanguageShape:
    """Sizes of the language model; ``experts`` makes its layers mixtures of experts.

    ``attention`` is the layers' core attention, where it is not Megatron's own for local layers.
    That one refuses context parallelism and packed samples: with the former ``ContextAttention``
    stands in, on any device; a job that is to be fast on GPUs takes Transformer Engine's.
    """

    vocabulary: int
    sequence: int
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    experts: int | None = None
    tied_embeddings: bool = False
    attention: type[torch.nn.Module] | None = None


@frozen(kw_only=True)
class ModelShape:
    """The whole model, and how each module is trained, by module name.

    Args:
        encoders: sizes of each encoder.
        language: sizes of the language model.
        per_token: ``calculate_per_token_loss`` of each module.
        ddp: settings of each module's ``DistributedDataParallelConfig``.
        config: further settings of every module's ``TransformerConfig``.
    """

    encoders: Mapping[str, EncoderShape]
    language: LanguageShape
    per_token: Mapping[str, bool] = field(factory=dict)
    ddp: Mapping[str, Mapping[str, Any]] = field(factory=dict)
    config: Mapping[str, Any] = field(factory=dict)


class Encoder(MegatronModule):
    """One pipeline stage of a transformer over the patches of images (or frames of sound)."""

    def __init__(
        self, config: TransformerConfig, shape: EncoderShape, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.tp_group = groups.tp  # where Megatron's checkpoints look for it
        self.is_first = groups.pp.rank() == 0
        if self.is_first:
            self.embed = torch.nn.Linear(shape.patch_dim, shape.hidden)
            self.positions = torch.nn.Parameter(torch.zeros(shape.patches, 1, shape.hidden))
        self.block = TransformerBlock(
            config=config,
            spec=get_vit_layer_with_local_spec(),
            pre_process=self.is_first,
            post_process=groups.pp.rank() == groups.pp.size() - 1,
            pg_collection=groups,
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """``images``: [image, patch, number] on the first stage, else hidden [patch, image, h]."""
        if not self.is_first:
            self.block.set_input_tensor(images)
            return self.block(None, attention_mask=None)
        hidden_PNH = self.embed(images.to(self.embed.weight.dtype)).transpose(0, 1)
        return self.block((hidden_PNH + self.positions).contiguous(), attention_mask=None)


class PipelinedSubmodules(VisionModalitySubmodules):
    """Megatron's container of one modality, with an encoder that spans pipeline stages."""

    def forward(
        self,
        encoder_inputs: Mapping[str, Any] | None = None,
        hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Tokens [image x patch, hidden] on the last stage, hidden [patch, image, h] before."""
        if hidden_states is None:
            if encoder_inputs is None:
                return None
            hidden_states = encoder_inputs["images"]
        elif hidden_states.ndim == 2:
            return hidden_states  # the first stage had no image
        hidden_PNH = self.encoders["transformer"](hidden_states)
        if not self.is_last_stage:
            return hidden_PNH
        return self.input_projections[0](hidden_PNH.transpose(0, 1).flatten(0, 1))

    @classmethod
    def from_spec(
        cls, module_spec: ModuleSpec, is_first_stage: bool = True, is_last_stage: bool = True
    ) -> "PipelinedSubmodules":
        """Build the stage that this rank holds."""
        config, shape, groups, width = module_spec.params.values()
        return cls(
            encoders={"transformer": Encoder(config, shape, groups)},
            input_projections=[torch.nn.Linear(shape.hidden, width)] if is_last_stage else [],
            is_first_stage=is_first_stage,
            is_last_stage=is_last_stage,
            pg_collection=groups,
        )


def build_model(
    shape: ModelShape,
    grids: Mapping[str, HyperCommGrid],
    groups: Groups,
    prepare: Callable[[MimoModel], None] = lambda model: None,
) -> MimoModel:
    """A ``MimoModel`` on this rank's grids, each submodule wrapped in DDP.

    Call ``infra.initialize_megatron`` before: Megatron draws the weights from its random states.

    Args:
        shape: sizes and training of each module.
        grids: ``infra.module_to_grid_map``.
        groups: ``infra.pg_collections``.
        prepare: called with the model before its submodules are wrapped, to freeze some, say.
    """
    model = build_bare_model(shape, groups, grids)
    prepare(model)
    for name, module in submodules(model).items():
        wrapped = DistributedDataParallel(
            config=config_of(module),
            ddp_config=DistributedDataParallelConfig(**shape.ddp.get(name, {})),
            module=module,
            pg_collection=groups[name],
        )
        if name == LANGUAGE:
            model.language_model = wrapped
        else:
            model.modality_submodules[name] = wrapped
    return model


def build_bare_model(
    shape: ModelShape, groups: Groups, grids: Mapping[str, HyperCommGrid] | None = None
) -> MimoModel:
    """The model without DDP; without ``grids``, all of it on this rank."""
    language = shape.language
    language_pg = groups[LANGUAGE]
    layer_spec = get_gpt_layer_local_spec(num_experts=language.experts, moe_grouped_gemm=False)
    attention = language.attention
    if attention is None and language_pg is not None and language_pg.cp.size() > 1:
        attention = ContextAttention
    if attention is not None:
        layer_spec.submodules.self_attention.submodules.core_attention = attention
    language_spec = ModuleSpec(
        module=GPTModel,
        params={
            "config": _config(shape, LANGUAGE, language, language_pg),
            "transformer_layer_spec": layer_spec,
            "vocab_size": language.vocabulary,
            "max_sequence_length": language.sequence,
            "pre_process": language_pg is None or language_pg.pp.rank() == 0,
            "post_process": language_pg is None
            or language_pg.pp.rank() == language_pg.pp.size() - 1,
            "share_embeddings_and_output_weights": language.tied_embeddings,
            "scatter_embedding_sequence_parallel": False,  # MimoModel scatters what it combined
            "pg_collection": language_pg,
        },
    )
    encoder_specs = {
        name: ModuleSpec(
            module=PipelinedSubmodules,
            params={
                "config": _config(shape, name, encoder, groups[name]),
                "shape": encoder,
                "pg_collection": groups[name],
                "width": language.hidden,
            },
        )
        for name, encoder in shape.encoders.items()
    }
    return MimoModel(
        MimoModelConfig(
            language_model_spec=language_spec,
            modality_submodules_spec=encoder_specs,
            special_token_ids={name: spec.token_id for name, spec in shape.encoders.items()},
            module_to_grid_map=dict(grids) if grids else None,
        ),
        tp_group=language_pg and language_pg.tp,
        cp_group=language_pg and language_pg.cp,
    ).cuda()


def submodules(model: MimoModel) -> dict[str, torch.nn.Module]:
    """The modules on this rank, by name."""
    found = dict(model.modality_submodules.items())
    if model.language_model is not None:
        found[LANGUAGE] = model.language_model
    return found


def config_of(module: torch.nn.Module) -> TransformerConfig:
    """The config of a bare module."""
    return module.encoders["transformer"].config if hasattr(module, "encoders") else module.config


def _config(
    shape: ModelShape,
    name: str,
    sizes: EncoderShape | LanguageShape,
    groups: ProcessGroupCollection | None,
) -> TransformerConfig:
    experts = getattr(sizes, "experts", None)
    mixture = (
        {
            "num_moe_experts": experts,
            "add_bias_linear": False,
            "moe_router_load_balancing_type": "none",
            "expert_model_parallel_size": groups.ep.size() if groups else 1,
            "expert_tensor_parallel_size": groups.expt_tp.size() if groups else 1,
            "sequence_parallel": bool(groups and groups.tp.size() > 1),  # Megatron insists
        }
        if experts
        else {}
    )
    return TransformerConfig(
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        tensor_model_parallel_size=groups.tp.size() if groups else 1,
        context_parallel_size=groups.cp.size() if groups else 1,
        pipeline_model_parallel_size=groups.pp.size() if groups else 1,
        calculate_per_token_loss=shape.per_token.get(name, False),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        **{"pipeline_dtype": torch.float32, **mixture, **shape.config},
    )
