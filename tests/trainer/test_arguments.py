"""The table of arguments in the documents: complete, without strangers, and true about what is refused."""

import re
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from accelerate.parallelism_config import ParallelismConfig
from transformers import TrainingArguments

from layup_hf.config import LayupConfig, LayupOptions
from layup_hf.trainer.checks import _REFUSED

PAGE = Path(__file__).parents[2] / "docs/training-arguments.md"
HEADING = "# Every training argument"
EFFECTS = {"same", "by the clock", "different", "refused"}


def rows():
    """(names, effect, remarks) of each row of the table."""
    lines = iter(PAGE.read_text(encoding="utf-8").splitlines())
    assert any(line == HEADING for line in lines), f"no section {HEADING!r}"
    table = []
    for line in lines:
        if line.startswith("## "):
            break
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            assert len(cells) == 3, f"not three cells: {line}"
            names, effect, remarks = cells
            table.append((re.findall(r"`([^`]+)`", names), effect.strip("*"), remarks))
    return table[2:]  # after the heading and the line below it


def marked(effect):
    return {name for names, marked_as, _ in rows() for name in names if marked_as == effect}


def names_of(kind):
    return {field.name for field in fields(kind)}


def test_every_argument_is_in_exactly_one_row():
    times = Counter(name for names, _, _ in rows() for name in names)
    assert {name: times[name] for name in names_of(TrainingArguments) if times[name] != 1} == {}


def test_every_name_is_an_argument():
    named = {name for names, _, _ in rows() for name in names}
    assert named - names_of(TrainingArguments) - names_of(LayupOptions) == set()


def test_every_row_says_what_its_arguments_do():
    for names, effect, remarks in rows():
        assert names
        assert effect in EFFECTS, names
        assert remarks or effect == "same", names


# ---- What is refused ----

REFUSED = {
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "fsdp": "full_shard",
    "parallelism_config": ParallelismConfig(),
}


def test_what_is_marked_refused_is_what_is_shown_to_be_refused():
    assert marked("refused") == set(REFUSED)


def test_what_is_refused_whatever_its_value_is_marked_so():
    assert set(_REFUSED) <= marked("refused")


@pytest.mark.parametrize("argument", REFUSED)
def test_what_is_marked_refused_is_refused(argument, tmp_path):
    with pytest.raises(ValueError, match=r"LayUp.* exclude each other"):
        LayupConfig(output_dir=str(tmp_path), use_cpu=True, **{argument: REFUSED[argument]})
