"""The runs of a sweep, read from their folders into one Markdown table with the best marked."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from results import ROOT
from results.blocks import Block, Bullets, Paragraph, Table, markdown
from results.curves import metric_name
from results.files import abbreviated
from results.formats import cell_text, distinct, tested_data
from results.groups import (
    Group,
    budget_of,
    differ,
    facts_of,
    measured,
    rank,
    seconds_of,
    seed_groups,
    seeds_of,
)
from results.runs import beside_papers, read_curve, read_json

RESULT = "result.json"
# What a run folder has, once it is finished, once it has begun, or once it has diverged.
OF_A_RUN = (RESULT, "curve.csv", "diverged.json")
DEPTH = 2  # folders between one that is given and a run's: outputs/<experiment>/<run>


def render(folders: Sequence[str], root: Path = ROOT) -> str:
    """The table of the runs in some folders, as Markdown.

    Runs that differ in their seed alone are one row. There is a table for each experiment and data
    set. Its rows are sorted by the metric of the validation, and the first one is bold. Settings
    that differ are columns. Runs that have not finished are listed below.

    Args:
        folders: of runs (outputs/<experiment>/<run>), or folders of such.
        root: the results folder, with the papers' claims.

    Raises:
        ValueError: one line; a folder has no run, or a result cannot be read.
    """
    paths = list(dict.fromkeys(path for folder in folders for path in runs_below(folder)))
    finished = []
    unfinished = []
    for path in paths:
        if (path / RESULT).is_file():
            finished.append(read_run(path, root))
        else:
            unfinished.append(progress_of(path))
    families: dict[tuple[str, str, str, str], list[dict]] = {}
    for run in finished:
        families.setdefault(family_of(run), []).append(run)
    blocks: list[Block] = []
    for family in sorted(families):
        blocks += family_table(families[family])
    if unfinished:
        blocks += [Paragraph("Not finished:"), Bullets(unfinished)]
    return "\n".join(markdown(blocks)).rstrip("\n")


def runs_below(folder: str | Path, depth: int = DEPTH) -> list[Path]:
    """The folders of runs in a folder, which may be one itself. ValueError: there are none."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"no folder {folder}: give run folders, outputs/<experiment>/<run>")
    found = list(walk(path, depth))
    if not found:
        raise ValueError(
            f"{folder} holds no runs: give run folders, outputs/<experiment>/<run>, or a folder of "
            "them"
        )
    return found


def walk(path: Path, depth: int) -> Iterator[Path]:
    """The folders of runs, sorted by name; nothing inside of a run's folder is one."""
    if any((path / name).is_file() for name in OF_A_RUN):
        yield path
    elif depth > 0:
        for child in sorted(path.iterdir()):
            if child.is_dir():
                yield from walk(child, depth - 1)


def read_run(folder: Path, root: Path) -> dict:
    """The result of a finished run, compared with its claims. ValueError: it cannot be read."""
    path = folder / RESULT
    result = read_json(path)
    metric = result.get("metric") or {}
    name = metric.get("name") or metric_name(read_curve(folder / "curve.csv"))
    known = {"direction": metric.get("direction", "lower"), "unit": metric.get("unit", "")}
    return beside_papers(result, path, root) | {"metric": {"name": name, **known}}


def progress_of(folder: Path) -> str:
    """How far a run has come that has not finished, as a text."""
    if (folder / "diverged.json").is_file():
        return f"`{folder.name}` diverged"
    rows = read_curve(folder / "curve.csv")
    step = max((row.get("step") or 0 for row in rows), default=0)
    text = f"`{folder.name}` is at step {step:,}"
    key = f"val/{metric_name(rows)}"
    values = [row[key] for row in rows if row.get(key) is not None]
    if values:
        text += f", {key} {values[-1]:.4f}"
    return text


def family_of(run: dict) -> tuple[str, str, str, str]:
    """What runs of one table share: experiment, data, the metric and its direction."""
    return run["experiment"], tested_data(run), run["metric"]["name"], run["metric"]["direction"]


def family_table(runs: Sequence[dict]) -> list[Block]:
    """The table of runs whose metrics can be compared, with a line above it."""
    experiment, data, name, direction = family_of(runs[0])
    key = f"val/{name}"
    groups = seed_groups(runs)
    groups.sort(key=lambda group: rank(group, direction, values_of(group, key)))
    settings = settings_of(groups)
    figures = [key, *tested_metrics(runs)]
    columns = [*settings, "seeds", *figures, "budget", "time", "status", "runs"]
    facts = [facts_of(group) for group in groups]
    rows = [
        [
            *(fact[setting] for setting in settings),
            seeds_of(group),
            *(measured(group, figure, 4) for figure in figures),
            budget_of(group),
            seconds_of(group),
            distinct([run["status"] for run in group], ", "),
            abbreviated([run["run"] for run in group], 5),
        ]
        for group, fact in zip(groups, facts, strict=True)
    ]
    if rank(groups[0], direction, values_of(groups[0], key))[0] < float("inf"):
        rows[0] = [bold(cell) for cell in rows[0]]
    sentence = f"**{experiment}** on {data}, by `{key}`, of which {direction} is better"
    return [Paragraph(f"{sentence}:"), Table(columns, rows)]


def settings_of(groups: Sequence[Group]) -> list[str]:
    """The settings in which groups differ, without the seed, which has a column of its own."""
    facts = [facts_of(group) for group in groups]
    return [key for key in facts[0] if key != "seed" and differ(facts, key)]


def tested_metrics(runs: Sequence[dict]) -> list[str]:
    """The metrics of the test that any of the runs has, sorted."""
    return sorted({key for run in runs for key in run["metrics"] if key.startswith("test/")})


def values_of(group: Group, key: str) -> list[object]:
    """A metric of the runs of a group; None where a run lacks it."""
    return [run["metrics"].get(key) for run in group]


def bold(cell: object) -> str:
    """A cell of the best row.

    >>> bold(0.5), bold("")
    ('**0.5**', '')
    """
    text = cell_text(cell)
    if text:
        return f"**{text}**"
    return text
