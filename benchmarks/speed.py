"""The measurements of a flow: a step, sampling, kept activations, and its convolutions alone."""

import contextlib
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers import NormflowsGlow
from flows.base import FlowModel
from flows.caching import cached
from lightning_modules.cuda_graph import CudaGraph

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Convolution:
    """One convolution of a conditioner, with "same" padding, on images of (height, width)."""

    c_in: int
    c_out: int
    kernel_size: int
    height: int
    width: int


@dataclass
class Candidate:
    """A flow in training.

    x: a batch in [0, 1], (B, *shape).
    bf16: its log_prob and sample run under autocast.
    graph: replays log_prob as a CUDA graph.
    context: what a conditional flow depends on, one for each datum.
    frozen: the context is encoded without gradients.
    n_samples: how many samples `sample` draws, of the first context if there is one.
    """

    flow: FlowModel | NormflowsGlow
    optimizer: torch.optim.Optimizer
    x: Tensor
    bf16: bool = False
    graph: CudaGraph | None = None
    context: Tensor | None = None
    frozen: bool = False
    n_samples: int = 16
    _frozen: contextlib.ExitStack = field(  # held, since dropping the block would end it
        default_factory=contextlib.ExitStack, init=False, repr=False, compare=False
    )

    def loss(self) -> Tensor:
        """-log p(x), the mean over the batch in nats."""
        with self._autocast():
            if self.graph is not None:
                return -self.graph(self.flow.log_prob, self.x, *self._conditions()).mean()
            return -self.flow.log_prob(self.x, *self._conditions()).mean()

    def _conditions(self) -> tuple[Any, ...]:
        """The arguments of log_prob after the data."""
        if self.context is None:
            return ()
        if not self.frozen:
            return (self.context,)
        with torch.no_grad():
            return (cast(FlowModel, self.flow).encode_context(self.context),)

    def step(self) -> None:
        """A training step without Lightning."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def freeze(self) -> None:
        """Promise that the weights stay as they are, so that sampling computes inverses once."""
        self._frozen.enter_context(cached(self.flow.eval()))

    def sample(self) -> None:
        """Draw n_samples images, without compiled code, as a run does."""
        with (
            torch.inference_mode(),
            self._autocast(),
            torch.compiler.set_stance("force_eager"),
        ):
            if self.context is None:
                self.flow.sample(self.n_samples)
            else:
                flow = cast(FlowModel, self.flow)
                flow.sample(self.n_samples, context=self.context[:1])

    def activation_bytes(self) -> int:
        """Bytes that the graph of the loss keeps for the backward pass.

        Parameters and buffers do not count, and a tensor that is kept twice counts once.
        """
        inputs = [self.x] if self.context is None else [self.x, self.context]
        own = {
            t.untyped_storage().data_ptr()
            for t in (*self.flow.parameters(), *self.flow.buffers(), *inputs)
        }
        kept = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            # The graph must live while storages are counted: after one is freed, another may get
            # its address, and would not count.
            loss = self.loss()
        total = sum(kept.values())
        del loss
        return total

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.bf16)


class Floor:
    """The conditioners' convolutions alone: forward and both gradients, in channels_last.

    Every convolution has its own weight.
    """

    def __init__(
        self, convolutions: list[Convolution], batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype).contiguous(
                memory_format=torch.channels_last
            )

        shapes = {
            shape
            for c in convolutions
            for shape in ((c.c_in, c.height, c.width), (c.c_out, c.height, c.width))
        }
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
        """All convolutions, forward and backward."""
        for x, weight, grad in self.work:
            padding = weight.shape[-1] // 2
            F.conv2d(x, weight, padding=padding)
            torch.ops.aten.convolution_backward(
                grad,
                x,
                weight,
                None,
                (1, 1),
                (padding, padding),
                (1, 1),
                False,
                (0, 0),
                1,
                (True, True, False),
            )
