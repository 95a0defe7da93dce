"""`python -m results` writes results/README.md, results/index.html and the table in README.md.

`python -m results add RUN` first records a finished run, and `python -m results figure3 FOLDER` a
finished repetition of Glow's Figure 3. `python -m results table FOLDER...` writes nothing. It
prints one Markdown table of the runs in some folders, such as those of a sweep, with the best bold.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from results import ROOT, figure3, runs, sweep_table
from results.files import Addition, write_all
from results.page import render

USAGE = (
    "usage: python -m results "
    '[add outputs/<experiment>/<run> [suspect="..."] | figure3 outputs/figure3/<name> '
    "| table FOLDER...]"
)


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Run a command.

    Returns the exit code: 0 if it succeeded; 1 after one line on what is wrong, if nothing was
    written; 2 after a line on how it is called.
    """
    if argv is None:
        argv = sys.argv[1:]
    if {"--help", "-h"} & set(argv):
        print(f"{(__doc__ or '').strip()}\n\n{USAGE}")
        return 0
    if argv[:1] == ["table"] and len(argv) > 1:
        return print_table(argv[1:], root)
    make_addition: Callable[[], Addition]
    match argv:
        case []:
            make_addition = Addition
        case ["add", run]:
            make_addition = partial(runs.add, run, None, root)
        case ["add", run, option] if option.startswith("suspect="):
            make_addition = partial(runs.add, run, option.removeprefix("suspect="), root)
        case ["figure3" | "ablation", folder]:  # `ablation` is the older name
            make_addition = partial(figure3.add, folder, root)
        case _:
            complain(USAGE)
            return 2
    if root == ROOT and not (ROOT / "runs").is_dir():  # an installed copy has claims, but no runs
        complain(f"error: {ROOT} is an installed copy without recorded runs: run this in a clone")
        return 1
    try:
        addition = make_addition()
        write_all({**addition.files, **render(root, addition.files)})
    except (ValueError, OSError) as error:
        complain(f"error: {' '.join(str(error).split())}")
        return 1
    for line in addition.lines:
        print(line)
    print(f"wrote {Path(root) / 'README.md'} and {Path(root) / 'index.html'}")
    return 0


def print_table(folders: list[str], root: Path) -> int:
    """Print the table of the runs in some folders; returns the exit code."""
    try:
        text = sweep_table.render(folders, root)
    except (ValueError, OSError) as error:
        complain(f"error: {' '.join(str(error).split())}")
        return 1
    print(text)
    return 0


def complain(line: str) -> None:
    """Print a line to standard error, or to standard output if a shell closed it (`2>&-`)."""
    print(line, file=sys.stderr or sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
