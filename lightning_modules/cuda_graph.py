"""The forward and backward pass of a training step as CUDA graphs, launched as a whole."""

import copy
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

Outputs = TypeVar("Outputs")


class CudaGraph:
    """Calls a method of a flow: the first call captures CUDA graphs, later calls replay them.

    The forward and the backward pass are captured. Launching thousands of kernels one by one may
    take the host longer than the GPU needs to run them; a replay launches all of them at once.

    It works only with one process and one batch per step, since each replay writes its outputs and
    gradients to the same memory as the last one. From the first call on, parameters must keep their
    memory, and the method and the shapes of its arguments must stay the same.

    flow: the model whose method is called.
    """

    def __init__(self, flow: nn.Module) -> None:
        self.flow = flow
        self._replay: Callable[..., Any] | None = None
        self._signature: tuple | None = None  # the method and the shapes that were captured

    def __deepcopy__(self, memo: dict[int, Any]) -> "CudaGraph":
        """A copy of the object for a copy of the flow, with nothing captured yet."""
        return CudaGraph(copy.deepcopy(self.flow, memo))

    def __call__(self, method: Callable[..., Outputs], *inputs: Tensor | None) -> Outputs:
        """Call method(*inputs), always under the autocast that was active in the first call.

        Raises ValueError: the method cannot be captured. Raises RuntimeError: the method or the
        shapes differ from those of the first call.
        """
        shapes = [None if x is None else x.shape for x in inputs]
        signature = (method.__name__, *shapes)
        if self._replay is None:
            self._replay = self._captured(method, inputs)
            self._signature = signature
        if signature != self._signature:
            raise RuntimeError(
                f"the CUDA graph was captured for {self._signature}, not for {signature}"
            )
        return self._replay(*_tensors(inputs))

    def _captured(
        self, method: Callable[..., Any], inputs: tuple[Tensor | None, ...]
    ) -> Callable[..., Any]:
        try:
            return self._capture(method, inputs)
        except RuntimeError as error:
            if "captur" not in str(error):
                raise
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{type(self.flow).__name__} cannot be captured ({reason}): "
                "add trainer.cuda_graph=false"
            ) from error

    def _capture(
        self, method: Callable[..., Any], inputs: tuple[Tensor | None, ...]
    ) -> Callable[..., Any]:
        are_tensors = [x is not None for x in inputs]
        autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        call = _Call(self.flow, method, are_tensors, *autocast)
        examples = tuple(
            x.detach().clone().requires_grad_(x.requires_grad) for x in _tensors(inputs)
        )
        buffers = list(self.flow.buffers())
        before = [buffer.clone() for buffer in buffers]
        make = torch.cuda.make_graphed_callables
        options: dict[str, Any] = {}
        if "capture_error_mode" in inspect.signature(make).parameters:  # not yet in torch 2.11
            # Meanwhile other threads pin the memory of batches, which must not disturb the capture.
            options["capture_error_mode"] = "thread_local"
        with torch.autocast("cuda", enabled=False):  # `call` enters its own autocast
            replay = make(call, examples, allow_unused_input=True, **options)
        with torch.no_grad():  # the warm-up calls of the capture have changed running statistics
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        return cast(Callable[..., Any], replay)


class _Call(nn.Module):
    """A method of a flow under an autocast that caches no copies of weights beyond the call.

    are_tensors: for each argument of the method, whether it is a tensor or else None.
    """

    def __init__(
        self,
        flow: nn.Module,
        method: Callable[..., Any],
        are_tensors: list[bool],
        enabled: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.flow = flow
        self.method = method
        self.are_tensors = are_tensors
        self.enabled = enabled
        self.dtype = dtype

    def forward(self, *inputs: Tensor) -> Any:
        tensors = iter(inputs)
        arguments = [next(tensors) if is_tensor else None for is_tensor in self.are_tensors]
        with torch.autocast("cuda", self.dtype, self.enabled, cache_enabled=False):
            return self.method(*arguments)


def _tensors(inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """The arguments that are tensors, which a graph takes. None (no context) is left out."""
    return tuple(x for x in inputs if x is not None)
