"""What `python -m benchmarks` compares: our flows, a peer, and the convolutions alone."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.peers import NormflowsGlow
from benchmarks.speed import DTYPES, Candidate, Convolution, Floor
from flows.glow import Glow
from flows.realnvp import RealNVP
from flows.recompute import recompute
from lightning_modules.adamax import Adamax
from lightning_modules.cuda_graph import CudaGraph
from results.speed import COMPILED, PEER, TUNED

SHAPE = (3, 32, 32)
FLOOR = "convolutions alone"
Name = tuple[str, str]  # model and dtype


@dataclass(frozen=True)
class GlowSize:
    """Arguments of `Glow` behind its shape, and the images of a step."""

    n_levels: int
    depth: int
    hidden_channels: int
    batch: int

    def flow(self) -> Glow:
        return Glow(SHAPE, self.n_levels, self.depth, self.hidden_channels)

    def peers(self) -> dict[Name, partial[nn.Module]]:
        """What makes them, by name."""
        peer = partial(NormflowsGlow, SHAPE, self.n_levels, self.depth, self.hidden_channels)
        return {(PEER, "float32"): peer, (TUNED, "bf16"): partial(peer, autocast=True)}

    def optimizer(self, flow: nn.Module) -> torch.optim.Optimizer:
        """The recipe's."""
        return Adamax(flow.parameters(), lr=1e-3)

    def convolutions(self) -> list[Convolution]:
        """Those of the conditioners."""
        channels, side, hidden, convolutions = SHAPE[0], SHAPE[1], self.hidden_channels, []
        for _ in range(self.n_levels):
            channels, side = 4 * channels, side // 2
            net = [(channels // 2, hidden, 3), (hidden, hidden, 1), (hidden, channels, 3)]
            convolutions += [
                Convolution(*layer, side, side) for _ in range(self.depth) for layer in net
            ]
            channels //= 2
        return convolutions


@dataclass(frozen=True)
class RealNVPSize:
    """Arguments of `RealNVP` behind its shape, and the images of a step."""

    n_scales: int
    hidden_channels: int
    n_blocks: int
    batch: int

    def flow(self) -> RealNVP:
        return RealNVP(SHAPE, self.n_scales, self.hidden_channels, self.n_blocks)

    def peers(self) -> dict[Name, partial[nn.Module]]:
        """None is measured."""
        return {}

    def optimizer(self, flow: nn.Module) -> torch.optim.Optimizer:
        """The recipe's."""
        return torch.optim.Adam(flow.parameters(), lr=1e-3, fused=True)

    def convolutions(self) -> list[Convolution]:
        """As the conditioners hold them: checkerboards at the scale's size, channel couplings at half of it."""
        with torch.device("meta"):
            flow = self.flow()
        convolutions = []
        for i, scale in enumerate(flow.scales):
            for layer in scale.layers:
                if hasattr(layer, "conditioner"):
                    side = SHAPE[1] // 2**i // (1 if hasattr(layer, "mask") else 2)
                    nets = (m for m in layer.conditioner.modules() if isinstance(m, nn.Conv2d))
                    convolutions += [
                        Convolution(m.in_channels, m.out_channels, *m.kernel_size[:1], side, side)
                        for m in nets
                    ]
        return convolutions


Size = GlowSize | RealNVPSize
SETTINGS: dict[str, dict[str, Size]] = {
    "glow": {
        "K8 L3 H128 B16": GlowSize(3, 8, 128, 16),
        "K32 L3 H512 B16": GlowSize(3, 32, 512, 16),
        "K32 L3 H512 B64": GlowSize(3, 32, 512, 64),
        # The recipe's batch of 512 did not fit beside the peer's on an H200.
        "K32 L3 H512 B256": GlowSize(3, 32, 512, 256),
    },
    "realnvp": {"paper B4": RealNVPSize(2, 64, 8, 4), "paper B256": RealNVPSize(2, 64, 8, 256)},
}
LARGE = ("K32 L3 H512 B64", "K32 L3 H512 B256", "paper B256")  # for a GPU


def names(size: Size, device: torch.device) -> list[Name]:
    """All models, in the order of the rows; on a GPU also ours as preset=gpu."""
    ours = [(model, dtype) for dtype in DTYPES for model in ("ours", "ours recompute")]
    compiled = [] if device.type == "cpu" else [(COMPILED, "bf16")]
    return [*ours, *compiled, *size.peers()]


def make(size: Size, name: Name, device: torch.device) -> Candidate | Floor:
    """A model with its optimizer and a batch, or the convolutions alone, (FLOOR, dtype)."""
    model, dtype = name
    if model == FLOOR:
        return Floor(size.convolutions(), size.batch, DTYPES[dtype], device)
    torch.manual_seed(0)
    x = images(size.batch, device)
    if name in size.peers():
        peer = size.peers()[name]().to(device)
        return Candidate(peer, torch.optim.Adamax(peer.parameters(), lr=1e-3), x)
    flow = size.flow().to(device)
    with torch.no_grad():
        flow.initialize(x)
    if model == "ours recompute":
        recompute(flow)
    if model == COMPILED:
        flow.compile()
    graph = CudaGraph(flow) if model == COMPILED else None
    return Candidate(flow, size.optimizer(flow), x, dtype == "bf16", graph)


def images(n: int, device: torch.device) -> Tensor:
    """In [0, 1], the same for all models."""
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
