"""Adamax on one vector is torch's Adamax (lightning_modules/adamax.py)."""

import copy

import pytest
import torch

from lightning_modules.adamax import Adamax

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95)}


def weights(dtype=torch.float64):
    """A scalar, a vector, a matrix and two convolutions in channels_last.

    With one channel the two memory formats are the same.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = [
        torch.randn(s, generator=generator, dtype=dtype)
        for s in ((), (3,), (4, 2), (5, 3, 3, 3), (5, 1, 3, 3))
    ]
    drawn[3:] = [w.contiguous(memory_format=torch.channels_last) for w in drawn[3:]]
    return [torch.nn.Parameter(w) for w in drawn]


def give_gradients(*lists, seed, scale=1.0):
    for i, parameters in enumerate(zip(*lists, strict=True)):
        grad = scale * torch.randn(
            parameters[0].shape, generator=torch.Generator().manual_seed(100 * seed + i)
        )
        for parameter in parameters:
            parameter.grad = grad.to(parameter)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_its_steps_are_those_of_torch_s_adamax(weight_decay):
    ours = weights()
    theirs = weights()
    one = Adamax(ours, weight_decay=weight_decay, **SETTINGS)
    other = torch.optim.Adamax(theirs, weight_decay=weight_decay, **SETTINGS)
    for step in range(6):
        give_gradients(ours, theirs, seed=step, scale=10.0 ** -(step % 3))
        one.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 1e-2 / (1 + step)
        one.step()
        other.step()
        assert_same(ours, theirs)
    assert (ours[3] - weights()[3]).abs().min() > 0


def test_checkpoints_are_torch_s_and_each_goes_on_with_the_other_s():
    ours = weights()
    theirs = weights()
    one = Adamax(ours, **SETTINGS)
    other = torch.optim.Adamax(theirs, **SETTINGS)
    for step in range(6):
        if step == 3:
            mine = copy.deepcopy(one.state_dict())
            its = copy.deepcopy(other.state_dict())
            assert mine["state"].keys() == its["state"].keys() == set(range(5))
            assert {name: tuple(v.shape) for name, v in mine["state"][3].items()} == {
                name: tuple(v.shape) for name, v in its["state"][3].items()
            }
            one = Adamax(ours, **SETTINGS)
            other = torch.optim.Adamax(theirs, **SETTINGS)
            one.load_state_dict(its)
            other.load_state_dict(mine)
        give_gradients(ours, theirs, seed=step)
        one.step()
        other.step()
    assert_same(ours, theirs)


def test_a_weight_without_a_gradient_stays_and_cannot_get_one_later():
    """Its count of steps would differ from that of the others."""
    ours = weights()
    theirs = weights()
    one = Adamax(ours, **SETTINGS)
    other = torch.optim.Adamax(theirs, **SETTINGS)
    one.step()
    for step in range(3):
        give_gradients(ours, theirs, seed=step)
        ours[1].grad = theirs[1].grad = None
        one.step()
        other.step()
    assert_same(ours, theirs)
    give_gradients(ours, seed=3)
    with pytest.raises(ValueError, match=r"use torch\.optim\.Adamax"):
        one.step()
    assert_same(ours, theirs)


def test_a_copy_trains_on_by_itself():
    ours = weights()
    theirs = weights()
    one = Adamax(ours, **SETTINGS)
    other = torch.optim.Adamax(theirs, **SETTINGS)
    for step in range(4):
        if step == 2:
            before = copy.deepcopy([w.detach() for w in ours])
            both = copy.deepcopy({"weights": ours, "optimizer": one})
            assert_same(before, ours)
            ours = both["weights"]
            one = both["optimizer"]
        give_gradients(ours, theirs, seed=step)
        one.step()
        other.step()
    assert_same(ours, theirs)


def test_a_second_parameter_group_is_refused():
    a = torch.nn.Parameter(torch.ones(2))
    b = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="one group"):
        Adamax([{"params": [a]}, {"params": [b], "lr": 1.0}])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 2])
def test_a_step_with_found_inf_changes_nothing(bad, at):
    """The steps after it are those of an optimizer that never took it."""
    ours = weights()
    theirs = weights()
    one = Adamax(ours, **SETTINGS)
    other = torch.optim.Adamax(theirs, **SETTINGS)
    for step in range(4):
        give_gradients(ours, theirs, seed=step)
        if step == at:
            ours[2].grad[0, 0] = bad
        one.found_inf = torch.tensor(float(step == at))
        before = copy.deepcopy([w.detach() for w in ours])
        one.step()
        if step == at:
            assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))
        else:
            other.step()
    assert_same(ours, theirs)
    assert one.state[ours[0]]["step"] == 3
