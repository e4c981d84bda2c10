"""Weights drawn by name, so that every layout of the tests, and their oracle, hold the same model."""

from collections.abc import Callable, Iterator
from zlib import crc32

import torch
import vlm
from attrs import frozen
from megatron.core.models.mimo import MimoModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_mimo_coord import MegatronMIMOInfra

SEED = 1


def build_model(
    shape: vlm.ModelShape,
    infra: MegatronMIMOInfra,
    prepare: Callable[[MimoModel], None] = lambda model: None,
) -> MimoModel:
    """The examples' model on this rank, its weights drawn by name."""
    infra.initialize_megatron(SEED)

    def draw_and_prepare(model: MimoModel) -> None:
        draw(model, infra.pg_collections)
        prepare(model)

    return vlm.build_model(
        shape, infra.module_to_grid_map, infra.pg_collections, prepare=draw_and_prepare
    )


def draw(model: MimoModel, groups: vlm.Groups) -> None:
    """Draw all weights of a bare model by name."""
    with torch._C._DisableTorchDispatch():  # no rehearsal needs to see it
        for name, module in vlm.submodules(model).items():
            draw_by_name(name, module, groups[name], SEED)


@frozen
class Shard:
    """Which part of a weight a rank holds: part ``index`` of ``count`` along ``dim``."""

    dim: int
    index: int
    count: int

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of the whole weight."""
        return whole.chunk(self.count, dim=self.dim)[self.index]


def named_shards(
    module_name: str, module: torch.nn.Module, groups: ProcessGroupCollection
) -> Iterator[tuple[str, torch.nn.Parameter, Shard]]:
    """Each parameter under the name that it has in the whole model, and the part that is here."""
    renamed = {}
    for prefix, block in module.named_modules():
        if isinstance(block, TransformerBlock):
            for index, layer in enumerate(block.layers):
                renamed[f"{prefix}.layers.{index}."] = f"{prefix}.layers.{layer.layer_number - 1}."
    for name, parameter in module.named_parameters():
        tp, name_here = groups.tp, name
        for local, everywhere in renamed.items():
            if name.startswith(local):
                name = everywhere + name.removeprefix(local)
                break
        if ".local_experts." in name:
            tp = groups.expt_tp
            before, after = name.split(".local_experts.")
            expert, rest = after.split(".", 1)
            mixture = name_here.split(".local_experts.")[0]
            local_experts = len(module.get_submodule(f"{mixture}.local_experts"))
            name = f"{before}.experts.{groups.ep.rank() * local_experts + int(expert)}.{rest}"
        if name == "output_layer.weight" and module.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"
        split = getattr(parameter, "tensor_model_parallel", False) and tp.size() > 1
        shard = Shard(parameter.partition_dim, tp.rank(), tp.size()) if split else Shard(0, 0, 1)
        yield f"{module_name}.{name}", parameter, shard


@torch.no_grad()
def draw_by_name(
    module_name: str, module: torch.nn.Module, groups: ProcessGroupCollection, seed: int
) -> None:
    """Draw each matrix from a generator seeded by its name: the same model on every layout."""
    for name, parameter, shard in named_shards(module_name, module, groups):
        if parameter.ndim < 2:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)  # a norm's weight, or a bias
            continue
        whole = list(parameter.shape)
        whole[shard.dim] *= shard.count
        generator = torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))
        weight = torch.randn(whole, generator=generator) * (0.5 / whole[-1] ** 0.5)
        parameter.copy_(shard.of(weight))
