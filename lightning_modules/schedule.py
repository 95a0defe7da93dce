"""The learning rate as a function of the step."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim.lr_scheduler import LambdaLR


def warm_up(steps: int, total: int | None, cooldown: int = 0) -> Callable[[int], float]:
    """Return the factor of the learning rate as a function of the step i.

    It is i / steps in the first `steps` steps, and then 1. If `total` is given, it falls to 0 at
    step `total`: along a half cosine from the end of the warm-up, or, if `cooldown` is given,
    linearly in the last `cooldown` steps. `cooldown` needs `total`.

    A closure is returned, not an object with attributes, because a checkpoint would store those
    attributes, and a resumed run has to use the `total` of its own settings.

    >>> factor = warm_up(steps=10, total=100, cooldown=20)
    >>> [factor(step) for step in (0, 5, 10, 80, 90, 100)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """

    def factor(step: int) -> float:
        if step < steps:
            return step / steps
        if total is None:
            return 1.0
        if cooldown:
            return min(1.0, max(0, total - step) / cooldown)
        return 0.5 * (1 + math.cos(math.pi * min((step - steps) / max(1, total - steps), 1.0)))

    return factor


def step_down(steps: int, milestones: Sequence[int], gamma: float) -> Callable[[int], float]:
    """Return the factor of the learning rate as a function of the step i.

    It is i / steps in the first `steps` steps, and then gamma to the power of the number of
    milestones, in steps, that i has reached.

    >>> factor = step_down(steps=10, milestones=[50, 75], gamma=0.5)
    >>> [factor(step) for step in (0, 5, 10, 49, 50, 75, 100)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.25, 0.25]
    """

    def factor(step: int) -> float:
        if step < steps:
            return step / steps
        return gamma ** sum(step >= milestone for milestone in milestones)

    return factor


class Schedule(LambdaLR):
    """A schedule whose checkpoint contains the step, but not the factors.

    A resumed run computes the learning rate from that step on with its own factors.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the step of the checkpoint, at this run's own rate for that step."""
        super().load_state_dict(state_dict)
        for group, base, factor in zip(
            self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(self.last_epoch)
