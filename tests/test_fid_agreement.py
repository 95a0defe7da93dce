"""Our figures of image quality are those of torch-fidelity on the same images and weights."""

from pathlib import Path

import pytest
import torch
import torch_fidelity
from test_inception import random_weights
from torch import Tensor
from torch.utils.data import Subset

from datamodules.cifar10 import CIFAR10
from lightning_modules.quality.extractors import Inception

REAL = Path(__file__).resolve().parent.parent / "data"


def features_of(extractor: Inception, images: Tensor) -> Tensor:
    return torch.cat([extractor(batch).layer for batch in images.split(64)])


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(("layer", "n"), [("64", 256), ("2048", 64)])
def test_figures_are_those_of_torch_fidelity(tmp_path: Path, layer: str, n: int) -> None:
    """With fewer images than features, as for 2,048, the figures are ill-conditioned."""
    from lightning_modules.quality.distributions import compare_distributions

    if not (REAL / "cifar-10-batches-py" / "test_batch").is_file():
        pytest.skip("needs CIFAR-10 in data/")
    data = CIFAR10(REAL, batch_size=64, download=False)
    data.prepare_data()
    data.setup("test")
    images = torch.stack([data.test[(0, i)][0] for i in range(2 * n)])
    weights = tmp_path / "weights.pth"
    torch.save(random_weights(), weights)
    theirs = torch_fidelity.calculate_metrics(
        input1=Subset(images, range(n)),
        input2=Subset(images, range(n, 2 * n)),
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=n,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),  # a file of ours
        **{f"feature_layer_{metric}": layer for metric in ("fid", "kid", "prc")},
        cuda=False,
        cache=False,
        verbose=False,
        rng_seed=0,
    )
    extractor = Inception(weights, layer)
    samples = features_of(extractor, images[:n])
    reference = features_of(extractor, images[n:])
    ours = compare_distributions(samples, reference, seed=0).figures
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=2e-3)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=0.01)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=0.01)
