"""The passes of a training step as CUDA graphs: thousands of kernels that the host launches at once."""

import copy
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn


class CudaGraph:
    """Calls a method of a flow; the first call captures its forward and its backward pass, later ones replay them.

    Launched one by one, kernels may take the host longer than the GPU: measured once on an H200, a step of Glow of K=32
    at batch 512 with compiled networks took 402 ms, replayed 120. For one process, and one batch a step: outputs and
    gradients of a replay lie where those of the last one lay. Parameters keep their memory from the first call on;
    method and shapes stay those of the first call.
    """

    def __init__(self, flow: nn.Module) -> None:
        self.flow = flow
        self._replay: Callable | None = None
        self._signature: tuple | None = None  # the method and the shapes that were captured

    def __deepcopy__(self, memo: dict) -> "CudaGraph":
        """Of a copy nothing has been captured."""
        return CudaGraph(copy.deepcopy(self.flow, memo))

    def __call__(self, method: Callable, *inputs: Tensor | None) -> Tensor | tuple[Tensor, ...]:
        """method(*inputs), under the ambient autocast of the first call. ValueError, one line: it is not capturable."""
        signature = (method.__name__, *(None if x is None else x.shape for x in inputs))
        if self._replay is None:
            try:
                self._replay, self._signature = self._captured(method, inputs), signature
            except RuntimeError as error:
                if "captur" not in str(error):
                    raise
                reason = str(error).partition("\n")[0]
                raise ValueError(
                    f"{type(self.flow).__name__} cannot be captured ({reason}): add trainer.cuda_graph=false"
                ) from error
        if signature != self._signature:
            raise RuntimeError(f"captured was {self._signature}, not {signature}")
        return self._replay(*_tensors(inputs))

    def _captured(self, method: Callable, inputs: tuple[Tensor | None, ...]) -> Callable:
        places = [x is not None for x in inputs]
        autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        call = _Call(self.flow, method, places, *autocast)
        examples = tuple(
            x.detach().clone().requires_grad_(x.requires_grad) for x in _tensors(inputs)
        )
        buffers = list(self.flow.buffers())
        before = [buffer.clone() for buffer in buffers]
        make = torch.cuda.make_graphed_callables
        has_mode = (
            "capture_error_mode" in inspect.signature(make).parameters
        )  # not yet in torch 2.11
        other_threads = (
            {"capture_error_mode": "thread_local"} if has_mode else {}
        )  # they pin batches meanwhile
        with torch.autocast("cuda", enabled=False):  # `call` has its own
            replay = make(call, examples, allow_unused_input=True, **other_threads)
        with torch.no_grad():  # its trial runs have moved running statistics
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        return replay


class _Call(nn.Module):
    """A method of a flow under an autocast whose copies of weights do not outlive the call.

    places: which of the method's arguments are tensors; the others are None.
    """

    def __init__(
        self,
        flow: nn.Module,
        method: Callable,
        places: list[bool],
        enabled: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.flow, self.method, self.places, self.enabled, self.dtype = (
            flow,
            method,
            places,
            enabled,
            dtype,
        )

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        tensors = iter(inputs)
        arguments = [next(tensors) if is_tensor else None for is_tensor in self.places]
        with torch.autocast("cuda", self.dtype, self.enabled, cache_enabled=False):
            return self.method(*arguments)


def _tensors(inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Those arguments that a graph takes: None, an absent context, is part of the code."""
    return tuple(x for x in inputs if x is not None)
