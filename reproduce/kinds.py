"""Kinds of settings. A kind reads the text of a value, and names the values that it accepts.

The key of a setting decides which kind reads its text; `reproduce.schema` has the table. The text
alone decides nothing: `20261127` is a folder for run_dir, but a number for seed.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

# A decimal number, without leading zeros or underscores; neither 0x10 nor nan nor inf.
DECIMAL = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
LARGEST = 2**63 - 1  # the largest int of 64 bits
LONGEST = 4000  # characters of a text; the longest path is about as long

WRONG_TYPE = "has the wrong type"
OUT_OF_RANGE = "is out of range"
UNKNOWN = "is not known"


class WrongValue(ValueError):
    """A value that a kind does not accept. The message continues a line that begins key=value."""


class Kind(ABC):
    """The kind of a setting: which texts it accepts, and which values they stand for."""

    @property
    @abstractmethod
    def example(self) -> str:
        """The text of a value that this kind accepts."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The kind in words, as in `give an int from 1`."""

    @abstractmethod
    def of_text(self, text: str) -> object:
        """The value that a text stands for. WrongValue: the kind does not accept the text."""

    def read(self, raw: object) -> object:
        """The value of `raw`: a text, or what a YAML file has for a key, also lists and dicts.

        WrongValue: the kind does not accept it.
        """
        if not isinstance(raw, str):
            raise WrongValue(WRONG_TYPE)
        return self.of_text(raw)


@dataclass(frozen=True)
class Integer(Kind):
    """A whole number, which may be written 1e5. It lies from low to high; None: no bound."""

    low: int | None = None
    high: int | None = None
    example: str = "8"

    @property
    def name(self) -> str:
        return f"an int{_bounds(self.low, self.high)}"

    def of_text(self, text: str) -> int:
        if DECIMAL.fullmatch(text) is None:
            raise WrongValue(WRONG_TYPE)
        if abs(float(text)) > LARGEST:
            raise WrongValue(OUT_OF_RANGE)
        if _vanishes(text):
            raise WrongValue(WRONG_TYPE)
        value = 0
        if float(text) != 0:
            number = Decimal(text)
            if number != number.to_integral_value():
                raise WrongValue(WRONG_TYPE)
            value = int(number)
        _check_bounds(value, self.low, self.high)
        return value


@dataclass(frozen=True)
class Number(Kind):
    """A finite number from low to high, greater than above and less than below; None: no bound."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    example: str = "0.5"

    @property
    def name(self) -> str:
        words = f"a float{_bounds(self.low, self.high)}"
        if self.above is not None:
            words += f" above {self.above:g}"
        if self.below is not None:
            words += f" below {self.below:g}"
        return words

    def of_text(self, text: str) -> float:
        if DECIMAL.fullmatch(text) is None:
            raise WrongValue(WRONG_TYPE)
        value = float(text)
        if _is_huge(text) or _vanishes(text):
            raise WrongValue(OUT_OF_RANGE)
        _check_bounds(value, self.low, self.high)
        if self.above is not None and value <= self.above:
            raise WrongValue(OUT_OF_RANGE)
        if self.below is not None and value >= self.below:
            raise WrongValue(OUT_OF_RANGE)
        return value


@dataclass(frozen=True)
class Switch(Kind):
    """true or false, also with a capital letter as Python writes them."""

    example: str = "true"

    @property
    def name(self) -> str:
        return "a bool, true or false"

    def of_text(self, text: str) -> bool:
        if text.lower() not in ("true", "false"):
            raise WrongValue(WRONG_TYPE)
        return text.lower() == "true"


@dataclass(frozen=True)
class Text(Kind):
    """A text, which is kept as it is written, even if it looks like a number.

    label: the kind in words. pattern: a regular expression that the whole text has to match.
    longest: the largest number of characters.
    """

    label: str = "a str"
    pattern: str = r"[^\[{].*"
    longest: int = LONGEST
    example: str = "abc"

    @property
    def name(self) -> str:
        if self.longest == LONGEST:
            return self.label
        return f"{self.label} of at most {self.longest} characters"

    def of_text(self, text: str) -> str:
        if len(text) > self.longest:
            raise WrongValue("is too long")
        is_text = text.isprintable() and text.strip() and text != "???"
        if not is_text or re.fullmatch(self.pattern, text) is None:
            raise WrongValue(WRONG_TYPE)
        return text


@dataclass(frozen=True)
class Choice(Kind):
    """One of `names`. aliases: other spellings, each with the name that it stands for."""

    names: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        if len(self.names) == 1:
            return self.names[0]
        return f"one of {', '.join(self.names)}"

    @property
    def example(self) -> str:
        return self.names[0]

    def read(self, raw: object) -> object:
        if not isinstance(raw, str):
            raise WrongValue(UNKNOWN)
        return self.of_text(raw)

    def of_text(self, text: str) -> str:
        name = self.aliases.get(text, text)
        if name not in self.names:
            raise WrongValue(UNKNOWN)
        return name


@dataclass(frozen=True)
class Time(Kind):
    """A span of time, DD:HH:MM:SS. It stays a text, which Lightning reads itself."""

    example: str = "00:12:00:00"

    @property
    def name(self) -> str:
        return "a time as DD:HH:MM:SS"

    def of_text(self, text: str) -> str:
        match = re.fullmatch(r"([0-9]{1,4}):([0-9]{2}):([0-9]{2}):([0-9]{2})", text)
        if match is None:
            raise WrongValue(WRONG_TYPE)
        days, hours, minutes, seconds = (int(part) for part in match.groups())
        if hours > 23 or minutes > 59 or seconds > 59 or days + hours + minutes + seconds == 0:
            raise WrongValue(OUT_OF_RANGE)
        return text


@dataclass(frozen=True)
class Share(Kind):
    """A number of batches as an int from 0, or a share of all batches as a float from 0 to 1."""

    example: str = "0.5"

    @property
    def name(self) -> str:
        return "an int from 0, or a share as a float from 0.0 to 1.0"

    def of_text(self, text: str) -> int | float:
        if re.fullmatch(r"[+-]?[0-9]+", text):
            return Integer(low=0).of_text(text)
        return Number(low=0, high=1).of_text(text)


@dataclass(frozen=True)
class Devices(Kind):
    """Which devices, as Lightning takes them: how many, all (auto or -1), or the numbers of GPUs.

    The numbers are a list, [0, 1]; Lightning's other form of it, `0,1`, is read as well.
    """

    example: str = "1"

    @property
    def name(self) -> str:
        return "an int from 1, auto, -1 for all GPUs, or numbers of GPUs as [0,1]"

    def read(self, raw: object) -> object:
        if isinstance(raw, str):
            return self.of_text(raw)
        numbers = [Integer(low=0).of_text(text) for text in _texts_of(raw)]
        if not numbers:
            raise WrongValue("has the wrong length")
        if len(set(numbers)) < len(numbers):
            raise WrongValue("names a device twice")
        return numbers

    def of_text(self, text: str) -> object:
        if text == "auto":
            return text
        if text == "-1":
            return -1
        if text.startswith("[") and text.endswith("]"):
            return self.read(elements(text))
        if "," in text:
            return self.read(elements(f"[{text.removesuffix(',')}]"))
        return Integer(low=1).of_text(text)


@dataclass(frozen=True)
class ListOf(Kind):
    """A list of values of one kind, as [a, b].

    n: the length of the list; None: any length. least: the least length.
    """

    kind: Kind
    n: int | None = None
    least: int = 0

    @property
    def name(self) -> str:
        count = "a list"
        if self.n is not None:
            count += f" of {self.n}"
        if self.least:
            count += f" of at least {self.least}"
        return f"{count}, each {self.kind.name}"

    @property
    def example(self) -> str:
        return f"[{', '.join([self.kind.example] * (self.n or 2))}]"

    def read(self, raw: object) -> object:
        if isinstance(raw, str):
            return self.of_text(raw)
        if not isinstance(raw, Sequence):
            raise WrongValue(WRONG_TYPE)
        if self.n not in (None, len(raw)) or len(raw) < self.least:
            raise WrongValue("has the wrong length")
        return [self.kind.read(part) for part in raw]

    def of_text(self, text: str) -> object:
        if not (text.startswith("[") and text.endswith("]")):
            raise WrongValue(WRONG_TYPE)
        return self.read(elements(text))


@dataclass(frozen=True)
class Either(Kind):
    """One of several kinds: the first one that accepts a value reads it."""

    kinds: tuple[Kind, ...]

    @property
    def name(self) -> str:
        return ", or ".join(kind.name for kind in self.kinds)

    @property
    def example(self) -> str:
        return self.kinds[0].example

    def of_text(self, text: str) -> object:
        return self.read(text)

    def read(self, raw: object) -> object:
        problems = []
        for kind in self.kinds:
            try:
                return kind.read(raw)
            except WrongValue as error:
                problems.append(str(error))
        if OUT_OF_RANGE in problems:  # one of the kinds has the type of the value
            raise WrongValue(OUT_OF_RANGE)
        raise WrongValue(WRONG_TYPE)


@dataclass(frozen=True)
class Nullable(Kind):
    """null, or a value of another kind. An empty text is null as well."""

    kind: Kind

    @property
    def name(self) -> str:
        return f"{self.kind.name}, or null"

    @property
    def example(self) -> str:
        return self.kind.example

    def of_text(self, text: str) -> object:
        return self.read(text)

    def read(self, raw: object) -> object:
        return None if raw in ("", "null") else self.kind.read(raw)


@dataclass(frozen=True)
class Anything(Kind):
    """The kind of a key whose type nothing declares: the form of the text decides (`guess`)."""

    example: str = "8"

    @property
    def name(self) -> str:
        return "a value or a list of values"

    def of_text(self, text: str) -> object:
        return guess(text)

    def read(self, raw: object) -> object:
        if isinstance(raw, Mapping):
            raise WrongValue(WRONG_TYPE)
        return guess(raw)


def guess(raw: object) -> object:
    """The value that a text most likely stands for: null, a bool, a number, or a list of these.

    Any other text stays a text. A value that is not a text, such as a list's element, stays itself.
    """
    if isinstance(raw, Sequence) and not isinstance(raw, str):
        return [guess(part) for part in raw]
    if not isinstance(raw, str):
        return raw
    if raw.startswith("[") and raw.endswith("]"):
        return [guess(part) for part in elements(raw)]
    for kind in (Nullable(Switch()), _Digits(), Number()):
        try:
            return kind.read(raw)
        except WrongValue:
            continue
    return raw


class _Digits(Integer):
    """An int that is written without a point or an exponent."""

    def of_text(self, text: str) -> int:
        if re.fullmatch(r"[+-]?[0-9]+", text) is None:
            raise WrongValue(WRONG_TYPE)
        return super().of_text(text)


def kind_of_value(value: object) -> Kind:
    """The kind of a value, for a key of which only a value is known."""
    for type_, kind in SIMPLE.items():
        if type(value) is type_:
            return kind
    if value is None:
        return Nullable(Anything())
    if isinstance(value, Sequence) and len(value):
        return ListOf(kind_of_value(value[0]))
    return Anything()


SIMPLE: dict[type, Kind] = {bool: Switch(), int: Integer(), float: Number(), str: Text()}


def _texts_of(raw: object) -> list[str]:
    """A list of texts. WrongValue: it is none."""
    if not isinstance(raw, Sequence) or not all(isinstance(part, str) for part in raw):
        raise WrongValue(WRONG_TYPE)
    return list(raw)


def unquoted(text: str) -> str:
    """A text without the blanks around it, and without the quotes in which somebody wrote it.

    >>> unquoted("'my run' ")
    'my run'
    """
    return re.sub(r"^(['\"])(.*)\1$", r"\2", text.strip())


def elements(text: str) -> list[str]:
    """The elements of a list that is written [a, b], without quotes around an element."""
    inner = text[1:-1].strip()
    if not inner:
        return []
    return [unquoted(part) for part in inner.split(",")]


def as_text(value: object) -> object:
    """The inverse of `Kind.read`: a value as a text, or as a list or dict of texts."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return {key: as_text(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [as_text(part) for part in value]
    return str(value)


def choices(kind: Kind) -> tuple[str, ...]:
    """The names of a `Choice`, also of a nullable one; empty for any other kind."""
    if isinstance(kind, Nullable):
        return choices(kind.kind)
    if isinstance(kind, Choice):
        return kind.names
    return ()


def argument_text(value: object) -> str:
    """A value as it is written after `key=` on a command line."""
    text = as_text(value)
    if isinstance(text, list):
        return f"[{', '.join(argument_text(part) for part in text)}]"
    return str(text)


def _is_huge(text: str) -> bool:
    """Whether a decimal number is too large for a float."""
    return DECIMAL.fullmatch(text) is not None and abs(float(text)) == float("inf")


def _vanishes(text: str) -> bool:
    """Whether a decimal number is not 0, and so small that as a float it would be."""
    mantissa = text.lower().partition("e")[0]
    return float(text) == 0 and any(digit in mantissa for digit in "123456789")


def _bounds(low: float | None, high: float | None) -> str:
    """The bounds in words, to follow `an int`; empty if there are none."""
    words = ""
    if low is not None:
        words += f" from {low}"
    if high is not None:
        words += f" to {high}"
    return words


def _check_bounds(value: float, low: float | None, high: float | None) -> None:
    if low is not None and value < low:
        raise WrongValue(OUT_OF_RANGE)
    if high is not None and value > high:
        raise WrongValue(OUT_OF_RANGE)
