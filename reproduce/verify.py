"""Check a recorded run: its form, recipe, curve and weights and, with the data, its figure.

python -m reproduce.verify results/runs/realnvp_cifar10/cpu-seed0.json
python -m reproduce.verify glow_cifar10/cpu-seed0 data.root=/data/cifar10

JSON is the file of a recorded run, the name of one, or the folder of a finished run. It may be a
stranger's, for example in a pull request: no code is run from it or from its weights. Each check is
one line, which begins with ok, FAIL, or note for what could not be checked or is only worth
knowing. The exit code is 1 if a check fails. What is checked:
  schema    every key is there, and of the right kind
  recipe    the recipe of this clone, with the row's overrides, has the row's settings
  model     the recipe builds a model with the row's number of parameters
  curve     steps, images and seconds increase together and end where the run does; the best (or
            last) validation is the tested one; a test with a claim is not far better than that
  budget    images and their share of a full training follow from the curve and the recipe
  claims    the papers' numbers, the gaps and the statuses are those of results/paper/
  protocol  no metric has both a figure and a reason for having none, and each that depends on
            more than the data (FID, PSNR and so on) says on what
  speed     no part of the curve needs more arithmetic than the device can do
  commit    the commit is in this clone, and the code was that of the commit
  weights   the file has the recorded SHA-256 and size, fits the model, and is of this run
  figure    with data.root=: the weights are tested again (reproduce.evaluate), and with quality.n=
            FID and the other figures of samples, too

keys:
  weights=FILE     the file of weights, where it is not beside the row
  device=cpu       of the test, or cuda; the default is the run's kind of device, if it is here
  data.KEY=...     a setting of the test data, mostly data.root=FOLDER, as for reproduce.evaluate
  quality.n=N      also draw samples and measure their FID and so on again, as many as the row's
  metrics.inception_weights=FILE
                   the network behind these figures, where it cannot be downloaded
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import inspect
import itertools
import math
import subprocess
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import yaml
from omegaconf import DictConfig, OmegaConf

import results
from datamodules import DATA, make_data
from datamodules.checks import expand_home
from lightning_modules.objective import Objective
from lightning_modules.quality.distributions import METRICS
from reproduce import evaluate
from reproduce.command import command
from reproduce.config import CONFIGS, ConfigError, arguments, compose, parse, plain
from reproduce.experiment import papers_of
from reproduce.kinds import argument_text
from reproduce.model import UNFIT_RECIPE, TrainedModel
from reproduce.model_command import device_of, read_words, repeatable
from reproduce.provenance import ROOT
from reproduce.run_folder import FREE, RESULT, SAME
from reproduce.schema import constructors
from reproduce.stored import EXPORTED, Stored, file_sha256, read_stored
from reproduce.streams import say
from results import is_number
from results.curves import metric_name
from results.files import abbreviated, portable
from results.formats import by_text
from results.groups import leaves
from results.metrics import QUANTITIES, Metric, quantity_of
from results.runs import read_curve, read_json

OK = "ok"
FAIL = "FAIL"
NOTE = "note"  # nothing is wrong, but something could not be checked, or is worth knowing
DEFAULTS: dict[str, object] = {"weights": "", "device": ""}
# What the fastest matrix units of a device do in a second at most: dense bf16 multiplications and
# additions, by the makers' data sheets.
PEAKS = {"H100": 9.9e14, "H200": 9.9e14, "A100": 3.2e14, "V100": 1.3e14, "RTX 4090": 3.4e14}
PEAK_OF_A_GPU = 2.6e15  # of one whose name is not in PEAKS
PEAK_OF_A_THREAD = 8e12  # of a CPU's core with AMX
PASSES = 3  # a training step costs a forward pass, and twice that for the backward pass
FLOAT_TOLERANCE = 1e-9
# How much better than its validation a test may be, as a share of the validation (of 1, if that is
# smaller): the two splits are of the same kind of images.
BETTER_THAN_VALIDATION = 0.05
OF_THE_MODEL = {"bpd", "nll", "nats_ll", "accuracy"}  # what the model itself gives, by its config
Row = Mapping[str, Any]


class Check(NamedTuple):
    """A line of the report. verdict: OK, FAIL or NOTE."""

    name: str
    verdict: str
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:<5} {self.name:<8} {' '.join(self.text.split())}"


def judged(name: str, problems: list[str], fine: str) -> Check:
    """FAIL with the problems, or OK with the text `fine` where there are none."""
    if problems:
        return Check(name, FAIL, "; ".join(problems))
    return Check(name, OK, fine)


# ---------------------------------------------------------------------- reading


def path_of(text: str) -> Path:
    """The JSON file that a word names: a file, a finished run's folder, or a recorded run."""
    path = expand_home("JSON", text)
    if path.is_dir():
        path = path / RESULT
    recorded = results.ROOT / "runs" / f"{text}.json"
    if not path.is_file() and recorded.is_file():
        return recorded
    if not path.is_file():
        raise ConfigError(
            f"no file {path}: give a recorded run, as results/runs/glow_cifar10/cpu-seed0.json, "
            "or the folder of a finished run"
        )
    return path


def read_row(path: Path) -> dict[str, Any]:
    """A recorded run, or a run's result with the curve beside it. ValueError: its form is wrong."""
    row = read_json(path)
    if path.name == RESULT and "curve" not in row:
        row["curve"] = read_curve(path.with_name("curve.csv"))
    return row


def check_name(path: Path, row: Row) -> Check:
    """The form, which `read_row` has checked, and the row's place in the folder of all rows."""
    named = f"{row['experiment']}/{row['run']}"
    problems = []
    if path.name != RESULT and f"{path.parent.name}/{path.stem}" != named:
        problems = [f"it is the run {named}, so its file has to be results/runs/{named}.json"]
    return judged("schema", problems, f"{named}, every key is there")


# ---------------------------------------------------------------------- settings


def check_recipe(row: Row) -> Check:
    """Whether the recipe of this clone with the row's overrides has the row's settings.

    A key that the row's recipe did not have yet counts as its default. Keys that change no number,
    such as the place of the data, are left out.
    """
    words = list(row.get("overrides") or [])
    try:
        config = compose(row["experiment"], words)
    except ConfigError as error:
        return Check("recipe", FAIL, str(error))
    settings = plain(config)
    recipe = dict(leaves(portable(settings)))
    recorded = dict(leaves(row["config"]))
    defaults = defaults_of(row["experiment"], str(config.data.name))
    problems = fact_problems(row, settings)
    for key in sorted(recipe.keys() | recorded.keys()):
        if key not in recipe:
            problems.append(f"{key}={argument_text(recorded[key])} is no key of the recipe")
            continue
        actual = recorded.get(key, defaults.get(key, "nothing"))
        if recipe[key] != actual and not is_chosen(key, recipe[key]):
            problems.append(
                f"{key} is {argument_text(actual)} in the row, and {argument_text(recipe[key])} by "
                "the recipe and the overrides"
            )
    shown = " ".join(words) or "no overrides"
    if problems:
        problems = [abbreviated(problems, 4)]
    return judged("recipe", problems, f"{row['experiment']} with {shown}: {len(recorded)} settings")


def fact_problems(row: Row, recipe: Mapping[str, Any]) -> list[str]:
    """What is wrong with the facts of a row that repeat settings, such as its preset and its seed.

    recipe: the settings by the recipe and the overrides.
    """
    config = row["config"]
    trainer = config.get("trainer") or {}
    facts = [
        ("preset", row["preset"], recipe["preset"]),
        ("seed", row["seed"], recipe["seed"]),
        ("config.seed", config.get("seed"), recipe["seed"]),
        ("config.experiment", config.get("experiment"), row["experiment"]),
        ("precision", row["precision"], trainer.get("precision")),
    ]
    return [
        f"{key} is {argument_text(ours)}, and follows as {argument_text(expected)}"
        for key, ours, expected in facts
        if ours != expected
    ]


def is_chosen(key: str, value: object) -> bool:
    """Whether a run chooses the value of a setting by its machine."""
    return key.startswith("trainer.") and value == "auto"


def defaults_of(experiment: str, data: str) -> dict[str, Any]:
    """The values of keys that a row's recipe did not have yet, by dotted key.

    They are the defaults of the constructors to which the sections go, and those of base.yaml.
    """
    base = yaml.safe_load((CONFIGS / "base.yaml").read_text(encoding="utf-8"))
    defaults = {key: value for key, value in leaves(base) if not key.startswith(("data.", "flow."))}
    kinds = {**constructors(experiment), "data": DATA.get(data)}
    for section, kind in kinds.items():
        kind = getattr(kind, "func", kind)  # the class in a functools.partial
        for base_class in reversed(inspect.getmro(cast(type, kind))):
            initializer = vars(base_class).get("__init__")
            if not callable(initializer):
                continue
            for name, parameter in inspect.signature(initializer).parameters.items():
                if parameter.default is not parameter.empty:
                    defaults[f"{section}.{name}"] = as_config(parameter.default)
    return defaults


def as_config(value: object) -> object:
    """A default as a recipe has it: a tuple is a list there."""
    if isinstance(value, tuple):
        return list(value)
    return value


def build(row: Row) -> tuple[Check, Objective | None]:
    """Build the objective of a row, with random weights, and compare its number of parameters.

    The objective is None if this clone does not build it, or not without the data.
    """
    config = OmegaConf.create(row["config"])
    script = import_module(f"reproduce.{row['experiment']}")
    try:
        data = make_data(seed=config.seed, **config.data)
    except (ValueError, OSError) as error:
        text = f"not built, since the data are not here ({one_line(error)})"
        return Check("model", NOTE, text), None
    except UNFIT_RECIPE as error:
        return Check("model", FAIL, f"this clone does not know the data: {one_line(error)}"), None
    try:
        flow = script.make_flow(config, tuple(data.shape))
        module: Objective = script.make_module(config, flow, data)
    except (*UNFIT_RECIPE, ValueError) as error:
        return Check("model", FAIL, f"this clone does not build it: {one_line(error)}"), None
    recorded = row.get("parameters")
    n = module.n_parameters
    problems = []
    if recorded is not None and recorded != n:
        problems = [f"{module.model_name} has {n:,} parameters, and the row says {recorded:,}"]
    return judged("model", problems, f"{module.model_name}, {n:,} parameters"), module


def one_line(error: Exception) -> str:
    """The message of an error on one line, cut off if it is long."""
    return " ".join(str(error).split())[:200]


# ---------------------------------------------------------------------- figures


def check_curve(row: Row) -> Check:
    """Whether the curve is one of training, ends where the run does, and has the tested weights."""
    curve = row.get("curve") or []
    if len(curve) < 2:
        return Check("curve", FAIL, "it has fewer than two rows")
    for number, point in enumerate(curve):
        for key in ("step", "images", "seconds"):
            if not is_number(point.get(key)):
                return Check("curve", FAIL, f"row {number} has no number in its column {key}")
    problems = [
        *steps_problems(row, curve),
        *validation_problems(row, curve),
        *figure_problems(row),
    ]
    last = curve[-1]
    fine = f"{len(curve)} rows to step {last['step']:,}, {last['images']:,} images"
    return judged("curve", problems, fine)


def steps_problems(row: Row, curve: list[dict]) -> Iterator[str]:
    """What is wrong with the steps, images and seconds of a curve."""
    batch_size = row["config"].get("data", {}).get("batch_size")
    last = curve[-1]
    if curve[0]["step"] != 0:
        yield f"it begins at step {curve[0]['step']}, not at 0"
    for before, after in itertools.pairwise(curve):
        if after["step"] <= before["step"]:
            yield f"step {after['step']} follows step {before['step']}"
        if after["seconds"] < before["seconds"]:
            yield f"{after['seconds']} s follow {before['seconds']} s at step {after['step']}"
    wrong = [point["step"] for point in curve if point["images"] != point["step"] * batch_size]
    if wrong:
        yield f"images are not steps x {batch_size} at step {wrong[0]}"
    if last["images"] != row["images"]:
        yield f"it ends at {last['images']:,} images, and the run at {row['images']:,}"
    if last["seconds"] > row["seconds"]:
        yield f"it ends after {last['seconds']} s, and the run after {row['seconds']} s"
    most = (row["config"].get("trainer") or {}).get("max_steps")
    if is_number(most) and 0 < most < last["step"]:
        yield f"step {last['step']} is beyond trainer.max_steps={most}"


def validation_problems(row: Row, curve: list[dict]) -> Iterator[str]:
    """What is wrong between the validations of a curve and the tested weights."""
    metric = metric_of(row)
    key = f"val/{metric.name}"
    points = [point for point in curve[1:] if is_number(point.get(key))]
    tested = row.get("tested") or {}
    reported = row["metrics"].get(key)
    if not points:
        if reported is not None:
            yield f"{key} is {reported}, and the curve has no validation"
        return
    chosen = points[-1]
    if tested.get("chosen", "best") == "best":
        best = metric.best([point[key] for point in points])
        chosen = next(point for point in points if point[key] == best)
    if reported is None or not math.isclose(reported, chosen[key], rel_tol=FLOAT_TOLERANCE):
        yield f"{key} is {reported}, and by the curve {chosen[key]}"
    steps = [point["step"] for point in points if point[key] == chosen[key]]
    if tested.get("chosen") == "best" and tested["step"] not in steps:
        yield f"weights of step {tested['step']} were tested, and the best are of step {steps[0]}"


def figure_problems(row: Row) -> Iterator[str]:
    """A test of the curve's metric that is far better than the validation of the same weights.

    It says so only where a paper's claim is on the metric.
    """
    metric = metric_of(row)
    key = f"test/{metric.name}"
    validation = row["metrics"].get(f"val/{metric.name}")
    test = row["metrics"].get(key)
    claimed = [paper["metric"] for paper in results.papers_in(row)]
    if key not in claimed or not is_number(validation) or not is_number(test):
        return
    better_by = validation - test if metric.direction == "lower" else test - validation
    if better_by > BETTER_THAN_VALIDATION * max(1.0, abs(validation)):
        yield f"{key} is {test:g}, far better than the validation of these weights, {validation:g}"


def metric_of(row: Row) -> Metric:
    """The metric of a row's curve. The rows of older code do not say which direction is better."""
    metric = row.get("metric") or {}
    name = metric.get("name") or metric_name(row.get("curve") or [])
    quantity = QUANTITIES.get(quantity_of(name))
    direction = metric.get("direction", "lower")
    if quantity is not None:
        direction = quantity.direction
    return Metric(name, direction, metric.get("unit", ""))


def check_budget(row: Row) -> Check:
    """Whether the budget follows from the images and the recipe."""
    of = (row["config"].get("budget") or {}).get("images")
    budget = row["budget"]
    if of is None or row.get("init_from") is not None:
        problems = []
        if budget is not None:
            problems = ["there is one, and the recipe gives none (or started from trained weights)"]
        return judged("budget", problems, "the recipe gives none")
    if budget is None:
        return Check("budget", FAIL, f"there is none, and the recipe gives {of:,} images")
    share = row["images"] / of
    expected = {"images": row["images"], "of": of, "fraction": share}
    problems = [
        f"{key} is {budget[key]}, and follows as {value}"
        for key, value in expected.items()
        if budget[key] is None or not math.isclose(budget[key], value, rel_tol=FLOAT_TOLERANCE)
    ]
    return judged("budget", problems, f"{share:.2%} of {of:,} images")


def check_claims(row: Row) -> Check:
    """Whether the claims, gaps and statuses are those that follow from results/paper/."""
    try:
        papers = papers_of(cast(DictConfig, OmegaConf.create(row["config"])))
        again = results.compare_all(row)
    except (ConfigError, ValueError, AttributeError, KeyError) as error:
        return Check("claims", FAIL, f"they cannot be compared: {error}")
    keys = ("claim", "metric", "comparable")
    expected = [[paper[key] for key in keys] for paper in papers]
    recorded = [[paper[key] for key in keys] for paper in row["papers"]]
    problems = []
    if recorded != expected:
        problems.append(f"the row is compared with {recorded}, and by its recipe with {expected}")
    values = {paper["claim"]: paper["value"] for paper in papers}
    for paper in row["papers"]:
        value = values.get(paper["claim"])
        if paper.get("value", value) != value:
            problems.append(f"{paper['claim']} is {value}, and {paper['value']} in the row")
    comparisons = {each["metric"]: each for each in again["comparisons"]}
    first = {"metric": "the first claim", **{key: row.get(key) for key in ("gap", "status")}}
    pairs = [(first, again)]
    for each in row.get("comparisons") or []:
        pairs.append((each, comparisons.get(each["metric"], {})))
    for before, now in pairs:
        for key in ("gap", "status"):
            if key in before and not same(before[key], now.get(key)):
                name = before["metric"]
                problems.append(f"{key} of {name} is {before[key]}, and follows as {now.get(key)}")
    statuses = [f"{each['claim']} {each['status']}" for each in again["comparisons"]]
    return judged("claims", problems, ", ".join(statuses) or "none")


def check_protocol(row: Row) -> Check:
    """Whether metrics that depend on a protocol have one, and either a figure or a reason."""
    reasons = row.get("not_measured") or {}
    protocols = row.get("protocol") or {}
    both = sorted(reasons.keys() & row["metrics"].keys())
    if both:
        text = f"{abbreviated(both)} has a figure, and a reason for having none"
        return Check("protocol", FAIL, text)
    needed = [key for key in sorted(row["metrics"]) if depends_on_more(key)]
    lacking = [key for key in needed if not protocols.get(key)]
    if lacking:
        text = f"{abbreviated(lacking)} is not said to depend on anything: it cannot be compared"
        return Check("protocol", NOTE, text)
    absent = by_text(dict(sorted(reasons.items())))
    texts = [f"{names} not measured: {reason}" for reason, names in absent.items()]
    return Check("protocol", OK, "; ".join([*needed, *texts]) or "likelihoods alone")


def depends_on_more(key: str) -> bool:
    """Whether a tested metric depends on more than data and model: an extractor, a crop, ...

    >>> [depends_on_more(key) for key in ("test/fid", "test/bpd_reestimated", "val/psnr")]
    [True, False, False]
    """
    quantity = quantity_of(key)
    return key.startswith("test/") and quantity in QUANTITIES and quantity not in OF_THE_MODEL


def same(a: object, b: object) -> bool:
    """Whether two values are equal, numbers up to rounding."""
    if is_number(a) and is_number(b):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=FLOAT_TOLERANCE)
    return a == b


def check_speed(row: Row, module: Objective) -> Check:
    """Whether the device can do the arithmetic of the fastest part of the curve in its time."""
    operations = PASSES * operations_of(module)
    rates = []
    for before, after in itertools.pairwise(row.get("curve") or []):
        seconds = max(after["seconds"] - before["seconds"], 0.1)  # times are rounded to 0.1 s
        rates.append((after["images"] - before["images"]) / seconds)
    fastest = max(rates, default=0.0)
    if not operations:
        return Check("speed", NOTE, f"{fastest:,.0f} images/s; not compared, for want of images")
    peak = peak_of(row["device"])
    share = fastest * operations / peak
    text = f"{fastest:,.0f} images/s, {share:.1%} of what {row['device']} can do at most"
    return judged("speed", [text] if share > 1 else [], text)


def operations_of(module: Objective) -> float:
    """The floating-point operations of a forward pass of one image; 0 for points in the plane."""
    from torch.utils.flop_counter import FlopCounterMode

    n = 2
    with FlopCounterMode(display=False) as counter:
        module.trial(n)
    return counter.get_total_flops() / n


def peak_of(device: str) -> float:
    """The floating-point operations that a device can do in a second at most.

    device: as a row names it.

    >>> peak_of("2 x NVIDIA H200") / peak_of("1 x NVIDIA H200")
    2.0
    >>> peak_of("AMD EPYC, 4 threads")
    32000000000000.0
    """
    words = device.split()
    if words[-1:] == ["threads"] and words[-2].isdecimal():
        n_processes = 1
        if words[0].isdecimal() and words[1] == "x":
            n_processes = int(words[0])
        return n_processes * int(words[-2]) * PEAK_OF_A_THREAD
    n = 1
    if words and words[0].isdecimal():
        n = int(words[0])
    return n * next((peak for name, peak in PEAKS.items() if name in device), PEAK_OF_A_GPU)


def check_commit(row: Row) -> Check:
    """Whether the commit is known here. A note where it is not: a clone may be shallow."""
    commit = row["commit"]
    if commit is None:
        return Check("commit", NOTE, "none is recorded: the run came from an installed copy")
    git = ["git", "-C", str(ROOT), "cat-file", "-e", f"{commit}^{{commit}}"]
    try:
        is_known = subprocess.run(git, capture_output=True, check=False).returncode == 0
    except OSError:
        is_known = False
    if not is_known:
        return Check("commit", NOTE, f"{commit[:12]} is not in this clone: its code is not known")
    if row["dirty"]:
        return Check("commit", NOTE, f"{commit[:12]} with changes that were not committed")
    return Check("commit", OK, f"{commit[:12]} is in this clone")


# ---------------------------------------------------------------------- weights


def weights_path(path: Path, row: Row, given: str) -> Path | None:
    """The file of a row's weights: the one that is given, or the one beside it; None if unknown."""
    if given:
        return expand_home("weights", given)
    recorded = row.get("weights")
    if not recorded:
        return None
    if path.name == RESULT:
        return path.with_name(EXPORTED)
    for root in (path.parent.parent.parent, results.ROOT):  # of a stranger's clone, or of this one
        if (root / recorded["file"]).is_file():
            return root / recorded["file"]
    return None


def check_weights(file: Path | None, row: Row) -> tuple[Check, TrainedModel | None]:
    """Whether a file of weights is the recorded one, and fits; the model with these weights."""
    recorded = row.get("weights")
    if file is None:
        text = "none are recorded"
        if recorded:
            text = f"{recorded['file']} is not here: give weights=FILE"
        return Check("weights", NOTE, text), None
    if not file.is_file():
        return Check("weights", FAIL, f"no file {file}"), None
    if recorded and file_sha256(file) != recorded["sha256"]:
        text = f"{file} is not the file with the recorded SHA-256 {recorded['sha256']}"
        return Check("weights", FAIL, text), None
    if recorded and file.stat().st_size != recorded["bytes"]:
        text = f"{file} has {file.stat().st_size:,} bytes, and the row says {recorded['bytes']:,}"
        return Check("weights", FAIL, text), None
    try:
        stored = read_stored(file)
        model = TrainedModel(Stored(stored.weights, stored.origin, dict(row), file))
    except (ConfigError, ValueError, OSError) as error:
        return Check("weights", FAIL, str(error)), None
    problems = [
        f"its {name} is {theirs}, and that of the row {ours}"
        for name, theirs, ours in (
            ("experiment", model.experiment, row["experiment"]),
            ("commit", model.commit, row["commit"]),
        )
        if theirs != ours
    ]
    own = settings_of_weights(portable(stored.origin["config"]))
    other = settings_of_weights(row["config"])
    changed = [key for key in sorted(own.keys() | other.keys()) if own.get(key) != other.get(key)]
    if changed:
        problems.append(f"its {abbreviated(changed, 4)} is another than the row's")
    n = sum(value.numel() for value in model.flow.parameters())
    verdict = judged("weights", problems, f"{file.name}, {n:,} parameters of the flow")
    if not recorded and not problems:
        verdict = Check("weights", NOTE, f"{verdict.text}; the row records no SHA-256")
    return verdict, model


def settings_of_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that all parts of a run share, by dotted key.

    Weights are stored with the settings of the part that saved them, which may have had another end
    (trainer.max_steps) than the run.
    """
    shared = {key: config.get(key) for key in SAME}
    settings = {key: value for key, value in leaves(shared) if key.rpartition(".")[2] not in FREE}
    return settings | {"seed": config.get("seed")}


def check_figure(model: TrainedModel, texts: Mapping[str, str], device: str) -> Check:
    """Whether a new test of the weights gives the recorded figures."""
    config, changed = evaluate.config_of(model, 0, texts)
    if changed:
        return Check("figure", NOTE, f"not compared: {', '.join(changed)} makes another test")
    default = "cpu" if config.trainer.accelerator == "cpu" else ""
    kind = device_of(device or default)
    row = cast(dict[str, Any], model.result)
    try:
        evaluation = evaluate.evaluate(model, config, kind)
    except (ConfigError, ValueError, OSError) as error:
        return Check("figure", FAIL, " ".join(str(error).split()))
    others = evaluate.other_images(evaluation, row)
    if others:
        return Check("figure", FAIL, f"the data hold {', '.join(others)}")
    text, is_close = evaluate.compare(evaluation, row, kind)
    line = "; ".join([*text.splitlines(), *not_tested(row, evaluation)])
    return judged("figure", [] if is_close else [line], line)


def not_tested(row: Row, evaluation: evaluate.Evaluation) -> list[str]:
    """The recorded figures of samples that a test has not measured again, and what to do."""
    left = [key for key in row["metrics"] if depends_on_more(key)]
    texts = []
    for key in sorted(set(left) - evaluation.figures.keys()):
        text = f"{key}: not tested again"
        if key in evaluation.not_measured:
            text += f", {evaluation.not_measured[key]}"
        elif quantity_of(key) in METRICS:
            text += f": give quality.n={n_samples(row)}"
        texts.append(text)
    return texts


def n_samples(row: Row) -> float:
    """How many samples a row's figures of samples are of; the recipe's number where none says."""
    protocols = row.get("protocol") or {}
    numbers = [facts.get("n") for key, facts in protocols.items() if quantity_of(key) in METRICS]
    known = [n for n in numbers if is_number(n)]
    return max(known, default=(row["config"].get("quality") or {}).get("n", 0))


# ---------------------------------------------------------------------- all of it


def guarded(name: str, make: Callable[[], Check]) -> Check:
    """A check of a row in which values of an unexpected kind are a failure of the check."""
    try:
        return make()
    except (TypeError, LookupError, AttributeError, ValueError, ArithmeticError) as error:
        text = f"the row has values that cannot be read ({one_line(error)})"
        return Check(name, FAIL, text)


def is_experiment(name: str) -> bool:
    """Whether this clone has a recipe and a script of a name."""
    has_recipe = (CONFIGS / f"{name}.yaml").is_file()
    return has_recipe and find_spec(f"reproduce.{name}") is not None


def checks(path: Path, weights: str = "") -> tuple[list[Check], TrainedModel | None]:
    """All checks of a row but that of its figure, and its model, if its weights could be loaded."""
    try:
        row = read_row(path)
    except ValueError as error:
        return [Check("schema", FAIL, str(error))], None
    lines = [check_name(path, row), guarded("recipe", lambda: check_recipe(row))]
    module = None
    if is_experiment(row["experiment"]):
        line, module = build(row)
        lines.append(line)
    curve = guarded("curve", lambda: check_curve(row))
    lines += [
        curve,
        guarded("budget", lambda: check_budget(row)),
        guarded("claims", lambda: check_claims(row)),
        guarded("protocol", lambda: check_protocol(row)),
    ]
    if module is not None and curve.verdict == FAIL:
        lines.append(Check("speed", NOTE, "not compared, since the curve is wrong"))
    elif module is not None:
        objective = module
        lines.append(guarded("speed", lambda: check_speed(row, objective)))
    lines.append(check_commit(row))
    line, model = check_weights(weights_path(path, row, weights), row)
    return [*lines, line], model


@command
def main(argv: list[str] | None = None) -> None:
    """Print the checks; exit code 1 and a last line if one fails."""
    words = arguments(argv)
    if {"--help", "-h"} & set(words):
        say((__doc__ or "").strip())
        return
    of_test = [word for word in words if word.startswith(evaluate.OF_RECIPE) and "=" in word]
    rest = [word for word in words if word not in of_test]
    [name], options = read_words(rest, ["JSON"], DEFAULTS)
    texts = parse(of_test)
    path = path_of(name)
    lines, model = checks(path, options.weights)
    say(*lines)
    if not texts and model is not None and "root" in model.config.data:
        say(Check("figure", NOTE, "not tested again: give data.root=FOLDER, where the data are"))
    if texts and model is None:
        lines.append(Check("figure", FAIL, "there are no weights to test"))
        say(lines[-1])
    if texts and model is not None:
        with repeatable("nothing is written, the same command checks again"):
            lines.append(check_figure(model, texts, options.device))
        say(lines[-1])
    failed = [line.name for line in lines if line.verdict == FAIL]
    if failed:
        raise ConfigError(
            f"{path}: {len(failed)} of {len(lines)} checks failed: {', '.join(failed)}"
        )


if __name__ == "__main__":
    main()
