"""The contract of a flow (flows/base.py), checked on every flow there is; cases.py is the list."""

import importlib
import inspect
import pkgutil

import pytest
import torch
from cases import CASES, MODELS, flat, fresh, trained
from torch import Tensor

import flows
from flows.base import Flow, FlowModel

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_model = pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def random_latents(z, dtype=torch.float64):
    """Standard normal tensors of the shapes of z, a tensor or a tuple."""
    generator = torch.Generator().manual_seed(7)
    if isinstance(z, tuple):
        return tuple(torch.randn(level.shape, generator=generator, dtype=dtype) for level in z)
    return torch.randn(z.shape, generator=generator, dtype=dtype)


def concrete_flows() -> set[type[Flow]]:
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(flows.__path__, "flows.")]
    classes = {c for module in modules for c in vars(module).values() if inspect.isclass(c)}
    return {c for c in classes if issubclass(c, Flow) and not inspect.isabstract(c)}


def test_every_flow_has_a_case():
    missing = concrete_flows() - {type(case.make()) for case in CASES}
    assert not missing, f"tests/cases.py has no case for {sorted(c.__name__ for c in missing)}"
    assert len({case.name for case in CASES}) == len(CASES)


def test_cases_say_rightly_which_are_models():
    assert all(case.is_model == isinstance(case.make(), FlowModel) for case in CASES)


@pytest.mark.parametrize("flow_class", sorted(concrete_flows(), key=str), ids=lambda c: c.__name__)
def test_context_is_an_optional_second_argument(flow_class):
    for method in (flow_class.forward, flow_class.inverse):
        name, parameter = list(inspect.signature(method).parameters.items())[2]
        assert (name, parameter.default) == ("context", None)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shapes_and_dtypes(case, dtype):
    flow, x = trained(case, dtype), case.data(5, dtype)
    z, log_det = flow(x)
    back, inverse_log_det = flow.inverse(z)
    assert flat(z).shape == (5, x[0].numel())
    assert back.shape == x.shape
    for value in (log_det, inverse_log_det):
        assert value.shape == (5,)
    assert {flat(z).dtype, back.dtype, log_det.dtype, inverse_log_det.dtype} == {dtype}
    if case.is_model:
        assert flow.shape == case.shape
        assert isinstance(z, tuple)
        assert tuple(tuple(level.shape[1:]) for level in z) == flow.latent_shapes
        assert flow.log_prob(x).shape == (5,)
        assert flow.sample(3).shape == (3, *case.shape)
        assert flow.sample(3).dtype == dtype


@every_case
def test_round_trips(case):
    flow, x = trained(case, torch.float64), case.data(5, torch.float64)
    z, _ = flow(x)
    assert_close(flow.inverse(z)[0], x, 1e-9)
    z = random_latents(z)
    assert_close(flat(flow(flow.inverse(z)[0])[0]), flat(z), 1e-9)


@every_case
def test_log_det_is_that_of_autograd_s_jacobian(case):
    flow, x = trained(case, torch.float64), case.data(3, torch.float64).requires_grad_()
    z, log_det = flow(x)
    rows = [torch.autograd.grad(column.sum(), x, retain_graph=True)[0].flatten(1) for column in flat(z).unbind(1)]
    assert_close(log_det.detach(), torch.linalg.slogdet(torch.stack(rows, dim=1)).logabsdet, 1e-8)


@every_case
def test_log_det_of_the_inverse_is_the_negative(case):
    flow, x = trained(case, torch.float64), case.data(5, torch.float64)
    z, log_det = flow(x)
    assert_close(flow.inverse(z)[1], -log_det, 1e-8)
    z = random_latents(z)
    x, log_det = flow.inverse(z)
    assert_close(flow(x)[1], -log_det, 1e-8)


@every_case
def test_samples_do_not_affect_one_another_in_eval(case):
    flow, x = trained(case, torch.float64), case.data(5, torch.float64)
    z, log_det = flow(x)
    for i in range(5):
        z_alone, log_det_alone = flow(x[i : i + 1])
        assert_close(flat(z_alone)[0], flat(z)[i], 1e-10)
        assert_close(log_det_alone[0], log_det[i], 1e-10)
        latent = tuple(level[i : i + 1] for level in z) if case.is_model else z[i : i + 1]
        assert_close(flow.inverse(latent)[0][0], x[i], 1e-9)


@every_case
def test_eval_changes_no_state(case):
    flow, x = trained(case), case.data(5)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    flow.inverse(flow(x)[0])
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())


@pytest.mark.parametrize("case", [c for c in CASES if list(c.make().parameters())], ids=lambda case: case.name)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_parameter_gets_a_finite_gradient(case, mode):
    flow, x = trained(case, torch.float64).train(mode == "train"), case.data(16, torch.float64)
    z, log_det = flow(x)
    ((flat(z) * torch.linspace(-1, 1, x[0].numel())).sum() + flat(z).square().sum() + log_det.sum()).backward()
    gradients = {name: parameter.grad for name, parameter in flow.named_parameters()}
    assert not [name for name, gradient in gradients.items() if gradient is None]
    assert not [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    zero = {name for name, gradient in gradients.items() if gradient.abs().max() < 1e-9}
    if mode == "train":  # batch normalisation takes a constant away again, so the biases before it move nothing
        zero = {name for name in zero if not name.endswith("bias")}
    assert not zero


@every_case
def test_a_state_dict_carries_everything(case):
    flow, x = trained(case), case.data(5)
    other = fresh(case, seed=99).eval()
    if flow.state_dict():
        assert not torch.equal(flat(other(x)[0]), flat(flow(x)[0])), "trained() did not change this flow"
    other.load_state_dict(flow.state_dict())
    assert torch.equal(flat(other(x)[0]), flat(flow(x)[0]))
    assert torch.equal(other(x)[1], flow(x)[1])
    if case.is_model:
        assert torch.equal(other.log_prob(x), flow.log_prob(x))


@every_model
def test_log_prob_is_a_standard_normal_s_plus_log_det(case):
    flow, x = trained(case, torch.float64), case.data(5, torch.float64)
    latents, log_det = flow(x)
    normal = torch.distributions.Normal(*torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert_close(flow.log_prob(x), normal.log_prob(flat(latents)).sum(1) + log_det, 1e-9)


@every_model
def test_temperature_scales_the_base_sample(case):
    flow = trained(case, torch.float64)

    def latents(temperature, seed=3):
        return flat(flow(flow.sample(64, temperature, generator=torch.Generator().manual_seed(seed)))[0])

    assert_close(latents(0.7), 0.7 * latents(1.0), 1e-8)
    assert abs(latents(1.0).mean()) < 0.2
    assert abs(latents(1.0).std() - 1) < 0.15
    assert not torch.allclose(latents(1.0), latents(1.0, seed=4))


@every_model
def test_sampling_is_reproducible(case):
    flow = trained(case)
    one, two = (flow.sample(4, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one[0], one[1])


@every_model
def test_temperature_zero_is_deterministic(case):
    flow = trained(case)
    mode = flow.inverse(tuple(torch.zeros(1, *shape) for shape in flow.latent_shapes))[0]
    assert_close(flow.sample(3, temperature=0.0), mode.expand(3, *case.shape), 1e-6)
    assert torch.equal(flow.sample(3, temperature=0.0), flow.sample(3, temperature=0.0))


@every_model
def test_bf16_autocast(case):
    """The flow state and the log-determinant stay float32, and the density stays what it is but for rounding."""
    flow, x = trained(case), case.data(8)
    with torch.autocast("cpu", torch.bfloat16):
        latents, log_det = flow(x)
        log_prob = flow.log_prob(x)
        back, inverse_log_det = flow.inverse(latents)
    assert {v.dtype for v in (*latents, log_det, log_prob, back, inverse_log_det)} == {torch.float32}
    assert all(v.isfinite().all() for v in (*latents, log_det, log_prob, back, inverse_log_det))
    assert_close(log_prob / x[0].numel(), flow.log_prob(x) / x[0].numel(), 0.1)
    # Both ways see the same bfloat16 conditioner outputs, but where a last bit of float32 decides how one is rounded.
    assert (back - x).abs().quantile(0.99) < 1e-3
    assert_close(back, x, 5e-3)


@every_model
def test_a_wrong_shape_is_an_error_that_names_both(case):
    wrong = (*case.shape[:-1], case.shape[-1] + 2)
    with pytest.raises(ValueError, match="was built for data of shape") as error:
        fresh(case).log_prob(torch.rand(2, *wrong))
    assert str(case.shape) in str(error.value)
    assert str(wrong) in str(error.value)
