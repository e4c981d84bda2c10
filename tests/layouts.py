"""Layouts, losses, data and DDP settings that many tests name."""

from collections.abc import Mapping
from typing import Any

from attrs import Factory, fields

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

# -- short names, for the ids of tests ---------------------------------------------------------------

IMAGES = {
    "varying images": VARYING,
    "last microbatch without images": LAST_WITHOUT,
    "first microbatch without images": FIRST_WITHOUT,
    "some ranks without images": SOME_RANKS_WITHOUT,
}
DDP_SETTINGS = {
    "overlap_grad_reduce": "overlap",
    "use_distributed_optimizer": "sharded",
    "bucket_size": "many buckets",
    "overlap_param_gather": "gather",
    "align_param_gather": "aligned",
    "average_in_collective": "averaging",
    "grad_reduce_in_fp32": "fp32",
}
LENGTH = 60


def layout_name(modules: Mapping[str, ModuleParallelism]) -> str:
    """A layout's name in ``LAYOUTS``, or the sizes that are not 1."""
    for name, layout in LAYOUTS.items():
        if modules == layout:
            return name
    return " -> ".join(f"{name} {_sizes(module)}".strip() for name, module in modules.items())


def _sizes(module: ModuleParallelism) -> str:
    sizes = {
        "TP": module.tensor_model_parallel_size,
        "CP": module.context_parallel_size,
        "PP": module.pipeline_model_parallel_size,
        "DP": module.data_parallel_size,
        "EP": module.expert_model_parallel_size,
    }
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)


def case_name(case: Any) -> str:
    """What tells a case from others: its layout and whatever is not the default."""
    parts = [layout_name(case.modules)]
    for field in fields(type(case)):
        value = getattr(case, field.name)
        default = field.default.factory() if isinstance(field.default, Factory) else field.default
        unnamed = ("modules", "steps", "num_microbatches", "seed", "rehearse")
        if value == default or field.name in unnamed:
            continue
        if field.name == "per_token":
            parts.append(_named(value, LOSSES, "some per token"))
        elif field.name == "images":
            parts.append(_named(value, IMAGES, "images"))
        elif field.name == "ddp":
            parts += [DDP_SETTINGS.get(name, name) for name, setting in value.items() if setting]
        elif field.name == "frozen":
            parts.append(f"frozen {' '.join(value)}".rstrip("."))
        else:
            parts.append(field.name.replace("_", " "))
    return ", ".join(parts)[:LENGTH]


def _named(value: Any, names: Mapping[str, Any], otherwise: str) -> str:
    return next((name for name, each in names.items() if each == value), otherwise)
