"""Our Inception network is torch-fidelity's: with the same weights it has the same features."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from lightning_modules.quality.extractors import Inception, inception_architecture


def random_weights() -> dict[str, Tensor]:
    """Weights of Inception-v3, small enough that all features are finite."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, value in inception_architecture("2048").state_dict().items():
        if key.endswith("running_var"):
            weights[key] = torch.ones(value.shape)
        elif value.is_floating_point():
            scale = value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
            weights[key] = scale * torch.randn(value.shape, generator=generator)
            if key.endswith("bn.weight"):
                weights[key] += 1.4
        else:
            weights[key] = torch.zeros(value.shape, dtype=value.dtype)
    return weights


def test_features_and_logits_are_those_of_torch_fidelity(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(random_weights(), path)  # a file of ours, which torch-fidelity may unpickle
    names = ["64", "2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("theirs", names, feature_extractor_weights_path=str(path))
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    narrow, wide, logits = theirs(images)
    assert wide.std().item() > 1e-3
    ours = Inception(path)
    features = ours(images)
    assert not ours.is_published
    assert features.layer.dtype == torch.float64
    assert torch.equal(features.layer, wide.double())
    assert features.logits is not None
    assert torch.equal(features.logits, logits.double())
    features = Inception(path, layer="64")(images)
    assert torch.equal(features.layer, narrow.double())
    assert features.logits is None
    # Each image has its own features, whatever the others in its batch are.
    torch.testing.assert_close(ours(images[1:2]).layer, wide[1:2].double(), rtol=1e-4, atol=1e-5)


def test_an_unknown_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layer=100: give 64, 192, 768 or 2048"):
        Inception(tmp_path / "weights.pth", layer="100")
