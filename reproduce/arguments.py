"""The arguments of commands that start several runs: seeds, and settings that all runs share."""

from collections.abc import Collection

from reproduce.config import ConfigError
from reproduce.kinds import guess, unquoted
from reproduce.run_folder import FREE


def parse_seeds(text: str) -> list[int]:
    """Read `[0,1,2]`, `0,1,2` or `0` as a list of seeds.

    ConfigError: the text has another form, or a seed comes twice.
    """
    words = text.removeprefix("[").removesuffix("]").split(",")
    seeds = [int(word) for word in words if word.strip().isdecimal()]
    if len(seeds) < len(words) or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"seeds={text} are no seeds: give different integers from 0, as seeds=[0,1,2]"
        )
    return seeds


def settings(overrides: list[str], own: Collection[str]) -> dict[str, object]:
    """The key=value arguments that decide the numbers of a command's runs, as keys and values.

    The keys in `own` are left out, which the command decides for each run, and so are those that
    change no number (loggers, folders, workers).
    """
    values: dict[str, object] = {}
    for word in overrides:
        key, _, text = word.partition("=")
        is_free = key in own or key.startswith("logger.") or key.split(".")[-1] in FREE
        if not is_free:
            values[key] = guess(unquoted(text))
    return values
