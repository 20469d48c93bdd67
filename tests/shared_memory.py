"""Free the shared memory of streaming's datasets as soon as they are gone; importing this module is enough.

streaming frees it when the process ends. Until then each new dataset opens the memory of all earlier ones again and
keeps that open: with n datasets in one process these are about 3n² files, of which a process may have some thousands.
"""

import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from typing import Any

from streaming.base.shared import memory


def _unlink(block: SharedMemory) -> None:
    with suppress(FileNotFoundError):  # another process was faster
        block.unlink()


class _WhenUnused:
    @staticmethod
    def register(cleanup: Callable[[], None]) -> None:
        """Take the place of `atexit.register`. A block is closed by its own `__del__`."""
        owner: Any = getattr(cleanup, "__self__")  # noqa: B009
        for block in owner.created_shms:
            weakref.finalize(owner, _unlink, block)


memory.atexit = _WhenUnused  # type: ignore[assignment]
