"""How the results page writes numbers, machines and tables."""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from results import is_number
from results.checks import LARGEST
from results.protocol import SUPER_RESOLUTION


def fixed(value: object, form: str = ".3f") -> str:
    """A number in a fixed format; `-` for a missing or non-finite one."""
    if is_number(value):
        return format(value, form)
    return "-"


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, which is None for one value. ValueError: no values."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def plus_minus(mean: float, error: float | None, form: str = ".4f") -> str:
    """`3.5120 ± 0.0040`; without an error the mean alone."""
    if error is None:
        return format(mean, form)
    return f"{mean:{form}} ± {error:{form.removeprefix('+')}}"


def finite(values: Sequence[object]) -> list[float]:
    """The numbers among some values whose mean and error are finite, too."""
    return [value for value in values if is_number(value) and abs(value) < LARGEST]


def averaged(values: Sequence[object], decimals: int = 3) -> str:
    """One value as it is, several as mean ± standard error, with one decimal more, and their count.

    >>> averaged([3.5]), averaged([3.5, 3.6, None])
    ('3.500', '3.5500 ± 0.0500 (n=2, 1 not finite)')
    """
    numbers = finite(values)
    if not numbers or len(values) == 1:
        return fixed(values[0], f".{decimals}f")
    mean, error = mean_and_error(numbers)
    notes = [f"n={len(numbers)}"]
    if len(numbers) < len(values):
        notes.append(f"{len(values) - len(numbers)} not finite")
    return f"{plus_minus(mean, error, f'.{decimals + 1}f')} ({', '.join(notes)})"


def count(value: object) -> str:
    """A count in three digits: 12480000 -> `12.5 M`, 400000 -> `400 k`; `-` for None."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if is_number(value) and value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return fixed(value, ".3g")


def budget(run: dict) -> str:
    """The images of a run as a share of a full training's: `3.2 % of 12.5 M images (ours)`.

    Without a number for a full training: the number of images alone.
    """
    planned = run["budget"] or {"fraction": None}
    if not is_number(planned["fraction"]):
        return f"{count(run['images'])} images"
    share = percent(planned["fraction"])
    return f"{share} % of {count(planned['of'])} images ({planned['source']})"


def percent(fraction: float) -> str:
    """A share in per cent. From 10 on it is rounded down, so that only a whole is 100.

    >>> [percent(fraction) for fraction in (0.00123, 0.032, 0.999, 1)]
    ['0.12', '3.2', '99', '100']
    """
    value = 100 * fraction
    if value < 9.95:
        return f"{value:.2g}"
    return str(math.floor(value + 1e-9))


def wall_time(seconds: float) -> str:
    """Seconds as `12 s`, `20.6 min` or `5.3 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def commit(run: dict) -> str:
    """Seven characters of the commit, and `(dirty)` if the code differed from it."""
    short = (run["commit"] or "-")[:7]
    if run.get("dirty"):
        return f"{short} (dirty)"
    return short


def run_name(run: dict) -> str:
    """`<experiment>/<run>`, the path of the run's files below runs/, without a suffix."""
    return f"{run['experiment']}/{run['run']}"


def data_name(run: dict) -> str:
    """The data set's name, with the bits of its images where they are not 8: `cifar10, 5 bit`.

    A user's own images also have the name of their folder: `folder holidays`. Photographs for
    super-resolution have the folders for training and for the test.
    """
    data = run["config"].get("data") or {}
    name = str(data.get("name", "-"))
    if name == SUPER_RESOLUTION:
        return photographs_of(data)
    if fingerprint(run):
        name = f"{name} {Path(str(data.get('root') or '')).name}".strip()
    n_bits = data.get("n_bits", 8)
    if n_bits == 8:
        return name
    return f"{name}, {n_bits} bit"


def photographs_of(data: Mapping[str, Any]) -> str:
    """The photographs of a run of super-resolution, with the scale.

    data: the section of the run's config.

    >>> photographs_of({"root": ["data/sr/A/train", "b"], "test_root": "data/sr/A/val", "scale": 4})
    'photographs x4: A/train, b; test A/val'
    """
    text = f"photographs x{data.get('scale', 1)}"
    names = {key: folder_names(data.get(key)) for key in ("root", "test_root")}
    if names["root"]:
        text += f": {names['root']}"
    if names["test_root"]:
        text += f"; test {names['test_root']}"
    return text


def folder_names(roots: str | Sequence[str] | None) -> str:
    """Each of one or several folders by the last two parts of its path."""
    if roots is None:
        return ""
    paths = [roots] if isinstance(roots, str) else roots
    return ", ".join("/".join(Path(path).parts[-2:]) for path in paths)


def fingerprint(run: dict) -> str:
    """The start of the hash of a run's images, where they are a user's own; else empty."""
    return (run.get("data") or {}).get("sha256", "")[:12]


def tested_data(run: dict) -> str:
    """The data set's name as `data_name`, and whether only a part of its test images was used."""
    name = data_name(run)
    limit = (run["config"].get("trainer") or {}).get("limit_test_batches")
    if limit is None:
        return name
    return f"{name}, a part of the test"


def main_metrics(run: dict) -> list[str]:
    """The metrics that the tables show: those of the test, and those without a split.

    If a run has neither, those of the validation.
    """
    for prefix in ("test/", "val/", ""):
        names = [key for key in sorted(run["metrics"]) if key.startswith(prefix) or "/" not in key]
        if names:
            return names
    return []


def metrics(run: dict) -> str:
    """The main metrics of a run with their values."""
    return ", ".join(f"{key} {fixed(run['metrics'][key])}" for key in main_metrics(run))


def distinct(values: Iterable[str], separator: str) -> str:
    """Texts joined by a separator, each once, in the order of their first appearance."""
    return separator.join(dict.fromkeys(values))


def machine_text(device: str) -> str:
    """A recorded device as a reader would write it.

    >>> machine_text("AMD EPYC, 1 threads"), machine_text("AMD EPYC, 11 threads")
    ('AMD EPYC, 1 thread', 'AMD EPYC, 11 threads')
    """
    return re.sub(r"\b1 threads$", "1 thread", device)


def by_text(texts: Mapping[str, str]) -> dict[str, str]:
    """Texts that several keys may share, each once with its keys: text -> `a, b`.

    >>> by_text({"test/fid": "no weights", "test/kid": "no weights", "test/bpd": "stopped"})
    {'no weights': 'test/fid, test/kid', 'stopped': 'test/bpd'}
    """
    keys: dict[str, list[str]] = {}
    for key, text in texts.items():
        keys.setdefault(text, []).append(key)
    return {text: ", ".join(names) for text, names in keys.items()}


def span(values: list[str]) -> str:
    """The first and the last of some texts, `300 to 500`; only one if they are equal."""
    return distinct([values[0], values[-1]], " to ")


def table(columns: list[str], rows: list[list], empty: str = "") -> list[str]:
    """The lines of a Markdown table, or the line `empty` when it has no rows."""
    if not rows:
        return [empty, ""]
    cells = [[cell_text(cell) for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def cell_text(cell: object) -> str:
    """A cell on one line, with its bars escaped; `-` for None."""
    if cell is None:
        return "-"
    return " ".join(str(cell).split()).replace("|", "\\|")
