"""What commands with several runs share: their seeds, and the settings that all runs have."""

from collections.abc import Collection

from reproduce.config import ConfigError
from reproduce.kinds import guess, unquoted
from reproduce.run_folder import FREE


def parse_seeds(text: str) -> list[int]:
    """`[0,1,2]`, `0,1,2` or `0` as a list. ConfigError: something else, or a seed twice."""
    words = text.removeprefix("[").removesuffix("]").split(",")
    seeds = [int(word) for word in words if word.strip().isdecimal()]
    if len(seeds) < len(words) or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"seeds={text} are no seeds: give different integers from 0, as seeds=[0,1,2]"
        )
    return seeds


def settings(overrides: list[str], own: Collection[str]) -> dict[str, object]:
    """key=value arguments as keys and values.

    Left out are the keys of `own`, in which the runs of a command differ, and those that change no
    number.
    """
    values: dict[str, object] = {}
    for word in overrides:
        key, _, text = word.partition("=")
        is_free = key in own or key.startswith("logger.") or key.split(".")[-1] in FREE
        if not is_free:
            values[key] = guess(unquoted(text))
    return values
