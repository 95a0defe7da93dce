"""Lightning's private attributes that we change exist, and changing them has its effect.

If one of these tests fails with a new release of Lightning, read
lightning_modules/lightning_internals.py: the function has to be adapted, or is no longer needed.
"""

import signal
import subprocess
import sys
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from processes import start
from test_density import RandomImages, density, make_trainer, tiny_flow
from torch import distributed

from lightning_modules import lightning_internals as internals

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("does not have many workers", "LeafSpec.* is deprecated")
]


def test_handlers_are_set_by_our_function_at_every_start():
    before = signal.getsignal(signal.SIGTERM)
    calls = []
    trainer = make_trainer(max_steps=1)
    assert callable(type(trainer._signal_connector).register_signal_handlers)
    internals.set_signal_handlers_with(
        trainer, lambda: calls.append(signal.getsignal(signal.SIGTERM))
    )
    module = density(tiny_flow(), bn_images=0)
    trainer.fit(module, datamodule=RandomImages())
    trainer.test(module, RandomImages(), verbose=False)
    assert calls == [before, before]  # Lightning's own are never set
    assert signal.getsignal(signal.SIGTERM) == before


class Broadcasts(L.Callback):
    """Counts Lightning's broadcasts, and notes whether DDP sends buffers around."""

    def __init__(self):
        self.calls = 0
        self.sends_buffers = None
        original = _TrainingEpochLoop._broadcast_sigterm_tensor

        def counted(loop):
            self.calls += 1
            original(loop)

        _TrainingEpochLoop._broadcast_sigterm_tensor = counted

    def on_train_start(self, trainer, pl_module):
        self.sends_buffers = trainer.strategy.model.will_sync_module_buffers()


def _two_ranks(rank, folder):
    seen = []
    for ours in (False, True):
        spy = Broadcasts()
        trainer = make_trainer(spy, max_steps=2, devices=2, num_nodes=1, strategy="ddp")
        if ours:
            internals.broadcast_no_signals(trainer)
            internals.send_no_buffers(trainer)
        trainer.fit(density(tiny_flow()), datamodule=RandomImages())
        seen.append((spy.calls, bool(spy.sends_buffers)))
    internals.broadcast_signals(trainer)
    seen.append(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor.__name__)
    torch.save(seen, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_ranks_broadcast_neither_signals_nor_buffers(tmp_path):
    processes = start(2, _two_ranks, tmp_path, log=tmp_path / "log.txt")
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [0, 0], (tmp_path / "log.txt").read_text()
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == [(2, True), (0, False), "counted"]


def test_a_strategy_without_ddp_is_left_alone():
    trainer = make_trainer()
    internals.send_no_buffers(trainer)
    assert not isinstance(trainer.strategy, DDPStrategy)
    assert not hasattr(trainer.strategy, "_ddp_kwargs")


def test_the_ranks_that_a_process_has_started_are_killed():
    trainer = make_trainer(devices=2, strategy="ddp")
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    trainer.strategy.launcher.procs = [rank]
    internals.kill_ranks(trainer)
    assert rank.wait(10) == -signal.SIGKILL


def test_without_a_launcher_nobody_is_killed():
    internals.kill_ranks(SimpleNamespace(strategy=SimpleNamespace(launcher=None)))
    internals.kill_ranks(make_trainer())


class Saved(L.Callback):
    """Saves a checkpoint after every step.

    It notes Lightning's progress of epochs in it, before and after `count_running_epoch`.
    """

    def __init__(self):
        self.before = []
        self.after = []

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        self.before.append({key: dict(counts) for key, counts in progress.items()})
        internals.count_running_epoch(checkpoint)
        self.after.append({key: dict(counts) for key, counts in progress.items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(trainer.default_root_dir + f"/{trainer.global_step}.ckpt")


def test_a_resume_from_the_last_batch_of_an_epoch_counts_the_next_as_begun(tmp_path):
    """In epochs of four batches: the checkpoint of batch 4, and after a resume that of batch 5."""
    first = Saved()
    second = Saved()
    make_trainer(first, max_steps=4, default_root_dir=tmp_path).fit(
        density(tiny_flow()), datamodule=RandomImages()
    )
    counts = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    assert [saved["current"] for saved in first.before] == [counts] * 4
    assert [saved["current"] for saved in first.after] == [counts] * 4
    trainer = make_trainer(second, max_steps=8, default_root_dir=tmp_path)
    path = tmp_path / "4.ckpt"
    trainer.fit(density(tiny_flow()), datamodule=RandomImages(), ckpt_path=path, weights_only=True)
    forgotten = {"ready": 1, "started": 1, "processed": 1, "completed": 1}
    assert [saved["current"] for saved in second.before] == [forgotten] * 4
    begun = {"ready": 2, "started": 2, "processed": 1, "completed": 1}
    assert [saved["current"] for saved in second.after] == [begun] * 4
    assert [set(saved) for saved in second.after] == [{"total", "current"}] * 4


def test_wandb_is_given_no_anonymous_mode(tmp_path):
    logger = L.loggers.WandbLogger(save_dir=tmp_path, offline=True)
    assert "anonymous" in logger._wandb_init
    internals.name_no_anonymous_mode(logger)
    assert "anonymous" not in logger._wandb_init
