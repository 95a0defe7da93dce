"""reproduce/slurm.sh on a real Slurm: layouts, arrays, and jobs that are preempted and go on."""

import csv
import json
import random
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from slurm_cluster import ENDED, Cluster, missing, wait_for

from reproduce.run_folder import newest_checkpoint

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        bool(missing()), reason=f"no Slurm here, {', '.join(missing())} missing: make slurm-test"
    ),
]
ROOT = Path(__file__).parents[1]
EXPERIMENT = "realnvp_cifar10"
TINY = [
    EXPERIMENT,
    "preset=demo",
    "logger.name=none",
    "flow.n_scales=1",
    "flow.hidden_channels=4",
    "flow.n_blocks=1",
    "data.size=8",
    "data.n_train=64",
    "data.batch_size=16",
    "data.n_val=16",
    "data.n_test=16",
    "eval.bn_images=32",
    "samples.n=1",
    "samples.temperatures=[1.0]",
    "samples.every_n_steps=100000",
    "checkpoint.every_n_steps=100000",
    "checkpoint.select=last",
    "trainer.val_check_interval=5",
    "trainer.precision=32-true",
]
PAIR = ["--nodes=1", "--ntasks-per-node=2"]
# That anything may take. Alone on two cores a job needs some fifteen, most of them for imports.
SECONDS = 240
CYCLES = 10


class Checkout:
    """A repository's root of its own: outputs/ and slurm-<job>.out land in a temporary folder."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder = folder
        self.cluster = cluster
        packages = [path.parent.name for path in ROOT.glob("*/__init__.py")]
        for name in {*packages, "configs", "results"} - {"tests"}:
            (folder / name).symlink_to(ROOT / name)

    def sbatch(self, flags: list[str], arguments: list[str], folder: Path | None = None) -> str:
        """The number of the submitted job."""
        command = ["sbatch", "--parsable", *flags, str(ROOT / "reproduce" / "slurm.sh"), *arguments]
        self.cluster.environment["PYTHON"] = sys.executable
        return self.cluster.run(*command, cwd=folder or self.folder)

    def output(self, job: str) -> str:
        return (self.folder / f"slurm-{job}.out").read_text()

    def run_folder(self, job: str) -> Path:
        return self.folder / "outputs" / EXPERIMENT / f"slurm-{job}"

    def finish(self, job: str) -> Path:
        """The run folder of a job that has to end well."""
        state = self.cluster.wait(job, SECONDS)
        assert state["JobState"] == "COMPLETED", self.output(job)
        return self.run_folder(job)

    def start_again(self, job: str, restarts: int) -> None:
        """Wait until the job is queued again, and spare it the two minutes of Slurm's own delay.

        A moment of it stays: a node refuses a job that it has ended in the same second.
        """
        state = self.cluster.wait(job, SECONDS, "PENDING", *ENDED)
        assert (state["JobState"], state["Restarts"]) == ("PENDING", str(restarts)), self.output(
            job
        )
        time.sleep(1.5)
        self.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def wait_for_step(self, job: str, step: int) -> None:
        """Until the job has trained to `step`, as its curve says."""

        def has_come_so_far():
            state = self.cluster.job(job)["JobState"]
            assert state in ("PENDING", "RUNNING", "COMPLETING"), f"{state}: {self.output(job)}"
            return last_step(self.run_folder(job)) >= step

        wait_for(has_come_so_far, SECONDS, lambda: f"step {step}: {self.output(job)}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def checkout(tmp_path, cluster):
    return Checkout(tmp_path, cluster)


def read_curve(folder):
    """The rows of a run's curve, none where it has not begun."""
    path = folder / "curve.csv"
    if not path.is_file():
        return []
    return list(csv.DictReader(path.read_text().splitlines()))


def curve(folder, *without):
    """The rows without the seconds, and without other columns."""
    return [
        {k: v for k, v in row.items() if k not in ("seconds", *without)}
        for row in read_curve(folder)
    ]


def last_step(folder):
    return max((int(row["step"]) for row in read_curve(folder)), default=-1)


def newest(folder):
    """The newest checkpoint; none is a failure."""
    newest_of_all = newest_checkpoint(folder)
    assert newest_of_all is not None, f"no checkpoint in {folder}"
    return newest_of_all[1]


def result(folder):
    return json.loads((folder / "result.json").read_text())


def same_weights(one, other):
    weights = newest(one)["state_dict"]
    others = newest(other)["state_dict"]
    return weights.keys() == others.keys() and all(
        torch.equal(weights[key], others[key]) for key in weights
    )


@pytest.fixture(scope="module")
def layouts(tmp_path_factory, cluster):
    """The same run as two tasks of one node, and as one task on each of two.

    Returns the run folders and the jobs' names.
    """
    checkout = Checkout(tmp_path_factory.mktemp("layouts"), cluster)
    jobs = [
        checkout.sbatch(flags, [*TINY, "trainer.max_steps=20"]) for flags in (PAIR, ["--nodes=2"])
    ]
    return [checkout.finish(job) for job in jobs], [cluster.job(job)["JobName"] for job in jobs]


def test_two_tasks_of_one_node_train_as_one_task_on_each_of_two(layouts):
    (one, two), names = layouts
    assert [int(row["step"]) for row in curve(one)] == [0, 5, 10, 15, 20]
    assert all(float(row["val/bpd"]) < 20 for row in curve(one))
    assert curve(one) == curve(two)
    assert same_weights(one, two)
    assert result(one)["metrics"] == result(two)["metrics"]
    trainers = [result(folder)["config"]["trainer"] for folder in (one, two)]
    assert [(t["num_nodes"], t["devices"], t["strategy"]) for t in trainers] == [
        (1, 2, "ddp"),
        (2, 1, "ddp"),
    ]
    assert names == [EXPERIMENT, EXPERIMENT]


def test_an_array_is_seeds_or_rows_of_a_grid_each_in_a_folder_of_its_own(checkout):
    grid = "method: grid\nparameters:\n  optim.lr: {values: [1.0e-3, 5.0e-4]}\n  seed: {value: 7}\n"
    (checkout.folder / "grid.yaml").write_text(grid)
    short = [*TINY, "trainer.max_steps=2"]
    seeds = checkout.sbatch(["--array=1-2", "--job-name=mine"], short)
    rows = checkout.sbatch(["--array=0-1"], [*short, "--grid", "grid.yaml", "optim.warmup_steps=1"])
    results = [
        result(checkout.finish(f"{job}_{i}"))
        for job, i in [(seeds, 1), (seeds, 2), (rows, 0), (rows, 1)]
    ]
    assert [r["run"] for r in results] == [
        f"slurm-{seeds}_1",
        f"slurm-{seeds}_2",
        f"slurm-{rows}_0",
        f"slurm-{rows}_1",
    ]
    assert [r["seed"] for r in results] == [1, 2, 7, 7]
    assert [r["config"]["optim"]["lr"] for r in results] == [1e-3, 1e-3, 1e-3, 5e-4]
    assert [r["config"]["optim"]["warmup_steps"] for r in results] == [0, 0, 1, 1]
    assert len({r["metrics"]["test/bpd"] for r in results}) == 4
    assert checkout.cluster.job(f"{seeds}_1")["JobName"] == "mine"


def enough_steps(folder):
    """More than ten cycles can take, also on a fast machine.

    Each may take as long as it is from one validation to the next, and a second.
    """
    times = [float(row["seconds"]) for row in read_curve(folder)]
    return int(CYCLES * (6 + last_step(folder) / (times[-1] - times[0] + 0.1)))


def test_ten_times_preempted_and_requeued_without_a_hang_and_bit_identical(checkout, layouts):
    """Each cycle at a moment of its own; every wait has an end, so that a hang is a failure."""
    arguments = [*TINY, f"trainer.max_steps={enough_steps(layouts[0][0])}"]
    job, other = (checkout.sbatch(PAIR, arguments) for _ in range(2))
    folder = checkout.run_folder(job)
    moment = random.Random(0)
    saved = [0]
    for cycle in range(1, CYCLES + 1):
        checkout.wait_for_step(job, saved[-1] + 1)
        time.sleep(moment.uniform(0, 0.3))
        checkout.cluster.run("scancel", "--signal=USR1", job)
        checkout.start_again(job, cycle)
        saved.append(newest(folder)["global_step"])
    assert checkout.finish(job) == folder
    assert checkout.cluster.job(job)["Restarts"] == str(CYCLES)
    assert saved == sorted(set(saved))
    went_on = re.findall(r"going on from \S*step-(\d+)\.ckpt", checkout.output(job))
    assert [int(step) for step in went_on] == saved[1:]

    never = checkout.finish(other)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, never.name}
    assert curve(folder, "train/bpd") == curve(never, "train/bpd")
    means = [[float(row["train/bpd"]) for row in curve(one)[1:]] for one in (folder, never)]
    assert means[0] == pytest.approx(
        means[1], rel=1e-6
    )  # float32, summed over ranks before steps or after
    assert result(folder)["metrics"] == result(never)["metrics"]
    assert same_weights(folder, never)


def test_a_job_preempted_by_slurm_goes_on_and_a_cancelled_one_has_saved_and_stays_cancelled(
    checkout,
):
    cluster = checkout.cluster
    job = checkout.sbatch(PAIR, [*TINY, "trainer.max_steps=100000"])
    checkout.wait_for_step(job, 5)
    urgent = cluster.run(
        "sbatch",
        "--parsable",
        "-p",
        "urgent",
        "--nodes=2",
        "--exclusive",
        "--wrap=true",
        cwd="/tmp",
    )
    cluster.wait(urgent, 50, "COMPLETED")  # before the minute of grace is over
    checkout.start_again(job, 1)
    first = newest(checkout.run_folder(job))["global_step"]
    assert first >= 5

    checkout.wait_for_step(job, first + 1)
    cluster.run("scancel", job)
    state = cluster.wait(job, SECONDS)
    wait_for(lambda: not cluster.run("squeue", "-h"), SECONDS, "the cancelled job to leave")
    assert (state["JobState"], cluster.job(job)["Restarts"]) == ("CANCELLED", "1")
    assert newest(checkout.run_folder(job))["global_step"] > first, checkout.output(job)


MISTAKES = {  # flags of sbatch, arguments, what the one line says
    "nothing": ([], [], "no experiment given: sbatch reproduce/slurm.sh EXPERIMENT key=value ..."),
    "unknown": ([], ["realnvp"], "experiment realnvp is not known: give one of glow_cifar10, "),
    "option": ([], [EXPERIMENT, "--array=3"], "sbatch's own flags stand before reproduce/slurm.sh"),
    "run_dir": (
        ["--array=0"],
        [EXPERIMENT, "run_dir=x"],
        "run_dir= is one folder for all tasks of an array",
    ),
    "seed": (
        ["--array=0"],
        [EXPERIMENT, "seed=3"],
        "the index of an array is the seed: leave seed= out",
    ),
    "tasks": (
        ["--ntasks=3", "--ntasks-per-node=2"],
        [EXPERIMENT],
        "give --nodes and --ntasks-per-node, and no --ntasks",
    ),
    "no array": (
        [],
        [EXPERIMENT, "--grid", "grid.yaml"],
        "--grid without an array: sbatch --array=0-N",
    ),
    "no file": ([], [EXPERIMENT, "--grid"], "--grid needs a file"),
    "no grid": (
        ["--array=0"],
        [EXPERIMENT, "--grid", "x.yaml"],
        "x.yaml is no file: give a sweep file",
    ),
    "elsewhere": (["elsewhere"], [EXPERIMENT], "is not the repository's root: submit from there"),
}


def test_a_mistake_is_one_line_and_exit_code_1(checkout):
    """All of them at once: none comes as far as Python's imports."""
    elsewhere = checkout.folder / "elsewhere"
    elsewhere.mkdir()
    jobs = {}
    for name, (flags, arguments, _) in MISTAKES.items():
        folder = checkout.folder
        if "elsewhere" in flags:
            folder = elsewhere
        output = f"--output={checkout.folder / name.replace(' ', '-')}.out"
        jobs[name] = checkout.sbatch(
            [output, *(f for f in flags if f != "elsewhere")], arguments, folder
        )
    for name, job in jobs.items():
        state = checkout.cluster.wait(job, SECONDS)
        lines = (checkout.folder / f"{name.replace(' ', '-')}.out").read_text().splitlines()
        assert (state["JobState"], state["ExitCode"]) == ("FAILED", "1:0"), name
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert MISTAKES[name][2] in lines[0]
