"""What is known of torch's AdamW."""

import pytest
import torch
from torch import nn

from layup_hf.optim.adam import is_plain_adam


@pytest.mark.parametrize(
    ("optimizer", "options", "is_plain"),
    [
        (torch.optim.AdamW, {}, True),
        (torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.8, 0.99)}, True),
        (torch.optim.Adam, {"betas": (0.8, 0.99)}, True),
        (torch.optim.Adam, {"weight_decay": 0.1}, False),
        (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, True),
        (torch.optim.AdamW, {"maximize": True}, False),
        (torch.optim.AdamW, {"amsgrad": True}, False),
        (torch.optim.AdamW, {"betas": (0.0, 0.99)}, False),
        (torch.optim.AdamW, {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": False}, False),
        (torch.optim.SGD, {"lr": 0.1}, False),
        (torch.optim.NAdam, {}, False),
    ],
)
def test_which_optimizers_are(optimizer, options, is_plain):
    assert is_plain_adam(optimizer(nn.Linear(2, 2).parameters(), **options)) == is_plain


def test_groups_with_different_betas_are_not():
    first, second = nn.Linear(2, 2).parameters()
    groups = [{"params": [first]}, {"params": [second], "betas": (0.5, 0.9)}]
    assert not is_plain_adam(torch.optim.AdamW(groups))
