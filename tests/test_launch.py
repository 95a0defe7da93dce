"""Who started the process decides its folder, its ranks, and what happens when it has to stop."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import TINY
from test_scripts import curve, mistake

from reproduce import launch, realnvp_cifar10
from reproduce.config import ConfigError, override
from reproduce.experiment import load_config, trainer_settings
from reproduce.launch import check_processes, job, processes, requeue, requeued, run_id
from reproduce.provenance import experiment_of
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


PAIR = {**ALONE, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
ONE_RANK = {
    "TORCHELASTIC_RUN_ID": "none",
    "LOCAL_WORLD_SIZE": "1",
    "WORLD_SIZE": "1",
}


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "how"),
    [
        (ALONE, 2, 1, "sbatch --nodes=1 --ntasks-per-node=2 reproduce/slurm.sh"),
        (ALONE, "auto", 2, "sbatch --nodes=2 --ntasks-per-node=1 reproduce/slurm.sh"),
        (PAIR, 4, 1, "sbatch --nodes=1 --ntasks-per-node=4 reproduce/slurm.sh"),
        (PAIR, [0, 1, 2], 1, "sbatch --nodes=1 --ntasks-per-node=3 reproduce/slurm.sh"),
        (ONE_RANK, 2, 1, "torchrun --nnodes=1 --nproc-per-node=2"),
    ],
)
def test_more_devices_than_processes_are_refused(monkeypatch, variables, devices, nodes, how):
    """Lightning would train with the processes that there are."""
    started(monkeypatch, variables)
    with pytest.raises(ConfigError) as refusal:
        check_processes({"devices": devices, "num_nodes": nodes})
    line = str(refusal.value)
    assert f"trainer.devices={devices} trainer.num_nodes={nodes} do not fit" in line
    assert line.endswith(f"leave both keys out, or start with {how}")


def test_two_devices_in_a_job_of_one_task_are_one_line(monkeypatch, tmp_path, capsys):
    started(monkeypatch, ALONE)
    words = [*TINY, f"run_dir={tmp_path / 'run'}", "trainer.devices=2", "trainer.strategy=ddp"]
    line = mistake(capsys, *words)
    assert "the number of tasks that were started (1 a node, nodes: 1)" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "devices"),
    [(ALONE, "auto"), (ALONE, 1), (PAIR, 2), (PAIR, 1), (PAIR, -1), (ONE_RANK, 1), ({}, 8)],
)
def test_devices_that_fit_or_are_left_to_lightning_are_taken(monkeypatch, variables, devices):
    """One device is what preset=cpu says; tasks of a job multiply it."""
    started(monkeypatch, variables)
    check_processes({"devices": devices, "num_nodes": 1})


@pytest.mark.parametrize("devices", ["auto", "1", "-1"])
def test_devices_that_are_left_open_are_those_that_were_started(monkeypatch, tmp_path, devices):
    started(monkeypatch, PAIR)
    words = ["preset=demo", f"trainer.devices={devices}", f"run_dir={tmp_path / 'run'}"]
    config = load_config("realnvp_cifar10.py", "", words)
    assert trainer_settings(config)["devices"] == 2


def test_numbers_of_gpus_on_a_cpu_are_one_line_under_a_launcher_too(monkeypatch, tmp_path, capsys):
    started(monkeypatch, PAIR)
    line = mistake(capsys, *TINY, f"run_dir={tmp_path / 'run'}", "trainer.devices=0,1")
    assert "trainer.devices=[0, 1] means GPUs, and this run is on the CPU" in line


def test_tasks_without_their_number_a_node_are_refused(monkeypatch):
    """Lightning raises a RuntimeError there."""
    started(monkeypatch, JOB)
    with pytest.raises(ConfigError, match="needs --ntasks-per-node in the place of --ntasks"):
        check_processes({"devices": "auto", "num_nodes": 1})


def test_a_sweeps_run_is_the_sweeps_even_in_a_job(monkeypatch):
    started(monkeypatch, {**ALONE, "WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "abc"})
    assert run_id() == "abc"


@pytest.mark.parametrize("number", ["17", "16_3"])
def test_requeue_asks_slurm_by_the_jobs_number(monkeypatch, tmp_path, number):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {shlex.quote(str(tmp_path / "asked"))}\n')
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


def command(*words, cwd, packages=ROOT):
    """A real command line, with one thread, and what it printed.

    packages: where Python finds what is not beside the script, as an editable install does.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(packages)}
    return subprocess.run(
        words, cwd=cwd, env=variables, check=False, timeout=240, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def another_clone(folder):
    """One that ends every program that imports it."""
    for path in ROOT.glob("*/__init__.py"):
        copied = folder / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True)
        copied.write_text("raise SystemExit('this is another clone')\n")
    return folder


def test_every_command_takes_the_packages_beside_it():
    """Before its first import of them: one line, the same in all."""
    for path in (ROOT / "reproduce").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__":' not in source:
            continue
        statements = [ast.unparse(node) for node in ast.parse(source).body]
        position = statements.index(
            "if not __package__:\n    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"
        )
        imports = [line for line in statements[:position] if re.match("import|from", line)]
        assert {line.split()[1] for line in imports} <= {"sys", "pathlib", "omegaconf"}, path


def test_an_import_of_a_script_leaves_the_search_path_as_it_is():
    """`load` imports scripts. The folder of an installed copy may shadow Python's modules."""
    for path in (ROOT / "reproduce").glob("*.py"):
        if "sys.path" not in path.read_text(encoding="utf-8"):
            continue
        before = list(sys.path)
        module = importlib.util.find_spec(f"reproduce.{path.stem}")
        module.loader.exec_module(importlib.util.module_from_spec(module))
        assert sys.path == before, path


def test_a_script_with_the_code_of_another_clone_is_refused(tmp_path):
    """As under `python -P`, which leaves the script's folder out."""
    script = tmp_path / "reproduce" / "realnvp_moons.py"
    script.parent.mkdir()
    for name in ("realnvp_moons.py", "provenance.py"):
        (script.parent / name).touch()
    with pytest.raises(ConfigError) as refusal:
        experiment_of(str(script))
    assert str(refusal.value) == (
        f"{script} has imported the code of another clone, {ROOT}: "
        f"cd {tmp_path} and run python -m reproduce.realnvp_moons"
    )


def test_a_link_to_a_script_has_the_scripts_recipe(tmp_path, monkeypatch):
    (tmp_path / "mine.py").symlink_to(ROOT / "reproduce" / "realnvp_moons.py")
    assert experiment_of(str(tmp_path / "mine.py")) == "realnvp_moons"
    monkeypatch.chdir(tmp_path)
    assert experiment_of("glow_photos") == "glow_photos"  # a script of one's own, or a name


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
    """README's commands, with another clone installed, by symbolic links of other names.

    The ranks that Lightning starts, and the workers that load data, have to find this clone too.
    """
    steps = [*TINY, "flow.n_scales=1", "trainer.max_steps=3", "data.num_workers=1"]
    other = another_clone(tmp_path / "another clone")
    (tmp_path / "my experiment").symlink_to(ROOT / "reproduce" / "realnvp_cifar10.py")
    script = tmp_path / "link"
    script.symlink_to(tmp_path / "my experiment")
    arguments = [*steps, "trainer.devices=2", *more]
    done = command(*words, script, *arguments, cwd=tmp_path, packages=other)
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


def test_ranks_share_an_id_where_torchrun_keeps_no_store(tmp_path):
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
