"""Flows of other repositories, from the package index, at the size of ours. Only benchmarks import this."""

import torch
from torch import Tensor, nn


class NormflowsGlow(nn.Module):
    """normflows' Glow (Stimper et al. 2023) as its example builds it: affine, sigmoid scales, LU, Gaussian bases.

    Its coupling network is ours without the actnorms and the border channel, and its priors have no networks, so it
    does a little less. autocast: the same in channels_last, with its forward and its sampling under bf16 autocast.
    x: (B, *shape).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        n_levels: int,
        depth: int,
        hidden_channels: int,
        autocast=False,
    ):
        super().__init__()
        import normflows as nf

        channels, height, width = shape
        self.autocast = autocast
        bases, levels, merges = [], [], []
        for i in range(
            n_levels
        ):  # normflows counts from the latent: the coarsest level comes first
            factor = 2 ** (n_levels - i)
            c = channels * 2 ** (n_levels + 1 - i)
            level = [
                nf.flows.GlowBlock(c, hidden_channels, split_mode="channel", scale=True)
                for _ in range(depth)
            ]
            levels.append([*level, nf.flows.Squeeze()])
            own = c if i == 0 else c // 2
            bases.append(nf.distributions.DiagGaussian((own, height // factor, width // factor)))
            if i > 0:
                merges.append(nf.flows.Merge())
        self.model = nf.MultiscaleFlow(bases, levels, merges, class_cond=False)
        if autocast:
            self.to(memory_format=torch.channels_last)

    def log_prob(self, x: Tensor) -> Tensor:
        """nats, (B,)."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            return self.model.log_prob(
                x.contiguous(memory_format=torch.channels_last) if self.autocast else x, None
            )

    def sample(self, n: int) -> Tensor:
        with torch.autocast(
            next(self.parameters()).device.type, torch.bfloat16, enabled=self.autocast
        ):
            return self.model.sample(n)[0]
