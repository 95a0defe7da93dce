"""Step time, sampling time and saved activations of flows, measured in turns and set over the convolutions alone."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.cuda_graph import CudaGraph

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Convolution:
    """One convolution of a conditioner, "same" padding, on images of (height, width)."""

    c_in: int
    c_out: int
    kernel_size: int
    height: int
    width: int


@dataclass
class Candidate:
    """A flow in training. bf16: its log_prob and sample run under autocast. x: a batch in [0, 1], (B, *shape)."""

    flow: nn.Module
    optimizer: torch.optim.Optimizer
    x: Tensor
    bf16: bool = False
    graph: CudaGraph | None = None  # that replays log_prob

    def loss(self) -> Tensor:
        with self._autocast():
            log_prob = self.flow.log_prob(self.x) if self.graph is None else self.graph(self.flow.log_prob, self.x)
            return -log_prob.mean()

    def step(self) -> None:
        """What a training step costs without Lightning: gradients to None, forward, loss, backward, optimizer."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def sample(self, n: int) -> None:
        with torch.inference_mode(), self._autocast(), torch.compiler.set_stance("force_eager"):  # as in a run
            self.flow.sample(n)

    def activation_bytes(self) -> int:
        """Bytes that the graph of the loss keeps for the backward pass, without parameters and buffers, each once."""
        own = {t.untyped_storage().data_ptr() for t in (*self.flow.parameters(), *self.flow.buffers(), self.x)}
        kept = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()  # the graph lives until here, so that no storage's address is used again
        total = sum(kept.values())
        del loss
        return total

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.bf16)


class Floor:
    """The conditioners' convolutions alone: forward and both gradients, channels_last, each with its own weight."""

    def __init__(self, convolutions: list[Convolution], batch: int, dtype: torch.dtype, device: torch.device) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

        shapes = {shape for c in convolutions for shape in ((c.c_in, c.height, c.width), (c.c_out, c.height, c.width))}
        images = {shape: random(batch, *shape) for shape in shapes}
        self.work = [
            (
                images[c.c_in, c.height, c.width],
                random(c.c_out, c.c_in, c.kernel_size, c.kernel_size),
                images[c.c_out, c.height, c.width],
            )
            for c in convolutions
        ]

    def step(self) -> None:
        for x, weight, grad in self.work:
            padding = weight.shape[-1] // 2
            F.conv2d(x, weight, padding=padding)
            torch.ops.aten.convolution_backward(
                grad, x, weight, None, (1, 1), (padding, padding), (1, 1), False, (0, 0), 1, (True, True, False)
            )


def interleaved(actions: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, all of them in every round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for i in range(rounds + 1):
        for name, action in actions.items():
            _wait(device)
            start = time.perf_counter()
            action()
            _wait(device)
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
