"""The scripts of Glow, and of RealNVP on photographs: tiny runs in-process, on photographs."""

import csv
import json
import math
import os
import shutil
import signal
from importlib import import_module

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from PIL import Image
from test_resume import same
from torch.nn import functional as F

from datamodules import make_data
from flows.likelihood import bits_per_dim
from flows.normalization import uninitialized
from lightning_modules.noise import image_noise
from reproduce import experiment, load
from reproduce.config import compose, override
from reproduce.run_folder import newest_checkpoint

TINY = [  # four steps an epoch, validated after every third
    *(
        "preset=demo",
        "logger.name=none",
        "data.size=8",
        "data.n_train=64",
        "data.batch_size=16",
        "data.n_val=24",
    ),
    *(
        "data.n_test=40",
        "samples.n=14",
        "samples.every_n_steps=100",
        "trainer.val_check_interval=3",
    ),
    *(
        "checkpoint.every_n_steps=2",
        "trainer.precision=32-true",
        "trainer.max_steps=3",
        "optim.warmup_steps=1",
    ),
    "flow.hidden_channels=4",
]
GLOWS = {  # bits of a pixel, claim
    "glow_cifar10": (8, ("glow.cifar10", 3.35)),
    "glow_cifar10_modern": (8, None),
    "glow_cifar10_additive5bit": (5, ("glow.cifar10_additive5bit", 1.67)),
    "glow_cifar10_conditional": (5, None),
    "glow_photos": (8, None),
}
SCRIPTS = {**GLOWS, "realnvp_photos": (8, None)}
LARGE_STEPS = {
    "glow_cifar10_conditional": ["optim.lr=0.01"]
}  # so that one sees the class in samples


def run(name, folder, *arguments):
    """What the script returns."""
    own = ["flow.n_blocks=1"] if name.startswith("realnvp") else ["flow.depth=1"]
    own += ["optim.cooldown_steps=1"] if name == "glow_cifar10_modern" else []
    return import_module(f"reproduce.{name}").main(
        override([*TINY, *own], [*arguments, f"run_dir={folder}"])
    )


def mistake(name, folder, *arguments):
    """The one line that a wrong command line answers with."""
    with pytest.raises(SystemExit) as stop:
        run(name, folder, *arguments)
    assert isinstance(stop.value.code, str), "no mistake"
    assert "\n" not in stop.value.code
    return stop.value.code


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Name of a script -> folder of a run of three steps, its result, the tested module."""
    runs = {}
    root = tmp_path_factory.mktemp("runs")

    def get(name):
        if name not in runs:
            script = import_module(f"reproduce.{name}")
            modules = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    script, "fit", lambda *given: modules.append(given[2]) or experiment.fit(*given)
                )
                runs[name] = (
                    root / name,
                    run(name, root / name, *LARGE_STEPS.get(name, [])),
                    *modules,
                )
        return runs[name]

    return get


# ---------------------------------------------------------------------- results


@pytest.mark.parametrize("name", SCRIPTS)
def test_result(name, finished):
    folder, result, _ = finished(name)
    n_bits, claim = SCRIPTS[name]
    assert json.loads((folder / "result.json").read_text()) == result
    assert (result["experiment"], result["images"], result["preset"]) == (name, 48, "demo")
    assert result["config"]["data"]["n_bits"] == n_bits
    if claim is None:
        assert result["papers"] == []
    else:  # other images than the paper's
        rest = {"metric": "test/bpd", "decimals": 2, "direction": "lower", "comparable": False}
        assert result["papers"] == [{"claim": claim[0], "value": claim[1], **rest}]
    assert (result["gap"], result["status"]) == (None, "-")
    assert result["budget"]["of"] == compose(name, []).budget.images
    averaged = name == "glow_cifar10_modern"
    assert result["tested"]["weights"] == ("averaged with decay 0.95" if averaged else "raw")
    finite = {f"samples/finite_T{t:g}" for t in (0, 0.5, 0.7, 0.9, 1)}
    more = {
        "glow_cifar10_conditional": {"test/accuracy"},
        "realnvp_photos": {"test/bpd_reestimated"},
    }
    assert set(result["metrics"]) == {"val/bpd", "test/bpd", *finite, *more.get(name, ())}
    assert all(math.isfinite(value) for value in result["metrics"].values())


@pytest.mark.parametrize("name", GLOWS)
def test_a_glow_begins_at_about_the_bits_of_its_data(name, finished):
    """A uniform density costs n_bits; an untrained Glow with set actnorms is not far off."""
    with (finished(name)[0] / "curve.csv").open() as file:
        first, last = csv.DictReader(file)
    assert (first["step"], last["step"]) == ("0", "3")
    assert float(first["val/bpd"]) == pytest.approx(GLOWS[name][0], abs=0.5)
    assert float(last["val/bpd"]) < float(first["val/bpd"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_load_gives_the_tested_flow(name, finished):
    """It is the tested flow, bit for bit; its bits/dim, taken here by hand, are test/bpd."""
    folder, result, module = finished(name)
    flow = load(folder).flow
    assert not flow.training
    data = make_data(seed=0, **result["config"]["data"])
    data.setup()
    images, index, *context = map(torch.stack, zip(*tensors(data.test), strict=True))
    x, _ = data.dequantizer(images, image_noise(index, data.shape, 0))
    with torch.no_grad():
        log_prob = flow.log_prob(x, *context)
        assert torch.equal(log_prob, module.flow.eval().log_prob(x, *context))
    ours = bits_per_dim(log_prob, 192, data.n_bits).mean().item()
    assert ours == pytest.approx(result["metrics"]["test/bpd"], rel=1e-6)


def tensors(images):
    return [tuple(map(torch.as_tensor, images[0, i])) for i in range(len(images))]


def test_samples_of_a_conditional_glow_have_a_class_a_column(finished):
    """Of 14 samples each photograph has two, which are equal at temperature 0."""
    folder, result, _ = finished("glow_cifar10_conditional")
    temperatures = result["config"]["samples"]["temperatures"]
    cell = 8 * (8 + 2)  # an image of 8 and a border of 2, each pixel 8 x 8
    picture = np.asarray(Image.open(folder / "samples" / "samples-0000003.png"))
    margin = picture.shape[1] - (14 * cell + 16)  # the temperatures
    assert picture.shape[0] == len(temperatures) * cell + 16
    assert 40 < margin < 100
    picture = picture[:, margin:]
    row = picture[16:cell]
    columns = [row[:, 16 + i * cell : (i + 1) * cell] for i in range(14)]
    assert all(np.array_equal(columns[i], columns[i + 7]) for i in range(7))
    assert len({column.tobytes() for column in columns}) == 7
    flow = load(folder / "checkpoints" / "step-00000003.ckpt").flow
    means = flow.sample(1, 0.0, torch.arange(7))[0].detach()
    for column, mean in zip(columns, means, strict=False):
        shown = 8 * (mean * 32).floor().clamp(0, 31).permute(1, 2, 0).numpy()  # of 5 bits
        assert (column[::8, ::8] != shown).mean() < 0.01


# ---------------------------------------------------------------------- going on


class Stop(L.Callback):
    """Sends SIGTERM in a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step + 1 == self.step:
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # it would end the tests
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("name", ["glow_cifar10_modern", "glow_cifar10_conditional"])
def test_an_interrupted_glow_ends_bit_for_bit_as_if_it_had_not_been(
    name, tmp_path, monkeypatch, capsys
):
    """SIGTERM comes in the second epoch, once with averaged weights and once with classes."""
    script = import_module(f"reproduce.{name}")
    given = ["trainer.max_steps=7", "optim.warmup_steps=2"]
    given += ["optim.cooldown_steps=3"] if name == "glow_cifar10_modern" else []
    whole = run(name, tmp_path / "whole", *given)
    with monkeypatch.context() as patch:
        patch.setattr(
            script, "make_trainer", lambda *arguments: experiment.make_trainer(*arguments, Stop(5))
        )
        with pytest.raises(SystemExit) as stop:
            run(name, tmp_path / "parts", *given)
    assert stop.value.code == 75
    assert (
        "stopped at step 5, which is saved; go on with: python reproduce/"
        in capsys.readouterr().err
    )
    parts = run(name, tmp_path / "parts", *given, "resume=auto")
    assert parts["metrics"] == whole["metrics"]
    a, b = (newest_checkpoint(tmp_path / part)[1] for part in ("whole", "parts"))
    assert a["global_step"] == b["global_step"] == 7
    assert a["paperflows"]["commit"] == b["paperflows"]["commit"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(a[part], b[part]), part
    assert ("current_model_state" in a) == (name == "glow_cifar10_modern")
    for part in {"current_model_state", "averaging_state"} & set(a):
        assert same(a[part], b[part]), part
    initialized = [value for key, value in b["state_dict"].items() if key.endswith(".initialized")]
    assert len(initialized) == 9  # a level: one in the step, two in its network
    assert all(initialized)
    assert not uninitialized(load(tmp_path / "parts").flow)


def test_a_checkpoint_of_realnvp_is_no_glow_s(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(
        finished("realnvp_photos")[0], folder, ignore=shutil.ignore_patterns("result.json")
    )
    line = mistake("glow_photos", folder, "resume=auto")
    assert "is of realnvp_photos, not of glow_photos: give another run_dir" in line


def test_a_checkpoint_of_another_glow_is_refused(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(
        finished("glow_photos")[0], folder, ignore=shutil.ignore_patterns("result.json")
    )
    line = mistake(
        "glow_photos", folder, "resume=auto", "flow.coupling=additive", "flow.permutation=shuffle"
    )
    assert "trained with flow.coupling=affine flow.permutation=invertible: say the same" in line


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        (
            "glow_photos",
            ["flow.depht=3"],
            "flow.depht is not a known key (did you mean flow.depth?)",
        ),
        (
            "glow_photos",
            ["flow.permutation=inv"],
            "flow.permutation=inv is not known: give one of reverse, shuffle",
        ),
        (
            "glow_photos",
            ["flow.coupling=affin"],
            "flow.coupling=affin is not known: give one of affine, additive",
        ),
        ("glow_photos", ["data.size=12"], "flow.n_levels=3 halves a 12x12 image to odd sizes"),
        (
            "glow_photos",
            ["flow.depth=0"],
            "flow.depth=0 is out of range: give a whole",
        ),
        ("glow_photos", ["flow.n_classes=7"], "flow.n_classes is not a known key"),
        ("glow_photos", ["optim.l2=0.1"], "Glow has no L2 penalty"),
        (
            "glow_cifar10",
            ["data.n_bits=9"],
            "data.n_bits=9 does not fit 8-bit integers: give 1 to 8",
        ),
        ("glow_cifar10_conditional", ["data.labels=false"], "give data.labels=true"),
        (
            "glow_cifar10_conditional",
            ["flow.n_classes=10"],
            "flow.n_classes=10, but Photos has 7: give flow.n_classes=7",
        ),
        (
            "glow_cifar10_conditional",
            ["optim.class_weight=-1"],
            "optim.class_weight=-1.0 is out of range",
        ),
        (
            "glow_cifar10_modern",
            ["trainer.max_steps=-1", "trainer.max_epochs=1"],
            "set trainer.max_steps",
        ),
        (
            "glow_cifar10_modern",
            ["trainer.max_steps=40", "optim.cooldown_steps=50"],
            "optim.warmup_steps=1 and optim.cooldown_steps=50 are more than trainer.max_steps=40: "
            "give these as well, for example optim.warmup_steps=4 optim.cooldown_steps=4",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_line(name, arguments, said, tmp_path):
    assert said in mistake(name, tmp_path / "run", *arguments)


# ---------------------------------------------------------------------- golden losses

GOLDEN = {
    "glow_cifar10": [-111.14779480, -150.03568500, -181.83635148, -205.64297205, -238.61102364],
    "glow_cifar10_modern": [
        -112.08768368,
        -152.46446778,
        -185.69709802,
        -213.47088716,
        -244.68247335,
    ],
    "glow_cifar10_additive5bit": [
        -117.73346639,
        -126.97442930,
        -156.38506994,
        -180.30737888,
        -199.51262863,
    ],
    "glow_cifar10_conditional": [
        -113.99731890,
        -123.21099672,
        -153.35498566,
        -177.32018968,
        -196.89100340,
    ],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_losses(name):
    """Five steps of a small model, whose actnorms are set by dark images.

    A change that moves these losses moves every number of the results page.
    """
    config = compose(name, ["preset=demo", "flow.depth=2", "flow.hidden_channels=8"])
    torch.manual_seed(0)
    flow = import_module(f"reproduce.{name}").make_flow(config, (3, 8, 8)).double()
    draw = np.random.Generator(np.random.PCG64(0))
    q = draw.integers(2**config.data.n_bits, size=(8, 3, 8, 8)) // 2
    u = draw.random((8, 3, 8, 8))
    x = torch.from_numpy((q + u) / 2**config.data.n_bits)
    classes = torch.from_numpy(draw.integers(7, size=8))
    flow.initialize(x.repeat(4, 1, 1, 1))  # the moments of x, of which there would be too few
    optimizer = torch.optim.Adamax(flow.parameters(), lr=0.01, betas=tuple(config.optim.betas))
    losses = []
    for _ in range(5):
        if flow.n_classes is None:
            loss = -flow.log_prob(x).mean()
        else:
            log_prob, logits = flow.log_prob_and_class_logits(x, classes)
            loss = -log_prob.mean() + config.optim.class_weight * 192 * F.cross_entropy(
                logits, classes
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(GOLDEN[name], rel=1e-4)
