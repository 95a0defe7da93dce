"""Standard output that nobody reads and standard error that is closed: no mistake of a run's."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_portability import MOONS

from benchmarks import __main__ as benchmark
from reproduce import realnvp_cifar10, streams

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def unread(buffering=-1):
    """Standard output as in `python ... | head -0`; a fixture's would be replaced by pytest's own.

    buffering: 1 for each line by itself, as on a terminal.
    """
    reader, writer = os.pipe()
    os.close(reader)
    with (
        open(writer, "w", buffering=buffering, encoding="utf-8") as stream,
        contextlib.redirect_stdout(stream),
    ):
        yield


def test_what_nobody_reads_is_printed_without_an_error():
    with unread():
        streams.say("a", Path("b"))
        streams.say("c")
        streams.flush_streams()


@pytest.mark.parametrize("word", ["--help", "--print-config"])
def test_help_that_nobody_reads_to_its_end_is_no_mistake(word):
    """As `| head`, which leaves before the whole text is written."""
    with unread(buffering=1), pytest.raises(SystemExit) as end:
        realnvp_cifar10.main([word])
    assert end.value.code == 0


def test_a_benchmark_that_nobody_listens_to_writes_its_file(tmp_path, monkeypatch):
    row = {"model": "a", "dtype": "float32"}
    monkeypatch.setattr(benchmark, "measure", lambda *arguments: [row])
    path = tmp_path / "rows.json"
    with unread():
        benchmark.main(["realnvp", "--json", str(path)])
    assert row.items() <= json.loads(path.read_text())[0].items()


def test_what_is_still_buffered_is_flushed_without_an_error():
    with unread():
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
