"""What the callbacks show and write beside a run."""

import errno
import gc
import io
import logging
import math
import re
import weakref
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from omegaconf import OmegaConf
from test_density import RandomImages, density
from torch import nn

from datamodules.two_moons import Points
from flows.glow import Glow
from lightning_modules.callbacks.curve import Curve
from lightning_modules.callbacks.density_2d import Density2d
from lightning_modules.callbacks.initialization import Initialization
from lightning_modules.callbacks.paper import PaperComparison, comparison_rows, comparison_table
from lightning_modules.callbacks.progress import Progress, lines_above_bar
from lightning_modules.callbacks.samples import Samples, picture, shown
from lightning_modules.optimizer_steps import last_step
from lightning_modules.stopping import RunStopped
from reproduce.provenance import Provenance
from results.curves import run_curve, title_of
from results.drawing import Text, png
from results.metrics import Metric
from results.runs import read_curve

BPD = Metric("bpd", "lower", "bits/dim")
PSNR = Metric("psnr", "higher", "dB")


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "expected"),
    [(100, None, 100), (100, 3, 30), (20, 3, 20), (-1, 3, 30), (-1, None, None)],
)
def test_last_step_is_whichever_limit_comes_first(max_steps, max_epochs, expected):
    trainer = SimpleNamespace(
        max_steps=max_steps,
        max_epochs=max_epochs,
        num_training_batches=10,
        global_step=7,
        accumulate_grad_batches=1,
    )
    assert last_step(trainer) == expected
    # the same steps, in micro-batches
    trainer.num_training_batches = 40
    trainer.accumulate_grad_batches = 4
    assert last_step(trainer) == expected


def test_the_first_batch_stays_where_the_weights_are():
    """In `setup` Lightning already calls the GPU the module's device; the weights move later."""

    def initialized(device):
        torch.manual_seed(0)
        module = density(Glow((3, 8, 8), n_levels=2, depth=2, hidden_channels=4))
        module._device = device  # as Lightning's `_call_setup_hook` does
        Initialization().setup(SimpleNamespace(datamodule=RandomImages()), module, "fit")
        return module.flow.state_dict()

    on_cpu, on_gpu = initialized(torch.device("cpu")), initialized(torch.device("cuda", 0))
    assert all(torch.equal(on_cpu[key], on_gpu[key]) for key in on_cpu)


def test_progress_shows_images_per_second_and_time_left(monkeypatch):
    bar = Progress(batch_size=64, enabled=False)
    bar.started = 100.0
    bar.first_step = 10
    monkeypatch.setattr("lightning_modules.callbacks.progress.time.monotonic", lambda: 110.0)
    shown = {"train/bpd": 4.0, "v_num": 3}
    trainer = SimpleNamespace(
        global_step=30,
        training=True,
        max_steps=150,
        max_epochs=None,
        num_training_batches=1,
        accumulate_grad_batches=1,
        progress_bar_metrics=shown,
        callbacks=[],
    )
    monkeypatch.setattr(
        "lightning.pytorch.callbacks.TQDMProgressBar.get_metrics", lambda *_: dict(shown)
    )
    metrics = bar.get_metrics(trainer, None)
    assert list(metrics.items()) == [("left", "0:01:00"), ("images/s", "128"), ("train/bpd", 4.0)]
    for limit, left in ((5, "0:00:05"), (500, "0:01:00")):  # the seconds of trainer.max_time
        trainer.callbacks = [Timer(timedelta(seconds=limit))]
        assert bar.get_metrics(trainer, None)["left"] == left
    trainer.max_steps = -1
    assert bar.get_metrics(trainer, None)["left"] == "0:08:20"


def test_the_time_left_is_in_view_at_80_columns():
    stream = io.StringIO()
    line = Tqdm(
        total=100_000, desc="Epoch 123", ncols=80, file=stream, bar_format=Progress.BAR_FORMAT
    )
    line.set_postfix({"left": "3 days, 10:01:00", "images/s": "12345", "train/bpd": 4.0})
    line.close()
    shown = stream.getvalue().split("\r")[-2]
    assert len(shown.rstrip("\n")) <= 80
    assert "left=3 days, 10:01:00" in shown


def test_a_message_does_not_break_the_bar_in_two(monkeypatch):
    """The bar is removed before the message, and drawn again below it."""
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    log = logging.getLogger("lightning.pytorch")
    console = logging.StreamHandler(stream)
    other = logging.StreamHandler(io.StringIO())  # as log.txt
    console.addFilter(logging.Filter("lightning.pytorch.utilities"))
    console.setFormatter(logging.Formatter("<%(message)s>"))
    monkeypatch.setattr(log, "handlers", [console, other])
    bar = Tqdm(total=4, ncols=40, file=stream, mininterval=0, bar_format="{n_fmt} of {total_fmt}")
    with lines_above_bar():
        assert log.handlers[1] is other
        logging.getLogger("lightning.pytorch.utilities.rank_zero").warning("step 1")
        logging.getLogger("lightning.pytorch.other").warning("left out by the filter")
    bar.close()
    assert log.handlers == [console, other]
    assert other.stream.getvalue() == "step 1\nleft out by the filter\n"
    assert re.sub(r"\r +\r", "|", stream.getvalue()) == "\r0 of 4|<step 1>\n\r0 of 4\r0 of 4\n"


@pytest.mark.parametrize("n_channels", [1, 3])
def test_a_picture_has_bytes_and_a_colour_of_its_own_for_what_is_not_finite(n_channels):
    values = torch.tensor([0.0, 0.5, 1.0, float("nan"), 2.0, -1.0])
    images = values.view(6, 1, 1, 1).repeat(1, n_channels, 64, 64)
    images[0, 0, 32, 32] = float("inf")  # one value of one pixel
    grid = picture([images[:3], images[3:]], 8)
    assert grid.dtype == torch.uint8
    assert grid.shape == (3, 2 * 66 + 2, 3 * 66 + 2)
    colours = [
        [tuple(grid[:, 30 + 66 * row, 30 + 66 * column].tolist()) for column in range(3)]
        for row in range(2)
    ]
    grey = {level: (level, level, level) for level in (0, 128, 255)}
    magenta = (255, 0, 255)
    assert colours == [[grey[0], grey[128], grey[255]], [magenta, grey[255], grey[0]]]
    assert tuple(grid[:, 2 + 32, 2 + 32].tolist()) == magenta
    assert (grid == torch.tensor(magenta).view(3, 1, 1)).all(0).sum() == 64 * 64 + 1
    assert grid[0, 0, 0] == 255  # the border


def test_rows_have_their_labels_in_a_margin_on_their_left():
    images = torch.full((3, 3, 64, 64), 0.5)
    plain = picture([images, images], 8)
    labelled = picture([images, images], 8, ["T=0.7", "T=1"])
    width = labelled.shape[2] - plain.shape[2]
    assert 40 < width < 100
    assert torch.equal(labelled[:, :, width:], plain)
    assert torch.equal(picture([images, images], 8, ["", ""]), plain)
    ink = labelled[0, :, :width] < 128
    rows = ink.any(1).nonzero().flatten().tolist()
    half = plain.shape[1] // 2
    centres = [[y for y in rows if y < half], [y - half for y in rows if y >= half]]
    for centre in centres:
        assert abs(sum(centre) / len(centre) - half / 2) < 4
    wide, narrow = (part.any(0).sum() for part in ink.split(half))
    assert wide > narrow > 10  # "T=0.7" and "T=1"


def test_a_long_label_is_cut_off_and_leaves_room_for_the_images():
    images = torch.full((3, 3, 64, 64), 0.5)
    name = "a class\nwhose name has very many words to say what it is"
    cut = picture([images], 8, [name])
    assert torch.equal(cut, picture([images], 8, ["a class whose name ha..."]))
    assert cut.shape[2] - picture([images], 8).shape[2] < 300


def test_a_row_of_the_same_image_at_temperature_0_is_left_out():
    same = torch.rand(1, 3, 4, 4) + 1e-6 * torch.rand(5, 3, 4, 4)
    other = torch.rand(5, 3, 4, 4)
    assert list(shown({"T=0": same, "T=0.7": other})) == ["T=0.7"]
    assert torch.equal(shown({"T=0": same})["T=0"], same[:1])
    assert list(shown({"T=0": other, "T=1": same})) == ["T=0", "T=1"]  # an image for each class
    broken = same.clone().fill_(torch.nan)
    assert list(shown({"T=0": broken, "T=1": same})) == ["T=0", "T=1"]
    assert list(shown({"": other})) == [""]
    assert shown({}) == {}


def test_a_picture_of_5_bits_has_their_grey_levels():
    """A pixel has the lower end of its bin (authors' code), and 255 above the last bin."""
    q = torch.arange(33).repeat_interleave(3)
    images = (
        ((q + torch.tensor([0, 0.5, 0.999]).repeat(33)) / 32).view(1, 1, 1, 99).expand(1, 3, 64, 99)
    )
    assert picture([images], 5)[0, 0].tolist() == [min(8 * k, 255) for k in q.tolist()]


def test_share_of_finite_samples_is_counted_in_whole_samples(tmp_path):
    class Broken:
        has_temperature = True

        def draw(self, n, temperature, seed, batch):
            samples = torch.zeros(n, 3, 4, 4)
            if temperature > 0.8:
                samples[0, 0, 0, 0] = float("inf")
            return samples

    samples = Samples(tmp_path, [0.7, 1.0], n=4, every_n_steps=1)
    samples._sample(Broken(), {})
    assert samples.finite == {"samples/finite_T0.7": 1.0, "samples/finite_T1": 0.75}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperatures": [-1]}, r"samples\.temperatures=\[-1\] is not a list of numbers"),
        (
            {"temperatures": [0.7, float("nan")]},
            r"samples\.temperatures=\[0\.7, nan\] is not a list",
        ),
        ({"temperatures": []}, r"samples\.temperatures=\[\] is not a list"),
        ({"temperatures": {}}, r"samples\.temperatures=\{\} is not a list"),
        ({"temperatures": 1.0}, r"samples\.temperatures=1\.0 is not a list"),
        ({"n": 0}, r"samples\.n=0 is out of range: give a whole number from 1 to 100000"),
        ({"n": 10**9}, r"samples\.n=1000000000 is out of range: give a whole number from 1"),
        ({"every_n_steps": -1}, r"samples\.every_n_steps=-1 is out of range: .* at least 1"),
        ({"every_n_steps": 0}, r"samples\.every_n_steps=0 is out of range: .* at least 1"),
        ({"every_n_steps": True}, r"samples\.every_n_steps=True is out of range"),
    ],
)
def test_samples_that_cannot_be_drawn_are_refused_in_one_line(tmp_path, arguments, message):
    usual = {"temperatures": [1.0], "n": 4, "every_n_steps": 10}
    with pytest.raises(ValueError, match=message) as error:
        Samples(tmp_path, **(usual | arguments))
    assert "\n" not in str(error.value)


class Singular(nn.Module):
    """An objective of images whose inverse is a matrix's, which is singular above T = 0.8."""

    device = torch.device("cpu")
    shape = (3, 4, 4)
    n_bits = 8
    has_temperature = True
    trained = nn.Identity()

    def draw(self, n, temperature, seed, batch):
        if temperature > 0.8:
            torch.linalg.inv(torch.zeros(2, 2))
        return torch.zeros(n, *self.shape)

    def reconstruct(self, batch):
        raise FloatingPointError("division by zero")


def trainer_at(step, logged=None):
    """As much of a Trainer as a callback that writes needs; it logs into a dict."""
    logger = None
    if logged is not None:
        logger = SimpleNamespace(log_metrics=lambda values, step: logged.update(values))
    return SimpleNamespace(
        global_step=step,
        is_global_zero=True,
        logger=logger,
        strategy=SimpleNamespace(broadcast=lambda problem: problem),
    )


def test_a_model_that_cannot_be_inverted_gets_one_line_and_the_run_goes_on(tmp_path, caplog):
    """As a 1x1 whose matrix is singular after optim.lr=1e30."""
    logged = {}
    samples = Samples(tmp_path, [0.7, 0.9, 1.0], n=2, every_n_steps=1)
    samples.batch = [torch.zeros(2, 3, 4, 4)]
    model = Singular().train()
    samples.on_train_end(trainer_at(5, logged), model)
    shares = {"samples/finite_T0.7": 1.0, "samples/finite_T0.9": 0.0, "samples/finite_T1": 0.0}
    assert samples.finite == logged == shares
    assert [path.name for path in tmp_path.iterdir()] == ["samples-0000005.png"]
    [line] = caplog.messages
    assert line.startswith(
        "samples_T0.9, samples_T1, reconstructions cannot be computed: linalg.inv: "
    )
    assert "\n" not in line
    assert model.training


class Overflowing(Singular):
    """A quarter of its samples above T = 0.8 are not finite, as long as it is `broken`."""

    broken = True

    def draw(self, n, temperature, seed, batch):
        samples = torch.zeros(n, *self.shape)
        if self.broken and temperature > 0.8:
            samples[: n // 4, 0, 0, 0] = float("nan")
        return samples

    def reconstruct(self, batch):
        return None


def test_samples_that_are_not_finite_get_one_line_for_each_change(tmp_path, caplog):
    samples = Samples(tmp_path, [0.7, 0.9, 1.0], n=8, every_n_steps=1)
    samples.batch = [torch.zeros(2, 3, 4, 4)]
    model = Overflowing()
    for step, broken in enumerate((False, True, True, False, True), start=1):
        model.broken = broken
        n_lines = len(caplog.messages)
        samples.on_train_end(trainer_at(step), model)
        assert len(caplog.messages) - n_lines == (step in (2, 5))
    first, second = caplog.messages
    assert first == second
    assert first == (
        "Some samples are not finite: only 75.0% are at T=0.9, 75.0% are at T=1. "
        "The inverse of the model overflows there, although the likelihood can be good. "
        "Such pixels are magenta in the pictures. "
        "What helps: lower samples.temperatures, a smaller optim.lr"
    )


def test_the_line_on_samples_names_the_bound_of_a_glows_scales(tmp_path, caplog):
    module = density(Glow((3, 8, 8), n_levels=2, depth=2, hidden_channels=4, min_scale=0.25))
    module.draw = lambda n, *_: torch.full((n, 3, 8, 8), torch.inf)
    samples = Samples(tmp_path, [0.7], n=4, every_n_steps=1)
    samples._draw(trainer_at(1), module)
    [line] = caplog.messages
    assert line.startswith("Some samples are not finite: only 0.0% are at T=0.7. ")
    assert (
        "a larger flow.min_scale in a new run (now 0.25, in glow_cifar10_modern 0.5), lower" in line
    )


class Wasteful(Singular):
    """Its inverse fails while it holds a tensor."""

    def draw(self, n, temperature, seed, batch):
        activations = torch.zeros(2, 2)
        self.held = weakref.ref(activations)
        torch.linalg.inv(activations)


def test_samples_that_fail_leave_no_tensors_behind(tmp_path):
    """On a full GPU the next training step needs that memory before Python looks for cycles."""
    samples = Samples(tmp_path, [1.0], n=2, every_n_steps=1)
    model = Wasteful()
    gc.disable()
    try:
        samples.on_train_end(trainer_at(5), model)
        assert model.held() is None
    finally:
        gc.enable()


class NoDensity(Singular):
    """A density of points that is nowhere a number, and whose inverse does not exist."""

    def log_prob(self, x):
        return torch.full((len(x),), torch.nan)

    def draw(self, n, temperature, seed):
        torch.linalg.inv(torch.zeros(2, 2))

    def log(self, name, value, **options):
        self.logged = {name: value}


def test_a_density_that_is_no_number_is_drawn_without_samples(tmp_path, caplog):
    trainer = trainer_at(5)
    points = Points(torch.zeros(3, 2))
    trainer.datamodule = SimpleNamespace(test=points)
    module = NoDensity()
    Density2d(tmp_path, n=4, cell=0.5).on_test_epoch_end(trainer, module)
    assert math.isnan(module.logged["density_integral"])
    assert (tmp_path / "density.png").stat().st_size > 5000
    [line] = caplog.messages
    assert line.startswith("samples cannot be computed: linalg.inv: ")


def without_space(monkeypatch):
    """No file can be written any more."""

    def write_bytes(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def test_a_full_disk_ends_the_run_in_one_line_that_names_the_file(tmp_path, monkeypatch):
    """So do the curve, its picture, samples, a density, and the config."""
    curve = Curve(tmp_path, 64, 10, [])
    curve.rows = [{"step": 0, "images": 0, "val/bpd": 8.0}]
    samples = Samples(tmp_path / "samples", [0.7], n=2, every_n_steps=1)
    objective = density(Glow((3, 8, 8), n_levels=2, depth=1, hidden_channels=4))
    points = Density2d(tmp_path, n=4, cell=0.5)
    tested = trainer_at(5)
    tested.datamodule = SimpleNamespace(test=Points(torch.zeros(3, 2)))
    provenance = Provenance(OmegaConf.create({"run_dir": str(tmp_path)}))
    without_space(monkeypatch)
    writers = {
        "config.yaml": lambda: provenance.on_fit_start(trainer_at(5), None),
        "curve.csv": lambda: curve.on_fit_start(trainer_at(5), None),
        "curve.png": lambda: curve.on_fit_end(trainer_at(5), objective),
        "samples": lambda: samples.on_train_end(trainer_at(5), Singular()),
        "density.png": lambda: points.on_test_epoch_end(tested, NoDensity()),
    }
    for name, write in writers.items():
        with pytest.raises(RunStopped) as stop:
            write()
        assert stop.value.code == 1
        assert stop.value.message == (
            f"stopped at step 5: {tmp_path / name} could not be written: "
            "No space left on device. The older checkpoints are intact"
        )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_ranks_stop_because_of_what_rank_0_could_not_write(tmp_path):
    """They wait for its word, and write nothing themselves."""
    trainer = trainer_at(5)
    trainer.is_global_zero = False
    trainer.strategy.broadcast = lambda problem: "curve.csv could not be written: No space left"
    with pytest.raises(RunStopped) as stop:
        Curve(tmp_path, 64, 10, []).on_fit_start(trainer, None)
    assert stop.value.message.startswith("stopped at step 5: curve.csv could not be written")


def logged_by_comparison(papers, seen, sanity_checking=False):
    """What `PaperComparison` logs at the end of a validation that has logged `seen`, at step 6."""
    logged = []
    logger = SimpleNamespace(log_metrics=lambda row, step: logged.append((step, row)))
    trainer = SimpleNamespace(
        sanity_checking=sanity_checking,
        global_step=6,
        logger=logger,
        callback_metrics={"val/ssim": torch.tensor(0.7)},  # of an earlier validation
    )
    callback = PaperComparison(papers)
    callback.on_validation_start(trainer, None)
    trainer.callback_metrics |= seen
    callback.on_validation_end(trainer, None)
    trainer.logger = None
    callback.on_validation_end(trainer, None)
    return logged


@pytest.mark.parametrize(
    ("comparable", "expected"),
    [(True, [(6, {"paper/bpd": 3.49, "gap/bpd": pytest.approx(0.51)})]), (False, [])],
)
def test_a_claim_is_logged_only_on_its_own_data(comparable, expected):
    paper = {
        "claim": "realnvp.cifar10",
        "metric": "test/bpd",
        "value": 3.49,
        "comparable": comparable,
    }
    assert logged_by_comparison([paper], {"val/bpd": torch.tensor(4.0)}) == expected


def test_each_claim_is_logged_under_its_own_name():
    seen = {
        "val/psnr": torch.tensor(28.0),
        "val/lpips": torch.tensor(0.125),
        "val/fid_5k": torch.tensor(50.0),
    }
    papers = [
        {"claim": "f.psnr", "metric": "test/psnr", "value": 27.75, "comparable": True},
        # Only an earlier validation has measured the next one.
        {"claim": "f.ssim", "metric": "test/ssim", "value": 0.76, "comparable": True},
        {"claim": "f.lpips", "metric": "test/lpips", "value": 0.12, "comparable": False},
        # Validations measure the next one on fewer samples.
        {"claim": "f.fid", "metric": "test/fid", "value": 46.9, "comparable": True},
    ]
    [(step, row)] = logged_by_comparison(papers, seen)
    expected = {"paper/psnr": 27.75, "gap/psnr": 0.25, "paper/ssim": 0.76, "paper/fid": 46.9}
    assert (step, row) == (6, pytest.approx(expected))
    assert logged_by_comparison(papers, seen, sanity_checking=True) == []


def test_the_table_says_why_a_metric_has_no_figure_or_none_like_the_papers():
    claim = {"decimals": 2, "gap": None}
    fid = claim | {"metric": "test/fid", "value": 46.9, "status": "not measured"}
    psnr = claim | {"metric": "test/psnr", "value": 27.75, "gap": 0.25}
    psnr |= {"status": "other protocol", "differences": ["crop: 0 here, 4 in the paper", "b"]}
    ssim = claim | {"metric": "test/ssim", "value": 0.7, "status": "-", "differences": ["c"]}
    result = {
        "experiment": "e",
        "metrics": {"test/psnr": 28.0, "test/ssim": 0.5},
        "comparisons": [psnr, fid, ssim],
        "not_measured": {"test/fid": "no weights: give some", "test/kid": "no weights"},
    }
    result["not_measured"] |= {"test/recall": "no weights"}
    assert [row[1:] for row in comparison_rows(result)] == [
        ("test/fid", 46.9, None, None, "not measured", "no weights: give some"),
        ("test/kid", None, None, None, "not measured", "no weights"),
        ("test/psnr", 27.75, 28.0, 0.25, "other protocol", "crop: 0 here, 4 in the paper; b"),
        ("test/recall", None, None, None, "not measured", "no weights"),
        ("test/ssim", None, 0.5, None, "-", ""),  # of other data
    ]
    lines = comparison_table(result).splitlines()
    assert lines[0].split() == ["experiment", "metric", "paper", "ours", "gap", "status"]
    assert lines[2].split(maxsplit=5) == ["e", "test/fid", "46.90", "-", "-", "not measured"]
    assert lines[-3:] == [
        "test/fid: no weights: give some",
        "test/kid, test/recall: no weights",
        "test/psnr: crop: 0 here, 4 in the paper; b",
    ]
    result["not_measured"]["test/kid"] = "no weights: give some"
    assert comparison_table(result).splitlines()[-3:] == [
        "test/fid, test/kid: no weights: give some",
        "test/psnr: crop: 0 here, 4 in the paper; b",
        "test/recall: no weights",
    ]


def test_table_has_a_row_for_each_claim_with_its_decimals():
    result = {
        "experiment": "e",
        "metrics": {"test/psnr": 28.0, "test/lpips": 0.1234567, "test/l1": 0.5},
        "comparisons": [
            {
                "metric": "test/psnr",
                "value": 27.7,
                "decimals": 2,
                "gap": 0.3,
                "status": "reproduced",
            },
            {
                "metric": "test/ssim",
                "value": 0.76,
                "decimals": 2,
                "gap": None,
                "status": "not measured",
            },
            {
                "metric": "test/lpips",
                "value": 0.12,
                "decimals": 4,
                "gap": 0.0034567,
                "status": "shortened",
            },
        ],
    }
    rows = [line.split(maxsplit=5) for line in comparison_table(result).splitlines()[2:]]
    assert rows == [
        ["e", "test/l1", "-", "0.5000", "-", "-"],
        ["e", "test/lpips", "0.1200", "0.12346", "+0.00346", "shortened"],
        ["e", "test/psnr", "27.70", "28.0000", "+0.300", "reproduced"],
        ["e", "test/ssim", "0.76", "-", "-", "not measured"],
    ]


def test_table_shows_gap_and_status_in_the_papers_row():
    result = {
        "experiment": "e",
        "metrics": {"test/bpd": 3.6, "test/bpd_reestimated": 3.58, "val/bpd": 3.7},
        "comparisons": [{"metric": "test/bpd", "value": 3.49, "gap": 0.11, "status": "shortened"}],
    }
    rows = [line.split() for line in comparison_table(result).splitlines()[2:]]
    assert rows == [
        ["e", "test/bpd", "3.49", "3.6000", "+0.110", "shortened"],
        ["e", "test/bpd_reestimated", "-", "3.5800", "-", "-"],
    ]


def test_curve_keeps_its_seconds_and_rows_over_a_resume(tmp_path):
    before = Curve(tmp_path, 64, 10, [])
    before.started = -100.0
    before.rows = [{"step": 0, "images": 0, "val/bpd": 8.0}]
    after = Curve(tmp_path, 64, 10, [])
    after.load_state_dict(before.state_dict())
    assert after.rows == before.rows
    assert after.seconds_before >= 100
    assert before.validation_result(BPD, best=True) == {}  # step 0 does not count


@pytest.mark.parametrize(("metric", "best"), [(BPD, 20.0), (PSNR, 30.0)])
def test_the_best_of_a_curve_is_the_metrics(tmp_path, metric, best):
    """Rows after step 0 count, and of these the finite values."""
    curve = Curve(tmp_path, 64, 10, None)
    key = f"val/{metric.name}"
    curve.rows = [
        {"step": i, key: value}
        for i, value in enumerate((10.0, 20.0, 30.0, float("nan"), None, 25.0))
    ]
    assert curve.validation_result(metric, best=True) == {key: best}
    assert curve.validation_result(metric, best=False) == {key: 25.0}


@pytest.mark.parametrize("comparable", [True, False])
def test_a_run_draws_the_same_curve_as_the_page_of_its_record(tmp_path, comparable):
    """The page reads curve.csv, and knows the claims with which a run can be compared."""
    claim = {"metric": "test/bpd", "value": 1.25, "decimals": 2, "comparable": comparable}
    curve = Curve(tmp_path, 64, 10, [claim], title_of("glow_photos", "a"))
    curve.rows = [{"images": i, "train/bpd": None, "val/bpd": 1.1 + i / 3} for i in range(3)]
    objective = density(Glow((3, 8, 8), n_levels=2, depth=1, hidden_channels=4))
    curve.on_fit_start(trainer_at(2), objective)
    curve.on_fit_end(trainer_at(2), objective)
    metric = {"unit": "bits/dim", "direction": "lower"}
    rows = read_curve(curve.path)
    record = {"experiment": "glow_photos", "run": "a", "curve": rows, "metric": metric}
    picture = run_curve(record, [claim] if comparable else [])
    assert (tmp_path / "curve.png").read_bytes() == png(picture)
    texts = [shape.content for shape in picture.shapes if isinstance(shape, Text)]
    assert ("paper 1.25" in texts) == comparable
    assert "glow_photos, run a" in texts


def test_a_curve_of_nothing_finite_has_no_picture(tmp_path):
    curve = Curve(tmp_path, 64, 10, [])
    curve.rows = [{"images": i, "train/bpd": None, "val/bpd": math.nan} for i in range(3)]
    objective = density(Glow((3, 8, 8), n_levels=2, depth=1, hidden_channels=4))
    curve.on_fit_end(trainer_at(2), objective)
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_no_papers_number_for_a_run_on_other_data():
    comparison = {"metric": "test/bpd", "value": 3.49, "decimals": 2, "gap": None, "status": "-"}
    result = {"experiment": "e", "metrics": {"test/bpd": 4.5}, "comparisons": [comparison]}
    assert comparison_rows(result) == [("e", "test/bpd", None, 4.5, None, "-", "")]
    [row] = comparison_table(result).splitlines()[2:]
    assert row.split() == ["e", "test/bpd", "-", "4.5000", "-", "-"]


@pytest.mark.parametrize(("status", "n_rows"), [("-", 1), ("not measured", 2)])
def test_a_claim_on_other_data_that_was_not_measured_has_no_row(status, n_rows):
    comparison = {
        "claim": "c",
        "metric": "test/bpd",
        "value": 3.49,
        "decimals": 2,
        "gap": None,
        "status": status,
    }
    result = {"experiment": "e", "metrics": {"test/nll": 0.3}, "comparisons": [comparison]}
    assert len(comparison_table(result).splitlines()) == 2 + n_rows
