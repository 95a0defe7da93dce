"""What torch and others may do with a flow: transforms, graphs, empty memory, other formats."""

import pytest
import torch
from cases import CASES, flat, fresh, trained
from torch import Tensor
from torch.autograd import forward_ad

from flows import constants
from flows.base import FlowModel
from flows.caching import cached
from flows.glow import Glow
from flows.masks import FixedMask, checkerboard
from flows.realnvp import RealNVP

# 32 steps a level would take long, and are of the same kind as two.
SHORT_CASES = [case for case in CASES if case.name != "Glow-depth32"]
every_case = pytest.mark.parametrize("case", SHORT_CASES, ids=lambda case: case.name)
# A flow that calls autograd itself declares it; torch does not allow that within vmap or jvp.
every_transformable_case = pytest.mark.parametrize(
    "case",
    [case for case in SHORT_CASES if not getattr(case.build(), "needs_autograd", False)],
    ids=lambda case: case.name,
)
CLASSES = torch.tensor([2, 0])


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def by_name(name: str):
    return next(case for case in CASES if case.name == name)


# ---------------------------------------------------------------------- torch.func


@every_transformable_case
def test_vmap_over_single_data_gives_the_batch(case):
    flow = trained(case, torch.float64)
    x = case.data(3, torch.float64)
    conditions = case.conditions(3, torch.float64)

    def forward_of_one(x, *conditions):
        z, log_det = flow(x[None], *(value[None] for value in conditions))
        return flat(z)[0], log_det[0]

    z, log_det = flow(x, *conditions)
    z_of_each, log_det_of_each = torch.func.vmap(forward_of_one)(x, *conditions)
    assert_close(z_of_each, flat(z))
    assert_close(log_det_of_each, log_det)

    def inverse_of_one(latents, *conditions):
        levels = tuple(level[None] for level in latents)
        if not case.is_model:
            (levels,) = levels
        x, log_det = flow.inverse(levels, *conditions)
        return x[0], log_det[0]

    latents = z
    if not case.is_model:
        latents = (z,)
    rows = tuple(value[:, None] for value in conditions)
    back, log_det = torch.func.vmap(inverse_of_one)(latents, *rows)
    assert_close(back, x, 1e-8)
    assert_close(log_det, -log_det_of_each, 1e-8)


@every_transformable_case
def test_jvp_is_the_jacobian_times_the_tangent(case):
    """The Jacobian is that of autograd's backward pass, outside of any transform."""
    flow = trained(case, torch.float64)
    x = case.data(2, torch.float64)
    conditions = case.conditions(2, torch.float64)
    tangent = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)

    def forward(x):
        z, log_det = flow(x, *conditions)
        return torch.cat([flat(z), log_det[:, None]], dim=1)

    _, derivative = torch.func.jvp(forward, (x,), (tangent,))
    inputs = x.clone().requires_grad_()
    outputs = forward(inputs)
    rows = [
        torch.autograd.grad(column.sum(), inputs, retain_graph=True, materialize_grads=True)[0]
        for column in outputs.unbind(1)
    ]
    expected = torch.stack([(row * tangent).flatten(1).sum(1) for row in rows], dim=1)
    assert_close(derivative, expected, 1e-8)


class LogProb(torch.nn.Module):
    """log_prob as the forward pass of a module, which torch.func.functional_call needs."""

    def __init__(self, flow: FlowModel) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, *conditions: Tensor) -> Tensor:
        return self.flow.log_prob(x, *conditions)


@pytest.mark.parametrize("name", ["Glow", "Glow-classes", "RealNVP-2scales", "RealNVP2d"])
def test_gradients_of_each_datum_are_those_of_one_after_the_other(name):
    """In float32: torch's float64 convolution on a CPU refuses channels_last weights here."""
    case = by_name(name)
    model = LogProb(trained(case))
    x = case.data(3)
    conditions = case.conditions(3)
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def log_prob(parameters, *datum):
        rows = tuple(value[None] for value in datum)
        return torch.func.functional_call(model, parameters, rows).sum()

    over_data = (None,) + (0,) * (1 + len(conditions))
    gradients = torch.func.vmap(torch.func.grad(log_prob), over_data)(parameters, x, *conditions)
    for i in range(3):
        own = [value[i : i + 1] for value in (x, *conditions)]
        expected = torch.autograd.grad(
            model(*own).sum(), list(model.parameters()), materialize_grads=True
        )
        for key, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(gradients[key][i], gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_an_ensemble_of_glows_in_one_call(with_gradients):
    """vmap over the weights: each member gives what it gives by itself."""
    case = by_name("Glow")
    members = [LogProb(fresh(case, seed, torch.float64)) for seed in range(2)]
    x = case.data(2, torch.float64)
    parameters, buffers = torch.func.stack_module_state(members)

    def log_prob(parameters, buffers):
        return torch.func.functional_call(members[0], (parameters, buffers), (x,))

    with torch.set_grad_enabled(with_gradients):
        together = torch.func.vmap(log_prob)(parameters, buffers)
        assert_close(together, torch.stack([member(x) for member in members]))


@pytest.mark.parametrize("name", ["Glow", "Glow-classes", "RealNVP-2scales"])
def test_the_other_derivatives_of_torch_are_those_of_its_backward_pass(name):
    """Batched gradients, a Hessian by torch.func, and forward-mode AD without torch.func."""
    case = by_name(name)
    flow = trained(case, torch.float64)
    x = case.data(2, torch.float64)
    conditions = case.conditions(2, torch.float64)

    def log_prob(x):
        return flow.log_prob(x, *conditions)

    jacobian = torch.autograd.functional.jacobian(log_prob, x)
    assert_close(torch.autograd.functional.jacobian(log_prob, x, vectorize=True), jacobian, 1e-8)
    tangent = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
    with forward_ad.dual_level():
        derivative = forward_ad.unpack_dual(log_prob(forward_ad.make_dual(x, tangent))).tangent
    assert_close(derivative, (jacobian * tangent).flatten(1).sum(1), 1e-8)
    hessian = torch.autograd.functional.hessian(lambda x: log_prob(x).sum(), x)
    assert_close(torch.func.hessian(lambda x: log_prob(x).sum())(x), hessian, 1e-7)


def test_nothing_of_a_transform_stays_behind():
    """Neither in the constants of a size nor in what `cached` keeps."""
    case = by_name("Glow")
    flow = trained(case, torch.float64)
    x = case.data(2, torch.float64)
    tangent = torch.ones_like(x)
    constants._computed_once.cache_clear()
    with torch.no_grad(), cached(flow):
        _, first = torch.func.jvp(flow.log_prob, (x,), (tangent,))
        plain = flow.log_prob(x)
        _, second = torch.func.jvp(flow.log_prob, (x,), (tangent,))
    assert torch.equal(first, second)
    assert first.abs().min() > 0
    assert_close(plain, flow.log_prob(x))
    constants._computed_once.cache_clear()
    like = torch.empty(0)

    def board(x):
        constants.constant(checkerboard, 3, 5, 0, like=like)
        return x.sum()

    torch.func.grad(board)(torch.ones(2))
    kept = constants.constant(checkerboard, 3, 5, 0, like=like)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(kept)


def test_recomputation_makes_way_for_a_transform():
    flow = trained(by_name("RealNVP-2scales"), torch.float64)
    x = by_name("RealNVP-2scales").data(2, torch.float64)
    expected = torch.func.grad(lambda x: flow.log_prob(x).sum())(x)
    for module in flow.modules():
        if hasattr(module, "recompute"):
            module.recompute = True
    assert torch.equal(torch.func.grad(lambda x: flow.log_prob(x).sum())(x), expected)


# ---------------------------------------------------------------------- graphs


def glow_and_data() -> tuple[Glow, tuple[Tensor, ...]]:
    flow = trained(by_name("Glow-classes"))
    return flow, (by_name("Glow-classes").data(2), CLASSES)


def assert_same_outputs(actual, expected) -> None:
    assert torch.equal(flat(actual[0]), flat(expected[0]))
    assert torch.equal(actual[1], expected[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore::torch.jit.TracerWarning")
def test_a_glow_is_traced_and_saved_without_gradients(tmp_path):
    flow, inputs = glow_and_data()
    with torch.no_grad():
        traced = torch.jit.trace(flow, inputs)
        expected = flow(*inputs)
    assert_same_outputs(traced(*inputs), expected)
    torch.jit.save(traced, tmp_path / "glow.pt")
    assert_same_outputs(torch.jit.load(tmp_path / "glow.pt")(*inputs), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore::torch.jit.TracerWarning")
def test_a_glow_that_is_traced_with_gradients_is_one_line():
    flow, inputs = glow_and_data()
    with pytest.raises(RuntimeError, match=r"^torch\.jit\.trace can trace a Glow only") as error:
        torch.jit.trace(flow, inputs)
    assert "\n" not in str(error.value)


def test_a_glow_is_exported():
    flow, inputs = glow_and_data()
    program = torch.export.export(flow, inputs)
    assert_same_outputs(program.module()(*inputs), flow(*inputs))


# ---------------------------------------------------------------------- memory and files


def nines(tensor: Tensor, **options) -> Tensor:
    return torch.full_like(tensor, 9, **options)


@every_case
def test_a_flow_built_without_memory_takes_its_weights_from_a_state_dict(case, monkeypatch):
    """On the meta device; `to_empty` then gives memory whose contents are arbitrary: here nines."""
    flow = trained(case)
    with torch.device("meta"):
        other = case.build().eval()
    if any(isinstance(m, FixedMask) and m.values is None for m in other.modules()):
        with pytest.raises(RuntimeError, match="build the mask on the CPU") as error:
            other.to_empty(device="cpu")
        assert "\n" not in str(error.value)
        return
    with monkeypatch.context() as memory:
        memory.setattr(torch, "empty_like", nines)
        other.to_empty(device="cpu")
    other.load_state_dict(flow.state_dict())
    x = case.data(3)
    conditions = case.conditions(3)
    assert_same_outputs(other(x, *conditions), flow(x, *conditions))


@every_case
def test_empty_memory_is_filled_again_where_the_state_dict_does_not_do_it(case, monkeypatch):
    flow = trained(case)
    other = trained(case)
    with monkeypatch.context() as memory:
        memory.setattr(torch, "empty_like", nines)
        other.to_empty(device="cpu")
    other.load_state_dict(flow.state_dict())
    fixed = {name: value for name, value in flow.named_buffers() if name not in flow.state_dict()}
    for name, value in fixed.items():
        assert torch.equal(other.get_buffer(name), value), name


@every_case
def test_safetensors_saves_and_loads_a_flow(case, tmp_path):
    """By save_model and load_model; save_file refuses weights that are channels_last."""
    safetensors = pytest.importorskip("safetensors.torch")
    flow = trained(case)
    other = fresh(case, seed=99).eval()
    strides = {name: value.stride() for name, value in other.state_dict().items()}
    safetensors.save_model(flow, str(tmp_path / "flow.safetensors"))
    safetensors.load_model(other, str(tmp_path / "flow.safetensors"))
    x = case.data(3)
    conditions = case.conditions(3)
    assert_same_outputs(other(x, *conditions), flow(x, *conditions))
    assert {name: value.stride() for name, value in other.state_dict().items()} == strides


def test_safetensors_loads_the_tensors_of_a_state_dict_that_are_made_contiguous(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    flow = trained(by_name("RealNVP-2scales"))
    state = {name: value.contiguous() for name, value in flow.state_dict().items()}
    safetensors.save_file(state, str(tmp_path / "flow.safetensors"))
    other = fresh(by_name("RealNVP-2scales"), seed=99).eval()
    other.load_state_dict(safetensors.load_file(str(tmp_path / "flow.safetensors")))
    x = by_name("RealNVP-2scales").data(3)
    assert torch.equal(other.log_prob(x), flow.log_prob(x))
    assert isinstance(other, RealNVP)
