"""To the Hub and back: real runs against a real server on loopback, which fails where it is told to."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from launching import ROOT, SCRIPTS, run
from models import gpt2, lora_llama

import layup_hf.trainer.hub
from layup_hf import LayupConfig, LayupTrainer
from layup_hf.trainer.hub import Upload
from layup_hf.trainer.report import RunFacts, add_to_card


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub")) as server:
        yield server


def environment(hub, folder):
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(folder / "home"),
        "TRANSFORMERS_VERBOSITY": "warning",
    }


def push_from(hub, folder, processes, cases):
    """Run these cases (a name, and options) and return, by name, the results of all ranks, and the log."""
    arguments = []
    for name, options in cases.items():
        arguments += ["--then", f"--output_dir={folder / name}", *options]
    prefix = ["env", *(f"{name}={value}" for name, value in environment(hub, folder).items())]
    started = run("hub.py", processes, arguments[1:], folder, prefix=prefix)
    ranks = started.results()
    results = {name: [rank[place] for rank in ranks] for place, name in enumerate(cases)}
    return results, started.output


SAVES = ["--save_strategy=steps", "--save_steps=3"]
ALWAYS = [*SAVES, "--hub_always_push=True"]
FILES = {"config.json", "generation_config.json", "model.safetensors", "training_args.bin"}
CHECKPOINT = FILES | {"scheduler.pt", "trainer_state.json"}
CHECKPOINT |= {"optimizer.pt", "optimizer_1.pt", "rng_state_0.pth", "rng_state_1.pth"}
IN_PROGRESS = [f"Training in progress, step {step}" for step in (3, 6, 9)]


def faults(**by_step):
    """What is wrong with the Hub from `step_N` on."""
    return "--faults=" + json.dumps({step.removeprefix("step_"): given for step, given in by_step.items()})


def fault(**given):
    """Until the push of step 3 has ended."""
    return faults(step_2=[given], step_5=[])


def messages(hub, repo):
    return [commit["message"] for commit in hub.history(repo)]


def weights_in(commit, place=""):
    return commit["files"][f"{place}model.safetensors"]["oid"]


def assert_like_the_checkpoint(hub, repo, results, steps):
    """These checkpoints are complete in the repository, and their weights are those that were saved."""
    head = hub.history(repo)[-1]
    for step in steps:
        place = f"checkpoint-{step}/"
        assert {path.removeprefix(place) for path in head["files"] if path.startswith(place)} == CHECKPOINT
        assert weights_in(head, place) == results[0]["saved"][str(step)]


# ---- Every strategy ----


@pytest.fixture(scope="module")
def strategies(hub, tmp_path_factory):
    names = ("end", "every_save", "checkpoint", "all_checkpoints")
    cases = {name: [*ALWAYS, "--save_total_limit=1", f"--hub_strategy={name}"] for name in names}
    held = [faults(step_2=[{"match": "PUT", "hold": True}], step_8=[]), "--waits=False", "--wait_at=4"]
    cases["held"] = [*cases["all_checkpoints"], *held]
    cases["skipped"] = [*SAVES, "--hub_strategy=every_save", *held]
    cases["background"] = [*cases["all_checkpoints"], "--checkpoints=background"]
    folder = tmp_path_factory.mktemp("strategies")
    (folder / "end" / "_push-left").mkdir(parents=True)  # by a run that was killed
    return push_from(hub, folder, 2, cases)


@pytest.mark.parametrize("name", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_every_strategy_brings_the_consensus_model_to_the_hub_and_back(hub, strategies, name):
    results, _ = strategies
    assert results[name][0]["downloaded_is_model"]
    assert results[name][0]["left"] == []
    assert results[name][0]["error"] == ""
    repo = f"tester/{name}"
    last = hub.history(repo)[-1]
    assert last["message"] == "End of training"
    assert results[name][0]["pushed"] == hub.resolve(repo, "main")
    assert weights_in(last) == results[name][0]["saved"]["9"]
    assert {path for path in last["files"] if "/" not in path} == FILES | {"README.md"}


def test_end_pushes_at_the_end_alone(hub, strategies):
    assert messages(hub, "tester/end") == ["End of training"]


def test_every_save_pushes_the_weights_of_every_save(hub, strategies):
    history = hub.history("tester/every_save")
    assert [commit["message"] for commit in history] == [*IN_PROGRESS, "End of training"]
    saved = strategies[0]["every_save"][0]["saved"]
    assert [weights_in(commit) for commit in history[:3]] == [saved["3"], saved["6"], saved["9"]]
    assert strategies[0]["every_save"][0]["pushes"] == [3, 6, 9, 9]


def test_checkpoint_keeps_the_last_one_to_resume_from(hub, strategies):
    both = [text for message in IN_PROGRESS for text in (message, f"{message}, checkpoint")]
    history = hub.history("tester/checkpoint")
    assert [commit["message"] for commit in history] == [*both, "End of training"]
    files = {path.removeprefix("last-checkpoint/") for path in history[-1]["files"] if "/" in path}
    assert files == CHECKPOINT
    assert weights_in(history[-1], "last-checkpoint/") == strategies[0]["checkpoint"][0]["saved"]["9"]
    state = json.loads(hub.files("tester/checkpoint")["last-checkpoint/trainer_state.json"])
    assert state["global_step"] == 9


def test_all_checkpoints_keeps_them_all(hub, strategies):
    results = strategies[0]["all_checkpoints"]
    assert_like_the_checkpoint(hub, "tester/all_checkpoints", results, (3, 6, 9))


def test_the_card_has_the_hyperparameters_and_the_workers(hub, strategies):
    card = hub.files("tester/all_checkpoints")["README.md"].decode()
    before, section, after = re.split("### LayUp|### Framework versions", card)
    assert "- num_devices: 2\n" in before
    assert "- training_steps: 9\n" in before
    assert "- workers: 2\n" in section
    assert "- blocks: 3," in section
    assert "offers to 1 of 1 peers per block and step, `shared` windows" in section
    steps = re.search(r"steps by worker: (\d+)/(\d+) \(\d+/\d+ %\)", section)
    assert int(steps[1]) + int(steps[2]) == 18
    assert float(re.search(r"consensus distance at the end: (\S+)", section)[1]) > 0
    assert "- Transformers" in after


def test_a_checkpoint_in_the_background_is_pushed_when_it_is_complete(hub, strategies):
    results = strategies[0]["background"]
    saved = [text for message in IN_PROGRESS for text in (message, f"{message}, checkpoint")]
    assert sorted(messages(hub, "tester/background")) == sorted(messages(hub, "tester/all_checkpoints"))
    assert set(saved) >= set(messages(hub, "tester/background")) - {"End of training"}
    assert results[0]["pushes"][:3] == [3, 6, 9]
    assert_like_the_checkpoint(hub, "tester/background", results, (3, 6, 9))
    assert results[0]["left"] == []
    assert results[0]["downloaded_is_model"]


# ---- A slow Hub ----


def test_training_goes_on_while_an_upload_takes_its_time(hub, strategies):
    """Steps are made, and all workers meet to save at step 6, between the beginning and the end of an upload."""
    times = strategies[0]["held"][0]["times"]
    uploads = [(begin, end) for begin, end, method, _, _ in hub.log if method == "PUT" and begin > times["3"]]
    begin, end = uploads[0]
    assert begin < times["5"] < times["6"] < times["7"] < times["8"] < end


def test_every_commit_holds_one_step_whatever_training_writes_meanwhile(hub, strategies):
    saved = strategies[0]["held"][0]["saved"]
    history = {commit["message"]: commit for commit in hub.history("tester/held")}
    for step in (3, 6, 9):
        assert weights_in(history[f"Training in progress, step {step}"]) == saved[str(step)]
    assert_like_the_checkpoint(
        hub, "tester/held", strategies[0]["held"], (3, 6, 9)
    )  # two had been deleted before the upload
    assert len(set(saved.values())) == 3


def test_a_save_during_a_push_is_not_pushed_without_hub_always_push(hub, strategies):
    assert messages(hub, "tester/skipped")[0] == IN_PROGRESS[0]
    assert IN_PROGRESS[1] not in messages(hub, "tester/skipped")
    assert strategies[0]["skipped"][0]["downloaded_is_model"]


# ---- A Hub that fails ----


@pytest.fixture(scope="module")
def failures(hub, tmp_path_factory):
    everything = [*ALWAYS, "--hub_strategy=all_checkpoints"]
    alone = [*everything, "--final_push=not"]
    cases = {
        "error": [*alone, fault(match="/preupload/", status=500)],
        "dropped": [*alone, fault(match="PUT", drop=True)],
        "dropped_commit": [*alone, fault(match="/commit/", drop=True), "--save_total_limit=1"],
        "unauthorized": [*alone, fault(status=401)],
        "forbidden": [*alone, fault(match="/commit/", status=403)],
        "down_at_first": [*alone, faults(step_0=[{"status": 503}], step_5=[])],
        "last": [*alone, faults(step_8=[{"match": "/commit/", "status": 500, "times": 1}])],
        "late": [*everything, faults(step_2=[{"match": "/commit/", "status": 500, "times": 4}])],
        "never": [*ALWAYS, "--hub_strategy=checkpoint", faults(step_0=[{"status": 403}])],
        "future": ["--hub_strategy=end", "--save_strategy=no", "--final_push=future"],
    }
    cases["future"] += ["--hub_model_id=team/named", "--hub_revision=draft", "--hub_private_repo=True"]
    return push_from(hub, tmp_path_factory.mktemp("failures"), 2, cases)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("error", "500 Internal Server Error"),
        ("dropped", "(Server disconnected without sending a response.)"),
        ("dropped_commit", "RemoteProtocolError"),
        ("unauthorized", "401 Unauthorized"),
        ("forbidden", "403 Forbidden"),
        ("down_at_first", "503 Service Unavailable"),
    ],
)
def test_a_failed_push_is_reported_and_the_next_one_brings_everything(hub, failures, name, error):
    results, output = failures
    repo = name if name == "down_at_first" else f"tester/{name}"  # whose it is, the Hub has not said then
    warnings = [line for line in output.splitlines() if f"could not be pushed to {repo} " in line]
    assert len(warnings) == 1
    assert "has been deleted" not in output  # the next push comes before old checkpoints are deleted
    assert "(Training in progress, step 3)" in warnings[0]
    assert error in warnings[0]
    assert f"safe on disk, in {results[name][0]['output_dir']}/checkpoint-3." in warnings[0]
    assert ("check that `hub_token`" in warnings[0]) == (name in ("unauthorized", "forbidden"))
    assert_like_the_checkpoint(hub, f"tester/{name}", results[name], (3, 6, 9))
    assert messages(hub, f"tester/{name}")[:3] == [
        IN_PROGRESS[1],
        f"{IN_PROGRESS[1]}, checkpoint",
        f"{IN_PROGRESS[0]}, checkpoint",
    ]
    assert len(results[name][1]["times"]) == 9
    assert results[name][0]["downloaded_is_model"]
    assert results[name][0]["left"] == []


def test_a_repository_that_could_not_be_created_is_created_later(hub, failures):
    _, output = failures
    assert "The repository down_at_first cannot be created" in output
    assert "The repository never cannot be created" in output


def test_what_the_last_push_does_not_bring_is_tried_once_more(hub, failures):
    results, output = failures
    assert "could not be pushed to tester/last (Training in progress, step 9)" in output
    assert_like_the_checkpoint(hub, "tester/last", results["last"], (3, 6, 9))
    assert results["last"][0]["downloaded_is_model"]


def test_push_to_hub_brings_what_all_pushes_of_training_did_not(hub, failures):
    """Four commits fail: those of three saves, and the one of the second try at the end."""
    results, output = failures
    assert output.count("could not be pushed to tester/late ") == 4
    assert messages(hub, "tester/late")[0] == "End of training"
    assert_like_the_checkpoint(hub, "tester/late", results["late"], (3, 6, 9))


def test_push_to_hub_without_waiting_gives_a_future(hub, failures):
    """Here with a repository, a revision and a visibility of one's own."""
    assert failures[0]["future"][0]["pushed"] == hub.resolve("team/named", "draft")
    assert set(hub.files("team/named", "draft")) == FILES | {"README.md"}
    assert hub.files("team/named", "main") == {}
    assert hub.visibility["team/named"] == "private"
    assert hub.visibility["tester/last"] is None
    assert failures[0]["future"][0]["downloaded_is_model"]
    assert failures[0]["future"][0]["left"] == []


def test_a_push_to_hub_that_fails_raises_and_everything_is_on_disk(hub, failures):
    result = failures[0]["never"][0]
    assert "403 Forbidden" in result["error"]
    assert f"The model is saved in {result['output_dir']}. Call push_to_hub() again" in result["error"]
    assert len(result["times"]) == 9
    assert not hub.exists("tester/never")
    assert FILES | {"README.md"} <= set(os.listdir(result["output_dir"]))
    assert set(os.listdir(f"{result['output_dir']}/checkpoint-9")) == CHECKPOINT
    assert result["left"] == []


# ---- Other numbers of workers ----


def test_four_workers(hub, tmp_path):
    results, _ = push_from(hub, tmp_path, 4, {"four": [*ALWAYS, "--hub_strategy=checkpoint", "--peers_per_step=2"]})
    assert results["four"][0]["downloaded_is_model"]
    files = hub.files("tester/four")
    assert {f"last-checkpoint/rng_state_{rank}.pth" for rank in range(4)} <= set(files)
    card = files["README.md"].decode()
    assert "- workers: 4\n" in card
    assert "offers to 2 of 3 peers per block and step" in card


def test_one_worker(hub, tmp_path):
    """Without a launcher."""
    options = [*ALWAYS, "--hub_strategy=every_save", f"--output_dir={tmp_path}/one"]
    variables = {**os.environ, **environment(hub, tmp_path), "LAYUP_TEST_RESULTS": str(tmp_path)}
    variables["PYTHONPATH"] = f"{ROOT}:{SCRIPTS.parent}"
    command = [sys.executable, str(SCRIPTS / "hub.py"), *options]
    done = subprocess.run(command, env=variables, timeout=120, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    assert json.loads((tmp_path / "result-0.json").read_text())[0]["downloaded_is_model"]
    assert messages(hub, "tester/one") == [*IN_PROGRESS, "End of training"]
    assert "by one worker: plain training, nothing was exchanged.\n" in hub.files("tester/one")["README.md"].decode()


# ---- One process, no server ----


def trainer_for(tmp_path, model, **options):
    args = LayupConfig(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", max_steps=1, **options)
    return LayupTrainer(model=model, args=args, train_dataset=[{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8)


@pytest.mark.parametrize("make", [gpt2, lora_llama])
def test_a_card_has_one_section_however_often_it_is_made(tmp_path, make):
    trainer = trainer_for(tmp_path, make())
    trainer.train()
    trainer.save_model()  # with PEFT, its own card is there first
    for _ in range(2):
        trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.content.count("### LayUp\n") == 1
    assert card.content.index("### Training hyperparameters") < card.content.index("### LayUp")
    assert card.content.index("### LayUp") < card.content.index("### Framework versions")
    assert card.data.library_name == ("transformers" if make is gpt2 else "peft")


def test_without_training_the_card_says_nothing_about_workers(tmp_path):
    trainer = trainer_for(tmp_path, gpt2())
    trainer.create_model_card()
    assert "LayUp" not in (tmp_path / "out" / "README.md").read_text()


def test_a_card_without_a_list_of_versions_gets_the_section_at_its_end():
    card = add_to_card("# A model\n\nText.", RunFacts(2, 5, 1, "shared", (3, 1), 0.01234, True, True))
    assert card.startswith("# A model\n\nText.\n\n### LayUp\n\n")
    assert "- the optimizer's second moment: that of the mean gradient of the workers on a host\n" in card
    assert "- the optimizer stepped by Nesterov's momentum\n" in card
    assert card.endswith("- consensus distance at the end: 1.23e-02\n- steps by worker: 3/1 (75/25 %)\n\n")


def test_a_hub_that_cannot_be_reached_does_not_keep_anybody_from_training(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(layup_hf.trainer.hub.logger, "warning", warnings.append)
    trainer_for(tmp_path, gpt2(), push_to_hub=True, save_strategy="no").train()
    assert len(warnings) == 1
    assert warnings[0].startswith("The repository out cannot be created: OfflineModeIsEnabled: ")


def test_a_name_that_no_repository_can_have_is_an_error_at_once(tmp_path):
    with pytest.raises(HFValidationError):
        trainer_for(tmp_path, gpt2(), push_to_hub=True, hub_model_id="not/a/name")


@pytest.mark.parametrize("links", [True, False])
def test_a_snapshot_stays_as_it_is(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    trainer = trainer_for(tmp_path, gpt2(), save_strategy="steps", save_steps=1)
    trainer.train()
    out, checkpoint = tmp_path / "out", tmp_path / "out" / "checkpoint-1"
    (out / "_private").write_text("not for the Hub")
    (out / "notes.txt").write_text("for the Hub")
    (checkpoint / "notes.txt").write_text("another file")
    shutil.copy(checkpoint / "model.safetensors", out)
    patterns = {"ignore_patterns": ["_*", "checkpoint-*"]}
    with (
        Upload(out, checkpoint, patterns).snapshot(str(out)) as model,
        Upload(checkpoint, checkpoint, {}).snapshot(str(out)) as whole,
    ):
        assert set(os.listdir(model)) == {"model.safetensors", "notes.txt"}
        assert (Path(model) / "notes.txt").read_text() == "for the Hub"
        for file in ("model.safetensors", "optimizer.pt"):
            assert (Path(whole) / file).samefile(checkpoint / file) == links
        before = {path: path.read_bytes() for folder in (model, whole) for path in Path(folder).iterdir()}
        assert {path.name for path in before} >= {"optimizer.pt", "trainer_state.json", "rng_state.pth"}
        trainer.optimizer.param_groups[0]["lr"] = 7.0
        trainer.model.transformer.wte.weight.data.zero_()
        trainer._save_checkpoint(trainer.model, None)  # the same step once more
        shutil.copy(checkpoint / "model.safetensors", out)
        shutil.rmtree(checkpoint)
        assert {path: path.read_bytes() for path in before} == before
    assert list(out.glob("_push-*")) == []


def refuse(*args):
    raise OSError("no links here")


def test_a_snapshot_that_cannot_be_made_is_reported(tmp_path, monkeypatch):
    trainer, warnings = trainer_for(tmp_path, gpt2()), []
    monkeypatch.setattr(shutil, "copy", refuse)
    monkeypatch.setattr(layup_hf.trainer.hub.logger, "warning", warnings.append)
    (tmp_path / "out" / "config.json").write_text("{}")
    job = trainer.layup.hub.start(Upload(tmp_path / "out", None, {"commit_message": "A save"}))
    assert isinstance(job.exception(), OSError)
    assert "The model could not be pushed to out (A save): OSError: no links here." in warnings[0]
    assert list(trainer.layup.hub.missed) == [""]


def test_a_checkpoint_that_is_gone_is_not_waited_for(tmp_path, monkeypatch):
    trainer, warnings = trainer_for(tmp_path, gpt2()), []
    monkeypatch.setattr(layup_hf.trainer.hub.logger, "warning", warnings.append)
    gone = tmp_path / "out" / "checkpoint-3"
    trainer.layup.hub.missed["checkpoint-3"] = Upload(gone, gone, {"path_in_repo": "checkpoint-3"})
    assert trainer.layup.hub.start_missed() == []
    assert trainer.layup.hub.missed == {}
    assert warnings[0].startswith(f"{gone} has been deleted before it could be pushed to out.")
