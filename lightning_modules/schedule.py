"""Learning rate over steps."""

import math


class WarmUp:
    """Factor of the learning rate at step i: min(1, i / steps), and then down to 0 at `total` if that is given.

    Down: along a half cosine from the end of the warm-up, or with `cooldown` along a line in the last so many steps.
    """

    def __init__(self, steps: int, total: int | None, cooldown: int = 0) -> None:
        self.steps, self.total, self.cooldown = steps, total, cooldown

    def __call__(self, step: int) -> float:
        factor = step / self.steps if step < self.steps else 1.0
        if self.cooldown:
            return min(factor, max(0, self.total - step) / self.cooldown)
        if step < self.steps or self.total is None:
            return factor
        done = (step - self.steps) / max(1, self.total - self.steps)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
