"""Nested Python data and tensors as JSON, and back as they were. Nothing is pickled."""

import base64
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

_BYTES, _TENSOR, _TUPLE, _COUNTER = "$bytes", "$tensor", "$tuple", "$counter"
_MAX_DEPTH = 100


def encode(value: Any, where: str = "extra", depth: int = 0) -> Any:
    """What JSON can say of a value.

    Args:
        value: mappings with string keys, which come back as dicts, lists, tuples, strings, bytes,
            numbers, booleans, None, tensors, and a ``Counter`` of integers, which learning-rate
            schedulers keep.
        where: the value's name, for the error.
        depth: how many values it is inside of.

    Raises:
        ValueError: something else is inside; names where.

    Example:
        >>> encode({"betas": (0.9, 0.95), "scale": torch.tensor(2.0)})
        {'betas': {'$tuple': [0.9, 0.95]}, 'scale': {'$tensor': ['float32', [], 'AAAAQA==']}}
        >>> encode({"sampler": {3: "odd"}})
        Traceback (most recent call last):
        ValueError: extra['sampler'] has the key 3: use strings that do not begin with $
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where[:80]}... is more than {_MAX_DEPTH} levels deep, or inside itself")
    if type(value) is bytes:
        return {_BYTES: base64.b64encode(value).decode()}
    if type(value) in (list, tuple):
        items = [encode(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        return items if type(value) is list else {_TUPLE: items}
    if isinstance(value, Counter) and all(type(key) is int for key in value):
        return {_COUNTER: encode(list(value.items()), where, depth + 1)}
    if isinstance(value, Mapping):
        for key in value:
            if type(key) is not str or key.startswith("$"):
                raise ValueError(
                    f"{where} has the key {key!r}: use strings that do not begin with $"
                )
        return {key: encode(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, torch.Tensor) and _is_plain(value):
        dtype = str(value.dtype).removeprefix("torch.")
        elements = value.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
        return {_TENSOR: [dtype, list(value.shape), base64.b64encode(elements.tobytes()).decode()]}
    raise ValueError(
        f"{where} is a {type(value).__name__}: a checkpoint takes dicts, lists, tuples, strings, "
        f"bytes, numbers, booleans, None and dense real tensors, because nothing in it is pickled"
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its elements are numbers in memory, and all there is of it."""
    is_dense = tensor.layout is torch.strided and not tensor.is_meta
    return is_dense and not tensor.is_quantized and not tensor.dtype.is_complex


def decode(value: Any) -> Any:
    """The value that :func:`encode` was given.

    Example:
        >>> decode({"betas": {"$tuple": [0.9, 0.95]}})
        {'betas': (0.9, 0.95)}
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _BYTES in value:
        return base64.b64decode(value[_BYTES])
    if _TUPLE in value:
        return tuple(decode(item) for item in value[_TUPLE])
    if _COUNTER in value:
        return Counter({key: decode(item) for key, item in map(decode, value[_COUNTER])})
    if _TENSOR in value:
        dtype, shape, text = value[_TENSOR]
        data = bytearray(base64.b64decode(text))
        elements = torch.empty(len(data), dtype=torch.uint8, device="cpu")
        if data:
            elements.copy_(torch.frombuffer(data, dtype=torch.uint8))
        return elements.view(getattr(torch, dtype)).view(shape)
    return {key: decode(item) for key, item in value.items()}
