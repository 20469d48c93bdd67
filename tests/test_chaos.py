"""Two of the trials of `make chaos`, at moments that differ from machine to machine.

`tests/runs/test_compare.py` kills `compare` and the trainer, `tests/export/test_folders.py` a tool like `export`.
"""

import subprocess
import sys

from tests.distributed import REPOSITORY


def test_killed_preparation_of_data_ends_as_if_it_had_not_been():
    command = [sys.executable, "-m", "tests.chaos", "--times", "2", "--only", "data"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-5000:]
    assert sum(int(line.rpartition(" ")[2]) for line in ended.stdout.splitlines()) == 2
