"""`python -m results table`: the runs of a sweep as one table, with the best in bold."""

import json

import pytest

from results.__main__ import main
from results.sweep_table import runs_below


def make_run(folder, val, lr=1e-3, seed=0, depth=4, direction="lower", **more):
    """The folder of a finished run."""
    data = {"name": "photos", "batch_size": 16, "root": f"/somewhere/{seed}"}
    config = {"seed": seed, "data": data, "optim": {"lr": lr}, "flow": {"depth": depth}}
    config |= {"trainer": {"max_steps": 10}, "samples": {"n": seed}}
    result = {
        "experiment": "glow_photos",
        "run": folder.name,
        "preset": "cpu",
        "metrics": {"val/bpd": val, "test/bpd": None if val is None else val + 0.5},
        "metric": {"name": "bpd", "direction": direction, "unit": "bits/dim"},
        "papers": [],
        "budget": {"images": 160, "of": 1600, "fraction": 0.1, "source": "ours"},
        "seed": seed,
        "commit": None,
        "dirty": False,
        "config": config,
        "versions": {},
        "device": "CPU",
        "precision": "32-true",
        "tf32": False,
        "deterministic": False,
        "images": 160,
        "seconds": 90,
        "n_train": 64,
    }
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result | more))
    return folder


def table_of(capsys, *folders):
    """What is printed: the lines that are not empty, those of a table as lists of cells."""
    assert main(["table", *map(str, folders)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    return [
        line if not line.startswith("|") else [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
    ]


@pytest.fixture
def sweep(tmp_path):
    """Three settings, the best with two seeds, and two runs that have not finished."""
    folder = tmp_path / "glow_photos"
    make_run(folder / "a", 4.0)
    make_run(folder / "b", 3.5, lr=1e-4, seed=0)
    make_run(folder / "c", 3.7, lr=1e-4, seed=1)
    make_run(folder / "d", None, lr=1e-2)
    make_run(folder / "a" / "export", 1.0)  # is inside of a run
    (folder / "e").mkdir()
    curve = "step,images,seconds,lr,train/bpd,val/bpd\n0,0,1,0.1,,8\n1000,16000,9,.1,5,4.25\n"
    (folder / "e" / "curve.csv").write_text(curve)
    (folder / "f").mkdir()
    (folder / "f" / "diverged.json").write_text("{}")
    (folder / "notes").mkdir()
    return folder


def test_the_best_group_of_seeds_comes_first_and_is_bold(sweep, capsys):
    title, header, _, *rows = table_of(capsys, sweep)
    assert title == "**glow_photos** on photos, by `val/bpd`, of which lower is better:"
    columns = ["optim.lr", "seeds", "val/bpd", "test/bpd", "budget", "time", "status", "runs"]
    assert header == columns
    best = ["0.0001", "0, 1", "3.60000 ± 0.10000 (n=2)", "4.10000 ± 0.10000 (n=2)"]
    best += ["10 % of 1.6 k images (ours)", "1.5 min", "-", "b, c"]
    assert rows[0] == [f"**{cell}**" for cell in best]
    assert rows[1][:4] == ["0.001", "0", "4.0000", "4.5000"]
    assert rows[2][:4] == ["0.01", "0", "-", "-"]  # it was not finite
    assert rows[3:] == [
        "Not finished:",
        "* `e` is at step 1,000, val/bpd 4.2500",
        "* `f` diverged",
    ]


def test_folders_may_be_given_one_by_one_or_above_the_experiments(sweep, capsys):
    whole = table_of(capsys, sweep)
    assert table_of(capsys, sweep.parent) == whole
    assert table_of(capsys, *sorted(sweep.glob("?")), sweep) == whole  # each run once
    assert [path.name for path in runs_below(sweep)] == list("abcdef")


def test_where_higher_is_better_the_highest_is_first(tmp_path, capsys):
    make_run(tmp_path / "a", 20.0, direction="higher")
    make_run(tmp_path / "b", 30.0, direction="higher", depth=8)
    title, header, _, first, second = table_of(capsys, tmp_path)
    assert title.endswith("of which higher is better:")
    assert (header[0], first[0], second[0]) == ("flow.depth", "**8**", "4")


def test_other_experiments_have_tables_of_their_own(tmp_path, capsys):
    make_run(tmp_path / "a", 3.0)
    make_run(tmp_path / "b", 2.0, experiment="realnvp_photos")
    titles = [line for line in table_of(capsys, tmp_path) if isinstance(line, str)]
    assert [title.split()[0] for title in titles] == ["**glow_photos**", "**realnvp_photos**"]


def test_without_a_finite_figure_no_row_is_the_best(tmp_path, capsys):
    make_run(tmp_path / "a", None)
    assert not any("**" in cell for cell in table_of(capsys, tmp_path)[-1])


def test_nothing_is_written(sweep, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    table_of(capsys, sweep)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "error: no folder {folder}: give run folders, outputs/<experiment>/<run>"),
        ("empty", "error: {folder} holds no runs: give run folders"),
        ("bad", "error: {folder}/result.json is not valid JSON"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "result.json").write_text("{")
    folder = tmp_path / name
    assert main(["table", str(folder)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(message.format(folder=folder))
    assert output.err.count("\n") == 1
