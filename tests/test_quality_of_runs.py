"""Image quality of samples in whole runs: result.json, and `reproduce.evaluate` on a run."""

import json

import pytest
import torch
from test_density import RandomImages
from test_glow_scripts import run
from test_sample_quality import MeanColour

from datamodules import make_data
from datamodules.image_cache import default_cache
from datamodules.images import ImageArray
from lightning_modules.callbacks.sample_quality import SampleQuality
from lightning_modules.quality import extractors
from lightning_modules.quality.distributions import METRICS
from reproduce import evaluate

KEYS = {f"test/{name}" for name in METRICS}
WORDS = ("eval.bn_images=32", "quality.batch_size=8")


@pytest.fixture
def small_network(monkeypatch, tmp_path):
    """Samples are measured by a network without weights."""

    def load(callback):
        callback.extractor = MeanColour()
        return None, None

    monkeypatch.setattr(SampleQuality, "_try_extractor", load)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_run_records_its_figures_and_evaluate_measures_them_again(
    small_network, tmp_path, capsys
):
    folder = tmp_path / "run"
    run("realnvp_photos", folder, *WORDS, "quality.n=16", "quality.temperature=0.8")
    assert list((default_cache() / "quality").iterdir())
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["metrics"].keys() >= KEYS
    assert result["protocol"].keys() == KEYS
    facts = result["protocol"]["test/fid"]
    assert (facts["n"], facts["temperature"], facts["reference_n"]) == (16, 0.8, 64)
    assert result["not_measured"] == {}
    plain = run("realnvp_photos", tmp_path / "plain", *WORDS)
    own = {key: value for key, value in result["metrics"].items() if key not in KEYS}
    assert own == plain["metrics"]  # training has not noticed the samples
    capsys.readouterr()

    def lines(*words):
        evaluate.main([str(folder), *words])
        return capsys.readouterr().out.splitlines()

    assert not [line for line in lines() if "fid" in line]  # unless it is asked for
    again = lines("quality.n=16")
    for key in KEYS:
        [line] = [line for line in again if line.startswith(f"{key}: ")]
        assert line.endswith("equal to the last digit")
    other = lines("quality.n=8")
    assert "test/fid: not compared with the recorded figure, which has another protocol" in other
    assert [line for line in other if line.startswith("test/bpd: ")]
    other = lines("quality.n=16", "quality.batch_size=5")  # other samples, which are as good
    assert [line for line in other if line.startswith("test/fid: not compared")]


def test_a_run_without_weights_has_its_other_figures_and_the_reason(tmp_path, monkeypatch):
    """The network is not asked where the weights could not be kept, as in all tests."""
    monkeypatch.setattr(extractors.urllib.request, "urlopen", pytest.fail)
    folder = tmp_path / "run"
    run("realnvp_photos", folder, *WORDS, "quality.n=16")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert "test/bpd" in result["metrics"]
    assert result["protocol"] == {}
    assert result["not_measured"].keys() == KEYS
    reason = result["not_measured"]["test/fid"]
    assert reason.startswith("since the network's weights are missing (")
    assert reason.endswith("): give metrics.inception_weights=FILE")


def test_images_of_few_bits_are_compared_in_the_same_256_levels():
    class FiveBits:
        n_bits = 5

    data = RandomImages()
    few = ImageArray(data.train.images >> 3)
    images = SampleQuality()._batch(few, 0, 4, FiveBits())
    expected = torch.from_numpy(data.train.images[:4] >> 3 << 3)
    assert torch.equal(images, expected)


def test_reference_images_are_not_mirrored():
    data = RandomImages()
    unaugmented = data.unaugmented("train")
    for k in range(len(data.train)):
        image = torch.from_numpy(data.train.images[k])
        assert torch.equal(unaugmented[5, k][0], image)
    mirrored = [
        not torch.equal(data.train[5, k][0], unaugmented[5, k][0]) for k in range(len(data.train))
    ]
    assert any(mirrored)  # the training set itself still is
    photos = make_data("photos", seed=0, batch_size=8, size=8, n_train=40, hflip=True)
    plain = make_data("photos", seed=0, batch_size=8, size=8, n_train=40, hflip=False)
    for each in (photos, plain):
        each.prepare_data()
        each.setup()
    reference = photos.unaugmented("train")
    for k in range(40):
        assert torch.equal(reference[0, k][0], plain.train[0, k][0])
    assert any(not torch.equal(photos.train[0, k][0], plain.train[0, k][0]) for k in range(40))
