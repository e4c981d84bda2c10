"""The process groups of Megatron's own bridges between modules, which outlive them.

Leans on ``BridgeCommunicator`` giving back what it keeps for the whole process; where it does not,
a later layout in the same process may be given groups of the one before.
"""

from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator


def destroy_bridge_groups() -> None:
    """Give them back."""
    BridgeCommunicator.destroy_broadcast_pgs()
    BridgeCommunicator.destroy_bridge_pgs()
