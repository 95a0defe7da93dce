"""Checkpoints on disk: whole or not there at all."""

import contextlib
import os
from pathlib import Path

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, forces it to the disk, then renames.

    A kill, a crash of the machine or a full disk at any moment leaves the target as it was. Lightning's own writer
    stages in $TMPDIR, and where that is another file system a kill during the move leaves a broken file.
    """

    def save_checkpoint(
        self, checkpoint: dict, path: str | os.PathLike, storage_options=None
    ) -> None:
        """OSError, one line, where it cannot be written; what was there before is then still there."""
        path = Path(path)
        part = path.with_name(f"{path.name}{PART}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            flush_folder(path.parent)
        except (
            OSError,
            RuntimeError,
        ) as error:  # RuntimeError: how torch.save ends when a write fails
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise OSError(f"{path} could not be written: {reason(error)}") from error


PART = ".part"  # of a file that is being written


def flush_folder(folder: Path) -> None:
    """Make a rename in it survive a crash of the machine; nothing where a folder cannot be opened, on Windows."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """The operating system's word for it, e.g. 'No space left on device', wherever in the chain it is."""
    chain = [error]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(earlier)
    named = [e.strerror for e in chain if isinstance(e, OSError) and e.strerror]
    return named[0] if named else " ".join(str(error).split())
