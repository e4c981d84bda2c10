"""A name of Megatron-Core that is gone: told in one sentence, with the file that leans on it.

Nothing is looked up beforehand: Python says whose attribute is missing when it is missed, and the
stack which file of this room asked for it. What that file does is the first line of its docstring.
"""

from types import ModuleType, TracebackType

from megatron.core import __version__ as megatron_version

_ROOM = __name__.rpartition(".")[0]


def tell_of_missing_name(error: AttributeError) -> None:
    """Say that Megatron-Core has changed, if that is what an error is about.

    Raises:
        RuntimeError: a class, a module or an object of Megatron-Core's lacks a name.
    """
    owner = error.obj if isinstance(error.obj, type | ModuleType) else type(error.obj)
    of_module = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
    facade = _innermost_facade(error.__traceback__)
    if facade is None or not of_module.startswith("megatron."):
        return
    name, purpose = facade
    raise RuntimeError(
        f"megatron-core {megatron_version}: {getattr(owner, '__qualname__', owner.__name__)} has "
        f"no {error.name}, on which {name.replace('.', '/')}.py relies ({purpose}); use "
        f"megatron-core 0.19, or the release of this package for it"
    ) from error


def _innermost_facade(traceback: TracebackType | None) -> tuple[str, str] | None:
    """(name, purpose) of the file of this room that raised an error, if one did."""
    found = None
    while traceback is not None:
        names = traceback.tb_frame.f_globals
        name = names.get("__name__", "")
        found = (name, names["__doc__"].partition("\n")[0]) if name.startswith(_ROOM) else None
        traceback = traceback.tb_next
    return found
