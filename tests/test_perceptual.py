"""LPIPS: its definition, its weights, and what it refuses."""

from pathlib import Path
from socket import gaierror
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import lpips

from lightning_modules.quality import extractors
from lightning_modules.quality.extractors import WeightsMissing
from lightning_modules.quality.perceptual import BACKBONES, Lpips, distance, features_of


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """net -> a file of a random backbone without its classifier."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    paths = {}
    for net, backbone in BACKBONES.items():
        state = {}
        for key, value in features_of(backbone).state_dict(prefix="features.").items():
            state[key] = torch.randn(value.shape) * (2 / value[0].numel()) ** 0.5
        paths[net] = folder / f"{net}.safetensors"
        save_file(state, paths[net])
    return paths


def two_images(side: int = 40, n: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (n, 3, side, side + 3), generator=generator, dtype=torch.uint8)
    other = torch.randint(0, 256, (n, 3, side, side + 3), generator=generator, dtype=torch.uint8)
    return image, other


@pytest.mark.parametrize("net", BACKBONES)
def test_torchmetrics_has_the_same_distances_with_the_same_random_backbone(weights, net):
    """Its small number in the length of a vector is another one, which these images do not show."""
    metric = Lpips(net, weights[net])
    judge = lpips._LPIPS(pretrained=True, net=net, pnet_rand=True)
    slices = [getattr(judge.net, f"slice{i}") for i in range(1, 6)]
    layers = {name: layer for part in slices for name, layer in part.named_children()}
    for name, layer in metric.features.named_children():
        layers[name].load_state_dict(layer.state_dict())
    image, other = two_images()
    expected = judge(image / 255, other / 255, normalize=True).flatten().double()
    torch.testing.assert_close(metric(image, other), expected, rtol=1e-4, atol=1e-7)
    assert (expected > 0.01).all()
    assert metric(image, image).tolist() == [0, 0]


def test_lpips_is_computed_as_its_paper_writes(weights):
    """Equation 1 of Zhang et al. (2018), as plain convolutions of AlexNet in float64."""
    metric = Lpips("alex", weights["alex"])
    state = {key: value.double() for key, value in metric.features.state_dict().items()}
    heads = torch.load(
        Path(lpips.__file__).with_name("lpips_models") / "alex.pth",
        map_location="cpu",
        weights_only=True,
    )
    image, other = two_images(n=1)

    def layers(uint8):
        mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        deviation = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        x = ((uint8 / 255 - mean) / deviation).double()
        settings = {"0": (4, 2), "3": (1, 2), "6": (1, 1), "8": (1, 1), "10": (1, 1)}
        for name, (stride, padding) in settings.items():
            if name in ("3", "6"):
                x = F.max_pool2d(x, 3, 2)
            x = F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding).relu()
            yield F.normalize(x, dim=1)

    expected = 0.0
    for i, (f, g) in enumerate(zip(layers(image), layers(other), strict=True)):
        weighted = (f - g) ** 2 * heads[f"lin{i}.model.1.weight"].double()
        expected += weighted.sum(1).mean().item()
    # The authors round the means and deviations of ImageNet to three digits.
    assert metric(image, other).item() == pytest.approx(expected, rel=0.01)


def test_the_distance_of_a_layer_by_hand():
    # One position has (3, 4) and (0, 2), of unit length (.6, .8) and (0, 1); the other is equal.
    f = torch.tensor([[3.0, 1.0], [4.0, 0.0]]).view(1, 2, 1, 2)
    g = torch.tensor([[0.0, 5.0], [2.0, 0.0]]).view(1, 2, 1, 2)
    head = torch.tensor([10.0, 100.0]).view(1, 2, 1, 1)
    assert distance(torch.cat([f, g]), head).item() == pytest.approx((3.6 + 4) / 2, rel=1e-6)


def test_images_of_a_batch_have_their_own_distances(weights):
    metric = Lpips("alex", weights["alex"])
    image, other = two_images()
    alone = [metric(image[i : i + 1], other[i : i + 1]).item() for i in range(2)]
    assert metric(image, other).tolist() == pytest.approx(alone, rel=1e-5)
    assert alone[0] != alone[1]


def test_a_file_may_have_the_classifier_and_is_named_by_its_hash(tmp_path, weights):
    image, other = two_images(n=1)
    metric = Lpips("alex", weights["alex"])
    state = metric.features.state_dict(prefix="features.")
    path = tmp_path / "whole.pth"
    torch.save(dict(state) | {"classifier.1.weight": torch.ones(2, 2)}, path)
    whole = Lpips("alex", path)
    assert whole(image, other).item() == metric(image, other).item()
    assert whole.sha256 != metric.sha256
    assert not whole.is_published
    assert whole.protocol == {
        "definition": "lpips 0.1",
        "net": "alex",
        "weights_sha256": whole.sha256,
        "published_weights": False,
    }


def test_weights_of_another_network_are_refused_by_name(weights):
    with pytest.raises(ValueError, match="another network: it lacks features"):
        Lpips("vgg", weights["alex"])


def test_missing_weights_are_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(url, timeout):
        raise URLError("no address") from gaierror(-2, "Name or service not known")

    monkeypatch.setattr(extractors.urllib.request, "urlopen", refuse)
    file = r"https://.*/alexnet-owt-7be5be79\.pth"
    problem = "could not be downloaded: Name or service not known"
    with pytest.raises(WeightsMissing, match=f"^{file} {problem}$"):
        Lpips()


def test_a_damaged_file_in_the_cache_is_to_be_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = extractors.hub_file(BACKBONES["alex"].url)
    path.parent.mkdir(parents=True)
    path.write_text("half a file")
    with pytest.raises(WeightsMissing, match=r"is damaged.*; delete it, so that"):
        Lpips()
    assert path.read_text() == "half a file"


def test_the_hub_cache_is_read(tmp_path, monkeypatch, weights):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    metric = Lpips("alex", weights["alex"])
    path = extractors.hub_file(BACKBONES["alex"].url)
    path.parent.mkdir(parents=True)
    torch.save(metric.features.state_dict(prefix="features."), path)
    image, other = two_images(n=1)
    assert Lpips("alex")(image, other).item() == metric(image, other).item()


def test_what_cannot_be_compared_is_one_line(weights):
    metric = Lpips("alex", weights["alex"])
    image, other = two_images()
    with pytest.raises(ValueError, match="have to be uint8"):
        metric(image / 255, other)
    with pytest.raises(ValueError, match="cannot be compared with references of shape"):
        metric(image, other[:, :, 1:])
    with pytest.raises(ValueError, match="too small for LPIPS by alexnet: give at least 31 x 31"):
        metric(image[:, :, :30], other[:, :, :30])
    assert metric(image[:, :, :31, :31], other[:, :, :31, :31]).isfinite().all()
    with pytest.raises(ValueError, match="LPIPS has no net=resnet: give one of alex, vgg"):
        Lpips("resnet")


def test_making_it_does_not_touch_the_global_random_generator(weights):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Lpips("alex", weights["alex"])
    assert torch.equal(before, torch.get_rng_state())
