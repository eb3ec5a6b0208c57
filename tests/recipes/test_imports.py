"""The modules of the recipes import one way: no circle, and nothing of what measures in what is measured."""

import ast
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name

import pytest
from launching import ROOT


def module_of(file):
    """Its name in the package `recipes`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in sorted((ROOT / "recipes").rglob("*.py"))}
RECIPES = {module_of(file) for file in (ROOT / "recipes").glob("*.py")} - {"recipes"}


def imports_of(name):
    """Modules of `recipes` that a module imports, wherever in it."""
    file, found = MODULES[name], set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            found.update({base, *(f"{base}.{alias.name}" for alias in node.names)})
    # A recipe is run by its path: what lies beside it is found without the package's name.
    return {module for each in found for module in (each, f"recipes.{each}") if module in MODULES}


IMPORTS = {name: imports_of(name) for name in MODULES}


def test_the_imports_are_seen():
    assert sorted(RECIPES) == ["recipes.gpt2", "recipes.grpo", "recipes.sft", "recipes.vision"]
    assert {"recipes.parts.corpus", "recipes.parts.training"} < IMPORTS["recipes.gpt2"]
    assert "recipes.parts.tokens" in IMPORTS["recipes.parts.images"]
    assert {"recipes.parts.model", "recipes.measure.common.text"} < IMPORTS["recipes.measure.bench.worker"]


def test_there_is_no_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(f"Modules import each other in a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    assert not IMPORTS[name] & RECIPES, "a recipe is an entry point"
    measures = {each for each in IMPORTS[name] if each.startswith("recipes.measure.")}
    if not name.startswith("recipes.measure."):
        assert not measures
    elif name.startswith("recipes.measure.common."):
        assert all(each.startswith("recipes.measure.common.") for each in measures)
