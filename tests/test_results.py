"""Claims, the status rule, taking a run in, and the page."""

import copy
import json
import math
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest
import yaml
from PIL import Image

import results
from results import figure3, runs, speed, stability
from results.__main__ import main
from results.blocks import markdown
from results.checks import anything, record
from results.files import PICTURE_BYTES, as_bytes, checked_json, content_of, portable, write
from results.formats import budget, count, wall_time
from results.metrics import KINDS, kind_of, without_kind
from results.page import render, sections
from results.reading import read

CLAIM = {
    "dataset": "CIFAR-10",
    "data": "cifar10",
    "table": "Table 1",
    "row": "Ours",
    "split": "test",
    "metric": "test/bpd",
    "unit": "bits/dim",
    "value": 3.49,
    "train": None,
    "direction": "lower",
    "tolerance": 0.02,
    "protocol": {"n_bits": 8},
    "compared": {},
    "verified": "stored",
    "source": "Table 1",
}
PAPER = {"claim": "flow.cifar10", "metric": "test/bpd", "value": 3.49, "comparable": True}
CURVE = """step,images,seconds,lr,train/bpd,val/bpd
1,64,0.5,0.001,9.5,
100,6400,50.25,0.001,4.5,
200,12800,100,0.001,4.0,4.1
"""


PSNR = CLAIM | {
    "metric": "test/psnr",
    "unit": "dB",
    "value": 27.75,
    "direction": "higher",
    "tolerance": 0.1,
}
LPIPS = CLAIM | {
    "metric": "test/lpips",
    "unit": "",
    "value": 0.12,
    "decimals": 3,
    "tolerance": 0.001,
}


def result(value=3.9, fraction=0.032, **more):
    """A result as reproduce/ writes it."""
    return {
        "experiment": "flow_cifar10",
        "run": "20261122-231500-ab12",
        "preset": "cpu",
        "metrics": {"test/bpd": value},
        "papers": [PAPER],
        "gap": None,
        "status": "-",
        "seed": 0,
        "commit": "0123456789abcdef",
        "dirty": False,
        "device": "CPU",
        "budget": {"images": 400_000, "of": 12_480_000, "fraction": fraction, "source": "ours"},
        "versions": {"torch": "2.9"},
        "config": {
            "data": {"name": "cifar10", "root": "/home/me/data"},
            "run_dir": "/home/me/outputs/a",
        },
        "precision": "32-true",
        "tf32": False,
        "deterministic": False,
        "images": 400_000,
        "seconds": 1234.5,
        "n_train": 45_000,
        "wandb_url": None,
        "weights": None,
        "suspect": None,
        **more,
    }


EARLIER_END = {
    "steps": 100,
    "images": 6400,
    "seconds": 60.0,
    "metrics": {"test/bpd": 4.5, "val/bpd": 4.6},
    "commit": "abcdef0123",
    "date": "2026-11-27T10:00:00+00:00",
}
START = {"model": "a/b", "experiment": "a", "commit": "abcdef0123", "sha256": 64 * "0"}
WEIGHTS = {"file": "weights/a/b.safetensors", "sha256": 64 * "0", "bytes": 3_140_000}
WEIGHTS |= {"dtype": "float32"}


def write_claims(root, **claims):
    """The file of a paper with these claims, in the place of one that is there."""
    paper = {"title": "A flow", "arxiv": "1234.5678", "claims": claims}
    write(root / "paper/flow.yaml", yaml.safe_dump(paper, sort_keys=False))


@pytest.fixture
def root(tmp_path):
    """A results folder with two claims: lower and higher is better."""
    root = tmp_path / "results"
    mnist = CLAIM | {"value": 1980.5, "direction": "higher", "tolerance": 19.8}
    write_claims(root, cifar10=CLAIM, mnist=mnist)
    return root


@pytest.fixture
def run(tmp_path):
    """A finished run's folder."""
    folder = tmp_path / "outputs/flow_cifar10/20261122-231500-ab12"
    write(folder / "result.json", json.dumps(result()))
    write(folder / "curve.csv", CURVE)
    (folder / "samples").mkdir()
    Image.new("RGB", (20, 20)).save(folder / "samples/samples_100.png")
    return folder


def recorded(root, **more):
    """Record a result directly and give it back."""
    record = portable(result(**more))
    write(root / f"runs/{record['experiment']}/{record['run']}.json", json.dumps(record))
    return record


def compare(record, root):
    """gap and status beside the only claim."""
    return {
        key: value
        for key, value in results.compare_all(record, root).items()
        if key != "comparisons"
    }


def whole(root):
    """The whole page as Markdown without links inside it, which is easier to read than HTML."""
    content = "\n".join(markdown(sections(read(root))))
    return re.sub(r"\[([^]]*)\]\(#[^)]*\)", r"\1", content)


def snapshot(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# Claims


def test_realnvp_table_has_its_seven_rows():
    claims = {
        name[8:]: claim
        for name, claim in results.load_claims().items()
        if name.startswith("realnvp.")
    }
    assert {name: (claim["value"], claim["train"]) for name, claim in claims.items()} == {
        "cifar10": (3.49, None),
        "imagenet32": (4.28, 4.26),
        "imagenet64": (3.98, 3.75),
        "lsun_bedroom": (2.72, 2.70),
        "lsun_tower": (2.81, 2.78),
        "lsun_church": (3.08, 2.94),
        "celeba": (3.02, 2.97),
    }
    quoted = {
        name: {key: tuple(m.values()) for key, m in claim["compared"].items()}
        for name, claim in claims.items()
    }
    assert {name: models for name, models in quoted.items() if models} == {
        "cifar10": {
            "PixelRNN": (3.00, None, "exact"),
            "Conv DRAW": (3.59, None, "upper"),
            "IAF-VAE": (3.28, None, "upper"),
        },
        "imagenet32": {"PixelRNN": (3.86, 3.83, "exact"), "Conv DRAW": (4.40, 4.35, "upper")},
        "imagenet64": {"PixelRNN": (3.63, 3.57, "exact"), "Conv DRAW": (4.10, 4.04, "upper")},
    }
    assert {claim["tolerance"] for claim in claims.values()} == {0.02}
    assert all(
        {"n_bits", "weights", "images", "flips"} <= set(claim["protocol"])
        for claim in claims.values()
    )


def test_glow_tables():
    claims = {
        name[5:]: claim for name, claim in results.load_claims().items() if name.startswith("glow.")
    }
    assert {
        name: (c["table"], c["value"], c["protocol"]["n_bits"], c["data"])
        for name, c in claims.items()
    } == {
        "cifar10": ("Table 2", 3.35, 8, "cifar10"),
        "imagenet32": ("Table 2", 4.09, 8, "imagenet32_old"),
        "imagenet64": ("Table 2", 3.81, 8, "imagenet64_old"),
        "lsun_bedroom": ("Table 2", 2.38, 8, "lsun_bedroom"),
        "lsun_tower": ("Table 2", 2.46, 8, "lsun_tower"),
        "lsun_church": ("Table 2", 2.67, 8, "lsun_church"),
        "cifar10_additive5bit": ("Table 3", 1.67, 5, "cifar10"),
        "imagenet32_additive5bit": ("Table 3", 1.99, 5, "imagenet32_old"),
        "imagenet64_additive5bit": ("Table 3", 1.76, 5, "imagenet64_old"),
        "celebahq256_additive5bit": ("Table 3", 1.03, 5, "celebahq256"),
    }
    realnvp = {
        name: results.load_claim(f"realnvp.{name}")["value"]
        for name in claims
        if "5bit" not in name
    }
    quoted = {
        name: c["compared"]["RealNVP"]["value"] for name, c in claims.items() if c["compared"]
    }
    assert quoted == realnvp  # as its own paper has them
    keys = {
        "dequantization",
        "noise_samples",
        "weights",
        "checkpoint",
        "augmentation",
        "training_length",
    }
    assert all(
        keys | {"n_bits", "K", "L", "batch", "coupling", "images"} == set(c["protocol"])
        for c in claims.values()
    )
    couplings = {(c["protocol"]["n_bits"], c["protocol"]["coupling"]) for c in claims.values()}
    assert couplings == {(8, "affine"), (5, "additive")}


def test_every_claim_is_complete_and_names_its_source():
    for claim_id, claim in results.load_claims().items():
        assert claim["verified"] in ("seed", "stored"), claim_id
        assert set(CLAIM) <= set(claim), claim_id
        assert claim["direction"] in ("lower", "higher")
        assert claim["tolerance"] >= 0
        assert claim["source"]


def test_unknown_claim_names_the_nearest():
    with pytest.raises(
        ValueError, match=r"unknown claim 'realnvp\.cifar': did you mean 'realnvp\.cifar10'"
    ) as error:
        results.load_claim("realnvp.cifar")
    assert "\n" not in str(error.value)


def test_broken_claims_file_is_one_line(root):
    write(root / "paper/flow.yaml", "claims: [")
    with pytest.raises(ValueError, match=r"flow\.yaml must be YAML") as error:
        results.load_claims(root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("decimals", [-1, 7, 2.0, "2", True, None])
def test_impossible_decimals_are_refused_in_one_line(root, decimals):
    write_claims(root, cifar10=CLAIM | {"decimals": decimals})
    message = (
        rf"flow\.yaml: decimals={decimals} of the claim cifar10 are not understood: "
        "give an int from 0 to 6"
    )
    with pytest.raises(ValueError, match=message) as error:
        results.load_claims(root)
    assert "\n" not in str(error.value)


def test_our_number_has_one_decimal_more_than_the_papers_and_at_least_three():
    claims = [{}, {"decimals": 0}, {"decimals": 3}, {"decimals": 6}]
    assert [results.printed(0.12, claim) for claim in claims] == ["0.12", "0", "0.120", "0.120000"]
    assert [results.own_decimals(claim) for claim in claims] == [3, 3, 4, 7]
    assert [results.own_decimals(claim, 4) for claim in claims] == [4, 4, 4, 7]


# The status rule


@pytest.mark.parametrize(
    ("value", "fraction", "status"),
    [
        (3.40, 0.01, "reproduced"),  # better than the paper, whatever the budget
        (3.51, 1.0, "reproduced"),  # on the tolerance, though 3.51 - 3.49 > 0.02 in binary
        (3.5101, 1.0, "gap"),
        (3.5101, 1.5, "gap"),
        (3.5101, 0.999, "shortened"),
        (3.9, None, "shortened"),
        (math.nan, 1.0, "gap"),
        (-math.inf, 0.5, "shortened"),
        (None, 0.5, "shortened"),
        (True, 0.5, "shortened"),
    ],
)
def test_status(root, value, fraction, status):
    assert compare(result(value, fraction), root)["status"] == status


def test_gap_is_ours_minus_the_paper(root):
    assert compare(result(3.9), root)["gap"] == pytest.approx(0.41)
    assert compare(result(math.nan), root)["gap"] is None
    assert compare(result(metrics={"val/bpd": 3.0}), root) == {
        "gap": None,
        "status": "not measured",
    }


@pytest.mark.parametrize(
    ("value", "status"),
    [(1960.7, "reproduced"), (2500.0, "reproduced"), (1960.6, "gap"), (math.inf, "gap")],
)
def test_higher_is_better(root, value, status):
    paper = {"claim": "flow.mnist", "metric": "test/nats_ll", "comparable": True}
    record = result(fraction=1.0, metrics={"test/nats_ll": value}, papers=[paper])
    assert compare(record, root)["status"] == status


def test_nothing_to_compare_with(root):
    other = PAPER | {"comparable": False}
    assert compare(result(3.0, papers=[]), root) == {"gap": None, "status": "-"}
    assert compare(result(3.0, papers=[other]), root) == {"gap": None, "status": "-"}


@pytest.mark.parametrize(
    ("claimed", "data", "compared"),
    [
        ({"n_bits": 8}, {"n_bits": 8}, True),
        ({"n_bits": 8}, {}, True),  # recorded before there was a choice
        ({"n_bits": 8}, {"n_bits": 5}, False),
        ({"n_bits": 5}, {"n_bits": 5}, True),
        ({"n_bits": 5}, {"n_bits": 8}, False),
        ({"n_bits": 5}, {}, False),
        ({}, {"n_bits": 5}, True),
    ],
)
def test_bits_are_compared_with_the_same_bits_only(root, claimed, data, compared):
    write_claims(root, cifar10=CLAIM | {"protocol": claimed})
    record = result(3.0, config={"data": {"name": "cifar10", **data}})
    comparisons = {
        True: {"gap": pytest.approx(-0.49), "status": "reproduced"},
        False: {"gap": None, "status": "-"},
    }
    assert compare(record, root) == comparisons[compared]
    assert results.same_n_bits(CLAIM | {"protocol": claimed}, data) is compared


def test_runs_without_a_config_have_8_bits(root):
    assert compare(result(3.0, config=None), root)["status"] == "reproduced"


@pytest.mark.parametrize(
    ("metrics", "status"),
    [
        ({"test/bpd": 3.6}, "shortened"),
        ({"test/bpd": None}, "shortened"),  # measured, and not finite
        ({"test/bpd_bound": 3.4}, "-"),
        ({"test/bpd_iw16": 3.4, "test/bpd_bound": 3.5}, "-"),
        ({"test/bpd_bound": 3.4, "test/bpd": 3.6}, "shortened"),
        ({"test/nll": 1.0, "val/bpd": 3.6}, "not measured"),
        ({}, "not measured"),
    ],
)
def test_a_figure_is_compared_with_its_own_kind_only(root, metrics, status):
    comparison = compare(result(metrics=metrics), root)
    assert comparison["status"] == status
    if metrics.get("test/bpd"):
        assert comparison["gap"] == pytest.approx(0.11)
    else:
        assert comparison["gap"] is None


def test_an_exact_figure_is_not_compared_with_a_claim_on_a_bound(root):
    write_claims(root, cifar10=CLAIM | {"metric": "test/bpd_bound"})
    older = PAPER | {"metric": "test/bpd"}  # of a run that was recorded before the claim said so
    newer = PAPER | {"metric": "test/bpd_bound"}
    bound = {"test/bpd_bound": 3.4}
    assert compare(result(3.4, papers=[older]), root) == {"gap": None, "status": "-"}
    assert compare(result(3.4, papers=[newer]), root) == {"gap": None, "status": "-"}
    assert compare(result(papers=[older], metrics=bound), root)["status"] == "-"
    assert compare(result(papers=[newer], metrics=bound), root)["status"] == "reproduced"


def test_the_kind_is_read_off_the_name():
    kinds = {
        "test/bpd": "exact",
        "test/bpd_bound": "bound",
        "val/bpd_iw16": "iw",
        "bpd_estimate": "estimate",
        "test/bpd_noisy": "noisy",
        "test/bpd_bound_reestimated": "bound",
        "test/bpd_reestimated": "exact",
        "test/nats_ll": "exact",
        "test/nats_ll_bound": "bound",
        "test/psnr": "exact",
    }
    assert {key: kind_of(key) for key in kinds} == kinds
    assert {without_kind(key) for key in ("test/bpd", "test/bpd_bound", "test/bpd_iw16")} == {
        "test/bpd"
    }
    assert without_kind("test/nats_ll_bound") == "test/nats_ll"
    assert without_kind("test/bpd_bound_reestimated") == "test/bpd_reestimated"


# Several claims


@pytest.fixture
def several(root):
    """A result that stands beside three claims of one paper, of which its run measured two."""
    claims = {"psnr": PSNR, "lpips": LPIPS, "ssim": CLAIM | {"metric": "test/ssim"}}
    write_claims(root, **claims)
    metrics = {"test/psnr": 27.7, "test/lpips": 0.1234567}
    papers = [
        {
            "claim": f"flow.{row}",
            "metric": claim["metric"],
            "value": claim["value"],
            "comparable": True,
        }
        for row, claim in claims.items()
    ]
    curve = [{"images": 64 * k, "val/psnr": 20 + k, "train/psnr": 21 + k} for k in range(5)]
    return result(metrics=metrics, papers=papers, fraction=1.0, curve=curve)


def test_each_claim_of_a_run_has_its_gap_and_its_status(root, several):
    compared = results.compare_all(several, root)
    assert [
        (c["claim"], c["metric"], c["value"], c["status"]) for c in compared["comparisons"]
    ] == [
        ("flow.psnr", "test/psnr", 27.75, "reproduced"),
        ("flow.lpips", "test/lpips", 0.12, "gap"),
        ("flow.ssim", "test/ssim", 3.49, "not measured"),
    ]
    gaps = [comparison["gap"] for comparison in compared["comparisons"]]
    assert gaps == [pytest.approx(-0.05), pytest.approx(0.0034567), None]
    assert (compared["gap"], compared["status"]) == (gaps[0], "reproduced")


def test_the_page_has_a_row_for_each_claim_with_the_claims_decimals(root, several):
    write(root.parent / "README.md", "<!-- results -->\n<!-- /results -->\n")
    recorded(root, **several)
    files = render(root)
    page = whole(root)
    rows = [line.split(" | ")[:8] for line in page.splitlines() if line.startswith("| flow_")]
    assert {row[0] for row in rows} == {"| flow_cifar10 preset=cpu"}
    rows = [[row[6], *row[2:5], row[1]] for row in rows]
    assert rows == [
        ["test/psnr", "27.75", "27.700", "-0.050", "reproduced"],
        ["test/lpips", "0.120", "0.1235", "+0.0035", "gap"],
        ["test/ssim", "3.49", "-", "-", "not measured"],
    ]
    front = [
        line.split(" | ")[3:8]
        for line in files[root.parent / "README.md"].splitlines()
        if "| flow_" in line
    ]
    assert front == rows
    assert page.count("### flow_cifar10/20261122-231500-ab12") == 1
    assert page.count("The paper's protocol: n_bits 8.\n") == 1
    assert "## Runs without a paper's number\n\nNone yet.\n" in page
    svg = files[root / f"runs/flow_cifar10/{several['run']}.svg"]
    assert "paper 27.75<" in svg
    assert svg.count("stroke-dasharray") == 1


def test_a_papers_table_is_split_by_metric_and_has_the_claims_decimals(root):
    quoted = {"ESRGAN": {"value": 0.1, "train": 0.09, "bound": "exact"}}
    claims = {"psnr": PSNR, "lpips": LPIPS | {"compared": quoted, "train": 0.11}}
    write_claims(root, **claims)
    page = whole(root)
    assert "The figure on the training images stands in brackets" in page
    assert "Table 1, test/psnr:\n" in page
    assert "Table 1, test/lpips:\n" in page
    assert "| CIFAR-10 | test | dB | 27.75 | stored |" in page
    assert "| CIFAR-10 | test | - | 0.120 (0.110) | 0.100 (0.090) | stored |" in page


def test_a_curve_has_the_line_of_its_own_metric_only(root, several):
    for metric, line in (("psnr", "paper 27.75<"), ("lpips", "paper 0.120<"), ("l1", None)):
        curve = [{"images": 64 * k, f"val/{metric}": 1.0 + k} for k in range(3)]
        record = recorded(root, **several | {"curve": curve})
        svg = render(root)[root / f"runs/flow_cifar10/{record['run']}.svg"]
        assert f">{metric}<" in svg
        assert ("stroke-dasharray" in svg) == (line is not None)
        assert (line or "") in svg


def test_protocols_that_differ_say_whose_they_are(root, several):
    claims = {
        "psnr": PSNR | {"protocol": {"crop": 4}},
        "lpips": LPIPS | {"protocol": {"network": "alex"}},
        "ssim": CLAIM | {"metric": "test/ssim", "protocol": {"crop": 4}},
    }
    write_claims(root, **claims)
    recorded(root, **several)
    page = whole(root)
    assert "The paper's protocol for test/psnr, test/ssim: crop 4.\n" in page
    assert "The paper's protocol for test/lpips: network alex.\n" in page


def test_a_gap_beside_any_claim_needs_a_suspect(root, run, several, capsys):
    write(run / "result.json", json.dumps(several))
    assert main(["add", str(run)], root) == 1
    assert "a gap at full budget needs a named suspect" in capsys.readouterr().err
    assert main(["add", str(run), "suspect=another network"], root) == 0
    path = root / f"runs/flow_cifar10/{several['run']}.json"
    line = f"recorded {path}: test/psnr reproduced, test/lpips gap, test/ssim not measured"
    assert line in capsys.readouterr().out.splitlines()
    record = json.loads(path.read_text())
    assert [comparison["status"] for comparison in record["comparisons"]] == [
        "reproduced",
        "gap",
        "not measured",
    ]


@pytest.mark.parametrize("paper", [PAPER, PAPER | {"comparable": False}, None])
def test_runs_recorded_with_one_paper_give_the_same_page(root, paper):
    papers = [entry for entry in [paper] if entry is not None]
    record = recorded(root, papers=papers, curve=[{"images": 1, "val/bpd": 4.0}])
    page = render(root)
    older = {key: value for key, value in record.items() if key != "papers"} | {"paper": paper}
    write(root / f"runs/flow_cifar10/{record['run']}.json", json.dumps(older))
    assert render(root) == page


def test_kinds_are_explained_under_the_table_that_shows_them(root):
    claims = {"cifar10": CLAIM, "cifar10_vdq": CLAIM | {"metric": "test/bpd_bound", "value": 3.28}}
    write_claims(root, **claims)
    paper = PAPER | {"claim": "flow.cifar10_vdq", "metric": "test/bpd_bound"}
    recorded(root, run="a")
    assert not any(text in whole(root) for text in KINDS.values())
    recorded(root, run="b", papers=[paper], metrics={"test/bpd_bound": 3.3})
    recorded(root, run="c", papers=[], metrics={"test/bpd_iw16": 3.2})
    beside, _, without = whole(root).partition("## Runs without a paper's number")
    assert "| reproduced | 3.28 | 3.300 | +0.020 |" in beside
    assert f"\n\n* `test/bpd_bound`: {KINDS['bound']}.\n" in beside
    assert f"\n\n* `test/bpd_iw16`: {KINDS['iw']}.\n" in without
    assert KINDS["iw"] not in beside
    assert KINDS["bound"] not in without


# Files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"c": 1, "b": 2}', None),
        ('{"a": 1}', "is of no use, without b, c"),
        ("{", r"is damaged \(Expecting property name .*\)$"),
        (b"\xff\xfe", r"is damaged \('utf-8' codec can't decode .*\)$"),
    ],
)
def test_checked_json_is_the_content_or_one_line(tmp_path, content, message):
    write(path := tmp_path / "a.json", content)
    texts = {"damaged": "is damaged ({problem})", "unusable": "is of no use, without {problem}"}
    form = record({"b": anything, "c": anything})

    def read():
        return checked_json(path, form, **texts)

    if message is None:
        assert read() == {"b": 2, "c": 1}
        return
    with pytest.raises(ValueError, match=message) as error:
        read()
    assert str(error.value).startswith(f"{path} is ")
    assert "\n" not in str(error.value)


# Taking a run in


def test_add_records_the_run_and_its_picture(root, run, capsys):
    Image.effect_noise((500, 500), 80).save(run / "samples/samples_200.png")
    assert main(["add", str(run)], root) == 0
    record = json.loads((root / "runs/flow_cifar10/20261122-231500-ab12.json").read_text())
    assert record["status"] == "shortened"
    assert record["gap"] == pytest.approx(0.41)
    assert record["curve"][0] == {
        "step": 1,
        "images": 64,
        "seconds": 0.5,
        "lr": 0.001,
        "train/bpd": 9.5,
        "val/bpd": None,
    }
    picture = root / "runs/flow_cifar10/20261122-231500-ab12.png"
    assert picture.stat().st_size < PICTURE_BYTES < (run / "samples/samples_200.png").stat().st_size
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert 200 < image.width == image.height < 500
    page = whole(root)
    row = "| flow_cifar10 preset=cpu | shortened | 3.49 | 3.900 | +0.410 | CIFAR-10 | test/bpd | "
    assert f"{row}3.2 % of 12.5 M images" in page
    assert "python reproduce/flow_cifar10.py preset=cpu seed=0\n" in page
    assert "warning" not in capsys.readouterr().out


def test_add_twice(root, run, capsys):
    assert main(["add", str(run)], root) == 0
    before = snapshot(root)
    assert main(["add", str(run)], root) == 0
    assert "already recorded, with the same content" in capsys.readouterr().out
    write(run / "result.json", json.dumps(result(3.8)))
    assert main(["add", str(run)], root) == 1
    assert "already recorded, with other content" in capsys.readouterr().err
    assert snapshot(root) == before


def test_machine_paths_stay_out_of_the_record(root, run):
    write(run / "result.json", json.dumps(result(overrides=["data.root=/home/me/data", "seed=0"])))
    main(["add", str(run)], root)
    content = (root / "runs/flow_cifar10/20261122-231500-ab12.json").read_text()
    record = json.loads(content)
    assert "/home" not in content
    assert record["config"] == {"data": {"name": "cifar10", "root": "data"}, "run_dir": "a"}
    assert record["overrides"] == ["data.root=data", "seed=0"]
    assert "python reproduce/flow_cifar10.py data.root=data seed=0\n" in whole(root)
    assert portable(["/a/b=c.ckpt", "https://x.y/z", "k=v", math.nan, {"a": "/b/c/"}]) == [
        "b=c.ckpt",
        "https://x.y/z",
        "k=v",
        None,
        {"a": "c"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", "{", "is not valid JSON"),
        ("result.json", b"\xff\xfe\x00", "is not valid JSON"),
        ("result.json", "[]", "lacks a usable experiment, run, preset"),
        (
            "result.json",
            json.dumps(result(papers=[{"claim": "x"}])),
            r"lacks a usable papers\[0\]\.metric, papers\[0\]\.comparable",
        ),
        ("result.json", json.dumps(result(papers="flow.cifar10")), "lacks a usable papers:"),
        ("result.json", json.dumps(result(metrics=[])), "lacks a usable metrics"),
        ("result.json", json.dumps(result(run="../../x")), "lacks a usable run"),
        (
            "result.json",
            json.dumps(result(3.9, 1.0)),
            'needs a named suspect: python -m results add .* suspect="..."',
        ),
        (
            "result.json",
            json.dumps(result(papers=[PAPER | {"claim": "flow.cifar"}])),
            "did you mean 'flow.cifar10'",
        ),
        ("curve.csv", "step,images\n1,many\n", r"curve\.csv is not a table of numbers"),
        ("curve.csv", "step,images\n1,2,3\n", r"curve\.csv is not a table of numbers"),
        ("samples/samples_100.png", "no picture", "is not a readable picture"),
    ],
)
def test_a_bad_run_is_one_line_and_writes_nothing(root, run, capsys, name, content, message):
    before = snapshot(root)
    write(run / name, content)
    assert main(["add", str(run)], root) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0])
    assert snapshot(root) == before


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"config": {"data": ["cifar10"]}}, "config.data"),
        ({"overrides": ["seed=0", 1]}, "overrides[1]"),
        ({"tested": {"step": 3}}, "tested.chosen, tested.weights"),
        ({"metric": "bpd"}, "metric.unit, metric.direction"),
        ({"commit": 7}, "commit"),
        ({"papers": [PAPER | {"claim": []}]}, "papers[0].claim"),
    ],
)
def test_what_the_page_cannot_show_is_not_recorded(root, run, capsys, more, key):
    """Such a file used to stay in runs/, so that every later `python -m results` failed."""
    before = snapshot(root)
    write(run / "result.json", json.dumps(result(**more)))
    assert main(["add", str(run)], root) == 1
    path = run / "result.json"
    problem = f"{path} lacks a usable {key}: edited, or of another version? Run it again"
    assert capsys.readouterr().err == f"error: {problem}\n"
    assert snapshot(root) == before
    assert main([], root) == 0


def test_an_older_record_that_is_damaged_keeps_a_run_out(root, run, capsys):
    """The page is rendered before anything is written."""
    write(root / "stability/short.json", "[]")
    before = snapshot(root)
    assert main(["add", str(run)], root) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"{root / 'stability/short.json'} is not what benchmarks.stability writes" in line
    assert snapshot(root) == before


@pytest.mark.parametrize("n_moved", [0, 1, 3])
def test_what_cannot_be_written_changes_nothing(root, run, capsys, monkeypatch, n_moved):
    """Files that had been replaced before another one could not be get their content back."""
    assert main([], root) == 0
    before = snapshot(root)
    moved = []
    replace = Path.replace

    def fail_later(path, target):
        if len(moved) == n_moved:
            raise OSError(28, "No space left on device", str(target))
        moved.append(target)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail_later)
    assert main(["add", str(run)], root) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: [Errno 28] No space left on device: ")
    assert snapshot(root) == before


NO_RECORDS = ["NaN", "[]", "", "nonsense", '{"metrics": NaN}', "{}", "3", "[" * 100_000, b"\xff"]


@pytest.mark.parametrize("content", NO_RECORDS, ids=lambda content: repr(content[:20]))
@pytest.mark.parametrize(
    "name",
    ["runs/flow_cifar10/a.json", "ablations/a.json", "stability/a.json", "benchmarks/a.json"],
)
def test_a_file_that_is_no_record_is_named_in_one_line(root, capsys, name, content):
    write(root / name, content)
    assert main([], root) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {root / name} ")


@pytest.mark.parametrize("content", NO_RECORDS, ids=lambda content: repr(content[:20]))
def test_a_damaged_result_is_named_in_one_line(root, run, capsys, content):
    before = snapshot(root)
    write(run / "result.json", content)
    assert main(["add", str(run)], root) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {run / 'result.json'} ")
    assert snapshot(root) == before


def test_nan_in_a_file_is_refused_with_what_to_write_instead(root, run, capsys):
    write(run / "result.json", json.dumps(result(math.nan)))
    assert main(["add", str(run)], root) == 1
    error = capsys.readouterr().err
    assert "result.json is not valid JSON (NaN is no value of JSON: put null in its place)" in error


WRONG = [None, True, -1, 10**400, 1e308, "", "/a", [], [None], {}, {"a": []}]


def edited(value):
    """Copies of a JSON value, in each of which one part of it is another value or missing."""
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, list):
        parts = list(enumerate(value))
    else:
        return
    for key, part in parts:
        without = copy.copy(value)
        del without[key]
        for other in [*WRONG, *edited(part)]:
            yield replaced(value, key, other)
        yield without


def replaced(value, key, part):
    """A copy of a list or a mapping with another part."""
    result = copy.copy(value)
    result[key] = part
    return result


def refusal(function):
    """The message of the ValueError that a function raises; an empty text where it raises none."""
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""


def test_a_result_edited_anywhere_is_shown_or_refused_in_one_line(root, run):
    original = result(
        curve=[],
        metric={"name": "bpd", "unit": "bits/dim", "direction": "lower"},
        overrides=["seed=0"],
        parameters=3,
        suspect="another network",
        tested={"step": 3, "chosen": "best", "weights": "raw"},
        data={"sha256": 64 * "a"},
        extended=[EARLIER_END],
        init_from=START,
    )
    messages = set()
    for content in edited(original):
        (run / "result.json").write_text(json.dumps(content))
        messages.add(refusal(lambda: render(root, runs.add(run, None, root).files)))
    refusals = messages - {""}
    assert len(messages) > len(refusals) > 20
    assert [line for line in refusals if str(run) not in line or "\n" in line] == []


def test_a_curve_edited_anywhere_is_drawn_or_refused_in_one_line(root):
    curve = [{"step": k, "images": k, "train/bpd": 4.0, "val/bpd": 5.0 - k} for k in range(3)]
    path = root / "runs/flow_cifar10/a.json"
    messages = set()
    for edited_curve in [*WRONG, *edited(curve)]:
        write(path, json.dumps(result(run="a", curve=edited_curve)))
        messages.add(refusal(lambda: render(root)))
    refusals = messages - {""}
    assert len(messages) > len(refusals) > 1
    assert {line[: len(f"{path} lacks a usable curve")] for line in refusals} == {
        f"{path} lacks a usable curve"
    }


def test_unfinished_and_missing_runs(root, run, capsys):
    (run / "result.json").unlink()
    assert main(["add", str(run)], root) == 1
    assert "resume=auto" in capsys.readouterr().err
    assert main(["add", str(run / "nowhere")], root) == 1
    assert "outputs/<experiment>/<run>" in capsys.readouterr().err


def test_a_gap_with_a_suspect_and_a_dirty_tree(root, run, capsys):
    write(run / "result.json", json.dumps(result(3.9, 1.0, dirty=True)))
    assert main(["add", str(run), "suspect=no weight norm"], root) == 0
    assert (
        "warning: 20261122-231500-ab12 was made with uncommitted changes" in capsys.readouterr().out
    )
    page = whole(root)
    assert "Suspect: no weight norm" in page
    machine = "100 % of 12.5 M images (ours) | CPU | 20.6 min | 0123456 (dirty)"
    assert "| flow_cifar10 preset=cpu | gap | 3.49 | 3.900 | +0.410 |" in page
    assert f"| {machine} | suspect: no weight norm |" in page


def test_the_page_shows_the_earlier_ends_of_a_run_that_was_extended(root):
    recorded(root, extended=[EARLIER_END, EARLIER_END | {"steps": 200, "metrics": {}}])
    page = whole(root)
    words = "6.4 k images; 1.0 min; commit abcdef0; 2026-11-27) and was trained on.\n"
    assert f"Extended: this run had ended at step 100 (test/bpd 4.500; {words}" in page
    assert f"Extended: this run had ended at step 200 (nothing measured; {words}" in page


def test_the_page_says_from_which_weights_a_run_started(root):
    recorded(root, papers=[], init_from=START)
    page = whole(root)
    assert "| flow_cifar10 preset=cpu init_from=a/b | cifar10 |" in page
    origin = "the weights of a/b (a; commit abcdef0; sha256 000000000000)"
    assert f"Started from: {origin}.\n" in page


def test_a_users_own_images_are_named_by_their_folder_and_their_content(root):
    for name, letter in (("a", "1"), ("b", "2")):
        config = {"data": {"name": "folder", "root": "/home/me/my photos"}}
        recorded(root, run=name, papers=[], config=config, data={"sha256": 64 * letter})
    page = whole(root)
    for letter in "12":
        row = f"| flow_cifar10 preset=cpu data.sha256={12 * letter} | folder my photos |"
        assert page.count(f"{row} test/bpd 3.900 |") == 1
        assert f"; data.sha256 {12 * letter}; commit 0123456;" in page


def test_rows_with_weights_say_how_they_are_loaded(root):
    write(root.parent / "README.md", "<!-- results -->\n<!-- /results -->\n")
    recorded(root, run="a", weights=WEIGHTS)
    recorded(root, run="b", value=3.8)
    files = render(root)
    page = whole(root)
    call = 'load("flow_cifar10/a")'
    front = files[root.parent / "README.md"].splitlines()
    rows = [line for line in front if line.startswith("| flow_cifar10 ")]
    assert [row.rsplit(" | ", 1)[1] for row in rows] == ["- |", f"`{call}` |"]
    block = f"```python\nfrom reproduce import load\n\nmodel = {call}\n```\n"
    link = "[weights/a/b.safetensors](weights/a/b.safetensors)"
    assert f"Weights: {link}, 3.1 MB, float32.\n\n{block}" in page
    note = f"for example\n`from reproduce import load; model = {call}`.\n"
    assert note in files[root.parent / "README.md"]
    assert page.count("from reproduce import load") == 1


def test_a_part_of_the_test_is_named(root):
    """Such a run is compared with no claim, although its data are the claim's."""
    trainer = {"limit_test_batches": 10}
    config = {"data": {"name": "cifar10"}, "trainer": trainer}
    tested = {"step": 3, "chosen": "best", "weights": "raw"}
    recorded(root, papers=[PAPER | {"comparable": False}], config=config, tested=tested)
    page = whole(root)
    assert "| flow_cifar10 preset=cpu | cifar10, a part of the test | test/bpd 3.900 |" in page
    assert "Tested: raw weights of step 3 (best by validation); limit_test_batches 10.\n" in page


def test_two_dimensional_run(root, run):
    (run / "samples/samples_100.png").unlink()
    Image.new("L", (20, 20)).save(run / "density.png")
    write(
        run / "curve.csv",
        "step,images,seconds,lr,train/nll,val/nll\n1,10,1,0.1,2.5,\n2,20,2,0.1,,-1.5\n",
    )
    data = {"data": {"name": "two_moons"}}
    write(
        run / "result.json",
        json.dumps(result(papers=[], metrics={"test/nll": -1.25}, config=data, budget=None)),
    )
    assert main(["add", str(run)], root) == 0
    page = whole(root)
    assert "| flow_cifar10 preset=cpu | two_moons | test/nll -1.250 | 400 k images |" in page
    assert "20261122-231500-ab12.png)" in page
    assert ">nll (nats)<" in (root / "runs/flow_cifar10/20261122-231500-ab12.svg").read_text()


@pytest.mark.parametrize(
    "argv",
    [["bogus"], ["add"], ["add", "x", "y"], ["add", "x", "suspect=a", "z"], ["figure3"], ["table"]],
)
def test_usage(root, argv, capsys):
    assert main(argv, root) == 2
    assert capsys.readouterr().err == (
        "usage: python -m results "
        '[add outputs/<experiment>/<run> [suspect="..."] | figure3 outputs/figure3/<name> '
        "| table FOLDER...]\n"
    )


@pytest.mark.parametrize("argv", [["--help"], ["table", "-h"]])
def test_help_names_what_is_written(root, argv, capsys):
    assert main(argv, root) == 0
    text = capsys.readouterr().out
    assert "results/index.html" in text
    assert "usage: python -m results" in text


def test_a_mistake_is_told_where_the_error_output_is_closed(root, capsys, monkeypatch):
    """`2>&-` in a shell."""
    monkeypatch.setattr("sys.stderr", None)
    assert main(["add", "nowhere"], root) == 1
    assert capsys.readouterr().out.startswith("error: no folder nowhere: ")


def test_commands_write_nothing_but_what_is_listed_as_generated(root, run, figure):
    write(root.parent / "README.md", "<!-- results -->\n<!-- /results -->\n")
    before = snapshot(root.parent)
    assert main(["add", str(run)], root) == 0
    assert main(["figure3", str(figure)], root) == 0
    after = snapshot(root.parent)
    written = {path.relative_to(root.parent) for path in after if after[path] != before.get(path)}
    assert len(written) == 10  # of them two thumbnails
    generated = {Path(path) for path in results.GENERATED}
    assert [path for path in written if not generated & {path, *path.parents}] == []


# The page


def test_page_is_byte_for_byte_the_same(root, run):
    main(["add", str(run)], root)
    before = snapshot(root)
    assert main([], root) == 0
    assert snapshot(root) == before
    assert not [path for path in before if path.name.startswith(".")]


def test_claims_are_listed_with_a_recipe_or_a_run_best_first(root):
    write(root.parent / "configs/flow_mnist.yaml", "")
    for value, name in ((3.9, "a"), (math.nan, "b"), (3.5, "c")):
        recorded(root, value=value, run=name)
    page = whole(root)
    rows = [line for line in page.splitlines() if line.startswith("| flow_")]
    cells = [row.split(" | ") for row in rows]
    assert [[*row[3:5], row[1]] for row in cells] == [
        ["3.500", "+0.010", "reproduced"],
        ["3.900", "+0.410", "shortened"],
        ["-", "-", "shortened"],
        ["-", "-", "not run"],
    ]
    assert rows[3].startswith("| flow_mnist | not run | 1980.50 | - | - | CIFAR-10 | test/bpd |")
    assert {row.count(" | ") for row in rows} == {11}


def test_a_claim_without_recipe_and_run_is_left_to_do(root):
    page = whole(root)
    assert "### Papers that nobody has started\n" in page
    assert "<summary>A flow: 2 claims</summary>" in page
    assert "| Table 1, Ours | CIFAR-10 | test/bpd | 1980.50 | not run |" in page
    assert "| CIFAR-10 | test | bits/dim | 3.49 | stored |" in page


def test_other_data_and_reestimated_statistics(root):
    recorded(root, run="a", papers=[PAPER | {"comparable": False}])
    recorded(root, run="b", metrics={"test/bpd": 3.9, "test/bpd_reestimated": 3.8, "val/bpd": 3.7})
    beside, _, without = whole(root).partition("## Runs without a paper's number")
    assert "| 3.900 (re-estimated 3.800) | +0.410 |" in beside
    assert "| flow_cifar10 preset=cpu | cifar10 | test/bpd 3.900 |" in without
    assert "| test/bpd_reestimated | 3.800 | - | - | - |" in without


def test_other_bits_stand_without_the_papers_number_and_say_so(root):
    recorded(root, run="a", config={"data": {"name": "cifar10", "n_bits": 5}})
    write(root.parent / "README.md", "<!-- results -->\n<!-- /results -->\n")
    files = render(root)
    beside, _, without = whole(root).partition("## Runs without a paper's number")
    assert "3.900" not in beside
    assert "| flow_cifar10 preset=cpu | cifar10, 5 bit | test/bpd 3.900 |" in without
    assert (
        "| flow_cifar10 | preset=cpu | cifar10, 5 bit | - | - | test/bpd 3.900 | - | - |"
        in files[root.parent / "README.md"]
    )


def test_curve_has_both_lines_and_the_papers_value(root):
    rows = [
        {"images": 64 * k, "train/bpd": 3.5 + 4 / k, "val/bpd": {0: 3.6 + 4 / k}.get(k % 10)}
        for k in range(1, 2001)
    ]
    record = recorded(root, curve=rows)
    svg = render(root)[root / f"runs/flow_cifar10/{record['run']}.svg"]
    tree = xml.etree.ElementTree.fromstring(svg)
    texts = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    expected = {"train", "val", "paper 3.49", "training images seen", "bpd (bits/dim)"}
    assert {*expected, f"flow_cifar10, run {record['run']}"} <= set(texts)
    assert svg.count("stroke-dasharray") == 1
    assert len(svg) < 20_000
    recorded(root, curve=rows, papers=[])
    assert "stroke-dasharray" not in render(root)[root / f"runs/flow_cifar10/{record['run']}.svg"]


@pytest.mark.parametrize(
    "points",
    [
        [(0, 5.0)],
        [(64, 3.49)],
        [(1, 0.0), (2, 0.0)],
        [(1, -1e3), (9, 1e6)],
        [(5, 3.0), (6, None), (7, math.nan)],
    ],
)
def test_curves_of_any_shape_are_drawn_with_finite_numbers(root, points):
    record = recorded(root, curve=[{"images": x, "val/bpd": y} for x, y in points])
    svg = render(root)[root / f"runs/flow_cifar10/{record['run']}.svg"]
    assert "nan" not in svg
    assert "inf" not in svg


def test_a_damaged_record_is_one_line(root, capsys):
    write(root / "runs/flow_cifar10/a.json", "{")
    assert main([], root) == 1
    assert "a.json is not valid JSON" in capsys.readouterr().err


def test_formats():
    counts = {None: "-", 7: "7", 999: "999", 45_000: "45 k", 999_600: "1 M", 12_480_000: "12.5 M"}
    assert {value: count(value) for value in counts} == counts
    assert [wall_time(seconds) for seconds in (12.3, 1234.5, 19_000)] == [
        "12 s",
        "20.6 min",
        "5.3 h",
    ]
    shares = [
        budget(result(fraction=fraction)).split(" %")[0]
        for fraction in (0, 0.00123, 0.032, 0.29, 0.9999, 1)
    ]
    assert shares == ["0", "0.12", "3.2", "29", "99", "100"]


# The ablation

BPD = {  # of seeds 0, 1, 2
    ("reverse", "additive"): (3.60, 3.62, 3.61),
    ("shuffle", "additive"): (3.58, 3.59, 3.60),
    ("invertible", "additive"): (3.55, 3.56, 3.57),
    ("reverse", "affine"): (3.55, 3.56, 3.57),
    ("shuffle", "affine"): (3.56, 3.55, 3.57),
    ("invertible", "affine"): (3.60, 3.61, 3.62),
}
SPEED = {"reverse": 1.0, "shuffle": 1.02, "invertible": 1.1}  # seconds for 100 images


def ablation_run(permutation, coupling, seed, bpd, **more):
    """A run as reproduce/figure3.py writes it."""
    curve = [
        [0, 5.0, 8.0],
        [6400, 5.0 + 64 * SPEED[permutation], bpd + 0.5],
        [12800, 5.0 + 128 * SPEED[permutation], bpd],
    ]
    return {
        "permutation": permutation,
        "coupling": coupling,
        "seed": seed,
        "test/bpd": bpd,
        "val/bpd": bpd,
        "curve": curve,
        "images": 12_800,
        "seconds": 200.0,
        "skipped_steps": 0,
        "commit": "0123456789abcdef",
        "dirty": False,
        "device": "CPU",
        "precision": "32-true",
        "parameters": 1000,
        **more,
    }


def ablation_runs():
    return [
        ablation_run(p, c, seed, bpd)
        for (p, c), values in BPD.items()
        for seed, bpd in enumerate(values)
    ]


@pytest.fixture
def figure(tmp_path):
    """The folder of an ablation."""
    folder = tmp_path / "outputs/figure3/cpu"
    content = {
        "experiment": "glow_cifar10",
        "ablation": "figure3",
        "name": "cpu",
        "runs": ablation_runs(),
        "overrides": ["preset=cpu", "data.root=/home/me/data"],
        "config": {
            "data": {"name": "cifar10", "root": "/home/me/data"},
            "flow": {"n_levels": 3, "depth": 4},
        },
    }
    write(folder / "figure3.json", json.dumps(content))
    Image.effect_noise((700, 700), 80).save(folder / "figure3.png")
    return folder


def edit(folder, **more):
    content = json.loads((folder / "figure3.json").read_text())
    write(folder / "figure3.json", json.dumps(content | more))


def test_ablation_table():
    assert figure3.rows(ablation_runs()) == [
        ["reverse", "additive", "0, 1, 2", "3.6100 ± 0.0058"],
        ["shuffle", "additive", "0, 1, 2", "3.5900 ± 0.0058"],
        ["invertible", "additive", "0, 1, 2", "3.5600 ± 0.0058"],
        ["reverse", "affine", "0, 1, 2", "3.5600 ± 0.0058"],
        ["shuffle", "affine", "0, 1, 2", "3.5600 ± 0.0058"],
        ["invertible", "affine", "0, 1, 2", "3.6100 ± 0.0058"],
    ]


def test_ablation_table_of_few_runs():
    runs = [
        ablation_run("shuffle", "affine", 3, 3.5),
        ablation_run("reverse", "affine", 4, 3.6, device="GPU"),
        ablation_run("invertible", "affine", 4, 3.5) | {"test/bpd": None},
        ablation_run("invertible", "affine", 5, 3.25, curve=[]),
    ]
    assert figure3.rows(runs) == [
        ["reverse", "affine", "4", "3.6000"],
        ["shuffle", "affine", "3", "3.5000"],
        ["invertible", "affine", "4, 5", "3.2500 (1 not finite)"],
    ]
    assert figure3.rows([]) == []
    assert figure3.missing(runs) == ["reverse-additive", "shuffle-additive", "invertible-additive"]


@pytest.mark.parametrize(
    ("differences", "word", "mean", "error"),
    [
        ([-0.03, -0.02, -0.025], "agrees", -0.025, 0.005 / math.sqrt(3)),
        ([0.03, 0.02, 0.025], "disagrees", 0.025, 0.005 / math.sqrt(3)),
        (
            [-0.03, -0.02, -0.01],
            "within noise",
            -0.02,
            0.01 / math.sqrt(3),
        ),  # 3.5 standard errors, of 4.3
        ([-0.03, 0.02, -0.01], "within noise", -0.02 / 3, 0.0145297),
        ([-0.02, -0.02], "agrees", -0.02, 0.0),
        ([0.0, 0.0], "within noise", 0.0, 0.0),
        ([-1.0], "within noise", -1.0, None),
        ([], "no seed in common", None, None),
    ],
)
def test_verdict(differences, word, mean, error):
    verdict = figure3.verdict(differences)
    assert (verdict["n"], verdict["word"]) == (len(differences), word)
    assert verdict["mean"] == pytest.approx(mean)
    assert verdict["error"] == pytest.approx(error, abs=1e-7)


def test_verdicts_are_pair_by_pair_and_over_the_same_seeds():
    verdicts = figure3.verdicts(ablation_runs())
    assert [figure3.verdict_line(verdict) for verdict in verdicts] == [
        "additive: invertible < shuffle: -0.0300 ± 0.0000 over 3 seeds: agrees",
        "additive: shuffle < reverse: -0.0200 ± 0.0058 over 3 seeds: within noise",
        "additive: invertible < reverse: -0.0500 ± 0.0058 over 3 seeds: agrees",
        "affine: invertible < shuffle: +0.0500 ± 0.0058 over 3 seeds: disagrees",
        "affine: shuffle < reverse: +0.0000 ± 0.0058 over 3 seeds: within noise",
        "affine: invertible < reverse: +0.0500 ± 0.0000 over 3 seeds: disagrees",
        "reverse: affine < additive: -0.0500 ± 0.0058 over 3 seeds: agrees",
        "shuffle: affine < additive: -0.0300 ± 0.0058 over 3 seeds: agrees",
        "invertible: affine < additive: +0.0500 ± 0.0000 over 3 seeds: disagrees",
    ]
    assert figure3.summary(verdicts) == (
        "The order disagrees with the paper's (1x1 < shuffle < reverse, affine < additive): "
        "4 of 9 pairs agree, 3 disagree, 2 within noise"
    )


def test_summary_says_no_more_than_the_pairs():
    def answer(*words):
        return re.match(r"The order (.*?) \(", figure3.summary([{"word": word} for word in words]))[
            1
        ]

    assert answer("agrees", "agrees") == "agrees with the paper's"
    assert answer("agrees", "within noise") == "does not contradict the paper's"
    assert answer("agrees", "disagrees", "within noise") == "disagrees with the paper's"
    assert answer("within noise", "no seed in common") == "is not decided"
    seeds = {("reverse", "affine"): (0, 1), ("shuffle", "affine"): (1, 2)}
    runs = [
        ablation_run(p, c, seed, 3.5 + 0.1 * seed)
        for (p, c), numbers in seeds.items()
        for seed in numbers
    ]
    verdicts = figure3.verdicts(runs)
    lines = [figure3.verdict_line(verdict) for verdict in verdicts]
    assert lines[4] == "affine: shuffle < reverse: +0.0000 over 1 seed: within noise"
    assert lines[0] == "additive: invertible < shuffle: no seed in common"
    assert figure3.summary(verdicts).endswith(
        "0 of 9 pairs agree, 0 disagree, 1 within noise, 8 without a seed in common"
    )


def test_an_ablation_is_recorded_with_its_picture_and_its_section(root, figure, capsys):
    assert main(["figure3", str(figure)], root) == 0
    assert "The order disagrees with the paper's" in capsys.readouterr().out
    content = (root / "ablations/glow_cifar10-figure3-cpu.json").read_text()
    assert "/home" not in content
    assert json.loads(content)["overrides"] == ["preset=cpu", "data.root=data"]
    picture = root / "ablations/glow_cifar10-figure3-cpu.png"
    assert picture.stat().st_size < PICTURE_BYTES < (figure / "figure3.png").stat().st_size
    page = whole(root)
    section = page[page.index("## Glow's Figure 3") : page.index("## The papers' tables")]
    assert "### glow_cifar10-figure3-cpu\n" in section
    assert "python -m reproduce.figure3 'seeds=[0,1,2]' preset=cpu data.root=data\n" in section
    assert "| permutation | coupling | seeds | test/bpd |\n" in section
    assert "| shuffle | additive | 0, 1, 2 | 3.5900 ± 0.0058 |\n" in section
    assert "* affine: invertible < reverse: +0.0500 ± 0.0000 over 3 seeds: disagrees\n" in section
    order = "(1x1 < shuffle < reverse, affine < additive)"
    assert f"\nThe order disagrees with the paper's {order}: 4 of 9 pairs" in section
    assert (
        "Runs: data cifar10; flow.n_levels 3; flow.depth 4; 12.8 k images a run; CPU; 32-true; "
        "commit 0123456; 1.0 h in all.\n" in section
    )
    assert (
        "![Curves of glow_cifar10-figure3-cpu](ablations/glow_cifar10-figure3-cpu.png)\n" in section
    )
    assert "skipped" not in section
    before = snapshot(root)
    assert main(["figure3", str(figure)], root) == 0
    assert "already recorded, with the same content" in capsys.readouterr().out
    assert main([], root) == 0
    assert snapshot(root) == before


def test_a_page_without_figure_3_has_no_section(root):
    assert "## Glow's Figure 3" not in whole(root)


def test_the_page_names_what_differs_between_the_runs_of_an_ablation(root, figure, capsys):
    runs = ablation_runs()
    runs[1] |= {"device": "GPU", "dirty": True, "images": 6400, "skipped_steps": 2}
    edit(figure, runs=runs, config={"data": {"name": "cifar10", "n_bits": 5}})
    assert main(["figure3", str(figure)], root) == 0
    assert "warning: some of its runs were made with uncommitted changes" in capsys.readouterr().out
    page = whole(root)
    assert (
        "Runs: data cifar10, 5 bit; 6.4 k to 12.8 k images a run; CPU and GPU; 32-true; "
        "commit 0123456 and commit 0123456 (dirty); 1.0 h in all.\n" in page
    )
    assert "Steps skipped as not finite: 2 in reverse-additive-seed1.\n" in page


def broken(**more):
    return {"runs": [ablation_run("reverse", "affine", 0, 3.5) | more]}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"name": "../x"}, "lacks a usable name"),
        ({"runs": {}}, "lacks a usable runs"),
        ({"runs": [{}]}, r"lacks a usable runs\[0\]\.permutation, runs\[0\]\.coupling"),
        (broken(permutation="none"), r"lacks a usable runs\[0\]\.permutation"),
        (broken(curve=[[0, None, 3.5]]), r"lacks a usable runs\[0\]\.curve"),
        (broken(seconds=None), r"lacks a usable runs\[0\]\.seconds"),
        (
            {"runs": [run for run in ablation_runs() if run["permutation"] != "shuffle"]},
            "not complete, no run of shuffle-additive, shuffle-affine: "
            r"go on with .*figure3 'seeds=\[0,1,2\]' preset=",
        ),
    ],
)
def test_a_bad_ablation_is_one_line_and_writes_nothing(root, figure, capsys, more, message):
    edit(figure, **more)
    before = snapshot(root)
    assert main(["figure3", str(figure)], root) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert snapshot(root) == before


def test_figure_3_is_also_taken_in_under_its_old_name(root, figure):
    assert main(["ablation", str(figure)], root) == 0
    assert figure3.read_all(root)["glow_cifar10-figure3-cpu"]["name"] == "cpu"


def test_missing_and_damaged_ablations(root, figure, capsys):
    assert main(["figure3", str(figure.parent)], root) == 1
    assert "give the folder of an ablation, outputs/figure3/<name>" in capsys.readouterr().err
    assert main(["figure3", str(figure)], root) == 0
    one_seed = [run for run in ablation_runs() if run["seed"] == 0]
    edit(figure, runs=one_seed)
    assert main(["figure3", str(figure)], root) == 1
    assert "already recorded, with other content" in capsys.readouterr().err
    write(figure / "figure3.json", "{")
    assert main(["figure3", str(figure)], root) == 1
    assert "figure3.json is not valid JSON" in capsys.readouterr().err


def test_an_ablation_without_its_picture_is_not_recorded(root, figure, capsys):
    (figure / "figure3.png").unlink()
    assert main(["figure3", str(figure)], root) == 1
    assert "figure3.png is not a readable picture" in capsys.readouterr().err
    assert not (root / "ablations").exists()


def test_committed_page_is_up_to_date():
    for path, content in render().items():
        assert content_of(path) == as_bytes(content), f"{path} is old: run `python -m results`"
    thumbnails = {path for path in render() if path.suffix == ".webp"}
    assert set((Path(results.ROOT) / "thumbnails").glob("*")) == thumbnails, (
        "a thumbnail without its picture: delete it"
    )
    curves = {path for path in render() if path.suffix == ".svg"}
    assert set((Path(results.ROOT) / "runs").glob("*/*.svg")) == curves, (
        "a curve without its run: delete it"
    )
    stems = {path.stem for path in (Path(results.ROOT) / "ablations").glob("*.png")}
    assert stems == set(figure3.read_all()), (
        "an ablation without its picture, or the other way round"
    )


def stability_run(seed, **other):
    return {
        "seed": seed,
        "steps": 300,
        "skipped_steps": 0,
        "bpd": [6.8, 6.0],
        "highest_rise": 0.0,
        "depth": 32,
        "round_trip_grey_levels": {"images": 0.001, "noise": 0.5},
        "finite_T0.7": 1.0,
        "finite_T1": 0.95,
        "hidden_channels": 8,
        "batch_size": 4,
        "commit": "a" * 40,
        "dirty": False,
        "device": "CPU",
        "optim": {"name": "adamax", "lr": 1e-3, "warmup_steps": 980},
    } | other


def stability_file(root, stem, *runs):
    content = {"kind": stem, "overrides": ["data.root=data", "data.name=a b"], "runs": runs}
    write(root / f"stability/{stem}.json", json.dumps(content))


def test_stability_shows_the_worst_seed_of_each_file_and_how_it_was_run(tmp_path):
    worst = {"images": 0.02, "noise": None}
    stopped = stability_run(
        1, steps=50, bpd=[6.9, 6.2], skipped_steps=21, round_trip_grey_levels=worst
    )
    stability_file(
        tmp_path, "short", stability_run(0), stopped | {"min_scale": 0.0}
    )  # recorded without, and with
    stability_file(tmp_path, "long", stability_run(0, min_scale=0.5))
    lines = markdown(stability.section(tmp_path))
    long, short = (
        [cell.strip() for cell in line.strip("| ").split("|")] for line in lines if "K=32" in line
    )
    assert short == [
        *(
            "short",
            "K=32, 8 channels, batch 4",
            "authors'",
            "adamax 0.001, warm-up 980",
            "2",
            "50 to 300",
            "21",
        ),
        *(
            "6.800 to 6.900 then 6.000 to 6.200",
            "0",
            "0.02",
            "0.5, not finite in 1",
            "100.0%",
            "95.0%",
        ),
        *("aaaaaaa", "CPU"),
    ]
    assert long[:6] == ["long", *short[1:2], "from 0.5", *short[3:4], "1", "300"]
    assert "python -m benchmarks.stability short data.root=data 'data.name=a b'" in lines
    assert stability.section(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("key", "value", "models"),
    [
        ("depth", 4, "depth=32 and depth=4"),
        ("batch_size", 8, "batch_size=4 and batch_size=8"),
        ("min_scale", 0.25, "min_scale=0.0 and min_scale=0.25"),
        (
            "optim",
            {"name": "adam", "lr": 1e-3, "warmup_steps": 980},
            "optim.name=adamax and optim.name=adam",
        ),
    ],
)
def test_a_stability_file_of_two_models_is_refused(tmp_path, key, value, models):
    stability_file(tmp_path, "short", stability_run(0), stability_run(1, **{key: value}))
    with pytest.raises(ValueError, match=rf"short\.json mixes runs of {models}: ") as error:
        stability.section(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", ["[]", '{"a": 1}', '{"kind": "short", ', '{"kind": 1, "overrides": [], "runs": 3}']
)
def test_a_damaged_stability_file_is_named(tmp_path, content):
    write(tmp_path / "stability/short.json", content)
    with pytest.raises(
        ValueError, match=r"short\.json is not what benchmarks\.stability writes"
    ) as error:
        stability.section(tmp_path)
    assert "\n" not in str(error.value)


# Speed


def speed_row(model, dtype="float32", step=1.2, sampling=0.004, kept=3 * 2**20):
    return {
        "model": model,
        "setting": "K8 L3 H128 B16",
        "dtype": dtype,
        "step_s": step,
        "floor_s": step and 0.8,
        "sample_s_per_image": sampling,
        "activation_bytes_per_image": kept,
        "machine": "a CPU, 2 threads",
        "versions": {"torch": "2.14", "normflows": "1.7.3"},
        "rounds": 7,
        "commit": "0123456789",
        "dirty": False,
    }


def test_speed_shows_ratios_within_a_run_and_what_was_not_measured(tmp_path):
    rows = [speed_row("ours"), speed_row("normflows", step=2.0, sampling=0.008, kept=6 * 2**20)]
    rows += [speed_row("ours", "bf16", step=None, sampling=None, kept=1.5 * 2**20)]
    write(tmp_path / "benchmarks/glow.json", json.dumps(rows))
    lines = markdown(speed.section(tmp_path))
    made = (
        "`python -m benchmarks glow`, a CPU, 2 threads, torch 2.14, normflows 1.7.3, "
        "commit 0123456, 7 rounds:"
    )
    assert made in lines
    tables = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    float32 = ["1.200 s", "13.3", "1.50", "0.60", "0.60", "4.0 ms", "0.50", "3.00 MiB", "0.500"]
    bf16 = ["not measured", *"----", "not measured", "-", "1.50 MiB", "0.250"]
    assert ["K8 L3 H128 B16", "float32", "ours", *float32] in tables
    assert ["K8 L3 H128 B16", "bf16", "ours", *bf16] in tables
    assert speed.section(tmp_path / "nothing") == []
    write(tmp_path / "benchmarks/glow.json", json.dumps([row | {"apart": True} for row in rows]))
    assert made.removesuffix(":") + ", each model in a process of its own:" in markdown(
        speed.section(tmp_path)
    )


def test_bf16_is_also_set_over_the_peer_in_bf16(tmp_path):
    tuned = speed_row("normflows channels_last autocast", "bf16", step=1.0)
    rows = [speed_row("normflows", step=2.0), tuned, speed_row("ours", "bf16", step=0.6)]
    write(tmp_path / "benchmarks/glow.json", json.dumps(rows))
    assert any(
        "| bf16 | ours | 0.600 s | 26.7 | 0.75 | 0.30 | 0.60 |" in line
        for line in markdown(speed.section(tmp_path))
    )


def test_speed_of_a_second_machine(tmp_path):
    row = speed_row("ours compiled", "bf16", kept=None) | {
        "setting": "K32 L3 H512 B512",
        "machine": "a GPU",
    }
    write(tmp_path / "benchmarks/glow-gpu.json", json.dumps([row]))
    lines = markdown(speed.section(tmp_path))
    assert any(
        line.startswith('`python -m benchmarks glow "settings=K32 L3 H512 B512"`, a GPU')
        for line in lines
    )
    cells = "1.200 s | 427 | 1.50 | - | - | 4.0 ms | - | - | - |"
    assert f"| K32 L3 H512 B512 | bf16 | ours compiled | {cells}" in lines


@pytest.mark.parametrize(
    "content",
    [
        "[",
        "{}",
        '[{"model": "ours"}]',
        "[1]",
        json.dumps([speed_row("a", kept=None)]),
        json.dumps([speed_row("a") | {"setting": "large"}]),
    ],
)
def test_a_speed_file_of_another_program_is_named(tmp_path, content):
    write(tmp_path / "benchmarks/glow.json", content)
    with pytest.raises(
        ValueError, match=r"glow.json is not what `python -m benchmarks` writes"
    ) as error:
        speed.section(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", results.CLAIM)
def test_a_claim_that_lacks_something_is_one_line(root, key):
    claim = {name: value for name, value in CLAIM.items() if name != key}
    write_claims(root, cifar10=claim)
    with pytest.raises(
        ValueError, match=rf"flow\.yaml: the claim cifar10 lacks {key}: see"
    ) as error:
        results.load_claims(root)
    assert "\n" not in str(error.value)


def kept_files():
    """Valid contents, by path, of all files that the page is made from, except for runs."""
    few_runs = [ablation_run("reverse", "affine", 0, 3.5, curve=[[0, 1.0, None]])]
    ablation = {"experiment": "a", "ablation": "figure3", "name": "c", "overrides": ["x=1"]}
    return {
        "ablations/a.json": ablation | {"config": {"data": {}, "flow": {}}, "runs": few_runs},
        "stability/a.json": {
            "kind": "short",
            "overrides": ["data.root=data"],
            "runs": [stability_run(0, min_scale=0.5)],
        },
        "benchmarks/a.json": [speed_row("ours"), speed_row("ours compiled", kept=None)],
        "paper/flow.yaml": {
            "title": "A flow",
            "arxiv": "1234.5678",
            "notes": ["a note"],
            "claims": {"cifar10": CLAIM | {"compared": {"b": {"value": 1.0, "train": None}}}},
        },
    }


@pytest.mark.parametrize("name", kept_files())
def test_a_file_edited_anywhere_is_shown_or_refused_in_one_line(root, name):
    path = root / name
    messages = set()
    for content in edited(kept_files()[name]):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        messages.add(refusal(lambda: render(root)))
    refusals = messages - {""}
    assert len(messages) > len(refusals) > 20
    assert [line for line in refusals if not line.startswith(str(path)) or "\n" in line] == []
