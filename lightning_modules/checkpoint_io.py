"""Writing checkpoints so that a file is either complete or does not exist."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

PART = ".part"  # suffix of a file that is being written


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, forces it to the disk, and renames it.

    If the process is killed, the machine crashes or the disk is full at any moment, the target
    stays as it was. Lightning's own writer first writes to $TMPDIR. If that is on another file
    system, a kill during the move leaves a broken file.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`; create the folder if it does not exist.

        Raises OSError: it cannot be written. An older file of that name then still exists.
        """
        target = Path(path)
        part = target.with_name(f"{target.name}{PART}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
            flush_folder(target.parent)
        except (OSError, RuntimeError) as error:  # torch.save raises either for a failed write
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise OSError(f"{target} could not be written: {reason(error)}") from error


def flush_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, so that a rename survives a crash of the machine.

    Does nothing on Windows, where a folder cannot be opened.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """The operating system's message for an error, or the error's own message in one line.

    It is taken from the first error in the chain of causes that has one.

    >>> reason(OSError(28, "No space left on device"))
    'No space left on device'
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())
