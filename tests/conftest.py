"""Lets tests import the builders beside them, wherever pytest is started."""

import os
import sys
from pathlib import Path

from hypothesis import settings

# Test processes run side by side, one per core; threads inside them would only get in the way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

# The same examples in every run; --hypothesis-seed tries others.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
