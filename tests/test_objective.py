"""The contract of an objective, for one that has no flow.

It is a denoiser, whose metric is better when it is higher. It passes what every objective has to
pass: the trainer's parts, all callbacks, a resume and W&B.
"""

import csv
import json

import pytest
import torch
from cases import TINY
from omegaconf import OmegaConf
from sketch_denoiser import Denoiser
from test_wandb import nobody_logged_in
from torch import nn
from wandb_file import parts_of

from datamodules import make_data
from lightning_modules.objective import Objective
from reproduce import experiment
from reproduce.config import compose, override
from reproduce.loggers import close
from reproduce.run_folder import read_checkpoint, step_checkpoints

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("does not have many workers", "LeafSpec.* is deprecated")
]


def settings(folder, *words):
    """A config as load_config gives it, of an experiment that has neither a recipe nor a flow."""
    own = override(TINY, ["checkpoint.every_n_steps=100"])
    keys = [word for word in own if not word.startswith("flow.")]
    config = compose("realnvp_cifar10", override(keys, words))
    OmegaConf.set_struct(config, False)
    optim = {"name": "adam", "lr": 0.02, "clip_norm": 5.0}
    config = OmegaConf.merge(
        config, {"experiment": "denoiser", "run_dir": str(folder), "overrides": []}
    )
    config.optim = optim
    config.flow = {}
    config.paper = None
    OmegaConf.set_readonly(config, True)
    return config


def run(folder, *words, model=None, extra=()):
    """Train and test as a script's main does; returns the result and the tested module."""
    config = settings(folder, *words)
    data = make_data(seed=config.seed, **config.data)
    torch.manual_seed(0)
    if model is None:
        model = nn.Conv2d(3, 3, 3, padding=1)
    module = Denoiser.of(config, model, data)
    trainer = experiment.make_trainer(config, module, *extra)
    experiment.fit(config, trainer, module, data)
    return experiment.record(config, trainer, module, data), module


def curve(folder):
    with (folder / "curve.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder, the result and the module of a run of twelve steps, logged to W&B."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with nobody_logged_in(folder.parent):
        result, module = run(
            folder, "trainer.max_steps=12", "logger.name=wandb", "trainer.log_every_n_steps=1"
        )
        close(0)
    return folder, result, module


def test_a_denoiser_learns_and_its_best_score_is_the_highest(finished):
    folder, result, _ = finished
    values = [float(row["val/psnr"]) for row in curve(folder)]
    assert list(curve(folder)[0]) == ["step", "images", "seconds", "lr", "train/psnr", "val/psnr"]
    assert values[-1] > values[0] + 1
    best = read_checkpoint(folder / "checkpoints" / "best.ckpt")
    assert best["callbacks"]["Checkpoints"]["best"] == max(values[1:])
    assert best["global_step"] == int(curve(folder)[1:][values[1:].index(max(values[1:]))]["step"])
    assert result["metrics"]["val/psnr"] == max(values[1:])
    assert set(result["metrics"]) == {"val/psnr", "test/psnr"}


def test_the_result_has_metric_configuration_and_provenance(finished):
    folder, result, module = finished
    assert json.loads((folder / "result.json").read_text()) == result
    assert (result["experiment"], result["images"], result["skipped_steps"]) == (
        "denoiser",
        12 * 16,
        0,
    )
    assert result["parameters"] == sum(p.numel() for p in module.net.parameters()) == 3 * 3 * 9 + 3
    assert (result["papers"], result["status"]) == ([], "-")
    assert read_checkpoint(step_checkpoints(folder)[0])["paperflows"]["shape"] == [3, 8, 8]


def test_a_denoiser_is_initialised_by_the_first_batch_before_the_first_validation(finished):
    _, _, module = finished
    data = make_data(seed=0, **finished[1]["config"]["data"])
    data.setup()
    expected = (torch.stack(list(data.initialization_batch(64)[0])) / 255).mean((0, 2, 3))
    torch.testing.assert_close(module.colour[:, 0, 0], expected)


def test_only_what_it_can_show_is_drawn(finished):
    folder, _, _ = finished
    names = sorted(path.name for path in (folder / "samples").iterdir())
    assert names == [f"reconstruction-{step:07d}.png" for step in (3, 6, 9, 12)]


def test_wandb_has_the_metric_over_steps(finished):
    folder, result, _ = finished
    (part,) = parts_of(folder)
    logged = {row["trainer/global_step"]: row["val/psnr"] for row in part.rows if "val/psnr" in row}
    expected = {int(row["step"]): float(row["val/psnr"]) for row in curve(folder)}
    assert logged == pytest.approx(expected, abs=1e-5)
    assert part.summary["test/psnr"] == result["metrics"]["test/psnr"]
    assert part.summary["best/val/psnr"] == result["metrics"]["val/psnr"]
    assert any("pictures/reconstruction" in key for row in part.rows for key in row)


def test_a_run_that_is_killed_goes_on_to_the_same_weights(tmp_path):
    """It is killed after step 5, in epochs of 4 batches, with averages and micro-batches."""
    words = ["checkpoint.every_n_steps=2", "ema.decay=0.9", "data.micro_batch=8"]
    whole, _ = run(tmp_path / "whole", "trainer.max_steps=7", *words)
    run(tmp_path / "parts", "trainer.max_steps=5", *words)
    (tmp_path / "parts" / "result.json").unlink()
    (tmp_path / "parts" / "checkpoints" / "step-00000005.ckpt").unlink()
    parts, _ = run(tmp_path / "parts", "trainer.max_steps=7", "resume=auto", *words)
    a, b = (read_checkpoint(step_checkpoints(tmp_path / name)[0]) for name in ("whole", "parts"))
    assert a["global_step"] == b["global_step"] == 7
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(torch.equal(a["state_dict"][key], value) for key, value in b["state_dict"].items())
    assert parts["metrics"] == whole["metrics"]


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path):
    class Poisoned(nn.Conv2d):
        calls = 0

        def forward(self, x):
            self.calls += self.training
            y = super().forward(x)
            if self.training and self.calls == 2:
                y = y * torch.inf
            return y

    result, module = run(tmp_path, "trainer.max_steps=3", model=Poisoned(3, 3, 3, padding=1))
    assert result["skipped_steps"] == module.skipped.item() == 1
    assert all(p.isfinite().all() for p in module.parameters())


class Bare(Objective):
    """An objective that declares what it has to, and nothing else."""

    @classmethod
    def of(cls, config, model, data):
        return cls()

    @property
    def trained(self):
        return nn.Linear(1, 1)


def test_the_defaults_of_an_objective_mean_that_there_is_none():
    plain = Bare()
    assert (plain.shape, plain.n_bits, plain.needs_autograd, plain.has_temperature) == (
        None,
        None,
        False,
        True,
    )
    assert not plain.needs_initialization()
    assert plain.check_data(None) is plain.check_skipped() is plain.trial(3) is None
    assert plain.draw(2, 1.0, 0) is plain.reconstruct([torch.zeros(2)]) is None
    x, context, log_weight, noise = plain.input_of(
        [torch.ones(2, 3), torch.arange(2), torch.tensor([4, 5])]
    )
    assert (x.shape, context.tolist(), log_weight.tolist(), noise) == (
        (2, 3),
        [4, 5],
        [0.0, 0.0],
        None,
    )
    assert plain.skipped.item() == plain.skipped_last.item() == 0
    with pytest.raises(
        ValueError, match=r"Bare cannot be captured as CUDA graphs: give trainer.cuda_graph=false"
    ):
        plain.capture()
    with pytest.raises(TypeError, match=r"abstract methods? .*\bof\b.*\btrained\b"):
        Objective()


@pytest.mark.parametrize(
    ("data", "limit", "expected"),
    [({"n_val": 5}, None, True), ({"n_val": 0}, None, False), ({}, None, True), ({}, 0, False)],
)
def test_a_data_set_with_a_split_of_its_own_needs_no_n_val(data, limit, expected):
    config = OmegaConf.create({"data": data, "trainer": {"limit_val_batches": limit}})
    OmegaConf.set_struct(config, True)
    assert experiment.validates(config) is expected


def test_parts_of_what_is_trained_are_compiled_one_by_one():
    compiled = []

    class Part(nn.Linear):
        def compile(self):
            compiled.append(self)

    class Two(Bare):
        def __init__(self):
            super().__init__()
            self.first = Part(1, 2)
            self.second = Part(2, 3)

        @property
        def trained(self):
            return nn.ModuleList([self.first, self.second])

    two = Two()
    two.compile_networks()
    assert compiled == [two.first, two.second]
    assert two.n_parameters == 4 + 9
