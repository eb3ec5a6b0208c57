"""One run of workers that train by several methods in turn."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from ..common.launching import measure


def run_workers(options: argparse.Namespace, methods: str, rounds: int, *more: str) -> list[dict[str, Any]]:
    """What every worker measured, one dict per worker, round and method."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"--methods={methods}", f"--rounds={rounds}", f"--steps={options.steps}", f"--folder={folder}"]
        arguments += [f"--skipped={options.skipped}", f"--optim={options.optim}"]
        arguments += [f"--batch_size={options.batch_size}", f"--block_size={options.block_size}"]
        arguments += [f"--config_overrides={options.config_overrides}", *(["--bf16"] if options.bf16 else []), *more]
        return measure("recipes.measure.bench.worker", options.processes, arguments, Path(folder))
