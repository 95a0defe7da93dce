"""docs/dashboards.md names every key that W&B gets, and a run of several claims has all of them."""

import json
import re
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from sketch_denoiser import Denoiser, psnr
from test_glow_scripts import run as run_glow
from test_objective import settings
from test_wandb import TINY, nobody_logged_in
from torch import nn
from torch.nn import functional as F
from wandb_file import parts_of

import results
from datamodules import make_data
from lightning_modules.metrics import image_mean
from reproduce import experiment, realnvp_cifar10, realnvp_moons
from reproduce.config import CONFIGS, override
from reproduce.loggers import close
from results.metrics import QUANTITIES, Metric, label_of

PAGE = (Path(__file__).parents[1] / "docs" / "dashboards.md").read_text(encoding="utf-8")
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("does not have many workers", "LeafSpec.* is deprecated")
]
CLAIM = {
    "data": "photos",
    "dataset": "photographs",
    "decimals": 2,
    "protocol": {},
    "tolerance": 0.1,
    "train": None,
    "compared": {},
    "split": "test",
}
VALUES = {"psnr": 10.0, "ssim": 0.99, "lpips": 0.001, "fid": 40.0, "kid": 0.1}
CLAIMS = {
    f"made_up.{name}": CLAIM
    | {
        "id": f"made_up.{name}",
        "metric": f"test/{name}",
        "value": value,
        "direction": QUANTITIES[name].direction,
        "unit": QUANTITIES[name].unit,
    }
    for name, value in VALUES.items()
}


class Restorer(Denoiser):
    """A denoiser with three metrics; SSIM and LPIPS are stand-ins."""

    metrics = (
        Metric("psnr", "higher", "dB"),
        Metric("ssim", "higher", ""),
        Metric("lpips", "lower", ""),
    )

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.eval_means = nn.ModuleDict({metric.name: image_mean() for metric in self.metrics})

    def _evaluate(self, batch, split):
        clean, noisy = self.noisy(batch)
        error = F.mse_loss(self.denoised(noisy), clean, reduction="none").flatten(1).mean(1)
        values = {"psnr": psnr(error), "ssim": 1 - error, "lpips": error}
        for name, mean in self.eval_means.items():
            mean.update(values[name])
            self.log(f"{split}/{name}", mean, on_step=False, on_epoch=True)


class Quality(L.Callback):
    """Logs a stand-in for FID as a callback does: on few samples at times, on many in the test.

    It comes after the callback that compares with the paper.
    """

    def on_validation_epoch_end(self, trainer, pl_module):
        if trainer.global_step % 6 == 0:
            pl_module.log("val/fid_5k", torch.tensor(50.0))
            pl_module.log("val/kid", torch.tensor(0.25))

    def on_test_epoch_end(self, trainer, pl_module):
        pl_module.log("test/fid", torch.tensor(42.5))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A run of nine steps with five claims: what W&B got, and the result."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["trainer.max_steps=9", "logger.name=wandb", "trainer.log_every_n_steps=1"]
    config = OmegaConf.merge(settings(folder, *words), {"paper": list(CLAIMS)})
    data = make_data(seed=config.seed, **config.data)
    torch.manual_seed(0)
    module = Restorer.of(config, nn.Conv2d(3, 3, 3, padding=1), data)
    with nobody_logged_in(folder.parent), pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "load_claim", lambda name, root=None: CLAIMS[name])
        trainer = experiment.make_trainer(config, module, Quality())
        experiment.fit(config, trainer, module, data)
        result = experiment.record(config, trainer, module, data)
        close(0)
    (part,) = parts_of(folder)
    return part, result


def test_every_metric_of_a_claim_has_its_figure_the_papers_and_the_gap(compared):
    part, result = compared
    metrics = result["metrics"]
    assert metrics["test/fid"] == 42.5
    for name in ("psnr", "ssim", "lpips", "fid"):
        ours = metrics[f"test/{name}"]
        assert part.summary[f"test/{name}"] == pytest.approx(ours)
        assert part.summary[f"paper/{name}"] == VALUES[name]
        assert part.summary[f"gap/{name}"] == pytest.approx(ours - VALUES[name])
    assert part.summary["paper/kid"] == VALUES["kid"]
    assert "test/kid" not in part.summary
    statuses = {c["metric"]: c["status"] for c in result["comparisons"]}
    assert statuses["test/kid"] == "not measured"
    assert statuses["test/psnr"] == "reproduced"
    assert part.summary["status"] == "reproduced"  # of the first claim
    assert {"reproduced", "not measured"} <= set(part.run.tags)
    (path,) = (part.folder / "files" / "media" / "table").glob("comparison_*.table.json")
    rows = {row[1]: row[2:5] for row in json.loads(path.read_text())["data"]}
    assert rows["test/fid"] == [40.0, 42.5, 2.5]
    assert rows["test/kid"] == [0.1, None, None]


def test_a_validation_has_the_gaps_of_what_it_has_measured(compared):
    """Also of what a later callback has logged; and FID-5k is not compared with FID."""
    part, _ = compared
    for name in ("psnr", "ssim", "lpips"):
        rows = [row for row in part.rows if f"val/{name}" in row]
        gaps = {
            row["trainer/global_step"]: row[f"val/{name}"] - row[f"gap/{name}"]
            for row in rows
            if f"gap/{name}" in row
        }
        assert gaps == pytest.approx(dict.fromkeys((3, 6, 9), VALUES[name]), rel=1e-5)
    kid = {
        row["trainer/global_step"]: row["gap/kid"] for row in part.rows if "gap/kid" in row
    }  # the callback measures it at steps 0 and 6
    assert kid == pytest.approx({6: 0.15})
    few = [row["trainer/global_step"] for row in part.rows if "val/fid_5k" in row]
    assert few == [6]
    assert not any("gap/fid" in row for row in part.rows)
    assert {row["paper/fid"] for row in part.rows if "paper/fid" in row} == {40.0}


@pytest.fixture(scope="module")
def logged(compared, tmp_path_factory):
    """The keys that four experiments have logged, with those of their summaries."""
    root = tmp_path_factory.mktemp("runs")
    points = ["flow.hidden_channels=4", "flow.n_couplings=2", "data.n_train=256", "data.n_val=16"]
    points += ["data.n_test=16", "samples.n=16", "trainer.max_steps=2", "logger.name=wandb"]
    with nobody_logged_in(root):
        realnvp_moons.main([*points, f"run_dir={root / 'moons'}", "trainer.log_every_n_steps=1"])
        words = ["eval.noise_samples=2", "trainer.max_steps=3", f"run_dir={root / 'realnvp'}"]
        realnvp_cifar10.main(override(TINY, words))
        words = ["logger.name=wandb", "trainer.log_every_n_steps=1"]
        run_glow("glow_cifar10_conditional", root / "glow", *words)
    parts = [compared[0]]
    for name in ("moons", "realnvp", "glow"):
        parts += parts_of(root / name)
    found = [key for part in parts for row in part.rows for key in row]
    found += [key for part in parts for key in part.summary]
    nested = re.compile(r"^(pictures/\w+|comparison)\..*")
    return {nested.sub(r"\1", key) for key in found if not key.startswith("_")}


def documented():
    """The keys in the first table of the page, as patterns."""
    section = PAGE.partition("## What is logged")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)


PARTS = {"<metric>": r"[a-z]\w*?", "<n>": r"\d+", "<optimizer>": r"\w+", "<T>": r"[\d.]+"}


def matches(key, pattern):
    text = re.escape(pattern)
    for name, part in {**PARTS, "<name>": r"\w+"}.items():
        text = text.replace(re.escape(name), part)
    return re.fullmatch(text, key) is not None


def test_the_page_names_every_key_that_is_logged(logged):
    assert len(logged) > 40
    unknown = [key for key in logged if not any(matches(key, p) for p in documented())]
    assert sorted(unknown) == []


def test_every_key_of_the_page_is_logged(logged):
    noted_by = {"note/<metric>"}  # tests/test_wandb.py reads it from a real file
    unused = [p for p in documented() if not any(matches(key, p) for key in logged)]
    assert set(unused) == noted_by


def test_the_keys_of_the_report_and_of_sweeps_are_keys_of_the_first_table():
    rest = PAGE.partition("## A report")[2]
    keys = set(
        re.findall(r"`((?:train|val|test|gap|paper|best|note|samples|trainer)/[^`<]+)`", rest)
    )
    assert len(keys) > 12
    assert [key for key in keys if not any(matches(key, p) for p in documented())] == []


def test_figures_on_few_samples_are_labelled_as_on_the_results_page():
    assert label_of("val/fid_5k") == "FID-5k"
    assert "`val/fid_5k` is FID-5k" in PAGE
    assert re.search(r"^\| FID-5k \| line plot \| `val/fid_5k` \|$", PAGE, flags=re.MULTILINE)


def test_the_page_names_the_metric_and_goal_of_every_sweep():
    rows = re.findall(r"^\| [^|]+ \| `(val/\w+)` \| (\w+) \|$", PAGE, flags=re.MULTILINE)
    sweeps = [yaml.safe_load(path.read_text()) for path in (CONFIGS / "sweeps").glob("*.yaml")]
    metrics = {tuple(sweep["metric"].values()) for sweep in sweeps if "metric" in sweep}
    assert metrics == set(rows)
