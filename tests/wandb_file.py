"""Read the .wandb file of an offline run: what it would send to W&B.

wandb 0.31 no longer has a reader of its own.
"""

import json
import struct

import wandb


def records(path):
    """All records of a .wandb file: a header of 7 bytes, then LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    position = 7
    payload = b""
    messages = []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # no chunk begins so near the end of a block
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        payload += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            messages.append(Record.FromString(payload))
            payload = b""
    return messages


class Part:
    """One offline-run folder: what W&B would be told."""

    def __init__(self, folder):
        (path,) = folder.glob("*.wandb")
        self.folder = folder
        self.records = {}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            self.records.setdefault(kind, []).append(getattr(record, kind))

    @property
    def run(self):
        return self.records["run"][-1]

    @property
    def rows(self):
        return [self._items(history.item) for history in self.records["history"]]

    @property
    def summary(self):
        return {
            k: v
            for summary in self.records["summary"]
            for k, v in self._items(summary.update).items()
        }

    @property
    def config(self):
        updates = [self.run.config, *self.records.get("config", [])]
        return {k: v for update in updates for k, v in self._items(update.update).items()}

    @staticmethod
    def _items(items):
        """Key -> value, of nested ones the keys joined by dots."""
        return {
            ".".join([item.key, *item.nested_key]).strip("."): json.loads(item.value_json)
            for item in items
        }


def parts_of(folder):
    """The offline parts of a run, in order, once all has been written.

    wandb's own process writes, and may be behind.
    """
    wandb.teardown()
    return [Part(path) for path in sorted((folder / "wandb").glob("offline-run-*"))]
