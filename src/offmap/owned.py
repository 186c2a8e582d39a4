"""Objects that own something (an fd, a mapping, a process) and free it at the end of a ``with`` block."""

from abc import ABC, abstractmethod

TYPE_CHECKING = False  # importing `typing` costs each wrapped VMM's supervisor a megabyte
if TYPE_CHECKING:
    from typing import Self


class Owned(ABC):
    """A context manager that closes itself."""

    @abstractmethod
    def close(self) -> None:
        """Free what is owned. A second call does nothing."""

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
