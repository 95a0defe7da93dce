"""The passes of a training step as one CUDA graph: thousands of kernels that the host launches at once."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class CudaGraph:
    """Calls methods of a flow; the first call captures forward and backward pass, later ones replay them.

    A Glow of K=32 is 8,500 kernels a step: launched one by one they take the host three times as long as a GPU needs
    for them at batch 512. For one process, and one batch a step: gradients of a replay lie where those of the last one
    lay. Inputs have the shapes of the first call's.
    """

    def __init__(self, flow: nn.Module) -> None:
        self.flow = flow
        self._replay: Callable | None = None

    def __call__(self, method: Callable, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """method(*inputs), under the ambient autocast of the first call. ValueError, one line: it is not capturable."""
        if self._replay is None:
            try:
                self._replay = self._captured(method, inputs)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                raise ValueError(
                    f"{type(self.flow).__name__} cannot be captured ({reason}): add trainer.cuda_graph=false"
                ) from error
        return self._replay(*inputs)

    def _captured(self, method: Callable, inputs: tuple[Tensor, ...]) -> Callable:
        call = _Call(self.flow, method, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        buffers = list(self.flow.buffers())
        before = [buffer.clone() for buffer in buffers]
        with torch.autocast("cuda", enabled=False):  # `call` has its own
            replay = torch.cuda.make_graphed_callables(call, tuple(x.clone() for x in inputs), allow_unused_input=True)
        with torch.no_grad():  # its trial runs have moved running statistics
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        return replay


class _Call(nn.Module):
    """A method of a flow under an autocast whose copies of weights do not outlive the call."""

    def __init__(self, flow: nn.Module, method: Callable, enabled: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.flow, self.method, self.enabled, self.dtype = flow, method, enabled, dtype

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        with torch.autocast("cuda", self.dtype, self.enabled, cache_enabled=False):
            return self.method(*inputs)
