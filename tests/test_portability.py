"""Windows and macOS, simulated on this machine.

What they lack is taken away; what they have beyond it is said to be there.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from reproduce import loggers, realnvp_cifar10
from reproduce.experiment import load_config

ROOT = Path(__file__).parents[1]
AS_ON_WINDOWS = """
import os, pathlib, signal, sys

sys.modules["fcntl"] = None
del signal.SIGUSR1, signal.SIGKILL, signal.pthread_kill
import flows, flows.glow, flows.realnvp
from reproduce import load, realnvp_moons
from datamodules.stateless import ignore_signals

open_file = os.open

def open_no_folder(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return open_file(path, *arguments, **options)

os.open = open_no_folder
del os.O_DIRECTORY
result = realnvp_moons.main(sys.argv[1:])
flow = load(result["config"]["run_dir"]).flow
print("loaded", type(flow).__name__, tuple(flow.sample(3).shape))
ignore_signals(0)
print("ignores SIGTERM:", signal.getsignal(signal.SIGTERM) is signal.SIG_IGN)
"""
MOONS = [
    *(
        "flow.n_couplings=1",
        "flow.hidden_channels=2",
        "data.n_train=64",
        "data.n_val=16",
        "data.n_test=16",
    ),
    *("data.batch_size=32", "samples.n=8", "trainer.max_steps=2", "logger.name=none"),
]


def test_training_and_loading_do_without_what_windows_lacks(tmp_path):
    """No fcntl, no SIGUSR1, SIGKILL or pthread_kill, and folders that cannot be opened."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", AS_ON_WINDOWS, *MOONS, f"run_dir={tmp_path / 'run'}"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["loaded RealNVP2d (3, 2)", "ignores SIGTERM: True"]
    assert (tmp_path / "run" / "checkpoints" / "step-00000002.ckpt").is_file()
    assert not (tmp_path / "run" / "lock").exists()


def test_wandbs_wish_to_stop_arrives_without_pthread_kill(monkeypatch):
    received = []
    monkeypatch.delattr("signal.pthread_kill")
    monkeypatch.setattr("signal.raise_signal", received.append)
    monkeypatch.setattr(loggers, "_stop_wanted", loggers.threading.Event())
    loggers._stop()
    assert [number.name for number in received] == ["SIGTERM"]
    assert loggers._stop_wanted.is_set()


@pytest.fixture
def mac(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(rank_zero_only, "rank", 0)


def configured(tmp_path, *arguments):
    return load_config(realnvp_cifar10.__file__, "", [f"run_dir={tmp_path / 'run'}", *arguments])


def test_a_mac_trains_on_its_cpu_and_says_so_once(mac, tmp_path, caplog):
    caplog.set_level("INFO")
    config = configured(tmp_path)
    assert (config.trainer.accelerator, config.trainer.precision) == (
        "cpu",
        configured(tmp_path, "preset=cpu").trainer.precision,
    )
    assert caplog.text.count("trainer.accelerator=cpu: a Mac's GPU (MPS) lacks the float64") == 1


def test_where_there_is_no_mps_auto_stays_lightnings(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert configured(tmp_path).trainer.accelerator == "auto"
    assert "MPS" not in caplog.text


@pytest.mark.parametrize("accelerator", ["mps", "gpu"])
def test_a_macs_gpu_is_refused_in_one_line(mac, tmp_path, capsys, accelerator):
    with pytest.raises(SystemExit) as stop:
        realnvp_cifar10.main([f"run_dir={tmp_path / 'run'}", f"trainer.accelerator={accelerator}"])
    assert stop.value.code.startswith(f"error: trainer.accelerator={accelerator}, but ")
    assert "\n" not in stop.value.code
    assert not (tmp_path / "run").exists()
