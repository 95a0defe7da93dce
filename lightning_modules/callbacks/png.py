"""Writing pictures to files."""

import io
from collections.abc import Callable
from pathlib import Path

from results.files import write


def write_png(path: Path, save: Callable[[io.BytesIO], object]) -> None:
    """Write a picture to a file in one step, so that a full disk leaves no incomplete file.

    save: writes the picture to a stream. OSError: the file cannot be written.
    """
    stream = io.BytesIO()
    save(stream)
    write(path, stream.getvalue())
