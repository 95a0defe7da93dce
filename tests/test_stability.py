"""An affine Glow stays finite (benchmarks/stability.py), on real CIFAR-10: an hour and more on two cores."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import stability
from benchmarks.stability import KINDS, main, round_trip, train
from flows.glow import Glow
from lightning_modules.stopping import RunStopped

DATA = Path(__file__).parent.parent / "data"
needs_cifar = pytest.mark.skipif(not (DATA / "cifar-10-batches-py").is_dir(), reason="no CIFAR-10 under data/")
LOCAL = [f"data.root={DATA}", "data.download=false"]


@pytest.mark.slow  # and not `data`: `pytest -m data` is to take seconds
@needs_cifar
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", KINDS["short"][0])
def test_300_steps_of_a_deep_one_never_rise(seed, tmp_path):
    row = train("short", seed, tmp_path / "run", LOCAL, every=10)
    assert (row["steps"], row["skipped_steps"], len(row["bpd"]), row["depth"]) == (300, 0, 31, 32)
    assert row["optim"]["warmup_steps"] == 980
    assert torch.tensor(row["bpd"]).isfinite().all()
    assert row["highest_rise"] <= 0.1
    assert row["bpd"][-1] < row["bpd"][0] - 0.5


@pytest.mark.slow  # and not `data`: `pytest -m data` is to take seconds
@needs_cifar
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("seed", KINDS["long"][0])
def test_10_000_steps_stay_finite_and_invertible(seed, tmp_path):
    row = train("long", seed, tmp_path / "run", LOCAL, every=100)
    assert (row["steps"], row["skipped_steps"]) == (10_000, 0)
    assert torch.tensor(row["bpd"]).isfinite().all()
    assert all(error <= 1 for error in row["round_trip_grey_levels"].values())  # not max, which may pass over a NaN
    assert row["finite_T0.7"] == 1


@pytest.mark.data
@needs_cifar
def test_a_few_steps_of_it(tmp_path):
    overrides = [*LOCAL, "flow.depth=1", "flow.hidden_channels=4", "trainer.max_steps=4"]
    row = train("short", 3, tmp_path / "run", overrides, every=2)
    assert (row["seed"], row["steps"], row["skipped_steps"], len(row["bpd"])) == (3, 4, 0, 3)
    assert row["highest_rise"] == max(row["bpd"]) - row["bpd"][0]
    assert 5 < row["bpd"][2] < row["bpd"][0] < 9
    assert all(error < 0.01 for error in row["round_trip_grey_levels"].values())


def test_round_trip_is_in_grey_levels():
    class Off(Glow):
        def inverse(self, z, context=None):
            x, log_det = super().inverse(z, context)
            return x + 1 / 256, log_det

    torch.manual_seed(0)
    flow, x = Off((1, 4, 4), 1, 1, 2).double(), torch.rand(3, 1, 4, 4, dtype=torch.float64)
    assert round_trip(flow, x) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["shrot"], "is no kind: give one of short, long"),
        ([], "is no kind: give one of short, long"),
        (["short", "seeds=a"], "seeds=a are no seeds"),
        (["short", "seed=3"], "seed is not to be given here"),
        (["short", "--json"], "--json needs a file"),
    ],
)
def test_mistakes_are_one_line(given, said):
    with pytest.raises(SystemExit, match=said):
        main(given)


def test_every_seed_is_written_and_not_run_again(tmp_path, monkeypatch):
    trained = []

    def fake(kind, seed, folder, overrides, every):
        if seed == 7:
            raise RunStopped("stopped at step 3; go on with: ...", 75)
        trained.append((kind, seed, overrides, every))
        return {"seed": seed, "bpd": [7.0, float("nan")], "optim": {}}

    monkeypatch.setattr(stability, "train", fake)
    command = ["long", "--json", str(tmp_path / "long.json"), "optim.lr=1e-4", "data.root=/somewhere"]
    main([*command, "seeds=2,0"])
    main([*command, "seeds=0,1"])
    assert trained == [("long", seed, ["optim.lr=1e-4", "data.root=/somewhere"], 100) for seed in (2, 0, 1)]
    content = json.loads((tmp_path / "long.json").read_text())
    assert content["overrides"] == ["optim.lr=1e-4", "data.root=somewhere"]
    assert [(run["seed"], run["bpd"]) for run in content["runs"]] == [(seed, [7.0, None]) for seed in (2, 0, 1)]
    with pytest.raises(SystemExit, match=r"holds long optim.lr=1e-4 .*: give another file"):
        main(["short", *command[1:]])
    with pytest.raises(SystemExit, match=r"holds long optim.lr=1e-4 .*: give another file"):
        main([*command, "flow.coupling=additive"])
    with pytest.raises(SystemExit) as end:
        main([*command, "seeds=7"])
    assert end.value.code == 75
