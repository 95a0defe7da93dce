"""Rows of a sweep file with `method: grid`, for SLURM arrays: reproduce/slurm.sh hands row INDEX to the script.

python -m reproduce.grid configs/sweeps/realnvp_cifar10_grid.yaml        # how many rows, for sbatch --array=0-N
python -m reproduce.grid configs/sweeps/realnvp_cifar10_grid.yaml 3      # the key=value words of row 3, one a line
"""

import sys

sys.path.insert(0, sys.path[0].removesuffix("reproduce"))  # this clone's code, not an install's

import json
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from reproduce.config import ConfigError, arguments, read


def rows(path: Path) -> list[dict]:
    """Every combination of the values, parameters sorted by name, the last varying fastest. ConfigError: no grid."""
    from sklearn.model_selection import ParameterGrid

    if not path.is_file():
        raise ConfigError(f"{path} is no file: give a sweep file with method: grid")
    sweep = read(path)
    if not isinstance(sweep, DictConfig) or sweep.get("method") != "grid":
        raise ConfigError(f"{path} is no grid: an array needs a sweep file with method: grid")
    if not isinstance(parameters := sweep.get("parameters"), DictConfig) or not parameters:
        raise ConfigError(
            f"{path} has no parameters: give parameters: {{optim.lr: {{values: [...]}}}}"
        )
    return list(
        ParameterGrid({key: _values(path, key, parameter) for key, parameter in parameters.items()})
    )


def _values(path: Path, key: str, parameter) -> list:
    """The values of one parameter of a W&B sweep, as plain Python objects."""
    if isinstance(parameter, DictConfig) and "value" in parameter:
        return [OmegaConf.to_container(parameter)["value"]]
    if (
        isinstance(parameter, DictConfig)
        and isinstance(parameter.get("values"), ListConfig)
        and parameter["values"]
    ):
        return OmegaConf.to_container(parameter)["values"]
    raise ConfigError(
        f"{key} in {path} is no list of values: a grid needs values: [...] or value: ..."
    )


def words(row: dict) -> list[str]:
    """A row as key=value, the way the scripts read it."""
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in row.items()
    ]


def main(argv: list[str] | None = None) -> None:
    """Print the row, or how many there are; one line and exit code 1 for a user's mistake."""
    file, *numbers = arguments(argv) or [""]
    try:
        if not file or len(numbers) > 1 or not all(number.isdecimal() for number in numbers):
            raise ConfigError("give the sweep file, and for one of its rows a number from 0")
        table = rows(Path(file))
        if not numbers:
            print(len(table))
        elif (index := int(numbers[0])) < len(table):
            print("\n".join(words(table[index])))
        else:
            raise ConfigError(
                f"{file} has {len(table)} rows, none with number {index}: --array=0-{len(table) - 1}"
            )
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
