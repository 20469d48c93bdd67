"""Folders are complete or absent, whatever happens to the process that writes them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmfoundry_wesar.export.folders import whole

_KILLED = """
import os, signal, sys
from llmfoundry_wesar.export.folders import whole
with whole(sys.argv[1]) as folder:
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_nothing_that_looks_complete_and_the_next_one_tidies_up(tmp_path):
    killed = subprocess.run([sys.executable, "-c", _KILLED, tmp_path / "out"])
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    with whole(tmp_path / "out") as file:
        file.write_text("complete")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_text() == "complete"


def test_what_a_running_process_writes_is_left_alone(tmp_path):
    """A file is also left alone if only the start of its name looks like a partial folder."""
    others = {tmp_path / f".out.partial-{os.getppid()}", tmp_path / ".out.partial-mine", tmp_path / ".outer.partial-1"}
    for other in others:
        other.mkdir()
    with whole(tmp_path / "out") as file:
        file.write_text("complete")
    assert others < set(tmp_path.iterdir())


def test_a_process_number_that_is_used_again_is_no_hindrance(tmp_path):
    """In containers, processes often get the same numbers again."""
    (tmp_path / f".out.partial-{os.getpid()}").mkdir()
    with whole(tmp_path / "out") as folder:
        folder.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_modes_follow_the_umask(tmp_path):
    """Files that a library makes private follow it too."""
    before = os.umask(0o027)
    try:
        with whole(tmp_path / "out") as folder:
            folder.mkdir()
            os.close(os.open(folder / "private", os.O_CREAT, 0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "private").stat().st_mode & 0o777 == 0o640


def _write(out: Path, *names: str, content: str = "new") -> None:
    with whole(out, replace=True) as folder:
        folder.mkdir()
        for name in names:
            (folder / name).write_text(content)


def test_a_link_is_replaced_and_what_it_means_is_left_alone(tmp_path):
    """`rmtree` refuses links, after the new folder is in place."""
    _write(tmp_path / "elsewhere", "weights", content="mine")
    (tmp_path / "out").symlink_to("elsewhere")
    (tmp_path / ".out.partial-999999999").symlink_to("elsewhere")
    _write(tmp_path / "out", "weights")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]
    assert not (tmp_path / "out").is_symlink() and (tmp_path / "out/weights").read_text() == "new"
    assert (tmp_path / "elsewhere/weights").read_text() == "mine"


def test_a_folder_with_the_same_files_is_replaced(tmp_path):
    _write(tmp_path / "out", "config", "weights", content="old")
    _write(tmp_path / "out", "config", "weights", "index")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == dict.fromkeys(
        ("config", "weights", "index"), "new"
    )


def test_a_folder_with_a_file_of_somebody_else_stays_under_another_name(tmp_path, caplog):
    for n in (1, 2):
        _write(tmp_path / "out", "weights", content="old")
        (tmp_path / "out" / "notes").write_text("mine")
        _write(tmp_path / "out", "weights")
        kept = tmp_path / f"out.{n}"
        assert f"out: has files that the new folder does not have; it is now {kept}" in caplog.text
        assert (kept / "notes").read_text() == "mine" and (kept / "weights").read_text() == "old"
    assert (tmp_path / "out" / "weights").read_text() == "new"


def test_the_old_folder_stays_until_the_new_one_is_complete(tmp_path):
    _write(tmp_path / "out", "weights", content="old")
    with pytest.raises(OSError, match="writing failed"), whole(tmp_path / "out", replace=True) as folder:
        folder.mkdir()
        raise RuntimeError("full")
    assert (tmp_path / "out" / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
