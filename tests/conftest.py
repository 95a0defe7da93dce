"""One thread: the tests' tensors are tiny, and threads that wait for one another cost three times the work."""

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch, and for the processes that tests start

import sys

import pytest


@pytest.fixture(autouse=True)
def no_process_is_left():
    """pytest would wait for ever for the processes that a failed test leaves behind."""
    yield
    if "processes" in sys.modules:
        started = sys.modules["processes"].STARTED
        while started:
            started.pop().kill()
