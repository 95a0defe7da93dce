"""Learning rate over steps."""

import math
from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR


def warm_up(steps: int, total: int | None, cooldown: int = 0) -> Callable[[int], float]:
    """Factor of the learning rate at step i: min(1, i / steps), and then down to 0 at `total` if that is given.

    Down: along a half cosine from the end of the warm-up, or with `cooldown` along a line in the last so many steps.
    A function, since a checkpoint would hold the attributes of an object: a resumed run has the end it is given now.
    """

    def factor(step: int) -> float:
        if step < steps:
            return step / steps
        if cooldown:
            return min(1.0, max(0, total - step) / cooldown)
        if total is None:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min((step - steps) / max(1, total - steps), 1.0)))

    return factor


class Schedule(LambdaLR):
    """Its checkpoint says how far it was; the rate there is of the factors given now, as are those that follow."""

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for group, base, factor in zip(
            self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(self.last_epoch)
