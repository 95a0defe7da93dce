"""One thread: the tests' tensors are tiny, and threads that wait for one another cost three times the work."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, and for the processes that tests start
