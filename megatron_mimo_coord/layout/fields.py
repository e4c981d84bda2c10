"""Fields of attrs classes that users fill in, and what is said of a value that will not do."""

from collections.abc import Callable
from math import inf, isfinite
from typing import Any

from attrs import NOTHING, Attribute, field

MAX_RANKS = 2**31
"""No job has more: a larger number is a slip of the pen."""


def is_count(value: Any, least: int = 1, most: int = MAX_RANKS - 1) -> bool:
    """Whether a value is an integer that can count ranks or samples."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any, least: float = 0.0, most: float = inf) -> bool:
    """Whether a value is a finite number in a range."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and isfinite(value) and least <= value <= most


def shown(value: Any) -> str:
    """What a user gave, as far as it can be printed.

    Example:
        >>> shown("four"), shown(10**99)
        ("'four'", 'an integer of 329 bits')
    """
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def checked(
    is_good: Callable[[Any], bool], what: str, cure: str, default: Any = NOTHING, **more: Any
) -> Any:
    """A field whose error says what was given, what is needed and what to change.

    Args:
        is_good: whether a value will do; None does too, where it is the default.
        what: what the field must be.
        cure: what to do about it.
        default: of the field; left out, it must be given.
        more: what else ``attrs.field`` takes.
    """

    def check(_: Any, attribute: "Attribute[Any]", value: Any) -> None:
        if not is_good(value) and not (value is None and default is None):
            raise ValueError(f"{attribute.name} must be {what}, got {shown(value)}; {cure}")

    return field(default=default, validator=check, **more)


def count(
    default: Any = NOTHING, cure: str = "write one", *, most: int = MAX_RANKS - 1, **more: Any
) -> Any:
    """A field that is a positive integer."""
    limit = "below 2**31" if most == MAX_RANKS - 1 else f"up to {most}"
    what = f"a positive integer {limit}"
    return checked(lambda value: is_count(value, most=most), what, cure, default, **more)


def number(
    default: Any = NOTHING, cure: str = "write one", *, least: float = 0.0, most: float = inf
) -> Any:
    """A field that is a finite number in a range."""
    what = f"a number, {least:g} or more" if most == inf else f"a number from {least:g} to {most:g}"
    return checked(lambda value: is_number(value, least, most), what, cure, default)


def positive(default: Any, cure: str, *, most: float = inf) -> Any:
    """A field that is a number above 0, infinite perhaps."""
    what = "a number above 0" + ("" if most == inf else f" and at most {most:g}")
    return checked(
        lambda value: value == most or (is_number(value, most=most) and value > 0),
        what,
        cure,
        default,
    )


def flag(default: Any = False) -> Any:
    """A field that is true or false."""
    return checked(
        lambda value: isinstance(value, bool), "true or false", "write one of the two", default
    )


def one_of(*choices: str, default: str | None) -> Any:
    """A field that is one of a few words."""
    what = f"one of {', '.join(map(repr, choices))}"
    return checked(lambda value: value in choices, what, "write one of them", default)


def list_of(is_good: Callable[[Any], bool], what: str, cure: str, default: Any, **more: Any) -> Any:
    """A field that is a list whose items will do."""

    def are_good(value: Any) -> bool:
        is_list = isinstance(value, list | tuple) and bool(value)
        return is_list and all(is_good(each) for each in value)

    return checked(are_good, what, cure, default, **more)
