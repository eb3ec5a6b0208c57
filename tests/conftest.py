"""Quiet, offline and single-threaded: what all tests share."""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
HOME = os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="layup-home-")  # nothing of the user's is read or changed
sys.path.insert(0, str(Path(__file__).parent))  # reference.py, fleet.py, launching.py, models.py, relatives.py

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# How long an example takes says how busy the machine is.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist would put files of few tests last, which are some of the longest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first: none of these long ones is to run alone at the end."""

    @functools.cache
    def starts_processes(module: ModuleType) -> bool:
        return any(
            each is subprocess or getattr(each, "__module__", "") == "launching" for each in vars(module).values()
        )

    items.sort(key=lambda item: not starts_processes(item.module))


def pytest_unconfigure() -> None:
    shutil.rmtree(HOME, ignore_errors=True)
