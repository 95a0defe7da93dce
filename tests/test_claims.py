"""What the papers claim, the names of metrics, and whether a run measured by a claim's protocol."""

import pytest
import yaml

from results import compare_all, load_claim, recipe_of
from results.files import write
from results.groups import comparison_of
from results.metrics import QUANTITIES, label_of, quantity_of
from results.protocol import allowed_differences, differences, facts_of
from results.runs import form


def result(**more):
    """A result as reproduce/ writes it."""
    return {
        "experiment": "flow_cifar10",
        "run": "seed0",
        "preset": None,
        "metrics": {"test/fid": 40.0},
        "papers": [],
        "seed": 0,
        "commit": "0123456789abcdef",
        "dirty": False,
        "device": "CPU",
        "budget": {"images": 100, "of": 100, "fraction": 1.0, "source": "ours"},
        "versions": {"torch": "2.9"},
        "config": {"data": {"name": "cifar10", "n_bits": 8}},
        "precision": "32-true",
        "tf32": False,
        "deterministic": False,
        "images": 100,
        "seconds": 12.5,
        "n_train": 45_000,
        **more,
    }


# Quantities


def test_every_quantity_has_a_direction_and_a_label_of_its_own():
    assert {quantity.direction for quantity in QUANTITIES.values()} == {"lower", "higher"}
    labels = [quantity.label for quantity in QUANTITIES.values()]
    assert len(set(labels)) == len(labels)
    lower = {name for name, quantity in QUANTITIES.items() if quantity.direction == "lower"}
    distances = {"fid", "kid", "lpips", "lpips_vgg", "niqe", "brisque", "piqe"}
    assert lower == {"bpd", "nll"} | distances


@pytest.mark.parametrize(
    ("key", "quantity", "label"),
    [
        ("test/bpd", "bpd", "bits/dim"),
        ("test/bpd_bound_reestimated", "bpd", "bits/dim"),
        ("val/bpd_iw16", "bpd", "bits/dim"),
        ("test/fid", "fid", "FID"),
        ("val/fid_5k", "fid", "FID-5k"),
        ("val/kid_10k", "kid", "KID-10k"),
        ("test/psnr_y", "psnr_y", "PSNR (Y)"),
        ("test/lpips_vgg", "lpips_vgg", "LPIPS (VGG)"),
        ("test/inception_score", "inception_score", "Inception Score"),
        ("density_integral", "density_integral", "density_integral"),
    ],
)
def test_the_quantity_and_the_label_are_read_off_the_name(key, quantity, label):
    assert quantity_of(key) == quantity
    assert label_of(key) == label


# What a result says of its metrics


def test_a_result_may_say_what_its_metrics_depend_on_and_which_it_lacks():
    protocol = {"test/fid": {"n": 50_000, "temperature": 1.0, "resize": None, "sizes": [32, 32]}}
    reasons = {"test/kid": "the extractor's weights are missing: give metrics.inception_weights"}
    assert form(result(protocol=protocol, not_measured=reasons)) == []


@pytest.mark.parametrize(
    ("more", "places"),
    [
        ({"protocol": []}, [".protocol"]),
        ({"protocol": {"test/fid": 50_000}}, [".protocol.test/fid"]),
        ({"protocol": {"test/fid": {"n": {"train": 1}}}}, [".protocol.test/fid.n"]),
        ({"not_measured": {"test/fid": ""}}, [".not_measured.test/fid"]),
        ({"not_measured": {"test/fid": "no\nweights"}}, [".not_measured.test/fid"]),
        ({"not_measured": {"test/fid": None}}, [".not_measured.test/fid"]),
    ],
)
def test_a_protocol_of_another_form_is_named(more, places):
    assert form(result(**more)) == places


# Whether a run measured by a claim's protocol

FID = {
    "dataset": "CIFAR-10",
    "data": "cifar10",
    "table": "Table 1",
    "row": "Ours",
    "split": "train",
    "metric": "test/fid",
    "unit": "",
    "value": 41.0,
    "train": None,
    "direction": "lower",
    "tolerance": 0.5,
    "protocol": {"samples": "50,000"},
    "checked": {
        "n": 50_000,
        "temperature": 1.0,
        "reference": "train",
        "weights_sha256": "6726825d",
    },
    "compared": {},
    "verified": "stored",
}
MEASURED = {
    "n": 50_000,
    "temperature": 1,
    "reference": "train",
    "reference_n": 45_000,
    "weights_sha256": "6726825d0af5f729",
}
BESIDE = {"claim": "flow.fid", "metric": "test/fid", "value": 41.0, "comparable": True}


@pytest.fixture
def root(tmp_path):
    """A results folder with one claim on FID."""
    root = tmp_path / "results"
    write_claims(root, fid=FID)
    return root


def write_claims(root, **claims):
    paper = {"title": "A flow", "arxiv": "0000.00000", "claims": claims}
    write(root / "paper/flow.yaml", yaml.safe_dump(paper, sort_keys=False))


def compared(root, **more):
    """The comparison of a result with the only claim."""
    (comparison,) = compare_all(result(papers=[BESIDE], **more), root)["comparisons"]
    return comparison


def test_a_run_by_the_papers_protocol_is_reproduced(root):
    comparison = compared(root, protocol={"test/fid": MEASURED})
    assert comparison["status"] == "reproduced"
    assert comparison["gap"] == pytest.approx(-1.0)
    assert comparison["differences"] == []


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"n": 10_000}, "samples: 10,000 here, 50,000 in the paper"),
        ({"temperature": 0.7}, "temperature: 0.7 here, 1 in the paper"),
        ({"reference": "test"}, "reference images: test here, train in the paper"),
        (
            {"weights_sha256": "0123456789abcdef"},
            "SHA-256 of the extractor's weights: 01234567 here, 6726825d in the paper",
        ),
    ],
)
def test_a_figure_by_another_protocol_is_never_called_reproduced(root, facts, sentence):
    for fid in (40.0, 80.0, None):  # better than the claim, worse, and not finite
        comparison = compared(
            root, metrics={"test/fid": fid}, protocol={"test/fid": MEASURED | facts}
        )
        assert comparison["status"] == "other protocol"
        assert comparison["gap"] is None
        assert comparison["differences"] == [sentence]


def test_a_fact_that_is_not_recorded_or_not_stated_is_a_difference(root):
    comparison = compared(root)
    assert comparison["status"] == "other protocol"
    assert comparison["differences"][0] == "samples: not recorded here, 50,000 in the paper"
    assert len(comparison["differences"]) == 4
    write_claims(root, fid=FID | {"checked": {"n": None}})
    comparison = compared(root, protocol={"test/fid": MEASURED})
    assert comparison["differences"] == ["samples: 50,000 here, not stated in the paper"]


def test_a_metric_that_was_not_measured_has_its_reason(root):
    reason = "no weights of the extractor: give metrics.inception_weights=FILE"
    comparison = compared(root, metrics={}, not_measured={"test/fid": reason})
    assert (comparison["status"], comparison["reason"]) == ("not measured", reason)
    assert compared(root, metrics={})["reason"] is None
    assert compared(root, protocol={"test/fid": MEASURED})["reason"] is None


def test_the_facts_of_a_likelihood_are_those_of_the_config_and_of_the_metrics_name():
    tested = {"step": 10, "chosen": "best", "weights": "raw"}
    run = result(tested=tested)
    facts = {"n_bits": 8, "noise": "uniform", "noise_samples": 1}
    tested_facts = {"checkpoint": "by validation images", "weights": "raw"}
    assert facts_of(run, "test/bpd") == facts | tested_facts
    assert facts_of(result(config={"data": {"n_bits": 5}}), "test/bpd") == facts | {"n_bits": 5}
    assert facts_of(result(config=None), "test/nll_noisy")["noise"] == "Gaussian"
    assert facts_of(result(), "test/bpd_bound_estimate")["noise"] == "learned"
    assert facts_of(result(), "test/bpd_iw16")["noise_samples"] == 16
    assert facts_of(run, "test/psnr") == tested_facts
    own = {"test/bpd": {"noise": "truncated"}}  # what a run recorded itself counts
    assert facts_of(result(protocol=own), "test/bpd")["noise"] == "truncated"


def test_the_choice_of_the_checkpoint_is_a_difference_in_words_that_is_allowed():
    claim = load_claim("glow.cifar10")
    run = result(tested={"step": 10, "chosen": "best", "weights": "averaged with decay 0.999"})
    assert differences(claim, run) == []
    assert allowed_differences(claim, run) == [
        "choice of the checkpoint: by validation images here, by test images in the paper",
        "tested weights: averaged with decay 0.999 here, raw in the paper",
    ]
    assert allowed_differences(claim, result()) == []  # an older run, which does not tell
    assert allowed_differences(load_claim("realnvp.cifar10"), run) == []


def test_seeds_of_which_one_has_another_protocol_are_of_another_protocol(root):
    good = compared(root, protocol={"test/fid": MEASURED})
    other = compared(root, protocol={"test/fid": MEASURED | {"n": 100}})
    runs = [result(seed=seed) for seed in range(2)]
    together = comparison_of(runs, [good, other], load_claim("flow.fid", root))
    assert (together["status"], together["gap"]) == ("other protocol", None)
    assert together["differences"] == other["differences"]
    assert comparison_of(runs, [good, good], load_claim("flow.fid", root))["status"] == "reproduced"


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ({"checked": {"n": {"a": 1}}}, "checked.n"),
        ({"checked": [1]}, "checked"),
        ({"allowed": 3}, "allowed"),
        ({"experiment": "a b"}, "experiment"),
        ({"verified": "recalled"}, "verified"),
        ({"compared": {"A": {"value": 1, "train": None, "decimals": 9}}}, "compared.A.decimals"),
    ],
)
def test_a_claim_of_another_form_is_named(root, more, place):
    write_claims(root, fid=FID | more)
    with pytest.raises(ValueError, match=rf"flow\.yaml: the claim fid lacks {place}: see") as error:
        load_claim("flow.fid", root)
    assert "\n" not in str(error.value)


def test_the_recipe_of_a_claim_is_named_as_it_unless_it_says_otherwise(root):
    assert recipe_of(load_claim("glow.cifar10")) == "glow_cifar10"
    write_claims(root, fid=FID | {"experiment": "flow_cifar10"})
    assert recipe_of(load_claim("flow.fid", root)) == "flow_cifar10"
