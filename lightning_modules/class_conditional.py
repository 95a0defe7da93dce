"""Maximum likelihood given the class, with a classifier on the last level: Glow's class-conditional objective."""

from torch import Tensor
from torch.nn import functional as F

from lightning_modules.density import DensityModule
from results.metrics import Metric


class ClassConditionalModule(DensityModule):
    """Minimises the mean of -log p(x | y) + class_weight D CE(y, logits) over (image, index, class) batches.

    Kingma & Dhariwal 2018, authors' code (`ycond`, `weight_y`): the class term is .01 bits for each bit of cross
    entropy, added to bits *per dimension*; in nats an image that is .01 D CE. Logs `train/class_loss` (CE, nats) and
    `val/accuracy`, `test/accuracy` of the classifier. `test/bpd` is that of p(x | y), given the true class.

    class_weight: .01 in the code. The other arguments are those of `DensityModule`.
    """

    extra_metrics = (Metric("accuracy", "higher", "share of images"),)

    def __init__(
        self, flow, dequantizer, n_bits, seed: int, class_weight: float = 0.01, **arguments
    ) -> None:
        super().__init__(flow, dequantizer, n_bits, seed, **arguments)
        if flow.n_classes is None:
            raise ValueError(
                f"this {type(flow).__name__} knows no classes: give flow.n_classes and data.labels=true"
            )
        if class_weight < 0:
            raise ValueError(
                f"optim.class_weight={class_weight} is negative: give 0.01, or 0 for none"
            )
        self.class_weight = class_weight

    def objective(self, x: Tensor, context: Tensor, *noise: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, logits = self.run(self.flow.log_prob_and_class_logits, x, context, *noise)
        class_loss = F.cross_entropy(logits, context)
        self.log("train/class_loss", class_loss.detach())
        return log_prob, self.class_weight * x[0].numel() * class_loss

    def evaluate(
        self, flow, x: Tensor, context: Tensor, *noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_prob, logits = flow.log_prob_and_class_logits(x, context, *noise)
        return log_prob, {"accuracy": (logits.argmax(1) == context).float()}
