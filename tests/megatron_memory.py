"""What Megatron allocates for a module of given sizes: model, DDP and optimizer are the real ones."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import cases  # noqa: F401  # its norms take sequence parallelism
import torch
import vlm
from attrs import asdict, fields_dict
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_layer_specs,
    get_gpt_layer_local_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from megatron_mimo_coord import MegatronMIMOInfra, ModuleParallelism
from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.planning.module_sizes import ModuleSizes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def allocated(
    modules: Mapping[str, ModuleParallelism], sizes: Mapping[str, ModuleSizes]
) -> dict[str, tuple[int, int, int]]:
    """Bytes of weights, of gradient buffers and of optimizer state of each module on this rank."""
    infra = MegatronMIMOInfra.build(modules)
    found = {}
    for name, groups in infra.pg_collections.items():
        if groups is None:
            continue
        found[name] = _allocated(sizes[name], groups, sizes[LANGUAGE].hidden_size)
    infra.destroy()
    return found


def _allocated(sizes: ModuleSizes, groups: Any, width: int) -> tuple[int, int, int]:
    module = build_module(sizes, groups, width)
    if sizes.frozen:
        module.requires_grad_(False)
    ddp = DistributedDataParallel(
        config=vlm.config_of(module),
        ddp_config=DistributedDataParallelConfig(
            **_taken(DistributedDataParallelConfig, sizes), check_for_nan_in_grad=False
        ),
        module=module,
        pg_collection=groups,
    )
    settings = {"bf16": sizes.params_dtype == "bf16", "optimizer": "adam", "lr": 0.1}
    settings["use_distributed_optimizer"] = sizes.use_distributed_optimizer
    optimizer = get_megatron_optimizer(
        OptimizerConfig(**settings),
        [ddp],
        pg_collection=groups,
        use_gloo_process_groups=False,
    )
    ddp.zero_grad_buffer()
    optimizer.step()
    weights = {_storage(parameter): parameter for parameter in module.parameters()}
    buffers = [*ddp.buffers, *ddp.expert_parallel_buffers]
    kept = {_storage(tensor): tensor for tensor in _optimized(optimizer)}
    return (
        sum(storage_bytes for _, storage_bytes in weights),
        sum(buffer.grad_data.nbytes for buffer in buffers),
        sum(storage_bytes for key, storage_bytes in kept.keys() - weights.keys()),
    )


def saved(
    modules: Mapping[str, ModuleParallelism], sizes: Mapping[str, ModuleSizes], samples: int
) -> dict[str, int]:
    """Bytes that autograd keeps of a microbatch in each module of one stage on this rank."""
    infra = MegatronMIMOInfra.build(modules)
    found = {}
    for name, groups in infra.pg_collections.items():
        if groups is not None:
            module = build_module(sizes[name], groups, sizes[LANGUAGE].hidden_size)
            found[name] = _saved(module.train(), sizes[name], samples)
    infra.destroy()
    return found


def defaults() -> dict[str, Any]:
    """Megatron's defaults of those of its settings that are sizes."""
    return {
        name: setting.default
        for config in (TransformerConfig, DistributedDataParallelConfig)
        for name, setting in config.__dataclass_fields__.items()
        if name in fields_dict(ModuleSizes)
        and isinstance(setting.default, int | float | str | None)
    }


def _saved(module: Any, sizes: ModuleSizes, samples: int) -> int:
    """Bytes of the memory that saved tensors lie in, parameters left out."""
    parameters = {_storage(parameter) for parameter in module.parameters()}
    kept: list[torch.Tensor] = []  # which also keeps their memory from being used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if sizes.vocab_size is None:
            images = int(samples * sizes.max_images_per_sample)
            patches = torch.randn(images, sizes.sequence, sizes.patch_size, device="cuda")
            output = module({"images": patches})
        else:
            tokens = torch.zeros(samples, sizes.seq_length, dtype=torch.long, device="cuda")
            positions = torch.arange(sizes.seq_length, device="cuda").expand_as(tokens).contiguous()
            output = module(tokens, positions, None, labels=tokens.clone())
    storages = {_storage(tensor) for tensor in kept} - parameters
    assert output.requires_grad
    return sum(storage_bytes for _, storage_bytes in storages)


def build_module(sizes: ModuleSizes, groups: Any, width: int) -> Any:
    """A bare module, as large as the sizes say."""
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    ranks = {"tp_rank": groups.tp.rank(), "ep_rank": groups.ep.rank()}
    model_parallel_cuda_manual_seed(
        1, **ranks, etp_rank=groups.expt_tp.rank(), force_reset_rng=True
    )
    dtype = DTYPES[sizes.params_dtype]
    settings = _taken(TransformerConfig, sizes) | {"params_dtype": dtype, "pipeline_dtype": dtype}
    settings["sequence_parallel"] = sizes.sequence_parallel and groups.tp.size() > 1
    config = TransformerConfig(
        **settings,
        bf16=sizes.params_dtype == "bf16",
        tensor_model_parallel_size=groups.tp.size(),
        pipeline_model_parallel_size=groups.pp.size(),
        expert_model_parallel_size=groups.ep.size(),
        expert_tensor_parallel_size=groups.expt_tp.size(),
        moe_token_dispatcher_type="alltoall",
        variable_seq_lengths=True,
    )
    is_first, is_last = groups.pp.rank() == 0, groups.pp.rank() == groups.pp.size() - 1
    if sizes.vocab_size is None:
        shape = vlm.EncoderShape(
            patches=sizes.tokens_per_image,
            patch_dim=sizes.patch_size,
            token_id=0,
            hidden=sizes.hidden_size,
        )
        spec = partial(dict, config=config, shape=shape, pg_collection=groups, width=width)
        module = vlm.PipelinedSubmodules.from_spec(
            vlm.ModuleSpec(module=vlm.PipelinedSubmodules, params=spec()), is_first, is_last
        )
    else:
        module = GPTModel(
            config,
            _layers(config, groups),
            sizes.vocab_size,
            sizes.seq_length,
            pre_process=is_first,
            post_process=is_last,
            share_embeddings_and_output_weights=sizes.share_embeddings_and_output_weights,
            position_embedding_type=sizes.position_embedding_type,
            pg_collection=groups,
        )
    return module.to("cuda", dtype)


def _layers(config: TransformerConfig, groups: Any) -> Any:
    """What layers are made of, for those of this stage."""
    if config.num_moe_experts is None or config.moe_layer_freq == 1:
        return get_gpt_layer_local_spec(
            config.num_moe_experts, False, config.qk_layernorm, normalization=config.normalization
        )
    layers = get_gpt_decoder_layer_specs(config, False, config.normalization)
    own = config.num_layers // groups.pp.size()
    start = own * groups.pp.rank()
    block = vlm.TransformerBlock.__init__.__globals__["TransformerBlockSubmodules"]
    norm = layers[0].submodules.input_layernorm
    return block(layer_specs=layers[start : start + own], layer_norm=norm)


def _taken(config: type, sizes: ModuleSizes) -> dict[str, Any]:
    """The sizes that a dataclass of Megatron's has by the same name."""
    names = config.__dataclass_fields__.keys() & asdict(sizes).keys()
    skipped = {"attention_backend"}
    if sizes.num_moe_experts is None:
        skipped |= {name for name in names if name.startswith("moe_")}
    taken = {name: getattr(sizes, name) for name in names - skipped}
    return {name: list(each) if isinstance(each, tuple) else each for name, each in taken.items()}


def _optimized(optimizer: Any) -> Iterable[torch.Tensor]:
    """The tensors of Adam: what it updates, and its state."""
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        if inner.optimizer is None:
            continue
        for group in inner.optimizer.param_groups:
            yield from group["params"]
        for state in inner.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    """Which memory a tensor lies in, and its bytes."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
