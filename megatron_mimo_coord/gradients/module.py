"""The gradients of one module on this rank: its DDP, and what finalizing them takes."""

from copy import copy

from attrs import frozen
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mimo_coord.gradients.scaling import GradientScaling
from megatron_mimo_coord.layout import LANGUAGE
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.ddp import ModuleDdp


@frozen
class ModuleGradients:
    """A module that lives on this rank.

    Args:
        name: the module.
        ddp: its DDP.
        pg_collection: the module's process groups.
        pg_collection_to_finalize: the same as Megatron's ``finalize_model_grads`` is to see them.
        scaling: what they are multiplied by.
    """

    name: str
    ddp: ModuleDdp
    pg_collection: ProcessGroupCollection
    pg_collection_to_finalize: ProcessGroupCollection
    scaling: GradientScaling

    @classmethod
    def collect(
        cls,
        name: str,
        ddp: ModuleDdp,
        pg_collection: ProcessGroupCollection,
        factor: float,
        changes: Changes,
    ) -> "ModuleGradients":
        """Take charge of a module's gradients.

        Args:
            name: the module.
            ddp: its DDP.
            pg_collection: the module's process groups.
            factor: c_m of :func:`megatron_mimo_coord.layout.gradient_scaling_factor`.
            changes: where is recorded what is changed in the DDP.
        """
        to_finalize = pg_collection
        if name != LANGUAGE:
            # Encoders tie no word embeddings, but Megatron looks for them where there is a group.
            to_finalize = copy(pg_collection)
            to_finalize.embd = to_finalize.pos_embd = None
        return cls(
            name=name,
            ddp=ddp,
            pg_collection=pg_collection,
            pg_collection_to_finalize=to_finalize,
            scaling=GradientScaling(ddp, factor, changes),
        )
