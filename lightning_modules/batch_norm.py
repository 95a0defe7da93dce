"""Running statistics lag behind the weights: before a number is reported they can be estimated afresh."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_batch_norm(flow: nn.Module) -> bool:
    """Whether evaluation depends on running statistics."""
    return any(isinstance(module, _BatchNorm) for module in flow.modules())


def reestimated(flow: nn.Module, inputs: Iterable[Tensor]) -> nn.Module:
    """A copy of the flow, in eval mode, whose running statistics are plain means over the batches of `inputs`.

    Public batch-norm flows are known to reach 3.8 bits/dim in training and anything from 4.7 up on the test set.
    """
    flow = copy.deepcopy(flow)
    torch.optim.swa_utils.update_bn(inputs, flow)
    return flow.eval()
