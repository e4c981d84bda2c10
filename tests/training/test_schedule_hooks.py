"""Who owns a hook of a config, from one coordinator to the next."""

import pytest
from megatron.core.model_parallel_config import ModelParallelConfig

from megatron_mimo_coord.training.schedule_hooks import install_hooks


def ours() -> None: ...
def theirs() -> None: ...
def later() -> None: ...


def test_a_later_coordinator_takes_back_what_it_does_not_need():
    config = ModelParallelConfig()
    install_hooks(config, {"no_sync_func": ours, "grad_scale_func": ours})
    install_hooks(config, {"no_sync_func": later})
    assert (config.no_sync_func, config.grad_scale_func) == (later, None)


def test_hooks_of_others_stay():
    config = ModelParallelConfig()
    install_hooks(config, {"no_sync_func": ours, "grad_scale_func": ours})
    config.grad_scale_func = theirs
    install_hooks(config, {"no_sync_func": later})
    assert config.grad_scale_func is theirs
    with pytest.raises(ValueError, match=r"config\.grad_scale_func is already <function theirs"):
        install_hooks(config, {"no_sync_func": ours, "grad_scale_func": ours})
    assert config.no_sync_func is later, "nothing is set then"
