"""float32, bf16 and compiled networks against float64 on the CPU, and on a GPU if there is one."""

import copy

import pytest
import torch

from flows.glow import Glow
from flows.likelihood import bits_per_dim
from flows.realnvp import RealNVP
from lightning_modules.precision import full_float32

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])]


@pytest.fixture(scope="module", params=["RealNVP", "Glow"])
def trained(request):
    """A small flow after 30 steps on smooth images, in eval mode, and 128 images."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    if request.param == "Glow":
        flow = Glow((3, 16, 16), n_levels=2, depth=4, hidden_channels=8)
    else:
        flow = RealNVP((3, 16, 16), n_scales=2, hidden_channels=8, n_blocks=2)
    small = torch.rand(128, 3, 4, 4, generator=generator)
    x = torch.nn.functional.interpolate(small, scale_factor=4, mode="bilinear").clamp(0.001, 0.999)
    with torch.no_grad():
        flow.initialize(x)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 100)
        optimizer.step()
    return flow.eval(), x


def bpd(flow, x):
    return bits_per_dim(flow.log_prob(x), x[0].numel(), 8).double().cpu()


@pytest.mark.parametrize("device", DEVICES)
def test_float32_and_bf16_agree_with_float64(trained, device):
    flow, x = trained
    with torch.no_grad():
        exact = bpd(copy.deepcopy(flow).double(), x.double())
        on_device = copy.deepcopy(flow).to(device)
        with full_float32(device):
            single = bpd(on_device, x.to(device))
        with torch.autocast(device, torch.bfloat16):
            half = bpd(on_device, x.to(device))
    assert exact.mean() < 7.5  # training has lowered it
    assert (single - exact).abs().max() < 2e-5
    assert (single - exact).mean().abs() < 1e-6
    assert 1e-6 < (half - exact).abs().max() < 0.05  # so bf16 was used
    assert (half - exact).mean().abs() < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_flow_agrees_and_keeps_its_keys(trained, device):
    flow, x = trained
    flow = copy.deepcopy(flow).to(device)
    x = x.to(device)
    keys = list(flow.state_dict())
    torch._dynamo.reset()
    with torch.no_grad(), full_float32(device):
        eager = bpd(flow, x)
        flow.compile()
        assert (bpd(flow, x) - eager).abs().max() < 2e-5
    assert list(flow.state_dict()) == keys
