"""What tools say about the code: style, format, types, and what a user's type checker says of a mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("command", [("ruff", "check"), ("ruff", "format", "--check")], ids=" ".join)
def test_the_code_is_clean(command):
    code, output = run(*command)
    assert code == 0, output


SCRIPT = """\
from layup_hf import LayupConfig, LayupTrainer

args = LayupConfig(output_dir="out", peers_per_stp=2)
trainer = LayupTrainer(modle=None, args=args)
trainer.train(resume_form_checkpoint=True)
trainer.trian()
LayupTrainer(model=None, args=args).train(resume_from_checkpoint=True)
"""


def test_types_are_right_and_a_users_checker_sees_what_is_misspelt(tmp_path):
    """Both in one run: most of its time goes into reading the libraries."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    code, output = run("mypy", "layup_hf", str(script))
    errors = [line for line in output.splitlines() if ": error:" in line]
    assert [line for line in errors if script.name not in line] == []
    for line, misspelt in zip(errors, ["peers_per_stp", "modle", "resume_form_checkpoint", "trian"], strict=True):
        assert misspelt in line
    assert code == 1
