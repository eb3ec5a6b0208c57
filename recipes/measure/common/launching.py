"""Workers of what measures: started by `accelerate launch`, and what they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]  # of the checkout, from which the package `recipes` is imported


def launcher(program: str | Path, *options: str) -> list[str]:
    """The command that launches a module, given by its name, or a script, given by its path.

    Args:
        program: What to launch; its arguments follow the command.
        options: Of `accelerate launch`.
    """
    named = [str(program)] if isinstance(program, Path) else ["-m", program]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, *named]


def on_this_host(processes: int) -> list[str]:
    """Options of `accelerate launch`: so many workers on one host, at a free port."""
    return [*(["--multi_gpu", "--main_process_port=0"] if processes > 1 else []), f"--num_processes={processes}"]


def path_to_recipes() -> dict[str, str]:
    """What the environment needs for `recipes` to be found from any folder."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def environment() -> dict[str, str]:
    """Of workers on this host: one thread for each, so that two methods are given the same cores."""
    return {**os.environ, **path_to_recipes(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def launch(program: str | Path, processes: int, arguments: list[str]) -> None:
    """Run a module or a script under `accelerate launch`.

    Raises:
        RuntimeError: It failed; with the end of its output.
    """
    command = [*launcher(program, *on_this_host(processes)), *arguments]
    done = subprocess.run(command, env=environment(), text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program} failed with exit code {done.returncode}:\n{(done.stdout + done.stderr)[-8000:]}")


def measure(program: str, processes: int, arguments: list[str], folder: Path) -> list[dict[str, Any]]:
    """Run a module, and take from `folder` what its workers have written there, in the order of ranks."""
    launch(program, processes, arguments)
    files = sorted(folder.glob("worker-*.json"))
    results = [result for file in files for result in json.loads(file.read_text())]
    for file in files:
        file.unlink()
    return results
