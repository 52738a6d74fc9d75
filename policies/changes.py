"""What a new policy changes, in words, and how many admins must sign that.

    old, new -> Change(sentences, kinds, signatures, consents, notice)

An admin signs sentences, not JSON. Each change has a kind, and the decision table of the policy *in
force* says how many distinct signatures that kind needs: the strictest kind counts, and a change
that nobody classified needs the most. A document cannot lower the bar for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from policies.consortium import EVERYBODY, ConsortiumPolicy
from policies.decision import Decision, Why, from_whys
from policies.document import parse_share, parse_utc
from policies.policy_words import ENTRIES, KEYS, WORDS, leaves, spoken


class Kind(StrEnum):
    """Kinds of a change of policy, by what they need."""

    ROUTINE = "routine"  # the version and its dates
    POLICY = "policy"
    CODE = "code"  # another program may train
    BUDGET_INCREASE = "budget-increase"  # and the institution itself
    AMENDMENT = "amendment"  # of how the federation is governed
    UNCLASSIFIED = "unclassified"


_ROUTINE: Final = frozenset({"policy_version", "valid_from", "expires"})
_POLICY: Final = (
    "log.", "participation.", "rounds.", "secagg.", "privacy.", "updates.", "models.", "data.",
    "jurisdictions.", "resources.", "gates", "evaluators.", "retention.", "audit.", "code.network",
    "code.entrypoints",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One change of one value."""

    path: str  # of the document, without positions
    entry: str  # of a list of objects: which; else empty
    old: Any  # None: was not there
    new: Any  # None: is gone
    kind: Kind
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Everything that a new policy changes."""

    edits: tuple[Edit, ...]
    signatures: int  # distinct admins that must sign the new policy
    consents: tuple[str, ...]  # institutions that must agree themselves; "*": each it concerns
    notice_days: int

    @property
    def sentences(self) -> tuple[str, ...]:
        """One sentence for each change, in the order of the document."""
        return tuple(edit.sentence for edit in self.edits)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds that occur, each once."""
        return tuple(kind for kind in Kind if any(edit.kind is kind for edit in self.edits))


def describe_change(old: ConsortiumPolicy | None, new: ConsortiumPolicy) -> Change:
    """Everything that ``new`` changes against the policy in force.

    Args:
        old: the policy in force; None: ``new`` is the first, and is described as a whole.
        new: the proposal.
    """
    if old is None:
        rules = new.governance
        first = Edit(
            path="", entry="", old=None, new=new.policy_version, kind=Kind.AMENDMENT,
            sentence=f"This is the first policy of federation {new.federation}.",
        )  # fmt: skip
        return Change(edits=(first,), signatures=rules.admins.threshold, consents=(), notice_days=0)
    before, after = old.to_value(), new.to_value()
    edits = tuple(_edits(before, after, ""))
    kinds = {edit.kind for edit in edits}
    needed = {
        Kind.ROUTINE: old.governance.admins.threshold,
        Kind.POLICY: old.governance.decisions.policy,
        Kind.CODE: old.governance.decisions.policy,
        Kind.BUDGET_INCREASE: old.governance.decisions.budget_increase,
        Kind.AMENDMENT: old.governance.decisions.amendment,
        Kind.UNCLASSIFIED: old.governance.decisions.highest,
    }
    serious = kinds & {Kind.AMENDMENT, Kind.UNCLASSIFIED}
    return Change(
        edits=edits,
        signatures=max((needed[kind] for kind in kinds), default=needed[Kind.ROUTINE]),
        consents=tuple(sorted({who for edit in edits for who in _consents(edit)})),
        notice_days=old.governance.decisions.amendment_notice_days if serious else 0,
    )


def check_successor(old: ConsortiumPolicy, new: ConsortiumPolicy) -> Decision:
    """Whether ``new`` may follow ``old`` at all, however many sign it.

    policy.federation   it is the policy of another federation
    policy.version      its version does not rise by one, or it counts from an earlier day
    """
    whys = []
    if new.federation != old.federation:
        whys.append(Why("policy.federation", f"the policy is of federation {new.federation}"))
    if new.policy_version != old.policy_version + 1:
        whys.append(
            Why(
                "policy.version",
                f"the policy has version {new.policy_version}; {old.policy_version + 1} follows",
            )
        )
    if parse_utc(new.valid_from) < parse_utc(old.valid_from):
        whys.append(Why("policy.version", "the policy would count before the one it replaces"))
    return from_whys(whys)


# -- edits -----------------------------------------------------------------------------------------


def _edits(old: Any, new: Any, path: str) -> Iterator[Edit]:
    if path in KEYS:
        yield from _entries(old, new, path)
    elif isinstance(new, dict) and isinstance(old, dict) and path not in WORDS:
        for key in (*new, *(key for key in old if key not in new)):
            inner = f"{path}.{key}" if path else key
            yield from _edits(old.get(key), new.get(key), inner)
    elif old != new:
        yield _edit(path, "", old, new)


def _name(item: Mapping[str, Any], path: str) -> str:
    return " / ".join(str(item[key]) for key in KEYS[path])


def _entries(old: Any, new: Any, path: str) -> Iterator[Edit]:
    before = {_name(item, path): item for item in old or ()}
    after = {_name(item, path): item for item in new or ()}
    what = ENTRIES[path]
    for name, item in after.items():
        if name not in before:
            detail = "; ".join(
                f"{_words(inner)[0]} {spoken(value, _words(inner)[1])}"
                for inner, value in leaves(item, path)
                if inner.rpartition(".")[2] not in KEYS[path]
            )
            sentence = f"{_a(what)} is added: {name} ({detail})."
            yield Edit(
                path=path, entry=name, old=None, new=item, sentence=sentence,
                kind=_kind(path, None, item),
            )  # fmt: skip
            continue
        for key in (*item, *(key for key in before[name] if key not in item)):
            was, now = before[name].get(key), item.get(key)
            if was != now:
                yield _edit(f"{path}.{key}", f"{what} {name}", was, now)
    for name, item in before.items():
        if name not in after:
            yield Edit(
                path=path, entry=name, old=item, new=None, kind=_kind(path, item, None),
                sentence=f"{_a(what)} is removed: {name}.",
            )  # fmt: skip


def _a(what: str) -> str:
    return f"An {what}" if what[0] in "aeiou" else f"A {what}"


def _words(path: str) -> tuple[str, str, str]:
    found = WORDS.get(path)
    return (found.name, found.unit, found.stricter) if found else (path, "", "")


def _edit(path: str, entry: str, old: Any, new: Any) -> Edit:
    name, unit, stricter = _words(path)
    subject = f"{entry}: {name}" if entry else name
    subject = subject[0].upper() + subject[1:]
    if _is_list_of_words(old) and _is_list_of_words(new):
        added = [spoken(item) for item in new if item not in old]
        gone = [spoken(item) for item in old if item not in new]
        parts = [f"adds {', '.join(added)}"] if added else []
        parts += [f"removes {', '.join(gone)}"] if gone else []
        sentence = f"{subject}: {' and '.join(parts) or 'another order'}"
        grows = bool(added) - bool(gone)
    else:
        sentence = f"{subject}: from {spoken(old, unit)} to {spoken(new, unit)}"
        number = isinstance(old, int) and isinstance(new, int)
        grows = (new > old) - (new < old) if number else 0
    if stricter and grows:
        tightens = (grows > 0) == (stricter == "up")
        sentence += " (stricter)" if tightens else " (looser)"
    return Edit(
        path=path,
        entry=entry,
        old=old,
        new=new,
        kind=_kind(path, old, new),
        sentence=f"{sentence}.",
    )


def _is_list_of_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str | int) for item in value)


# -- kinds -----------------------------------------------------------------------------------------


def _kind(path: str, old: Any, new: Any) -> Kind:
    if path in _ROUTINE:
        return Kind.ROUTINE
    if path.startswith("governance."):
        return Kind.AMENDMENT
    if path.startswith("code.allowed"):
        return Kind.CODE
    if _raises_a_budget(path, old, new):
        return Kind.BUDGET_INCREASE
    if path.startswith(_POLICY):
        return Kind.POLICY
    return Kind.UNCLASSIFIED


def _raises_a_budget(path: str, old: Any, new: Any) -> bool:
    """Whether more privacy may be spent afterwards; what is not surely less counts as more."""
    if path in ("privacy.eps_round_max_micro", "privacy.budgets.default.eps_total_micro",
                "privacy.budgets.overrides.eps_total_micro"):  # fmt: skip
        return bool(new > old)
    if path == "privacy.delta_max":
        return parse_share(new) > parse_share(old)
    if path in ("privacy.budgets.default.period", "privacy.budgets.overrides.period"):
        return True  # a shorter period is a larger budget, and a longer one hides what was spent
    # An entry that comes or goes moves its data between budgets: which is larger depends on both.
    return path == "privacy.budgets.overrides"


def _consents(edit: Edit) -> tuple[str, ...]:
    if edit.kind is not Kind.BUDGET_INCREASE:
        return ()
    if edit.path == "privacy.budgets.overrides":
        return (str((edit.new or edit.old)["institution"]),)
    if edit.path.startswith("privacy.budgets.overrides."):
        name = edit.entry.removeprefix(f"{ENTRIES['privacy.budgets.overrides']} ")
        return (name.partition(" / ")[0],)
    return (EVERYBODY,)


# -- a whole policy, for people --------------------------------------------------------------------


def render_policy(policy: ConsortiumPolicy) -> str:
    """The policy as a page of text: one line a value, in the words of the sentences above."""
    lines = [
        f"Policy {policy.policy_version} of federation {policy.federation}",
        f"digest {policy.digest}",
        f"counts from {policy.valid_from} until {policy.expires}",
    ]
    for section, value in policy.to_value().items():
        if section in WORDS:
            continue
        lines += ["", section.capitalize()]
        lines += _lines(value, section)
    return "\n".join(lines) + "\n"


def _lines(value: Any, path: str) -> Iterator[str]:
    if path in KEYS:
        for item in value:
            detail = "; ".join(
                f"{_words(inner)[0]} {spoken(leaf, _words(inner)[1])}"
                for inner, leaf in leaves(item, path)
                if inner.rpartition(".")[2] not in KEYS[path]
            )
            yield f"  {ENTRIES[path]} {_name(item, path)}: {detail}"
        if not value:
            yield f"  {ENTRIES[path]}: none"
    elif isinstance(value, dict) and path not in WORDS:
        for key, inner in value.items():
            yield from _lines(inner, f"{path}.{key}")
    else:
        name, unit, _ = _words(path)
        yield f"  {name}: {spoken(value, unit)}"
