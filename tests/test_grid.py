"""Rows of a sweep grid, and the command that the job script makes of them; no Slurm needed."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from reproduce import grid
from reproduce.config import compose

ROOT = Path(__file__).parents[1]
SWEEP = """
program: reproduce/realnvp_cifar10.py
method: grid
parameters:
  preset: {value: demo}
  optim.lr: {values: [1e-3, 5.0e-4, 1e-05]}
  optim.betas: {value: [0.9, 0.95]}
  flow.n_blocks: {values: [2, 4]}
  optim.clip_norm: {value: null}
  data.hflip: {value: true}
"""


@pytest.fixture
def sweep(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP)
    return path


def mistake(*argv):
    with pytest.raises(SystemExit) as stop:
        grid.main([str(argument) for argument in argv])
    assert isinstance(stop.value.code, str), "exit code 0 for a mistake"
    assert "\n" not in stop.value.code
    return stop.value.code


def test_every_row_is_printed_once_and_the_number_of_rows(sweep, capsys):
    grid.main([str(sweep)])
    assert capsys.readouterr().out == "6\n"
    rows = []
    for index in range(6):
        grid.main([str(sweep), str(index)])
        rows.append(capsys.readouterr().out.splitlines())
    assert rows[1] == [
        "data.hflip=true",
        "flow.n_blocks=2",
        "optim.betas=[0.9, 0.95]",
        "optim.clip_norm=null",
        "optim.lr=5.0e-4",
        "preset=demo",
    ]
    varied = [(row[1], row[4]) for row in rows]
    blocks = ("flow.n_blocks=2", "flow.n_blocks=4")
    rates = ("optim.lr=1e-3", "optim.lr=5.0e-4", "optim.lr=1e-05")
    assert varied == [(b, r) for b in blocks for r in rates]


def test_a_recipe_reads_the_values_that_the_file_holds(sweep):
    config = compose("realnvp_cifar10", grid.words(grid.rows(sweep)[-1]))
    assert (config.preset, config.flow.n_blocks, config.optim.lr) == ("demo", 4, 1e-5)
    assert (list(config.optim.betas), config.optim.clip_norm, config.data.hflip) == (
        [0.9, 0.95],
        None,
        True,
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "method: random\nparameters: {a: {values: [1]}}",
            "is no grid: an array needs a sweep file with method: grid",
        ),
        ("- 1", "is no grid"),
        ("method: grid", "has no parameters"),
        ("method: grid\nparameters: {a.b: {min: 0, max: 1}}", "a.b in "),
        ("method: grid\nparameters: {a.b: {values: []}}", "is no list of values"),
        (
            "method: grid\nparameters: {a.b: 3}",
            "is no list of values: a grid needs values: [...] or value: ...",
        ),
        ("method: [", "cannot read"),
    ],
)
def test_a_file_without_a_grid_is_one_line(tmp_path, text, said):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    line = mistake(path, 0)
    assert said in line
    assert str(path) in line


def test_mistakes_of_the_command_line_are_one_line(sweep, tmp_path):
    assert mistake(sweep, 6) == f"error: {sweep} has 6 rows, none with number 6: --array=0-5"
    assert "sweep.yml is no file" in mistake(tmp_path / "sweep.yml")
    for argv in ([], [sweep, "-1"], [sweep, "x"], [sweep, 1, 2]):
        assert "a number from 0" in mistake(*argv)


def run_script(
    tmp_path,
    *arguments,
    srun='printf "%s\\n" "$SLURM_JOB_NAME" "$@"',
    scontrol="exit 1",
    **variables,
):
    """What reproduce/slurm.sh hands to srun, one argument on each line.

    Programs that print their arguments stand in for Slurm's srun and scontrol.
    """
    for name, text in (("srun", srun), ("scontrol", scontrol)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SRUN"))}
    path = f"{tmp_path}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", ROOT / "reproduce" / "slurm.sh", *arguments],
        env={**ours, "PATH": path, **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_JOB_NAME": "paperflows",
    "SLURM_NNODES": "1",
    "SLURM_JOB_NODELIST": "n1",
    "PYTHON": sys.executable,
}


def command_line(tmp_path, *arguments, **variables):
    done = run_script(tmp_path, *arguments, **{**JOB, **variables})
    assert done.returncode == 0, done.stderr
    _, name, *command = done.stdout.splitlines()  # behind the line with the date
    assert name == "realnvp_cifar10"
    return command[: command.index("-m")], command[command.index("-m") + 1 :]


def test_a_job_of_one_task(tmp_path):
    srun, python = command_line(tmp_path, "realnvp_cifar10", "seed=1", "data.root=a b")
    assert srun == [
        "--kill-on-bad-exit",
        "--nodes=1",
        "--ntasks=1",
        "--ntasks-per-node=1",
        sys.executable,
    ]
    layout = ["trainer.num_nodes=1", "trainer.devices=1"]
    assert python == [
        "reproduce.realnvp_cifar10",
        *layout,
        "seed=1",
        "data.root=a b",
        "resume=auto",
    ]


def test_several_nodes_are_ddp_and_the_users_words_stand(tmp_path):
    """A key that is given twice would be refused."""
    arguments = ["realnvp_cifar10", "trainer.strategy=auto"]
    srun, python = command_line(tmp_path, *arguments, SLURM_NNODES="2", SLURM_NTASKS_PER_NODE="4")
    assert srun[1:4] == ["--nodes=2", "--ntasks=8", "--ntasks-per-node=4"]
    layout = ["trainer.num_nodes=2", "trainer.devices=4"]
    assert python[1:] == [*layout, "trainer.strategy=auto", "resume=auto"]
    _, python = command_line(tmp_path, "realnvp_cifar10", "resume=auto")
    assert python.count("resume=auto") == 1
    _, python = command_line(
        tmp_path, "realnvp_cifar10", SLURM_NNODES="2", SLURM_NTASKS_PER_NODE="4"
    )
    assert python[1:] == [*layout, "trainer.strategy=ddp", "resume=auto"]


def test_the_index_of_an_array_is_the_seed_or_the_row(tmp_path, sweep):
    _, python = command_line(tmp_path, "realnvp_cifar10", "preset=demo", SLURM_ARRAY_TASK_ID="3")
    assert python[3:] == ["preset=demo", "seed=3", "resume=auto"]
    arguments = ["realnvp_cifar10", "--grid", str(sweep), "seed=1"]
    _, python = command_line(tmp_path, *arguments, SLURM_ARRAY_TASK_ID="3")
    assert python[3:] == ["seed=1", *grid.words(grid.rows(sweep)[3]), "resume=auto"]


def test_outside_slurm_the_script_says_how_to_submit_it(tmp_path):
    done = run_script(tmp_path, "realnvp_cifar10", "seed=1")
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: this is a job script: sbatch reproduce/slurm.sh realnvp_cifar10 seed=1\n"
    )


def test_a_preempted_task_of_an_array_queues_itself_again_and_not_the_whole_array(tmp_path):
    """The last task of an array has the array's own number as its SLURM_JOB_ID."""
    array = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    asked = tmp_path / "asked"
    asks = f'echo "$@" >> {shlex.quote(str(asked))}'
    told = f'{asks}; echo "PreemptTime=2026-11-26T00:00:00"'
    done = run_script(
        tmp_path, "realnvp_cifar10", srun="exit 75", scontrol=told, **{**JOB, **array}
    )
    assert done.returncode == 75
    assert asked.read_text().splitlines() == [
        "update JobId=7_2 JobName=realnvp_cifar10",
        "show job 7_2",
        "requeue 7_2",
    ]
    asked.unlink()
    done = run_script(tmp_path, "realnvp_cifar10", srun="exit 75", scontrol=asks, **JOB)
    assert done.returncode == 75  # stopped, but not by Slurm
    assert "requeue" not in asked.read_text()
