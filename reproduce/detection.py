"""Scores that tell other data from a model's own, and how well they do it.

A score is a number for each image, or for each batch of images; the larger it is, the more other
the images should be. `bits` are bits per dimension, so that a low likelihood is a large score.
"""

import math
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054  # standard errors from the middle of a normal distribution to its 97.5 %
QUANTILE = 0.99  # of the model's own batches, that a threshold lets pass
N_BOOTSTRAP = 10_000  # batches that are drawn for a threshold
BINS = 48  # of a histogram


class Auroc(NamedTuple):
    """The area under a receiver operating characteristic, and its 95 % confidence interval.

    value: the probability that an outside image has a larger score than an inside one, where equal
    scores count half. 1: told apart, 0.5: not at all, 0: the wrong way round.
    """

    value: float
    low: float
    high: float


def auroc(inside: np.ndarray, outside: np.ndarray) -> Auroc:
    """How well a score tells outside from inside data.

    The interval is DeLong's (DeLong, DeLong and Clarke-Pearson 1988, with the midranks of Sun and
    Xu 2014), cut to [0, 1]. It takes the scores for independent. It has no width where all pairs
    are in the same order.

    inside: (N,), outside: (M,), at least 2 each. A score that is not finite counts as larger than
        all finite ones.
    """
    from scipy.stats import rankdata
    from sklearn.metrics import roc_auc_score

    n = len(inside)
    m = len(outside)
    scores = np.concatenate([inside, outside]).astype(np.float64)
    scores[~np.isfinite(scores)] = np.inf
    ranks = rankdata(scores)  # with equal ranks for equal scores
    area = float(roc_auc_score(np.arange(n + m) >= n, ranks))
    # The share of the inside data below each outside score, and the other way round.
    below = (ranks[n:] - rankdata(scores[n:])) / n
    above = 1 - (ranks[:n] - rankdata(scores[:n])) / m
    error = math.sqrt(np.var(below, ddof=1) / m + np.var(above, ddof=1) / n)
    return Auroc(area, max(0.0, area - Z * error), min(1.0, area + Z * error))


def typicality(bits: np.ndarray, entropy: float, m: int) -> np.ndarray:
    """How far the mean of each batch of m images is from a model's entropy, (N // m,).

    | mean over the batch of bits - entropy | (Nalisnick et al. 2019, arXiv 1906.02994, equation 4,
    in bits per dimension). It is large for images that are too likely as well. The batches are the
    images in their order; those that fill no batch are left out.

    bits: (N,), bits per dimension; those that are not finite make their batch infinitely far.
    entropy: an estimate, the mean of the bits of training images.
    """
    n = len(bits) // m
    known = np.where(np.isfinite(bits), bits, np.inf)
    return np.abs(known[: n * m].reshape(n, m).mean(1) - entropy)


def threshold(bits: np.ndarray, entropy: float, m: int, seed: int) -> float:
    """The typicality beyond which a batch of m images counts as other data.

    QUANTILE of N_BOOTSTRAP batches pass, which are drawn with replacement from held-out images of
    the model's own data (Nalisnick et al. 2019, algorithm 1).

    bits: (N,), of the held-out images. seed: of the batches.
    """
    random = np.random.default_rng([seed, m])
    chosen = random.integers(0, len(bits), (N_BOOTSTRAP, m))
    return float(np.quantile(typicality(bits[chosen].ravel(), entropy, m), QUANTILE))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's correlation of pairs of numbers, without pairs that are not finite.

    None: it is not defined, because there are too few pairs, or equal numbers alone.
    """
    from scipy.stats import rankdata

    finite = np.isfinite(a) & np.isfinite(b)
    if finite.sum() < 2:
        return None
    first = rankdata(a[finite])
    second = rankdata(b[finite])
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


class Histogram(NamedTuple):
    """How many scores lie in each of BINS equal intervals from low to high.

    Scores beyond the ends are counted in the first and in the last interval.
    """

    low: float
    high: float
    inside: list[int]
    outside: list[int]


def histogram(inside: np.ndarray, outside: np.ndarray) -> Histogram | None:
    """The scores of two sets in intervals that suit both; None if a set has no finite score.

    The intervals reach over 99 % of both sets, and beyond the inside set by at most three times its
    width, so that far scores leave it visible.
    """
    kept = [values[np.isfinite(values)] for values in (inside, outside)]
    if not all(len(values) for values in kept):
        return None
    ends = [np.quantile(values, [0.005, 0.995]) for values in kept]
    room = 3 * (ends[0][1] - ends[0][0])
    low = max(min(ends[0][0], ends[1][0]), ends[0][0] - room)
    high = min(max(ends[0][1], ends[1][1]), ends[0][1] + room)
    if high <= low:
        high = low + 1.0
    counts = [np.histogram(np.clip(values, low, high), BINS, (low, high))[0] for values in kept]
    return Histogram(float(low), float(high), counts[0].tolist(), counts[1].tolist())
