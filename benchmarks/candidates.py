"""What `python -m benchmarks` compares: our flows, a peer, and the convolutions alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers import NormflowsGlow
from benchmarks.speed import DTYPES, Candidate, Convolution, Floor
from flows.base import Compose
from flows.coupling import AdditiveCoupling, ChannelCoupling, MaskedCoupling
from flows.glow import Glow
from flows.realnvp import RealNVP
from flows.recompute import recompute
from flows.srflow import SRFlow
from lightning_modules.adamax import Adamax
from lightning_modules.cuda_graph import CudaGraph
from results.speed import COMPILED, PEER, TUNED

SHAPE = (3, 32, 32)
FLOOR = "convolutions alone"
FROZEN = ("ours, encoder frozen", "ours recompute, encoder frozen")
Name = tuple[str, str]  # model and dtype


@dataclass(frozen=True)
class GlowSize:
    """Arguments of `Glow` after its shape, and the number of images in a step."""

    n_levels: int
    depth: int
    hidden_channels: int
    batch: int
    n_samples = 16
    shape = SHAPE

    def flow(self) -> Glow:
        return Glow(SHAPE, self.n_levels, self.depth, self.hidden_channels)

    def peers(self) -> dict[Name, Callable[[], NormflowsGlow]]:
        """The functions that make the flows of other packages, by name."""
        peer = partial(NormflowsGlow, SHAPE, self.n_levels, self.depth, self.hidden_channels)
        return {(PEER, "float32"): peer, (TUNED, "bf16"): partial(peer, autocast=True)}

    def optimizer(self, flow: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the recipe."""
        return Adamax(flow.parameters(), lr=1e-3)

    def convolutions(self) -> list[Convolution]:
        """The convolutions of the conditioners."""
        channels = SHAPE[0]
        side = SHAPE[1]
        hidden = self.hidden_channels
        convolutions = []
        for _ in range(self.n_levels):
            channels *= 4  # the squeeze
            side //= 2
            network = [
                Convolution(channels // 2, hidden, 3, side, side),
                Convolution(hidden, hidden, 1, side, side),
                Convolution(hidden, channels, 3, side, side),
            ]
            convolutions += self.depth * network
            channels //= 2  # half of them are factored out
        return convolutions


@dataclass(frozen=True)
class RealNVPSize:
    """Arguments of `RealNVP` after its shape, and the number of images in a step."""

    n_scales: int
    hidden_channels: int
    n_blocks: int
    batch: int
    n_samples = 16
    shape = SHAPE

    def flow(self) -> RealNVP:
        return RealNVP(SHAPE, self.n_scales, self.hidden_channels, self.n_blocks)

    def peers(self) -> dict[Name, Callable[[], NormflowsGlow]]:
        """No other RealNVP is measured."""
        return {}

    def optimizer(self, flow: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the recipe."""
        return torch.optim.Adam(flow.parameters(), lr=1e-3, fused=True)

    def convolutions(self) -> list[Convolution]:
        """The convolutions of the conditioners.

        Images have the size of the scale in checkerboard couplings, and half of it in channel ones.
        """
        with torch.device("meta"):
            flow = self.flow()
        convolutions = []
        for i, scale in enumerate(flow.scales):
            side = SHAPE[1] // 2**i
            for layer in cast(Compose, scale).layers:
                if isinstance(layer, MaskedCoupling):
                    convolutions += convolutions_in(layer.conditioner, side)
                elif isinstance(layer, ChannelCoupling):
                    convolutions += convolutions_in(layer.conditioner, side // 2)
        return convolutions


@dataclass(frozen=True)
class SRFlowSize:
    """A scale of `SRFlow` and its number of levels, the side of a crop, and the crops in a step.

    options: the other arguments of `SRFlow`.
    """

    scale: int
    n_levels: int
    side: int
    batch: int
    options: tuple[tuple[str, Any], ...] = ()
    n_samples = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a crop."""
        return 3, self.side, self.side

    def flow(self) -> SRFlow:
        return SRFlow(scale=self.scale, n_levels=self.n_levels, **dict(self.options))

    def peers(self) -> dict[Name, Callable[[], NormflowsGlow]]:
        """No other SRFlow is measured."""
        return {}

    def optimizer(self, flow: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the recipe."""
        return torch.optim.Adam(flow.parameters(), lr=2.5e-4, fused=True)

    def convolutions(self) -> list[Convolution]:
        """The convolutions of the encoder and of the conditioners."""
        with torch.device("meta"):
            flow = self.flow()
        encoder = flow.context_encoder
        side = self.side // self.scale
        convolutions = convolutions_in(encoder.conv_in, side)
        for block in encoder.blocks:
            convolutions += convolutions_in(block, side)
        convolutions += convolutions_in(encoder.conv_trunk, side)
        for i, upsampling in enumerate(encoder.upsamplings, start=1):
            convolutions += convolutions_in(upsampling, side * 2**i)
        for i, level in enumerate(flow.levels, start=1):
            for layer in level.modules():
                if isinstance(layer, AdditiveCoupling):
                    convolutions += convolutions_in(layer.conditioner, self.side // 2**i)
        return convolutions


def convolutions_in(conditioner: nn.Module, side: int) -> list[Convolution]:
    """The convolutions of a network on images of side x side pixels."""
    layers = [layer for layer in conditioner.modules() if isinstance(layer, nn.Conv2d)]
    return [
        Convolution(layer.in_channels, layer.out_channels, layer.kernel_size[0], side, side)
        for layer in layers
    ]


Size = GlowSize | RealNVPSize | SRFlowSize
SETTINGS: dict[str, dict[str, Size]] = {
    "glow": {
        "K8 L3 H128 B16": GlowSize(3, 8, 128, 16),
        "K32 L3 H512 B16": GlowSize(3, 32, 512, 16),
        "K32 L3 H512 B64": GlowSize(3, 32, 512, 64),
        # The recipe's batch of 512 did not fit beside the peer's on an H200.
        "K32 L3 H512 B256": GlowSize(3, 32, 512, 256),
    },
    "realnvp": {"paper B4": RealNVPSize(2, 64, 8, 4), "paper B256": RealNVPSize(2, 64, 8, 256)},
    "srflow": {
        "x4 HR160 B1": SRFlowSize(4, 3, 160, 1),
        "x8 HR160 B1": SRFlowSize(8, 4, 160, 1, (("stacked", (1, 3, 5, 7)),)),
        "x4 HR160 B12": SRFlowSize(4, 3, 160, 12),
    },
}
LARGE = ("K32 L3 H512 B64", "K32 L3 H512 B256", "paper B256", "x4 HR160 B12")  # for a GPU


def names(size: Size, device: torch.device) -> list[Name]:
    """All models, in the order of the rows; on a GPU also our compiled flow, as in preset=gpu."""
    models = ["ours", "ours recompute"]
    if isinstance(size, SRFlowSize):
        models += FROZEN
    ours = [(model, dtype) for dtype in DTYPES for model in models]
    if device.type != "cpu":
        ours.append((COMPILED, "bf16"))
    return [*ours, *size.peers()]


def make(size: Size, name: Name, device: torch.device) -> Candidate | Floor:
    """A model with its optimizer and a batch; for (FLOOR, dtype) the convolutions alone."""
    model, dtype = name
    if model == FLOOR:
        return Floor(size.convolutions(), size.batch, DTYPES[dtype], device)
    torch.manual_seed(0)
    x = images(size.batch, size.shape, device)
    context = None
    if isinstance(size, SRFlowSize):
        context = F.avg_pool2d(x, size.scale)
    if name in size.peers():
        peer = size.peers()[name]().to(device)
        return Candidate(peer, torch.optim.Adamax(peer.parameters(), lr=1e-3), x)
    flow = size.flow().to(device)
    with torch.no_grad():
        flow.initialize(x, context)
    graph = None
    if "recompute" in model:
        recompute(flow)
    if model == COMPILED:
        flow.compile()
        graph = CudaGraph(flow)
    return Candidate(
        flow,
        size.optimizer(flow),
        x,
        dtype == "bf16",
        graph,
        context,
        frozen=model in FROZEN,
        n_samples=size.n_samples,
    )


def images(n: int, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Images of noise in [0, 1], the same for all models."""
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0)).to(device)
