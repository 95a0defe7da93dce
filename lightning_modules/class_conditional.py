"""Glow's class-conditional objective: the likelihood given the class, plus a classifier's loss."""

from typing import Any, Protocol, cast

from torch import Tensor, nn
from torch.nn import functional as F

from flows.base import FlowModel
from lightning_modules.checks import check_not_negative
from lightning_modules.density import DensityModule
from results.metrics import Metric


class ClassifyingFlow(Protocol):
    """A flow that also classifies its input."""

    def log_prob_and_class_logits(
        self, x: Tensor, context: Tensor, *noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log p(x | context), (B,) nats, and the logits of the classes, (B, n_classes)."""
        ...


class ClassConditionalModule(DensityModule):
    """Minimises the mean of -log p(x | y) + class_weight D CE(y, logits).

    Batches are (image, index, class). D is the number of dimensions of an image, and CE the cross
    entropy in nats.

    In the code of Kingma & Dhariwal 2018 (`ycond`, `weight_y`) the loss is bits *per dimension*
    plus .01 times the cross entropy in bits. In nats per image, the second term is .01 D CE.

    It logs `train/class_loss` (CE, nats) and the classifier's `val/accuracy` and `test/accuracy`.
    `test/bpd` is computed from p(x | y) with the true class y.

    class_weight: .01 in the authors' code. The other arguments are those of `DensityModule`.
    Raises ValueError: the flow has no classes, or the weight is negative.
    """

    extra_metrics = (Metric("accuracy", "higher", "share of images"),)

    def __init__(
        self,
        flow: FlowModel,
        dequantizer: nn.Module | None,
        n_bits: int | None,
        seed: int,
        class_weight: float = 0.01,
        **arguments: Any,
    ) -> None:
        super().__init__(flow, dequantizer, n_bits, seed, **arguments)
        if flow.n_classes is None:
            raise ValueError(
                f"this {type(flow).__name__} has no classes: "
                "give flow.n_classes and data.labels=true"
            )
        check_not_negative("optim.class_weight", class_weight)
        self.class_weight = class_weight

    def objective(
        self, x: Tensor, context: Tensor | None = None, *noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log p(x | y), (B,) nats, and the class term, a scalar. context: the classes, (B,)."""
        classes = cast(Tensor, context)
        method = cast(ClassifyingFlow, self.flow).log_prob_and_class_logits
        log_prob, logits = self.run(method, x, classes, *noise)
        class_loss = F.cross_entropy(logits, classes)
        self.log("train/class_loss", class_loss.detach())
        return log_prob, self.class_weight * x[0].numel() * class_loss

    def evaluate(
        self, flow: FlowModel, x: Tensor, context: Tensor | None = None, *noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """log p(x | y), (B,) nats, and whether the classifier is right, (B,)."""
        classes = cast(Tensor, context)
        method = cast(ClassifyingFlow, flow).log_prob_and_class_logits
        log_prob, logits = method(x, classes, *noise)
        return log_prob, {"accuracy": (logits.argmax(1) == classes).float()}
