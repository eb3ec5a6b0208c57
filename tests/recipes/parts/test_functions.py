"""Functions to finish: which ones, what they begin with, and what is rewarded."""

import ast

import pytest
from parts.functions import LONGEST, functions, reward_of, share_written

SOURCE = '''
class Kind:
    @property
    def plain(self):
        """Say something."""

    def add(self, a, *others, b=1):
        """Add them."""
        return a + b


def nothing():
    pass


def long(argument):
    return [{numbers}]
'''.format(numbers=", ".join(map(str, range(LONGEST))))


def test_functions_are_short_have_an_argument_and_lose_their_docstrings(tmp_path):
    for number in range(40):
        (tmp_path / f"file{number}.py").write_text(SOURCE)
    train, held_out = (list(functions(str(tmp_path), part)) for part in (False, True))
    assert len(train) + len(held_out) == 80
    assert len(train) > len(held_out) > 0
    assert {row["text"] for row in train} == {
        "def plain(self):\n    pass",
        "def add(self, a, *others, b=1):\n    return a + b",
    }
    for row in train:
        assert row["prompt"] == row["text"].splitlines()[0]
        assert isinstance(ast.parse(row["text"]).body[0], ast.FunctionDef)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("def f(a):\n    b = a\n    c = a\n    d = a\n    return b", 1.0),
        ("def f(a):\n    b = a\n    c = a\n    d = a\n    e = a\n    return b", 1.0),
        ("def f(a):\n    b = a\n    b = a\n    b  =  a", 0.25),
        ("def f(a):\n    if a:\n        b = a\n    pass", 0.5),
        ("def f(a):\n    pass", 0.0),
        ("def f(a):\n    return a\nf(1)", 0.0),  # more than a function
        ("def f(a):\n    return (a", 0.0),
        ("def f(a):", 0.0),
        ("a = 1", 0.0),
        ("def f(a):\n    return '\0'", 0.0),
    ],
)
def test_the_reward_is_by_how_many_different_statements_there_are(text, share):
    assert share_written(text) == pytest.approx(share)


def test_a_completion_that_has_not_come_to_its_end_earns_nothing():
    reward = reward_of(end=7)
    completions = ["\n    return a", "\n    return a", ""]
    prompts = ["def f(a):"] * 3
    assert reward(prompts, completions, completion_ids=[[1, 7], [1, 2], []], other=1) == [0.25, 0.0, 0.0]
