"""What the forkserver of ``ranks.py`` imports once for all ranks."""

import gc
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import digits  # noqa: F401
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import stock_draws  # noqa: F401

    import megatron_mimo_coord.cpu.cuda_means_cpu
    from megatron_mimo_coord import MultiModuleCoordinator  # noqa: F401

    list(megatron_mimo_coord.cpu.cuda_means_cpu.replacements())

gc.freeze()  # ranks collect their garbage after each call: among what is theirs
