"""Lets tests import the scripts of bench/, which is a folder of scripts and not a package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
