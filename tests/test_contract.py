"""The contract of a flow (flows/base.py), for all flows of cases.py."""

import dataclasses
import importlib
import inspect
import pkgutil

import pytest
import torch
from cases import CASES, MODELS, flat, fresh, trained
from torch import Tensor

import flows
from flows.base import Bijection, FlowModel
from flows.bases import StandardLogistic, StandardNormal
from flows.context import repeated

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_conditional_case = pytest.mark.parametrize(
    "case", [case for case in CASES if case.context is not None], ids=lambda case: case.name
)
every_model = pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def random_latents(z, dtype=torch.float64):
    """Standard normal tensors of the shapes of z, a tensor or a tuple."""
    generator = torch.Generator().manual_seed(7)
    if isinstance(z, tuple):
        return tuple(torch.randn(level.shape, generator=generator, dtype=dtype) for level in z)
    return torch.randn(z.shape, generator=generator, dtype=dtype)


def shape_for(flow, case):
    """The `shape` that `sample` needs: that of the case, for a flow of any size."""
    return case.shape if None in flow.shape else None


def samples_of(flow, case, n, temperature=1.0, seed=None):
    """n samples, (n, *shape); those of a conditional flow have the same context."""
    generator = None
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
    shape = shape_for(flow, case)
    if case.context is None:
        return flow.sample(n, temperature, shape=shape, generator=generator)
    context = case.conditions(1, next(flow.parameters()).dtype)[0]
    return flow.sample(n, temperature, context, shape=shape, generator=generator)[:, 0]


# Each base distribution in terms of torch's own distributions.
BASES = {
    StandardNormal: lambda: torch.distributions.Normal(
        *torch.tensor([0.0, 1.0], dtype=torch.float64)
    ),
    StandardLogistic: lambda: torch.distributions.TransformedDistribution(
        torch.distributions.Uniform(*torch.tensor([0.0, 1.0], dtype=torch.float64)),
        [torch.distributions.transforms.SigmoidTransform().inv],
    ),
}


def concrete_flows() -> set[type[Bijection]]:
    modules = [
        importlib.import_module(m.name) for m in pkgutil.walk_packages(flows.__path__, "flows.")
    ]
    classes = {c for module in modules for c in vars(module).values() if inspect.isclass(c)}
    return {c for c in classes if issubclass(c, Bijection) and not inspect.isabstract(c)}


def test_every_flow_has_a_case():
    missing = concrete_flows() - {type(case.build()) for case in CASES}
    assert not missing, f"tests/cases.py has no case for {sorted(c.__name__ for c in missing)}"
    assert len({case.name for case in CASES}) == len(CASES)


def test_a_case_knows_whether_it_is_a_model():
    assert all(case.is_model == isinstance(case.build(), FlowModel) for case in CASES)


@pytest.mark.parametrize("flow_class", sorted(concrete_flows(), key=str), ids=lambda c: c.__name__)
def test_context_is_an_optional_second_argument(flow_class):
    for method in (flow_class.forward, flow_class.inverse):
        name, parameter = list(inspect.signature(method).parameters.items())[2]
        assert (name, parameter.default) == ("context", None)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shapes_and_dtypes(case, dtype):
    flow = trained(case, dtype)
    x = case.data(5, dtype)
    conditions = case.conditions(5, dtype)
    z, log_det = flow(x, *conditions)
    back, inverse_log_det = flow.inverse(z, *conditions)
    assert flat(z).shape == (5, x[0].numel())
    assert back.shape == x.shape
    for value in (log_det, inverse_log_det):
        assert value.shape == (5,)
    assert {flat(z).dtype, back.dtype, log_det.dtype, inverse_log_det.dtype} == {dtype}
    if case.is_model:
        assert len(flow.shape) == len(case.shape)
        assert all(own in (None, side) for own, side in zip(flow.shape, case.shape, strict=True))
        assert isinstance(z, tuple)
        assert tuple(tuple(level.shape[1:]) for level in z) == flow.latent_shapes(case.shape)
        assert flow.log_prob(x, *conditions).shape == (5,)
        samples = samples_of(flow, case, 3)
        assert samples.shape == (3, *case.shape)
        assert samples.dtype == dtype


@every_case
def test_round_trips(case):
    flow = trained(case, torch.float64)
    x = case.data(5, torch.float64)
    conditions = case.conditions(5, torch.float64)
    z, _ = flow(x, *conditions)
    assert_close(flow.inverse(z, *conditions)[0], x, case.tolerance)
    z = random_latents(z)
    x, _ = flow.inverse(z, *conditions)
    assert_close(flat(flow(x, *conditions)[0]), flat(z), case.tolerance)


def log_dets_of_flow_and_autograd(flow, x, *conditions):
    """The flow's log-determinant, and that of the Jacobian by autograd, (B,) each."""
    x = x.clone().requires_grad_()
    z, log_det = flow(x, *conditions)
    rows = [
        torch.autograd.grad(column.sum(), x, retain_graph=True)[0].flatten(1)
        for column in flat(z).unbind(1)
    ]
    return log_det.detach(), torch.linalg.slogdet(torch.stack(rows, dim=1)).logabsdet


@every_case
def test_log_det_is_that_of_autograd_s_jacobian(case):
    """For a given context. An estimate equals it on average, within five standard errors."""
    flow = trained(case, torch.float64)
    x = case.data(3, torch.float64)
    context, *noise = case.conditions(3, torch.float64) or (None,)
    log_det, jacobian_log_det = log_dets_of_flow_and_autograd(flow, x, context, *noise)
    if not noise:
        assert_close(log_det, jacobian_log_det, case.tolerance)
        return
    n = 1000
    if context is not None:
        context = repeated(context, n)
    _, many_noises = case.conditions(3 * n, torch.float64)
    _, estimates = flow(repeated(x, n), context, many_noises)
    estimates = estimates.detach().unflatten(0, (n, 3))
    error = estimates.std(0) / n**0.5
    assert error.max() > 0
    assert ((estimates.mean(0) - jacobian_log_det).abs() < 5 * error + case.tolerance).all()


@every_case
def test_log_det_of_the_inverse_is_the_negative(case):
    """Also where it is an estimate, for the same noise."""
    flow = trained(case, torch.float64)
    x = case.data(5, torch.float64)
    conditions = case.conditions(5, torch.float64)
    z, log_det = flow(x, *conditions)
    assert_close(flow.inverse(z, *conditions)[1], -log_det, case.tolerance)
    z = random_latents(z)
    x, log_det = flow.inverse(z, *conditions)
    assert_close(flow(x, *conditions)[1], -log_det, case.tolerance)


def row_of(value, i):
    """Row i, as a batch of one, of a tensor, of each tensor of a tuple, or of None."""
    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(level[i : i + 1] for level in value)
    return value[i : i + 1]


@every_case
def test_samples_do_not_affect_one_another_in_eval(case):
    flow = trained(case, torch.float64)
    x = case.data(5, torch.float64)
    conditions = case.conditions(5, torch.float64)
    z, log_det = flow(x, *conditions)
    for i in range(5):
        own = tuple(row_of(value, i) for value in conditions)
        z_alone, log_det_alone = flow(x[i : i + 1], *own)
        assert_close(flat(z_alone)[0], flat(z)[i], 1e-10)
        assert_close(log_det_alone[0], log_det[i], 1e-10)
        assert_close(flow.inverse(row_of(z, i), *own)[0][0], x[i], case.tolerance)


@every_conditional_case
def test_the_context_changes_the_output(case):
    """Each row depends on its own context alone, in both directions."""
    flow = trained(case, torch.float64)
    x = case.data(5, torch.float64)
    conditions, others = (case.conditions(5, torch.float64, seed) for seed in (0, 1))
    changed = (conditions[0] != others[0]).view(5, -1).any(1)
    assert changed.any()
    z, log_det = flow(x, *conditions)
    other_z, other_log_det = flow(x, *others)
    differs = (flat(z) - flat(other_z)).abs().amax(1) > 1e-6
    assert torch.equal(differs, changed)
    assert ((log_det - other_log_det).abs() > 1e-9).any()
    back = flow.inverse(z, *others)[0]
    assert torch.equal((back - x).flatten(1).abs().amax(1) > 1e-6, changed)


@every_conditional_case
def test_a_context_is_encoded_once_and_samples_are_those_of_its_own(case):
    """Row b of sample i is the inverse of base sample i B + b, given context b."""
    if not case.is_model:
        pytest.skip("a layer takes a context that is encoded")
    flow = trained(case, torch.float64)
    (context, *_) = case.conditions(2, torch.float64)
    encodings = []
    if flow.context_encoder is not None:
        flow.context_encoder.register_forward_hook(lambda *call: encodings.append(call))
    shape = shape_for(flow, case)
    samples = flow.sample(3, 0.8, context, shape=shape, generator=torch.Generator().manual_seed(4))
    assert len(encodings) == (flow.context_encoder is not None)
    assert samples.shape == (3, 2, *case.shape)
    generator = torch.Generator().manual_seed(4)
    shapes = flow.latent_shapes(case.shape)
    like = torch.empty(0, dtype=torch.float64)
    latents = flow.base.sample(6, shapes, 0.8, generator, like)
    for i in range(3):
        for b in range(2):
            own = tuple(level[2 * i + b][None] for level in latents)
            assert_close(samples[i, b], flow.inverse(own, context[b : b + 1])[0][0], 1e-9)
    encoded = flow.encode_context(context)
    x = case.data(2, torch.float64)
    assert_close(flow.log_prob(x, encoded), flow.log_prob(x, context), 1e-10)


@every_case
def test_eval_changes_no_state(case):
    flow = trained(case)
    x = case.data(5)
    conditions = case.conditions(5)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    flow.inverse(flow(x, *conditions)[0], *conditions)
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())


@pytest.mark.parametrize(
    "case", [c for c in CASES if list(c.build().parameters())], ids=lambda case: case.name
)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_parameter_gets_a_finite_gradient(case, mode):
    flow = trained(case, torch.float64).train(mode == "train")
    x = case.data(16, torch.float64)
    z, log_det = flow(x, *case.conditions(16, torch.float64))
    weighted = (flat(z) * torch.linspace(-1, 1, x[0].numel())).sum()
    (weighted + flat(z).square().sum() + log_det.sum()).backward()
    # Glow's classifier is no part of the bijection: `log_prob_and_class_logits` alone calls it.
    gradients = {
        name: parameter.grad
        for name, parameter in flow.named_parameters()
        if not name.startswith("classifier.")
    }
    assert not [name for name, gradient in gradients.items() if gradient is None]
    assert not [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    zero = {name for name, gradient in gradients.items() if gradient.abs().max() < 1e-9}
    if mode == "train":
        # Batch normalisation subtracts a constant again, so the biases before it have no effect.
        zero = {name for name in zero if not name.endswith("bias")}
    assert not zero


@every_case
def test_a_state_dict_carries_everything(case):
    flow = trained(case)
    x = case.data(5)
    conditions = case.conditions(5)
    other = fresh(case, seed=99).eval()
    if flow.state_dict():
        before = flat(other(x, *conditions)[0])
        changed = not torch.equal(before, flat(flow(x, *conditions)[0]))
        assert changed, "trained() did not change this flow"
    other.load_state_dict(flow.state_dict())
    assert torch.equal(flat(other(x, *conditions)[0]), flat(flow(x, *conditions)[0]))
    assert torch.equal(other(x, *conditions)[1], flow(x, *conditions)[1])
    if case.is_model:
        assert torch.equal(other.log_prob(x, *conditions), flow.log_prob(x, *conditions))


@every_model
def test_log_prob_is_that_of_the_base_plus_log_det(case):
    flow = trained(case, torch.float64)
    x = case.data(5, torch.float64)
    conditions = case.conditions(5, torch.float64)
    latents, log_det = flow(x, *conditions)
    base = BASES[type(flow.base)]()
    assert_close(flow.log_prob(x, *conditions), base.log_prob(flat(latents)).sum(1) + log_det, 1e-9)


@every_model
def test_temperature_scales_the_base_sample(case):
    flow = trained(case, torch.float64)
    context, *noise = case.conditions(1) or (None,)
    noise = [repeated(value, 64) for value in noise]
    if context is not None:
        context = repeated(context, 64)
    if context is not None and context.is_floating_point():
        context = context.double()

    def latents(temperature, seed=3):
        return flat(flow(samples_of(flow, case, 64, temperature, seed), context, *noise)[0])

    assert_close(latents(0.7), 0.7 * latents(1.0), 10 * case.tolerance)
    standard = BASES[type(flow.base)]().sample((100_000,))
    assert abs(latents(1.0).mean() / standard.std()) < 0.2
    assert abs(latents(1.0).std() / standard.std() - 1) < 0.15
    assert not torch.allclose(latents(1.0), latents(1.0, seed=4))


@every_model
def test_sampling_is_reproducible(case):
    flow = trained(case)
    one, two = (samples_of(flow, case, 4, seed=3) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one[0], one[1])


@every_model
def test_temperature_zero_is_deterministic(case):
    flow = trained(case)
    zeros = tuple(torch.zeros(1, *shape) for shape in flow.latent_shapes(case.shape))
    mode = flow.inverse(zeros, *case.conditions(1))[0]
    assert_close(samples_of(flow, case, 3, temperature=0.0), mode.expand(3, *case.shape), 1e-6)
    assert torch.equal(
        samples_of(flow, case, 3, temperature=0.0), samples_of(flow, case, 3, temperature=0.0)
    )


@every_model
def test_bf16_autocast(case):
    """The flow's state and log-determinant stay float32, and the density differs by rounding."""
    flow = trained(case)
    x = case.data(8)
    conditions = case.conditions(8)
    with torch.autocast("cpu", torch.bfloat16):
        latents, log_det = flow(x, *conditions)
        log_prob = flow.log_prob(x, *conditions)
        back, inverse_log_det = flow.inverse(latents, *conditions)
    values = (*latents, log_det, log_prob, back, inverse_log_det)
    assert {value.dtype for value in values} == {torch.float32}
    assert all(value.isfinite().all() for value in values)
    assert_close(log_prob / x[0].numel(), flow.log_prob(x, *conditions) / x[0].numel(), 0.1)
    # Both directions compute the same bfloat16 outputs of networks, except where the last bit of a
    # float32 number decides how it is rounded.
    assert (back - x).abs().quantile(0.99) < 1e-3
    assert_close(back, x, 5e-3)


@every_model
def test_a_wrong_shape_is_an_error_that_names_both(case):
    flow = fresh(case)
    wrong = (case.shape[0] + 1, *case.shape[1:])
    with pytest.raises(ValueError, match="was built for data of shape") as error:
        flow.log_prob(torch.rand(2, *wrong), *case.conditions(2))
    assert str(flow.shape).replace("None", "any") in str(error.value)
    assert str(wrong) in str(error.value)
    if None not in flow.shape:
        wider = (*case.shape[:-1], case.shape[-1] + 2)
        with pytest.raises(ValueError, match="was built for data of shape"):
            flow.log_prob(torch.rand(2, *wider), *case.conditions(2))


@pytest.mark.parametrize(
    "case", [c for c in MODELS if None in c.build().shape], ids=lambda case: case.name
)
def test_a_flow_of_any_size_is_the_same_map_on_other_sizes(case):
    """With the same weights it is invertible, and its log_det is autograd's."""
    flow = trained(case, torch.float64)
    for size in ((8, 4), (4, 12)):
        other = dataclasses.replace(case, shape=(case.shape[0], *size))
        x = other.data(2, torch.float64)
        conditions = other.conditions(2, torch.float64)
        assert_close(flow.inverse(flow(x, *conditions)[0], *conditions)[0], x, case.tolerance)
        assert samples_of(flow, other, 2).shape == (2, *other.shape)
        assert_close(*log_dets_of_flow_and_autograd(flow, x, *conditions), case.tolerance)
    odd = torch.rand(1, case.shape[0], 5, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="odd sizes"):
        flow.log_prob(odd, *case.conditions(1, torch.float64))
    if case.context is None:
        with pytest.raises(ValueError, match="models data of any size: give sample"):
            flow.sample(2)


@every_model
def test_a_context_or_noise_that_is_missing_or_not_asked_for_is_one_line(case):
    flow = fresh(case)
    x = case.data(2)
    messages = []
    if flow.conditioned_on is None:
        message = "is not conditioned on anything: leave the context out"
        with pytest.raises(ValueError, match=message) as error:
            flow(x, torch.zeros(2, dtype=torch.int64))
        messages.append(str(error.value))
    else:
        for wrong in (None, 3, [0, 1], torch.zeros(2, 1, dtype=torch.int32)):
            with pytest.raises(ValueError, match=f"this {type(flow).__name__} is ") as error:
                flow(x, wrong)
            messages.append(str(error.value))
    context, *noise = case.conditions(2) or (None,)
    if noise:
        with pytest.raises(ValueError, match=r"is an estimate: give noise \(B, ") as error:
            flow.log_prob(x, context)
    else:
        with pytest.raises(ValueError, match="is exact: leave the noise out") as error:
            flow.log_prob(x, context, torch.rand(2, 3))
    messages.append(str(error.value))
    assert not [message for message in messages if "\n" in message]


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_a_base_is_its_distribution(base):
    reference = BASES[base]()
    z = torch.linspace(-8, 8, 33, dtype=torch.float64).view(1, 33)
    assert_close(
        base().log_prob((z, z[:, :3])),
        reference.log_prob(z).sum(1) + reference.log_prob(z[:, :3]).sum(1),
        1e-9,
    )
    like = torch.empty(0, dtype=torch.float64)
    [samples] = base().sample(40_000, ((1,),), 0.5, torch.Generator().manual_seed(0), like)
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    shares = [(samples < 0.5 * reference.icdf(q)).double().mean() for q in quantiles]
    assert_close(torch.stack(shares), quantiles, 0.01)


def test_a_logistic_sample_is_finite_where_the_generator_gives_0(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **kind: torch.zeros(3))
    [samples] = StandardLogistic().sample(3, ((),), 1.0, torch.Generator(), torch.empty(0))
    assert samples.isfinite().all()
    assert (samples < -15).all()


@pytest.mark.parametrize(
    "case", [case for case in MODELS if case.iterations], ids=lambda case: case.name
)
def test_fewer_iterations_are_further_off(case):
    """With one iteration the round trip is outside of the case's tolerance."""
    flow = trained(case, torch.float64)
    x = case.data(5, torch.float64)
    few = case.make(n_iterations=1).double().eval()
    few.load_state_dict(flow.state_dict())
    conditions = case.conditions(5, torch.float64)

    def error(flow):
        z, _ = flow(x, *conditions)
        return (flow.inverse(z, *conditions)[0] - x).abs().max()

    assert error(flow) < case.tolerance
    assert error(few) > 100 * case.tolerance
