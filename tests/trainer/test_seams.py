"""What is used of libraries without being a stable interface: complete, true, and named where it is missing."""

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers import Trainer

from layup_hf import LayupMixin
from layup_hf.trainer import seams
from layup_hf.trainer.seams import SEAMS, WORKING, Seam, check_seams

ROOT = Path(__file__).parents[2]
TRAINER = "transformers.trainer.Trainer"
OF_TRAINER = {seam.member: seam for seam in SEAMS if seam.owner == TRAINER}


def test_the_installed_versions_have_it_all():
    assert [fault for seam in SEAMS if (fault := seam.fault()) is not None] == []


def test_each_is_listed_once_and_has_a_version():
    assert len({(seam.owner, seam.member) for seam in SEAMS}) == len(SEAMS)
    assert all(re.fullmatch(r"\d+\.\d+", seam.since) for seam in SEAMS)
    assert {seam.library for seam in SEAMS} == set(WORKING)


def test_the_versions_that_work_are_those_that_are_installed_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = {requirement.name: requirement for requirement in map(Requirement, project["dependencies"])}
    assert {name: str(needed[name].specifier) for name in WORKING} == {
        name: str(Requirement(name + versions).specifier) for name, versions in WORKING.items()
    }


def test_every_private_method_that_is_overridden_is_listed_with_the_arguments_that_are_named():
    """`*args` and `**kwargs` rely on nothing."""
    overridden = {
        name: method
        for name, method in vars(LayupMixin).items()
        if name.startswith("_") and not name.startswith("__") and inspect.isfunction(method)
    }
    assert set(overridden) <= set(OF_TRAINER)
    for name, method in overridden.items():
        named = {
            parameter.name
            for parameter in list(inspect.signature(method).parameters.values())[1:]
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD or parameter.kind is parameter.KEYWORD_ONLY
        }
        assert named <= set(OF_TRAINER[name].parameters) | {"tr_loss"}, name
        assert set(OF_TRAINER[name].parameters) <= set(inspect.signature(getattr(Trainer, name)).parameters), name


def test_nothing_is_listed_that_is_not_used():
    texts = [path.read_text("utf-8") for path in (ROOT / "layup_hf").rglob("*.py") if path.name != "seams.py"]
    used = set(re.findall(r"\w+", "".join(texts)))
    assert [seam.member for seam in SEAMS if seam.member not in used] == []


def test_a_member_that_is_missing_is_named_with_the_versions_that_work(monkeypatch):
    monkeypatch.delattr(Trainer, "_run_epoch")
    with pytest.raises(ImportError) as raised:
        check_seams()
    message = str(raised.value)
    assert "transformers.trainer.Trainer._run_epoch is missing" in message
    assert f"transformers {seams.importlib.metadata.version('transformers')}" in message
    assert f"pip install 'transformers{WORKING['transformers']}'" in message


def test_a_parameter_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, model: None)
    with pytest.raises(ImportError, match=r"Trainer\._save_checkpoint takes no 'trial'"):
        check_seams()


@pytest.mark.parametrize(
    ("seam", "fault"),
    [
        (Seam("torch.optim", "Adagrad", "2.6"), None),
        (Seam("torch.optim.Adagrad", "step", "2.6", ("closure",)), None),
        (Seam("torch.optim", "Nothing", "9.9"), "torch.optim.Nothing is missing"),
        (Seam("torch.optim", "Nothing", "9.9", is_optional=True), None),
        (Seam("torch.nothing.Nothing", "step", "9.9"), "torch.nothing.Nothing is missing"),
        (Seam("torch.optim.Nothing", "step", "9.9"), "torch.optim.Nothing is missing"),
        (Seam(TRAINER, "_tr_loss", "5.3", is_set=True), None),
        (Seam(TRAINER, "_tr_loss", "5.3"), f"{TRAINER}._tr_loss is missing"),
        (Seam(TRAINER, "_never_set", "5.3", is_set=True), f"{TRAINER}._never_set is missing"),
        (Seam("accelerate.state.PartialState", "use_distributed", "1.1"), None),
    ],
)
def test_what_a_fault_says(seam, fault):
    assert seam.fault() == fault


def test_it_is_the_first_thing_that_an_import_does():
    """Else a version that lacks a name fails with an error about that name alone, or in the middle of a run."""
    code = "import transformers.trainer_utils as u, transformers.trainer\ndel u.sort_checkpoints\nimport layup_hf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: layup_hf does not work with transformers")
    assert "transformers.trainer_utils.sort_checkpoints is missing, which is needed as it is since" in last
