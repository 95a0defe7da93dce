"""The section beside the papers: every claim with its runs, also those that nobody has run yet."""

from collections import Counter

from results import STATUSES, own_decimals, printed, recipe_of
from results.blocks import Block, Bullets, Drawing, Fold, Heading, Paragraph, Table, anchor
from results.formats import (
    commit,
    distinct,
    fixed,
    main_metrics,
    run_name,
    tested_data,
)
from results.groups import (
    Group,
    budget_of,
    devices_of,
    measured,
    metrics_of,
    seconds_of,
)
from results.metrics import KINDS, kind_of
from results.progress import progress
from results.reading import Beside, Records, beside, groups_without_claim, words_without_claim
from results.reimplementations import published

TITLE = "Beside the papers"
NOT_STARTED = "Papers that nobody has started"
NOT_STARTED_WORDS = "There is neither a recipe nor a run for any of their claims yet."
OTHERS = "Runs without a paper's number"
MACHINE = ["budget", "hardware", "time", "commit"]
# The status and the numbers come first: a phone shows no more than these without scrolling.
COLUMNS = ["experiment", "status", "paper", "ours", "gap", "data", "metric", *MACHINE, "note"]
OTHER_COLUMNS = ["experiment", "data", "metrics", *MACHINE]
TO_DO = ["paper's row", "data", "metric", "paper", "status"]
WORDS = """Gap: our number minus the paper's. Budget: the images that a run was trained on, as a
share of those of a full training; in brackets who set that number, the paper or, where it gives
none, we. Re-estimated: before the test, batch-norm statistics were estimated anew on
`eval.bn_images` training images. Runs that differ in their seed alone are one row: mean ± standard
error over n seeds, with the status of the mean. Of several rows of a claim the best comes first."""


def statuses() -> Table:
    """What the words of the column `status` mean."""
    rows = [[word, text] for word, text in STATUSES.items() if word != "-"]
    return Table(["status", "meaning"], rows)


def summary(records: Records) -> dict[str, int]:
    """How many claims have which status, by their best run; in the order of STATUSES."""
    counts = Counter(status_of(claim, records) for claim in records.claims.values())
    return {status: counts[status] for status in STATUSES if counts[status]}


def status_of(claim: dict, records: Records) -> str:
    """The status of a claim's best run; `not run` without any."""
    rows = beside(claim, records.runs)
    if rows:
        return rows[0].comparison["status"]
    return "not run"


def section(records: Records) -> list[Block]:
    """For each paper a table of its claims, a chart of the runs, and what is left to do."""
    words = Fold("How to read the tables", [statuses(), Paragraph(WORDS)])
    blocks: list[Block] = [Heading(TITLE), words]
    started, others = papers_by_state(records)
    for title, claims in started.items():
        blocks += paper_blocks(title, claims, records)
    if others:
        blocks += [Heading(NOT_STARTED, 3), Paragraph(NOT_STARTED_WORDS)]
    blocks += [
        to_do(f"{title}: {claims_in_words(claims)}", claims) for title, claims in others.items()
    ]
    return [*blocks, *others_section(records)]


def papers_by_state(records: Records) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """The claims by the title of their paper: of papers with a run or a recipe, and of the others.

    Papers with a run come first.
    """
    papers = {
        paper["title"]: claims_of_paper(stem, records) for stem, paper in records.papers.items()
    }
    started = {
        title: claims
        for title, claims in papers.items()
        if any(claim_rows(claim, records) for claim in claims)
    }
    by_runs = sorted(started, key=lambda title: not has_run(started[title], records))
    others = {title: claims for title, claims in papers.items() if claims and title not in started}
    return {title: started[title] for title in by_runs}, others


def has_run(claims: list[dict], records: Records) -> bool:
    """Whether there is a run beside one of some claims."""
    return any(beside(claim, records.runs) for claim in claims)


def claims_in_words(claims: list[dict]) -> str:
    """`1 claim` or `34 claims`."""
    if len(claims) == 1:
        return "1 claim"
    return f"{len(claims)} claims"


def to_do(title: str, claims: list[dict]) -> Fold:
    """Claims without a run and without a recipe, behind a title."""
    return Fold(title, [Table(TO_DO, [to_do_row(claim) for claim in claims])])


def claims_of_paper(stem: str, records: Records) -> list[dict]:
    """The claims in one file of results/paper/."""
    return [claim for name, claim in records.claims.items() if name.partition(".")[0] == stem]


def paper_blocks(title: str, claims: list[dict], records: Records) -> list[Block]:
    """The claims of one paper: those with a run or a recipe in a table, the others in a fold."""
    rows = [row for claim in claims for row in claim_rows(claim, records)]
    left = [claim for claim in claims if not claim_rows(claim, records)]
    blocks: list[Block] = [Heading(title, 3), Table(COLUMNS, rows)]
    blocks += kinds_of([claim["metric"] for claim in claims if claim not in left])
    blocks += [chart for claim in claims for chart in charts(claim, records)]
    if left:
        blocks.append(to_do(f"To do: {claims_in_words(left)} of this paper without a recipe", left))
    return blocks


def claim_rows(claim: dict, records: Records) -> list[list[str]]:
    """The rows of a claim: one for each group of runs or, without any run, one for its recipe."""
    metric, paper = paper_cells(claim)
    what = [claim["dataset"], metric]
    rows = []
    for row in beside(claim, records.runs):
        name = experiment_cell(row.group, row.settings)
        *figures, status = figure_cells(row, claim)
        cells = [*machine_cells(row.group), note(row)]
        rows.append([name, status, paper, *figures, *what, *cells])
    recipe = recipe_of(claim)
    if not rows and records.has_recipe(recipe):
        rows = [[recipe, "not run", paper, "-", "-", *what, *["-"] * len(MACHINE), "-"]]
    return rows


def to_do_row(claim: dict) -> list[str]:
    """The cells of TO_DO for a claim without a run and without a recipe."""
    return [f"{claim['table']}, {claim['row']}", claim["dataset"], *paper_cells(claim), "not run"]


def charts(claim: dict, records: Records) -> list[Block]:
    """The chart of all runs of a claim over images seen, if any of them has a curve."""
    runs = [run for row in beside(claim, records.runs) for run in row.group]
    points = published(claim["id"], records.root, records.new)
    picture = progress(runs, claim, points)
    if picture is None:
        return []
    caption = (
        f"{claim['dataset']}: validation during training over images seen (logarithmic), "
        f"beside the paper's {claim['metric']}"
    )
    if points:
        caption += "; diamonds: what other implementations state, which is not compared"
    return [Drawing(picture, caption)]


def others_section(records: Records) -> list[Block]:
    """The table of runs that are compared with no paper's number."""
    groups = groups_without_claim(records.runs)
    rows = [
        [
            experiment_cell(group, words),
            tested_data(group[0]),
            metrics_of(group),
            *machine_cells(group),
        ]
        for group, words in zip(groups, words_without_claim(groups), strict=True)
    ]
    keys = [key for group in groups for run in group for key in main_metrics(run)]
    return [Heading(OTHERS), Table(OTHER_COLUMNS, rows, "None yet."), *kinds_of(keys)]


def kinds_of(keys: list[str]) -> list[Block]:
    """What the kinds of figures in a table are, except for exact ones; empty without others."""
    items = []
    for kind, meaning in KINDS.items():
        names = sorted({f"`{key}`" for key in keys if kind_of(key) == kind})
        if names and kind != "exact":
            items.append(f"{', '.join(names)}: {meaning}.")
    if items:
        return [Bullets(items)]
    return []


# Cells


def experiment_cell(group: Group, settings: str, page: str = "") -> str:
    """The experiment, linked to the section of the group's first run, and its settings.

    page: the file of that section; empty for the page itself.
    """
    link = f"[{group[0]['experiment']}]({page}#{anchor(run_name(group[0]))})"
    if settings == "-":
        return link
    return f"{link} {settings}"


def paper_cells(claim: dict) -> list[str]:
    """The cells `metric` and `paper`."""
    return [claim["metric"], printed(claim["value"], claim)]


def figure_cells(row: Beside, claim: dict) -> list[str]:
    """The cells `ours`, `gap` and `status`."""
    key = row.comparison["metric"]
    decimals = own_decimals(claim)
    ours = measured(row.group, key, decimals)
    again = measured(row.group, f"{key}_reestimated", decimals)
    if again != "-":
        ours += f" (re-estimated {again})"
    gap = fixed(row.comparison["gap"], f"+.{decimals}f")
    return [ours, gap, row.comparison["status"]]


def machine_cells(group: Group) -> list[str]:
    """The cells of MACHINE."""
    commits = distinct(map(commit, group), " and ")
    return [budget_of(group), devices_of(group), seconds_of(group), commits]


def note(row: Beside) -> str:
    """What a reader has to know of a row: differences in protocol, reasons, suspects."""
    notes = list(row.comparison.get("differences") or [])
    if row.comparison.get("reason"):
        notes.append(row.comparison["reason"])
    notes += [f"suspect: {run['suspect']}" for run in row.group if run.get("suspect")]
    return distinct(notes, "; ") or "-"
