"""A dict that is filled when someone looks at it, so that whoever made it need not wait."""

from collections.abc import Callable
from functools import wraps
from typing import Any


class LazyDict(dict[str, float]):
    """A dict in all respects, except that it takes its items from ``read`` at the first look.

    Args:
        read: returns the items; called at most once, unless it raises.

    Example:
        >>> metrics = LazyDict(lambda: print("waits") or {"loss": 2.0})
        >>> metrics["loss"]
        waits
        2.0
        >>> metrics == {"loss": 2.0}, metrics
        (True, {'loss': 2.0})
    """

    def __init__(self, read: Callable[[], dict[str, float]]) -> None:
        super().__init__({"": 0.0})  # json looks at the size beneath before it asks for items
        self._read: Callable[[], dict[str, float]] | None = read

    def fill(self) -> None:
        """Read the items, if that has not been done."""
        if self._read is not None:
            items = self._read()
            self._read = None
            super().clear()
            super().update(items)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def _filled_first(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    @wraps(method)
    def filled_first(self: LazyDict, *args: Any, **kwargs: Any) -> Any:
        for each in (self, *args):
            if isinstance(each, LazyDict):
                each.fill()
        return method(self, *args, **kwargs)

    return filled_first


_OPERATORS = ("contains", "delitem", "eq", "getitem", "ior", "iter", "len", "ne", "or", "repr")
_MORE = ("reversed", "ror", "setitem")
_METHODS = ("clear", "copy", "get", "items", "keys", "pop", "popitem", "setdefault", "update")
for _name in (*(f"__{name}__" for name in (*_OPERATORS, *_MORE)), *_METHODS, "values"):
    setattr(LazyDict, _name, _filled_first(_name))
