"""`python -m results` writes results/README.md; `add RUN` and `figure3 FOLDER` take in what has finished first."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from results import ROOT, figure3
from results.page import write_page
from results.runs import add

USAGE = 'usage: python -m results [add outputs/<experiment>/<run> [suspect="..."] | figure3 outputs/figure3/<name>]'


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Exit code: 0 done, 1 one line on what is wrong, 2 usage."""
    take_in: Callable[[], list[str]]
    match sys.argv[1:] if argv is None else argv:
        case []:
            take_in = list
        case ["add", run]:
            take_in = partial(add, run, None, root)
        case ["add", run, option] if option.startswith("suspect="):
            take_in = partial(add, run, option.removeprefix("suspect="), root)
        case ["figure3" | "ablation", folder]:  # the second is what it was called before
            take_in = partial(figure3.add, folder, root)
        case _:
            print(USAGE, file=sys.stderr)
            return 2
    if root == ROOT and not (ROOT / "runs").is_dir():  # a package has the claims, not the runs
        print(
            f"error: {ROOT} is an installed copy without recorded runs: run this in a clone",
            file=sys.stderr,
        )
        return 1
    try:
        for line in take_in():
            print(line)
        print(f"wrote {write_page(root)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
