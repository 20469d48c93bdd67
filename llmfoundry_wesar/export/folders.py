"""Write a file or folder that is complete or absent."""

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
    """Raise a FileExistsError if there is something at a path, a broken link included."""
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists; choose another name or remove it.")


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _put_aside(out: Path, new: Path) -> Path | None:
    """Make way for a new folder: rename what is at `out`.

    Returns:
        What to remove once the new folder is in its place; None if it has something that the new one has not, and that
        somebody else has put there.
    """
    if out.is_dir() and _names(out) <= _names(new):
        return out.rename(out.with_name(f".{out.name}.replaced-{os.getpid()}"))
    kept = next(path for n in count(1) if not os.path.lexists(path := out.with_name(f"{out.name}.{n}")))
    log.warning("%s: has files that the new one has not; it is now %s", out, out.rename(kept))
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    """Tell whether another process has a number; containers begin with the same numbers again and again."""
    return pid != os.getpid() and psutil.pid_exists(pid)


def _partial(out: Path) -> Path:
    """Return where this process writes `out`, and remove what killed processes left of it."""
    prefix = f".{out.name}.partial-"
    for leftover in out.parent.iterdir():
        pid = leftover.name.removeprefix(prefix)
        if leftover.name.startswith(prefix) and pid.isdecimal() and not _is_running(int(pid)):
            _remove(leftover)
    return out.with_name(f"{prefix}{os.getpid()}")


def _share(folder: Path) -> None:
    """Give the files of a folder the modes that the umask gave the folder; safetensors makes its files private."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


@contextmanager
def whole(out: str | Path, replace: bool = False) -> Iterator[Path]:
    """Yield a path to write a file or folder to; it becomes `out` at the end, and is gone if anything fails.

    A process that is killed leaves its partial output, `.OUT.partial-PID`. The next one that writes `out` removes it.

    Args:
        out: The file or folder.
        replace: Whether a folder that is there is replaced. It is removed when the new one is complete, and if every
            file in it has a namesake in the new one; otherwise it is renamed, and stays.

    Raises:
        FileExistsError: If `out` exists.
        ValueError: As the body raises it, for what cannot be written.
        OSError: If writing fails in any other way.
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
            shutil.rmtree(old)
    except (ValueError, FileExistsError):
        raise
    except Exception as error:
        # A full disk is an OSError here, a RuntimeError in torch and a plain Exception in tokenizers.
        raise OSError(f"{out}: writing failed, and nothing of it is left ({str(error).splitlines()[0]}).") from error
    finally:
        _remove(partial)
