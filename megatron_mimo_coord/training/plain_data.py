"""Nested Python data as JSON and tensors, and back exactly as it was. Nothing is pickled."""

from typing import Any

import torch

_TENSOR, _SCALAR, _TUPLE = "$tensor", "$scalar", "$tuple"


def encode(value: Any, tensors: list[torch.Tensor] | None = None, where: str = "extra") -> Any:
    """What JSON can say of a value.

    Args:
        value: dicts with string keys, lists, tuples, strings, numbers, booleans, None, tensors.
        tensors: where tensors with dims are put; JSON then has their number.
        where: the value's name, for the error.

    Raises:
        ValueError: something else is inside; names where.

    Example:
        >>> encode({"betas": (0.9, 0.95), "scale": torch.tensor(2.0)})
        {'betas': {'$tuple': [0.9, 0.95]}, 'scale': {'$scalar': ['float32', 2.0]}}
        >>> encode({"sampler": {3: "odd"}})
        Traceback (most recent call last):
        ValueError: extra['sampler'] has the key 3: use strings that do not begin with $
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        items = [encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if type(value) is list else {_TUPLE: items}
    if type(value) is dict:
        for key in value:
            if type(key) is not str or key.startswith("$"):
                raise ValueError(
                    f"{where} has the key {key!r}: use strings that do not begin with $"
                )
        return {key: encode(item, tensors, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, torch.Tensor) and not value.dtype.is_complex:
        if value.ndim == 0:
            return {_SCALAR: [str(value.dtype).removeprefix("torch."), value.item()]}
        if tensors is not None:
            tensors.append(value)
            return {_TENSOR: len(tensors) - 1}
    raise ValueError(
        f"{where} is a {type(value).__name__}: a checkpoint takes dicts, lists, tuples, strings, "
        f"numbers, booleans, None and tensors, because nothing in it is pickled"
    )


def decode(value: Any, tensors: list[torch.Tensor] | None = None) -> Any:
    """The value that :func:`encode` was given.

    Example:
        >>> decode({"betas": {"$tuple": [0.9, 0.95]}})
        {'betas': (0.9, 0.95)}
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TUPLE in value:
        return tuple(decode(item, tensors) for item in value[_TUPLE])
    if _SCALAR in value:
        dtype, number = value[_SCALAR]
        return torch.tensor(number, dtype=getattr(torch, dtype), device="cpu")
    if _TENSOR in value:
        assert tensors is not None, "who encoded tensors decodes them"
        return tensors[value[_TENSOR]]
    return {key: decode(item, tensors) for key, item in value.items()}
