"""The simulation can convict: each mistake that is put back is found within so many schedules."""

from __future__ import annotations

import pytest

from tests.simulation.mutants import MUTANTS, Mutant
from tests.simulation.schedules import fails


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.breaks.__name__)
def test_a_mistake_is_found(mutant: Mutant):
    with mutant.breaks():
        found = next(
            (
                why
                for seed in range(mutant.within)
                if (why := fails(mutant.made(seed, mutant.setting)))
            ),
            "",
        )

    assert any(says in found for says in mutant.says), found
