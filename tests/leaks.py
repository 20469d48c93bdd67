"""Free trainers and data loaders when a test is done with them, not when the process ends; importing this is enough.

Composer and streaming register functions with `atexit` that hold every state and every block of shared memory. Each new
dataset also opens the blocks of all earlier ones and keeps them open: n datasets in one process are about 6n² open
files, of which a process may have some thousands.
"""

import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from typing import Any

from composer.core import engine
from streaming.base.shared import memory


def _unlink(block: SharedMemory) -> None:
    with suppress(FileNotFoundError):  # another process was faster
        block.unlink()


class _StreamingExit:
    @staticmethod
    def register(cleanup: Callable[[], None]) -> None:
        """Free a block when its owner is gone. The block's own `__del__` closes it."""
        owner: Any = getattr(cleanup, "__self__")  # noqa: B009
        for block in owner.created_shms:
            weakref.finalize(owner, _unlink, block)


class _ComposerExit:
    """Leave closing to `Trainer.close` and to the engine's `__del__`."""

    @staticmethod
    def register(*_: Any) -> None: ...

    @staticmethod
    def unregister(*_: Any) -> None: ...


memory.atexit = _StreamingExit  # type: ignore[assignment]
engine.atexit = _ComposerExit  # type: ignore[assignment]
