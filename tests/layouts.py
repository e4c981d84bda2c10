"""Layouts, losses, data and DDP settings that many tests name."""

from megatron_mimo_coord import ModuleParallelism


def parallel(tp: int = 1, pp: int = 1, dp: int = 1, **more: int) -> ModuleParallelism:
    return ModuleParallelism(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=dp,
        **more,
    )


LAYOUTS = {
    "fan-in": {"vision": parallel(dp=2), "language": parallel()},
    "fan-in, pipeline": {"vision": parallel(dp=2), "language": parallel(pp=2)},
    "fan-out": {"vision": parallel(), "language": parallel(dp=2)},
    "fan-out, tensor parallel": {"vision": parallel(), "language": parallel(tp=2, dp=2)},
    "equal": {"vision": parallel(dp=2), "language": parallel(dp=2)},
    "two encoders": {"vision": parallel(dp=2), "audio": parallel(), "language": parallel()},
    "encoder tensor parallel": {"vision": parallel(tp=2), "language": parallel(dp=2)},
    "encoder pipeline": {"vision": parallel(pp=2, dp=2), "language": parallel()},
    "colocated": {
        "vision": parallel(dp=2, rank_offset=0),
        "language": parallel(tp=2, rank_offset=0),
    },
    "colocated, fan-out": {
        "vision": parallel(tp=2, rank_offset=0),
        "language": parallel(dp=2, rank_offset=0),
    },
}
LOSSES = {
    "mean": {},
    "per token": {"vision": True, "audio": True, "language": True},
    "language per token": {"language": True},
    "encoders per token": {"vision": True, "audio": True},
}

FAN_IN, FAN_OUT = LAYOUTS["fan-in"], LAYOUTS["fan-out"]
COLOCATED = LAYOUTS["colocated"]
OVERLAP = {"overlap_grad_reduce": True}
SHARDED = {"use_distributed_optimizer": True}
PER_TOKEN = LOSSES["per token"]
VARYING = {"vision": (((0, 2, 1, 3), (1, 0, 0, 2)), ((2, 0, 0, 0), (1, 1, 3, 0)))}
LAST_WITHOUT = {"vision": (((1, 1, 1, 1),), ((1, 1, 1, 1), (0, 0, 0, 0)), ((1, 0, 0, 0),))}
FIRST_WITHOUT = {"vision": (((0,), (0,)), ((1, 1, 0, 0), (1, 1, 0, 0)), ((1,),))}
SOME_RANKS_WITHOUT = {"vision": (((1,),), ((1, 1, 0, 0),), ((0, 0, 1, 1),), ((1,), (0,)))}
MANY_BUCKETS = {**OVERLAP, "bucket_size": 1}
MIXTURE = {"experts": 4}
