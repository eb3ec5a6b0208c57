"""What is used of libraries without being a stable interface: complete, true, and named where it is missing."""

import importlib
import inspect
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers.trainer
from packaging.requirements import Requirement
from stock import arguments, gpt2, text
from transformers import Trainer

from layup_hf import LayupMixin, LayupTrainer
from layup_hf.optim.adam import is_plain_adam
from layup_hf.trainer import seams
from layup_hf.trainer.compat import on_plain_cpu, prepared_once, steps_averaged, uploading_by
from layup_hf.trainer.seams import SEAMS, TESTED, WORKING, WRITING_TENSORS, Seam, check_seams

ROOT = Path(__file__).parents[2]
TRAINER = "transformers.trainer.Trainer"
OF_TRAINER = {seam.member: seam for seam in SEAMS if seam.owner == TRAINER}


def test_the_installed_versions_have_it_all():
    assert [fault for seam in SEAMS if (fault := seam.fault()) is not None] == []


def test_each_is_listed_once_and_has_a_version():
    assert len({(seam.owner, seam.member) for seam in SEAMS}) == len(SEAMS)
    assert all(re.fullmatch(r"\d+\.\d+", seam.since) for seam in SEAMS)
    assert {seam.library for seam in SEAMS} == set(WORKING) == set(TESTED)


def test_what_is_needed_is_there_since_the_oldest_version_or_has_a_form_before():
    """Else that version would be refused by `pip` alone, or not at all."""
    for seam in SEAMS:
        oldest = tuple(map(int, WORKING[seam.library].removeprefix(">=").split(",")[0].split(".")))
        came = tuple(map(int, seam.since.split(".")))
        assert came <= oldest or seam.is_optional or seam.before is not None, seam


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
    members = [name for seam in SEAMS for name in (seam.member, seam.before) if name is not None]
    assert [name for name in members if name not in used] == []


@pytest.mark.parametrize(("owner", "name"), WRITING_TENSORS)
def test_what_writes_tensors_is_called_by_the_name_that_is_replaced(owner, name):
    """Else a checkpoint in the background would be written while workers stand still, and nobody would notice."""
    module = importlib.import_module(owner)
    assert callable(vars(module)[name])
    assert owner.startswith(("torch", "safetensors")) or f"{name}(" in inspect.getsource(module)


def test_a_member_that_is_missing_is_named_with_the_versions_that_work(monkeypatch):
    monkeypatch.delattr(Trainer, "_run_epoch")
    with pytest.raises(ImportError) as raised:
        check_seams()
    message = str(raised.value)
    assert "transformers.trainer.Trainer._run_epoch is missing" in message
    assert f"transformers {transformers.__version__}" in message
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
        (Seam("torch.optim", "Nothing", "9.9", before="Adagrad"), None),
        (Seam("torch.optim", "Nothing", "9.9", before="Less"), "torch.optim.Nothing is missing"),
    ],
)
def test_what_a_fault_says(seam, fault):
    assert seam.fault() == fault


def test_it_is_the_first_thing_that_an_import_does():
    """Else a version that lacks a name fails with an error about that name alone, or in the middle of a run."""
    code = "import transformers.trainer_utils as u, transformers.trainer\ndel u.sort_checkpoints\nimport layup_hf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250, cwd=ROOT)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: layup_hf does not work with transformers")
    assert "transformers.trainer_utils.sort_checkpoints is missing, which is needed as it is since" in last


# ---- Older and newer versions ----


@pytest.fixture
def installed(monkeypatch):
    """Lets libraries say that they are of other versions."""
    versions = {library: seams.version_of(library) for library in WORKING}
    monkeypatch.setattr(seams, "version_of", lambda library: versions[library])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return versions


@pytest.mark.parametrize("version", ["2.7.1", "2.7.1+cu128", "1.13"])
def test_what_is_older_than_the_oldest_that_was_tested_is_refused(installed, version):
    installed["torch"] = version
    with pytest.raises(ImportError) as raised:
        check_seams()
    message = str(raised.value)
    assert message.startswith(f"layup_hf does not work with torch {version}: ")
    assert message.endswith(f"Run: pip install 'torch{WORKING['torch']}'")


@pytest.mark.parametrize("version", ["2.8.0", "2.8.0+cpu", "2.8.0.dev20260101", "2.8"])
def test_the_oldest_is_accepted_however_it_is_spelled(installed, version):
    installed.update(torch=version, transformers=TESTED["transformers"], accelerate=TESTED["accelerate"])
    with warnings.catch_warnings(action="error"):
        check_seams()


@pytest.mark.parametrize("rank", [None, "0"])
def test_what_is_newer_than_what_was_tested_is_named_once(installed, monkeypatch, rank):
    installed.update(torch=TESTED["torch"], transformers="5.99.0", accelerate="1.99.0.dev0")
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.warns(UserWarning, match="tested up to") as warned:
        check_seams()
    (message,) = (str(one.message) for one in warned)
    assert f"tested up to transformers {TESTED['transformers']}, accelerate {TESTED['accelerate']};" in message
    assert "installed: transformers 5.99.0, accelerate 1.99.0.dev0." in message
    assert f"pip install 'transformers=={TESTED['transformers']}.*'" in message


def test_a_later_release_of_a_version_that_was_tested_and_other_workers_say_nothing(installed, monkeypatch):
    installed.update({library: f"{version}.7+cpu" for library, version in TESTED.items()})
    with warnings.catch_warnings(action="error"):
        check_seams()
        monkeypatch.setenv("LOCAL_RANK", "1")
        installed["transformers"] = "6.0.0"
        check_seams()


def test_a_newer_version_that_lacks_something_is_refused(installed, monkeypatch):
    installed["transformers"] = "6.0.0"
    monkeypatch.delattr(Trainer, "_run_epoch")
    with pytest.raises(ImportError, match=r"transformers 6\.0\.0: .*_run_epoch is missing"):
        check_seams()


# ---- What versions do differently: each form, whichever is installed ----


def uploads_of_new(module, **call):
    return module.hf_api().upload_folder(**call)


def uploads_of_old(module, **call):
    return module.upload_folder(**call)


@pytest.mark.parametrize(
    ("member", "upload"), [("hf_api", uploads_of_new), ("upload_folder", uploads_of_old)], ids=["5.10", "5.4"]
)
def test_what_the_trainer_uploads_goes_through_our_function_and_then_through_its_own(member, upload):
    module = ModuleType("trainer")
    api = SimpleNamespace(upload_folder=lambda **call: ("theirs", call))
    setattr(module, member, {"hf_api": lambda: api, "upload_folder": api.upload_folder}[member])
    with uploading_by(lambda **call: ("ours", call), module):
        assert upload(module, folder_path="a") == ("ours", {"folder_path": "a"})
    with pytest.raises(OSError, match="full"), uploading_by(lambda **call: None, module):
        raise OSError("full")
    assert upload(module, folder_path="a") == ("theirs", {"folder_path": "a"})
    assert list(vars(module))[-1] == member


def test_the_installed_trainer_has_one_of_these_forms():
    before = dict(vars(transformers.trainer))
    with uploading_by(print):
        changed = {name for name, value in vars(transformers.trainer).items() if before[name] is not value}
    assert changed in ({"hf_api"}, {"upload_folder"})
    assert before == vars(transformers.trainer)


class New:
    def _finalize_training(self):
        return self.state.global_step - self._initial_global_step


class Old:
    def _finalize_training(self):
        return self.state.global_step


@pytest.mark.parametrize(("kind", "steps"), [(New, 6), (Old, 10)], ids=["5.19", "5.4"])
def test_the_mean_loss_is_of_as_many_steps_as_the_trainer_divides_by(kind, steps):
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=10), _initial_global_step=4)
    assert kind._finalize_training(trainer) == steps
    assert steps_averaged(10, 4, kind._finalize_training) == steps


def test_the_installed_trainer_divides_by_that(tmp_path):
    trainer = LayupTrainer(model=gpt2(), args=arguments(tmp_path, max_steps=4, save_steps=2), train_dataset=text())
    trainer.train()
    host = trainer.layup.host
    assert (host.initial_global_step, host.steps_averaged) == (0, 4)
    trainer._initial_global_step, trainer.is_in_train = 1, True
    trainer._tr_loss, trainer._total_loss_scalar = torch.zeros(()), 12.0 * host.steps_averaged
    assert Trainer._finalize_training(trainer, None, 1, 0.0).training_loss == 12.0


class Accelerator:
    """As it is until some version after 1.12: what is prepared again is wrapped."""

    marks = False

    def prepare_model(self, model, evaluation_mode=False):
        if self.marks and getattr(model, "is_marked", False):
            return model
        model.is_marked = True
        return model if evaluation_mode else torch.nn.Sequential(model)

    def prepare(self, model):
        return self.prepare_model(model)


class MarkingAccelerator(Accelerator):
    """As 1.15."""

    marks = True


@pytest.mark.parametrize("kind", [Accelerator, MarkingAccelerator], ids=["1.12", "1.15"])
def test_a_model_that_has_been_prepared_without_ddp_is_not_wrapped_afterwards(kind):
    accelerator, model, other = kind(), torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    with prepared_once(accelerator, lambda model: model is prepared):
        assert accelerator.prepare(prepared) is model
        assert isinstance(accelerator.prepare(other), torch.nn.Sequential)
    assert vars(accelerator) == {}
    with pytest.raises(OSError, match="broken"), prepared_once(accelerator, lambda model: True):
        raise OSError("broken")
    assert vars(accelerator) == {}


def test_ddp_is_never_trained_through(tmp_path, monkeypatch):
    """A version that wraps the model in some other way would train, without a word, in lock-step."""

    class Wrapped(torch.nn.parallel.DistributedDataParallel):
        def __init__(self):
            torch.nn.Module.__init__(self)

    monkeypatch.setattr(Trainer, "_prepare_for_training", lambda self, *args: (Wrapped(), None))
    trainer = LayupTrainer(model=gpt2(), args=arguments(tmp_path), train_dataset=text())
    with pytest.raises(RuntimeError, match="wrapped in DistributedDataParallel, so all workers would wait"):
        trainer.train()


@pytest.mark.parametrize("device", ["cpu:0", "cpu", "cuda:1"])
def test_on_a_cpu_the_trainer_loads_onto_a_device_without_an_index(tmp_path, device):
    """As torch cannot restore a tensor to "cpu:0"."""
    args = arguments(tmp_path)
    vars(args)["_setup_devices"] = own = torch.device(device)
    with on_plain_cpu(args):
        assert args.device == (torch.device("cpu") if own.type == "cpu" else own)
    with pytest.raises(OSError, match="broken"), on_plain_cpu(args):
        raise OSError("broken")
    assert args.device is own


@pytest.mark.parametrize(("kind", "is_plain"), [(torch.optim.AdamW, True), (torch.optim.Adam, False)])
def test_whose_weight_decay_is_decoupled_is_known_without_torch_saying_so(kind, is_plain):
    """torch 2.6 does not say it by group, and neither do states that were saved with it."""
    optimizer = kind([torch.nn.Parameter(torch.zeros(1))], weight_decay=0.1)
    assert is_plain_adam(optimizer) == is_plain
    for group in optimizer.param_groups:
        group.pop("decoupled_weight_decay", None)
    assert is_plain_adam(optimizer) == is_plain
