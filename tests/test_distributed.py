"""Two gloo ranks against one process: moments, gradients, weights, metrics."""

import functools

import pytest
import torch
from processes import Plain, start
from test_class_conditional import LabelledImages, conditional, fresh
from test_density import SHAPE, RandomImages, Recorder, density, make_trainer
from torch import distributed

from flows.masks import checkerboard
from flows.normalization import BiasOnlyBatchNorm2d, CouplingBatchNorm, over_ranks
from flows.realnvp import RealNVP
from lightning_modules.callbacks.initialization import Initialization

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec.* is deprecated"
)


def on_two_ranks(tmp_path, function, *arguments):
    """What `function(rank, *arguments)` returns on each of two processes in one gloo group."""
    processes = start(2, _saved, function, arguments, tmp_path, log=tmp_path / "log.txt")
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [0, 0], (tmp_path / "log.txt").read_text()
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _saved(rank, function, arguments, folder):
    torch.save(function(rank, *arguments), folder / f"{rank}.pt")


# ----------------------------------------------------------------------------- batch norm

NORMS = {
    "conditioner": lambda: BiasOnlyBatchNorm2d(3),
    "coupling": lambda: CouplingBatchNorm(3),
    "coupling-mask": lambda: CouplingBatchNorm(3, checkerboard(4, 6, 1)),
}


def normalised(norm, x, weights):
    """Output, input gradient, parameter gradients and running statistics of one training pass."""
    x = x.clone().requires_grad_()
    out = norm.train()(x)
    if not isinstance(out, tuple):
        out = (out, torch.zeros(len(x)))
    y, log_det = out
    loss = (y * weights).sum() + (log_det * weights[:, 0, 0, 0]).sum()
    loss.backward()
    state = {k: v for k, v in norm.state_dict().items() if k.startswith("running")}
    return {"y": y.detach(), "log_det": log_det.detach(), "grad": x.grad, **state} | {
        f"grad.{k}": p.grad for k, p in norm.named_parameters()
    }


def _halves(rank, name, dtype):
    distributed.init_process_group("gloo")
    norm, x, weights = _norm_case(name, dtype)
    half = slice(3 * rank, 3 * rank + 3)
    return normalised(norm, x[half], weights[half])


def _norm_case(name, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weights = (
        torch.randn(6, 3, 4, 6, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )
    return NORMS[name]().to(dtype), 1.7 * x + torch.arange(3.0)[:, None, None].to(dtype), weights


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)], ids=str
)
def test_batch_norms_reduce_their_moments_over_ranks_with_gradients(
    tmp_path, name, dtype, tolerance
):
    whole = normalised(*_norm_case(name, dtype))
    ranks = on_two_ranks(tmp_path, _halves, name, dtype)
    for key in ("y", "log_det", "grad"):
        torch.testing.assert_close(
            torch.cat([r[key] for r in ranks]), whole[key], rtol=0, atol=tolerance
        )
    for key in (k for k in whole if k.startswith("grad.")):
        torch.testing.assert_close(
            sum(r[key] for r in ranks), whole[key], rtol=0, atol=tolerance * 10
        )
    for key in ("running_mean", "running_var"):
        torch.testing.assert_close(ranks[0][key], whole[key], rtol=0, atol=tolerance)
        assert torch.equal(ranks[0][key], ranks[1][key])


def test_moments_of_ranks_far_apart_do_not_cancel(tmp_path):
    """E[x^2] - E[x]^2 would lose a variance of 1 around a mean of 10,000 in float32."""
    [moments, _] = on_two_ranks(tmp_path, _far_apart)
    assert moments["var"] == pytest.approx(moments["expected"], rel=1e-5)


def _far_apart(rank):
    distributed.init_process_group("gloo")
    x = 1e4 + torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    var, mean = torch.var_mean(x[rank], correction=0)
    _, var = over_ranks(mean[None], var[None])
    return {"var": var.item(), "expected": x.double().var(correction=0).item()}


# ----------------------------------------------------------------------------- training


def make_flow(plain):
    torch.manual_seed(0)
    if plain:
        return Plain(SHAPE)
    return RealNVP(SHAPE, n_scales=1, hidden_channels=4, n_blocks=1)


def trained(rank=0, ranks=1, plain=False, precision="64-true", micro_batch=None, steps=25):
    """Losses over the global batches, weights and buffers after training, and what is tested."""
    data = RandomImages(micro_batch=micro_batch, n_val=23)
    module = density(make_flow(plain), lr=1e-3, warmup_steps=10, clip_norm=100.0, l2=5e-5)
    losses = Recorder()
    trainer = make_trainer(losses, max_steps=steps, precision=precision, devices=ranks, num_nodes=1)
    share = 16 // ranks
    n_micro = share // (micro_batch or share)
    trainer.accumulate_grad_batches = n_micro
    trainer.fit(module, datamodule=data)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    [tested] = trainer.test(module, data, verbose=False)
    parts = torch.tensor(losses.losses, dtype=torch.float64).view(-1, n_micro)
    return {"losses": parts.sum(1), "state": state, "tested": tested}


def _trained(rank, arguments):
    return trained(rank, 2, **arguments)


def largest(a, b):
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


@functools.cache
def alone(plain):
    return trained(plain=plain)


@pytest.mark.parametrize(
    ("plain", "micro_batch"),
    [(False, None), (True, None), (True, 4)],
    ids=["RealNVP", "plain", "plain-accumulating"],
)
def test_two_ranks_train_as_one_process_does(tmp_path, plain, micro_batch):
    """With batches of 16, 2 x 8 and 2 x 2 x 4: in float64, after 25 steps, to 1e-10."""
    one = alone(plain)
    a, b = on_two_ranks(tmp_path, _trained, {"plain": plain, "micro_batch": micro_batch})
    assert ((a["losses"] + b["losses"]) / 2 - one["losses"]).abs().max() < 1e-10
    # The biases before a batch norm change nothing but its running mean. Their gradients are
    # rounding errors, which Adam divides by their own size.
    free = {k for k in one["state"] if not plain and k.endswith((".bias", ".running_mean"))}
    assert largest(a["state"], one["state"]) < 1e-7
    assert largest({k: v for k, v in a["state"].items() if k not in free}, one["state"]) < 1e-10
    assert all(torch.equal(a["state"][k], b["state"][k]) for k in a["state"])
    assert a["tested"] == b["tested"] == pytest.approx(one["tested"], abs=1e-6)


class Begun(Recorder):
    """Also keeps the weights with which training begins."""

    def on_train_start(self, trainer, pl_module):
        self.state = {k: v.clone() for k, v in pl_module.flow.state_dict().items()}


def trained_glow(rank=0, ranks=1):
    """Losses and weights of a class-conditional Glow, and what is tested.

    The weights are those that the data have set, and those after five steps.
    """
    module = conditional(fresh(), name="adamax", lr=1e-3, warmup_steps=2)
    begun = Begun()
    data = LabelledImages()
    trainer = make_trainer(
        begun,
        Initialization(),
        max_steps=5,
        precision="64-true",
        devices=ranks,
        num_nodes=1,
    )
    trainer.fit(module, datamodule=data)
    [tested] = trainer.test(module, data, verbose=False)
    losses = torch.tensor(begun.losses, dtype=torch.float64)
    return {
        "losses": losses,
        "begun": begun.state,
        "state": module.flow.state_dict(),
        "tested": tested,
    }


def _trained_glow(rank):
    return trained_glow(rank, 2)


def test_two_ranks_initialise_and_train_a_glow_as_one_process_does(tmp_path):
    """Both ranks set ActNorms from the whole first batch, and then train with halves of it."""
    one = trained_glow()
    a, b = on_two_ranks(tmp_path, _trained_glow)
    assert ((a["losses"] + b["losses"]) / 2 - one["losses"]).abs().max() < 1e-10
    assert all(torch.equal(a["begun"][k], v) for k, v in one["begun"].items())
    assert largest(a["begun"], fresh().state_dict()) > 0.1
    assert largest(a["begun"], a["state"]) > 1e-4
    assert largest(a["state"], one["state"]) < 1e-10
    assert all(torch.equal(a["state"][k], b["state"][k]) for k in a["state"])
    assert set(one["tested"]) == {"test/bpd", "test/accuracy"}
    assert a["tested"] == b["tested"] == pytest.approx(one["tested"], abs=1e-6)


def test_one_process_accumulating_trains_as_with_whole_batches():
    one = alone(True)
    parts = trained(plain=True, micro_batch=4)
    assert (one["losses"] - parts["losses"]).abs().max() < 1e-10
    assert largest(one["state"], parts["state"]) < 1e-10
    assert parts["tested"] == pytest.approx(one["tested"], abs=1e-6)


def test_two_ranks_train_in_bf16_as_one_process_does(tmp_path):
    """Networks agree to the 8 bits of bfloat16.

    Weights and log-determinants are in float32, and the same on both ranks.
    """
    settings = {"precision": "bf16-mixed", "steps": 3}
    one = trained(**settings)
    a, b = on_two_ranks(tmp_path, _trained, settings)
    difference = ((a["losses"] + b["losses"]) / 2 - one["losses"]).abs() / one["losses"].abs()
    assert difference.max() < 0.02
    assert all(torch.equal(a["state"][k], b["state"][k]) for k in a["state"])
    assert {v.dtype for v in a["state"].values() if v.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("plain", [False, True], ids=["RealNVP", "plain"])
def test_the_first_step_agrees_in_float32(tmp_path, plain):
    """The loss of the first step agrees to 1e-6.

    Afterwards rounding errors grow, since Adam divides a gradient by its own size.
    """
    settings = {"plain": plain, "precision": "32-true", "steps": 3}
    one = trained(**settings)
    a, b = on_two_ranks(tmp_path, _trained, settings)
    difference = ((a["losses"] + b["losses"]) / 2 - one["losses"]).abs() / one["losses"].abs()
    assert difference[0] < 1e-6
    assert difference[-1] < 1e-3
    assert all(torch.equal(a["state"][k], b["state"][k]) for k in a["state"])
