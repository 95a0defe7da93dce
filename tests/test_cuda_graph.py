"""CUDA graphs without a GPU: what surrounds a capture. Captures are tested in test_gpu.py."""

import copy

import pytest
import torch
from test_density import RandomImages, density, make_trainer, tiny_flow
from test_scripts import mistake

from flows.conditioners import MLPConditioner
from flows.glow import Glow
from lightning_modules.class_conditional import ClassConditionalModule
from lightning_modules.cuda_graph import CudaGraph
from lightning_modules.precision import evaluation
from reproduce import experiment

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in (
        "does not have many workers",
        "LeafSpec.* is deprecated",
        "User provided device_type of 'cuda'",
    )
]


def captured(call, inputs, allow_unused_input):
    """torch.cuda.make_graphed_callables without a GPU: three trial runs, and the call itself.

    The trial runs move running statistics.
    """
    for _ in range(3):
        call(*inputs)
    return call


def test_a_capture_leaves_running_statistics_alone(monkeypatch):
    monkeypatch.setattr("torch.cuda.make_graphed_callables", captured)

    def state_after_training(graph):
        module = density(tiny_flow(), lr=1e-3)
        if graph:
            module.cuda_graph = CudaGraph(module.flow)
        keys = list(module.state_dict())
        make_trainer(max_steps=3).fit(module, datamodule=RandomImages())
        assert list(module.state_dict()) == keys
        return module.state_dict()

    plain = state_after_training(graph=False)
    replayed = state_after_training(graph=True)
    assert all(torch.equal(plain[key], replayed[key]) for key in plain)
    assert plain["flow.scales.0.layers.0.norm.num_batches_tracked"] == 3


def test_a_method_or_shape_that_was_not_captured_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.make_graphed_callables", captured)
    flow = tiny_flow()
    x = torch.rand(2, 3, 8, 8)
    graph = CudaGraph(flow)
    assert torch.equal(graph(flow.log_prob, x), flow.log_prob(x))
    for method, inputs in ((flow.forward, x), (flow.log_prob, x[:1])):
        with pytest.raises(RuntimeError, match="was captured for"):
            graph(method, inputs)
    copied = copy.deepcopy(graph)
    assert copied.flow is not flow
    copied(copied.flow.log_prob, x[:1])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("shapes differ")]
)
def test_other_errors_stay_what_they_are(error, monkeypatch):
    def failing(*arguments, **keywords):
        raise error

    monkeypatch.setattr("torch.cuda.make_graphed_callables", failing)
    flow = tiny_flow()
    with pytest.raises(type(error)) as raised:
        CudaGraph(flow)(flow.log_prob, torch.rand(2, 3, 8, 8))
    assert raised.value is error


def test_a_flow_that_cannot_be_captured_is_one_line(monkeypatch):
    def refused(*arguments, **keywords):
        raise RuntimeError(
            "CUDA error: operation not permitted when stream is capturing\nmore lines"
        )

    monkeypatch.setattr("torch.cuda.make_graphed_callables", refused)
    flow = tiny_flow()
    message = r"^RealNVP cannot be captured \(CUDA .* capturing\): add trainer.cuda_graph=false$"
    with pytest.raises(ValueError, match=message):
        CudaGraph(flow)(flow.log_prob, torch.rand(2, 3, 8, 8))


def test_a_class_conditional_step_is_captured_with_both_outputs(monkeypatch):
    torch.manual_seed(0)
    flow = Glow((3, 8, 8), 2, 1, 4, n_classes=3)
    monkeypatch.setattr("torch.cuda.make_graphed_callables", captured)
    module = density(flow, cls=ClassConditionalModule, name="adamax")
    module.log = lambda *arguments, **keywords: None
    x = torch.rand(4, 3, 8, 8)
    classes = torch.tensor([0, 1, 2, 0])
    plain = module.objective(x, classes)
    module.cuda_graph = CudaGraph(flow)
    for expected, value in zip(plain, module.objective(x, classes), strict=True):
        assert torch.equal(value, expected)


def test_evaluation_is_not_compiled():
    compiled = []
    network = MLPConditioner(2, 4)  # torch 2.11 does not compile a layer of its own by itself

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    network.compile(backend=backend)
    with evaluation("cpu"):
        network(torch.rand(3, 2))
    assert not compiled
    network(torch.rand(3, 2))
    assert len(compiled) == 1


def test_a_deterministic_run_does_not_benchmark_kernels(tmp_path):
    settings = [f"run_dir={tmp_path}", "preset=demo", "trainer.benchmark=true", "logger.name=none"]
    for deterministic in (False, True):
        overrides = [*settings, f"trainer.deterministic={deterministic}".lower()]
        config = experiment.load_config("reproduce/realnvp_cifar10.py", "", overrides)
        try:
            experiment.make_trainer(config, density(tiny_flow()))
            assert torch.backends.cudnn.benchmark is not deterministic
        finally:
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.benchmark = False


def test_a_graph_needs_a_gpu(tmp_path, capsys):
    line = mistake(capsys, f"run_dir={tmp_path}", "trainer.cuda_graph=true")
    assert line == "error: trainer.cuda_graph=true needs a GPU: give false"
