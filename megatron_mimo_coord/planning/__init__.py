"""What a layout costs before it runs: simulation, memory, search, drawings, the two commands.

This room imports neither torch (but ``measure`` when it is called) nor Megatron, and of this
package only ``layout``.
"""

from megatron_mimo_coord.planning.costs import Cluster, ModuleCosts
from megatron_mimo_coord.planning.memory import StageMemory, layout_memory
from megatron_mimo_coord.planning.model_file import read_model
from megatron_mimo_coord.planning.module_sizes import ModuleSizes
from megatron_mimo_coord.planning.simulation import simulate_step
from megatron_mimo_coord.planning.timeline import Span, StageShares, Timeline

__all__ = [
    "Cluster",
    "ModuleCosts",
    "ModuleSizes",
    "Span",
    "StageMemory",
    "StageShares",
    "Timeline",
    "layout_memory",
    "read_model",
    "simulate_step",
]
