"""What a coordinator changes in the objects of others, and how all of it is undone."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

logger = logging.getLogger(__name__)

_NONE = object()
_MARK = "_mimo_changes"
"""Attribute of an object that was taken charge of: the ``Changes`` in which its changes are."""


class Changes:
    """One record of changes, undone together and in reverse order, also at the end of a ``with``.

    Attributes:
        closed_by: who has undone them; empty as long as they last.

    Example:
        >>> config = type("Config", (), {"timers": None})()
        >>> changes = Changes()
        >>> changes.set(config, "timers", print)
        >>> changes.on_close(lambda: print("undone first"))
        >>> changes.close()
        undone first
        >>> config.timers, vars(config)
        (None, {})
    """

    def __init__(self) -> None:
        self.closed_by = ""
        self._undo = ExitStack()

    def take(self, *owners: Any) -> None:
        """Take charge of objects; who had charge of one of them undoes all of its own changes.

        Args:
            owners: such as the model, a config, an optimizer: what several coordinators may share.
        """
        for owner in owners:
            before: Changes | None = vars(owner).get(_MARK)
            if before is not None and before is not self:
                later = f"a later coordinator of the same {type(owner).__name__}"
                before.close(later)
                logger.info("%s closes the one before it: all of its changes are undone", later)
        for owner in owners:
            if _MARK not in vars(owner):
                self.set(owner, _MARK, self)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an object, a class or a module, until :meth:`close`.

        What somebody else has put there in the meantime stays.

        Args:
            owner: whose attribute it is; it has a ``__dict__``.
            name: of the attribute. If only the owner's class has it, or nobody, undoing deletes it.
            value: its new value.
        """
        before = vars(owner).get(name, _NONE)
        setattr(owner, name, value)

        def undo() -> None:
            if vars(owner).get(name, _NONE) is not value:
                return
            if before is _NONE:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.callback(undo)

    def on_close(self, undo: Callable[[], object]) -> None:
        """Have something else undone in its turn, such as ``handle.remove`` of a module's hook."""
        self._undo.callback(undo)

    def close(self, by: str = "close()") -> None:
        """Undo everything, the last change first; a second time does nothing.

        Args:
            by: who does, for those who go on using what is closed.
        """
        if not self.closed_by:
            self.closed_by = by
            self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_open(self) -> None:
        """Refuse to go on where everything is undone.

        Raises:
            RuntimeError: says who has undone it.
        """
        if self.closed_by:
            raise RuntimeError(
                f"this coordinator was closed by {self.closed_by}: use the later one, or build "
                f"another, MultiModuleCoordinator(infra, model), and attach it"
            )
