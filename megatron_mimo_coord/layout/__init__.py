"""Sizes, ranks and batches in plain integers: what a layout is, and what must hold of it.

Runs on a laptop, on every rank (in or out of a grid) and for layouts of any size. This room imports
neither torch nor Megatron, and of this package nothing but itself.

Vocabulary, kept everywhere in the package:

    module       a part of the model with its own grid: ``"language"``, ``"vision"``, ...
    grid         a box of consecutive ranks with named dims; the first dim varies fastest
    dim          one axis of a grid: ``tp``, ``cp``, ``dp``, ``pp``
    replicas     R_m = DP x CP of module m, the group that Megatron's DDP reduces it over
    stage        one of the PP parts of a module; its ranks run the same layers
    bridge       the edge of the topology over which an encoder sends to the language model
    link         a bridge, or the way from one stage of a module to the next
    lane         one of the ranks that hold the same tensors at one end of a link (TP ranks)
    header       what the host of a sender tells the receiver's about a tensor on a link
    fan-in       a bridge from more data-parallel ranks to fewer; fan-out is the reverse
    colocated    all modules on the same ranks; disjoint is the reverse
    slice        the equal, consecutive part of a microbatch's samples that a DP rank reads
    assignment   which DP rank of an encoder encodes each image of a microbatch
    microbatch   samples that pass through the model together, counted over all ranks
    scaling      c_m, from what DDP delivers for module m to the gradient of the loss; what DDP
                 itself multiplies a bucket by is the bucket's factor
    problem      a sentence about something that keeps a job from running, with what to change
"""

from megatron_mimo_coord.layout.fields import MAX_RANKS, is_count, shown
from megatron_mimo_coord.layout.gradient_scaling import gradient_scaling_factor
from megatron_mimo_coord.layout.grids import (
    LANGUAGE,
    ModuleGrid,
    Topology,
    default_topology,
    is_colocated,
    modules_by_stage,
    overlap,
    pack,
    ranks_taken,
    runs_encoders_first,
    sharing,
    span,
    stages_behind,
)
from megatron_mimo_coord.layout.parallelism import (
    DIM_NAMES,
    EXPERT_DIM_NAMES,
    SIZE_FIELDS,
    ModuleParallelism,
)

__all__ = [
    "DIM_NAMES",
    "EXPERT_DIM_NAMES",
    "LANGUAGE",
    "MAX_RANKS",
    "SIZE_FIELDS",
    "ModuleGrid",
    "ModuleParallelism",
    "Topology",
    "default_topology",
    "gradient_scaling_factor",
    "is_colocated",
    "is_count",
    "modules_by_stage",
    "overlap",
    "pack",
    "ranks_taken",
    "runs_encoders_first",
    "sharing",
    "shown",
    "span",
    "stages_behind",
]
