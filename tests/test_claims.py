"""What the papers claim, the names of metrics, and whether a run measured by a claim's protocol."""

import pytest

from results.metrics import QUANTITIES, label_of, quantity_of
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
