"""Re-estimation of the running statistics of batch norms, before a result is reported.

The running averages of training lag behind the weights.
"""

import copy
from collections.abc import Iterable
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from flows.recompute import draws

Model = TypeVar("Model", bound=nn.Module)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether evaluation of the model depends on running statistics."""
    return bool(_norms(model))


def reestimated(flow: Model, inputs: Iterable[tuple]) -> Model:
    """A copy of the flow, in eval mode, whose running statistics are plain means over `inputs`.

    Public flows with batch norm are known to reach 3.8 bits/dim in training, but 4.7 or more on the
    test set.

    inputs: for each batch the arguments of a call of the flow: data, context and so on.
    """
    flow = copy.deepcopy(flow).train()
    for module in flow.modules():
        if draws(module):  # no dropout: a reported result must not depend on random numbers
            module.eval()
    norms = _norms(flow)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        # None means a plain mean. torch.optim.swa_utils.update_bn does the same, but calls the
        # model with the data only, without a context.
        norm.momentum = None
    for arguments in inputs:
        flow(*arguments)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return flow.eval()


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
