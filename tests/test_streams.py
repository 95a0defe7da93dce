"""Standard output that nobody reads and standard error that is closed: no mistake of a run's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_portability import MOONS

from reproduce import streams

ROOT = Path(__file__).parents[1]


@pytest.fixture
def unread(monkeypatch):
    """Standard output as in `python ... | head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield stream


def test_what_nobody_reads_is_printed_without_an_error(unread):
    streams.say("a", Path("b"))
    streams.say("c")
    streams.flush_streams()


def test_what_is_still_buffered_is_flushed_without_an_error(unread):
    print("a")
    streams.flush_streams()
    print("b", flush=True)


def test_lines_are_printed_one_below_the_other(capsys):
    streams.say("a", Path("b"))
    assert capsys.readouterr().out == "a\nb\n"


def test_a_closed_stream_becomes_the_null_device(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    streams.open_missing_streams()
    print("a", file=sys.stderr, flush=True)
    assert not sys.stderr.isatty()


def test_a_run_that_nobody_listens_to_ends_well(tmp_path):
    """`2>&- | head -0`: exit code 0, and everything is there."""
    reader, writer = os.pipe()
    os.close(reader)
    script = str(ROOT / "reproduce" / "realnvp_moons.py")
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, script, *MOONS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "run_dir=run"], cwd=tmp_path, env=environment, stdout=writer, timeout=120
    )
    os.close(writer)
    assert done.returncode == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["images"] == 64
    assert "Traceback" not in (tmp_path / "run" / "log.txt").read_text()
