"""What a coordinator looks for in a module before it takes charge of it."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo import MimoModel

from megatron_mimo_coord.checks.sequence_parallel import weight_problems
from megatron_mimo_coord.infra import Infra
from megatron_mimo_coord.layout import LANGUAGE, ModuleGrid
from megatron_mimo_coord.layout.problems import listed
from megatron_mimo_coord.megatron.ddp import ModuleDdp
from megatron_mimo_coord.megatron.module_configs import configs_inside
from megatron_mimo_coord.megatron.parameters import layers_on_other_ranks


def find_ddp(model: MimoModel, name: str) -> DistributedDataParallel | None:
    """The DDP of a module, which ``Float16Module`` may be around."""
    module: Any = _submodule(model, name)
    while module is not None and not isinstance(module, DistributedDataParallel):
        module = getattr(module, "module", None)
    return module


def ddp_facts(ddp: ModuleDdp) -> dict[str, str]:
    """What all ranks of a module must agree about."""
    settings = {name: str(value) for name, value in vars(ddp.settings).items()}
    return {"calculate_per_token_loss": str(ddp.delivers_sum), **settings}


def module_problems_here(model: MimoModel, infra: Infra, grid: ModuleGrid) -> list[str]:
    """What keeps a module that belongs on this rank from being coordinated."""
    name = grid.name
    if _submodule(model, name) is None:
        return [
            f"infra places module {name!r} on this rank, but the model has no such module "
            f"here: give MimoModelConfig the same module_to_grid_map and a spec for {name!r}"
        ]
    wrapped = find_ddp(model, name)
    if wrapped is None:
        return [
            f"module {name!r} is not wrapped in megatron.core.distributed."
            f"DistributedDataParallel: wrap each submodule of the MimoModel, frozen ones too"
        ]
    groups = infra.pg_collections.get(name)
    if groups is None:
        return [
            f"infra has no process groups for module {name!r} on a rank of its grid: fill "
            f"pg_collections[{name!r}] there"
        ]
    found = []
    ddp = ModuleDdp(wrapped)
    elsewhere = list(layers_on_other_ranks(wrapped, groups))
    if elsewhere:
        found.append(
            f"tensor-parallel layers of module {name!r} ({listed(elsewhere)}) are shared out over "
            f"other ranks than those of the module's tp group: build them, and what is around "
            f"them, with tp_group or pg_collection of infra.pg_collections[{name!r}]"
        )
    late = ddp.frozen_since()
    if late and ddp.settings.use_distributed_optimizer:
        found.append(
            f"weights of module {name!r} were frozen after its DDP was put around it "
            f"({listed(late)}), and the distributed optimizer looks for them: freeze before"
        )
    if ddp.replicas != grid.replicas:
        found.append(
            f"module {name!r} is reduced over {ddp.replicas} ranks by its DDP, but "
            f"its grid has DP x CP = {grid.replicas}: pass pg_collections[{name!r}] to the DDP"
        )
    if not ddp.owns_its_gradients:
        found.append(
            f"the gradients of module {name!r} go to the buffers of another DDP: wrap its "
            f"parameters once, in the DDP of the submodule and not around the MimoModel as well"
        )
    misplaced = ddp.misplaced()
    if misplaced:
        found.append(
            f"weights of module {name!r} were moved or converted after its DDP was put around it "
            f"({listed(misplaced)}), and would not be trained: convert before, as Float16Module "
            f"does, which goes around the model before wrap_in_ddp"
        )
    told = {config.context_parallel_size for config in configs_inside(wrapped.module)}
    if told - {grid.dim("cp")}:
        found.append(
            f"module {name!r} has CP {grid.dim('cp')} in its grid, but its config says "
            f"context_parallel_size={max(told)}, by which Megatron shares out sequences: give both "
            f"the same"
        )
    found += _gather_problems(name, ddp.settings)
    found += weight_problems(name, wrapped)
    per_token = bool(model.config.calculate_per_token_loss)
    if name == LANGUAGE and ddp.delivers_sum != per_token:
        found.append(
            f"the language model's DDP was built with calculate_per_token_loss={ddp.delivers_sum}, "
            f"but the MimoModel's config says {per_token}: use one config for both"
        )
    return found


def weight_problems_here(
    model: MimoModel, ddps: Mapping[str, DistributedDataParallel]
) -> list[str]:
    """Weights of this rank that are to be trained, and that nobody would train."""
    trained = {id(param) for ddp in ddps.values() for param in ModuleDdp(ddp).params}
    left = [
        name.replace(".module.", ".")
        for name, param in model.named_parameters()
        if param.requires_grad and id(param) not in trained
    ]
    if not left:
        return []
    return [
        f"{listed(left)} of the model need a gradient, but no DDP reduces it: they would stay as "
        f"they are; put them into a module, and have them need one before its DDP is put around "
        f"it, or set requires_grad = False"
    ]


def auxiliary_loss_remark(
    ddp: DistributedDataParallel, grid: ModuleGrid, language: ModuleGrid, per_token: bool
) -> str:
    """What a mixture-of-experts encoder's auxiliary loss weighs, if it has one.

    It is no part of the one loss whose gradient the coordinator makes: each replica adds the
    gradient of its own to what flows back from the language model, and is scaled like it.
    """
    config = ddp.config
    given = config.moe_aux_loss_coeff
    coefficients = [*given] if isinstance(given, list) else [given]
    coefficients.append(config.moe_z_loss_coeff or 0.0)
    if grid.name == LANGUAGE or not config.num_moe_experts or not any(coefficients):
        return ""
    divisor = (
        "the tokens of the step"
        if per_token
        else f"the language model's DP {language.data_parallel_size}"
    )
    return (
        f"module {grid.name}: the auxiliary loss of its mixture of experts follows the layout: a "
        f"sum over its {grid.replicas} replicas, divided by {divisor}; adapt moe_aux_loss_coeff "
        f"and moe_z_loss_coeff where you change its data_parallel_size"
    )


def _gather_problems(name: str, settings: Any) -> list[str]:
    """Parameters are gathered as a step begins, when the gradients have been zeroed."""
    if not settings.overlap_param_gather:
        return []
    if settings.reuse_grad_buf_for_mxfp8_param_ag:
        advice = "set reuse_grad_buf_for_mxfp8_param_ag=False, or overlap_param_gather=False"
    elif not settings.use_distributed_optimizer:
        advice = "set use_distributed_optimizer=True, or overlap_param_gather=False"
    else:
        return []
    return [
        f"the DDP of module {name!r} gathers parameters into its gradient buffer, and a rank whose "
        f"microbatches do not use them would find them there instead of gradients: {advice}"
    ]


def _submodule(model: MimoModel, name: str) -> torch.nn.Module | None:
    if name == LANGUAGE:
        return model.language_model
    return dict(model.modality_submodules.items()).get(name)
