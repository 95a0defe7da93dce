"""Adamax over all weights at once."""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


class Adamax(torch.optim.Adamax):
    """torch.optim.Adamax (Kingma & Ba 2015, algorithm 2) on one vector of all weights: a dozen operations a step.

        m = m + (1 - beta1) (g - m),   u = max(beta2 u, |g| + eps),   w = w - lr / (1 - beta1^t) m / u

    torch's own makes ten operations for every weight, and knows no `found_inf`: a tensor that tells a step on the
    device, as in torch's fused optimizers, to leave weights and moments as they are (u is at least eps then).
    Checkpoints are torch's. One group of weights, of one dtype and on one device; those without a gradient are left
    out, in every step the same.
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
        self._forget()

    def _forget(self) -> None:
        """What lies beside torch's state, and follows from it."""
        self.found_inf: Tensor | None = None
        self._weights: list[Tensor] = []  # those with gradients
        self._moments: dict[str, Tensor] = {}  # of them, vectors; the entries of `state` are views
        self._grad, self._grads = torch.empty(0), []  # a vector and its views

    def __setstate__(self, state: dict) -> None:
        """A copy, or a checkpoint that is loaded."""
        super().__setstate__(state)
        self._forget()

    def state_dict(self) -> dict:
        """torch's counts in place, weight by weight: each gets a count of its own."""
        state = super().state_dict()
        state["state"] = {
            i: {**entry, "step": entry["step"].clone()} for i, entry in state["state"].items()
        }
        return state

    def add_param_group(self, param_group: dict) -> None:
        """ValueError: there is one."""
        if self.param_groups:
            raise ValueError(
                "Adamax takes one group of weights: use torch.optim.Adamax for several"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups  # `add_param_group` refuses more
        weights = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return loss
        if not self._weights:
            self._flatten(weights)
        if [id(p) for p in weights] != [id(p) for p in self._weights]:
            raise ValueError(
                "Adamax: other weights than in the first step have a gradient now; use torch.optim.Adamax"
            )
        torch._foreach_copy_(self._grads, [p.grad for p in weights])
        if group["weight_decay"]:
            torch._foreach_add_(self._grads, weights, alpha=group["weight_decay"])
        self._update(self._grad, *group["betas"], group["lr"], group["eps"])
        torch._foreach_sub_(weights, self._grads)
        return loss

    def _update(self, grad: Tensor, beta1: float, beta2: float, lr: float, eps: float) -> None:
        """Move the moments, and put into `grad` what is to be taken from the weights."""
        step, exp_avg, exp_inf = (self._moments[name] for name in ("step", "exp_avg", "exp_inf"))
        taken = torch.ones_like(step) if self.found_inf is None else (self.found_inf == 0).to(step)
        if self.found_inf is not None:
            grad.masked_fill_(taken == 0, 0)  # 0 times NaN is NaN
        step += taken
        rate = taken * lr / (1 - beta1 ** step.clamp(min=1))
        exp_avg.lerp_(grad, ((1 - beta1) * taken).to(grad.dtype))
        exp_inf.mul_((1 - (1 - beta2) * taken).to(grad.dtype))
        torch.maximum(exp_inf, grad.abs_().add_(eps), out=exp_inf)
        torch.div(exp_avg, exp_inf, out=grad).mul_(rate.to(grad.dtype))

    def _flatten(self, weights: list[Tensor]) -> None:
        """Gather in vectors what `state` holds: a checkpoint's moments, or nothing yet."""
        self._grad = weights[0].new_empty(sum(p.numel() for p in weights))
        self._grads = _views(self._grad, weights)
        stored = next((self.state[p] for p in weights if self.state[p]), {})
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
        self._weights, self._moments = weights, moments


def _views(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Consecutive parts of a vector, with the shapes and strides of some dense tensors."""
    parts = vector.split([x.numel() for x in like])
    return [
        part.as_strided(x.shape, x.stride(), part.storage_offset())
        for part, x in zip(parts, like, strict=True)
    ]
