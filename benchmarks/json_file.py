"""The option --json, which all benchmarks have."""

from pathlib import Path

from reproduce.config import ConfigError


def take_json(words: list[str]) -> tuple[Path | None, list[str]]:
    """Split arguments into the file of `--json FILE` (or None) and the other words.

    ConfigError: `--json` without a file.
    """
    if "--json" not in words:
        return None, words
    place = words.index("--json")
    if not "".join(words[place + 1 : place + 2]):
        raise ConfigError("--json needs a file: give for example --json rows.json")
    return Path(words[place + 1]), words[:place] + words[place + 2 :]
