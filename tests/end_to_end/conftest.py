"""Names that no other test uses."""

from __future__ import annotations

import uuid

import pytest


@pytest.fixture
def unique():
    """Makes a name of a prefix and something that nobody else has."""
    return lambda prefix: f"{prefix}-{uuid.uuid4().hex[:8]}"
