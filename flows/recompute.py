"""Save memory at the cost of time: the backward pass computes activations again."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from flows.transforms import in_transform

Output = TypeVar("Output")


class _Recomputing(Protocol):
    recompute: bool


def recompute(flow: nn.Module) -> None:
    """Let every layer that has an attribute `recompute` keep little more than its inputs.

    >>> from flows.glow import Glow
    >>> flow = Glow((3, 8, 8), n_levels=2, depth=1, hidden_channels=4)
    >>> recompute(flow)
    >>> x = torch.rand(16, 3, 8, 8)
    >>> flow.initialize(x)
    >>> flow.log_prob(x).mean().backward()  # the same gradients, less memory
    """
    for module in flow.modules():
        if hasattr(module, "recompute"):
            cast(_Recomputing, module).recompute = True


def is_random(module: nn.Module) -> bool:
    """Whether a forward pass of the module, in its present mode, draws random numbers.

    torch's dropout layers do so in training. A module that draws by itself (`F.dropout`,
    `torch.rand`) declares it by an attribute `is_random = True`.
    """
    return any(draws(part) for part in module.modules())


def draws(module: nn.Module) -> bool:
    """Whether the module itself, apart from its parts, draws random numbers (see `is_random`)."""
    dropout = isinstance(module, _DropoutNd) and module.training and module.p > 0
    return dropout or bool(getattr(module, "is_random", False))


def recomputed(
    function: Callable[..., Output], module: nn.Module, *inputs: Tensor | None, enabled: bool
) -> Output:
    """function(module, *inputs); if `enabled`, only the inputs are kept for the backward pass.

    Gradients are the same to the bit. Batch norms of `module` see the batch twice, but their
    running averages count it once. A module that `is_random` draws the same numbers again.

    Raises RuntimeError: a module draws random numbers without declaring it, so the backward pass
    would draw others and its gradients would be wrong.
    """
    if not enabled or not torch.is_grad_enabled() or in_transform():
        return function(module, *inputs)
    random = is_random(module)
    check: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if not random:
        check = _nothing_is_drawn(module, inputs)
    with check:
        return checkpoint(
            function,
            module,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=random,
            context_fn=lambda: (contextlib.nullcontext(), _RunningAveragesKept(module)),
        )


@contextlib.contextmanager
def _nothing_is_drawn(module: nn.Module, inputs: tuple[Tensor | None, ...]) -> Iterator[None]:
    """Raise RuntimeError if the state of a torch generator has changed at the end of the block.

    Compiled code, and code that is being captured as a CUDA graph, is not checked.
    """
    devices = {value.device for value in inputs if isinstance(value, Tensor)}
    if torch.compiler.is_compiling() or (
        torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    ):
        yield
        return
    before = _generator_states(devices)
    yield
    after = _generator_states(devices)
    if any(not torch.equal(old, new) for old, new in zip(before, after, strict=True)):
        raise RuntimeError(
            f"{type(module).__name__} draws random numbers, and under recomputation would draw "
            "others in the backward pass: declare is_random = True in the module that draws, or "
            "set trainer.recompute=false"
        )


def _generator_states(devices: set[torch.device]) -> list[Tensor]:
    """The states of the generators of the CPU and of the GPUs among `devices`.

    Reading them does not wait for the device.
    """
    gpus = [device for device in devices if device.type == "cuda"]
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in gpus)]


class _RunningAveragesKept:
    """Restores the running averages of batch norms after a forward pass was computed again.

    It is entered and left once for each such pass: the backward pass may go through a graph twice,
    and a repeated forward pass may end before it has reached all batch norms.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.buffers: list[Tensor] = []
        for module in self.module.modules():
            if isinstance(module, _BatchNorm) and module.training:
                averages = (module.running_mean, module.running_var, module.num_batches_tracked)
                self.buffers += [buffer for buffer in averages if buffer is not None]
        self.before = [buffer.clone() for buffer in self.buffers]

    def __exit__(self, *error: object) -> None:
        for buffer, value in zip(self.buffers, self.before, strict=True):
            # Through `.data`, since autograd would count a direct copy as an in-place change.
            buffer.data.copy_(value)
