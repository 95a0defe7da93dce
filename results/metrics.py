"""What a metric is: which direction is better, its unit, and what kind of figure it is."""

import math
from dataclasses import dataclass

# Figures of different kinds get different names, so that they never share a column, a chart or a
# claim.
KINDS = {
    "exact": "the density of dequantised data, evaluated exactly",
    "estimate": "the density of dequantised data with an estimated log-determinant",
    "bound": "a variational bound on the likelihood of the integers: the dequantiser is learned",
    "iw": (
        "a bound by several importance-weighted noise samples, whose number ends the name "
        "(Burda et al. 2016)"
    ),
    "noisy": "the density of data with added noise, which bounds nothing on 8-bit images",
    "bound_estimate": (
        "a variational bound with an estimated log-determinant: the dequantiser is learned"
    ),
    "noisy_estimate": (
        "the density of data with added noise with an estimated log-determinant, "
        "which bounds nothing"
    ),
}


@dataclass(frozen=True)
class Metric:
    """A metric of an objective, logged as `train/<name>`, `val/<name>` and `test/<name>`.

    quantity: what is measured, e.g. "bpd" (bits/dim), "nll" (nats, lower is better), "psnr" (dB).
    direction: "lower" or "higher", whichever is better.
    unit: as it is shown, e.g. "bits/dim".
    kind: one of KINDS for likelihoods, None for what is simply measured.
    samples: of the kind "iw": how many noise samples each image has.
    """

    quantity: str
    direction: str
    unit: str
    kind: str | None = None
    samples: int = 1

    def __post_init__(self) -> None:
        if self.direction not in ("lower", "higher"):
            raise ValueError(
                f"{self.quantity}: direction={self.direction} is neither 'lower' nor 'higher'"
            )
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(
                f"{self.quantity}: kind={self.kind} is not known: give one of {', '.join(KINDS)}"
            )

    @property
    def name(self) -> str:
        """The quantity, and the kind unless it is exact: "bpd", "bpd_bound", "bpd_iw16"."""
        if self.kind in (None, "exact"):
            return self.quantity
        if self.kind == "iw":
            return f"{self.quantity}_iw{self.samples}"
        return f"{self.quantity}_{self.kind}"

    @property
    def worst(self) -> float:
        """Infinity or minus infinity: every finite value is better."""
        return {"lower": math.inf, "higher": -math.inf}[self.direction]

    def better(self, value: float, than: float) -> bool:
        """Whether a finite value is better than another one, or than `worst`."""
        if not math.isfinite(value):
            return False
        if self.direction == "lower":
            return value < than
        return value > than

    def best(self, values: list[float]) -> float:
        """The best of the finite values; `worst` where there are none."""
        finite = [value for value in values if math.isfinite(value)]
        if self.direction == "lower":
            return min(finite, default=self.worst)
        return max(finite, default=self.worst)


def kind_of(key: str) -> str:
    """The kind of figure by its name: "bound" for `test/bpd_bound`, "exact" for `test/bpd`."""
    words = (word.rstrip("0123456789") for word in key.rpartition("/")[2].split("_")[1:])
    return "_".join(word for word in words if word in KINDS) or "exact"


def without_kind(key: str) -> str:
    """A metric's name without its kind: `test/bpd` for `test/bpd_bound` and for `test/bpd`."""
    first, *words = key.split("_")
    return "_".join([first, *(word for word in words if word.rstrip("0123456789") not in KINDS)])
