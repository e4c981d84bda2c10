"""When parameters are gathered: as a step begins, in one order on every rank.

With ``overlap_param_gather`` Megatron gathers the parameters that the distributed optimizer has
updated from forward, bucket group after bucket group. A rank without an image does not run the
encoder's forward, and its peers would wait for ever. Here every rank launches all gathers as a step
begins, in the order in which forward waits for them.
"""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_mimo_coord.gradients.launch_order import in_order_of_backward


class ParamGather:
    """The gathering of parameters of modules that lie on the same ranks.

    Args:
        ddps: the modules, in the order in which backward reaches them.
    """

    def __init__(self, ddps: Sequence[DistributedDataParallel]) -> None:
        self._ddps = [ddp for ddp in ddps if ddp.ddp_config.overlap_param_gather]
        groups = [(ddp, group) for ddp in self._ddps for group in in_order_of_backward(ddp)]
        self._in_order_of_forward = groups[::-1]
        for _, group in groups:
            group.next_param_gather_bucket_group = None  # launched with all others, not in a chain

    def launch(self) -> None:
        """Launch the gathers that forward waits for.

        Only forward hooks of DDP wait for them. Where they are off, as in the first step of
        Megatron-LM's training loop, parameters are as they must be.
        """
        for ddp, group in self._in_order_of_forward:
            if ddp.remove_forward_pre_hook_handles and not group.param_gather_dispatched:
                group.start_param_sync()

    def wait(self) -> None:
        """Wait for the gathers that this step's forward did not wait for."""
        for _, group in self._in_order_of_forward:
            if group.param_gather_handle is not None:
                group.finish_param_sync(skip_next_bucket_dispatch=True)

    def gather_now(self) -> None:
        """Wait until this rank's parameters are those of the last update, which come late.

        Megatron gathers them once a step, from the first forward after ``zero_grad_buffer``; who
        reads them before sees those of other replicas as they were. Collective in the module.
        """
        for ddp in self._ddps:
            with torch.no_grad():
                ddp.start_param_sync(force_sync=True)
