"""Rows of a sweep file with `method: grid`, for SLURM arrays.

reproduce/slurm.sh hands the row of a task's index to the script.

# how many rows, for sbatch --array=0-N
python -m reproduce.grid configs/sweeps/realnvp_cifar10_grid.yaml
# the key=value words of row 3, one on each line
python -m reproduce.grid configs/sweeps/realnvp_cifar10_grid.yaml 3
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reproduce.config import ConfigError, arguments, read
from reproduce.kinds import argument_text


def rows(path: Path) -> list[dict[str, object]]:
    """Every combination of the values. Parameters are sorted by name; the last one varies fastest.

    Values are texts as the file writes them, or lists of texts. ConfigError: the file is not a
    sweep file with `method: grid`.
    """
    from sklearn.model_selection import ParameterGrid

    if not path.is_file():
        raise ConfigError(f"{path} is no file: give a sweep file with method: grid")
    sweep = read(path)
    if not isinstance(sweep, dict) or sweep.get("method") != "grid":
        raise ConfigError(f"{path} is no grid: an array needs a sweep file with method: grid")
    parameters = sweep.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        raise ConfigError(
            f"{path} has no parameters: give parameters: {{optim.lr: {{values: [...]}}}}"
        )
    return list(
        ParameterGrid({key: _values(path, key, parameter) for key, parameter in parameters.items()})
    )


def _values(path: Path, key: str, parameter: object) -> list:
    """The values of one parameter of a W&B sweep. ConfigError: the parameter lists no values."""
    values: object = None
    if isinstance(parameter, dict):
        values = [parameter["value"]] if "value" in parameter else parameter.get("values")
    if not isinstance(values, list) or not values or any(isinstance(v, dict) for v in values):
        raise ConfigError(
            f"{key} in {path} is no list of values: a grid needs values: [...] or value: ..."
        )
    return values


def words(row: dict[str, object]) -> list[str]:
    """A row as key=value, the way the scripts read it."""
    return [f"{key}={argument_text(value)}" for key, value in row.items()]


def main(argv: list[str] | None = None) -> None:
    """Print one row, or the number of rows; one line and exit code 1 for a user's mistake."""
    command_line = arguments(argv)
    if {"--help", "-h"} & set(command_line):
        print(__doc__)
        return
    file, *numbers = command_line or [""]
    try:
        print(answer(file, numbers))
    except ConfigError as error:
        sys.exit(f"error: {error}")


def answer(file: str, numbers: list[str]) -> str:
    """The text that `main` prints for a sweep file and, if given, the number of a row."""
    are_numbers = all(number.isdecimal() and len(number) < 10 for number in numbers)
    if not file or len(numbers) > 1 or not are_numbers:
        raise ConfigError("give the sweep file, and for one of its rows a number from 0")
    table = rows(Path(file))
    if not numbers:
        return str(len(table))
    index = int(numbers[0])
    if index >= len(table):
        raise ConfigError(
            f"{file} has {len(table)} rows, none with number {index}: --array=0-{len(table) - 1}"
        )
    return "\n".join(words(table[index]))


if __name__ == "__main__":
    main()
