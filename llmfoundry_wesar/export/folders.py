"""Write a file or folder so that it is either complete or absent."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psutil

log = logging.getLogger(__name__)


def refuse_existing(out: str | Path) -> None:
    """Raise a FileExistsError if a path exists, even as a broken link."""
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists; choose another name or remove it.")


def check_new(out: str | Path) -> None:
    """Check before the work that a new file or folder can be written.

    Raises:
        FileExistsError: `out` exists.
        OSError: Its folder cannot be written.
    """
    refuse_existing(out)
    folder = next(folder for folder in Path(out).absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OSError(f"{out}: {folder} is not a folder in which you may write.")


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _put_aside(out: Path, new: Path) -> Path | None:
    """Rename what is at `out`, to make room for a new folder.

    Returns:
        The renamed folder, to be removed when the new one is in place. None if it has files that the new one does not
        have. Then it is kept under its new name.
    """
    if out.is_dir() and _names(out) <= _names(new):
        return out.rename(out.with_name(f".{out.name}.replaced-{os.getpid()}"))
    kept = next(path for n in count(1) if not os.path.lexists(path := out.with_name(f"{out.name}.{n}")))
    log.warning("%s: has files that the new folder does not have; it is now %s", out, out.rename(kept))
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    """Return whether another process has this id. Containers reuse ids, so a dead process may have had our own."""
    return pid != os.getpid() and psutil.pid_exists(pid)


def _partial(out: Path) -> Path:
    """Return the temporary path of `out` for this process, and remove those of processes that were killed."""
    prefix = f".{out.name}.partial-"
    for leftover in out.parent.iterdir():
        pid = leftover.name.removeprefix(prefix)
        if leftover.name.startswith(prefix) and pid.isdecimal() and not _is_running(int(pid)):
            _remove(leftover)
    return out.with_name(f"{prefix}{os.getpid()}")


def _share(folder: Path) -> None:
    """Give all files the read and write permissions of their folder, because safetensors makes its files private."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


@contextmanager
def whole(out: str | Path, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary path for a file or folder. At the end rename it to `out`; if anything fails, remove it.

    A process that is killed leaves its partial output, `.OUT.partial-PID`. The next process that writes `out`
    removes it.

    Args:
        out: The file or folder.
        replace: Whether to replace an existing folder when the new one is complete. If the old folder has files that
            the new one does not have, it is renamed and kept, else removed.

    Raises:
        FileExistsError: `out` exists and `replace` is false.
        ValueError: From the body, for something that cannot be written.
        OSError: Writing fails for any other reason.
    """
    out = Path(out)
    if not replace:
        refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(out)
    try:
        yield partial
        if partial.is_dir():
            _share(partial)
        old = _put_aside(out, partial) if replace and os.path.lexists(out) else None
        refuse_existing(out)
        partial.rename(out)
        if old is not None:
            _remove(old)
    except (ValueError, FileExistsError):
        raise
    except Exception as error:
        # A full disk raises an OSError here, a RuntimeError in torch and a plain Exception in tokenizers.
        raise OSError(f"{out}: writing failed, and no part is left ({str(error).splitlines()[0]}).") from error
    finally:
        _remove(partial)
