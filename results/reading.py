"""What the results page is made from: the claims, the recorded runs, and who stands beside whom."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from results import ROOT, load_claims, load_papers
from results.files import NO_FILES
from results.formats import run_name, tested_data
from results.groups import (
    Group,
    comparison_of,
    rank,
    rank_without_claim,
    seed_groups,
    settings_cells,
)
from results.runs import read_runs


@dataclass(frozen=True)
class Beside:
    """Runs that differ in their seed alone, beside a claim.

    comparison: of their mean with the claim (`results.groups.comparison_of`).
    settings: what tells the row of the group from the others of the claim, as text.
    """

    group: Group
    comparison: dict
    settings: str


@dataclass(frozen=True)
class Records:
    """Everything that is recorded in a results folder.

    root: the folder.
    new: the content of files that are not written to it yet, by their path.
    claims: by their id. papers: by the stem of their file. runs: see `results.runs.read_runs`.
    """

    root: Path
    new: Mapping[Path, bytes]
    claims: dict[str, dict]
    papers: dict[str, dict]
    runs: list[dict]

    def has(self, name: str) -> bool:
        """Whether there is a file of this path, written or not."""
        path = self.root / name
        return path in self.new or path.is_file()

    def has_recipe(self, experiment: str) -> bool:
        """Whether configs/ beside the results folder has the recipe of an experiment."""
        return (self.root.parent / "configs" / f"{experiment}.yaml").is_file()


def read(root: Path = ROOT, new: Mapping[Path, bytes] = NO_FILES) -> Records:
    """Read a results folder, with files that are not written to it yet.

    ValueError, one line: a claim or a run cannot be read.
    """
    root = Path(root)
    return Records(root, new, load_claims(root), load_papers(root), read_runs(root, new))


def counted_comparisons(run: dict) -> list[dict]:
    """The comparisons that have a status. A run on other data than the claim's has none."""
    return [comparison for comparison in run["comparisons"] if comparison["status"] != "-"]


def claims_of(run: dict, claims: dict) -> list[dict]:
    """The claims with which a run is compared."""
    return [claims[comparison["claim"]] for comparison in counted_comparisons(run)]


def beside(claim: dict, runs: Sequence[dict]) -> list[Beside]:
    """The runs that are compared with a claim, by seeds.

    The best group comes first, groups without a number come last; equal ones are sorted by name.
    """
    by_run = {
        run_name(run): comparison
        for run in runs
        for comparison in counted_comparisons(run)
        if comparison["claim"] == claim["id"]
    }
    pairs = []
    for group in seed_groups([run for run in runs if run_name(run) in by_run], claim["metric"]):
        comparisons = [by_run[run_name(run)] for run in group]
        pairs.append((group, comparison_of(group, comparisons, claim)))
    pairs.sort(key=lambda pair: rank(pair[0], claim["direction"], [pair[1]["gap"]]))
    groups = [group for group, _ in pairs]
    words = settings_cells(groups, [group[0]["experiment"] for group in groups])
    return [Beside(*pair, cell) for pair, cell in zip(pairs, words, strict=True)]


def groups_without_claim(runs: Sequence[dict]) -> list[Group]:
    """The runs that are compared with no claim, by seeds; the best group comes first."""
    others = [run for run in runs if not counted_comparisons(run)]
    return sorted(seed_groups(others), key=rank_without_claim)


def words_without_claim(groups: list[Group]) -> list[str]:
    """The settings that the rows of groups without a claim show."""
    return settings_cells(groups, [f"{g[0]['experiment']} {tested_data(g[0])}" for g in groups])


def ordered_runs(runs: Sequence[dict], claims: dict) -> list[dict]:
    """Every run once, in the order of the tables."""
    groups = [row.group for claim in claims.values() for row in beside(claim, runs)]
    groups += groups_without_claim(runs)
    return list({run_name(run): run for group in groups for run in group}.values())
