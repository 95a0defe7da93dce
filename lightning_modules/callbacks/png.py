"""Pictures as files."""

import io
from collections.abc import Callable
from pathlib import Path

from results.files import write


def write_png(path: Path, save: Callable[[io.BytesIO], object]) -> None:
    """Write a picture in one step, so that a full disk leaves no half of it.

    save: writes the picture to a stream. OSError: the file cannot be written.
    """
    stream = io.BytesIO()
    save(stream)
    write(path, stream.getvalue())
