"""What a coordinator looks for in a module before it takes charge of it."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo import MimoModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mimo_coord.infra import Infra
from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid
from megatron_mimo_coord.layout.problems import listed
from megatron_mimo_coord.megatron.ddp import ModuleDdp
from megatron_mimo_coord.megatron.module_configs import SIZES, configs_inside
from megatron_mimo_coord.megatron.parameters import layers_on_other_ranks, unmarked_weights


def find_ddp(model: MimoModel, name: str) -> DistributedDataParallel | None:
    """The DDP of a module, which ``Float16Module`` may be around."""
    module: Any = _submodule(model, name)
    while module is not None and not isinstance(module, DistributedDataParallel):
        module = getattr(module, "module", None)
    return module


_OF_A_MODEL = (
    *SIZES,
    *("normalization", "layernorm_epsilon", "add_bias_linear", "hidden_dropout"),
    *("attention_dropout", "moe_router_topk", "sequence_parallel", "params_dtype"),
)
"""Settings of a config that are one model's, whatever the stage or replica."""


def module_facts(ddp: ModuleDdp) -> dict[str, str]:
    """What all ranks of a module must agree about."""
    config = vars(ddp.ddp.config)
    facts = {name: str(config.get(name)) for name in _OF_A_MODEL}
    facts |= {name: str(value) for name, value in vars(ddp.settings).items()}
    return {"calculate_per_token_loss": str(ddp.delivers_sum), **facts}


def module_problems_here(model: MimoModel, infra: Infra, grid: ModuleGrid) -> Iterator[str]:
    """What keeps a module that belongs on this rank from being coordinated."""
    name, wrapped = grid.name, find_ddp(model, grid.name)
    groups = infra.pg_collections.get(name)
    if _submodule(model, name) is None:
        yield (
            f"infra places module {name!r} on this rank, but the model has no such module "
            f"here: give MimoModelConfig the same module_to_grid_map and a spec for {name!r}"
        )
    elif wrapped is None:
        yield (
            f"module {name!r} is not wrapped in megatron.core.distributed."
            f"DistributedDataParallel: wrap each submodule of the MimoModel, frozen ones too"
        )
    elif groups is None:
        yield (
            f"infra has no process groups for module {name!r} on a rank of its grid: fill "
            f"pg_collections[{name!r}] there"
        )
    else:
        yield from _ddp_problems(wrapped, grid, groups)
        delivers_sum = bool(wrapped.config.calculate_per_token_loss)
        per_token = bool(model.config.calculate_per_token_loss)
        if name == LANGUAGE and delivers_sum != per_token:
            yield (
                f"the language model's DDP was built with calculate_per_token_loss={delivers_sum}, "
                f"but the MimoModel's config says {per_token}: use one config for both"
            )


def _ddp_problems(
    wrapped: DistributedDataParallel, grid: ModuleGrid, groups: ProcessGroupCollection
) -> Iterator[str]:
    name, ddp = grid.name, ModuleDdp(wrapped)
    elsewhere = list(layers_on_other_ranks(wrapped, groups))
    if elsewhere:
        yield (
            f"tensor-parallel layers of module {name!r} ({listed(elsewhere)}) are shared out over "
            f"other ranks than those of the module's tp group: build them, and what is around "
            f"them, with tp_group or pg_collection of infra.pg_collections[{name!r}]"
        )
    late = ddp.frozen_since()
    if late and ddp.settings.use_distributed_optimizer:
        yield (
            f"weights of module {name!r} were frozen after its DDP was put around it "
            f"({listed(late)}), and the distributed optimizer looks for them: freeze before"
        )
    if ddp.replicas != grid.replicas:
        yield (
            f"module {name!r} is reduced over {ddp.replicas} ranks by its DDP, but "
            f"its grid has DP x CP = {grid.replicas}: pass pg_collections[{name!r}] to the DDP"
        )
    if not ddp.owns_its_gradients:
        yield (
            f"the gradients of module {name!r} go to the buffers of another DDP: wrap its "
            f"parameters once, in the DDP of the submodule and not around the MimoModel as well; "
            f"no other module may share them"
        )
    misplaced = ddp.misplaced()
    if misplaced:
        yield (
            f"weights of module {name!r} were moved or converted after its DDP was put around it "
            f"({listed(misplaced)}), and would not be trained: convert before, as Float16Module "
            f"does, which goes around the model before wrap_in_ddp"
        )
    told = {config.context_parallel_size for config in configs_inside(wrapped.module)}
    if told - {grid.dim("cp")}:
        yield (
            f"module {name!r} has CP {grid.dim('cp')} in its grid, but its config says "
            f"context_parallel_size={max(told)}, by which Megatron shares out sequences: give both "
            f"the same"
        )
    # Parameters are gathered as a step begins, when the gradients have been zeroed.
    advice = ""
    if ddp.settings.reuse_grad_buf_for_mxfp8_param_ag:
        advice = "set reuse_grad_buf_for_mxfp8_param_ag=False, or overlap_param_gather=False"
    elif not ddp.settings.use_distributed_optimizer:
        advice = "set use_distributed_optimizer=True, or overlap_param_gather=False"
    if ddp.settings.overlap_param_gather and advice:
        yield (
            f"the DDP of module {name!r} gathers parameters into its gradient buffer, and a rank "
            f"whose microbatches do not use them would find them there instead of gradients: "
            f"{advice}"
        )
    inside = [weight for weight, is_inside in unmarked_weights(wrapped) if is_inside]
    if inside:
        yield (
            f"module {name!r} is sequence-parallel, and its replicated weights {listed(inside)} do "
            f"not say what they are applied to: their gradients would be wrong; {_MARK}"
        )


_MARK = (
    "set parameter.sequence_parallel = True where it is applied to a part of the sequence, so that "
    "its gradient is summed over tensor-parallel ranks, or False where to the whole"
)


def weight_problems_here(
    model: MimoModel, ddps: Mapping[str, DistributedDataParallel]
) -> Iterator[str]:
    """Weights of this rank that are to be trained, and that nobody would train."""
    trained = {id(param) for ddp in ddps.values() for param in ModuleDdp(ddp).params}
    left = [
        name.replace(".module.", ".")
        for name, param in model.named_parameters()
        if param.requires_grad and id(param) not in trained
    ]
    if left:
        yield (
            f"{listed(left)} of the model need a gradient, but no DDP reduces it: they would stay "
            f"as they are; put them into a module, and have them need one before its DDP is put "
            f"around it, or set requires_grad = False"
        )


def remarks(
    ddp: DistributedDataParallel, grid: ModuleGrid, language: ModuleGrid, per_token: bool
) -> Iterator[str]:
    """What a user should know of a module that can be coordinated.

    The auxiliary loss of a mixture-of-experts encoder is no part of the one loss whose gradient the
    coordinator makes: each replica adds the gradient of its own to what flows back from the
    language model, and is scaled like it.
    """
    outside = [weight for weight, is_inside in unmarked_weights(ddp) if not is_inside]
    if outside:
        yield (
            f"module {grid.name} is sequence-parallel, and its replicated weights "
            f"{listed(outside)} are taken to see the whole sequence; else {_MARK}"
        )
    config = ddp.config
    given = config.moe_aux_loss_coeff
    coefficients = [*given] if isinstance(given, list) else [given]
    coefficients.append(config.moe_z_loss_coeff or 0.0)
    if grid.name != LANGUAGE and config.num_moe_experts and any(coefficients):
        of_language = f"the language model's DP {language.data_parallel_size}"
        yield (
            f"module {grid.name}: the auxiliary loss of its mixture of experts follows the layout: "
            f"a sum over its {grid.replicas} replicas, divided by "
            f"{'the tokens of the step' if per_token else of_language}; adapt moe_aux_loss_coeff "
            f"and moe_z_loss_coeff where you change its data_parallel_size"
        )


def _submodule(model: MimoModel, name: str) -> torch.nn.Module | None:
    if name == LANGUAGE:
        return model.language_model
    return dict(model.modality_submodules.items()).get(name)
