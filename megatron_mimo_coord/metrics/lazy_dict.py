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
        dict.__init__(self, {"": 0.0})  # json looks at the size beneath before it asks for items
        self._read: Callable[[], dict[str, float]] | None = read

    def fill(self) -> None:
        """Read the items, if that has not been done."""
        if self._read is not None:
            items = self._read()
            self._read = None
            dict.clear(self)
            dict.update(self, items)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def _filled_first(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def filled_first(*dicts: Any, **kwargs: Any) -> Any:
        for each in dicts:
            if isinstance(each, LazyDict):
                each.fill()
        return method(*dicts, **kwargs)

    return filled_first


_WITHOUT_A_LOOK = {"__new__", "__init__", "__getattribute__", "__class_getitem__", "fromkeys"}
for _name, _method in vars(dict).items():
    if callable(_method) and _name not in _WITHOUT_A_LOOK:
        setattr(LazyDict, _name, _filled_first(_method))
