"""The learning rate as a function of the step."""

import math
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR


def warm_up(steps: int, total: int | None, cooldown: int = 0) -> Callable[[int], float]:
    """The factor of the learning rate at step i, as a function of i.

    It is i / steps in the first `steps` steps, and then 1. Where `total` is given it falls to 0 at
    step `total`: along a half cosine from the end of the warm-up, or with `cooldown` along a line
    in the last `cooldown` steps, for which `total` has to be given.

    A function is returned because a checkpoint would hold the attributes of an object: a resumed
    run is to have the end that it is given now.

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


class Schedule(LambdaLR):
    """A schedule whose checkpoint holds the step, but not the factors.

    In a resumed run the factors given now decide the rate at that step and at those that follow.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the step of the checkpoint, at the rate that the factors have there now."""
        super().load_state_dict(state_dict)
        for group, base, factor in zip(
            self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(self.last_epoch)
