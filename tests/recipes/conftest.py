"""The recipes and the package that they lie in on the path, and some real text to feed them."""

import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]  # `recipes.parts` and `recipes.measure`; `gpt2`, `sft` and `vision`

STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="session")
def sources() -> list[str]:
    """Five modules of the standard library, about 170 kB."""
    return [(STDLIB / f"{name}.py").read_text("utf-8") for name in ("textwrap", "heapq", "ast", "csv", "queue")]


@pytest.fixture
def text_file(tmp_path, sources) -> Path:
    file = tmp_path / "train.py"
    file.write_text("".join(sources), "utf-8")
    return file


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache for everything the recipe and `datasets` keep in the course of one test, in this process."""
    import datasets.config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
    return tmp_path / "cache"
