"""GOVERNANCE.md against what is signed: the text may not say what no machine, and no policy, does.

    text -> Charter(clauses, quotes, annexes) -> findings, coverage

A clause has an id and a line ``enforced-by``. What it cites must exist, what it quotes must be what
the signed policy says, and every end value of the policy and every rule must stand in some clause:
a number that nobody explains is as suspect as a promise that nobody keeps. Pure: whoever calls has
read the files. Grammar: protocols/spec/policy.md, section 7.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from policies.consortium import ConsortiumPolicy
from policies.decision import Refused
from policies.overrides import Override, check_override_terms
from policies.policy_words import KEYS
from protocols.decimals import read_decimal
from protocols.errors import FederationError
from protocols.governance.documents import Admins, Members, parse_time

CHAPTERS: Final = (
    "Purpose", "Members", "Bodies", "Decisions", "Keys and ceremonies", "Rounds",
    "Privacy budgets", "Data", "Models", "Log and witnesses", "Audit", "Emergency and overrides",
    "Incidents", "Resources", "Conflict of interest", "Disputes", "Amendments", "Language",
)  # fmt: skip
EXPIRES_SOON: Final = timedelta(days=14)
MACHINE: Final = ("cedar", "rule", "test", "code")
_CLAUSE: Final = re.compile(r"^### (GOV-[A-Z]{3}-[0-9]{2}) (.+) \{#(\S+)\}$")
_ENFORCED: Final = "> enforced-by: "
_MEANS: Final = re.compile(
    r"(policy|cedar|rule|test|code):(\S+(?: \S+)*)|(human) \(([^)]+)\)|(nothing yet) \(([^)]+)\)"
)
_QUOTE: Final = re.compile(r"\{\{policy:(/[^=}]+)=([^}]*)\}\}")
_ANNEX: Final = re.compile(
    r"<!-- (roster|thresholds): generated -->\n(.*?)<!-- end -->", flags=re.DOTALL
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """One thing that makes a clause true."""

    kind: str  # policy | cedar | rule | test | code | human | nothing yet
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Clause:
    """One rule of the charter."""

    id: str
    title: str
    chapter: str
    text: str
    means: tuple[Means, ...]

    @property
    def by_machine(self) -> bool:
        """Whether a program holds it, at least in part."""
        return any(item.kind in MACHINE for item in self.means)


@dataclass(frozen=True, slots=True, kw_only=True)
class Charter:
    """The text, parsed."""

    front: Mapping[str, str]
    chapters: tuple[str, ...]
    clauses: tuple[Clause, ...]
    quotes: tuple[tuple[str, str], ...]  # pointer, value as it is written
    annexes: Mapping[str, str]  # generated parts by name
    problems: tuple[Finding, ...]  # of its form


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One drift."""

    code: str  # stable
    where: str  # clause, pointer or document
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of the charter machines hold."""

    clauses: int
    machine: int  # at least in part
    human_only: int
    nothing_yet: int  # clauses that lack something they say they need

    def __str__(self) -> str:
        share = 100 * self.machine // max(1, self.clauses)
        return (
            f"{self.machine} of {self.clauses} clauses ({share} %) are enforced by machines, at"
            f" least in part; {self.human_only} by people alone; {self.nothing_yet} name something"
            " that is still missing"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """What the charter is compared with."""

    policy: ConsortiumPolicy
    members: Members
    admins: Admins
    cedar: frozenset[str]  # ids of the consortium's rules
    rules: frozenset[str]  # ids of the rules in code
    exists: Callable[[str, str], bool]  # path, name of a test or "": whether it is there
    now: datetime  # UTC
    overrides: Sequence[Override] = ()
    expires: Mapping[str, datetime] = field(default_factory=dict)  # of roles of the repository
    threshold: int | None = None  # of the root that is in force; None: no repository was given
    keys: int | None = None  # admin keys in that root
    text_digest: str | None = None  # SHA-256 of the text that is signed; None: not asked
    own_digest: str = ""  # of this text


# -- reading ---------------------------------------------------------------------------------------


def parse_charter(text: str) -> Charter:
    """Read the text; what is wrong with its form is among ``problems``, nothing is raised."""
    problems: list[Finding] = []
    front, body = _front(text, problems)
    chapters: list[str] = []
    clauses: list[Clause] = []
    blocks = re.split(r"^(?=#{2,3} )", body, flags=re.MULTILINE)
    for block in blocks:
        heading, _, rest = block.partition("\n")
        if match := re.match(r"^## ([0-9]+)\. (.+)$", heading):
            chapters.append(match[2])
            if match[1] != str(len(chapters)):
                problems.append(_bad("form.chapters", heading, "chapters are counted from 1"))
        elif heading.startswith("### "):
            clause = _clause(heading, rest, chapters[-1] if chapters else "", problems)
            if clause is not None:
                if any(clause.id == other.id for other in clauses):
                    problems.append(_bad("form.clause", clause.id, "the id stands twice"))
                clauses.append(clause)
    return Charter(
        front=front,
        chapters=tuple(chapters),
        clauses=tuple(clauses),
        quotes=tuple((match[1], match[2]) for match in _QUOTE.finditer(body)),
        annexes={match[1]: match[2] for match in _ANNEX.finditer(body)},
        problems=tuple(problems),
    )


def _bad(code: str, where: str, sentence: str) -> Finding:
    return Finding(code=code, where=where, sentence=sentence)


def _front(text: str, problems: list[Finding]) -> tuple[dict[str, str], str]:
    match = re.match(r"---\n((?:[\w-]+: .*\n)*)---\n", text)
    if match is None:
        problems.append(_bad("form.front", "front matter", "the text begins without its header"))
        return {}, text
    lines = [line.partition(": ") for line in match[1].split("\n")[:-1]]
    front = {key: value.strip() for key, _, value in lines}
    if front.get("minga-governance") != "1":
        problems.append(_bad("form.front", "minga-governance", "must be 1"))
    return front, text[match.end() :]


def _clause(heading: str, rest: str, chapter: str, problems: list[Finding]) -> Clause | None:
    match = _CLAUSE.match(heading)
    if match is None or match[1] != match[3]:
        problems.append(_bad("form.clause", heading, "no id, or two different ones"))
        return None
    lines = [line for line in rest.split("\n") if line.startswith(_ENFORCED)]
    if len(lines) != 1:
        problems.append(_bad("clause.unenforced", match[1], "must say once what enforces it"))
        return Clause(id=match[1], title=match[2], chapter=chapter, text=rest, means=())
    means = []
    for said in lines[0].removeprefix(_ENFORCED).split("; "):
        found = _MEANS.fullmatch(said)
        if found is None:
            problems.append(_bad("clause.means", match[1], f"{said!r:.100} is no known means"))
            continue
        kind = found[1] or found[3] or found[5]
        means.append(Means(kind=kind, what=found[2] or found[4] or found[6]))
    text = "\n".join(line for line in rest.split("\n") if not line.startswith("> "))
    return Clause(
        id=match[1], title=match[2], chapter=chapter, text=text.strip(), means=tuple(means)
    )


def coverage(charter: Charter) -> Coverage:
    """Count who holds the clauses."""
    machine = [clause for clause in charter.clauses if clause.by_machine]
    missing = [c for c in charter.clauses if any(m.kind == "nothing yet" for m in c.means)]
    human = [
        c for c in charter.clauses if not c.by_machine and any(m.kind == "human" for m in c.means)
    ]
    return Coverage(
        clauses=len(charter.clauses),
        machine=len(machine),
        human_only=len(human),
        nothing_yet=len(missing),
    )


# -- comparing -------------------------------------------------------------------------------------

_ABSENT: Final = object()


def at_pointer(value: Any, pointer: str) -> Any:
    """The value at a JSON pointer; ``LookupError`` where there is none."""
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list):
            index = read_decimal(name, most=len(value))
            value = value[index] if index is not None and index < len(value) else _ABSENT
        elif isinstance(value, dict):
            value = value.get(name, _ABSENT)
        else:
            value = _ABSENT
        if value is _ABSENT:
            raise LookupError(pointer)
    return value


def written(value: Any) -> str:
    """How a value is quoted: a word as it is, everything else as compact JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def end_values(value: Any, pointer: str = "") -> Iterator[str]:
    """Pointers of all end values; lists of words and numbers are one value, entries are not."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from end_values(inner, f"{pointer}/{key}")
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, inner in enumerate(value):
            yield from end_values(inner, f"{pointer}/{number}")
    else:
        yield pointer


def check_charter(
    charter: Charter, signed: Signed, translations: Mapping[str, Charter] | None = None
) -> list[Finding]:
    """Every drift between the text and what is signed; none: they agree."""
    found = list(charter.problems)
    if charter.chapters != CHAPTERS:
        found.append(_bad("form.chapters", "chapters", "not the chapters of a charter, in order"))
    found += _front_matter(charter, signed.policy)
    cited, covered = _cited(charter, signed, found)
    found += _quotes(charter, signed.policy)
    cited |= {pointer for pointer, _ in charter.quotes}
    for pointer in end_values(signed.policy.to_value()):
        if pointer not in cited and not any(pointer.startswith(f"{p}/") for p in covered):
            found.append(
                _bad("policy.unexplained", pointer, "no clause cites this value of the policy")
            )
    said = {means.what for c in charter.clauses for means in c.means if means.kind == "cedar"}
    for rule in sorted(signed.cedar - said):
        found.append(_bad("cedar.unexplained", rule, "no clause cites this rule"))
    found += _annexes(charter, signed)
    found += _people(signed)
    found += _repository(signed)
    for override in signed.overrides:
        answer = check_override_terms(override, signed.policy)
        if isinstance(answer, Refused):
            found.append(_bad(answer.first.rule, override.path, answer.first.reason))
    for name, other in (translations or {}).items():
        found += _translation(name, charter, other)
    return found


def _front_matter(charter: Charter, policy: ConsortiumPolicy) -> Iterator[Finding]:
    said = charter.front.get("policy_version", "")
    if said != str(policy.policy_version):
        yield _bad(
            "front.version",
            "policy_version",
            f"the text is for policy {said or 'none'}, signed is {policy.policy_version}",
        )


def _cited(charter: Charter, signed: Signed, found: list[Finding]) -> tuple[set[str], set[str]]:
    """Pointers that clauses cite with a value, and those whose whole entries they cite."""
    value = signed.policy.to_value()
    cited: set[str] = set()
    covered: set[str] = set()
    for clause in charter.clauses:
        for means in clause.means:
            match means.kind:
                case "policy":
                    pointer, equals, said = means.what.partition("=")
                    if equals:
                        cited.add(pointer)
                        found += _compare(value, pointer, said, clause.id)
                    else:
                        covered.add(pointer)
                        found += _is_list_of_entries(value, pointer, clause.id)
                case "cedar" if means.what not in signed.cedar:
                    found.append(_bad("clause.cedar", clause.id, f"no rule {means.what}"))
                case "rule" if means.what not in signed.rules:
                    found.append(_bad("clause.rule", clause.id, f"no rule {means.what} in code"))
                case "test":
                    path, _, name = means.what.partition("::")
                    if not name or not signed.exists(path, name):
                        found.append(_bad("clause.test", clause.id, f"no test {means.what}"))
                case "code" if not signed.exists(means.what, ""):
                    found.append(_bad("clause.code", clause.id, f"no file {means.what}"))
                case _:
                    pass
    return cited, covered


def _compare(value: Any, pointer: str, said: str, where: str) -> Iterator[Finding]:
    try:
        real = at_pointer(value, pointer)
    except LookupError:
        yield _bad("policy.pointer", where, f"the policy has no {pointer}")
        return
    if written(real) != said:
        yield _bad("policy.value", where, f"{pointer} is {written(real)}, the text says {said}")


def _is_list_of_entries(value: Any, pointer: str, where: str) -> Iterator[Finding]:
    path = pointer.strip("/").replace("/", ".")
    try:
        at_pointer(value, pointer)
    except LookupError:
        yield _bad("policy.pointer", where, f"the policy has no {pointer}")
        return
    if path not in KEYS:
        yield _bad("policy.value", where, f"{pointer} is cited without its value")


def _quotes(charter: Charter, policy: ConsortiumPolicy) -> Iterator[Finding]:
    value = policy.to_value()
    for pointer, said in charter.quotes:
        yield from _compare(value, pointer, said, "a quotation")


def _annexes(charter: Charter, signed: Signed) -> Iterator[Finding]:
    for name, real in (
        ("roster", roster_text(signed.members)),
        ("thresholds", thresholds_text(signed.policy)),
    ):
        if charter.annexes.get(name) != real:
            yield _bad(
                f"annex.{name}",
                f"annex {name}",
                "differs from what is signed: `minga governance check --write` writes it anew",
            )


def _people(signed: Signed) -> Iterator[Finding]:
    admins, rules = signed.admins, signed.policy.governance.admins
    try:
        admins.check_duties()
    except FederationError as error:
        yield _bad("people.duties", "admins.json", str(error))
    for person in admins.people:
        if parse_time(person.term_until) <= signed.now:
            yield _bad("people.term", person.id, f"the term ended at {person.term_until}")
    count = len(admins.admins())
    if count != rules.n or admins.threshold != rules.threshold:
        yield _bad(
            "people.threshold",
            "admins.json",
            f"{admins.threshold} of {count} admins; the policy says {rules.threshold} of {rules.n}",
        )
    if admins.min_countries != rules.min_countries:
        yield _bad("people.threshold", "admins.json", "min_countries is not the policy's")
    known = {item.id for item in signed.members.institutions if item.status == "active"}
    for person in admins.admins():
        if person.institution not in known:
            yield _bad("people.member", person.id, f"{person.institution} is no active member")
    approvers = {person.id: person.institution for person in admins.admins()}
    for code in signed.policy.code.allowed:
        seats = {approvers[name] for name in code.approved_by if name in approvers}
        need = signed.policy.governance.decisions.code_approvers
        if len(seats) < need:
            yield _bad(
                "people.approvers",
                code.image,
                f"approved for {len(seats)} institutions of admins, {need} must",
            )


def _repository(signed: Signed) -> Iterator[Finding]:
    rules = signed.policy.governance.admins
    if signed.threshold is not None and (signed.threshold, signed.keys) != (
        rules.threshold,
        rules.n,
    ):
        yield _bad(
            "repository.threshold",
            "root",
            f"the root asks for {signed.threshold} of {signed.keys} keys, the policy for"
            f" {rules.threshold} of {rules.n}",
        )
    for role, at in sorted(signed.expires.items()):
        if at - signed.now < EXPIRES_SOON and role not in ("snapshot", "timestamp", "emergency"):
            yield _bad("repository.expires", role, f"expires {at:%Y-%m-%d}: sign it again")
    if signed.text_digest is not None and signed.text_digest != signed.own_digest:
        yield _bad("repository.text", "governance/GOVERNANCE.md", "another text is signed, or none")


def _translation(name: str, charter: Charter, other: Charter) -> Iterator[Finding]:
    ids, others = [c.id for c in charter.clauses], [c.id for c in other.clauses]
    if ids != others:
        missing = sorted(set(ids) ^ set(others))
        yield _bad("translation.clauses", name, f"other clauses: {', '.join(missing) or 'order'}")
    if sorted(charter.quotes) != sorted(other.quotes):
        yield _bad("translation.quotes", name, "quotes other values")


# -- generated annexes -----------------------------------------------------------------------------


def roster_text(members: Members) -> str:
    """Annex A: who is a member, by country."""
    lines = ["| country | institutions |", "|---|---|"]
    by_country: dict[str, list[str]] = {}
    for item in members.institutions:
        mark = "" if item.status == "active" else f" ({item.status})"
        by_country.setdefault(item.country, []).append(f"{item.id}{mark}")
    lines += [f"| {country} | {' '.join(by_country[country])} |" for country in sorted(by_country)]
    active = len(members.active())
    lines += ["", f"{active} active members in {len(by_country)} countries."]
    return "\n".join(lines) + "\n"


def thresholds_text(policy: ConsortiumPolicy) -> str:
    """Annex B: how many must sign for what."""
    rules, table = policy.governance, policy.governance.decisions
    of = f"of {rules.admins.n} admins"
    rows = [
        ("ordinary signatures of root, targets, policy, membership, plans", rules.admins.threshold),
        ("admit a member", table.admit),
        ("suspend at once, for a while", rules.emergency.threshold),
        ("keep a suspension", table.suspend),
        ("expel a member, after it was heard", table.expel),
        ("change the policy", table.policy),
        ("change the root", table.root),
        ("grant an override", rules.override.threshold),
        ("raise a privacy budget, and the institution itself", table.budget_increase),
        ("change how the federation is governed", table.amendment),
    ]
    lines = ["| decision | signatures |", "|---|---|"]
    lines += [f"| {what} | {count} {of} |" for what, count in rows]
    board = rules.release_board
    lines.append(f"| release a model | {board.threshold} of {board.n} of the release board |")
    lines.append(f"| approve code | {table.code_approvers} people of different institutions |")
    return "\n".join(lines) + "\n"


def with_annexes(text: str, members: Members, policy: ConsortiumPolicy) -> str:
    """The text with its generated parts written anew."""
    parts = {"roster": roster_text(members), "thresholds": thresholds_text(policy)}

    def write(match: re.Match[str]) -> str:
        return f"<!-- {match[1]}: generated -->\n{parts[match[1]]}<!-- end -->"

    return _ANNEX.sub(write, text)
