"""What the documents say, point to and quote is there."""

import ast
import dataclasses
import importlib
import re
import tomllib
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from transformers import TrainingArguments

from layup_hf import LayupConfig, __version__
from layup_hf.config import LayupOptions
from layup_hf.trainer.seams import TESTED, WORKING

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "recipes/measure/results"
DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md", "recipes/measure/results/README.md"),
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
]
CODE = sorted((ROOT / "layup_hf").rglob("*.py"))


def text_of(path):
    return path.read_text(encoding="utf-8")


def prose_of(path):
    """Without blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", text_of(path), flags=re.MULTILINE | re.DOTALL)


def blocks_of(path, *languages):
    """What is in blocks of code in one of these languages; with none, in all that name one."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", text_of(path), re.MULTILINE | re.DOTALL)
    return [block for language, block in found if not languages or language in languages]


def headings_of(path):
    return re.findall(r"^#+ (.*)$", prose_of(path), re.MULTILINE)


def anchors(path):
    """Of the headings, as GitHub makes them."""
    found = []
    for heading in headings_of(path):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        times = sum(other == anchor or re.fullmatch(rf"{re.escape(anchor)}-\d+", other) is not None for other in found)
        found.append(f"{anchor}-{times}" if times else anchor)
    return set(found)


def rows_of(path, title):
    """Cells of the rows of the first table below a heading."""
    _, found, rest = f"\n{text_of(path)}".partition(f"\n{title}\n")
    assert found, f"no section {title!r} in {path}"
    lines = re.search(r"^\|.*?(?=^[^|]|^$|\Z)", rest, re.MULTILINE | re.DOTALL).group(0).splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(row) for row in rows}) == 1, title
    return rows[2:]  # after the heading and the line below it


# ---- Links, sections, files ----


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    here = ROOT / document
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(here)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (here.parent / file) if file else here
        assert there.exists(), target
        assert ROOT in there.resolve().parents, target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_sections_that_are_named_are_there(document):
    here = ROOT / document
    titles = {title for other in DOCUMENTS for title in headings_of(ROOT / other)}
    for named in re.findall(r"see \*([^*]+)\*", text_of(here)):
        assert named in titles, named


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_are_there(document):
    """With a folder: that file. Without: some file of this name."""
    names = {path.name for folder in ("layup_hf", "recipes", "tests") for path in (ROOT / folder).rglob("*.py")}
    for named in re.findall(r"`([\w/]+\.py)`", prose_of(ROOT / document)):
        if named == "my_script.py":
            continue
        is_there = any((ROOT / folder / named).is_file() for folder in ("", "layup_hf"))  # as in docs/architecture.md
        assert is_there if "/" in named else named in names, named


@pytest.mark.parametrize("document", DOCUMENTS)
def test_figures_that_are_named_are_there(document):
    is_of_results = (ROOT / document).parent == RESULTS
    named = re.findall(r"`recipes/measure/results/([\w-]+\.\w+)`", text_of(ROOT / document))
    if is_of_results:
        named += re.findall(r"`([\w-]+\.(?:json|md|log|png))`", text_of(ROOT / document))
    for name in named:
        assert (RESULTS / name).exists(), name


def test_every_page_is_in_the_index():
    index = text_of(ROOT / "docs/README.md")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_the_readme_is_short():
    text = text_of(ROOT / "README.md")
    assert len(text.splitlines()) <= 220
    begins = " ".join(text.splitlines()[:10])
    assert "alpha" in begins
    assert "CPUs only" in begins
    assert "never been run on a GPU" in begins


# ---- Options, logs, versions ----


def test_every_option_has_a_row_with_its_default():
    written = {row[0].strip("`"): row[1] for row in rows_of(ROOT / "docs/options.md", "## Every option of LayupConfig")}
    defaults = {option.name: option.default for option in dataclasses.fields(LayupOptions)}
    assert written == {name: f"`{default!r}`".replace("'", '"') for name, default in defaults.items()}


OPTIONS = {option.name for option in dataclasses.fields(LayupConfig)}
OF_OTHERS = {
    *("rank", "compute", "communication", "distribution", "first", "last", "seed", "busy"),  # of a delay
    *("fused", "level", "requires_grad", "use_reentrant", "use_seedable_sampler"),  # of torch, logging, accelerate
}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_that_are_set_are_options(document):
    """`name=value` in words of code."""
    for name in re.findall(r"(?<!`)`([a-z_]+)=[^`]*`(?!`)", prose_of(ROOT / document)):
        assert name in OPTIONS | OF_OTHERS, name


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if not name.startswith("recipes/")])
def test_options_of_commands_are_options(document):
    """Of the configuration, the recipes, the doctor or `accelerate launch`; what measures and pip have others."""
    of_launcher = {option.lstrip("-") for option in launch_command_parser()._option_string_actions}
    recipes = "".join(text_of(path) for folder in ("", "parts") for path in (ROOT / "recipes" / folder).glob("*.py"))
    of_recipes = set(re.findall(r"^    (\w+): ", recipes, re.MULTILINE))
    of_doctor = set(re.findall(r'add_argument\("--(\w+)"', text_of(ROOT / "layup_hf/doctor/main.py")))
    known = OPTIONS | of_launcher | of_recipes | of_doctor
    for line in text_of(ROOT / document).splitlines():
        if not re.search(r"recipes\.measure|pytest|ruff|docker|container|pip install", line):
            for option in re.findall(r"(?<![\w-])--([a-z]\w+)", line):
                assert option in known, option


def figures_of_code():
    """Those with a name in the code, and what the engine counts."""
    return {*re.findall(r"\"layup/(\w+)\"", "".join(map(text_of, CODE)))} | set(COUNTS)


COUNTS = ("merges", "offers", "skipped_offers", "bytes_read")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_figures_of_the_logs_exist(document):
    for figure in re.findall(r"layup/(\w+)", text_of(ROOT / document)):
        assert figure in figures_of_code(), figure


def test_every_figure_of_the_logs_has_a_row():
    table = "".join(row[0] for row in rows_of(ROOT / "docs/logs.md", "# Logs"))
    assert set(re.findall(r"layup/(\w+)", table)) == figures_of_code()


def test_versions_are_those_of_the_package():
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    accepted = dict(re.match(r"([\w-]+)(.*)", dependency).groups() for dependency in project["dependencies"])
    accepted["Python"] = project["requires-python"]
    tested = dict(re.findall(r"^([\w-]+)==(\S+)$", text_of(ROOT / "constraints.txt"), re.MULTILINE))
    rows = rows_of(ROOT / "README.md", "## Install and try it")
    assert [row[0] for row in rows] == ["Python", "torch", "transformers", "accelerate"]
    for name, accepts, was_tested in rows:
        assert accepts == accepted[name], name
        assert name == "Python" or was_tested.split()[0] == tested[name], name
    assert f"\nversion: {__version__}\n" in text_of(ROOT / "CITATION.cff")


def test_the_oldest_and_the_newest_version_of_each_library_have_been_run():
    rows = [line.split("|") for line in text_of(ROOT / "docs/versions.md").splitlines() if line.startswith("| ")]
    (heads,) = (row for row in rows if row[1].strip() == "row")
    for library, accepts in WORKING.items():
        column = [head.strip() for head in heads].index(library)
        run = {row[column].strip() for row in rows if len(row) == len(heads) and "passed" in row[2]}
        for version in (accepts.removeprefix(">=").split(",")[0], TESTED[library]):
            assert any(f"{full}.".startswith(f"{version}.") for full in run), (library, version)


# ---- Commands and code ----


def module_exists(name):
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_name_what_is_there(document):
    text = text_of(ROOT / document)
    for module in re.findall(r"python -m (recipes\.[\w.]+)", text):
        assert module_exists(module), module
    for script in re.findall(r"(?<![\w/])recipes/[\w/]+\.py", text):
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("document", DOCUMENTS)
def test_code_is_python(document):
    for block in blocks_of(ROOT / document, "python"):
        ast.parse(block)
        for line in re.findall(r"^from (layup_hf[\w.]*) import (.*)$", block, re.MULTILINE):
            module, names = line
            members = vars(importlib.import_module(module))
            assert all(name.strip() in members for name in names.split(",")), line


def test_the_script_of_the_readme_sets_arguments_that_there_are():
    (script,) = blocks_of(ROOT / "README.md", "python")
    calls = [node for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Call)]
    (config,) = (call for call in calls if getattr(call.func, "id", "") == "LayupConfig")
    known = {option.name for option in dataclasses.fields(TrainingArguments)}
    assert {keyword.arg for keyword in config.keywords} <= known


# ---- Messages ----


def messages_of_code():
    """Every text in the package; what an f-string puts in is `...`."""
    texts = set()
    for path in CODE:
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.JoinedStr):
                texts.add("".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
    return texts


def test_messages_that_are_quoted_are_those_of_the_code():
    texts = messages_of_code()
    text = prose_of(ROOT / "docs/troubleshooting.md")
    quoted = re.findall(r"(?<!`)``(?!`)(.+?)(?<!`)``(?!`)", text)
    assert len(quoted) > 60
    for message in quoted:
        parts = [part.strip() for part in message.split("...") if part.strip(" :")]
        assert any(all(part in known for part in parts) for known in texts), message


def test_reasons_of_refused_messages_have_a_row():
    rows = rows_of(ROOT / "docs/troubleshooting.md", "## Messages that are refused")
    named = set(re.findall(r"`([^`]+)`", "".join(row[0] for row in rows)))
    code = "".join(text_of(path) for path in (ROOT / "layup_hf/windows").glob("*.py"))
    raised = set(re.findall(r"RefusedError\(\"([^\"]+)\"\)", code))
    told = set(re.findall(r"raise ValueError\(\"([^\"]+)\"\)", text_of(ROOT / "layup_hf/ledger/ledger.py")))
    assert named == raised | told
