"""Whether a run measured a metric as the paper of a claim did, and the differences in words.

A fact is one thing on which a figure depends, such as the number of samples behind an FID. A claim
names facts under two keys. Where a fact of `checked` differs, the run's figure and the claim's are
not compared. A fact of `allowed` may differ: the difference is printed. The value null says that
the paper does not tell; in `checked` that is a difference, too.

Facts of a run come from its key `protocol`. Those of a likelihood, of the tested weights and of
their choice come from its config and the name of its metric.
"""

import math
from collections.abc import Mapping
from typing import Any

from results.checks import is_number
from results.metrics import kind_of, quantity_of

LIKELIHOODS = ("bpd", "nll", "nats_ll")
# The noise by which integers become real numbers, by the kind of a likelihood (`metrics.KINDS`).
NOISE = {
    "exact": "uniform",
    "estimate": "uniform",
    "bound": "learned",
    "bound_estimate": "learned",
    "noisy": "Gaussian",
    "noisy_estimate": "Gaussian",
}
IMAGE_FACTS = ("scale", "kernel")  # keys of `data` by which low-resolution images are made
PUBLISHED_WEIGHTS = "published_weights"  # whether a network had the weights that papers use
SHOWN_OF_HASH = 8  # digits
CHOSEN = {"best": "by validation images", "last": "the last one"}
LABELS = {  # of facts whose names do not read as words
    "checkpoint": "choice of the checkpoint",
    "crop": "cropped border in pixels",
    "extractor": "feature extractor",
    "n": "samples",
    "n_bits": "bits of a pixel",
    "noise": "kind of noise",
    "noise_samples": "noise samples an image",
    "reference": "reference images",
    "reference_n": "number of reference images",
    "statistics": "number format of the statistics",
    "weights": "tested weights",
    "weights_sha256": "SHA-256 of the extractor's weights",
}


def differences(claim: Mapping, result: Mapping) -> list[str]:
    """What keeps a run's figure from being compared with a claim: one sentence for each fact.

    The facts are those of the claim's `checked`. Empty where all agree. Figures by a network with
    other weights than the published ones differ from every claim.

    Args:
        claim: a claim (`results.load_claim`).
        result: a run's result; its `protocol`, `config` and `tested` are read.

    >>> claim = {"metric": "test/fid", "checked": {"n": 50000, "temperature": 1}}
    >>> differences(claim, {"protocol": {"test/fid": {"n": 10000, "temperature": 1.0}}})
    ['samples: 10,000 here, 50,000 in the paper']
    """
    sentences = _sentences(claim, result, "checked")
    if facts_of(result, claim["metric"]).get(PUBLISHED_WEIGHTS) is False:
        sentences.append("weights of the network: not the published ones here")
    return sentences


def allowed_differences(claim: Mapping, result: Mapping) -> list[str]:
    """As `differences`, for the facts of `allowed`, which do not keep the two from comparison.

    A fact that the run did not record, or the paper does not tell, is left out.
    """
    return _sentences(claim, result, "allowed")


def facts_of(result: Mapping, metric: str) -> dict[str, Any]:
    """What a metric of a run depends on, by the fact's name.

    Runs from before there were other numbers of bits had 8.
    """
    data = (result.get("config") or {}).get("data") or {}
    facts: dict[str, Any] = {fact: data[fact] for fact in IMAGE_FACTS if fact in data}
    if quantity_of(metric) in LIKELIHOODS:
        facts |= _facts_of_likelihood(result, metric)
    tested = result.get("tested") or {}
    if "chosen" in tested:
        facts["checkpoint"] = CHOSEN.get(tested["chosen"], tested["chosen"])
    if "weights" in tested:
        facts["weights"] = tested["weights"]
    return facts | dict((result.get("protocol") or {}).get(metric) or {})


def _facts_of_likelihood(result: Mapping, metric: str) -> dict[str, Any]:
    data = (result.get("config") or {}).get("data") or {}
    facts: dict[str, Any] = {"noise_samples": 1}
    kind = kind_of(metric)
    is_of_integers = quantity_of(metric) != "nll"  # `nll` is of points in space
    if is_of_integers:
        facts["n_bits"] = data.get("n_bits", 8)
    if kind in NOISE and (is_of_integers or NOISE[kind] != "uniform"):
        facts["noise"] = NOISE[kind]
    samples = metric.rpartition("_iw")[2]
    if kind == "iw" and samples.isdecimal():
        facts["noise_samples"] = int(samples)
    return facts


def _sentences(claim: Mapping, result: Mapping, key: str) -> list[str]:
    facts = facts_of(result, claim["metric"])
    sentences = []
    for fact, theirs in (claim.get(key) or {}).items():
        is_known = fact in facts and theirs is not None
        if is_known and agree(fact, facts[fact], theirs):
            continue
        if not is_known and key == "allowed":
            continue
        ours = "not recorded"
        if fact in facts:
            ours = in_words(facts[fact], fact)
        paper = "not stated"
        if theirs is not None:
            paper = in_words(theirs, fact)
        sentences.append(f"{label_of_fact(fact)}: {ours} here, {paper} in the paper")
    return sentences


def agree(fact: str, ours: Any, theirs: Any) -> bool:
    """Whether two values of a fact are the same; a claim may name a hash by its first digits.

    >>> agree("temperature", 1, 1.0), agree("n", 10_000, 50_000), agree("resize", True, 1)
    (True, False, False)
    >>> agree("weights_sha256", "6726825d0af5", "6726825d")
    True
    """
    if is_number(ours) and is_number(theirs):
        return math.isclose(ours, theirs)
    if fact.endswith("sha256") and isinstance(ours, str) and isinstance(theirs, str):
        return ours.startswith(theirs)
    return type(ours) is type(theirs) and ours == theirs


def label_of_fact(fact: str) -> str:
    """A fact's name in words."""
    return LABELS.get(fact, fact.replace("_", " "))


def in_words(value: Any, fact: str = "") -> str:
    """A fact's value in a sentence: `50,000`, `0.9`, `yes`, `none`; of a hash the first digits.

    >>> [in_words(value) for value in (50_000, 1.0, 0.85, True, None, "train", [3, 4])]
    ['50,000', '1', '0.85', 'yes', 'none', 'train', '3, 4']
    """
    if isinstance(value, bool):
        return {True: "yes", False: "no"}[value]
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(in_words, value))
    if fact.endswith("sha256"):
        return str(value)[:SHOWN_OF_HASH]
    return str(value)
