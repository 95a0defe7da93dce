"""Runs that differ in their seed alone, put together: a row of a table shows such a group."""

import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from results import is_number, status_of
from results.curves import metric_name
from results.formats import (
    averaged,
    budget,
    cell_text,
    commit,
    distinct,
    fingerprint,
    finite,
    machine_text,
    main_metrics,
    run_name,
    tested_data,
    wall_time,
)
from results.protocol import SUPER_RESOLUTION

Group = list[dict]  # recorded runs (`results.runs`) of the same settings, by seed

# Keys of a config that have no part in a run's numbers: where files are, what is shown and logged,
# and which processes share the work. The weights that a run started from count in `settings_key`.
NO_PART = {
    "": {
        *("init_from", "logger", "metrics", "overrides", "paper", "preset", "quality"),
        *("resume", "run_dir", "samples", "seed"),
    },
    "data": {"cache", "download", "num_workers", "root"},
    "trainer": {"accelerator", "devices", "log_every_n_steps", "num_nodes", "strategy"},
}
OF_CHANCE = ("seed", "batch_size")  # facts of a protocol that decide which samples are drawn
MOST_NAMED = 3  # settings by which rows are told apart


def seed_groups(runs: Sequence[dict], metric: str = "") -> list[Group]:
    """Runs of the same settings together, each seed once; the groups in the order of their runs.

    A second run with a seed, for example one of another commit, is in a group of its own.

    metric: the one that the groups are to show; runs that measured it in other ways are apart.
    """
    groups: list[Group] = []
    by_settings: dict[str, list[Group]] = {}
    for run in sorted(runs, key=run_name):
        key = settings_key(run) + protocol_key(run, metric)
        same_settings = by_settings.setdefault(key, [])
        group = next((group for group in same_settings if run["seed"] not in seeds(group)), None)
        if group is None:
            group = []
            same_settings.append(group)
            groups.append(group)
        group.append(run)
    return [sorted(group, key=lambda run: (run["seed"] is None, run["seed"])) for group in groups]


def seeds(group: Group) -> list[int | None]:
    """The seeds of a group's runs."""
    return [run["seed"] for run in group]


def settings_key(run: dict) -> str:
    """A text that is the same for runs of the same experiment, settings, precision and data.

    Runs that started from other trained weights have other settings.
    """
    parts = [run["experiment"], run["precision"], run.get("data"), run.get("init_from")]
    return json.dumps([*parts, dict(settings(run))], sort_keys=True)


def protocol_key(run: dict, metric: str) -> str:
    """A text that is the same for runs that measured a metric in the same way, but by chance."""
    recorded = (run.get("protocol") or {}).get(metric) or {}
    facts = {fact: value for fact, value in recorded.items() if fact not in OF_CHANCE}
    return json.dumps(facts, sort_keys=True)


def settings(run: dict) -> Iterator[tuple[str, Any]]:
    """The settings of a run that have a part in its numbers, such as `flow.depth` and its value."""
    yield from leaves(run["config"] or {})


def leaves(section: dict, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values in a config by their keys, in the keys' order."""
    for key in sorted(section.keys() - NO_PART.get(path, set())):
        value = section[key]
        name = f"{path}.{key}".removeprefix(".")
        if isinstance(value, dict):
            yield from leaves(value, name)
        else:
            yield name, value


# Order


def rank(group: Group, direction: str, values: list[Any]) -> tuple[float, str]:
    """What sorts groups: the best mean comes first, groups without a number come last.

    direction: "lower" or "higher", whichever is better. values: of the runs.
    """
    numbers = finite(values)
    loss = float("inf")
    if numbers:
        loss = {"lower": 1, "higher": -1}[direction] * statistics.fmean(numbers)
    return loss, run_name(group[0])


def rank_without_claim(group: Group) -> tuple:
    """What sorts groups that no claim belongs to: by experiment, data and metric, then the best.

    The metric is that of the curve, of the test or, without one, of the validation.
    """
    run = group[0]
    metric = run.get("metric") or {}
    name = metric.get("name") or metric_name(run.get("curve") or [])
    keys = [f"test/{name}", f"val/{name}"]
    key = next((key for key in keys if key in run["metrics"]), name)
    values = [run["metrics"].get(key) for run in group]
    best_first = rank(group, metric.get("direction", "lower"), values)
    return run["experiment"], tested_data(run), fingerprint(run), key, *best_first


# Comparison


def comparison_of(group: Group, comparisons: list[dict], claim: dict) -> dict:
    """The comparison of a group's mean with a claim: its `metric`, `gap` and `status`.

    comparisons: those of the runs with the claim (`results.compare_all`).

    The gap is the mean of the runs' gaps. A group with a run that is not finite is not
    `reproduced`, and one with a run of another protocol has that run's status. The budget that
    counts is the smallest.
    """
    first = comparisons[0]
    if len(group) == 1 or {c["status"] for c in comparisons} <= {"-", "not measured"}:
        return first
    other = next((c for c in comparisons if c["status"] == "other protocol"), None)
    if other is not None:
        return other
    gaps = finite([c["gap"] for c in comparisons])
    gap = None
    if gaps:
        gap = statistics.fmean(gaps)
    judged = gap
    if len(gaps) < len(group):
        judged = None
    least = min(group, key=fraction)
    return first | {"gap": gap, "status": status_of(judged, claim, least["budget"] or {})}


def fraction(run: dict) -> float:
    """The share of the budget that a run had; 0 where it is unknown."""
    share = (run["budget"] or {}).get("fraction")
    if is_number(share):
        return share
    return 0.0


# Cells


def measured(group: Group, key: str, decimals: int = 3) -> str:
    """A metric of a group: the number of one run, else mean ± standard error over n seeds.

    Runs that did not measure the metric are left out. Figures that were measured in different ways
    have no mean.
    """
    runs = [run for run in group if key in run["metrics"]]
    if not runs:
        return "-"
    if len({protocol_key(run, key) for run in runs}) > 1:
        return "measured in different ways"
    text = averaged([run["metrics"][key] for run in runs], decimals)
    if len(runs) < len(group):
        text += f" ({len(runs)} of {len(group)} runs)"
    return text


def metrics_of(group: Group) -> str:
    """The main metrics of a group with their values."""
    keys = dict.fromkeys(key for run in group for key in main_metrics(run))
    return ", ".join(f"{key} {measured(group, key)}" for key in keys)


def budget_of(group: Group) -> str:
    """The budgets of a group's runs: one if they are equal, else the least to the greatest."""
    by_images = sorted(group, key=lambda run: run["images"])
    return distinct([budget(by_images[0]), budget(by_images[-1])], " to ")


def seconds_of(group: Group) -> str:
    """The wall times of a group's runs, from the least to the greatest."""
    by_time = sorted(run["seconds"] for run in group)
    return distinct([wall_time(by_time[0]), wall_time(by_time[-1])], " to ")


def seeds_of(group: Group) -> str:
    """The seeds of a group: `0, 1, 2`."""
    return ", ".join(cell_text(seed) for seed in seeds(group))


def weights_of(group: Group) -> str | None:
    """The call that loads the weights of a group's first run that has some; None without any."""
    return next((load_call(run) for run in group if run.get("weights")), None)


def load_call(run: dict) -> str:
    """The call of `reproduce.load` that loads a run's weights, or the command that uses them.

    >>> load_call({"experiment": "a", "run": "b", "config": {"data": {"name": "cifar10"}}})
    'load("a/b")'
    """
    if enlarges(run):
        return f"python -m reproduce.upscale {run_name(run)} image.png"
    return f'load("{run_name(run)}")'


def enlarges(run: dict) -> bool:
    """Whether a run trained a model that enlarges images."""
    return (run["config"].get("data") or {}).get("name") == SUPER_RESOLUTION


# What tells rows apart


def settings_cells(groups: Sequence[Group], visible: Sequence[str]) -> list[str]:
    """For each group its `chosen` settings and, where rows would look alike, those that differ.

    visible: what else tells the groups apart in their rows, such as experiment and data.
    """
    given = [chosen(group) for group in groups]
    cells = list(given)
    alike: dict[tuple[str, str], list[int]] = {}
    for k, row in enumerate(zip(visible, given, strict=True)):
        alike.setdefault(row, []).append(k)
    for places in alike.values():
        words = marks([groups[k] for k in places])
        for k, mark in zip(places, words, strict=True):
            cells[k] = f"{given[k]} {mark}".strip() or "-"
    return cells


def chosen(group: Group) -> str:
    """The preset of a group and the trained weights that it started from; empty without both."""
    words = [f"preset={run['preset']}" for run in group if run["preset"]]
    words += [f"init_from={run['init_from']['model']}" for run in group if run.get("init_from")]
    return distinct(words, " ")


def marks(alike: Sequence[Group]) -> list[str]:
    """For each of the groups that look alike, what tells it apart from the others.

    These are the settings that differ, MOST_NAMED of them at most. Where they do not suffice, the
    commits, the devices and at last the names of the runs are added.
    """
    facts = [facts_of(group) for group in alike]
    keys = [key for key in facts[0] if differ(facts, key)]
    words = [" ".join(f"{key}={fact[key]}" for key in keys[:MOST_NAMED]) for fact in facts]
    if len(keys) > MOST_NAMED:
        words = [f"{word} …" for word in words]
    for origin in (commits_of, devices_of, names_of):
        origins = [origin(group) for group in alike]
        if len(set(words)) < len(words) and len(set(origins)) > 1:
            words = [f"{word} {text}".strip() for word, text in zip(words, origins, strict=True)]
    return words


def facts_of(group: Group) -> dict[str, str]:
    """The seeds, the precision, the images and all settings of a group as texts by their keys."""
    run = group[0]
    facts = {
        "seed": ",".join(map(cell_text, seeds(group))),
        "trainer.precision": run["precision"],
        "data.sha256": fingerprint(run),
    }
    return facts | {key: as_text(value) for key, value in settings(run) if key not in facts}


def differ(facts: Sequence[dict[str, str]], key: str) -> bool:
    """Whether a setting is known of all groups and is not the same in all of them."""
    return all(key in fact for fact in facts) and len({fact[key] for fact in facts}) > 1


def as_text(value: Any) -> str:
    """A value as it is given on the command line: `true`, `[0.9,0.99]`."""
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"))


def commits_of(group: Group) -> str:
    """The commits of a group's runs."""
    return distinct([f"commit {commit(run)}" for run in group], " and ")


def devices_of(group: Group) -> str:
    """The devices of a group's runs."""
    return distinct([machine_text(run["device"]) for run in group], " and ")


def names_of(group: Group) -> str:
    """The names of a group's runs."""
    return distinct([run["run"] for run in group], " and ")
