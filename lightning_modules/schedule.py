"""Learning rate over steps."""

import math


class WarmUp:
    """Factor of the learning rate at step i: min(1, i / steps), times a half cosine to 0 at `total` if given."""

    def __init__(self, steps: int, total: int | None) -> None:
        self.steps, self.total = steps, total

    def __call__(self, step: int) -> float:
        if step < self.steps:
            return step / self.steps
        if self.total is None:
            return 1.0
        done = (step - self.steps) / max(1, self.total - self.steps)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
