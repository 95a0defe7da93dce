"""`python -m results` writes results/README.md; `python -m results add RUN` takes a finished run in first."""

import sys
from pathlib import Path

from results import ROOT
from results.page import write_page
from results.runs import add

USAGE = 'usage: python -m results [add outputs/<experiment>/<run> [suspect="..."]]'


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Exit code: 0 done, 1 one line on what is wrong, 2 usage."""
    command: tuple[str, str | None] | None
    match sys.argv[1:] if argv is None else argv:
        case []:
            command = None
        case ["add", run]:
            command = (run, None)
        case ["add", run, option] if option.startswith("suspect="):
            command = (run, option.removeprefix("suspect="))
        case _:
            print(USAGE, file=sys.stderr)
            return 2
    try:
        if command:
            for line in add(command[0], command[1], root):
                print(line)
        print(f"wrote {write_page(root)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
