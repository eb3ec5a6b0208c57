"""What recipes make of their options."""

from types import SimpleNamespace

import pytest
from parts.training import checkpoint_of


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ("True", True),
        ("true", True),
        ("False", None),
        (True, True),
        ("out/checkpoint-2", "out/checkpoint-2"),
    ],
)
def test_a_checkpoint_is_a_path_or_the_last_one(given, expected):
    assert checkpoint_of(SimpleNamespace(resume_from_checkpoint=given)) == expected
