"""What a metric is: which way is better, its unit, and what kind of figure it is. Imports no torch."""

import math
from dataclasses import dataclass

# Figures of different kinds have different names, so that they never share a column, a chart or a claim.
KINDS = {
    "exact": "the density of dequantised data, evaluated exactly",
    "estimate": "the density of dequantised data with an estimated log-determinant",
    "bound": "a variational bound on the likelihood of the integers: the dequantiser is learned",
    "iw": "a bound by several importance-weighted noise samples, whose number ends the name (Burda et al. 2016)",
    "noisy": "the density of data with added noise, which bounds nothing on 8-bit images",
    "bound_estimate": "a variational bound with an estimated log-determinant: the dequantiser is learned",
    "noisy_estimate": "the density of data with added noise with an estimated log-determinant, which bounds nothing",
}


@dataclass(frozen=True)
class Metric:
    """A metric of an objective, logged as `train/<name>`, `val/<name>` and `test/<name>`.

    quantity: what is measured: "bpd" (bits/dim), "nll" (nats, lower is better), "psnr" (dB) and so on.
    direction: "lower" or "higher", whichever is better.
    unit: as it is shown, e.g. "bits/dim".
    kind: one of KINDS for likelihoods, None for what is simply measured.
    samples: noise samples an image, of the kind "iw".
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
        return f"{self.quantity}_{self.kind}{self.samples if self.kind == 'iw' else ''}"

    @property
    def worst(self) -> float:
        """What every finite value is better than."""
        return math.inf if self.direction == "lower" else -math.inf

    def better(self, value: float, than: float) -> bool:
        """Whether a finite value is better than another one, or than `worst`."""
        if not math.isfinite(value):
            return False
        return value < than if self.direction == "lower" else value > than

    def best(self, values: list[float]) -> float:
        """The best of some values; those that are not finite are passed over. `worst` if none is finite."""
        finite = [value for value in values if math.isfinite(value)]
        return (min if self.direction == "lower" else max)(finite, default=self.worst)


def kind_of(key: str) -> str:
    """The kind of a likelihood that is called `test/bpd_bound`, by its name; "exact" where the name has none."""
    words = (word.rstrip("0123456789") for word in key.rpartition("/")[2].split("_")[1:])
    return "_".join(word for word in words if word in KINDS) or "exact"


def without_kind(key: str) -> str:
    """What is measured, whatever the kind of figure: `test/bpd` of `test/bpd_bound` and of `test/bpd` itself."""
    first, *words = key.split("_")
    return "_".join([first, *(word for word in words if word.rstrip("0123456789") not in KINDS)])
