"""The option that the benchmarks share."""

from pathlib import Path

from reproduce.config import ConfigError


def take_json(words: list[str]) -> tuple[Path | None, list[str]]:
    """The file of `--json FILE`, None without, and the other words. ConfigError: no file is given."""
    if "--json" not in words:
        return None, words
    at = words.index("--json")
    if not "".join(words[at + 1 : at + 2]):
        raise ConfigError("--json needs a file: give for example --json rows.json")
    return Path(words[at + 1]), words[:at] + words[at + 2 :]
