"""The scripts as a user runs them: in-process where possible, else as real processes."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import TINY
from PIL import Image

from datamodules import DATA
from datamodules.two_moons import TwoMoons
from flows.recompute import recompute
from reproduce import config as config_module
from reproduce import load, realnvp_cifar10, realnvp_moons
from reproduce.config import override
from reproduce.run_folder import read_checkpoint, step_checkpoints

ROOT = Path(__file__).parent.parent


def run(folder, *arguments):
    return realnvp_cifar10.main(override([*TINY, f"run_dir={folder}"], arguments))


def pixels(path):
    return np.asarray(Image.open(path))


def newest(folder):
    return step_checkpoints(folder)[0]


def curve(folder):
    with (folder / "curve.csv").open() as file:
        return list(csv.DictReader(file))


def mistake(capsys, *arguments, main=realnvp_cifar10.main):
    """The one line that a wrong command line answers with."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert isinstance(stop.value.code, str), "exit code 0 for a mistake"
    assert "\n" not in stop.value.code
    assert "Traceback" not in capsys.readouterr().err
    return stop.value.code


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps and what it returned."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, run(folder, "trainer.max_steps=6")


def test_the_result_has_configuration_and_provenance(finished):
    folder, result = finished
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["experiment"] == "realnvp_cifar10"
    assert (result["images"], result["n_train"], result["seed"], result["preset"]) == (
        96,
        64,
        0,
        "demo",
    )
    assert result["budget"] == {
        "images": 96,
        "of": 12_480_000,
        "fraction": 96 / 12_480_000,
        "source": "ours",
    }
    claim = {"claim": "realnvp.cifar10", "metric": "test/bpd", "value": 3.49, "decimals": 2}
    assert result["papers"] == [claim | {"direction": "lower", "comparable": False}]
    assert result["comparisons"] == [
        claim | {"gap": None, "status": "-", "differences": [], "reason": None}
    ]
    assert (result["gap"], result["status"]) == (None, "-")
    assert result["config"]["flow"] == {
        "n_scales": 2,
        "hidden_channels": 4,
        "n_blocks": 1,
        "alpha": 0.05,
    }
    assert result["precision"] == "32-true"
    assert {"test/bpd", "test/bpd_reestimated", "val/bpd", "samples/finite_T0.7"} <= set(
        result["metrics"]
    )
    assert all(
        0 < result["metrics"][key] < 20 for key in ("test/bpd", "test/bpd_reestimated", "val/bpd")
    )
    head = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    assert result["commit"] == (head.stdout.strip() or None)


def test_curve_begins_before_training(finished):
    rows = curve(finished[0])
    assert list(rows[0]) == ["step", "images", "seconds", "lr", "train/bpd", "val/bpd"]
    assert [int(row["step"]) for row in rows] == [0, 3, 6]
    assert [int(row["images"]) for row in rows] == [0, 48, 96]
    assert rows[0]["train/bpd"] == ""
    assert float(rows[0]["val/bpd"]) > float(rows[-1]["val/bpd"])
    assert finished[1]["metrics"]["val/bpd"] == min(float(row["val/bpd"]) for row in rows[1:])


def test_pictures_are_uint8_and_show_the_images(finished):
    folder, _ = finished
    names = sorted(p.name for p in (folder / "samples").iterdir())
    assert names == [
        f"{kind}-{step:07d}.png" for kind in ("reconstruction", "samples") for step in (3, 6)
    ]
    grid = pixels(folder / "samples" / "reconstruction-0000006.png")
    assert grid.dtype == np.uint8
    assert grid.std() > 20
    cell = 10 * 8  # an image of 8 and a border of 2, each pixel 8 x 8
    images = grid[:, -(16 * cell + 16) :]  # the labels are on their left
    assert images.shape[1] + 80 < grid.shape[1]
    originals = images[16 : 16 + 64]
    reconstructions = images[16 + cell : 16 + cell + 64]
    assert np.abs(originals.astype(int) - reconstructions).max() <= 1
    assert pixels(folder / "samples" / "samples-0000006.png").std() > 5
    assert (folder / "curve.png").stat().st_size > 5000


def test_the_printed_table_shows_no_papers_number_beside_photographs(finished):
    from lightning_modules.callbacks.paper import comparison_table

    header, _, *rows = comparison_table(finished[1]).splitlines()
    assert header.split() == ["experiment", "metric", "paper", "ours", "gap", "status"]
    cells = next(row.split() for row in rows if " test/bpd " in row)
    assert cells == [
        "realnvp_cifar10",
        "test/bpd",
        "-",
        f"{finished[1]['metrics']['test/bpd']:.4f}",
        "-",
        "-",
    ]


def test_load_gives_the_tested_flow(finished):
    folder, _ = finished
    flow = load(folder).flow
    best = read_checkpoint(folder / "checkpoints" / "best.ckpt")
    assert not flow.training
    assert torch.equal(
        flow.scales[0].layers[0].log_scale_factor,
        best["state_dict"]["flow.scales.0.layers.0.log_scale_factor"],
    )
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(flow.log_prob(x), load(newest(folder).parent / "best.ckpt").flow.log_prob(x))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load(folder / "samples")


def test_checkpoint_is_plain_and_says_whose_it_is(finished):
    there = read_checkpoint(newest(finished[0]))["paperflows"]
    assert there["experiment"] == "realnvp_cifar10"
    assert there["shape"] == [3, 8, 8]
    assert type(there["config"]) is dict
    assert there["config"]["optim"]["lr"] == 1e-3


@pytest.mark.parametrize("every", [2, 3])
def test_resume_reaches_the_same_weights(tmp_path, every):
    """A run is killed within an epoch; a validation falls on its checkpoint (3) or not (2)."""
    checkpoints = f"checkpoint.every_n_steps={every}"
    whole = run(tmp_path / "whole", "trainer.max_steps=7", checkpoints)
    run(tmp_path / "parts", "trainer.max_steps=5", checkpoints)
    (
        tmp_path / "parts" / "result.json"
    ).unlink()  # as if it had been killed after step 5, before its last checkpoint
    (tmp_path / "parts" / "checkpoints" / "step-00000005.ckpt").unlink()
    parts = run(tmp_path / "parts", "trainer.max_steps=7", "resume=auto", checkpoints)
    for key in ("test/bpd", "test/bpd_reestimated", "val/bpd"):
        assert parts["metrics"][key] == whole["metrics"][key]
    steps, values = zip(
        *((row["step"], row["val/bpd"]) for row in curve(tmp_path / "parts")), strict=True
    )
    assert steps == ("0", "3", "6", "7")
    assert values == tuple(row["val/bpd"] for row in curve(tmp_path / "whole"))
    a, b = (read_checkpoint(newest(tmp_path / name))["state_dict"] for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_resume_of_a_new_folder_begins_and_of_a_finished_run_ends(tmp_path, capsys):
    run(tmp_path / "new", "trainer.max_steps=2", "resume=auto")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "new", "trainer.max_steps=2", "resume=auto")
    assert stop.value.code == 0
    assert "is finished" in capsys.readouterr().out


def test_a_folder_with_a_run_is_refused(finished, capsys):
    before = (finished[0] / "config.yaml").read_bytes()
    assert "resume=auto" in mistake(capsys, *TINY, f"run_dir={finished[0]}")
    assert (finished[0] / "config.yaml").read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused(tmp_path, capsys):
    run(tmp_path, "trainer.max_steps=2")
    (tmp_path / "result.json").unlink()
    going_on = [*TINY, f"run_dir={tmp_path}", "resume=auto"]
    line = mistake(capsys, *override(going_on, ["flow.hidden_channels=5"]))
    assert "trained with flow.hidden_channels=4: say the same" in line
    changes = ["seed=3", "optim.name=adamax", "data.batch_size=8"]
    line = mistake(capsys, *override(going_on, changes))
    assert "data.batch_size=16 optim.name=adam seed=0: say the same" in line
    assert "is of realnvp_cifar10, not of realnvp_moons" in mistake(
        capsys, f"run_dir={tmp_path}", "resume=auto", main=realnvp_moons.main
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["optim.lrr=1"], "optim.lr"),
        (["trainer.max_steps=abc"], "wrong type"),
        (["data=3"], "section"),
        (["preset=cpuu"], "did you mean cpu?"),
        (["data.root=/nowhere", "data.download=false"], "cifar-10-python.tar.gz"),
        (["preset=demo", "data.size=4096"], "data.size=4096 does not fit"),
        (["preset=demo", "data.batch_size=0"], "data.batch_size=0"),
        (["preset=demo", "flow.n_scales=9"], "flow.n_scales=9"),
        (["preset=demo", "flow.n_blocks=0"], "from 1 to 1000"),
        (["preset=demo", "samples.n=0"], "samples.n=0"),
        (["preset=demo", "trainer.val_check_interval=0"], "give an int from 1"),
        (["preset=demo", "samples.temperatures=[]"], "give a list of at least 1"),
        (["preset=demo", "trainer.max_epochs=abc"], "trainer.max_epochs=abc"),
        (["preset=demo", "trainer.devices=foo"], "foo"),
        (["preset=demo", "trainer.limit_test_batches=0"], "tests nothing"),
        (["preset=demo", "ema.decay=abc"], "ema.decay=abc"),
        (["preset=demo", "optim.betas=[0.9]"], "optim.betas=[0.9]"),
        (["preset=demo", "optim.clip_norm=-1"], "optim.clip_norm=-1"),
        (["preset=demo", "data.n_val=-1"], "data.n_val=-1"),
        (["preset=cpu", "data.name=two_moons"], "images (C, H, W)"),
        (["data.name=../base"], "data.name=../base is not known"),
        (["preset=demo", "optim.name=sgd"], "adam, adamax, adamw"),
        (["preset=demo", "optim.lr=-1"], "optim.lr=-1"),
        (["preset=demo", "trainer.precision=bf17"], "precision"),
        (["preset=gpu"], "no GPU here: give preset=cpu"),
        (["preset=demo", "data.n_val=0"], "checkpoint.select=last"),
        (["preset=demo", "trainer.limit_val_batches=0"], "checkpoint.select=last"),
        (["preset=demo", "trainer.precision=16-mixed"], "16-mixed needs a GPU: give bf16-mixed"),
        (["preset=demo", "data.micro_batch=8"], "data.micro_batch=8: RealNVP has batch norms"),
        (["preset=demo", "data.micro_batch=5"], "does not divide the 32 items that a process has"),
        (
            ["preset=demo", "trainer.log_every_n_steps=0"],
            "trainer.log_every_n_steps=0 is out of range",
        ),
        (["preset=demo", "checkpoint.every_n_steps=0"], "checkpoint.every_n_steps=0"),
        (["preset=demo", "optim.max_skipped=-1"], "optim.max_skipped=-1 is out of range"),
        (["preset=demo", "eval.bn_images=-1"], "eval.bn_images=-1"),
        (["preset=demo", "logger.name=tensorboard"], "wandb, csv, none"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_line(arguments, said, capsys, tmp_path):
    if "preset=gpu" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert said in mistake(capsys, *arguments, f"run_dir={tmp_path / 'run'}")


def test_data_with_a_validation_split_of_their_own_need_no_n_val(tmp_path, monkeypatch, capsys):
    shutil.copytree(config_module.CONFIGS, tmp_path / "configs")
    path = tmp_path / "configs" / "data" / "two_moons.yaml"
    path.write_text(
        "".join(line for line in path.read_text().splitlines(True) if "n_val:" not in line)
    )
    monkeypatch.setattr(config_module, "CONFIGS", tmp_path / "configs")
    monkeypatch.setitem(DATA, "two_moons", partial(TwoMoons, n_val=16))
    few = [
        "data.n_train=64",
        "data.batch_size=32",
        "data.n_test=16",
        "samples.n=8",
        "trainer.max_steps=2",
    ]
    words = [
        *few,
        "flow.n_couplings=1",
        "flow.hidden_channels=2",
        "logger.name=none",
        f"run_dir={tmp_path / 'run'}",
    ]
    result = realnvp_moons.main(words)
    assert "n_val" not in result["config"]["data"]
    assert result["tested"]["chosen"] == "best"
    assert "val/nll" in result["metrics"]
    line = mistake(capsys, *words[:-1], "trainer.limit_val_batches=0", main=realnvp_moons.main)
    assert line == (
        "error: trainer.limit_val_batches=0 leaves nothing to choose the best weights by: "
        "add checkpoint.select=last"
    )


def test_without_validation_the_last_weights_are_tested(tmp_path):
    result = run(tmp_path, "trainer.max_steps=3", "data.n_val=0", "checkpoint.select=last")
    assert result["checkpoint"] == "checkpoints/step-00000003.ckpt"
    assert "val/bpd" not in result["metrics"]
    assert result["metrics"]["test/bpd"] < 20
    rows = curve(tmp_path)
    assert [(row["step"], row["val/bpd"]) for row in rows] == [("0", ""), ("3", "")]
    assert float(rows[1]["train/bpd"]) < 20


def test_steps_after_the_last_validation_are_named_at_the_start(tmp_path, finished):
    arguments = ["trainer.max_steps=5", "trainer.val_check_interval=3"]
    run(tmp_path / "best", *arguments)
    line = (
        "The last 2 of 5 steps come after the last validation, so their weights are not tested: "
        "give a multiple of trainer.val_check_interval=3 as trainer.max_steps, or "
        "checkpoint.select=last"
    )
    assert (tmp_path / "best" / "log.txt").read_text().count(line) == 1
    run(tmp_path / "last", *arguments, "checkpoint.select=last")
    for folder in (tmp_path / "last", finished[0]):
        assert "come after the last validation" not in (folder / "log.txt").read_text()


def test_without_validation_batches_no_checkpoint_waits_for_them(tmp_path):
    run(
        tmp_path,
        "trainer.max_steps=4",
        "trainer.limit_val_batches=0",
        "checkpoint.select=last",
        "checkpoint.every_n_steps=3",
    )
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-00000003.ckpt",
        "step-00000004.ckpt",
    ]


def test_a_diverged_run_ends_with_one_line(tmp_path, capsys):
    """The first step makes every later loss infinite: no later step is taken, or saved."""
    settings = [
        "optim.lr=1e30",
        "optim.clip_norm=null",
        "optim.max_skipped=2",
        "trainer.log_every_n_steps=1",
    ]
    line = mistake(capsys, *TINY, f"run_dir={tmp_path}", "trainer.max_steps=20", *settings)
    assert line.startswith(
        "error: stopped at step 4: the loss or its gradient was not finite in 3 steps"
    )
    assert not step_checkpoints(tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_ema_other_optimizer_and_recompute_run(tmp_path, monkeypatch):
    lean = []
    monkeypatch.setattr(
        "reproduce.experiment.recompute", lambda flow: lean.append(flow) or recompute(flow)
    )
    settings = [
        "ema.decay=0.9",
        "optim.name=adamax",
        "optim.warmup_steps=2",
        "trainer.recompute=true",
    ]
    result = run(tmp_path, "trainer.max_steps=3", *settings)
    assert len(lean) == 1
    assert (
        "test/bpd_reestimated" not in result["metrics"]
    )  # averaged weights: test/bpd is re-estimated
    assert [float(row["lr"]) for row in curve(tmp_path)] == [0.0, 1e-3]
    assert result["metrics"]["test/bpd"] < 20


def test_moons_reports_nll_and_integral(tmp_path):
    small = [
        "flow.hidden_channels=8",
        "flow.n_couplings=2",
        "data.n_train=256",
        "data.n_val=64",
        "data.n_test=64",
    ]
    small += ["trainer.max_steps=5", "samples.n=64", "logger.name=none", f"run_dir={tmp_path}"]
    result = realnvp_moons.main(small)
    assert result["metrics"]["density_integral"] == pytest.approx(
        1, abs=0.2
    )  # untrained: mass outside of the box
    assert 0 < result["metrics"]["test/nll"] < 4
    assert (result["papers"], result["status"]) == ([], "-")
    assert (tmp_path / "density.png").stat().st_size > 5000


def test_wandb_runs_offline_and_never_asks(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    result = run(tmp_path / "run", "trainer.max_steps=3", "logger.name=wandb")
    offline = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(offline) == 1
    assert result["wandb_url"] is None
    picture = next(
        (tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/pictures/samples*.png")
    )
    written = next((tmp_path / "run" / "samples").glob("samples-*.png"))
    assert np.array_equal(pixels(picture), pixels(written))


def test_resume_needs_a_run_dir_and_moons_have_no_penalty(capsys):
    assert "add run_dir=FOLDER" in mistake(capsys, *TINY, "resume=auto")
    assert "RealNVP2d has no L2 penalty" in mistake(capsys, "optim.l2=0.1", main=realnvp_moons.main)


def test_help_and_print_config(capsys):
    with pytest.raises(SystemExit) as stop:
        realnvp_cifar10.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "3.49" in text
    assert "presets: demo, cpu, gpu" in text
    assert "  optim.clip_norm=100.0  # code" in text
    with pytest.raises(SystemExit) as stop:
        realnvp_cifar10.main(["preset=cpu", "optim.lr=5e-4", "--print-config"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "lr: 0.0005" in text
    assert "hidden_channels: 16" in text


def test_ctrl_c_leaves_a_loadable_checkpoint(tmp_path):
    """A real process stops with a line that says how to go on, and without a traceback."""
    command = [sys.executable, "reproduce/realnvp_cifar10.py", *TINY, f"run_dir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [*command, "trainer.max_steps=100000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not step_checkpoints(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    saved = read_checkpoint(newest(tmp_path / "run"))["global_step"]
    words = [*TINY, "trainer.max_steps=100000", f"run_dir={tmp_path / 'run'}", "resume=auto"]
    again = shlex.join(["python", "reproduce/realnvp_cifar10.py", *words])
    last_line = output.strip().splitlines()[-1]
    assert last_line == f"stopped at step {saved}, which is saved; go on with: {again}"
    load(tmp_path / "run")


def test_script_runs_from_the_shell(tmp_path):
    environment = {**os.environ, "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, ROOT / "reproduce" / "realnvp_cifar10.py", "preset=demoo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        == "error: preset=demoo is not known (did you mean demo?): give one of demo, cpu, gpu"
    )
