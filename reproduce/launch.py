"""Who started this process: Slurm's srun, torchrun, Lightning itself, or a person."""

import os
import secrets
import subprocess
import time
import warnings

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_warn

from reproduce.config import ConfigError
from reproduce.sweep import in_sweep


def job() -> str | None:
    """The Slurm job of this process, 17 or 16_3 (array_index), the same after a requeue; None outside of Slurm."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    with warnings.catch_warnings(action="ignore"):  # it warns where Slurm is installed and not used
        if not SLURMEnvironment.detect() or "SLURM_JOB_ID" not in os.environ:
            return None
    return "_".join(array) if all(array) else os.environ["SLURM_JOB_ID"]


def requeued() -> bool:
    """Whether Slurm has started this job before."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def run_id() -> str:
    """The name of the run's folder, the same on all ranks: the sweep's run, the job, or else new."""
    if in_sweep():
        return os.environ["WANDB_RUN_ID"]
    if job() is not None:
        return f"slurm-{job()}"
    new = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _shared(new)
    if (
        "LOCAL_RANK" not in os.environ or "PAPERFLOWS_RUN_ID" not in os.environ
    ):  # not started by another rank
        os.environ["PAPERFLOWS_RUN_ID"] = new
    return os.environ["PAPERFLOWS_RUN_ID"]


def _shared(value: str) -> str:
    """Rank 0's value on all ranks, over the store at which they meet; there is no process group yet."""
    store, rank, _ = next(torch.distributed.rendezvous("env://"))
    STORES.append(store)  # where torchrun does not keep it, rank 0 does, and others may still come
    if rank == 0:
        store.set("paperflows/run_id", value)
    return store.get("paperflows/run_id").decode()


STORES: list[torch.distributed.Store] = []


def processes() -> dict:
    """devices and num_nodes of the Trainer as srun or torchrun has started them; empty elsewhere.

    ConfigError: several tasks were asked for, and this process is not one of them; it would wait for ever.
    """
    if job() is not None:
        tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NNODES"])
        if tasks > 1 and "SLURM_STEP_ID" not in os.environ:
            raise ConfigError(
                f"this job has {tasks} tasks: start the script by srun, or sbatch reproduce/slurm.sh"
            )
        return {"devices": tasks // nodes, "num_nodes": nodes}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return {"devices": local, "num_nodes": world // local}
    return {}


def requeue() -> None:
    """Ask Slurm to start this job again; where it will not, say so."""
    name = job()
    if name is None:
        return
    try:
        subprocess.run(
            ["scontrol", "requeue", name], check=True, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        rank_zero_warn(f"Slurm does not queue job {name} again: {' '.join(reason.split())}")
