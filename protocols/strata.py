"""Which held-out figures a round may open: groups of sites that are never too small.

A site's text lies in one country and in one or more languages; the plan says which, in public. A
round opens the sums of each *stratum*: by language, and by country. Whoever has the sums may add
and subtract them, so it is not enough that each stratum has enough sites: with three sites in
Spanish and one more in Spanish and Guarani, "all" less "Spanish" is one site's Guarani.

    site i, language l        a cell; its language's stratum and its country's both count it
    a combination of sums     gives each cell the factor  a(language stratum) + b(country stratum)
    cells with factor zero    are those whose two strata have opposite numbers

So the cells that a combination depends on hold every cell that crosses some cut of the graph whose
vertices are the strata and whose edges are the cells. All cells of a site share its country: a site
is one hyperedge over its country and its languages. **No combination depends on fewer sites than
the least cut of the hypergraph.** Between parts that no site joins nothing can be subtracted.

    1. while a language stratum, the rest included, has too few sites: the language with the fewest
       joins the rest (ties: the first by name). Then likewise the countries
    2. while the least cut is too small: the country with the fewest sites joins the rest; when no
       country is left, nothing is opened by country

Everybody computes this from the plan. Normative text: protocols/spec/plan.md, section 8.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

OTHER: Final = "other"  # languages that are not opened by themselves
ELSEWHERE: Final = "ZZ"  # countries likewise; ISO 3166 gives this code to nobody

Declared = tuple[str, str, tuple[str, ...]]  # site, country, languages
_Vertex = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Strata:
    """What a round opens, and where each text is counted."""

    languages: Mapping[str, str]  # language -> its stratum
    countries: Mapping[str, str]  # country -> its stratum; empty: nothing is opened by country

    @property
    def names(self) -> tuple[str, ...]:
        """Of all strata: languages ascending, then countries ascending."""
        by_language = tuple(sorted(set(self.languages.values())))
        return by_language + tuple(sorted(set(self.countries.values())))

    def of(self, country: str, language: str) -> tuple[str, ...]:
        """The strata that count a text of a site."""
        if language not in self.languages:
            return ()
        own = self.languages[language]
        return (own, self.countries[country]) if country in self.countries else (own,)


def is_country(stratum: str) -> bool:
    """Whether a stratum is one of countries."""
    return stratum.isupper()


@lru_cache(maxsize=64)
def strata_of(sites: tuple[Declared, ...], need: int) -> Strata:
    """The strata that may be opened.

    Args:
        sites: what each site declares; a site without held-out text is not among them.
        need: sites that every stratum, and everything that follows from several, must depend on.

    Raises:
        ValueError: fewer sites than that: nothing at all may be opened.
    """
    if not 1 <= need <= len(sites):
        raise ValueError(f"a held-out figure of {len(sites)} sites; {need} are needed")
    languages = _merged([set(spoken) for _, _, spoken in sites], need, OTHER)
    countries = _merged([{country} for _, country, _ in sites], need, ELSEWHERE)
    sizes = Counter(country for _, country, _ in sites)
    while set(countries.values()) - {ELSEWHERE}:
        if least_cut(_edges(sites, languages, countries)) >= need:
            return Strata(languages=languages, countries=countries)
        named = [country for country, stratum in countries.items() if stratum != ELSEWHERE]
        countries[min(named, key=lambda name: (sizes[name], name))] = ELSEWHERE
    return Strata(languages=languages, countries={})


def _merged(sites: Sequence[set[str]], need: int, rest: str) -> dict[str, str]:
    """Value -> stratum, such that each stratum has ``need`` sites."""
    sizes = Counter(value for values in sites for value in values)
    stratum = {value: value for value in sorted(sizes)}
    while True:
        groups = Counter(name for values in sites for name in {stratum[value] for value in values})
        named = [value for value, name in stratum.items() if name != rest]
        if not named or min(groups.values()) >= need:
            return stratum
        stratum[min(named, key=lambda value: (sizes[value], value))] = rest


def _edges(
    sites: Iterable[Declared], languages: Mapping[str, str], countries: Mapping[str, str]
) -> list[frozenset[_Vertex]]:
    return [
        frozenset(("language", languages[spoken]) for spoken in known)
        | {("country", countries[country])}
        for _, country, known in sites
    ]


def least_cut(edges: Sequence[frozenset[_Vertex]]) -> int:
    """The fewest hyperedges between two parts of vertices that edges join; all, if none can be cut.

    Source: Klimmek and Wagner, "A simple hypergraph min cut algorithm", 1996: in an order that adds
    the vertex with most edges into what was added, the last vertex by itself is a least cut between
    it and the one before; the two become one, and so on. Done for each connected part.
    """
    least = len(edges)
    for vertices, part in _connected(edges):
        least = min(least, _least_cut_of(vertices, part))
    return least


def _connected(
    edges: Sequence[frozenset[_Vertex]],
) -> list[tuple[set[_Vertex], list[frozenset[_Vertex]]]]:
    parts: list[tuple[set[_Vertex], list[frozenset[_Vertex]]]] = []
    for edge in edges:
        touched = [part for part in parts if part[0] & edge]
        parts = [part for part in parts if not part[0] & edge]
        vertices = set(edge).union(*(part[0] for part in touched))
        parts.append((vertices, [edge, *(e for part in touched for e in part[1])]))
    return parts


def _least_cut_of(vertices: set[_Vertex], edges: Sequence[frozenset[_Vertex]]) -> int:
    name = {vertex: number for number, vertex in enumerate(sorted(vertices))}
    blocks = set(name.values())
    joined = [{name[vertex] for vertex in edge} for edge in edges]
    least = len(edges)
    while len(blocks) > 1:
        added: list[int] = []
        waiting = set(blocks)
        while waiting:
            inside = set(added)
            touching = Counter(v for edge in joined if edge & inside for v in edge & waiting)
            chosen = min(waiting, key=lambda v: (-touching[v], v))
            waiting.remove(chosen)
            added.append(chosen)
        last, before = added[-1], added[-2]
        least = min(least, sum(1 for edge in joined if last in edge and len(edge) > 1))
        blocks.remove(last)
        joined = [{before if v == last else v for v in edge} for edge in joined]
    return least
