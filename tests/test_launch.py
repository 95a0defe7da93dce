"""Who started the process decides its folder, its ranks, and what happens when it has to stop."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import TINY
from test_scripts import curve, mistake

from reproduce import launch, realnvp_cifar10
from reproduce.config import ConfigError, override
from reproduce.launch import job, processes, requeue, requeued, run_id
from reproduce.run_folder import step_checkpoints

ROOT = Path(__file__).parent.parent
JOB = {
    "SLURM_JOB_ID": "17",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NAME": "x",
}
JOB |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
ALONE = {**JOB, "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1"}


@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    """As started by a person."""
    for name in list(os.environ):
        if (
            name.startswith(("SLURM_", "TORCHELASTIC", "WANDB_", "PAPERFLOWS_"))
            or name == "LOCAL_RANK"
        ):
            monkeypatch.delenv(name)


def started(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_persons_run_gets_a_new_id_which_lightnings_other_ranks_share(monkeypatch):
    monkeypatch.delenv("PAPERFLOWS_RUN_ID", raising=False)
    first = run_id()
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", first)
    assert run_id() != first  # a second run in the same process
    handed_on = os.environ["PAPERFLOWS_RUN_ID"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_id() == handed_on
    assert processes() == {}
    assert job() is None


def test_a_jobs_run_is_the_jobs(monkeypatch):
    started(monkeypatch, JOB)
    assert (job(), run_id(), requeued()) == ("17", "slurm-17", False)
    assert processes() == {"devices": 2, "num_nodes": 2}
    started(
        monkeypatch,
        {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"},
    )
    assert (job(), run_id(), requeued()) == ("16_3", "slurm-16_3", True)
    monkeypatch.setenv(
        "SLURM_JOB_NAME", "interactive"
    )  # a person in an allocation, who may start many
    assert job() is None


def test_a_process_that_srun_did_not_start_would_wait_for_ever(monkeypatch):
    started(monkeypatch, JOB)
    monkeypatch.delenv("SLURM_STEP_ID")
    with pytest.raises(ConfigError, match="this job has 4 tasks: start the script by srun"):
        processes()


def test_a_sweeps_run_is_the_sweeps_even_in_a_job(monkeypatch):
    started(monkeypatch, {**ALONE, "WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "abc"})
    assert run_id() == "abc"


@pytest.mark.parametrize("number", ["17", "16_3"])
def test_requeue_asks_slurm_by_the_jobs_number(monkeypatch, tmp_path, number):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    requeue()
    assert not (tmp_path / "asked").exists()  # outside of Slurm
    started(monkeypatch, ALONE)
    if "_" in number:
        started(monkeypatch, {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3"})
    requeue()
    assert (tmp_path / "asked").read_text() == f"requeue {number}\n"
    scontrol.write_text("#!/bin/sh\necho 'Requested operation is presently disabled' >&2\nexit 1\n")
    with pytest.warns(
        UserWarning, match=f"does not queue job {number} again: Requested operation is"
    ):
        requeue()


def test_a_new_job_of_an_old_number_does_not_go_on_with_a_strangers_run(
    monkeypatch, tmp_path, capsys
):
    """A cluster that was set up anew counts from 1 again."""
    monkeypatch.chdir(tmp_path)
    started(monkeypatch, ALONE)
    steps = ["resume=auto", "trainer.max_steps=2", "trainer.val_check_interval=2"]
    realnvp_cifar10.main(override(TINY, steps))
    folder = Path("outputs/realnvp_cifar10/slurm-17")
    (folder / "result.json").unlink()
    line = mistake(capsys, *override(TINY, steps))
    assert (
        f"{folder} holds a run of an earlier job 17: add run_dir={folder} to go on with it" in line
    )
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    realnvp_cifar10.main(override(TINY, steps))
    assert (folder / "result.json").is_file()


def command(*words, cwd, **environment):
    """A real command line, with one thread, and what it printed."""
    variables = {**os.environ, **environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        words, cwd=cwd, env=variables, check=False, timeout=240, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.parametrize(
    ("words", "more"),
    [
        pytest.param([sys.executable], ["trainer.strategy=ddp"], id="lightning"),
        pytest.param(
            TORCHRUN, [], id="torchrun", marks=pytest.mark.slow
        ),  # its environment is in processes.py
    ],
)
def test_two_ranks_in_one_folder_train_as_one_process_does(tmp_path, words, more):
    """README's commands."""
    steps = [*TINY, "flow.n_scales=1", "trainer.max_steps=3"]
    script = str(ROOT / "reproduce" / "realnvp_cifar10.py")
    done = command(*words, script, *steps, "trainer.devices=2", *more, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("realnvp_cifar10  test/bpd  ") == 1
    [folder] = (tmp_path / "outputs" / "realnvp_cifar10").iterdir()
    assert [p.name for p in step_checkpoints(folder)] == [
        "step-00000003.ckpt",
        "step-00000002.ckpt",
    ]
    realnvp_cifar10.main([*steps, f"run_dir={tmp_path / 'alone'}"])
    losses = [
        [float(row["train/bpd"]) for row in curve(f)[1:]] for f in (folder, tmp_path / "alone")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_without_a_store_of_torchruns_the_ranks_still_share_an_id(tmp_path):
    from processes import start

    processes = start(2, _write_id, tmp_path, log=tmp_path / "log")
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0, 0], (tmp_path / "log").read_text()
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()


def _write_id(rank, folder):
    (folder / str(rank)).write_text(run_id())
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    assert launch.STORES
