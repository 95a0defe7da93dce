"""Runs as processes of their own, which can be killed.

They are forks of the test process, so that nothing is imported twice.
"""

import logging
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import cases
import lightning.pytorch as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from flows.base import Compose, FlowModel
from flows.conditioners import WeightNormConv2d
from flows.coupling import MaskedCoupling
from flows.elementwise import Logit
from flows.masks import Checkerboard
from reproduce import experiment, realnvp_cifar10
from reproduce.config import override

TINY = override(
    [*cases.TINY, "flow.n_scales=1"], ["samples.every_n_steps=100", "trainer.val_check_interval=6"]
)


class Run:
    """One run of a recipe's main, of one process or several ranks, in the background."""

    def __init__(self, folder: Path, *arguments: str, ranks: int = 1, **options) -> None:
        self.folder = Path(folder)
        self.log = Path(f"{folder}.log")
        words = override([*TINY, f"run_dir={folder}"], arguments)
        self.processes = start(ranks, _run, words, Path(f"{folder}.trace"), options, log=self.log)

    def wait(self, timeout: float = 180) -> list[int]:
        """Exit codes by rank; a hang is killed and fails."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        assert not hung, f"ranks {hung} hung:\n{self.output()}"
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        # All before the first is waited for: a rank that is left alone ends by itself.
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def signal(self, number: int, rank: int = 0, group: bool = False) -> None:
        """To one rank, or to it and all that it has started."""
        send = os.killpg if group else os.kill
        send(self.processes[rank].pid, number)

    def wait_for(self, condition: Callable[[], object], timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain:\n{self.output()}"
            assert any(p.is_alive() for p in self.processes), f"ended too early:\n{self.output()}"
            time.sleep(0.02)

    def output(self) -> str:
        if not self.log.exists():
            return ""
        return self.log.read_text()

    def losses(self, rank: int = 0) -> dict[tuple[int, int], str]:
        """(steps done, batch of the epoch) -> the bits of the loss there.

        A batch that was seen twice has to have had the same loss.
        """
        losses: dict[tuple[int, int], str] = {}
        for line in Path(f"{self.folder}.trace{rank}").read_text().splitlines():
            step, batch, bits = line.split()
            first = losses.setdefault((int(step), int(batch)), bits)
            assert first == bits, f"step {step} went differently"
        return losses

    def final(self) -> dict:
        """The newest checkpoint."""
        return torch.load(max(self.folder.glob("checkpoints/step-*.ckpt")), weights_only=True)


def start(ranks: int, function: Callable, *arguments, log: Path) -> list[multiprocessing.Process]:
    """`function(rank, *arguments)` in forked processes.

    Several of them see themselves as ranks that torchrun has started.
    """
    port = free_port()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_child, args=(rank, ranks, port, log, function, arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
        STARTED.append(process)
    return processes


def free_port() -> int:
    """A port that nobody has, and that no run of this test process was given before.

    Such a run may not have bound its port yet.
    """
    while True:
        with socket.socket() as candidate:
            candidate.bind(("127.0.0.1", 0))
            port = candidate.getsockname()[1]
        if port not in GIVEN:
            GIVEN.add(port)
            return port


GIVEN: set[int] = set()
STARTED: list[multiprocessing.Process] = []  # conftest.py kills what a failed test leaves behind


def _child(
    rank: int, ranks: int, port: int, log: Path, function: Callable, arguments: tuple
) -> None:
    os.setpgid(0, 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    for logger in map(logging.getLogger, list(logging.root.manager.loggerDict)):
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)
    if ranks > 1:
        world = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "GROUP_RANK": 0,
        }
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
        os.environ |= {key: str(value) for key, value in world.items()}
        rank_zero_only.rank = rank
    code = 1
    try:
        function(rank, *arguments)
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _run(rank: int, words: list[str], trace: Path, options: dict) -> None:
    spy = Spy(f"{trace}{rank}", rank, **options)
    if spy.plain:
        realnvp_cifar10.make_flow = lambda config, shape: Plain(shape)
    realnvp_cifar10.make_trainer = lambda *arguments: experiment.make_trainer(*arguments, spy)
    realnvp_cifar10.main(words)


class Spy(L.Callback):
    """Records every loss, and harms the run where it is told to.

    Args:
        path: the file into which losses are written.
        rank: of this process.
        plain: whether the run has a flow without batch norm.
        kill: (steps done, batch of the epoch) before which the process is killed.
        poison: {(steps done, rank)} at which the likelihood is infinite, with a finite gradient.
        slow: seconds added to a batch.
        full: steps done, after which no file can grow beyond 10,000 bytes.
        stop: steps done, after which the run is asked to stop, or the hook in which it is.
    """

    def __init__(
        self, path, rank, plain=False, kill=None, poison=frozenset(), slow=0.0, full=None, stop=None
    ) -> None:
        self.file = open(path, "a", buffering=1)  # noqa: SIM115
        self.rank = rank
        self.plain = plain
        self.kill = kill
        self.poison = poison
        self.slow = slow
        self.full = full
        self.stop = stop
        if isinstance(stop, str):
            setattr(self, stop, lambda *arguments: os.kill(os.getpid(), signal.SIGTERM))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(self.slow * (1 + self.rank))
        if (trainer.global_step, batch_idx) == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.stop is not None and trainer.global_step + 1 == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        if trainer.global_step == self.full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        if (trainer.global_step, self.rank) in self.poison:
            log_prob = pl_module.flow.log_prob
            pl_module.flow.log_prob = lambda *arguments: log_prob(*arguments) + float("inf")
        else:
            vars(pl_module.flow).pop("log_prob", None)
        self.before = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.file.write(f"{self.before} {batch_idx} {outputs['loss'].item().hex()}\n")


class Plain(FlowModel):
    """An image flow without batch norm, whose gradient does not depend on how a batch is cut."""

    def __init__(self, shape, n_couplings: int = 4) -> None:
        super().__init__()
        self.shape = tuple(shape)
        couplings = (
            MaskedCoupling(Checkerboard(i % 2), TwoConvs(shape[0]), 1.0) for i in range(n_couplings)
        )
        self.layers = Compose([Logit(), *couplings])

    def latent_shapes(self, shape=None):
        return (self.shape,)

    def forward(self, x: Tensor, context=None):
        z, log_det = self.layers(x)
        return (z,), log_det

    def inverse(self, z, context=None):
        return self.layers.inverse(z[0])

    def l2_penalty(self) -> Tensor:
        return sum(p.square().sum() for p in self.parameters())


class TwoConvs(nn.Sequential):
    """(B, C, H, W) to shift and raw log-scale."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            WeightNormConv2d(channels, 6, 3, magnitude=True),
            nn.Tanh(),
            WeightNormConv2d(6, 2 * channels, 3, magnitude=True),
        )

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        shift, log_scale = super().forward(x).to(x.dtype).chunk(2, dim=1)
        return shift, log_scale
