"""Benchmarks are modules of the repository, and lie in no package that is installed: tests find them from here on."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
