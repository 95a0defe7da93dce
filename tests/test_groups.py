"""Runs that differ in their seed alone are one row, and rows that look alike are told apart."""

import json
import math

import pytest
from test_results import CLAIM, render, result, whole, write, write_claims

from results.formats import averaged, mean_and_error
from results.groups import (
    comparison_of,
    marks,
    measured,
    rank_without_claim,
    seed_groups,
    settings_cells,
)


def run(name="a", value=3.9, seed=0, config=None, **more):
    """A recorded run; config: settings by key, such as {"flow.depth": 4}."""
    sections = {"data": {"name": "cifar10", "root": name}, "seed": seed, "run_dir": name}
    for key, setting in (config or {}).items():
        section, _, last = key.partition(".")
        sections.setdefault(section, {})[last] = setting
    return result(value, run=name, seed=seed, config=sections, **more)


def names(groups):
    return [[member["run"] for member in group] for group in groups]


# Groups


def test_runs_that_differ_in_their_seed_alone_are_a_group():
    runs = [
        run("d", seed=2, config={"flow.depth": 4}),
        run("a", seed=1),
        run("c", seed=0, device="GPU", config={"trainer.devices": 4, "logger.name": "wandb"}),
        run("b", seed=2, commit="other"),
        run("e", seed=3, precision="bf16-mixed"),
        run("f", seed=3, data={"sha256": "1234"}),
        run("g", seed=4, experiment="another"),
        run("h", seed=4, init_from={"sha256": "1234"}),
    ]
    assert names(seed_groups(runs)) == [["g"], ["c", "a", "b"], ["d"], ["e"], ["f"], ["h"]]
    assert names(seed_groups(runs[::-1])) == names(seed_groups(runs))


def test_a_seed_counts_once():
    """A repetition would make the error look smaller than it is."""
    runs = [run("a", seed=0), run("b", seed=0), run("c", seed=1), run("d", seed=1)]
    assert names(seed_groups(runs)) == [["a", "c"], ["b", "d"]]


def fid_run(name, value, n, seed, **more):
    metrics = {"test/bpd": 3.9, "test/fid": value}
    protocol = {"test/fid": {"n": n, "seed": seed}}
    return run(name, seed=seed, metrics=metrics, protocol=protocol, **more)


def test_figures_that_were_measured_in_different_ways_have_no_mean():
    """Runs may draw other numbers of samples although they were trained alike."""
    runs = [fid_run("a", 40.0, 50_000, 0), fid_run("b", 44.0, 50_000, 1)]
    other = fid_run("c", 60.0, 5_000, 2)
    without = run("d", seed=3)
    assert names(seed_groups([*runs, other, without])) == [["a", "b", "c", "d"]]
    apart = [["a", "b"], ["c"], ["d"]]
    assert names(seed_groups([*runs, other, without], "test/fid")) == apart
    assert measured(runs, "test/fid").startswith("42.0000 ± 2.0000 (n=2)")
    assert measured([*runs, other], "test/fid") == "measured in different ways"
    assert measured([*runs, without], "test/fid").endswith("(n=2) (2 of 3 runs)")
    assert measured([*runs, other], "test/bpd").startswith("3.9000 ±")
    assert measured([without], "test/fid") == "-"


@pytest.mark.parametrize(
    ("values", "cell"),
    [
        ([3.5], "3.500"),
        ([None], "-"),
        ([3.5, 3.6], "3.5500 ± 0.0500 (n=2)"),
        ([3.5, 3.6, 3.7, math.nan], "3.6000 ± 0.0577 (n=3, 1 not finite)"),
        ([3.5, None], "3.5000 (n=1, 1 not finite)"),
        ([3.5, 1e308, 1e308], "3.5000 (n=1, 2 not finite)"),
        ([None, None], "-"),
    ],
)
def test_several_values_are_mean_and_standard_error(values, cell):
    assert averaged(values) == cell


def test_mean_and_standard_error():
    assert mean_and_error([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, math.sqrt(14 / 3 / 4)))
    assert mean_and_error([2.5]) == (2.5, None)


@pytest.mark.parametrize(
    ("gaps", "fractions", "gap", "status"),
    [
        ([0.03, -0.02], [1.0, 1.0], 0.005, "reproduced"),
        ([0.03, 0.02], [1.0, 1.0], 0.025, "gap"),
        ([0.03, 0.02], [1.0, 0.5], 0.025, "shortened"),
        ([0.01, None], [1.0, 1.0], 0.01, "gap"),  # one seed is not finite
        ([None, None], [1.0, 1.0], None, "gap"),
    ],
)
def test_the_status_of_a_group_is_that_of_its_mean(gaps, fractions, gap, status):
    group = [run(seed=seed, fraction=fraction) for seed, fraction in enumerate(fractions)]
    comparisons = [{"metric": "test/bpd", "gap": value, "status": "?"} for value in gaps]
    comparison = comparison_of(group, comparisons, CLAIM)
    assert comparison["gap"] == pytest.approx(gap)
    assert comparison["status"] == status


def test_a_group_that_did_not_measure_the_claim_says_so():
    comparisons = [{"metric": "test/bpd", "gap": None, "status": "not measured"}] * 2
    group = [run(seed=0), run(seed=1)]
    assert comparison_of(group, comparisons, CLAIM)["status"] == "not measured"


# Order


def test_groups_without_a_claim_are_sorted_best_first():
    metric = {"name": "psnr", "unit": "dB", "direction": "higher"}
    psnr = [
        run(name, metrics={"test/psnr": value}, metric=metric, config={"flow.depth": depth})
        for name, value, depth in (("a", 27.0, 1), ("b", 28.0, 2), ("c", None, 3))
    ]
    curve = [{"images": 1, "val/bpd": 4.0}]  # an older run, whose metric is that of its curve
    bpd = [
        run(name, value, config={"flow.depth": k}, curve=curve)
        for k, (name, value) in enumerate((("d", 3.9), ("e", math.nan), ("f", 3.8), ("g", 3.7)))
    ]
    bpd[3]["experiment"] = "a_cifar10"
    groups = sorted(seed_groups(psnr + bpd), key=rank_without_claim)
    assert names(groups) == [["g"], ["f"], ["d"], ["e"], ["b"], ["a"], ["c"]]


# What tells rows apart


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (
            {},
            {"precision": "bf16-mixed"},
            ["trainer.precision=32-true", "trainer.precision=bf16-mixed"],
        ),
        (
            {"config": {"flow.depth": 4, "optim.betas": [0.9, 0.99]}},
            {"config": {"flow.depth": 8, "optim.betas": [0.9, 0.999]}},
            ["flow.depth=4 optim.betas=[0.9,0.99]", "flow.depth=8 optim.betas=[0.9,0.999]"],
        ),
        (
            {"config": {"flow.edges": None}},
            {"seed": 1, "config": {"flow.edges": True}},
            ["seed=0 flow.edges=null", "seed=1 flow.edges=true"],
        ),
        (
            {"config": {"flow.new": 1}},
            {"commit": "abcdef0123"},
            ["commit 0123456", "commit abcdef0"],
        ),
        ({"device": "GPU"}, {}, ["GPU", "CPU"]),
        ({}, {"name": "b"}, ["a", "b"]),
        (
            {"data": {"sha256": 64 * "a"}},
            {"data": {"sha256": 64 * "b"}},
            [f"data.sha256={12 * 'a'}", f"data.sha256={12 * 'b'}"],
        ),
        (
            {"config": {f"flow.{key}": 1 for key in "abcd"}},
            {"config": {f"flow.{key}": 2 for key in "abcd"}},
            ["flow.a=1 flow.b=1 flow.c=1 …", "flow.a=2 flow.b=2 flow.c=2 …"],
        ),
    ],
)
def test_rows_that_look_alike_show_what_differs(first, second, expected):
    assert marks([[run(**first)], [run(**second)]]) == expected


def test_a_row_that_has_no_double_shows_its_preset_alone():
    groups = [[run()], [run(precision="bf16-mixed")], [run(preset=None)]]
    alike = ["preset=cpu trainer.precision=32-true", "preset=cpu trainer.precision=bf16-mixed"]
    assert settings_cells(groups, ["x", "x", "x"]) == [*alike, "-"]
    assert settings_cells(groups, ["x", "y", "x"]) == ["preset=cpu", "preset=cpu", "-"]
    assert marks([groups[0]]) == [""]


# The pages


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "results"
    write_claims(root, cifar10=CLAIM)
    write(root.parent / "README.md", "<!-- results -->\n<!-- /results -->\n")
    return root


def record(root, *runs):
    for each in runs:
        write(root / f"runs/{each['experiment']}/{each['run']}.json", json.dumps(each))


def rows(content):
    lines = [line for line in content.splitlines() if line.startswith("| flow_")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def test_seeds_are_one_row_on_both_pages(root):
    seeds = [
        run("a", 3.5, 0, seconds=60.0, fraction=1.0),
        run("b", 3.6, 1, seconds=90.0, fraction=1.0, images=500_000),
        run("c", 3.7, 2, seconds=120.0, fraction=1.0, commit="abcdef0123"),
    ]
    other = run("d", 3.55, 0, config={"flow.depth": 4})
    record(root, *seeds, other)
    files = render(root)
    page = whole(root)
    mean = ["3.6000 ± 0.0577 (n=3)", "+0.110", "gap"]
    first, second = rows(page)
    assert first[:5] == [
        "flow_cifar10 preset=cpu seed=0",
        "shortened",
        "3.49",
        "3.550",
        "+0.060",
    ]
    assert first[5:7] == ["CIFAR-10", "test/bpd"]
    assert [*second[3:5], second[1]] == mean
    assert second[0] == "flow_cifar10 preset=cpu seed=0,1,2"
    assert second[8:] == ["CPU", "1.0 min to 2.0 min", "0123456 and abcdef0", "-"]
    front = files[root.parent / "README.md"]
    assert [row[5:8] for row in rows(front)] == [["3.550", "+0.060", "shortened"], mean]
    assert "±: standard error over n runs, which differ in their seed alone.\n" in front
    sections = [line for line in page.splitlines() if line.startswith("### flow_")]
    assert sections == [f"### flow_cifar10/{name}" for name in "dabc"]


def test_seeds_without_a_claim_are_one_row_on_both_pages(root):
    metrics = [{"test/nll": 0.5 + 0.1 * k, "density_integral": 1.0} for k in range(2)]
    record(root, *(run(f"seed{k}", seed=k, papers=[], metrics=metrics[k]) for k in range(2)))
    files = render(root)
    cell = "density_integral 1.0000 ± 0.0000 (n=2), test/nll 0.5500 ± 0.0500 (n=2)"
    [row] = rows(whole(root))
    assert row[2] == cell
    [row] = rows(files[root.parent / "README.md"])
    assert row[5] == cell
