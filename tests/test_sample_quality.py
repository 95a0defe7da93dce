"""Image quality of samples: the extractor's weights, distances of distributions, the callback."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_modules.quality import extractors
from lightning_modules.quality.extractors import (
    Inception,
    WeightsMissing,
    inception_architecture,
    read_weights,
)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_weights_are_read_with_their_hash(tmp_path: Path, name: str) -> None:
    import hashlib

    expected = small_network().state_dict()
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save(expected, path)
    else:
        save_file(expected, path)
    weights, sha256 = read_weights(path, expected)
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_counters_of_batch_norms_may_be_absent(tmp_path: Path) -> None:
    expected = small_network().state_dict()
    path = tmp_path / "weights.pth"
    torch.save({k: v for k, v in expected.items() if "num_batches" not in k}, path)
    weights, _ = read_weights(path, expected)
    assert weights["1.num_batches_tracked"].item() == 0


class Opener:
    """Unpickling this object would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def other_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = state["0.weight"]
    others = {k: v for k, v in state.items() if k != "0.bias"}
    return {**others, "0.weight": weight[:2], "2.bias": weight, "1.bias": state["1.bias"] / 0}


def test_unusable_files_are_refused_in_one_line(tmp_path: Path) -> None:
    expected = small_network().state_dict()
    path = tmp_path / "w.pth"

    def line(content: object = None) -> str:
        if content is not None:
            torch.save(content, path)
        with pytest.raises(ValueError, match=str(tmp_path)) as caught:
            read_weights(path, expected)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is no file" in line()
    text = line(other_weights(expected))
    assert "lacks 0.bias, has the unknown 2.bias" in text
    assert "0.weight of shape (2, 3, 3, 3), not (4, 3, 3, 3), and 1 more" in text
    assert "1.bias that are not finite" in line({**expected, "1.bias": expected["1.bias"] / 0})
    assert "map names to tensors" in line([torch.zeros(1)])
    path.write_bytes(path.read_bytes()[:50])
    assert "damaged" in line()
    path.write_bytes(pickle.dumps(Opener(tmp_path / "made")))
    assert "more in it" in line()
    torch.save({"a": Opener(tmp_path / "made")}, path)
    assert "more in it" in line()
    assert not (tmp_path / "made").exists()
    broken = tmp_path / "w.safetensors"
    broken.write_bytes(b"1234")
    with pytest.raises(ValueError, match="no readable safetensors"):
        read_weights(broken, expected)


def no_network(*arguments: object, **options: object) -> None:
    raise OSError(101, "Network is unreachable")


def test_weights_that_cannot_be_had_are_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(extractors.urllib.request, "urlopen", no_network)
    with pytest.raises(WeightsMissing, match="Network is unreachable"):
        Inception()
    assert not list(tmp_path.rglob("*.part"))


def test_the_architecture_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    network = inception_architecture("2048")
    assert torch.equal(torch.get_rng_state(), state)
    assert network.state_dict()["fc.weight"].shape == (1008, 2048)
    assert not network.training
