"""When parameters are gathered: as a step begins, in one order on every rank.

With ``overlap_param_gather`` Megatron gathers the parameters that the distributed optimizer has
updated from forward, bucket group after bucket group. A rank without an image does not run the
encoder's forward, and its peers would wait for ever. Here every rank launches all gathers as a step
begins, in the order in which forward waits for them.
"""

from collections.abc import Sequence

from megatron_mimo_coord.gradients.launch_order import in_order_of_backward
from megatron_mimo_coord.megatron.changes import Changes
from megatron_mimo_coord.megatron.ddp import ModuleDdp


class ParamGather:
    """The gathering of parameters of modules that lie on the same ranks.

    Args:
        ddps: the modules, in the order in which backward reaches them.
        changes: where is recorded that gathers are launched together and not in a chain.
    """

    def __init__(self, ddps: Sequence[ModuleDdp], changes: Changes) -> None:
        self._ddps = [ddp for ddp in ddps if ddp.settings.overlap_param_gather]
        groups = [(ddp, group) for ddp in self._ddps for group in in_order_of_backward(ddp)]
        self._in_order_of_forward = groups[::-1]
        for _, group in groups:
            group.unchain_gather(changes)

    def launch(self) -> None:
        """Launch the gathers that forward waits for."""
        for ddp, group in self._in_order_of_forward:
            if ddp.waits_in_forward:
                group.gather()

    def wait(self) -> None:
        """Wait for the gathers that this step's forward did not wait for."""
        for _, group in self._in_order_of_forward:
            group.finish_gather()

    def gather_now(self) -> None:
        """Wait until this rank's parameters are those of the last update, which come late.

        Megatron gathers them once a step, from the first forward after ``zero_grad_buffer``; who
        reads them before sees those of other replicas as they were. Collective in the module.
        """
        for ddp in self._ddps:
            ddp.gather_now()
