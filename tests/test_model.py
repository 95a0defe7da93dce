"""`reproduce.load`: what a trained model is loaded from, what it knows and what it computes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import safetensors.torch
import torch
from cases import TINY
from PIL import Image

import results
from datamodules import make_data
from flows.likelihood import bits_per_dim
from lightning_modules.callbacks.samples import NOT_FINITE, as_levels
from lightning_modules.noise import image_noise
from reproduce import glow_cifar10_conditional, load, realnvp_cifar10, realnvp_moons
from reproduce.config import ConfigError, override
from reproduce.export import main as export
from reproduce.run_folder import read_checkpoint
from reproduce.stored import as_safetensors, read_stored

PHOTOS = ("astronaut", "cat", "coffee", "rocket", "motorcycle", "china", "flower")
GLOW = [
    *(word for word in TINY if not word.startswith(("flow.n_blocks", "eval.bn"))),
    *("flow.depth=1", "flow.n_levels=2", "data.n_bits=5", "optim.lr=0.01", "optim.warmup_steps=1"),
]
MOONS = [
    *("flow.n_couplings=1", "flow.hidden_channels=2", "data.n_train=64", "data.n_val=16"),
    *("data.n_test=16", "data.batch_size=32", "samples.n=8", "logger.name=none"),
]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three finished runs of a few steps, as folders by name."""
    root = tmp_path_factory.mktemp("runs")
    for name, script, words in (
        ("realnvp", realnvp_cifar10, TINY),
        ("glow", glow_cifar10_conditional, GLOW),
        ("moons", realnvp_moons, MOONS),
    ):
        own = ["trainer.max_steps=3", "samples.every_n_steps=100", f"run_dir={root / name}"]
        script.main(override(words, own))
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def realnvp(runs):
    return load(runs["realnvp"])


@pytest.fixture
def glow(runs):
    return load(runs["glow"])


def test_images(model):
    """The test images of a run as integers from 0 to 255, and their labels."""
    data = make_data(seed=0, **model.config.data)
    data.setup()
    items = [data.test[0, i] for i in range(len(data.test))]
    images = torch.stack([item[0] for item in items]) << (8 - model.n_bits)
    labels = torch.tensor([item[2] for item in items]) if data.labels else None
    return images, labels


test_images.__test__ = False


# ---------------------------------------------------------------------- what it knows


def test_a_model_knows_what_it_was_trained_on(glow, realnvp, runs):
    assert (glow.shape, glow.n_bits, glow.class_names) == ((3, 8, 8), 5, PHOTOS)
    assert (realnvp.shape, realnvp.n_bits, realnvp.class_names) == ((3, 8, 8), 8, ())
    assert glow.experiment == "glow_cifar10_conditional"
    assert glow.config.flow.depth == 1
    assert glow.result == json.loads((runs["glow"] / "result.json").read_text())
    assert glow.commit == glow.result["commit"]
    assert glow.stored.path == runs["glow"] / "model.safetensors"
    for flow in (glow.flow, realnvp.flow):
        assert not flow.training
        assert {parameter.requires_grad for parameter in flow.parameters()} == {False}
        assert {parameter.dtype for parameter in flow.parameters()} == {torch.float32}


def test_the_names_of_classes_come_from_the_checkpoint(runs, tmp_path):
    """As those of a folder of images, which may be gone; an older checkpoint lacks them."""
    path = runs["glow"] / "checkpoints" / "best.ckpt"
    checkpoint = read_checkpoint(path)
    origin = checkpoint["paperflows"]
    assert (origin["n_bits"], tuple(origin["class_names"])) == (5, PHOTOS)
    origin["class_names"] = list("ABCDEFG")
    origin["config"]["data"]["name"] = "folder"
    torch.save(checkpoint, tmp_path / "own.ckpt")
    assert load(tmp_path / "own.ckpt").class_names == tuple("ABCDEFG")

    del origin["class_names"], origin["n_bits"]
    origin["config"]["data"]["name"] = "photos"
    torch.save(checkpoint, tmp_path / "older.ckpt")
    older = load(tmp_path / "older.ckpt")
    assert (older.n_bits, older.class_names) == (5, PHOTOS)
    del origin["config"]["data"]["n_bits"]  # of runs from before the key
    torch.save(checkpoint, tmp_path / "oldest.ckpt")
    assert load(tmp_path / "oldest.ckpt").n_bits == 8
    origin["config"]["data"]["name"] = "photoss"
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ConfigError, match=r"data.name=photoss, which is not known here: use its"):
        load(tmp_path / "other.ckpt")


# ---------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("name", ["realnvp", "glow"])
def test_bits_per_dim_are_those_of_the_runs_test(name, runs):
    model = load(runs[name])
    images, labels = test_images(model)
    values = model.bits_per_dim(images, labels)
    assert values.shape == (40,)
    assert not values.requires_grad
    assert values.double().mean().item() == pytest.approx(model.result["metrics"]["test/bpd"], 1e-6)
    others = model.bits_per_dim(images.numpy(), labels, batch_size=7)
    torch.testing.assert_close(others, values, rtol=1e-6, atol=0)

    keys = torch.tensor([31, 7])
    part = model.bits_per_dim(images[keys], None if labels is None else labels[keys], keys=keys)
    torch.testing.assert_close(part, values[keys], rtol=1e-6, atol=0)


def test_bits_per_dim_are_the_mean_over_noise_samples(realnvp):
    images, _ = test_images(realnvp)
    by_hand = []
    for k in range(3):
        noise = image_noise(torch.arange(40), (3, 8, 8), seed=5, k=k)
        x, _ = realnvp.dequantizer(images, noise)
        by_hand.append(bits_per_dim(realnvp.flow.log_prob(x), 192, 8))
    several = realnvp.bits_per_dim(images, noise_samples=3, seed=5)
    torch.testing.assert_close(several, torch.stack(by_hand).mean(0), rtol=1e-6, atol=0)
    assert not torch.equal(by_hand[0], by_hand[1])


def test_the_weights_are_tested_again(runs):
    """By Lightning, from the weights alone: the run's own figures."""
    model = load(runs["realnvp"])
    data = make_data(seed=0, **model.config.data)
    trainer = L.Trainer(
        logger=False, enable_progress_bar=False, accelerator="cpu", enable_model_summary=False
    )
    [figures] = trainer.test(model.module(data), datamodule=data, verbose=False)
    assert figures == {key: model.result["metrics"][key] for key in figures}
    assert set(figures) == {"test/bpd", "test/bpd_reestimated"}


# ---------------------------------------------------------------------- samples


def test_a_sample_depends_on_its_seed_and_number_alone(glow):
    whole = glow.draw(12, 0.7, seed=3)
    parts = [glow.draw(5, 0.7, seed=3, batch_size=2), glow.draw(7, 0.7, seed=3, first=5)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=0)
    assert not torch.allclose(whole[0], whole[7], atol=1e-2)  # both are of the first class
    assert not torch.allclose(whole[0], glow.draw(1, 0.7, seed=4)[0], atol=1e-2)
    zero = glow.draw(14, 0.0)
    torch.testing.assert_close(zero[:7], zero[7:])
    assert not torch.allclose(zero[0], zero[1])


def test_samples_have_the_class_that_is_asked_for(glow):
    in_turn = glow.draw(14, 0.5)
    for number, name in enumerate(PHOTOS):
        own = glow.draw(14, 0.5, label=name)
        torch.testing.assert_close(own[[number, 7 + number]], in_turn[[number, 7 + number]])
        assert torch.equal(own, glow.draw(14, 0.5, label=number))
    assert not torch.allclose(glow.draw(1, 0.5, label=0), glow.draw(1, 0.5, label=1))


def test_samples_are_images(glow):
    images = glow.sample(9, 0.7)
    assert (images.dtype, images.shape, images.requires_grad) == (torch.uint8, (9, 3, 8, 8), False)
    assert (images.numpy() % 8 == 0).all()  # of 5 bits, shown with 8
    expected = (glow.draw(9, 0.7) * 32).floor().clamp(0, 31) * 8
    assert torch.equal(images, expected.to(torch.uint8))
    assert len(images.unique()) > 10


def test_samples_that_are_not_finite_are_seen(glow, monkeypatch):
    inverse = glow.flow.inverse

    def broken(latents, context=None):
        x, log_det = inverse(latents, context)
        x[0, 1, 2, 3] = float("inf")
        return x, log_det

    whole = glow.sample(2)
    monkeypatch.setattr(glow.flow, "inverse", broken)
    assert glow.draw(2)[0].isnan().nonzero().tolist() == [[1, 2, 3]]
    images = glow.sample(2)
    assert images[0, :, 2, 3].tolist() == list(NOT_FINITE)
    assert torch.equal(images[1], whole[1])


def test_images_are_made_of_one_batch_of_floats_at_a_time(glow, monkeypatch):
    """Else 50,000 images would take five times their memory."""
    sizes = []

    def noted(images, n_bits):
        sizes.append(len(images))
        return as_levels(images, n_bits)

    monkeypatch.setattr("reproduce.model.as_levels", noted)
    images = glow.sample(5, batch_size=2)
    assert sizes == [0, 2, 2, 1]
    assert torch.equal(images, as_levels(glow.draw(5, batch_size=2), glow.n_bits))


SAMPLE_IN_A_LOOP = r"""
import re, sys
from pathlib import Path
from reproduce import load

def peak():  # the most memory that this process has had, in megabytes
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

model = load(sys.argv[1])
model.sample(20)
before = peak()
kept = [model.sample(20, first=20 * i) for i in range(50)]
kept += [model.flow.sample(20) for _ in range(50)]
print(sum(map(len, kept)), kept[-1].numpy().dtype, peak() - before)
model.flow.requires_grad_(True)
kept += [model.sample(20) for _ in range(20)]
before = peak()
kept += [model.flow.sample(20) for _ in range(20)]
print(kept[-1].requires_grad, kept[-21].requires_grad, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sampling_keeps_memory_flat(runs):
    """2,000 images are drawn in a loop and kept. With a graph 400 of them exceed the bound.

    In a process of its own, since an earlier test's memory may be used again.
    """
    bound = 25  # megabytes
    command = [sys.executable, "-c", SAMPLE_IN_A_LOOP, runs["realnvp"]]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    flat, with_graph = map(str.split, done.stdout.splitlines())
    assert flat[:2] == ["2000", "float32"]
    assert float(flat[2]) < bound
    assert with_graph[:2] == ["True", "False"]
    assert float(with_graph[2]) > bound


# ---------------------------------------------------------------------- latents


def test_images_come_back_from_their_latents(glow, realnvp):
    for model in (glow, realnvp):
        images, labels = test_images(model)
        latents = model.encode(images, labels, batch_size=16)
        assert [tuple(z.shape[1:]) for z in latents] == list(model.flow.latent_shapes())
        assert torch.equal(model.decode(latents, labels, batch_size=9), images)
    images, labels = test_images(glow)
    latents = glow.encode(images, labels)
    assert not torch.equal(glow.decode(latents, (labels + 1) % 7), images)


def test_nothing_in_gives_nothing_out(glow, realnvp):
    none = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
    assert glow.sample(0).shape == (0, 3, 8, 8)
    assert glow.bits_per_dim(none, []).shape == (0,)
    assert glow.decode(glow.encode(none, []), []).shape == (0, 3, 8, 8)
    assert realnvp.bits_per_dim(none.numpy()).shape == (0,)


def test_points_are_drawn_too(runs):
    moons = load(runs["moons"])
    assert (moons.shape, moons.n_bits, moons.dequantizer) == ((2,), None, None)
    assert moons.draw(5).shape == (5, 2)
    with pytest.raises(ValueError, match=r"is a flow of real numbers.*use model.flow.log_prob"):
        moons.bits_per_dim(torch.zeros(1, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="sample is for images, and this RealNVP2d is a flow of"):
        moons.sample(1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["realnvp", "glow"])
def test_a_gpu_computes_the_same(name, runs):
    model = load(runs[name])
    images, labels = test_images(model)
    values = model.bits_per_dim(images, labels)
    samples = model.draw(9, 0.7)
    assert model.to("cuda") is model
    assert model.device.type == "cuda"
    torch.testing.assert_close(model.bits_per_dim(images, labels), values, rtol=1e-4, atol=0)
    torch.testing.assert_close(model.draw(9, 0.7), samples, rtol=0, atol=1e-3)
    assert torch.equal(model.decode(model.encode(images, labels), labels), images)


# ---------------------------------------------------------------------- mistakes

ZEROS = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (ZEROS.float(), "not float32 from 0 to 0"),
        (torch.full((2, 3, 8, 8), 300), "not int64 from 300 to 300"),
        (np.zeros((1, 3, 8, 8)), "not float64 from 0 to 0"),
        (ZEROS[0], r"not \(3, 8, 8\)"),
        (ZEROS[:, :1], r"not \(2, 1, 8, 8\)"),
        (ZEROS.permute(0, 2, 3, 1), r"not \(2, 8, 8, 3\)"),
        ([ZEROS], "not list"),
        (np.zeros((2, 3, 8, 8), np.uint16), "not uint16 from 0 to 0"),
        (np.full((2, 3, 8, 8), "a"), "not <U1"),
        (ZEROS.bool(), "not bool from 0 to 0"),
    ],
)
def test_wrong_images_are_one_line(images, message, realnvp):
    expected = r"give images as uint8 from 0 to 255, \(N, 3, 8, 8\), " + message
    for method in (realnvp.bits_per_dim, realnvp.encode):
        with pytest.raises(ValueError, match=f"^{expected}$"):
            method(images)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "give labels, 2 whole numbers from 0 to 6"),
        ([1], r"2 whole numbers from 0 to 6, not \(1,\) int64"),
        (3, r"2 whole numbers from 0 to 6, not \(\) int64"),
        ([1.0, 2.0], r"not \(2,\) float32"),
        ([True, False], r"not \(2,\) bool"),
        (torch.tensor([3, 7], dtype=torch.int32), "from 0 to 6, not 3 to 7"),
        (np.array([-1, 0]), "from 0 to 6, not -1 to 0"),
        ([1, "cat"], "2 whole numbers from 0 to 6, or names, all of one kind"),
        (["cat"], r"not \(1,\) int64"),
    ],
)
def test_wrong_labels_are_one_line(labels, message, glow):
    for method in (glow.bits_per_dim, glow.encode):
        with pytest.raises(ValueError, match=f"this Glow is class-conditional: .*{message}$"):
            method(ZEROS, labels)


def test_labels_are_integers_of_any_width(glow):
    images, labels = test_images(glow)
    values = glow.bits_per_dim(images, labels)
    for others in (labels.tolist(), labels.numpy().astype(np.uint8), labels.int()):
        assert torch.equal(glow.bits_per_dim(images, others), values)


def test_labels_may_be_names(glow):
    images, labels = test_images(glow)
    names = [PHOTOS[label] for label in labels]
    values = glow.bits_per_dim(images, labels)
    assert torch.equal(glow.bits_per_dim(images, names), values)
    assert torch.equal(glow.bits_per_dim(images, np.array(names)), values)
    with pytest.raises(ValueError, match=r"label=catt is not known \(did you mean cat\?\)"):
        glow.bits_per_dim(ZEROS, ["cat", "catt"])


def test_a_number_is_not_the_class_of_that_name(glow):
    """Folders 1, 10, 2 are the classes 0, 1, 2."""
    glow.class_names = ("1", "10", "2")
    assert [glow.label_of(label) for label in (1, "1", 0, "10", 2, "2")] == [1, 0, 0, 1, 2, 2]


def test_images_may_be_a_file_that_is_mapped_read_only(realnvp, tmp_path, recwarn):
    images, _ = test_images(realnvp)
    np.save(tmp_path / "images.npy", images.numpy()[..., ::-1])
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    values = realnvp.bits_per_dim(mapped[..., ::-1])
    assert torch.equal(values, realnvp.bits_per_dim(images))
    assert [str(warning.message) for warning in recwarn] == []


def test_a_class_is_named_or_numbered(glow, realnvp):
    assert [glow.label_of(text) for text in ("cat", "1", "flower", "6")] == [1, 1, 6, 6]
    with pytest.raises(ValueError, match=r"^label=catt is not known \(did you mean cat\?\): give"):
        glow.label_of("catt")
    with pytest.raises(ValueError, match=r"flower, or a number from 0 to 6$"):
        glow.sample(1, label=7)
    with pytest.raises(ValueError, match=r"^label=cat: this RealNVP has no classes$"):
        realnvp.sample(1, label="cat")
    with pytest.raises(ValueError, match=r"^this RealNVP has no classes: leave the labels out$"):
        realnvp.bits_per_dim(ZEROS, [0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": -1}, "n=-1: give a whole number of at least 0"),
        ({"n": 1.5}, "n=1.5: give a whole number of at least 0"),
        ({"n": 1, "seed": -1}, "seed=-1: give"),
        ({"n": 1, "first": -1}, "first=-1: give"),
        ({"n": 1, "batch_size": 0}, "batch_size=0: give a whole number of at least 1"),
        ({"n": 1, "temperature": -1.0}, "temperature=-1.0: give a number of at least 0"),
        ({"n": 1, "temperature": float("nan")}, "temperature=nan: give a number of at least 0"),
        ({"n": 10**12}, r"n=1000000000000 would take [\d,]+ GiB, and this machine has [\d,]+ GiB"),
        ({"n": "1"}, "n='1': give a whole number of at least 0"),
        ({"n": torch.tensor(1)}, r"n=tensor\(1\): give a whole number of at least 0"),
        ({"n": 1, "temperature": "0.5"}, "temperature='0.5': give a number of at least 0"),
    ],
)
def test_wrong_numbers_are_one_line(arguments, message, realnvp):
    with pytest.raises(ValueError, match=message):
        realnvp.sample(**arguments)


def test_numbers_of_numpy_are_numbers(realnvp):
    expected = realnvp.sample(2, temperature=0.5, seed=1)
    drawn = realnvp.sample(np.int32(2), temperature=np.float32(0.5), seed=np.uint8(1))
    assert torch.equal(drawn, expected)
    with pytest.raises(ValueError, match=r"give a number of at least 0$"):
        realnvp.sample(2, temperature=np.float32("inf"))


def test_wrong_keys_are_one_line(realnvp):
    for keys in (torch.arange(3), torch.tensor([0, -1]), torch.tensor([0.0, 1.0]), [0, 1]):
        with pytest.raises(ValueError, match=r"^keys are 2 numbers of at least 0, as an int64"):
            realnvp.bits_per_dim(ZEROS, keys=keys)
    with pytest.raises(ValueError, match="seed=-1: give a whole number of at least 0"):
        realnvp.bits_per_dim(ZEROS, seed=-1)


def test_wrong_latents_are_one_line(realnvp):
    latents = realnvp.encode(ZEROS)
    shapes = r"\(N, 6, 4, 4\), \(N, 6, 4, 4\)"
    fine, coarse = latents
    for wrong in (fine, latents[:1], (fine, coarse[:, :1]), (fine, coarse[:1]), (), None, [3]):
        with pytest.raises(ValueError, match=f"^latents are a tuple of tensors, {shapes}, as e"):
            realnvp.decode(wrong)


# ---------------------------------------------------------------------- what it is loaded from


def test_every_kind_of_place_gives_the_same_model(runs, tmp_path, monkeypatch):
    run = runs["realnvp"]
    expected = read_stored(run)
    export([str(run), f"out={tmp_path / 'hub'}"])
    load(run).save(tmp_path / "one.safetensors")
    row = tmp_path / "results" / "runs" / "realnvp_cifar10" / "tiny.json"
    weights = tmp_path / "results" / "weights" / "realnvp_cifar10" / "tiny.safetensors"
    row.parent.mkdir(parents=True)
    weights.parent.mkdir(parents=True)
    shutil.copy(run / "model.safetensors", weights)
    entry = expected.result["weights"] | {"file": "weights/realnvp_cifar10/tiny.safetensors"}
    row.write_text(json.dumps(expected.result | {"weights": entry}))
    monkeypatch.setattr(results, "ROOT", tmp_path / "results")
    shutil.copytree(run, tmp_path / "light", ignore=shutil.ignore_patterns("checkpoints"))
    images, _ = test_images(load(run))
    figure = pytest.approx(expected.result["metrics"]["test/bpd"], 1e-6)
    shutil.copytree(run, tmp_path / "older", ignore=shutil.ignore_patterns("*.safetensors"))
    for place, has_result in (
        (run, True),
        (str(run), True),
        (tmp_path / "older", True),
        (tmp_path / "light", True),
        (run / "checkpoints" / "best.ckpt", True),
        (run / "model.safetensors", True),
        (tmp_path / "hub", True),
        (tmp_path / "hub" / "model.safetensors", True),
        (tmp_path / "one.safetensors", False),
        ("realnvp_cifar10/tiny", True),
    ):
        model = load(place)
        assert model.stored.weights.keys() == expected.weights.keys()
        assert all(
            torch.equal(value, expected.weights[key]) for key, value in model.stored.weights.items()
        )
        assert model.bits_per_dim(images).double().mean().item() == figure
        assert (model.result is not None) == has_result, place
        if has_result:
            assert model.result["metrics"] == expected.result["metrics"]


def test_weights_that_were_not_tested_have_no_result(runs, tmp_path):
    path = runs["realnvp"] / "checkpoints" / "step-00000002.ckpt"
    assert load(path).result is None
    folder = tmp_path / "run"
    shutil.copytree(runs["realnvp"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    best = folder / "checkpoints" / "best.ckpt"
    assert load(folder).result is not None
    shutil.copy(path, best)  # as a run that goes on behind its result finds better weights
    assert load(folder).result is None
    assert load(best).result is None


def test_weights_other_than_those_recorded_are_refused(runs, tmp_path):
    out = tmp_path / "hub"
    export([str(runs["realnvp"]), f"out={out}"])
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-2] ^= 1  # the file stays readable
    (out / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is not the file whose sha256 is rec"):
        load(out)
    (out / "result.json").unlink()
    assert load(out).result is None
    (out / "model.safetensors").write_bytes(content[:-50])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged \(.*\): restore it"):
        load(out)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("config", None, r"not understood \(config.data\)"),
        ("config.data", 3, r"not understood \(config.data.name\)"),
        ("shape", 3, r"not understood \(shape\)"),
        ("class_names", None, r"not understood \(class_names\)"),
        ("experiment", "a.b", r"not understood \(experiment\)"),
        ("shape", None, r"models images \(C, H, W\)"),
        ("config.flow", None, "makes no model here"),
        ("config.optim", None, "makes no model here"),
        ("config.flow.hidden_channels", 10**12, "makes no model here"),
    ],
)
def test_weights_of_a_model_that_is_not_understood_are_one_line(
    key, value, message, runs, tmp_path
):
    stored = read_stored(runs["realnvp"])
    origin = json.loads(json.dumps(stored.origin))
    *sections, last = key.split(".")
    part = origin
    for section in sections:
        part = part[section]
    part[last] = value
    path = tmp_path / "a.safetensors"
    path.write_bytes(as_safetensors(stored._replace(origin=origin)))
    with pytest.raises((ValueError, ConfigError), match=message) as refusal:
        load(path)
    assert "\n" not in str(refusal.value)


def test_nested_metadata_are_one_line(runs, tmp_path):
    path = tmp_path / "a.safetensors"
    nested = {"paperflows": "[" * 100_000}
    path.write_bytes(safetensors.torch.save(read_stored(runs["realnvp"]).weights, nested))
    with pytest.raises(ValueError, match=r"a.safetensors is damaged \("):
        load(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("metrics", None, r"not a whole result of a run \(metrics\): restore"),
        ("run", None, r"not a whole result of a run \(run\)"),
        ("comparisons", 3, r"not a whole result of a run \(comparisons\)"),
    ],
)
def test_half_a_result_beside_the_weights_is_one_line(key, value, message, runs, tmp_path):
    shutil.copy(runs["realnvp"] / "model.safetensors", tmp_path)
    result = json.loads((runs["realnvp"] / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps({**result, key: value}))
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)
    (tmp_path / "result.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"result.json is damaged: restore it, or rename"):
        load(tmp_path)


def test_a_run_in_a_folder_whose_name_has_spaces_loads(runs, tmp_path):
    folder = tmp_path / "my run"
    shutil.copytree(runs["realnvp"], folder)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "run": "my run"}))
    assert load(folder).result["run"] == "my run"


def as_text(path):
    path.write_text("not a checkpoint")


def as_png(path):
    Image.new("RGB", (4, 4)).save(path, "PNG")


def as_archive(path):
    shutil.make_archive(str(path.with_suffix("")), "zip", path.parent)
    path.with_suffix(".zip").replace(path)


def as_other_weights(path):
    torch.save({"state_dict": {}}, path)


def as_a_tensor(path):
    torch.save(torch.zeros(3), path)


def as_other_record(path):
    torch.save({"paperflows": {"experiment": "realnvp_moons"}, "state_dict": {}}, path)


def as_cut(path):
    torch.save({"paperflows": {"experiment": "a"}, "state_dict": {}}, path)
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (as_text, "result.json", "is no checkpoint: give the folder of a run"),
        (as_text, "log.txt", "is no checkpoint: give the folder of a run"),
        (as_png, "curve.png", "is no checkpoint: give"),
        (as_text, "best.ckpt", "is damaged: give the folder of a run"),
        (Path.touch, "best.ckpt", "is damaged: give"),
        (as_cut, "best.ckpt", "is damaged or not of this repository: give"),
        (as_archive, "best.ckpt", "is damaged or not of this repository: give"),
        (as_other_weights, "flow.pt", "is no checkpoint of this repository: give"),
        (as_a_tensor, "flow.pt", "is no checkpoint of this repository: give"),
        (as_other_record, "best.ckpt", "does not record its commit, config, shape: give"),
        (Path.mkdir, "empty", "holds no checkpoint: give the folder of a run"),
        (as_text, "a.safetensors", r"is damaged \(.*\): restore it, or export it again"),
    ],
)
def test_what_is_no_model_is_one_line(make, name, message, tmp_path):
    path = tmp_path / name
    make(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refusal:
        load(path)
    assert str(refusal.value).startswith(f"{path} ")
    assert "\n" not in str(refusal.value)
    assert "delete" not in str(refusal.value)
    assert path.exists()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"metrics": 3}'])
@pytest.mark.parametrize("place", ["export", "run", "run/checkpoints/best.ckpt"])
def test_a_damaged_result_is_one_line(content, place, runs, tmp_path):
    shutil.copytree(runs["realnvp"], tmp_path / "run")
    export([str(tmp_path / "run"), f"out={tmp_path / 'export'}"])
    result = tmp_path / place.partition("/")[0] / "result.json"
    result.write_text(content)
    with pytest.raises(ConfigError) as refusal:
        load(tmp_path / place)
    line = str(refusal.value)
    assert line.startswith((f"{result} is damaged: ", f"{result} is not a whole result of a run ("))
    assert line.endswith(": restore it, or rename it to load weights without it")
    result.rename(tmp_path / "damaged.json")
    assert load(tmp_path / place).result is None


@pytest.mark.parametrize("model", [None, 3, b"run", [], "", True])
def test_what_is_neither_path_nor_name_is_one_line(model):
    with pytest.raises(ValueError, match=r": give the folder of a run, an exported folder, a") as e:
        load(model)
    assert str(e.value).startswith("the model is an empty name" if model == "" else f"{model!r} is")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("experiment", None),
        ("config", "text"),
        ("config", {}),
        ("config", {"data": {}}),
        ("shape", "3x32x32"),
        ("n_bits", "8"),
        ("class_names", None),
    ],
)
def test_metadata_of_another_form_are_one_line(key, value, runs, tmp_path):
    stored = read_stored(runs["realnvp"])
    wrong = stored._replace(origin={**stored.origin, key: value})
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(as_safetensors(wrong))
    with pytest.raises(ValueError, match=r"wrong.safetensors says something of its model that"):
        load(path)


def test_a_place_that_is_not_there_is_one_line(tmp_path, runs):
    with pytest.raises(FileNotFoundError, match="no model nowhere: give the folder of a run, an"):
        load("nowhere")
    with pytest.raises(FileNotFoundError, match=r"mean glow_cifar10/cpu-seed0\?\): give"):
        load("glow_cifar10/cpu-sed0")
    with pytest.raises(FileNotFoundError, match=r"no file .*gone.safetensors: give"):
        load(tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"gone.ckpt"):
        load(tmp_path / "gone.ckpt")
    folder = runs["realnvp"]
    with pytest.raises(FileNotFoundError, match=f"not the folder of a run: give {folder}$"):
        load(folder / "checkpoints")


def test_a_row_without_weights_names_those_with_some(tmp_path, monkeypatch):
    row = next((results.ROOT / "runs").glob("realnvp_moons/*.json"))
    content = json.loads(row.read_text()) | {"weights": None}
    copy = tmp_path / "runs" / "realnvp_moons" / "old.json"
    copy.parent.mkdir(parents=True)
    copy.write_text(json.dumps(content))
    kept = tmp_path / "weights" / "glow_cifar10" / "new.safetensors"
    kept.parent.mkdir(parents=True)
    kept.touch()
    monkeypatch.setattr(results, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError) as refusal:
        load("realnvp_moons/old")
    expected = "the weights of realnvp_moons/old were not kept: give glow_cifar10/new"
    assert str(refusal.value) == expected


def test_an_installed_copy_has_no_recorded_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    with pytest.raises(
        FileNotFoundError, match="with a clone of the repository, and this is an in"
    ):
        load("glow_cifar10/cpu-seed0")


def test_an_experiment_without_a_flow_is_one_line(runs, tmp_path):
    checkpoint = read_checkpoint(runs["realnvp"] / "checkpoints" / "best.ckpt")
    for experiment, message in (("figure3", "trains no flow"), ("gone", "has no script here: use")):
        checkpoint["paperflows"]["experiment"] = experiment
        torch.save(checkpoint, tmp_path / "other.ckpt")
        with pytest.raises(ConfigError, match=f"other.ckpt is of {experiment}, which {message}"):
            load(tmp_path / "other.ckpt")
