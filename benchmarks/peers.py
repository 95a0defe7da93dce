"""Flows of other packages, built at the size of ours."""

import torch
from torch import Tensor, nn


class NormflowsGlow(nn.Module):
    """normflows' Glow (Stimper et al. 2023), built as in its example.

    It has affine couplings with sigmoid scales, LU-decomposed 1x1 convolutions and Gaussian bases.
    It computes a little less than ours: its coupling network has neither actnorms nor the border
    channel, and its priors have no networks.

    autocast: use channels_last, and run log_prob and sample under bf16 autocast.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        n_levels: int,
        depth: int,
        hidden_channels: int,
        autocast: bool = False,
    ) -> None:
        super().__init__()
        import normflows as nf

        channels, height, width = shape
        self.autocast = autocast
        bases = []
        levels = []
        merges = []
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
            latent_channels = c
            if i > 0:
                latent_channels = c // 2
                merges.append(nf.flows.Merge())
            latent_shape = (latent_channels, height // factor, width // factor)
            bases.append(nf.distributions.DiagGaussian(latent_shape))
        self.model = nf.MultiscaleFlow(bases, levels, merges, class_cond=False)
        if autocast:
            self.to(memory_format=torch.channels_last)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (B,), of x, (B, *shape)."""
        if self.autocast:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            return self.model.log_prob(x, None)

    def sample(self, n: int) -> Tensor:
        """n images, (n, *shape)."""
        device = next(self.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            return self.model.sample(n)[0]
