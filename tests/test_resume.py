"""A run that was killed at any moment goes on bit for bit.

One that is asked to stop does so at the same step on all ranks.
"""

import csv
import random
import re
import signal
import time

import pytest
import torch
from processes import Run

from reproduce.config import override
from reproduce.run_folder import step_checkpoints

EVERYTHING = [
    "ema.decay=0.9",
    "optim.schedule=cosine",
    "optim.warmup_steps=3",
    "trainer.max_steps=10",
]
WORKERS = "data.num_workers=2"


def curve(folder):
    with (folder / "curve.csv").open() as file:
        return list(csv.DictReader(file))


def same(a, b):
    """Whether two nested states hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_same_end(run, whole, ranks=1, timeout=180):
    assert run.wait(timeout) == whole.wait(timeout) == [0] * ranks, run.output() + whole.output()
    for rank in range(ranks):
        assert run.losses(rank) == whole.losses(rank)
    a = run.final()
    b = whole.final()
    for part in (
        "state_dict",
        "current_model_state",
        "averaging_state",
        "optimizer_states",
        "lr_schedulers",
    ):
        assert same(a[part], b[part]), part


@pytest.mark.parametrize(
    ("arguments", "options", "kill"),
    [
        ([WORKERS], {}, (7, 3)),
        # the third of the four micro-batches of a step
        (["data.micro_batch=4"], {"plain": True}, (5, 6)),
        (["data.micro_batch=2"], {"plain": True, "ranks": 2}, (6, 9)),
        ([WORKERS], {"ranks": 2}, (3, 3)),
    ],
    ids=["workers", "accumulating", "ranks-accumulating", "ranks-workers"],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, arguments, options, kill):
    arguments = [*EVERYTHING, *arguments]
    killed = Run(tmp_path / "run", *arguments, kill=kill, **options)
    whole = Run(tmp_path / "whole", *arguments, **options)
    assert set(killed.wait()) == {-signal.SIGKILL}, killed.output()
    assert max(killed.losses()) < kill
    resumed = Run(tmp_path / "run", *arguments, "resume=auto", **options)
    assert_same_end(resumed, whole, options.get("ranks", 1))
    assert "going on from" in resumed.output()
    a = curve(resumed.folder)
    b = curve(whole.folder)
    assert [row["step"] for row in a] == ["0", "6", "10"]
    for key in ("step", "images", "lr", "val/bpd"):
        assert [row[key] for row in a] == [row[key] for row in b]
    # After a resume, sums over ranks are taken in another order.
    for row, other in zip(a[1:], b[1:], strict=True):
        assert float(row["train/bpd"]) == pytest.approx(float(other["train/bpd"]), rel=1e-6)


def test_a_run_that_was_stopped_again_and_again_goes_on_bit_for_bit(tmp_path):
    """It is stopped at the ends of two epochs of four steps, before a validation, and at the end.

    Lightning by itself miscounts epochs after the second stop.
    """
    whole = Run(tmp_path / "whole", *EVERYTHING)
    for stop in (4, 6, 8, 10):
        run = Run(tmp_path / "run", *EVERYTHING, "resume=auto", stop=stop)
        assert run.wait() == [75], run.output()
        assert run.final()["global_step"] == stop
    assert_same_end(Run(tmp_path / "run", *EVERYTHING, "resume=auto"), whole)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name
)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, number):
    """Rank 1 is slower, and either rank gets the signal: Lightning's handlers deadlock here."""
    options = {"ranks": 2, "slow": 0.02}
    run = Run(tmp_path / "run", "trainer.max_steps=2000", **options)
    run.wait_for(lambda: (tmp_path / "run" / "checkpoints").is_dir() and len(run.losses()) > 3)
    run.signal(number, rank=int(number == signal.SIGTERM))
    assert run.wait() == [75, 0]
    steps = [max(run.losses(rank))[0] + 1 for rank in range(2)]
    saved = run.final()["global_step"]
    assert steps == [saved, saved]
    assert re.search(
        rf"stopped at step {saved}, which is saved; go on with: .* resume=auto", run.output()
    )
    assert "Traceback" not in run.output()
    if number == signal.SIGTERM:
        whole = Run(tmp_path / "whole", f"trainer.max_steps={saved + 3}", ranks=2)
        resumed = Run(tmp_path / "run", f"trainer.max_steps={saved + 3}", "resume=auto", ranks=2)
        assert whole.wait() == resumed.wait() == [0, 0], resumed.output()
        assert whole.losses(1) == resumed.losses(1)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name
)
def test_a_signal_to_a_run_and_its_workers_stops_it_in_order(tmp_path, number):
    """Ctrl-C in a terminal and Slurm signal all processes; workers must not react."""
    run = Run(tmp_path / "run", "trainer.max_steps=2000", WORKERS)
    run.wait_for(lambda: (tmp_path / "run.trace0").exists() and len(run.losses()) > 3)
    run.signal(number, group=True)
    assert run.wait() == [75], run.output()
    saved = run.final()["global_step"]
    assert saved == max(run.losses())[0] + 1
    assert f"stopped at step {saved}, which is saved; go on with" in run.output()
    assert "Traceback" not in run.output()


@pytest.mark.parametrize("hook", ["on_sanity_check_start", "on_test_start"])
def test_outside_of_training_a_signal_ends_the_run_at_once_and_loses_nothing(tmp_path, hook):
    run = Run(tmp_path / "run", "trainer.max_steps=3", stop=hook)
    assert run.wait() == [75], run.output()
    assert "stopped; go on with" in run.output()
    assert not (tmp_path / "run" / "result.json").exists()
    again = Run(tmp_path / "run", "trainer.max_steps=3", "resume=auto")
    assert again.wait() == [0], again.output()
    assert [row["step"] for row in curve(tmp_path / "run")] == ["0", "3"]
    assert again.losses().keys() == {(0, 0), (1, 1), (2, 2)}
    assert (tmp_path / "run" / "curve.png").exists()


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    run = Run(tmp_path / "run", "trainer.max_steps=2000", slow=3)
    run.wait_for(lambda: (tmp_path / "run.trace0").exists() and run.losses())
    run.signal(signal.SIGINT)
    run.wait_for(lambda: "SIGINT: stopping after this step" in run.output())
    run.signal(signal.SIGINT)
    start = time.monotonic()
    assert run.wait() == [1], run.output()
    assert time.monotonic() - start < 2.9
    assert "go on with: python reproduce/realnvp_cifar10.py" in run.output()


def test_two_ranks_that_were_stopped_before_their_test_go_on_to_it(tmp_path):
    """The last row of the curve is made once, by all ranks.

    The run ends by epochs, with steps after the last validation.
    """
    arguments = ["trainer.max_epochs=2", "trainer.max_steps=-1", "trainer.val_check_interval=5"]
    whole = Run(tmp_path / "run", *arguments, ranks=2)
    assert whole.wait() == [0, 0], whole.output()
    before = curve(tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    again = Run(tmp_path / "run", *arguments, "resume=auto", ranks=2)
    assert again.wait() == [0, 0], again.output()
    assert [row["step"] for row in before] == ["0", "5", "8"]
    assert curve(tmp_path / "run") == before


def test_a_run_that_only_time_ends_saves_when_it_is_due_and_at_the_end(tmp_path):
    run = Run(
        tmp_path / "run",
        "trainer.max_steps=-1",
        "trainer.max_time=00:00:00:02",
        "checkpoint.every_n_steps=7",
    )
    assert run.wait() == [0], run.output()
    last = len(run.losses())
    names = [path.name for path in step_checkpoints(tmp_path / "run")]
    assert names == [f"step-{step:08d}.ckpt" for step in (last, (last - 1) // 7 * 7) if step]
    assert [int(row["step"]) for row in curve(tmp_path / "run")] == [*range(0, last, 6), last]


def test_a_folder_in_use_is_refused_and_free_after_a_kill(tmp_path):
    """Two processes cannot share a folder; a killed process no longer locks it."""
    first = Run(tmp_path / "run", "trainer.max_steps=2000")
    first.wait_for(lambda: len(list((tmp_path / "run").glob("checkpoints/step-*"))) == 2)
    second = Run(tmp_path / "run", "trainer.max_steps=2000", "resume=auto")
    assert second.wait() == [1]
    assert "is in use by a run that has not ended" in first.output()
    first.kill()
    third = Run(tmp_path / "run", "trainer.max_steps=4", "resume=auto")
    assert third.wait() == [0], third.output()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2])
def test_soak_twenty_random_kills(tmp_path, ranks):
    """Kills come while a run starts, trains, saves or validates.

    At the end its weights are those of a run that was never killed.
    """
    long_run = [
        f"trainer.max_steps={800 // ranks}",
        "checkpoint.every_n_steps=3",
        "trainer.val_check_interval=20",
        WORKERS,
        "checkpoint.select=last",
        "samples.n=1",
        "samples.every_n_steps=10000",
    ]
    arguments = override(EVERYTHING, long_run)
    whole = Run(tmp_path / "whole", *arguments, ranks=ranks)
    assert whole.wait(600) == [0] * ranks, whole.output()
    chance = random.Random(ranks)
    moments = []
    for _ in range(20):
        # Slow steps keep the run from ending too early.
        run = Run(tmp_path / "run", *arguments, "resume=auto", ranks=ranks, slow=0.1 / ranks)
        time.sleep(chance.uniform(0.5, 8))
        run.kill()
        assert all(p.exitcode == -signal.SIGKILL for p in run.processes), run.output()
        trace = tmp_path / "run.trace0"
        step = 0
        if trace.exists() and trace.stat().st_size:
            step, _ = max(run.losses())
        moments.append(step)
    assert moments == sorted(moments)
    assert moments[-1] > moments[0]
    run = Run(tmp_path / "run", *arguments, "resume=auto", ranks=ranks)
    assert_same_end(run, whole, ranks, timeout=600)
    print(f"killed after steps {moments}")
