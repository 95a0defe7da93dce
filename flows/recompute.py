"""Memory for time: what a part of a flow would keep for the backward pass is made again there."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from flows.transforms import in_transform


def recompute(flow: nn.Module) -> None:
    """Let every layer that can, those with an attribute `recompute`, keep no more than its inputs."""
    for module in flow.modules():
        if hasattr(module, "recompute"):
            module.recompute = True


def is_random(module: nn.Module) -> bool:
    """Whether a forward pass of the module, as it is now, draws random numbers.

    torch's dropout layers do so in training. A module that draws by itself (`F.dropout`, `torch.rand`) declares it by
    an attribute `is_random = True`.
    """
    return any(draws(part) for part in module.modules())


def draws(module: nn.Module) -> bool:
    """The same of the module by itself, without its parts."""
    dropout = isinstance(module, _DropoutNd) and module.training and module.p > 0
    return dropout or getattr(module, "is_random", False)


def recomputed(function: Callable, module: nn.Module, *inputs, on: bool):
    """function(module, *inputs); with `on` only the inputs are kept for the backward pass.

    Gradients are the same to the bit: batch norms of `module` see the batch again and do not count it twice, and a
    module that `is_random` draws the same numbers again. RuntimeError: a module draws numbers and does not declare it,
    so that the backward pass would be that of other networks.
    """
    if not on or not torch.is_grad_enabled() or in_transform():
        return function(module, *inputs)
    random = is_random(module)
    with contextlib.nullcontext() if random else _nothing_is_drawn(module, inputs):
        return checkpoint(
            function,
            module,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=random,
            context_fn=lambda: (contextlib.nullcontext(), _RunningAveragesKept(module)),
        )


@contextlib.contextmanager
def _nothing_is_drawn(module: nn.Module, inputs: tuple) -> Iterator[None]:
    """RuntimeError where torch's generator has moved at the end; compiled and captured code is not looked at."""
    devices = {value.device for value in inputs if isinstance(value, Tensor)}
    if torch.compiler.is_compiling() or (
        torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    ):
        yield
        return
    before = _generator_states(devices)
    yield
    if any(not torch.equal(a, b) for a, b in zip(before, _generator_states(devices), strict=True)):
        raise RuntimeError(
            f"{type(module).__name__} draws random numbers, and under recomputation would draw others in the backward "
            "pass: declare is_random = True in the module that draws, or set trainer.recompute=false"
        )


def _generator_states(devices: set[torch.device]) -> list[Tensor]:
    """Those of the CPU and of the GPUs among `devices`; none of them waits for a device."""
    gpus = [device for device in devices if device.type == "cuda"]
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in gpus)]


class _RunningAveragesKept:
    """Puts back what batch norms have counted, around every further run: a graph may be gone through twice.

    Such a run may end before it has reached all of them.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm) and m.training]
        self.buffers = [
            b
            for norm in norms
            for b in (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        ]
        self.before = [buffer.clone() for buffer in self.buffers]

    def __exit__(self, *error) -> None:
        for buffer, value in zip(self.buffers, self.before, strict=True):
            buffer.data.copy_(
                value
            )  # autograd holds them too, and would take a change for one that matters
