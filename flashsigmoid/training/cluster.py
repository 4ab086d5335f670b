"""Ranks that another launcher than torchrun gave: Slurm's srun, and those that Lightning knows besides."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,  # pyright: ignore[reportPrivateImportUsage]
    LSFEnvironment,  # pyright: ignore[reportPrivateImportUsage]
    MPIEnvironment,  # pyright: ignore[reportPrivateImportUsage]
    SLURMEnvironment,  # pyright: ignore[reportPrivateImportUsage]
)

from ..distributed.processes import is_launched

_SRUN = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
_MASTER = ("MASTER_ADDR", "MASTER_PORT")
_OTHERS: tuple[type[ClusterEnvironment], ...] = (LSFEnvironment, MPIEnvironment)


def adopt_launcher() -> None:
    """Where such a launcher started this process as one of several, set what torchrun sets; else nothing.

        RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT

    Slurm's are those of the step, so that a batch script or a shell of one task is one process; MASTER_ADDR and
    MASTER_PORT stand where they are set, else they are the step's first machine and a port by the number of the job.
    """
    if is_launched():
        return
    given = _srun(os.environ) or _other()
    if int(given.get("WORLD_SIZE", 1)) > 1:
        os.environ.update({**given, **{name: os.environ[name] for name in _MASTER if name in os.environ}})


def _srun(environment: Mapping[str, str]) -> dict[str, str]:
    """The ranks of a step of Slurm's; empty outside of one."""
    if any(name not in environment for name in _SRUN):
        return {}
    size, rank, local, machines, job = (environment[name] for name in _SRUN)
    first, port = SLURMEnvironment.resolve_root_node_address(machines), 15_000 + int(job) % 10_000
    return _variables(size, rank, local, first, port)


def _other() -> dict[str, str]:
    """The ranks of the first of Lightning's environments that knows itself."""
    for kind in _OTHERS:
        if kind.detect():
            found = kind()
            where = found.main_address, found.main_port
            return _variables(found.world_size(), found.global_rank(), found.local_rank(), *where)
    return {}


def _variables(size: object, rank: object, local_rank: object, address: str, port: int) -> dict[str, str]:
    values = {"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": local_rank, "MASTER_ADDR": address, "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()}
