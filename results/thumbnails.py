"""Small copies of the recorded pictures, which the whole page contains.

An encoder's output differs from version to version, and the page has to be the same everywhere. So
a thumbnail is made once, when its picture is recorded, and kept in thumbnails/. Its name is the
hash of the picture.
"""

import hashlib
import io
from pathlib import Path

from PIL import Image

FOLDER = "thumbnails"
SIDE = 640  # pixels, the most of its width
QUALITY = 80
DIGITS = 16  # of the picture's SHA-256


def name_of(picture: bytes) -> str:
    """The file of a picture's thumbnail, from the results folder."""
    return f"{FOLDER}/{hashlib.sha256(picture).hexdigest()[:DIGITS]}.webp"


def make(picture: bytes, path: Path) -> bytes:
    """The thumbnail of a picture, as the content of a WebP file.

    path: of the picture, for the message.

    ValueError, one line: the content is not a readable picture.
    """
    try:
        image = Image.open(io.BytesIO(picture)).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable picture: restore it, or delete it") from error
    if image.width > SIDE:
        height = max(1, round(image.height * SIDE / image.width))
        image = image.resize((SIDE, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=QUALITY, method=6)
    return stream.getvalue()


def thumbnail(picture: bytes, path: Path, root: Path) -> tuple[Path, bytes]:
    """The path and the content of a picture's thumbnail: the kept one, or a new one.

    path: of the picture. root: the results folder.
    """
    file = root / name_of(picture)
    if file.is_file():
        return file, file.read_bytes()
    return file, make(picture, path)
