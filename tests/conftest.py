"""Quiet, offline and single-threaded: what all tests share."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="layup-home-")  # nothing of the user's is read or changed
sys.path.insert(0, str(Path(__file__).parent))  # reference.py, fleet.py, launching.py, models.py, relatives.py

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# How long an example takes says how busy the machine is.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
