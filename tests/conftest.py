"""All tests run with one thread, and leave no process behind.

Their tensors are tiny: several threads would wait for one another three times as long as they work.
"""

import os

# Before torch is imported, and also for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test computes an FID by weights that happen to be on a machine, or downloads them: the cache of
# torch.hub is a file, so nothing is in it, and nothing can be put there.
os.environ["TORCH_HOME"] = __file__

import sys

import pytest


def pytest_configure(config):
    """Many tests train flows as they are built; those of the warning itself expect it."""
    config.addinivalue_line("filterwarnings", "ignore:.* is trained without a start from data")


@pytest.fixture(autouse=True)
def no_process_is_left():
    """Kill the processes that a failed test leaves behind: pytest would wait for them forever."""
    yield
    if "processes" in sys.modules:
        started = sys.modules["processes"].STARTED
        while started:
            started.pop().kill()
