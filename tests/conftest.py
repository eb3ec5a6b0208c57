"""Quiet, offline and single-threaded: what all tests share."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))  # reference.py, fleet.py, launching.py, models.py, relatives.py

import torch

torch.set_num_threads(1)
