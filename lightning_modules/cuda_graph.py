"""The passes of a training step as CUDA graphs: thousands of kernels that are launched at once."""

import copy
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

Outputs = TypeVar("Outputs")


class CudaGraph:
    """Calls a method of a flow: the first call captures its passes, later ones replay them.

    The forward and the backward pass are captured. Launching kernels one by one may take the host
    longer than the GPU needs to run them; a replay launches all of them at once.

    It is for one process and one batch a step, since the outputs and gradients of a replay lie
    where those of the last one lay. From the first call on, parameters must keep their memory, and
    the method and the shapes must stay those of the first call.

    flow: the model whose method is called.
    """

    def __init__(self, flow: nn.Module) -> None:
        self.flow = flow
        self._replay: Callable[..., Any] | None = None
        self._signature: tuple | None = None  # the method and the shapes that were captured

    def __deepcopy__(self, memo: dict[int, Any]) -> "CudaGraph":
        """A copy, of which nothing has been captured yet."""
        return CudaGraph(copy.deepcopy(self.flow, memo))

    def __call__(self, method: Callable[..., Outputs], *inputs: Tensor | None) -> Outputs:
        """method(*inputs), under the ambient autocast of the first call.

        ValueError, one line: the method cannot be captured.
        """
        shapes = [None if x is None else x.shape for x in inputs]
        signature = (method.__name__, *shapes)
        if self._replay is None:
            self._replay = self._captured(method, inputs)
            self._signature = signature
        if signature != self._signature:
            raise RuntimeError(f"captured was {self._signature}, not {signature}")
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
        places = [x is not None for x in inputs]
        autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        call = _Call(self.flow, method, places, *autocast)
        examples = tuple(
            x.detach().clone().requires_grad_(x.requires_grad) for x in _tensors(inputs)
        )
        buffers = list(self.flow.buffers())
        before = [buffer.clone() for buffer in buffers]
        make = torch.cuda.make_graphed_callables
        options: dict[str, Any] = {}
        if "capture_error_mode" in inspect.signature(make).parameters:  # not yet in torch 2.11
            # Other threads pin batches meanwhile, which must not disturb the capture.
            options["capture_error_mode"] = "thread_local"
        with torch.autocast("cuda", enabled=False):  # `call` has its own
            replay = make(call, examples, allow_unused_input=True, **options)
        with torch.no_grad():  # the trial runs of the capture have moved running statistics
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        return cast(Callable[..., Any], replay)


class _Call(nn.Module):
    """A method of a flow under an autocast whose copies of weights do not outlive the call.

    places: which of the method's arguments are tensors; the others are None.
    """

    def __init__(
        self,
        flow: nn.Module,
        method: Callable[..., Any],
        places: list[bool],
        enabled: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.flow = flow
        self.method = method
        self.places = places
        self.enabled = enabled
        self.dtype = dtype

    def forward(self, *inputs: Tensor) -> Any:
        tensors = iter(inputs)
        arguments = [next(tensors) if is_tensor else None for is_tensor in self.places]
        with torch.autocast("cuda", self.dtype, self.enabled, cache_enabled=False):
            return self.method(*arguments)


def _tensors(inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Those arguments that a graph takes: None, an absent context, is part of the code."""
    return tuple(x for x in inputs if x is not None)
