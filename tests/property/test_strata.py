"""No held-out figure of fewer sites than allowed follows from what a round opens.

The oracle knows nothing of graphs: it writes every opened sum as a row over (site, language) and
asks, for each set of too few sites, whether some combination of rows depends on them alone.
"""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocols.strata import ELSEWHERE, OTHER, Strata, is_country, least_cut, strata_of

COUNTRIES = ("AR", "BO", "BR", "CL", "PE")
LANGUAGES = ("aym", "es", "gn", "pt", "quy")


def sites_of(*rows: str):
    """Rows like ``"AR es gn"``."""
    return tuple(
        (f"site-{number}", row.split()[0], tuple(row.split()[1:]))
        for number, row in enumerate(rows)
    )


def rank(rows: list[list[int]]) -> int:
    """By elimination over the rationals."""
    rows, found = [[Fraction(value) for value in row] for row in rows], 0
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((r for r in range(found, len(rows)) if rows[r][column]), None)
        if pivot is None:
            continue
        rows[found], rows[pivot] = rows[pivot], rows[found]
        for other in range(found + 1, len(rows)):
            factor = rows[other][column] / rows[found][column]
            if factor:
                rows[other] = [
                    a - factor * b for a, b in zip(rows[other], rows[found], strict=True)
                ]
        found += 1
    return found


def fewest(sites, strata: Strata, limit: int) -> int:
    """The fewest sites that a combination of opened sums depends on; ``limit`` if not fewer."""
    cells = [(site, country, spoken) for site, country, known in sites for spoken in known]
    rows = [
        [int(name in strata.of(country, spoken)) for _, country, spoken in cells]
        for name in strata.names
    ]
    whole = rank(rows)
    names = [site for site, _, _ in sites]
    for count in range(1, limit):
        for few in itertools.combinations(names, count):
            others = [n for n, (site, _, _) in enumerate(cells) if site not in few]
            if rank([[row[n] for n in others] for row in rows]) < whole:
                return count
    return limit


declared = st.lists(
    st.tuples(
        st.sampled_from(COUNTRIES), st.sets(st.sampled_from(LANGUAGES), min_size=1, max_size=3)
    ),
    min_size=3,
    max_size=9,
).map(
    lambda found: tuple(
        (f"site-{number}", country, tuple(sorted(known)))
        for number, (country, known) in enumerate(found)
    )
)


@settings(max_examples=25, deadline=None)
@given(declared, st.integers(2, 4))
@example(sites_of("AR es", "AR es", "BO es", "BO es", "BO es gn"), 2)  # one site has all the gn
@example(sites_of("AR es", "AR es pt", "BR pt", "BR pt", "BR pt es"), 2)
@example(sites_of("AR es", "AR es", "AR es gn", "BO es", "BO es", "BO gn", "PE gn"), 2)
def test_nothing_of_fewer_sites_can_be_had_by_subtraction(sites, need):
    need = min(need, len(sites))
    strata = strata_of(sites, need)
    assert fewest(sites, strata, need) == need
    # and every text that was declared is counted: exactly once by language
    for _, country, known in sites:
        for spoken in known:
            names = strata.of(country, spoken)
            assert sum(not is_country(name) for name in names) == 1
            assert len(names) == (2 if strata.countries else 1)


def unmerged(sites) -> Strata:
    """Everything opened as it is."""
    languages = sorted({spoken for _, _, known in sites for spoken in known})
    countries = sorted({country for _, country, _ in sites})
    return Strata(
        languages={name: name for name in languages}, countries={name: name for name in countries}
    )


@settings(max_examples=25, deadline=None)
@given(declared)
def test_the_least_cut_is_what_the_rank_says(sites):
    """On strata that were not merged the two ways of asking give the same number."""
    strata = unmerged(sites)
    edges = [
        frozenset({("country", country)} | {("language", spoken) for spoken in known})
        for _, country, known in sites
    ]
    cut = least_cut(edges)
    assert fewest(sites, strata, len(sites)) == min(cut, len(sites))


def test_enough_sites_in_every_stratum_are_not_enough():
    """Each stratum has three sites, and still their difference is of one: the rule merges."""
    sites = sites_of("AR es", "AR es", "AR es pt", "BR pt", "BR pt", "BR pt", "AR es")
    groups = Counter(name for _, country, known in sites for name in {country, *known})
    assert min(groups.values()) >= 3
    assert fewest(sites, unmerged(sites), 3) == 1
    strata = strata_of(sites, 3)
    assert fewest(sites, strata, 3) == 3
    assert set(strata.languages.values()) == {"es", "pt"}
    assert strata.countries == {}


def test_what_is_opened():
    rows = ["AR es", "AR es", "BR pt", "BR pt", "BR pt", "PE es quy", "PE es quy", "PY es gn"]
    strata = strata_of(sites_of(*rows), 2)
    assert strata.languages == {"es": "es", "gn": OTHER, "pt": "pt", "quy": OTHER}
    assert strata.countries == {"AR": ELSEWHERE, "BR": "BR", "PE": "PE", "PY": ELSEWHERE}
    assert strata.names == ("es", "other", "pt", "BR", "PE", "ZZ")
    assert strata.of("PE", "quy") == ("other", "PE")
    assert strata.of("PE", "fr") == ()  # not declared by anybody: not counted


def test_too_few_sites_open_nothing():
    with pytest.raises(ValueError, match="2 sites; 3 are needed"):
        strata_of(sites_of("AR es", "BR pt"), 3)
