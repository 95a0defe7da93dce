"""The contract of a flow (flows/base.py), for all flows of cases.py."""

import copy
import dataclasses
import importlib
import inspect
import pkgutil
import warnings

import pytest
import torch
from cases import CASES, MODELS, flat, fresh, trained
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flows
from flows.base import Bijection, FlowModel, UninitializedWarning
from flows.bases import StandardLogistic, StandardNormal
from flows.context import repeated
from flows.linear import ChannelPermutation
from flows.normalization import ActNorm, CouplingBatchNorm, uninitialized

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_conditional_case = pytest.mark.parametrize(
    "case", [case for case in CASES if case.context is not None], ids=lambda case: case.name
)
every_model = pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
# Messages do not depend on the depth, and 32 steps a level would take long.
every_shallow_model = pytest.mark.parametrize(
    "case", [case for case in MODELS if case.name != "Glow-depth32"], ids=lambda case: case.name
)


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


def row_of(value, rows):
    """Row number `rows`, as a batch of one, of a tensor, of each tensor of a tuple, or of None.

    A slice of `rows` gives these rows.
    """
    if value is None:
        return None
    if isinstance(rows, int):
        rows = slice(rows, rows + 1)
    if isinstance(value, tuple):
        return tuple(level[rows] for level in value)
    return value[rows]


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
    for size in ((8, 8), (16, 8)):
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
    flow = fresh(case).eval()
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


def only_line(error) -> str:
    """The message of an error, which has to be one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


@every_case
def test_an_empty_batch_gives_empty_outputs(case):
    flow = trained(case)
    x = case.data(2)
    conditions = case.conditions(2)
    z, _ = flow(x, *conditions)
    none = tuple(row_of(value, slice(0)) for value in conditions)
    empty, log_det = flow(x[:0], *none)
    assert flat(empty).shape == (0, flat(z).shape[1])
    back, inverse_log_det = flow.inverse(row_of(z, slice(0)), *none)
    assert back.shape == (0, *case.shape)
    assert log_det.shape == inverse_log_det.shape == (0,)
    if case.is_model:
        assert flow.log_prob(x[:0], *none).shape == (0,)
        assert samples_of(flow, case, 0).shape == (0, *case.shape)
        assert tuple(level.shape[1:] for level in empty) == flow.latent_shapes(case.shape)


@every_case
def test_training_with_an_empty_batch_changes_nothing_or_is_one_line(case):
    flow = trained(case).train()
    before = copy.deepcopy(flow.state_dict())
    none = tuple(row_of(value, slice(0)) for value in case.conditions(2))
    x = case.data(2)[:0].requires_grad_()
    if any(isinstance(module, CouplingBatchNorm) for module in flow.modules()):
        with pytest.raises(ValueError, match="an empty batch has no mean"):
            flow(x, *none)
    else:
        z, log_det = flow(x, *none)
        loss = flat(z).sum() + log_det.sum()
        loss.backward()
        assert loss.item() == 0
    for name, value in flow.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            assert torch.equal(value, before[name])


@every_shallow_model
@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda x: (255 * x).to(torch.uint8), "takes real numbers as data, not torch.uint8"),
        (Tensor.long, "takes real numbers as data, not torch.int64"),
        (Tensor.double, "are torch.float32, but the data torch.float64: convert one of them"),
        (Tensor.half, "are torch.float32, but the data torch.float16: convert one of them"),
        (Tensor.numpy, "takes a torch.Tensor as data, not ndarray"),
    ],
)
def test_data_of_another_dtype_are_one_line(case, convert, message):
    flow = trained(case)
    conditions = case.conditions(2)
    for method in (flow.log_prob, flow):
        with pytest.raises(ValueError, match=message) as error:
            method(convert(case.data(2)), *conditions)
        line = only_line(error)
        assert type(flow).__name__ in line
        integers = "real numbers" in line
        assert ("(q + u) / 2^n" in line) == (integers and flow.unit_interval)


@every_shallow_model
def test_latents_of_another_form_are_one_line(case):
    flow = trained(case)
    conditions = case.conditions(3)
    z, _ = flow(case.data(3), *conditions)
    n = "1 tensor" if len(z) == 1 else f"{len(z)} tensors"
    request = f"{type(flow).__name__} takes a tuple of {n} as latents, one for each level"
    wrong = {
        f"{request}, not one Tensor": z[0],
        f"{request}, not {len(z) + 1}": (*z, z[0]),
        f"{request}, with as many rows": (*z[:-1], z[-1][:2]),
        f"{request}, of shapes ": (*z[:-1], z[-1].repeat_interleave(3, dim=1)),
        "takes real numbers as latents, not torch.int64": tuple(level.long() for level in z),
        "are torch.float32, but the latents torch.float64": tuple(level.double() for level in z),
    }
    if len(z) == 1:
        del wrong[f"{request}, with as many rows"]
    if None in flow.shape and len(z) > 1:
        wrong[f"{request}, of shapes .*any"] = (*z[:-1], torch.cat([z[-1], z[-1]], dim=-1))
    for message, latents in wrong.items():
        with pytest.raises(ValueError, match=message) as error:
            flow.inverse(latents, *conditions)
        only_line(error)
    assert torch.equal(flow.inverse(list(z), *conditions)[0], flow.inverse(z, *conditions)[0])


@every_conditional_case
def test_a_context_has_one_row_for_each_datum_in_both_directions(case):
    """The row of one would otherwise be taken for all."""
    if not case.is_model:
        pytest.skip("a layer takes a context that is encoded")
    flow = trained(case)
    x = case.data(3)
    (context, *_) = case.conditions(3)
    z, _ = flow(x, context)
    for method, value in ((flow, x), (flow.inverse, z), (flow.log_prob, x)):
        for one in (context[:1], flow.encode_context(context[:1])):
            with pytest.raises(ValueError, match="the context has 1 rows for 3 data: give one row"):
                method(value, one)


@pytest.mark.parametrize("wrong", [3, [1, 2], torch.tensor([1, 2], dtype=torch.int32)], ids=str)
def test_classes_of_another_type_are_one_line_that_shows_the_right_one(wrong):
    flow = trained(next(case for case in CASES if case.name == "Glow-classes"))
    x = torch.rand(2, 2, 4, 4)
    for call in (
        lambda: flow.log_prob(x, wrong),
        lambda: flow.sample(2, context=wrong),
        lambda: flow.log_prob_and_class_logits(x, wrong),
    ):
        with pytest.raises(ValueError, match=r"\(B,\) int64, for example torch.tensor\(") as error:
            call()
        only_line(error)


@every_shallow_model
def test_noise_of_another_shape_is_one_line(case):
    if len(case.conditions(1)) < 2:
        pytest.skip("the log-determinant is exact")
    flow = trained(case)
    context, noise = case.conditions(3)
    for wrong in (noise[:1], noise[..., :1]):
        with pytest.raises(ValueError, match=r"give noise \(B, .* for 3 data, not \(") as error:
            flow.log_prob(case.data(3), context, wrong)
        only_line(error)


@every_shallow_model
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "n=-1 is out of range: give a whole number of at least 0"),
        ((2.5,), "n=2.5 is out of range"),
        ((2, -0.5), "temperature=-0.5 is out of range: give a number of at least 0"),
        ((2, float("nan")), "temperature=nan is out of range"),
        ((2, None), "temperature=None is out of range"),
    ],
)
def test_a_number_of_samples_or_a_temperature_out_of_range_is_one_line(case, arguments, message):
    flow = trained(case)
    with pytest.raises(ValueError, match=message) as error:
        samples_of(flow, case, *arguments)
    only_line(error)


# ---------------------------------------------------------------- the start from a first batch


every_model_to_initialise = pytest.mark.parametrize(
    "case",
    [case for case in MODELS if uninitialized(case.build()) and case.name != "Glow-depth32"],
    ids=lambda case: case.name,
)


def loss_of(flow, case, n=2):
    return flow.log_prob(case.data(n), *case.conditions(n)).mean()


@every_model_to_initialise
def test_initialize_needs_no_block_without_gradients(case):
    """By itself it sets the same values, and leaves no graph behind."""
    flows_of_both_ways = []
    for with_gradients in (True, False):
        flow = fresh(case, dtype=torch.float64)
        with torch.set_grad_enabled(with_gradients):
            flow.initialize(case.data(64, torch.float64), *case.conditions(64, torch.float64)[:1])
        assert not uninitialized(flow)
        assert all(parameter.is_leaf for parameter in flow.parameters())
        flows_of_both_ways.append(flow.state_dict())
    one, other = flows_of_both_ways
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def with_a_nan(x):
    x[1, 0, 2, 1] = torch.nan
    return x


def with_a_constant_channel(x):
    x[:, -1] = 0.5
    return x


@every_model_to_initialise
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_a_nan, "1 of 64 data are not finite, the first of them at index 1: leave them out"),
        (with_a_constant_channel, "channels have the same value in all of the first batch: give"),
        (lambda x: x[:1], "1 data of .* pixels at an ActNorm, is too small .* give 32 data"),
        (lambda x: x[:0], "0 data of .* pixels at an ActNorm, is too small .* give 32 data"),
        (lambda x: 255 * x, r"takes data in \[0, 1\], not from .*: integers q of n bits become"),
        (lambda x: 2 * x - 1, r"takes data in \[0, 1\], not from -"),
    ],
)
def test_a_first_batch_that_does_not_fit_is_refused_and_changes_nothing(case, spoil, message):
    flow = fresh(case)
    if "takes data" in message and not flow.unit_interval:
        pytest.skip("data of any range")
    before = copy.deepcopy(flow.state_dict())
    x = spoil(case.data(64))
    context = tuple(value[: len(x)] for value in case.conditions(64)[:1])
    with pytest.raises(ValueError, match=message) as error:
        flow.initialize(x, *context)
    only_line(error)
    after = flow.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    with pytest.warns(UninitializedWarning):
        loss_of(flow, case)


@every_model_to_initialise
def test_a_late_layer_that_cannot_be_set_undoes_the_earlier_ones(case, monkeypatch):
    """The loop stops at the last ActNorm, when all the others have been set."""
    flow = fresh(case)
    before = copy.deepcopy(flow.state_dict())
    *_, last = (module for module in flow.modules() if isinstance(module, ActNorm))
    monkeypatch.setattr(last, "FEWEST_VALUES", 10_000)
    with pytest.raises(ValueError, match="is too small to set it: give 10000"):
        flow.initialize(case.data(64), *case.conditions(64)[:1])
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
    assert all(module.awaits_data for module in flow.modules() if isinstance(module, ActNorm))


@every_model_to_initialise
def test_training_without_initialize_warns_once(case):
    flow = fresh(case)
    message = rf"this {type(flow).__name__} is trained without a start from data: call flow\.init"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(flow.eval(), case)
        with torch.no_grad():
            loss_of(flow.train(), case)
    with pytest.warns(UninitializedWarning, match=message) as records:
        loss_of(flow, case)
    assert len(records) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(flow, case)


@every_model_to_initialise
@pytest.mark.parametrize("way", ["initialised", "loaded", "copied"])
def test_a_flow_that_is_initialised_is_trained_without_a_warning(case, way):
    flow = fresh(case)
    flow.initialize(case.data(64), *case.conditions(64)[:1])
    if way == "loaded":
        other = fresh(case, seed=1)
        other.load_state_dict(flow.state_dict())
        flow = other
    if way == "copied":
        flow = copy.deepcopy(flow)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UninitializedWarning)
        loss_of(flow, case)
    assert not any(getattr(module, "awaits_data", False) for module in flow.modules())


class NoValuesRead(TorchDispatchMode):
    """Fails where Python reads the value of a tensor, for which the host would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read"
        return func(*args, **(kwargs or {}))


@every_shallow_model
def test_a_training_step_reads_no_values(case):
    """The first one neither. On a CPU the range of classes and of channel orders is checked."""
    flow = trained(case).train()
    if any(isinstance(module, ChannelPermutation) for module in flow.modules()):
        pytest.skip("F.one_hot reads values on a CPU")
    x = case.data(4)
    for _ in range(2):
        conditions = case.conditions(4)
        if case.context is not None:
            conditions = (flow.encode_context(conditions[0]), *conditions[1:])
        with NoValuesRead():
            flow.log_prob(x, *conditions).mean().backward()


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
