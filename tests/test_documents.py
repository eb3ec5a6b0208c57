"""What the documents point to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/measure/results/README.md"]


def text_of(path):
    return path.read_text(encoding="utf-8")


def anchors(path):
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    here = ROOT / document
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(here)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (here.parent / file) if file else here
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_sections_that_are_named_are_there(document):
    here = ROOT / document
    titles = {title for other in DOCUMENTS for title in re.findall(r"^#+ (.*)$", text_of(ROOT / other), re.MULTILINE)}
    for named in re.findall(r"see \*([^*]+)\*", text_of(here)):
        assert named in titles, named


def test_files_that_are_named_are_there():
    """And every module of the package has a line among the files."""
    files = {path.name for folder in ("layup_hf", "recipes", "tests") for path in (ROOT / folder).rglob("*.*")}
    listed = text_of(ROOT / "CONTRIBUTING.md")
    for named in re.findall(r"`(?:\w+/)*(\w+\.py)`", "".join(text_of(ROOT / document) for document in DOCUMENTS)):
        assert named in files, named
    for module in (ROOT / "layup_hf").glob("[!_]*.py"):
        assert f"`{module.name}`" in listed or f"`layup_hf/{module.name}`" in listed, module.name


def test_figures_that_are_named_are_there():
    text = text_of(ROOT / "recipes/measure/results/README.md")
    for named in re.findall(r"`([\w-]+\.(?:json|md|log|png))`", text):
        assert (ROOT / "recipes/measure/results" / named).exists(), named
