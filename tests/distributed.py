"""Run a test's function on several processes, on CPUs over gloo.

Started with torchrun: Composer's launcher does the same, but importing Composer once more takes it ten seconds.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist

REPOSITORY = Path(__file__).parents[1]


def launch(
    function: Callable[..., Any], *args: Any, processes: int = 2, timeout: float = 300, **environment: str
) -> list:
    """Call ``function(*args)`` in each of the processes of one job.

    Args:
        function: At the top level of a module in `tests`; torch.distributed is initialised when it is called.
        args: Arguments that can be pickled, as its result must be.
        processes: How many processes; 1 gives the single process to compare with, in the same environment.
        timeout: Seconds after which the job is killed and the test fails.
        environment: Further environment variables, such as FSDP_VERSION="2".

    Returns:
        The results, by rank.

    Raises:
        AssertionError: If the job failed; the message holds the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "call").write_bytes(pickle.dumps((function, args)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "tests.distributed", folder]
        # Composer reads NODE_RANK, which torchrun does not set.
        cpu = {"CUDA_VISIBLE_DEVICES": "", "NODE_RANK": "0", "OMP_NUM_THREADS": "1"}
        job = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **cpu, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert job.returncode == 0, f"{' '.join(command)} failed:\n{job.stdout[-8000:]}"
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(processes)]


def _mend_gloo() -> None:
    """Make gloo's reduce-scatter average where FSDP2 asks it to: in torch 2.7 it returns the sum (NCCL averages)."""
    reduce_scatter = torch.distributed.reduce_scatter_tensor

    def averaged(output: torch.Tensor, input: torch.Tensor, **kwargs: Any) -> Any:
        work = reduce_scatter(output, input, **kwargs)
        if kwargs.get("op") == torch.distributed.ReduceOp.AVG:
            output /= dist.get_world_size()
        return work

    torch.distributed.reduce_scatter_tensor = averaged


def _call(folder: Path) -> None:
    dist.initialize_dist("cpu")
    _mend_gloo()
    function, args = pickle.loads((folder / "call").read_bytes())
    (folder / str(dist.get_global_rank())).write_bytes(pickle.dumps(function(*args)))


if __name__ == "__main__":
    _call(Path(sys.argv[1]))
