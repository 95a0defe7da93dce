"""Steps whose loss or gradient is not finite are skipped, counted and limited, on all ranks."""

import copy
import itertools

import pytest
import torch
from processes import Plain, Run
from test_density import SHAPE, RandomImages, Recorder, density, make_trainer, tiny_flow

from lightning_modules.noise import Position
from results.runs import read_json

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("does not have many workers", "LeafSpec.* is deprecated")
]


class Harm(Recorder):
    """Makes the likelihood of one step infinite or NaN, or its gradient NaN.

    It records the state before the first step and after every step.
    """

    def __init__(self, how, at=(2,)):
        super().__init__()
        self.how = how
        self.at = at
        self.states = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        flow = pl_module.flow
        self.states.append(self.state(trainer, pl_module))
        vars(flow).pop("log_prob", None)
        original = flow.log_prob
        if trainer.global_step in self.at:
            flow.log_prob = lambda *inputs: self.how(original(*inputs))

    def on_train_end(self, trainer, pl_module):
        self.states.append(self.state(trainer, pl_module))

    def state(self, trainer, pl_module):
        state = copy.deepcopy(
            {"weights": pl_module.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}
        )
        return [t for t in tensors(state) if t.is_floating_point()]


def tensors(nested):
    if isinstance(nested, torch.Tensor):
        return [nested]
    if isinstance(nested, dict):
        return [t for v in nested.values() for t in tensors(v)]
    if isinstance(nested, list):
        return [t for v in nested for t in tensors(v)]
    return []


def unchanged(before, after):
    return len(before) == len(after) and all(
        torch.equal(a, b) for a, b in zip(before, after, strict=True)
    )


HARMS = {
    "loss-inf": lambda log_prob: log_prob + torch.inf,  # its gradient would be finite
    "loss-nan": lambda log_prob: log_prob * torch.nan,
    "gradient-nan": lambda log_prob: (
        log_prob + ((0 * log_prob).sqrt() - (0 * log_prob).sqrt().detach())
    ),
}


@pytest.mark.parametrize("name", ["adam", "adamw", "adamax"])
@pytest.mark.parametrize("harm", HARMS)
def test_a_step_that_is_not_finite_changes_nothing(harm, name):
    spy = Harm(HARMS[harm])
    module = density(tiny_flow(), name=name, weight_decay=0.1, clip_norm=10.0)
    make_trainer(spy, max_steps=5).fit(module, datamodule=RandomImages())
    changed = [not unchanged(a, b) for a, b in itertools.pairwise(spy.states)]
    assert changed == [True, True, False, True, True]
    assert module.skipped.item() == 1
    assert all(t.isfinite().all() for t in spy.states[-1])
    assert module.train_mean.compute().isfinite()
    assert module.train_mean.n.item() == (5 - (harm != "gradient-nan")) * 16


def test_one_bad_micro_batch_skips_the_whole_step():
    class Second(Harm):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if batch_idx % 2 == 0:
                vars(pl_module.flow).pop("log_prob", None)

    spy = Second(HARMS["loss-inf"])
    module = density(Plain(SHAPE))
    trainer = make_trainer(spy, max_steps=4)
    trainer.accumulate_grad_batches = 2
    trainer.fit(module, datamodule=RandomImages(micro_batch=8))
    steps = spy.states[::2]
    assert [not unchanged(a, b) for a, b in itertools.pairwise(steps)] == [True, True, False, True]
    assert module.skipped.item() == 1


def test_without_harm_nothing_is_skipped_and_the_losses_are_those_of_a_plain_loop():
    """The weights are the same to the bit as those that a loop of torch's gives."""
    module = density(tiny_flow(), lr=1e-3)
    data = RandomImages()
    make_trainer(max_steps=4).fit(module, datamodule=data)
    flow = tiny_flow().train()
    other = density(tiny_flow())
    other.trainer = make_trainer(max_steps=4)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3, fused=True)
    for number, (q, _) in enumerate(list(RandomImages().train_dataloader())):
        loss = -flow.log_prob(other.training_input([q], Position(0, number)).x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(v, module.flow.state_dict()[k]) for k, v in flow.state_dict().items())
    assert module.skipped.item() == 0


def test_ranks_agree_on_a_step_that_only_one_could_not_take(tmp_path):
    run = Run(tmp_path / "run", "trainer.max_steps=6", ranks=2, poison={(3, 1)})
    assert run.wait() == [0, 0], run.output()
    final = run.final()["state_dict"]
    assert final["skipped"].item() == 1
    assert all(v.isfinite().all() for v in final.values())
    losses = [run.losses(rank) for rank in range(2)]
    assert [float.fromhex(losses[rank][3, 3]) for rank in range(2)][1] == -float("inf")
    assert len(losses[0]) == len(losses[1]) == 6


def test_too_many_end_the_run_and_the_last_good_checkpoint_stays(tmp_path):
    arguments = ["trainer.max_steps=100", "optim.max_skipped=5", "trainer.log_every_n_steps=2"]
    run = Run(tmp_path / "run", *arguments, ranks=2, poison={(step, 0) for step in range(5, 100)})
    assert run.wait() == [1, 0], run.output()
    line = run.output().strip().splitlines()[-1]
    assert line.startswith(
        "error: stopped at step 12: the loss or its gradient was not finite in 7 steps"
    )
    assert "optim.max_skipped=5" in line
    assert "Traceback" not in run.output()
    final = run.final()
    assert final["global_step"] == 4
    assert all(v.isfinite().all() for v in final["state_dict"].values())
    assert "step 6 is not finite: step-00000006.ckpt is not written" in run.output()
    outcome = read_json(run.folder / "diverged.json")
    assert (outcome["metrics"], outcome["skipped_steps"], outcome["images"]) == ({}, 7, 12 * 16)
    assert (outcome["config"]["optim"]["max_skipped"], outcome["parameters"] > 0) == (5, True)
    assert not (run.folder / "result.json").exists()


def test_a_stop_in_a_step_that_is_not_finite_does_not_claim_to_have_saved(tmp_path):
    run = Run(tmp_path / "run", "trainer.max_steps=20", poison={(4, 0)}, stop=5)
    assert run.wait() == [75], run.output()
    assert (
        "stopped at step 5, which is not finite: the newest checkpoint is of an earlier step; go on"
        in run.output()
    )
    assert run.final()["global_step"] == 4


def test_a_run_that_was_never_finite_says_so(tmp_path):
    run = Run(tmp_path / "run", "trainer.max_steps=3", poison={(step, 0) for step in range(3)})
    assert run.wait() == [1]
    assert "holds no checkpoint: no step of the run was finite" in run.output()
