"""One thread for each test process: the networks are tiny, and the processes of ``pytest -n`` share the cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in the programs that tests start
