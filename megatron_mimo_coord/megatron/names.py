"""A name of Megatron-Core that is gone: told in one sentence, with the file that leans on it.

Nothing is looked up beforehand: Python says whose attribute is missing when it is missed, and the
stack which file of this room asked for it. What that file does is the first line of its docstring.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, TracebackType

from megatron.core import __version__ as megatron_version

_ROOM = __name__.rpartition(".")[0]


@contextmanager
def told_of_missing_names() -> Iterator[None]:
    """Say that Megatron-Core has changed where a file of this room misses a name in it.

    Raises:
        RuntimeError: a class, a module or an object of Megatron-Core's lacks an attribute.
    """
    try:
        yield
    except AttributeError as error:
        owner = error.obj if isinstance(error.obj, type | ModuleType) else type(error.obj)
        facade = _facade_that_asked(error.__traceback__)
        is_module = isinstance(owner, ModuleType)
        path = owner.__name__ if is_module else f"{owner.__module__}.{owner.__qualname__}"
        if facade is None or not path.startswith("megatron."):
            raise
        raise RuntimeError(
            f"megatron-core {megatron_version}: {path} has no {error.name}, on which {facade}; use "
            f"megatron-core 0.19, or the release of this package for it"
        ) from error


def _facade_that_asked(traceback: TracebackType | None) -> str | None:
    """The file of this room that asked for an attribute, if one did, and what it is for."""
    found = None
    while traceback is not None:
        frame = traceback.tb_frame
        name, text = frame.f_globals.get("__name__", ""), frame.f_globals.get("__doc__") or ""
        if name.startswith(_ROOM):
            purpose = text.partition("\n")[0]
            found = f"{name.replace('.', '/')}.py relies ({purpose})"
        elif frame.f_code.co_name != "__getattr__":  # of torch.nn.Module, where it looks
            found = None
        traceback = traceback.tb_next
    return found
