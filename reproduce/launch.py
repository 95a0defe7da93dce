"""Who started this process: Slurm's srun, torchrun, Lightning itself, or a person."""

import os
import secrets
import subprocess
import time
import warnings
from collections.abc import Mapping, Sized
from typing import Any, cast

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_warn

from reproduce.config import ConfigError
from reproduce.sweep import in_sweep


def job() -> str | None:
    """The number of this Slurm job: 17, or 16_3 (array_index); None outside of Slurm.

    A job keeps its number when it is queued again.
    """
    with warnings.catch_warnings(action="ignore"):  # it warns where Slurm is installed and not used
        if not SLURMEnvironment.detect() or "SLURM_JOB_ID" not in os.environ:
            return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    index = os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and index:
        return f"{array}_{index}"
    return os.environ["SLURM_JOB_ID"]


def requeued() -> bool:
    """Whether Slurm has started this job before."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def run_id() -> str:
    """The name of the run's folder, equal on all ranks: the id of the sweep's run, the job, or new.

    A new one is made of the time and four random digits.
    """
    if in_sweep():
        return os.environ["WANDB_RUN_ID"]
    if job() is not None:
        return f"slurm-{job()}"
    new = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _from_rank_0(new)
    started_by_another_rank = "LOCAL_RANK" in os.environ and "PAPERFLOWS_RUN_ID" in os.environ
    if not started_by_another_rank:
        os.environ["PAPERFLOWS_RUN_ID"] = new
    return os.environ["PAPERFLOWS_RUN_ID"]


def _from_rank_0(value: str) -> str:
    """Rank 0's value on all ranks, sent through the key-value store at which the ranks meet.

    A broadcast needs a process group, which does not exist yet.
    """
    store, rank, _ = next(iter(torch.distributed.rendezvous("env://")))
    STORES.append(store)
    if rank == 0:
        store.set("paperflows/run_id", value)
    return store.get("paperflows/run_id").decode()


# Keeps stores alive. Rank 0 may itself serve the store, from which other ranks may still read.
STORES: list[torch.distributed.Store] = []


def processes() -> dict[str, int]:
    """devices (for each node) and num_nodes, as srun or torchrun has started processes; else empty.

    ConfigError: the Slurm job has several tasks, but srun has not started this process. It would
    wait for the other tasks for ever.
    """
    if job() is not None:
        tasks = int(os.environ["SLURM_NTASKS"])
        nodes = int(os.environ["SLURM_NNODES"])
        if tasks > 1 and "SLURM_STEP_ID" not in os.environ:
            raise ConfigError(
                f"this job has {tasks} tasks: start the script by srun, "
                "or sbatch reproduce/slurm.sh"
            )
        return {"devices": tasks // nodes, "num_nodes": nodes}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        world = int(os.environ["WORLD_SIZE"])
        return {"devices": local, "num_nodes": world // local}
    return {}


def check_processes(trainer: Mapping[str, Any]) -> None:
    """ConfigError: the recipe asks for more or fewer processes than srun or torchrun has started.

    Lightning would train with the started ones, without a word. Values that leave the number to
    Lightning (auto, -1) and the default of one node or device fit any number.
    """
    started = processes()
    if not started:
        return
    if _tasks_without_layout():
        raise ConfigError(
            "Lightning needs --ntasks-per-node in the place of --ntasks: "
            "sbatch --ntasks-per-node=N reproduce/slurm.sh"
        )
    devices = _device_count(trainer["devices"])
    nodes = trainer["num_nodes"]
    same_devices = devices in (None, 1, started["devices"])
    same_nodes = nodes in (1, started["num_nodes"])
    if same_devices and same_nodes:
        return
    per_node = devices or started["devices"]
    if job() is not None:
        kind = "tasks"
        command = f"sbatch --nodes={nodes} --ntasks-per-node={per_node} reproduce/slurm.sh"
    else:
        kind = "processes"
        command = f"torchrun --nnodes={nodes} --nproc-per-node={per_node}"
    raise ConfigError(
        f"trainer.devices={trainer['devices']} trainer.num_nodes={nodes} do not fit the number of "
        f"{kind} that were started ({started['devices']} a node, nodes: {started['num_nodes']}): "
        f"leave both keys out, or start with {command}"
    )


def _tasks_without_layout() -> bool:
    """Whether a job has several tasks, and Slurm does not tell how many run on each node."""
    several = job() is not None and int(os.environ["SLURM_NTASKS"]) > 1
    return several and "SLURM_NTASKS_PER_NODE" not in os.environ


def _device_count(devices: object) -> int | None:
    """The number of devices that `trainer.devices` asks for; None: Lightning chooses."""
    if devices in ("auto", -1):
        return None
    if isinstance(devices, int):
        return devices
    return len(cast("Sized", devices))  # a list of the devices' own numbers


def requeue() -> None:
    """Ask Slurm to queue this job again; warn if it refuses."""
    name = job()
    if name is None:
        return
    command = ["scontrol", "requeue", name]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        rank_zero_warn(f"Slurm does not queue job {name} again: {' '.join(reason.split())}")
