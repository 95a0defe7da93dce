"""What the papers claim, the names of metrics, and whether a run measured by a claim's protocol."""

import json

import pytest
import yaml

from lightning_modules.callbacks import image_quality
from results import (
    compare_all,
    load_claim,
    load_claims,
    printed,
    recipe_of,
    reimplementations,
    same_images,
    survey,
)
from results.blocks import Table
from results.files import write
from results.formats import count
from results.groups import comparison_of
from results.metrics import QUANTITIES, label_of, quantity_of
from results.protocol import allowed_differences, differences, facts_of
from results.runs import add, form


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
        ({"published_weights": False}, "weights of the network: not the published ones here"),
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


def test_recording_a_run_says_what_keeps_its_figure_from_comparison(root, tmp_path):
    folder = tmp_path / "outputs/flow_cifar10/seed0"
    measured = MEASURED | {"n": 10_000}
    record = result(papers=[BESIDE], protocol={"test/fid": measured})
    write(folder / "result.json", json.dumps(record))
    addition = add(folder, root=root)  # without a suspect, which only a gap needs
    assert "other protocol" in addition.lines[0]
    sentence = "samples: 10,000 here, 50,000 in the paper"
    assert f"test/fid is not compared with the paper's: {sentence}" in addition.lines
    (content,) = addition.files.values()
    assert json.loads(content)["comparisons"][0]["differences"] == [sentence]
    assert json.loads(content)["protocol"] == {"test/fid": measured}


def test_a_fact_that_is_not_recorded_or_not_stated_is_a_difference(root):
    comparison = compared(root)
    assert comparison["status"] == "other protocol"
    assert comparison["differences"][0] == "samples: not recorded here, 50,000 in the paper"
    assert len(comparison["differences"]) == 4
    write_claims(root, fid=FID | {"checked": {"n": None}})
    comparison = compared(root, protocol={"test/fid": MEASURED})
    assert comparison["differences"] == ["samples: 50,000 here, not stated in the paper"]
    comparison = compared(root, protocol={"test/fid": MEASURED | {"n": None}})
    assert comparison["differences"] == ["samples: none here, not stated in the paper"]


@pytest.mark.parametrize("row", ["div2k_x4", "div2k_x8", "celeba_x8", "celeba_x8_progressive"])
def test_lpips_by_other_weights_and_niqe_by_our_function_are_not_compared(row):
    claim = load_claim(f"srflow.{row}_lpips")
    facts = {fact: value for fact, value in claim["checked"].items() if fact != "weights_sha256"}
    by_published = facts | {"weights_sha256": "7be5be79" + "0" * 56}
    assert differences(claim, {"protocol": {"test/lpips": by_published}}) == []
    by_others = facts | {"weights_sha256": "0123456789abcdef"}
    [sentence] = differences(claim, {"protocol": {"test/lpips": by_others}})
    assert sentence == ("SHA-256 of the extractor's weights: 01234567 here, 7be5be79 in the paper")
    claim = load_claim(f"srflow.{row}_niqe")
    measured = claim["checked"] | {"implementation": "paperflows"}
    [sentence] = differences(claim, {"protocol": {"test/niqe": measured}})
    assert sentence == "implementation: paperflows here, MATLAB in the paper"


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
    assert facts_of(result(), "test/nll") == {"noise_samples": 1}  # of points: no bits, no noise
    own = {"test/bpd": {"noise": "truncated"}}  # what a run recorded itself counts
    assert facts_of(result(protocol=own), "test/bpd")["noise"] == "truncated"


@pytest.mark.parametrize(
    ("data", "same"),
    [
        ({"name": "div2k", "scale": 4}, True),
        ({"name": "div2k", "scale": 8}, False),
        ({"name": "div2k"}, False),
        ({"name": "folder", "scale": 4}, False),
        ({"name": "div2k", "scale": 4, "n_bits": 5}, True),  # the claim says nothing of bits
    ],
)
def test_images_of_another_scale_are_other_images(data, same):
    claim = load_claim("srflow.div2k_x4_psnr")
    assert same_images(claim, data) is same
    run = result(config={"data": data}, metrics={"test/psnr": 27.0})
    assert facts_of(run, "test/psnr").get("scale") == data.get("scale")


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


def test_a_misspelled_key_of_a_claim_is_named(root):
    write_claims(root, fid={**FID, "cheked": {"n": 50_000}})
    message = r"flow\.yaml: the claim fid has an unknown key 'cheked': did you mean 'checked'\?"
    with pytest.raises(ValueError, match=message) as error:
        load_claim("flow.fid", root)
    assert "\n" not in str(error.value)


def test_the_recipe_of_a_claim_is_named_as_it_unless_it_says_otherwise(root):
    assert recipe_of(load_claim("glow.cifar10")) == "glow_cifar10"
    write_claims(root, fid=FID | {"experiment": "flow_cifar10"})
    assert recipe_of(load_claim("flow.fid", root)) == "flow_cifar10"


# SRFlow's tables

DIV2K_X4 = {  # a row of the review's Table 3: SRFlow, and what it is compared with
    "psnr": (27.09, {"Bicubic": 26.70, "EDSR": 28.98, "RRDB": 29.44}),
    "ssim": (0.76, {"Bicubic": 0.77, "EDSR": 0.83, "RRDB": 0.84}),
    "lpips": (0.120, {"Bicubic": 0.409, "EDSR": 0.270, "RRDB": 0.253}),
    "lr_psnr": (49.96, {"Bicubic": 38.70, "EDSR": 54.89, "RRDB": 49.20}),
    "niqe": (3.57, {"Bicubic": 5.20, "EDSR": 4.46, "RRDB": 5.08}),
    "brisque": (17.8, {"Bicubic": 53.8, "EDSR": 43.3, "RRDB": 52.4}),
    "piqe": (18.6, {"Bicubic": 86.6, "EDSR": 77.5, "RRDB": 86.7}),
}
REST_X4 = {
    "RankSRGAN": (26.55, 0.75, 0.128, 42.33, 2.45, 17.2, 20.1),
    "ESRGAN": (26.22, 0.75, 0.124, 39.03, 2.61, 22.7, 26.2),
}
SRFLOW = {  # psnr, ssim, lpips, lr_psnr, niqe, brisque, piqe and, for faces, diversity
    "div2k_x8": (23.05, 0.57, 0.272, 50.00, 3.49, 20.9, 17.1),
    "celeba_x8": (25.24, 0.71, 0.110, 50.85, 4.20, 23.2, 24.0, 5.21),
    "celeba_x8_progressive": (25.20, 0.71, 0.110, 51.05, 4.20, 22.5, 23.1, 5.28),
}
BICUBIC = {
    "div2k_x8": (23.74, 0.63, 0.584, 37.16, 6.65, 60.3, 97.6),
    "celeba_x8": (23.15, 0.63, 0.517, 35.19, 7.82, 58.6, 99.97, 0),
}


def values_of(prefix, model=None):
    """The figures of SRFlow, or of a model that it is compared with, in the order of a table."""
    names = [*DIV2K_X4, "diversity"]
    claims = load_claims()
    rows = [claims[key] for name in names if (key := f"srflow.{prefix}_{name}") in claims]
    if model is None:
        return tuple(claim["value"] for claim in rows)
    return tuple(claim["compared"][model]["value"] for claim in rows)


def test_srflows_table_on_div2k_at_scale_4():
    for name, (value, models) in DIV2K_X4.items():
        claim = load_claim(f"srflow.div2k_x4_{name}")
        assert claim["value"] == value
        quoted = {model: entry["value"] for model, entry in claim["compared"].items()}
        assert {model: quoted[model] for model in models} == models
    assert {model: values_of("div2k_x4", model) for model in REST_X4} == REST_X4


def test_lr_psnr_of_rounded_images_is_not_compared_with_that_of_images_rounded_down():
    """The difference is several times the tolerance; for PSNR it is a tenth of it."""
    claims = {name: load_claim(f"srflow.div2k_x4_{name}") for name in ("psnr", "lr_psnr")}
    facts = {
        f"test/{name}": image_quality.facts_of(4)[name] | {"temperature": 0.9} for name in claims
    }
    run = result(protocol=facts, config={"data": {"name": "div2k", "scale": 4}})
    sentence = "rounding: to the nearest level here, down in the paper"
    assert differences(claims["lr_psnr"], run) == [sentence]
    assert differences(claims["psnr"], run) == []
    assert sentence in allowed_differences(claims["psnr"], run)


def test_srflows_other_tables():
    assert {prefix: values_of(prefix) for prefix in SRFLOW} == SRFLOW
    assert {prefix: values_of(prefix, "Bicubic") for prefix in BICUBIC} == BICUBIC
    prog = (23.97, 0.67, 0.129, 41.95, 3.49, 28.6, 33.2, 0)
    assert values_of("celeba_x8_progressive", "ProgFSR") == prog
    rrdb = (26.59, 0.77, 0.23, 48.22, 6.02, 49.7, 86.5, 0)
    assert values_of("celeba_x8", "RRDB") == rrdb
    claims = load_claims()
    ablation = {
        row: [claims[f"srflow.div2k_x4_{row}_{name}"]["value"] for name in ("psnr", "ssim")]
        for row in ("no_transition", "no_injector")
    }
    assert ablation == {"no_transition": [26.96, 0.759], "no_injector": [26.81, 0.756]}
    full = claims["srflow.div2k_x4_no_injector_ssim"]["compared"]["SRFlow"]["value"]
    assert full == 0.763


def test_a_model_of_a_claim_may_be_printed_with_decimals_of_its_own():
    claim = load_claim("srflow.celeba_x8_piqe")
    words = {
        model: printed(entry["value"], {**claim, **entry})
        for model, entry in claim["compared"].items()
    }
    assert printed(claim["value"], claim) == "24.0"
    assert words == {"Bicubic": "99.97", "RRDB": "86.5", "ESRGAN": "32.4"}


def test_the_metric_of_every_claim_is_a_known_quantity_with_its_unit_and_direction():
    for claim_id, claim in load_claims().items():
        quantity = QUANTITIES[quantity_of(claim["metric"])]
        assert (claim["direction"], claim["unit"]) == (quantity.direction, quantity.unit), claim_id
        assert claim["checked"], claim_id


def test_the_metrics_of_a_recipe_are_each_in_one_claim():
    claims = [(recipe_of(claim), claim["metric"]) for claim in load_claims().values()]
    assert len(set(claims)) == len(claims)


# The other papers' tables


def test_the_tables_of_nice_ffjord_residual_flow_and_ddpm():
    values = {name: claim["value"] for name, claim in load_claims().items()}
    papers = {}
    for name, value in values.items():
        paper, _, row = name.partition(".")
        papers.setdefault(paper, {})[row] = value
    assert papers["nice"] == {
        "mnist": 1980.50,
        "tfd": 5514.71,
        "svhn": 11496.55,
        "cifar10": 5371.78,
    }
    assert papers["ffjord"] == {
        "power": -0.46,
        "gas": -8.59,
        "hepmass": 14.92,
        "miniboone": 10.43,
        "bsds300": -157.40,
        "mnist": 0.99,
        "cifar10": 3.40,
    }
    assert papers["resflow"] == {
        "mnist": 0.97,
        "cifar10": 3.28,
        "imagenet32": 4.01,
        "imagenet64": 3.76,
        "celebahq256_5bit": 0.99,
        "cifar10_fid": 46.37,
    }
    assert papers["ddpm"] == {
        "cifar10": 3.75,
        "cifar10_fid": 3.17,
        "cifar10_inception_score": 9.46,
        "lsun_bedroom256_fid": 6.36,
        "lsun_church256_fid": 7.89,
        "lsun_cat256_fid": 19.75,
    }


def test_a_log_likelihood_in_nats_is_compared_in_the_same_range_of_pixels_only():
    claim = load_claim("nice.mnist")
    data = {"config": {"data": {"name": "mnist", "n_bits": 8}}}
    same = result(protocol={"test/nats_ll": {"pixel_range": "0 to 1"}}, **data)
    other = result(protocol={"test/nats_ll": {"pixel_range": "-1 to 1"}}, **data)
    assert differences(claim, same) == []
    assert differences(claim, other) == ["pixel range: -1 to 1 here, 0 to 1 in the paper"]


def test_an_fid_whose_protocol_the_paper_does_not_state_is_never_reproduced():
    claim = load_claim("resflow.cifar10_fid")
    run = result(protocol={"test/fid": {"n": 50_000, "reference": "train"}})
    assert differences(claim, run) == [
        "samples: 50,000 here, not stated in the paper",
        "reference images: train here, not stated in the paper",
    ]
    ddpm = load_claim("ddpm.cifar10_fid")
    published = {"n": 50_000, "reference": "train", "weights_sha256": "6726825d0af5f729"}
    assert differences(ddpm, result(protocol={"test/fid": published})) == []
    without_validation = result(protocol={"test/fid": {**published, "reference_n": 45_000}})
    assert differences(ddpm, without_validation) == []
    assert allowed_differences(ddpm, without_validation) == [
        "number of reference images: 45,000 here, 50,000 in the paper"
    ]
    fewer = result(protocol={"test/fid": {**published, "n": 5_000, "reference": "test"}})
    assert differences(ddpm, fewer) == [
        "samples: 5,000 here, 50,000 in the paper",
        "reference images: test here, train in the paper",
    ]


# The survey


def test_the_survey_is_quoted_as_it_is_printed():
    heading, paragraph, table, notes = survey.section()
    assert heading.text == "Other generative models"
    assert "no run is compared" in paragraph.text
    assert [row[1:] for row in table.rows] == [
        ["DCGAN", "37.11", "-"],
        ["ProGAN", "15.52", "-"],
        ["BigGAN", "14.73", "-"],
        ["StyleGAN2 + ADA", "2.42", "-"],
        ["Convolutional VAE", "106.37", "≤ 4.54"],
        ["Variational Lossy AE", "-", "≤ 2.95"],
        ["VQ-VAE", "-", "≤ 4.67"],
        ["VD-VAE", "-", "≤ 2.87"],
        ["RealNVP", "-", "3.49"],
        ["Glow", "45.99", "3.35"],
        ["FFJORD", "-", "3.40"],
        ["Residual Flow", "46.37", "3.28"],
    ]
    assert any("46.90" in note for note in notes.items)


def test_a_folder_without_a_survey_has_no_section_and_a_damaged_one_is_named(root):
    assert survey.section(root) == []
    for content, message in (("a: [", "is not YAML"), ("title: A", "lacks a usable arxiv, data")):
        write(root / "survey.yaml", content)
        with pytest.raises(ValueError, match=message) as error:
            survey.section(root)
        assert "\n" not in str(error.value)


# Other implementations


def test_points_of_other_implementations_have_their_place_over_images():
    points = reimplementations.published("glow.cifar10")
    by_name = {}
    for point in points:
        by_name.setdefault(point.label, []).append((point.images, point.value))
    assert by_name["y0ast/Glow-PyTorch"] == [(12_500_000, 3.39)]
    assert by_name["openai/glow"] == [(150_000_000, 3.35)]
    values = {
        1: 3.63,
        2: 3.56,
        3: 3.53,
        4: 3.51,
        5: 3.50,
        6: 3.51,
        7: 3.49,
        8: 3.49,
    }  # by tens of epochs
    expected = [(500_000 * tens, value) for tens, value in values.items()]
    assert by_name["chrischute/glow"] == expected
    assert "y0ast/Glow-PyTorch with Adam" not in by_name  # it does not say after how many images
    assert [(p.images, p.value) for p in reimplementations.published("realnvp.cifar10")] == [
        (1_000_000, 3.70),
        (1_250_000, 3.74),
    ]
    assert reimplementations.published("realnvp.celeba") == []


def test_the_section_names_every_implementation_and_what_differs():
    blocks = reimplementations.section()
    tables = [block for block in blocks if isinstance(block, Table)]
    rows = {row[0]: row for table in tables for row in table.rows}
    assert rows["VincentStimper/resampled-base-flows"][1:3] == ["< 3.3", count(512_000_000)]
    assert rows["y0ast/Glow-PyTorch with Adam"][1:3] == ["3.48", "not stated"]
    assert all(row[-1] for row in rows.values())
    assert set(reimplementations.read()) <= set(load_claims())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"points": [{"epochs": 3, "value": 3.5}]}, "3 epochs need `epoch`"),
        ({"points": []}, r"a\.b lacks a usable \.x\.points"),
        ({"points": [{"value": "3.5"}]}, r"lacks a usable \.x\.points\[0\]\.value"),
    ],
)
def test_a_damaged_file_of_implementations_is_one_line(root, entry, message):
    assert reimplementations.section(root) == []
    whole = {"verified": "stored", "source": "pages"}
    more = {"what": "a", "where": "b", "differs": "c", **entry}
    write(root / "reimplementations.yaml", yaml.safe_dump({**whole, "a.b": {"x": more}}))
    with pytest.raises(ValueError, match=message) as error:
        reimplementations.published("a.b", root)
    assert "\n" not in str(error.value)
