"""Distances between two sets of images by their features: FID, KID, Inception Score and others.

The formulas are those of torch-fidelity, on features in float64, of which all figures are made.
"""

from typing import Any, NamedTuple

from torch import Tensor

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000  # the largest, as in Binkowski et al. 2018
IS_SPLITS = 10  # as in Salimans et al. 2016
NEIGHBOURS = 3  # as in Kynkäänniemi et al. 2019
PRECISION_MOST = 10_000  # images of each set for precision and recall, whose distances are pairwise
PRECISION_BATCH = 2_000  # rows of the matrix of distances that are in memory at once
LEAST = 2  # images of a set: a covariance needs them
METRICS = ("fid", "kid", "inception_score", "precision", "recall")


class Comparison(NamedTuple):
    """What two sets of features say of one another.

    figures: the metric's name -> its value, for each of METRICS that can be computed.
    facts: the metric's name -> what its value depends on besides the two sets.
    """

    figures: dict[str, float]
    facts: dict[str, dict[str, Any]]


def compare_distributions(
    samples: Tensor, reference: Tensor, logits: Tensor | None = None, seed: int = 0
) -> Comparison:
    """Compare the features of samples with those of reference images.

    Args:
        samples: (n, d), features of samples.
        reference: (m, d), features of reference images.
        logits: (n, c), of the classes of the samples, without the biases; None: no Inception Score.
        seed: of KID's subsets and of the order behind the Inception Score's splits.

    Raises:
        ValueError: a set has fewer than two images.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    if min(len(samples), len(reference)) < LEAST:
        raise ValueError(f"{len(samples)} samples beside {len(reference)} images: give at least 2")
    subset_size = kid_subset_size(len(samples), len(reference))
    kid = kid_features_to_metric(
        samples.double(),
        reference.double(),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=subset_size,
        rng_seed=seed,
        verbose=False,
    )
    figures = {
        "fid": frechet_distance(samples, reference),
        "kid": kid["kernel_inception_distance_mean"],
    }
    facts: dict[str, dict[str, Any]] = {
        "fid": {},
        "kid": {"subsets": KID_SUBSETS, "subset_size": subset_size},
    }
    if logits is not None:
        splits = min(IS_SPLITS, len(logits))
        score = isc_features_to_metric(logits.double(), splits, shuffle=True, rng_seed=seed)
        figures["inception_score"] = score["inception_score_mean"]
        facts["inception_score"] = {"splits": splits}
    some_samples = samples[:PRECISION_MOST].double()
    some_reference = reference[:PRECISION_MOST].double()
    if min(len(some_samples), len(some_reference)) > NEIGHBOURS:
        both = prc_features_to_metric(
            some_samples,
            some_reference,
            prc_neighborhood=NEIGHBOURS,
            prc_batch_size=PRECISION_BATCH,
            save_cpu_ram=True,
            verbose=False,
        )
        for name in ("precision", "recall"):
            figures[name] = both[name]
            facts[name] = {
                "neighbours": NEIGHBOURS,
                "n": len(some_samples),
                "reference_n": len(some_reference),
            }
    return Comparison(figures, facts)


def frechet_distance(samples: Tensor, reference: Tensor) -> float:
    """FID: the squared Fréchet distance of two Gaussians with the sets' means and covariances.

        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)),    Heusel et al. 2017 (arXiv 1706.08500), eq. 6

    samples: (n, d). reference: (m, d). Means and covariances are float64.

    >>> import torch
    >>> a = torch.tensor([[0.0], [2.0]])
    >>> round(frechet_distance(a, a + 3), 6)
    9.0
    """
    import numpy as np
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(part.double()) for part in (samples, reference)]
    for each in statistics:
        each["sigma"] = np.atleast_2d(each["sigma"])
    distance = fid_statistics_to_metric(*statistics, verbose=False)
    return distance["frechet_inception_distance"]


def kid_subset_size(n_samples: int, n_reference: int) -> int:
    """The size of KID's subsets: never larger than one of the sets.

    >>> kid_subset_size(50_000, 45_000), kid_subset_size(64, 500)
    (1000, 64)
    """
    return min(KID_SUBSET_SIZE, n_samples, n_reference)
