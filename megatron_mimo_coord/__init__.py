"""One coordinator for heterogeneous multi-module (MIMO) training with Megatron-Core."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_mimo_coord.coordinator import MultiModuleCoordinator
    from megatron_mimo_coord.infra import (
        MegatronMIMOInfra,
        is_current_rank_in_grid,
        validate_data_loader_contract,
        validate_no_stub_ranks,
    )
    from megatron_mimo_coord.layout import ModuleParallelism
    from megatron_mimo_coord.layout.toml_file import read_layout
    from megatron_mimo_coord.megatron.mimo_model import unwrap_mimo_model
    from megatron_mimo_coord.training.checkpoint_folder import checkpoint_steps
    from megatron_mimo_coord.world.process_group import init_process_group

__version__ = "0.3.0"

__all__ = [
    "MegatronMIMOInfra",
    "ModuleParallelism",
    "MultiModuleCoordinator",
    "checkpoint_steps",
    "init_process_group",
    "is_current_rank_in_grid",
    "read_layout",
    "unwrap_mimo_model",
    "validate_data_loader_contract",
    "validate_no_stub_ranks",
]

_HOMES = {
    "MultiModuleCoordinator": "coordinator",
    "unwrap_mimo_model": "megatron.mimo_model",
    "MegatronMIMOInfra": "infra",
    "is_current_rank_in_grid": "infra",
    "validate_data_loader_contract": "infra",
    "validate_no_stub_ranks": "infra",
    "ModuleParallelism": "layout",
    "checkpoint_steps": "training.checkpoint_folder",
    "init_process_group": "world.process_group",
    "read_layout": "layout.toml_file",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is used, so that the arithmetic alone needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
