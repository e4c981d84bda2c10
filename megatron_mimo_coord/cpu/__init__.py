"""Megatron-Core on CPU ranks over gloo, and there a rehearsal of what NCCL demands.

Nothing else in this package knows about this room, and nothing in it happens before
:func:`enable_cpu_ranks` is called: on GPUs no line of it runs.
"""

from megatron_mimo_coord.cpu.host_sync import no_host_sync
from megatron_mimo_coord.cpu.ranks import enable_cpu_ranks
from megatron_mimo_coord.cpu.works import end_of_step

__all__ = ["enable_cpu_ranks", "end_of_step", "no_host_sync"]
