"""What surrounds a capture. Captures themselves are in test_gpu.py."""

import pytest
import torch
from test_density import RandomImages, density, make_trainer, tiny_flow
from test_scripts import mistake

from lightning_modules.cuda_graph import CudaGraph

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("does not have many workers", "LeafSpec.* is deprecated", "User provided device_type of 'cuda'")
]


def captured(call, inputs, allow_unused_input):
    """As torch's: three trial runs, which move running statistics."""
    for _ in range(3):
        call(*inputs)
    return call


def test_a_capture_leaves_running_statistics_alone(monkeypatch):
    monkeypatch.setattr("torch.cuda.make_graphed_callables", captured)

    def trained(graph):
        module = density(tiny_flow(), lr=1e-3)
        module.cuda_graph = CudaGraph(module.flow) if graph else None
        keys = list(module.state_dict())
        make_trainer(max_steps=3).fit(module, datamodule=RandomImages())
        assert list(module.state_dict()) == keys
        return module.state_dict()

    a, b = trained(False), trained(True)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert a["flow.scales.0.layers.0.norm.num_batches_tracked"] == 3


def test_what_cannot_be_captured_is_said(monkeypatch):
    def refused(*arguments, **keywords):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr("torch.cuda.make_graphed_callables", refused)
    flow = tiny_flow()
    with pytest.raises(
        ValueError, match=r"^RealNVP cannot be captured \(CUDA .* capturing\): add trainer.cuda_graph=false$"
    ):
        CudaGraph(flow)(flow.log_prob, torch.rand(2, 3, 8, 8))


def test_a_graph_needs_a_gpu(tmp_path, capsys):
    line = mistake(capsys, f"run_dir={tmp_path}", "trainer.cuda_graph=true")
    assert line == "error: trainer.cuda_graph=true needs a GPU: give false"
