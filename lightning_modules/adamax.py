"""Adamax over all weights at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


class Adamax(torch.optim.Adamax):
    """torch.optim.Adamax (Kingma & Ba 2015, algorithm 2) on one vector of all weights.

        m = m + (1 - beta1) (g - m)
        u = max(beta2 u, |g| + eps)
        w = w - lr / (1 - beta1^t) m / u

    A step takes a dozen operations, whereas torch's own takes ten for each weight tensor. torch's
    own also lacks `found_inf`: as in torch's fused optimizers, this tensor tells a step, without
    waiting for the device, to leave weights and moments as they are. (In such a step u is raised to
    eps where it was smaller.)

    Checkpoints have the format of torch's Adamax. There is one group of weights, of one dtype and
    on one device. Weights without a gradient are left out; they have to be the same in every step.

    params: the weights. lr: the learning rate. betas, eps: as above. weight_decay: the multiple of
    the weights that is added to the gradient.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = Adamax([weight], lr=0.1)
    >>> weight.grad = torch.tensor([3.0, -5.0])
    >>> _ = optimizer.step()
    >>> weight.detach()
    tensor([ 0.9000, -1.9000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)
        self._reset_vectors()

    def _reset_vectors(self) -> None:
        """Empty the vectors that exist in addition to torch's state; the next step fills them."""
        self.found_inf: Tensor | None = None
        self._weights: list[Tensor] = []  # the weights that have gradients
        self._moments: dict[str, Tensor] = {}  # their moments as vectors; `state` holds views
        self._grad = torch.empty(0)  # their gradients as one vector
        self._grads: list[Tensor] = []  # views of `_grad`, one for each weight

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy, or of a loaded checkpoint."""
        super().__setstate__(state)
        self._reset_vectors()

    def state_dict(self) -> dict[str, Any]:
        """The state in the format of torch's Adamax.

        Every weight gets its own copy of the step count, which torch increments in place.
        """
        state = super().state_dict()
        state["state"] = {
            i: {**entry, "step": entry["step"].clone()} for i, entry in state["state"].items()
        }
        return state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Set the only group of weights. Raises ValueError: there is one already."""
        if self.param_groups:
            raise ValueError(
                "Adamax takes one group of weights: use torch.optim.Adamax for several"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights. Returns the result of `closure`, the loss, or None without one.

        Raises ValueError: other weights than in the first step have a gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        weights = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return loss
        if not self._weights:
            self._flatten(weights)
        if [id(p) for p in weights] != [id(p) for p in self._weights]:
            raise ValueError(
                "Adamax: other weights than in the first step have a gradient now; "
                "use torch.optim.Adamax"
            )
        torch._foreach_copy_(self._grads, [p.grad for p in weights])
        if group["weight_decay"]:
            torch._foreach_add_(self._grads, weights, alpha=group["weight_decay"])
        beta1, beta2 = group["betas"]
        self._update(self._grad, beta1, beta2, group["lr"], group["eps"])
        torch._foreach_sub_(weights, self._grads)
        return loss

    def _update(self, grad: Tensor, beta1: float, beta2: float, lr: float, eps: float) -> None:
        """Update the moments, and overwrite `grad` with the decrease of the weights."""
        step = self._moments["step"]
        exp_avg = self._moments["exp_avg"]
        exp_inf = self._moments["exp_inf"]
        applied = torch.ones_like(step)  # 1, or 0 for a step that is skipped
        if self.found_inf is not None:
            applied = (self.found_inf == 0).to(step)
            grad.masked_fill_(applied == 0, 0)  # not by a factor 0, since 0 * NaN is NaN
        step += applied
        rate = applied * lr / (1 - beta1 ** step.clamp(min=1))
        exp_avg.lerp_(grad, ((1 - beta1) * applied).to(grad.dtype))
        exp_inf.mul_((1 - (1 - beta2) * applied).to(grad.dtype))
        torch.maximum(exp_inf, grad.abs_().add_(eps), out=exp_inf)
        torch.div(exp_avg, exp_inf, out=grad).mul_(rate.to(grad.dtype))

    def _flatten(self, weights: list[Tensor]) -> None:
        """Make the vectors, with the moments of a loaded checkpoint in `state`, or else zeros."""
        self._grad = weights[0].new_empty(sum(p.numel() for p in weights))
        self._grads = _views(self._grad, weights)
        no_state: dict[str, Tensor] = {}
        stored = next((self.state[p] for p in weights if self.state[p]), no_state)
        step = stored.get("step", torch.zeros(()))
        moments = {"step": step.to(self._grad.device, torch.float64, copy=True)}
        views = {}
        for name in ("exp_avg", "exp_inf"):
            moments[name] = torch.zeros_like(self._grad)
            views[name] = _views(moments[name], weights)
            for view, p in zip(views[name], weights, strict=True):
                if self.state[p]:
                    view.copy_(self.state[p][name])
        for i, p in enumerate(weights):
            self.state[p] = {
                "step": moments["step"],
                "exp_avg": views["exp_avg"][i],
                "exp_inf": views["exp_inf"][i],
            }
        self._weights = weights
        self._moments = moments


def _views(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Consecutive parts of a vector as views, with the shapes and strides of the tensors `like`."""
    parts = vector.split([x.numel() for x in like])
    return [
        part.as_strided(x.shape, x.stride(), part.storage_offset())
        for part, x in zip(parts, like, strict=True)
    ]
