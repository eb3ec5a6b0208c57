"""What tests of the store and of jobs have in common."""

import pytest
from keepers import Keeper


@pytest.fixture(scope="module")
def lasting():
    """One that outlasts a test."""
    keeper = Keeper()
    keeper.store = keeper.connect()
    yield keeper
    keeper.close()
