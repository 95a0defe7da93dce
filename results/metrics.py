"""What a metric is: which direction is better, its unit, and what kind of figure it is."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

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


class Quantity(NamedTuple):
    """What a metric measures.

    direction: "lower" or "higher", whichever is better.
    unit: as it is shown; empty for a pure number.
    label: how tables and charts name it.
    """

    direction: str
    unit: str
    label: str


# Every quantity that may be logged as `train/<name>`, `val/<name>` or `test/<name>`. PSNR and SSIM
# differ by more than models do between their two definitions, which therefore have two names.
QUANTITIES: Mapping[str, Quantity] = MappingProxyType(
    {
        "bpd": Quantity("lower", "bits/dim", "bits/dim"),
        "nll": Quantity("lower", "nats", "negative log-likelihood"),
        "nats_ll": Quantity("higher", "nats", "log-likelihood"),
        "release_bits": Quantity("lower", "bits/pixel", "bits/pixel as SRFlow's code"),
        "l1": Quantity("lower", "grey levels", "L1"),
        "accuracy": Quantity("higher", "share of images", "accuracy"),
        "fid": Quantity("lower", "", "FID"),
        "kid": Quantity("lower", "", "KID"),
        "inception_score": Quantity("higher", "", "Inception Score"),
        "precision": Quantity("higher", "share of samples", "precision"),
        "recall": Quantity("higher", "share of images", "recall"),
        "psnr": Quantity("higher", "dB", "PSNR (RGB)"),
        "ssim": Quantity("higher", "", "SSIM (RGB)"),
        "psnr_y": Quantity("higher", "dB", "PSNR (Y)"),
        "ssim_y": Quantity("higher", "", "SSIM (Y)"),
        "lpips": Quantity("lower", "", "LPIPS (AlexNet)"),
        "lpips_vgg": Quantity("lower", "", "LPIPS (VGG)"),
        "lr_psnr": Quantity("higher", "dB", "LR-PSNR"),
        "diversity": Quantity("higher", "grey levels", "diversity"),
        "niqe": Quantity("lower", "", "NIQE"),
        "brisque": Quantity("lower", "", "BRISQUE"),
        "piqe": Quantity("lower", "", "PIQE"),
    }
)
FEW_SAMPLES = re.compile(r"_(\d+)k$")  # ends the name of a figure on few samples, such as `fid_5k`


def quantity_of(key: str) -> str:
    """The quantity of a metric by its name: `bpd` for `test/bpd_bound`, `fid` for `val/fid_5k`.

    The name's last part, without its kind, where QUANTITIES does not have it.
    """
    name = FEW_SAMPLES.sub("", without_kind(key).rpartition("/")[2])
    return name.removesuffix("_reestimated")


def label_of(key: str) -> str:
    """How a chart names a metric: `FID-5k` for `val/fid_5k`, `bits/dim` for `test/bpd`.

    The quantity itself where QUANTITIES does not have it.
    """
    quantity = quantity_of(key)
    label = quantity
    if quantity in QUANTITIES:
        label = QUANTITIES[quantity].label
    few = FEW_SAMPLES.search(key)
    if few is not None:
        label = f"{label}-{few[1]}k"
    return label


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
