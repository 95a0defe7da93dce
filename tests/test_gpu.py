"""Tests that need a GPU. Runs are processes of their own, since CUDA does not survive a fork."""

import json
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from cases import TINY
from test_density import RandomImages, density, make_trainer, tiny_flow

from flows.glow import Glow
from flows.recompute import recompute
from lightning_modules.callbacks.checkpoints import finite
from lightning_modules.cuda_graph import CudaGraph
from reproduce.config import override
from reproduce.run_folder import newest_checkpoint, step_checkpoints

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
SCRIPT = Path(__file__).parent.parent / "reproduce" / "realnvp_cifar10.py"
GPU = override(
    TINY,
    [
        "trainer.accelerator=gpu",
        "trainer.devices=1",
        "samples.every_n_steps=10000",
        "eval.bn_images=0",
        "trainer.val_check_interval=50",
        "checkpoint.every_n_steps=20",
    ],
)


def tiny_glow():
    torch.manual_seed(0)
    return Glow((3, 8, 8), 2, 2, 4)


def started(folder, *arguments):
    """A run of the script in the background."""
    words = override(GPU, [f"run_dir={folder}", *arguments])
    return subprocess.Popen([sys.executable, SCRIPT, *words])


def weights(folder):
    return newest_checkpoint(folder)[1]["state_dict"]


@pytest.mark.parametrize(
    ("precision", "graph"), [("32-true", False), ("bf16-mixed", False), ("bf16-mixed", True)]
)
def test_a_killed_deterministic_run_goes_on_bit_for_bit(tmp_path, precision, graph):
    arguments = [
        "trainer.deterministic=true",
        f"trainer.precision={precision}",
        "trainer.max_steps=200",
    ]
    arguments += [f"trainer.cuda_graph={graph}".lower()]
    arguments += ["ema.decay=0.9", "data.num_workers=2", "checkpoint.select=last"]
    whole = started(tmp_path / "whole", *arguments)
    killed = started(tmp_path / "run", *arguments)
    while len(step_checkpoints(tmp_path / "run")) < 2:
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert newest_checkpoint(tmp_path / "run")[1]["global_step"] < 200
    assert whole.wait(300) == 0
    assert started(tmp_path / "run", *arguments, "resume=auto").wait(300) == 0
    expected = weights(tmp_path / "whole")
    resumed = weights(tmp_path / "run")
    assert all(torch.equal(resumed[key], value) for key, value in expected.items())


@pytest.mark.parametrize("fast", [False, True])
def test_glow_sets_its_actnorms_and_trains(tmp_path, fast):
    """The whole script, from the first batch to the recorded test; fast as preset=gpu makes it."""
    run = tmp_path / "run"
    script = SCRIPT.with_name("glow_photos.py")
    tiny = ["flow.n_levels=2", "flow.depth=2", "flow.hidden_channels=4", "trainer.max_steps=4"]
    data = ["data.size=8", "data.n_train=64", "data.batch_size=16", "data.n_val=24"]
    device = ["trainer.accelerator=gpu", "trainer.devices=1"]
    switches = [f"trainer.compile={fast}".lower(), f"trainer.cuda_graph={fast}".lower()]
    arguments = ["preset=demo", "logger.name=none", *tiny, *data, *device, *switches]
    subprocess.run([sys.executable, script, *arguments, f"run_dir={run}"], check=True)
    assert 0 < json.loads((run / "result.json").read_text())["metrics"]["test/bpd"] < 20


def test_one_rank_of_nccl_trains_as_a_single_process(tmp_path):
    steps = ["trainer.max_steps=4", "trainer.deterministic=true"]
    runs = [
        started(tmp_path / name, *steps, f"trainer.strategy={name}") for name in ("auto", "ddp")
    ]
    assert [run.wait(300) for run in runs] == [0, 0]
    alone, ranked = (weights(tmp_path / name) for name in ("auto", "ddp"))
    for key, value in alone.items():
        torch.testing.assert_close(ranked[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_every_precision_trains_and_clips(precision):
    module = density(tiny_flow(), lr=1e-3, clip_norm=0.5)
    data = RandomImages()
    trainer = make_trainer(max_steps=40, precision=precision, accelerator="gpu", devices=1)
    trainer.fit(module, datamodule=data)
    assert finite(module)
    # The scaler of 16-mixed begins too high.
    allowed = {"16-mixed": 10}.get(precision, 2)
    assert module.skipped.item() <= allowed
    assert trainer.callback_metrics["train/bpd"].item() < 8.1


@pytest.mark.parametrize("how", ["plain", "recompute", "compile"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("make", [tiny_flow, tiny_glow], ids=["RealNVP", "Glow"])
def test_a_replayed_step_is_the_step(make, precision, how):
    """Weights, running statistics and counts after some steps, and the logged value, are equal."""

    def state_and_bpd(graph):
        module = density(make(), lr=1e-3, clip_norm=100.0)
        if how == "recompute":
            recompute(module.flow)
        if how == "compile":
            torch.compiler.reset()
            module.flow.compile()
        if graph:
            module.cuda_graph = CudaGraph(module.flow)
        trainer = make_trainer(
            max_steps=8, precision=precision, deterministic=True, accelerator="gpu", devices=1
        )
        trainer.fit(module, datamodule=RandomImages())
        return module.cpu().state_dict(), trainer.callback_metrics["train/bpd"].item()

    try:
        plain, bpd = state_and_bpd(graph=False)
        replayed, replayed_bpd = state_and_bpd(graph=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert replayed_bpd == pytest.approx(bpd, abs=1e-5)
    for key, value in plain.items():
        torch.testing.assert_close(replayed[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamax"])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("flow", [tiny_flow, tiny_glow], ids=["RealNVP", "Glow"])
def test_no_step_waits_for_the_device(flow, graph, name):
    """Adam and Adamax read on the device whether the step is finite."""

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step >= 2:
                torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("default")

    try:
        trainer = make_trainer(
            Watch(), max_steps=4, accelerator="gpu", devices=1, log_every_n_steps=1000
        )
        module = density(flow(), clip_norm=10.0, name=name)
        if graph:
            module.cuda_graph = CudaGraph(module.flow)
        trainer.fit(module, datamodule=RandomImages())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.global_step == 4
