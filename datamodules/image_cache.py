"""A cache of decoded images: each file is decoded once, whatever the number of runs.

A cache folder holds for each content of a folder of images, and each set of settings,

    <shape>-<key>.pixels    the pixels of all images, one after another, uint8
    <shape>-<key>.json      the shape of each image, which files could not be read, and the sha256
                            of the pixels

and for each folder of images `<key>.files`, with size, times and sha256 of its files, so that a
file that has not changed is not read again. All may be deleted while no run uses them.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from datamodules.image_files import (
    Pixels,
    UnreadableImage,
    n_pixels,
    normal,
    read_pixels,
    read_strip,
    read_whole_pixels,
    shown,
)

VERSION = 1  # of the form of the files, and of how images are read
PART = ".part"  # the end of the name of a file that is still being written
PART_SECONDS = 86_400  # the age of a part that nobody is writing any more
UNSURE_SECONDS = 2.0  # a file that was changed so short ago may change again at the same time
MOST_THREADS = 32
CHUNK = 256  # files that are handed to the threads at once
WHOLE_CHUNK = 2 * MOST_THREADS  # the same for images that keep their size, which may be large
UNREADABLE = "unreadable"  # in the place of a sha256
OR_SKIP = "data.skip_unreadable=true leaves out files that cannot be read"

State = list[int]  # size and times of a file
A = TypeVar("A")
B = TypeVar("B")


class CacheError(ValueError):
    """The cache folder cannot be used; the message is one line."""


def default_cache() -> Path:
    """The cache folder of this user: paperflows in $XDG_CACHE_HOME, or else in ~/.cache.

    A folder of images is often shared and must not be written. A cache in a run's folder would be
    made anew for each run.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):
        home = os.path.expanduser("~/.cache")
    return Path(home, "paperflows")


# ------------------------------------------------------------------------------ content of files


class Digests(NamedTuple):
    """The sha256 of each file, UNREADABLE for one that cannot be read, and its `file_state`."""

    sums: list[str]
    states: list[State | None]


def digests(root: Path, paths: Sequence[Path], cache: Path) -> Digests:
    """The content of files. A file is read only where its size or one of its times has changed.

    root: the folder of the files. cache: the cache folder.
    """
    index = cache / f"{key_of(str(root.resolve()))}.files"
    known = _read_index(index)
    names = [path.relative_to(root).as_posix() for path in paths]
    states = [file_state(path) for path in paths]
    sums: dict[str, str] = {}
    for name, state in zip(names, states, strict=True):
        entry = known.get(name)
        if state is not None and isinstance(entry, list) and entry[:-1] == state:
            sums[name] = entry[-1]
    missing = [k for k, name in enumerate(names) if name not in sums]
    now = time.time()
    read = in_order(_sha256, [paths[k] for k in missing], "reading")
    for k, digest in zip(missing, read, strict=True):
        sums[names[k]] = digest
    if missing or len(known) != len(names):
        entries = {}
        for name, state in zip(names, states, strict=True):
            if state is not None and sums[name] != UNREADABLE and _is_settled(state, now):
                entries[name] = [*state, sums[name]]
        with contextlib.suppress(OSError):  # a cache that is read-only: files are read again
            cache.mkdir(parents=True, exist_ok=True)
            _write_json(index, entries)
    return Digests([sums[name] for name in names], states)


def content_hash(names: Sequence[str], sums: Sequence[str]) -> str:
    """One sha256 of names and contents of files.

    It is that of the lines that `sha256sum` prints for the files in the order of their names. A
    name with accents counts as the same in each of its two forms in Unicode, since copying between
    machines may change the form.
    """
    lines = [f"{digest}  {normal(name)}" for name, digest in zip(names, sums, strict=True)]
    text = "".join(f"{line}\n" for line in lines)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def key_of(*parts: object) -> str:
    """A name for a file that stands for the parts: 32 hexadecimal digits."""
    text = json.dumps(parts)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_state(path: Path) -> State | None:
    """Size and times of a file; None if it is no regular file, or cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _is_settled(state: State, now: float) -> bool:
    """Whether a later change of a file would show in its times. now: a time before it was read."""
    return max(state[1:]) < (now - UNSURE_SECONDS) * 1e9


def _sha256(path: Path) -> str:
    if file_state(path) is None:  # a pipe would be waited for for ever
        return UNREADABLE
    try:
        return _digest(path)
    except OSError:
        return UNREADABLE


def _digest(path: Path) -> str:
    """The sha256 of a file. Raises OSError: it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_index(path: Path) -> dict[str, list[Any]]:
    """The entries of an index; none if there is no index, or a damaged one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


# ------------------------------------------------------------------------------ decoded images


class Images:
    """Decoded images in a file, read from it when they are asked for. The item k is (C, H, W).

    path: of the .pixels file. shapes: (N, 3), the shape of each image in the file. numbers: which
    images of the file these are.
    """

    def __init__(self, path: Path, shapes: np.ndarray, numbers: np.ndarray) -> None:
        self.path = path
        self.shapes = shapes
        self.numbers = numbers
        ends = shapes.astype(np.int64).prod(axis=1).cumsum()
        self.bounds = np.concatenate([[0], ends])
        self._pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, k: int) -> np.ndarray:
        if self._pixels is None:
            self._pixels = np.memmap(self.path, np.uint8, mode="r")
        number = self.numbers[k]
        part = self._pixels[self.bounds[number] : self.bounds[number + 1]]
        return np.asarray(part).reshape(self.shapes[number])

    def __getstate__(self) -> dict[str, Any]:
        """Without the pixels: a worker process opens the file itself."""
        return {**vars(self), "_pixels": None}

    def choose(self, numbers: Sequence[int] | np.ndarray) -> "Images":
        """Some of the images, by their numbers in this object."""
        return Images(self.path, self.shapes, self.numbers[np.asarray(numbers, int)])


class Decoded(NamedTuple):
    """All images of a folder.

    images: those that could be read, in the order of their files. unreadable: the number of each
    other file, with the reason. n_transparent, n_enlarged: how many images were put on white, and
    how many are larger than their files.
    """

    images: Images
    unreadable: dict[int, str]
    n_transparent: int
    n_enlarged: int


class Reading(NamedTuple):
    """How images are read: see `read_image` and, for `whole`, `read_strip`.

    Without a size, images keep their own: see `read_whole`.
    """

    channels: int
    size: tuple[int, int] | None
    whole: bool

    def read(self, path: Path) -> Pixels:
        """Read a file in this way. Raises UnreadableImage."""
        if self.size is None:
            return read_whole_pixels(path, self.channels)
        reader = read_strip if self.whole else read_pixels
        return reader(path, self.channels, self.size)

    @property
    def name(self) -> str:
        """The beginning of the name of a file of images."""
        sides = self.size or ("whole",)
        return "x".join(str(side) for side in (self.channels, *sides))


class Files(NamedTuple):
    """Files of images. content: their `content_hash`. states: of each, when that was computed."""

    paths: list[Path]
    states: list[State | None]
    content: str


def decoded(
    files: Files, reading: Reading, cache: Path, skip: bool, advice: str = OR_SKIP
) -> Decoded:
    """The images in files, from the cache or, if they are not there, decoded into it.

    cache: the cache folder. skip: whether files that cannot be read are left out. advice: what the
    error says, if they are not.

    Raises UnreadableImage: a file cannot be read, and `skip` is false. Raises CacheError: the cache
    folder cannot be written, or has no room; or files have changed meanwhile.
    """
    key = key_of(VERSION, PIL.__version__, files.content, reading)
    target = cache / f"{reading.name}-{key}.pixels"
    found = _read(target)
    if found is None:
        try:
            _make(target, files, reading, skip, advice)
        except OSError as error:
            raise CacheError(
                f"data.cache={shown(cache)} cannot be used: {error.strerror}: "
                "give a folder that can be written, and has room"
            ) from error
        found = _read(target)
    if found is None:
        raise CacheError(f"{shown(target)} was changed by another program: start again")
    if found.unreadable and not skip:
        number = min(found.unreadable)
        reason = found.unreadable[number]
        raise UnreadableImage(f"{shown(files.paths[number])} {reason}; {advice}")
    return found


def _read(target: Path) -> Decoded | None:
    """What a cache has; None if it has not these images, or not all of them."""
    try:
        record = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
        shapes = np.array(record["shapes"], dtype=np.int64).reshape(-1, 3)
        found = Decoded(
            images=Images(target, shapes, np.arange(len(shapes))),
            unreadable={int(number): reason for number, reason in record["unreadable"].items()},
            n_transparent=record["n_transparent"],
            n_enlarged=record["n_enlarged"],
        )
        if target.stat().st_size != shapes.prod(axis=1).sum():
            return None
        if not _is_as_written(target, record["mtime_ns"], record["sha256"]):
            return None
    except (OSError, ValueError, TypeError, KeyError):  # missing, or damaged
        return None
    return found


def _is_as_written(target: Path, mtime_ns: int, sha256: str) -> bool:
    """Whether a file has the content that it was written with. It is read if its time is another.

    mtime_ns: the time of its last change, when it was written. sha256: of its content.
    """
    return target.stat().st_mtime_ns == mtime_ns or _digest(target) == sha256


def _make(target: Path, files: Files, reading: Reading, skip: bool, advice: str) -> None:
    """Decode images into a file that gets its name only when it is complete.

    Several processes may do it at once, each in a part of its own. The first to end gives its part
    the name; it is not replaced, since on a network's file system that would take the file away
    from a run that has opened it. Raises OSError, UnreadableImage and CacheError, as `decoded`.
    """
    cache = target.parent
    cache.mkdir(parents=True, exist_ok=True)
    _remove_old_parts(cache)
    n = len(files.paths)
    if reading.size is None:
        needed = reading.channels * sum(map(n_pixels, files.paths))
        remedy = "give another folder"
    else:
        needed = n * reading.channels * reading.size[0] * reading.size[1]
        remedy = "give another folder, or a smaller data.size"
    usage = shutil.disk_usage(cache)
    if usage.total and usage.free < needed:  # some network folders tell no size
        raise CacheError(
            f"data.cache={shown(cache)} has {usage.free / 1e9:,.1f} GB left, and {n:,} "
            f"images take {needed / 1e9:,.1f} GB: {remedy}"
        )
    part = cache / f"{target.stem}-{uuid.uuid4().hex}{PART}"
    try:
        with part.open("xb") as file:
            record = _write_pixels(file, files.paths, reading, skip, advice)
            file.flush()
            os.fsync(file.fileno())
        record |= {"mtime_ns": part.stat().st_mtime_ns, "sha256": _digest(part)}
        for path, state in zip(files.paths, files.states, strict=True):
            if file_state(path) != state:
                raise CacheError(f"{shown(path)} has changed while it was read: start again")
        if _read(target) is None:
            _write_json(target.with_suffix(".json"), record)
            part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _write_pixels(
    file: IO[bytes], paths: Sequence[Path], reading: Reading, skip: bool, advice: str
) -> dict[str, Any]:
    """Write the pixels of all images that can be read; return the content of the .json file."""
    shapes: list[tuple[int, ...]] = []
    unreadable: dict[str, str] = {}
    n_transparent = 0
    n_enlarged = 0

    def read(path: Path) -> Pixels | UnreadableImage:
        try:
            return reading.read(path)
        except UnreadableImage as error:
            return error

    chunk = CHUNK if reading.size else WHOLE_CHUNK
    with contextlib.closing(in_order(read, paths, "decoding", chunk)) as answers:
        for number, answer in enumerate(answers):
            if isinstance(answer, UnreadableImage):
                if not skip:
                    raise UnreadableImage(f"{answer}; {advice}") from answer
                unreadable[str(number)] = str(answer).removeprefix(f"{shown(paths[number])} ")
                continue
            file.write(np.ascontiguousarray(answer.pixels).data)
            shapes.append(answer.pixels.shape)
            n_transparent += answer.is_transparent
            n_enlarged += answer.is_enlarged
    return {
        "shapes": shapes,
        "unreadable": unreadable,
        "n_transparent": n_transparent,
        "n_enlarged": n_enlarged,
    }


def in_order(
    function: Callable[[A], B], items: Sequence[A], title: str, chunk: int = CHUNK
) -> Generator[B]:
    """The values of a function of each item, in order, computed by several threads.

    chunk: how many items the threads get at once, whose values are in memory together.
    A progress bar is shown in a terminal. Pillow and hashlib let other threads run meanwhile.
    """
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(n_threads()) as threads,
        tqdm(total=len(items), desc=title, unit=" files", disable=None, leave=False) as bar,
    ):
        # Pillow warns of large images, and of damaged EXIF, which does not matter here.
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", module=r"PIL\.")
        for start in range(0, len(items), chunk):
            for value in threads.map(function, items[start : start + chunk]):
                bar.update()
                yield value


def n_threads() -> int:
    """One for each core that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MOST_THREADS)
    return min(os.cpu_count() or 1, MOST_THREADS)


def _write_json(path: Path, content: object) -> None:
    """Write a JSON file that appears only when it is complete."""
    part = path.with_name(f"{path.stem}-{uuid.uuid4().hex}{PART}")
    try:
        part.write_text(json.dumps(content), encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _remove_old_parts(cache: Path) -> None:
    """Remove the parts of runs that were killed."""
    for part in cache.glob(f"*{PART}"):
        with contextlib.suppress(OSError):
            if part.stat().st_mtime < time.time() - PART_SECONDS:
                part.unlink()
