"""One coordinator for the attacks of a module; every attack has a run of its own on it."""

from __future__ import annotations

import pytest

from tests.support.hostile import hostile


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    with hostile(tmp_path_factory.mktemp("door")) as found:
        yield found
