"""Run a test's function on two or more CPU processes over gloo.

Two processes start at the first call and stay for later calls, because importing Composer and foundry takes longer than
most of the functions.
"""

import functools
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist

import tests.leaks  # noqa: F401

REPOSITORY = Path(__file__).parents[1]
PROCESSES = 2


def launch(function: Callable[..., Any], *args: Any, processes: int = PROCESSES, timeout: float = 300) -> list:
    """Call ``function(*args)`` in each process, with FSDP_VERSION=2.

    Args:
        function: At the top level of a module in `tests`; torch.distributed is initialised when it is called.
        args: Arguments that can be pickled, as its result must be.
        processes: Their number. More than two end after the call, to free their memory.
        timeout: Seconds after which the processes are killed and the test fails.

    Returns:
        The results, by rank.

    Raises:
        AssertionError: If the function failed; the message holds the end of what the processes printed.
    """
    if processes != PROCESSES:
        with closing(_Job(processes)) as job:
            return job.call(function, args, timeout)
    try:
        return _job().call(function, args, timeout)
    except AssertionError:
        _job.cache_clear()  # the next call starts new processes
        raise


class _Job:
    def __init__(self, processes: int = PROCESSES) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._output = Path(self._folder.name, "output")
        self._processes, self._connections = [], []
        # Composer reads these variables. torch.distributed.run would set them too, but would import torch once more.
        world = {"WORLD_SIZE": f"{processes}", "LOCAL_WORLD_SIZE": f"{processes}", "NODE_RANK": "0"}
        cpu = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "FSDP_VERSION": "2"}
        for rank in range(processes):
            ours, theirs = multiprocessing.Pipe()
            with self._output.open("a") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.distributed", str(theirs.fileno()), f"{self._folder.name}/store"],
                    cwd=REPOSITORY,
                    env={**os.environ, **world, **cpu, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=[theirs.fileno()],
                )
            theirs.close()  # so that reading from our end stops when the process ends
            self._processes.append(process)
            self._connections.append(ours)

    def call(self, function: Callable[..., Any], args: tuple, timeout: float) -> list:
        try:
            for connection in self._connections:
                # Connection.send would pass tensors as handles of shared memory.
                connection.send_bytes(pickle.dumps((function, args)))
            results = {}
            while len(results) < len(self._connections):
                # Wait for all at once: if one fails, another may wait for it forever.
                ready = wait([each for each in self._connections if each not in results], timeout)
                if not ready:
                    raise TimeoutError(f"no result after {timeout} s")
                results |= {each: pickle.loads(each.recv_bytes()) for each in ready}  # type: ignore[union-attr]
            return [results[each] for each in self._connections]
        except (EOFError, OSError) as error:
            for process in self._processes:
                process.kill()
                process.wait()
            raise AssertionError(f"{function.__name__} failed:\n{self._output.read_text()[-8000:]}") from error

    def close(self) -> None:
        for connection in self._connections:
            connection.close()  # at which its process ends
        for process in self._processes:
            process.wait()


@functools.cache
def _job() -> _Job:
    return _Job()


def _mend_gloo() -> None:
    """Make gloo's reduce-scatter average if FSDP2 asks for an average.

    In torch 2.7 gloo returns the sum; NCCL averages.
    """
    reduce_scatter = torch.distributed.reduce_scatter_tensor

    def averaged(output: torch.Tensor, input: torch.Tensor, **kwargs: Any) -> Any:
        work = reduce_scatter(output, input, **kwargs)
        if kwargs.get("op") == torch.distributed.ReduceOp.AVG:
            output /= dist.get_world_size()
        return work

    torch.distributed.reduce_scatter_tensor = averaged


def _serve(connection: Connection, store: str) -> None:
    """Call each function that the test process sends, until that process ends."""
    rank, size = dist.get_global_rank(), dist.get_world_size()
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    _mend_gloo()
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        function, args = pickle.loads(call)
        connection.send_bytes(pickle.dumps(function(*args)))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), sys.argv[2])
