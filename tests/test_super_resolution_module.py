"""Training SRFlow and RRDB: the likelihood, the frozen encoder, the images, recipes and scripts."""

import json
import math
import re
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from image_folders import save_image
from PIL import Image
from processes import start
from test_density import make_trainer
from test_wandb import nobody_logged_in
from torch import distributed
from torch.utils.data import DataLoader
from wandb_file import parts_of

from datamodules.bicubic import downscale, upscale
from datamodules.evaluation_sets import EvaluationSet
from flows.srflow import RRDB, SRFlow
from lightning_modules.callbacks.image_quality import SuperResolved
from lightning_modules.optimization import OptimizedModule
from lightning_modules.quality.super_resolution import psnr_rgb
from lightning_modules.regression import RegressionModule
from lightning_modules.super_resolution import (
    GreyLevelNoise,
    SuperResolutionModule,
    middle_of,
    super_resolve,
)
from reproduce import (
    evaluate,
    experiment,
    export,
    rrdb_bsds_x4,
    run_folder,
    srflow_ablations,
    srflow_bsds_x4,
    temperatures,
    verify,
)
from reproduce.config import compose, override, plain
from reproduce.loggers import close
from reproduce.run_folder import read_checkpoint, step_checkpoints
from reproduce.stored import as_safetensors, read_stored
from results import compare
from results.formats import data_name
from results.groups import load_call

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("does not have many workers", "LeafSpec.* is deprecated", "srun. command")
]
ENCODER = {"encoder_blocks": 2, "encoder_channels": 4, "encoder_growth": 2}
FLOW = {"depth": 1, "hidden_channels": 4, "stacked": (0, 1), **ENCODER}


def make_flow(**arguments):
    torch.manual_seed(0)
    flow = SRFlow(**(FLOW | arguments))
    flow.initialize(torch.rand(8, 3, 16, 16), torch.rand(8, 3, 4, 4))
    return flow


def make_module(flow=None, **arguments):
    settings = {"shape": (3, 16, 16), "encoder_frozen_until": 0.0} | arguments
    return SuperResolutionModule(flow or make_flow(), None, 8, 0, **settings).eval()


def make_batch(n=2, height=16, width=16, scale=4):
    generator = torch.Generator().manual_seed(n)
    high_res = torch.randint(0, 256, (n, 3, height, width), generator=generator)
    low_res = high_res.float().unflatten(3, (-1, scale)).unflatten(2, (-1, scale)).mean((3, 5))
    return [high_res.to(torch.uint8), torch.arange(n), low_res.to(torch.uint8)]


class Pairs(L.LightningDataModule):
    """A few crops, always in the same order."""

    def __init__(self, n=8, batch_size=2):
        super().__init__()
        self.items = list(zip(*make_batch(n), strict=True))
        self.batch_size = batch_size

    def train_dataloader(self):
        rank = self.trainer.global_rank
        items = self.items[rank :: self.trainer.world_size]
        return DataLoader(items, self.batch_size // self.trainer.world_size)


# ------------------------------------------------------------------------------ noise


def test_noise_is_in_grey_levels_and_images_are_levels_over_255():
    q = torch.tensor([[0, 100, 255]], dtype=torch.uint8)
    noise = torch.tensor([[-1.0, 0.5, 2.0]])
    x, log_weight = GreyLevelNoise("normal")(q, noise)
    torch.testing.assert_close(255 * x, q + 4 / math.sqrt(3) * noise)
    assert log_weight.tolist() == pytest.approx([3 * math.log(256 / 255)])
    x, _ = GreyLevelNoise("uniform")(q, torch.tensor([[0.0, 0.5, 0.75]]))
    torch.testing.assert_close(255 * x, torch.tensor([[-0.5, 100.0, 255.25]]))
    x, _ = GreyLevelNoise("none")(q, noise)
    torch.testing.assert_close(255 * x, q.float())
    x, _ = GreyLevelNoise("normal", std=0.0)(q, noise)
    torch.testing.assert_close(255 * x, q.float())


@pytest.mark.parametrize(
    ("noise", "metric"), [("normal", "bpd_noisy"), ("none", "bpd_noisy"), ("uniform", "bpd")]
)
def test_the_name_of_the_likelihood_says_which_noise_it_has(noise, metric):
    assert [m.name for m in make_module(noise=noise).metrics] == [metric, "release_bits"]


def test_bits_are_those_of_the_density_of_grey_levels():
    """A density p of x = q / 255 is one of p / 255 for each value in grey levels."""
    module = make_module(noise="none")
    batch = make_batch()
    sample = module.input_of(batch)
    torch.testing.assert_close(sample.x, batch[0] / 255)
    torch.testing.assert_close(sample.context, batch[2] / 255)
    with torch.no_grad():
        log_prob, measures = module.evaluate(module.flow, *sample.arguments)
    bits = module.loss_per_datum(log_prob + sample.log_weight, sample.x[0].numel())
    n_pixels = 16 * 16
    torch.testing.assert_close(
        bits, -(log_prob - 3 * n_pixels * math.log(255)) / (3 * n_pixels * math.log(2))
    )
    release = measures["release_bits"]
    torch.testing.assert_close(release, -log_prob / (n_pixels * math.log(2)))
    torch.testing.assert_close(bits, release / 3 + math.log2(255))


def test_training_noise_is_that_of_the_step_and_evaluation_noise_that_of_the_image():
    module = make_module()
    batch = make_batch()
    x = module.input_of(batch).x
    torch.testing.assert_close(module.input_of([part[1:] for part in batch]).x, x[1:])
    noise = 255 * x - batch[0]
    assert noise.std() == pytest.approx(4 / math.sqrt(3), rel=0.05)


def test_the_likelihood_is_of_the_part_that_the_flow_can_halve():
    module = make_module()
    batch = make_batch(height=24, width=28)  # low_res is 6x7, and its features are halved once
    high_res, _, low_res = module.halvable(batch)
    assert torch.equal(high_res, batch[0][:, :, :24, :24])
    assert torch.equal(low_res, batch[2][:, :, :6, :6])
    assert module.input_of(batch).x.shape == (2, 3, 24, 24)
    with pytest.raises(ValueError, match=r"has 1 x 4 pixels, and this SRFlow needs 2 x 2: leave"):
        module.input_of(make_batch(height=4, width=16))


# ------------------------------------------------------------------------------ images


@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_images_of_any_size_are_super_resolved(size):
    flow = make_flow().eval()
    low_res = torch.rand(2, 3, *size)

    def images(n, temperature=0.9):
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            return super_resolve(flow, low_res, n, temperature, generator)

    three = images(3)
    assert three.shape == (3, 2, 3, 4 * size[0], 4 * size[1])
    assert torch.equal(images(2), three[:2])  # more images do not change the first ones
    assert (three[0] - three[1]).abs().max() > 0.01
    same = images(2, temperature=0.0)
    assert torch.equal(same[0], same[1])


def test_the_images_of_a_test_depend_on_the_image_alone():
    module = make_module(samples=3)
    batch = make_batch(n=3)
    images = module.super_resolved(batch, 3)
    assert torch.equal(images.high_res, batch[0])
    assert torch.equal(images.low_res, batch[2])
    single = module.super_resolved([part[2:] for part in batch], 1)
    torch.testing.assert_close(single.samples, images.samples[:1, 2:], rtol=0, atol=1e-5)
    other = make_module(module.flow, noise_seed=1).super_resolved(batch, 1)
    assert (other.samples - images.samples[:1]).abs().max() > 0.01


def test_images_that_cannot_be_made_are_not_a_number(monkeypatch, capsys):
    module = make_module()

    def fail(*arguments, **settings):
        raise torch.linalg.LinAlgError("a singular matrix")

    monkeypatch.setattr(module.flow, "sample", fail)
    images = module.super_resolved(make_batch(n=2), 2)
    assert images.samples.shape == (2, 2, 3, 16, 16)
    assert images.samples.isnan().all()


def test_pictures_are_of_the_middle_of_the_images():
    batch = make_batch(n=1, height=200, width=24)
    high_res, _, low_res = middle_of(batch, multiple=2)
    assert torch.equal(high_res, batch[0][:, :, 20:180])
    assert torch.equal(low_res, batch[2][:, :, 5:45])
    module = make_module()
    drawn = module.draw(2, 0.5, 0, batch)
    assert drawn.shape == (2, 3, 160, 24)
    assert torch.equal(drawn, module.draw(2, 0.5, 0, batch))
    assert module.draw(2, 0.5, 0) is None
    x, again = module.reconstruct(batch)
    assert x.shape == (1, 3, 160, 24)
    torch.testing.assert_close(x, again, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------ the encoder


class Watch(L.Callback):
    """What becomes of the encoder and of the rest in each step.

    moved: whether their weights changed, (encoder, rest). moments: for how many of the encoder's
    parameters the optimizer has moments.
    """

    def __init__(self):
        self.moved = []
        self.moments = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before = [[p.detach().clone() for p in part] for part in parts(module)]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.moved.append(
            tuple(
                any(not torch.equal(a, b) for a, b in zip(old, new, strict=True))
                for old, new in zip(self.before, parts(module), strict=True)
            )
        )
        state = trainer.optimizers[0].state
        self.moments.append(sum(p in state for p in module.encoder.parameters()))


def parts(module):
    encoder = list(module.encoder.parameters())
    ids = {id(p) for p in encoder}
    return encoder, [p for p in module.flow.parameters() if id(p) not in ids]


def trained(until, steps=6, precision="32-true", **settings):
    module = make_module(
        encoder_frozen_until=until, lr=1e-3, name="adamw", weight_decay=0.1, **settings
    ).train()
    watch = Watch()
    trainer = make_trainer(watch, max_steps=steps, limit_val_batches=0, precision=precision)
    trainer.fit(module, Pairs())
    return module, watch


@pytest.mark.parametrize(("until", "frozen"), [(0.5, 3), (0.0, 0), (1.0, 6), (0.34, 3)])
def test_the_encoder_is_frozen_until_its_share_of_the_steps(until, frozen):
    """Neither gradients nor weight decay reach it, and its moments begin with its first step."""
    module, watch = trained(until)
    assert watch.moved == [(step >= frozen, True) for step in range(6)]
    n = len(list(module.encoder.parameters()))
    assert watch.moments == [n * (step >= frozen) for step in range(6)]
    assert all(p.requires_grad for p in module.parameters())


def test_a_frozen_encoder_in_bf16():
    """Autocast keeps copies of the weights that it has cast where no gradients are computed."""
    module, watch = trained(0.5, precision="bf16-mixed")
    assert watch.moved == [(step >= 3, True) for step in range(6)]
    assert module.skipped == 0


def test_a_share_of_the_steps_needs_their_number():
    module = make_module(encoder_frozen_until=0.5)
    module.trainer = SimpleNamespace(max_steps=-1)
    with pytest.raises(ValueError, match=r"encoder_frozen_until=0\.5 is a share of the steps: set"):
        module.configure_optimizers()


def _rank(rank, steps):
    module, watch = trained_by_ranks(steps)
    encoder, rest = parts(module)
    return {
        "moved": [list(pair) for pair in watch.moved],
        "moments": watch.moments,
        "encoder": torch.cat([p.detach().flatten() for p in encoder]),
        "rest": torch.cat([p.detach().flatten() for p in rest]),
    }


def trained_by_ranks(steps):
    module = make_module(encoder_frozen_until=0.5, lr=1e-3).train()
    watch = Watch()
    trainer = make_trainer(
        watch, max_steps=steps, limit_val_batches=0, devices=2, strategy="ddp", num_nodes=1
    )
    trainer.fit(module, Pairs(batch_size=4))
    return module, watch


def _saved(rank, steps, folder):
    torch.save(_rank(rank, steps), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_have_the_same_encoder_after_it_is_trained(tmp_path):
    processes = start(2, _saved, 4, tmp_path, log=tmp_path / "log.txt")
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [0, 0], (tmp_path / "log.txt").read_text()
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for rank in ranks:
        assert rank["moved"] == [[False, True], [False, True], [True, True], [True, True]]
        assert rank["moments"][1] == 0
        assert rank["moments"][2] > 0
    assert torch.equal(ranks[0]["encoder"], ranks[1]["encoder"])
    assert torch.equal(ranks[0]["rest"], ranks[1]["rest"])
    before = torch.cat([p.detach().flatten() for p in make_flow().context_encoder.parameters()])
    assert not torch.equal(ranks[0]["encoder"], before)


# ------------------------------------------------------------------------------ the learning rate


def test_the_learning_rate_is_halved_at_milestones():
    module = make_module(
        lr=1.0, warmup_steps=2, schedule="milestones", milestones=[0.5, 0.75], gamma=0.5
    )
    module.trainer = SimpleNamespace(max_steps=8, precision_plugin=None)
    scheduler = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(9):
        rates += scheduler.get_last_lr()
        scheduler.optimizer.step()
        scheduler.step()
    assert rates == [0.0, 0.5, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"milestones": [0.5, 0.4]}, "optim.milestones=[0.5, 0.4] are not rising shares"),
        ({"milestones": [0.5, 2]}, "optim.milestones=[0.5, 2] are not rising shares"),
        ({"milestones": 0.5}, "optim.milestones=0.5 are not rising shares"),
        ({"gamma": 0.0}, "optim.gamma=0.0 is out of range: give a positive number of at most 1"),
        ({"schedule": "milestones", "cooldown_steps": 1}, "the rate falls at optim.milestones"),
        ({"noise": "gaussian"}, "optim.noise=gaussian is not known: give one of normal, uniform"),
        ({"noise_std": -1.0}, "optim.noise_std=-1.0 is out of range"),
        (
            {"encoder_frozen_until": 0.5, "name": "adamax"},
            "optim.name=adamax needs the same weights in every step, and with "
            "optim.encoder_frozen_until=0.5 the encoder comes later: give adam or adamw",
        ),
        ({"encoder_frozen_until": 1.5}, "optim.encoder_frozen_until=1.5 is out of range: give a"),
        ({"samples": 0}, "eval.samples=0 is out of range: give a whole number from 1 to 1000"),
        ({"temperature": -0.1}, "eval.temperature=-0.1 is out of range"),
        ({"noise_samples": 2}, "eval.noise_samples=2, but bpd_noisy is not a bound"),
    ],
)
def test_a_wrong_setting_is_one_line(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make_module(**settings)
    assert "\n" not in str(error.value)


def test_a_schedule_of_milestones_needs_the_number_of_steps():
    module = OptimizedModule.__new__(make_module().__class__)
    L.LightningModule.__init__(module)
    module.schedule = "milestones"
    module.cooldown_steps = 0
    module.warmup_steps = 0
    module.trainer = SimpleNamespace(max_steps=-1)
    with pytest.raises(ValueError, match=r"optim\.schedule=milestones ends at the last step: set"):
        module._last_step()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (SimpleNamespace(), "has no low-resolution images: give data.name=super_resolution"),
        (SimpleNamespace(scale=8), "flow.scale=4 does not fit data.scale=8: give the same"),
    ],
)
def test_data_of_another_scale_are_refused(data, message):
    regression = RegressionModule(RRDB(4, 1, 4, 2), (3, 16, 16), 8, 0, scale=4)
    for module in (make_module(), regression):
        with pytest.raises(ValueError, match=message):
            module.check_data(data)
        module.check_data(SimpleNamespace(scale=4))


# ------------------------------------------------------------------------------ the regression


def test_the_regression_minimises_the_absolute_error():
    torch.manual_seed(0)
    module = RegressionModule(RRDB(4, 1, 4, 2), (3, 16, 16), 8, 0, lr=1e-3)
    batch = make_batch()
    images, errors = module.errors(batch)
    expected = (images - batch[0] / 255).abs().mean((1, 2, 3))
    torch.testing.assert_close(errors, expected)
    true, made = module.reconstruct(batch)
    torch.testing.assert_close(true, batch[0] / 255)
    torch.testing.assert_close(made, images)
    trainer = make_trainer(max_steps=30, max_epochs=-1, limit_val_batches=0)
    before = [p.detach().clone() for p in module.parameters()]
    trainer.fit(module, Pairs())
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    with torch.no_grad():
        _, after = module.errors(batch)
    assert after.mean() < 0.8 * errors.mean()
    with pytest.raises(ValueError, match=r"optim\.l2=0\.1: a regression has no L2 penalty"):
        RegressionModule(RRDB(4, 1, 4, 2), (3, 16, 16), 8, 0, l2=0.1)


# ------------------------------------------------------------------------------ recipes

TINY_RUN = [
    *("preset=demo", "data.crop=16", "data.batch_size=4", "data.epoch_images=16", "data.n_val=2"),
    *("trainer.val_check_interval=2", "trainer.max_steps=4", "trainer.precision=32-true"),
    *("checkpoint.every_n_steps=2", "samples.n=2", "samples.every_n_steps=100", "logger.name=none"),
]
TINY_RRDB = [*TINY_RUN, "flow.channels=4", "flow.growth=2", "flow.n_blocks=2"]
TINY_SRFLOW = [
    *(*TINY_RUN, "flow.depth=1", "flow.hidden_channels=4", "optim.warmup_steps=1"),
    *("flow.encoder_channels=4", "flow.encoder_growth=2", "flow.encoder_blocks=2"),
]
FIGURES = {"psnr", "ssim", "psnr_y", "ssim_y", "lr_psnr"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders and results of a run of RRDB, and one of SRFlow that starts from its encoder."""
    folder = tmp_path_factory.mktemp("runs")
    for number in range(8):  # the width of low_res is odd
        save_image(folder / "images" / f"{number}.png", 32, 20, seed=number)
    data = [f"data.root={folder / 'images'}", f"data.cache={folder / 'cache'}"]
    rrdb = rrdb_bsds_x4.main([*TINY_RRDB, *data, f"run_dir={folder / 'rrdb'}"])
    encoder = f"flow.encoder_checkpoint={folder / 'rrdb'}"
    words = override([*TINY_SRFLOW, *data, encoder], ["logger.name=wandb"])
    with nobody_logged_in(folder):
        srflow = srflow_bsds_x4.main([*words, f"run_dir={folder / 'srflow'}"])
        close(0)
    return SimpleNamespace(folder=folder, data=data, rrdb=rrdb, srflow=srflow, encoder=encoder)


def test_a_run_of_rrdb_measures_images(runs):
    metrics = runs.rrdb["metrics"]
    expected = {f"test/{name}" for name in FIGURES | {"l1"}}
    assert set(metrics) == {*expected, "val/l1"}
    assert runs.rrdb["metric"] == {"name": "l1", "direction": "lower", "unit": "grey levels"}
    assert "temperature" not in runs.rrdb["protocol"]["test/psnr"]
    assert runs.rrdb["weights"]["file"] == "model.safetensors"
    assert "test/lpips" not in runs.rrdb["not_measured"]  # the demo does not ask for it


def test_a_run_of_srflow_measures_the_likelihood_and_images(runs):
    metrics = runs.srflow["metrics"]
    tested = {name for name in metrics if name.startswith("test/")}
    expected = FIGURES | {"diversity", "bpd_noisy", "release_bits"}
    assert tested == {f"test/{name}" for name in expected}
    assert metrics["test/release_bits"] == pytest.approx(
        3 * (metrics["test/bpd_noisy"] - math.log2(255)), rel=1e-4
    )
    protocol = runs.srflow["protocol"]
    assert protocol["test/psnr"]["temperature"] == 0.9
    assert protocol["test/diversity"]["n"] == 2
    assert runs.srflow["papers"] == []
    pictures = sorted(path.name for path in (runs.folder / "srflow" / "samples").iterdir())
    assert pictures == ["reconstruction-0000004.png", "samples-0000004.png"]


def test_wandb_has_the_figures_of_images(runs):
    (part,) = parts_of(runs.folder / "srflow")
    rows = [row for row in part.rows if "val/psnr" in row]
    assert [row["trainer/global_step"] for row in rows] == [2, 4]
    assert {"val/lr_psnr", "val/ssim", "val/bpd_noisy", "val/release_bits"} <= rows[0].keys()
    assert part.summary["test/diversity"] == runs.srflow["metrics"]["test/diversity"]


def test_the_encoder_starts_from_the_run_and_is_frozen_for_half_of_the_steps(runs):
    source = read_stored(runs.folder / "rrdb").weights
    first, last = [
        read_checkpoint(path)["state_dict"]
        for path in sorted(step_checkpoints(runs.folder / "srflow"))
    ][-2:]
    prefix = "flow.context_encoder."
    keys = [key for key in first if key.startswith(prefix)]
    assert len(keys) > 20
    for key in keys:
        assert torch.equal(first[key], source[key.replace(prefix, "network.encoder.")])
    assert any(not torch.equal(first[key], last[key]) for key in keys)
    recorded = runs.srflow["encoder"]
    assert recorded["experiment"] == "rrdb_bsds_x4"
    assert recorded["sha256"] == runs.rrdb["weights"]["sha256"]
    assert recorded["images"] == 16
    result = json.loads((runs.folder / "srflow" / "result.json").read_text())
    assert result["encoder"] == recorded


def test_a_resumed_run_is_the_run_that_was_never_stopped(runs, tmp_path):
    """It is stopped while the encoder is frozen, and goes on beyond that."""
    words = [*TINY_SRFLOW, *runs.data, runs.encoder, f"run_dir={tmp_path}"]
    config = experiment.load_config("srflow_bsds_x4.py", "", words)
    with pytest.raises(Stop):
        fit(config, Stop())
    assert not (tmp_path / "result.json").exists()
    again = srflow_bsds_x4.main([*words, "resume=auto"])
    assert again["metrics"] == runs.srflow["metrics"]
    assert again["encoder"] == runs.srflow["encoder"]
    resumed = read_stored(tmp_path).weights
    for key, value in read_stored(runs.folder / "srflow").weights.items():
        assert torch.equal(resumed[key], value), key


def test_a_run_with_a_frozen_encoder_keeps_its_number_of_steps(runs, tmp_path):
    """With more steps, the encoder would be frozen again once it has been trained."""
    words = override(
        [*TINY_SRFLOW, *runs.data, runs.encoder, f"run_dir={tmp_path}"],
        ["optim.schedule=constant", "trainer.max_steps=2"],
    )
    longer = override(words, ["trainer.max_steps=6", "resume=auto"])
    srflow_bsds_x4.main(words)
    line = refused(srflow_bsds_x4.main, *longer)
    assert "max_steps=2, of which optim.encoder_frozen_until=0.5 is a share: it cannot go" in line
    (tmp_path / "result.json").unlink()
    assert "was trained with trainer.max_steps=2: say the same" in refused(
        srflow_bsds_x4.main, *longer
    )


class Stop(L.Callback, Exception):
    """Ends the run behind the second step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            raise self


def fit(config, *callbacks):
    """Train as a script does, without the test."""
    data = experiment_data(config)
    flow = srflow_bsds_x4.make_flow(config, data.shape)
    module = srflow_bsds_x4.make_module(config, flow, data)
    trainer = experiment.make_trainer(config, module, *callbacks)
    experiment.fit(config, trainer, module, data)


def experiment_data(config):
    from datamodules import make_data

    return make_data(seed=config.seed, **config.data)


def _recipe(rank, words, folder):
    result = srflow_bsds_x4.main(words)
    if rank == 0:
        (folder / "metrics.json").write_text(json.dumps(result["metrics"]))


def test_two_ranks_have_the_figures_of_one(runs, tmp_path):
    """Noise, images and means depend neither on the rank nor on the number of ranks."""
    words = [*TINY_SRFLOW, *runs.data, runs.encoder, f"run_dir={tmp_path / 'run'}"]
    words += ["trainer.devices=2", "trainer.strategy=ddp"]
    processes = start(2, _recipe, words, tmp_path, log=tmp_path / "log.txt")
    for process in processes:
        process.join(180)
    assert [p.exitcode for p in processes] == [0, 0], (tmp_path / "log.txt").read_text()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics.keys() == runs.srflow["metrics"].keys()
    for key, value in runs.srflow["metrics"].items():
        assert metrics[key] == pytest.approx(value, rel=1e-3), key


def test_an_encoder_of_random_weights_is_trained_from_the_first_step(runs, tmp_path, capsys):
    words = override([*TINY_SRFLOW, *runs.data, f"run_dir={tmp_path}"], ["trainer.max_steps=2"])
    config = experiment.load_config("srflow_bsds_x4.py", "", words)
    assert config.optim.encoder_frozen_until == 0.5
    data = experiment_data(config)
    module = srflow_bsds_x4.make_module(config, srflow_bsds_x4.make_flow(config, (3, 16, 16)), data)
    assert module.encoder_frozen_until == 0.0
    result = srflow_bsds_x4.main(words)
    assert "encoder" not in result
    assert (
        "flow.encoder_checkpoint=null: the encoder starts from random weights"
        in (tmp_path / "log.txt").read_text()
    )


def refused(main, *words):
    with pytest.raises(SystemExit) as end:
        main(list(words))
    message = str(end.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_an_encoder_that_does_not_fit_is_one_line(runs, tmp_path):
    words = [*TINY_SRFLOW, *runs.data, f"run_dir={tmp_path / 'run'}"]
    other = override(words, ["flow.encoder_channels=5"])
    line = refused(srflow_bsds_x4.main, *other, runs.encoder)
    assert "does not fit the encoder of this flow" in line
    assert "give flow.scale, flow.encoder_blocks, flow.encoder_channels" in line
    line = refused(srflow_bsds_x4.main, *words, "flow.encoder_checkpoint=glow_cifar10/cpu-seed0")
    assert "is of glow_cifar10, which has no encoder of low-resolution images" in line
    both = [runs.encoder, f"init_from={runs.folder / 'srflow'}"]
    assert "gives all weights: leave out flow.encoder_checkpoint" in refused(
        srflow_bsds_x4.main, *words, *both
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_weights_that_are_not_finite_are_one_line(runs, tmp_path):
    """As those of a damaged file, with which every step would be skipped until the run ends."""
    words = [*TINY_SRFLOW, *runs.data, f"run_dir={tmp_path / 'run'}"]
    for name, key in (("rrdb", "flow.encoder_checkpoint"), ("srflow", "init_from")):
        stored = read_stored(runs.folder / name)
        wrong = next(key for key in stored.weights if "encoder.conv_in.bias" in key)
        weights = stored.weights | {wrong: torch.full_like(stored.weights[wrong], math.nan)}
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(as_safetensors(stored._replace(weights=weights)))
        line = refused(srflow_bsds_x4.main, *words, f"{key}={path}")
        assert f"{path} has values that are not finite, in " in line
        assert line.endswith(f": give another {key}")


def test_a_finished_run_is_not_extended_since_its_encoder_would_be_frozen_again(runs):
    words = [*TINY_SRFLOW, *runs.data, runs.encoder, f"run_dir={runs.folder / 'srflow'}"]
    more = override(words, ["trainer.max_steps=8", "logger.name=wandb", "resume=auto"])
    assert "optim.schedule=milestones" in refused(srflow_bsds_x4.main, *more)
    words = ["optim.schedule=constant", "flow.encoder_checkpoint=run"]
    config = compose("srflow_bsds_x4", words)
    assert run_folder.share_of_steps(config) == "optim.encoder_frozen_until=0.5"
    assert run_folder.share_of_steps(compose("srflow_bsds_x4", words[:1])) is None
    assert run_folder.share_of_steps(compose("glow_cifar10", [])) is None


def test_a_flow_starts_from_a_whole_srflow(runs, tmp_path):
    """Where the encoder of that run came from does not matter."""
    start_from = f"init_from={runs.folder / 'srflow'}"
    words = [*TINY_SRFLOW, *runs.data, start_from, f"run_dir={tmp_path}"]
    result = srflow_bsds_x4.main(override(words, ["trainer.max_steps=2"]))
    assert result["init_from"]["experiment"] == "srflow_bsds_x4"


# ------------------------------------------------------------------------------ trained models


def test_a_test_of_the_weights_alone_gives_the_recorded_figures(runs, capsys):
    for name, figure in (("rrdb", "test/l1"), ("srflow", "test/diversity")):
        evaluate.main([str(runs.folder / name)])
        printed = capsys.readouterr().out
        assert f"{figure}: {getattr(runs, name)['metrics'][figure]:.9g}, recorded" in printed
        assert "more than rounding" not in printed
        assert printed.count("recorded") >= 6


def test_a_test_at_another_temperature_compares_only_the_likelihood(runs, capsys):
    evaluate.main([str(runs.folder / "srflow"), "eval.temperature=0.5", "eval.samples=1"])
    printed = capsys.readouterr().out
    assert "test/psnr: not compared with the recorded figure, which has another protocol" in printed
    assert re.search(r"test/bpd_noisy: .* equal to the last digit", printed)
    assert "test/diversity: since it needs at least 2 samples for each image" in printed


def test_keys_of_images_are_for_models_that_enlarge_them():
    line = refused(evaluate.main, "glow_cifar10/cpu-seed0", "metrics.alexnet_weights=FILE")
    assert "metrics.alexnet_weights has no effect: glow_cifar10 enlarges no images" in line


def test_exported_folders_say_what_they_are_for(runs, tmp_path, capsys):
    for name, what in (("rrdb", "A network with"), ("srflow", "A conditional normalizing flow")):
        out = tmp_path / name
        export.main([str(runs.folder / name), f"out={out}"])
        card = (out / "README.md").read_text()
        assert "pipeline_tag: image-to-image" in card
        assert what in card
        assert "4 times as high and wide" in card
        assert "python -m reproduce.upscale FOLDER image.png" in card
        assert "model.sample" not in card
        evaluate.main([str(out), f"data.root={runs.folder / 'images'}"])
    assert "Its encoder started from the trained weights of rrdb (SHA-256" in card
    assert capsys.readouterr().out.count("reproduce.load") == 1  # of the flow alone


def test_recorded_runs_are_verified(runs, capsys):
    for name in ("rrdb", "srflow"):
        verify.main([str(runs.folder / name / "result.json")])
    assert "FAIL" not in capsys.readouterr().out


# ------------------------------------------------------------------------------ the recipes


@pytest.mark.parametrize(
    ("recipe", "words", "networks"),
    [
        ("srflow_bsds_x4", [], {"alex"}),
        ("srflow_bsds_x4", ["preset=demo"], set()),
        ("rrdb_bsds_x4", ["metrics.lpips=[]", "metrics.vgg16_weights=FILE"], {"vgg"}),
    ],
)
def test_networks_of_lpips_are_those_that_the_recipe_names(monkeypatch, recipe, words, networks):
    monkeypatch.setattr(experiment, "ImageQuality", lambda *arguments: arguments)
    [(scale, downscale, files, *_)] = experiment.image_quality(compose(recipe, words))
    assert (scale, set(files)) == (4, networks)
    assert downscale(torch.zeros(1, 3, 8, 12, dtype=torch.uint8)).shape == (1, 3, 2, 3)
    assert experiment.image_quality(compose("glow_cifar10", [])) == []


def test_scales_of_model_and_data_agree_in_every_recipe():
    for name in ("div2k_x4", "div2k_x8", "celeba_x8", "bsds_x4"):
        srflow = compose(f"srflow_{name}", [])
        rrdb = compose(f"rrdb_{name}", [])
        for config in (srflow, rrdb):
            assert config.flow.scale == config.data.scale == int(name[-1])
        for preset in ([], ["preset=demo"], ["preset=cpu"], ["preset=gpu"]):
            flow = compose(f"srflow_{name}", preset).flow
            network = compose(f"rrdb_{name}", preset).flow
            sizes = (flow.encoder_blocks, flow.encoder_channels, flow.encoder_growth)
            assert sizes == (network.n_blocks, network.channels, network.growth), (name, preset)
            assert max(flow.stacked) < flow.encoder_blocks


@pytest.mark.parametrize(
    ("recipe", "words", "comparable"),
    [
        ("srflow_div2k_x4", [], True),
        ("srflow_div2k_x8", [], True),
        ("srflow_celeba_x8", [], True),
        ("srflow_div2k_x4", ["data.scale=8"], False),
        ("srflow_div2k_x4", ["data.test_root=data/sr/Set5"], False),
        ("srflow_celeba_x8", ["data.test_low_res_root=data/other"], False),
        ("srflow_div2k_x4", ["data.test_low_res_root=data/other"], False),
        ("srflow_div2k_x4", ["preset=demo"], False),
        ("srflow_div2k_x4", ["init_from=outputs/other"], False),
    ],
)
def test_a_run_is_compared_on_the_images_of_the_paper(recipe, words, comparable):
    papers = experiment.papers_of(compose(recipe, words))
    assert len(papers) >= 4
    assert {paper["comparable"] for paper in papers} == {comparable}


def test_a_claim_is_compared_where_the_protocol_is_the_same():
    """The facts of a claim on images are those that a run of its recipe records."""
    config = compose("srflow_celeba_x8", [])
    paper = next(p for p in experiment.papers_of(config) if p["metric"] == "test/psnr")
    [callback] = experiment.image_quality(compose("srflow_celeba_x8", ["metrics.lpips=[]"]))
    protocol = callback.common_facts | callback.facts["psnr"] | {"images": 5000}
    result = {
        "metrics": {"test/psnr": 25.3},
        "config": {"data": dict(config.data)},
        "protocol": {"test/psnr": protocol},
        "budget": {"fraction": 1.0},
    }
    assert compare(result, paper)["status"] == "reproduced"
    for other, sentence in (
        ({"temperature": 0.9}, "temperature: 0.9 here, 0.8 in the paper"),
        ({"images": 100}, "images: 100 here, 5,000 in the paper"),  # a part of the set
    ):
        result["protocol"] = {"test/psnr": protocol | other}
        comparison = compare(result, paper)
        assert comparison["status"] == "other protocol"
        assert comparison["differences"] == [sentence]


# ------------------------------------------------------------------------------ ablations


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("full", []),
        ("steps12", ["flow.depth=12"]),
        ("steps8", ["flow.depth=8"]),
        ("steps4", ["flow.depth=4"]),
        ("channels196", ["flow.hidden_channels=196"]),
        ("no_transition", ["flow.transition_depth=0"]),
        ("no_injector", ["flow.injector=false"]),
    ],
)
def test_the_rows_of_the_ablation_are_those_of_the_paper(row, words):
    config = compose("srflow_div2k_x4", [])
    assert srflow_ablations.words_of(row, config) == words
    small = compose("srflow_bsds_x4", ["preset=cpu"])
    depth = {"steps12": 3, "steps8": 2, "steps4": 1}.get(row)
    if depth is not None:
        assert srflow_ablations.words_of(row, small) == [f"flow.depth={depth}"]


def test_an_ablation_trains_its_rows_once(runs, tmp_path, capsys):
    own = [word for word in TINY_SRFLOW if not word.startswith("flow.")]
    encoder = ["flow.encoder_channels=4", "flow.encoder_growth=2", "trainer.max_steps=2"]
    words = override(
        [*own, *runs.data, runs.encoder, "experiment=srflow_bsds_x4", f"out={tmp_path}"],
        [*encoder, "rows=[full,no_injector]", "trainer.val_check_interval=2"],
    )
    content = srflow_ablations.main(words)
    full, plain = content["runs"]
    assert (full["row"], plain["row"]) == ("full", "no_injector")
    assert (full["flow"]["injector"], plain["flow"]["injector"]) == (True, False)
    assert full["parameters"] > plain["parameters"]
    assert full["metrics"]["test/psnr"] > 0
    table = capsys.readouterr().out
    assert "| full | 0 |" in table
    assert json.loads((tmp_path / "ablations.json").read_text())["runs"] == content["runs"]
    assert srflow_ablations.main(words)["runs"] == content["runs"]
    assert "run 1 of 2" not in capsys.readouterr().out
    line = refused(srflow_ablations.main, *override(words, ["optim.lr=0.1"]))
    assert "give another out=FOLDER" in line


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rows=[full,no_injectors]", "rows=no_injectors is not known (did you mean no_injector?)"),
        ("experiment=glow_photos", "experiment=glow_photos is not known"),
        ("flow.depth=3", "flow.depth is not to be given here: it is what is compared"),
    ],
)
def test_a_mistake_in_an_ablation_is_one_line(word, message):
    assert message in refused(srflow_ablations.main, word)


# ------------------------------------------------------------------------------ temperatures


def test_the_figures_over_the_temperature(runs, tmp_path, capsys):
    words = [
        *(str(runs.folder / "srflow"), f"network={runs.folder / 'rrdb'}", f"root={runs.folder}"),
        *("sets=[images]", "temperatures=[0.9,0]", "samples=2", f"out={tmp_path}"),
    ]
    content = temperatures.main(words)
    [part] = content["sets"].values()
    assert part["images"] == 8
    models = [(row["model"], row["temperature"]) for row in part["rows"]]
    assert models == [("bicubic", None), ("RRDB", None), ("SRFlow", 0.0), ("SRFlow", 0.9)]
    figures = [row["metrics"] for row in part["rows"]]
    assert [set(row) for row in figures] == [*[FIGURES] * 3, FIGURES | {"diversity"}]
    assert content["model"] == "srflow"  # without this machine's paths
    assert "| images | 8 | SRFlow | 0.9 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "temperatures.json").read_text()) == content
    with Image.open(tmp_path / "temperatures.png") as picture:
        assert picture.size == (1320, 396)  # three panels: LPIPS was not measured
    # The same figures as those of a test on these images.
    bicubic = [
        psnr_rgb(upscale(downscale(image[None], 4), 4), image[None]).item()
        for image in EvaluationSet(runs.folder, "images", 4)
    ]
    assert figures[0]["psnr"] == pytest.approx(sum(bicubic) / 8)


def test_samples_that_are_not_finite_have_no_figure():
    images = SuperResolved(
        torch.rand(1, 3, 4, 4), torch.rand(1, 3, 16, 16), torch.full((2, 1, 3, 16, 16), math.nan)
    )
    figures = temperatures.measured(images, {"psnr": lambda *images: torch.zeros(1)})
    assert set(figures) == {"psnr", "diversity"}
    assert temperatures.means([figures, {"psnr": 20.0, "diversity": 1.0}]) == {
        "psnr": None,
        "diversity": None,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["temperatures=[-1]"], "temperatures=[-1.0]: give different numbers of at least 0"),
        (["temperatures=[1,1]"], "temperatures=[1.0, 1.0]: give different numbers of at least 0"),
        (["samples=0"], "samples=0 is out of range: give at least 1"),
        (["network=glow_cifar10/cpu-seed0"], "is of glow_cifar10: give a run of rrdb_..."),
        (["sets=[Set15]"], "Set15 is not in"),
    ],
)
def test_a_mistake_about_temperatures_is_one_line(runs, words, message, tmp_path):
    own = [str(runs.folder / "srflow"), f"root={runs.folder}", f"out={tmp_path / 'out'}"]
    assert message in refused(temperatures.main, *own, *words)
    assert not (tmp_path / "out").exists()


def test_temperatures_are_of_a_flow(runs):
    line = refused(temperatures.main, str(runs.folder / "rrdb"), f"root={runs.folder}")
    assert "is of rrdb_bsds_x4: give a run of srflow_..." in line


def test_the_page_names_the_photographs_and_the_command_for_the_weights(runs):
    run = runs.srflow | {"config": plain(compose("srflow_bsds_x4", []))}
    assert data_name(run) == "photographs x4: BSDS500/train, BSDS500/test; test BSDS500/val"
    assert load_call(run) == "python -m reproduce.upscale srflow_bsds_x4/srflow image.png"
