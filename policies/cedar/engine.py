"""Cedar behind one door: everything that is not surely a yes is a no.

What the engine does by itself, and what is done about it here (each has a test):

* A forbid whose condition errors is *skipped*, so the answer may be Allow. A yes needs the decision
  Allow **and** no errors at all; the schema is always given; numbers are bounded beforehand.
* Reasons are positions (``policy12``). Rules are keyed by their ``@id`` before they are loaded;
  a rule without one, or two with the same, in one file or in two, are refused.
* A set of forbids alone never permits, and a permit in a site's file would widen what the
  consortium allows. A site's file holds forbids only, ids ``site.*``, and is evaluated in *one* set
  with the consortium's, so it can only turn a yes into a no.
* Templates, linked policies and unknown annotations have no place here and are refused.
* Deeply nested text ends the whole process (the parser overflows its stack): it is not handed over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import cedarpy

from policies.decision import Allowed, Decision, Refused, Why, is_rule_id, refused
from policies.document import MAX_NUMBER
from protocols.errors import MalformedMessageError

MAX_RULES: Final = 2**18  # bytes of one file
MAX_POLICIES: Final = 500  # of one file
_MAX_DEPTH: Final = 32  # of a request
_MAX_BRACKETS: Final = 40  # nested, in a file of rules; 300 are known to work, 1,000 to crash
_MAX_IFS: Final = 100  # in a file of rules; 300 nested ones are known to work
CONSORTIUM: Final = "fed."
SITE: Final = "site."
NO_PERMIT: Final = "fed.no_permit"  # nothing permits it
NOT_EVALUATED: Final = "cedar.not_evaluated"  # the request does not fit the schema
CONDITION_ERROR: Final = "cedar.condition_error"  # a rule could not be computed
OUT_OF_BOUNDS: Final = "cedar.out_of_bounds"
_ANNOTATIONS: Final = frozenset({"id", "why"})
_TOKENS: Final = re.compile(r'"(?:[^"\\]|\\.)*"|//[^\n]*|\bif\b|[()\[\]{}]|"', re.DOTALL)
_POSITION: Final = re.compile(r"`policy(\d+)`|policy(\d+)")


class Answer(Protocol):
    """What the engine answers."""

    @property
    def decision(self) -> Any: ...

    @property
    def diagnostics(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a file."""

    id: str
    effect: str  # permit | forbid
    why: str  # in one sentence; empty: the file says none
    body: Mapping[str, Any] = field(repr=False)


def read_rules(text: str, *, prefix: str, schema: str, what: str) -> tuple[Rule, ...]:
    """The rules of one file, checked against the schema.

    Args:
        text: Cedar policies.
        prefix: of the ids: ``fed.`` or ``site.``. A site's file may only forbid.
        schema: Cedar schema.
        what: the file, for the sentence of an error.

    Raises:
        MalformedMessageError: it is no Cedar, or says what no file of its kind may say.
    """
    if len(text.encode("utf-8", "replace")) > MAX_RULES:
        raise MalformedMessageError(f"{what}: larger than {MAX_RULES} bytes")
    if _is_deep(text):
        raise MalformedMessageError(f"{what}: nested too deeply")
    try:
        parsed = json.loads(cedarpy.policies_to_json_str(text))
    except (ValueError, RecursionError) as error:
        raise MalformedMessageError(f"{what}: {_one_line(error)}") from None
    if set(parsed) - {"staticPolicies", "templates", "templateLinks"}:
        raise MalformedMessageError(f"{what}: holds more than policies")
    if parsed.get("templates") or parsed.get("templateLinks"):
        raise MalformedMessageError(f"{what}: templates are not used here")
    policies = parsed.get("staticPolicies", {})
    if len(policies) > MAX_POLICIES:
        raise MalformedMessageError(f"{what}: more than {MAX_POLICIES} rules")
    rules = [_rule(body, prefix, what) for body in policies.values()]
    seen: set[str] = set()
    for rule in rules:
        if rule.id in seen:
            raise MalformedMessageError(f"{what}: two rules have the id {rule.id}")
        seen.add(rule.id)
    if rules:
        problems = cedarpy.validate_policies(text, schema)
        if not problems.validation_passed:
            named = _by_id(str(problems.errors[0].error), [rule.id for rule in rules])
            raise MalformedMessageError(f"{what}: does not fit the schema: {_one_line(named)}")
    return tuple(rules)


def _is_deep(text: str) -> bool:
    """Whether the parser might overflow its stack; strings and comments do not count."""
    depth = ifs = 0
    for match in _TOKENS.finditer(text):
        mark = match[0]
        if mark in ("(", "[", "{"):
            depth += 1
        elif mark in (")", "]", "}"):
            depth -= 1
        elif mark == "if":
            ifs += 1
        if depth > _MAX_BRACKETS or ifs > _MAX_IFS:
            return True
    return False


def _rule(body: Any, prefix: str, what: str) -> Rule:
    notes = body.get("annotations") or {}
    name = notes.get("id")
    if name is None:
        raise MalformedMessageError(f"{what}: a rule has no @id")
    if not is_rule_id(name) or not name.startswith(prefix) or name == prefix:
        raise MalformedMessageError(f"{what}: the id of a rule here is {prefix}…, not {name!r:.80}")
    unknown = set(notes) - _ANNOTATIONS
    if unknown:
        raise MalformedMessageError(f"{what}: {name}: unknown annotation @{min(unknown)}")
    why = notes.get("why") or ""
    if len(why) > 300 or not why.isprintable():
        raise MalformedMessageError(f"{what}: {name}: @why is one line of at most 300 characters")
    effect = body.get("effect")
    if prefix == SITE and effect != "forbid":
        raise MalformedMessageError(
            f"{what}: {name} is a {effect}: a site can only forbid what the consortium allows"
        )
    return Rule(id=name, effect=str(effect), why=why, body=body)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:300]


def _by_id(text: str, ids: Sequence[str]) -> str:
    """Positions in a message of the engine, replaced by ids."""

    def name(match: re.Match[str]) -> str:
        position = int(match[1] or match[2])
        return ids[position] if position < len(ids) else match[0]

    return _POSITION.sub(name, text)


@dataclass(frozen=True, slots=True)
class RuleSet:
    """One set of rules: the consortium's and, at a node, the site's. Made by ``load``."""

    rules: Mapping[str, Rule]
    _policies: Any = field(repr=False)
    _schema: Any = field(repr=False)

    @classmethod
    def load(cls, *, schema: str, consortium: str, site: str | None = None) -> RuleSet:
        """Read, check and join the files.

        Args:
            schema: Cedar schema.
            consortium: the consortium's rules.
            site: the site's; None where there is no site, as at the coordinator.

        Raises:
            MalformedMessageError: a file is broken, or permits what it may not.
        """
        try:
            handle = cedarpy.Schema.from_str(schema)
        except (ValueError, RecursionError) as error:
            raise MalformedMessageError(f"the schema: {_one_line(error)}") from None
        found = list(
            read_rules(consortium, prefix=CONSORTIUM, schema=schema, what="the consortium's rules")
        )
        if not any(rule.effect == "permit" for rule in found):
            raise MalformedMessageError("the consortium's rules: nothing is permitted")
        if site is not None:
            found += read_rules(site, prefix=SITE, schema=schema, what="the site's rules")
        rules = {rule.id: rule for rule in found}
        if len(rules) != len(found):
            raise MalformedMessageError("two rules have the same id")
        bodies = {rule.id: rule.body for rule in found}
        keyed = {"staticPolicies": bodies, "templates": {}, "templateLinks": []}
        try:
            policies = cedarpy.PolicySet.from_json_str(json.dumps(keyed))
        except (ValueError, RecursionError) as error:
            raise MalformedMessageError(f"the rules: {_one_line(error)}") from None
        return cls(rules, policies, handle)

    def decide(self, request: Mapping[str, Any], entities: Sequence[Mapping[str, Any]]) -> Decision:
        """The answer, with the ids of the rules that gave it.

        Args:
            request: ``principal``, ``action``, ``resource`` and ``context``, as Cedar takes them.
            entities: everything they name, with attributes.
        """
        problem = _out_of_bounds(request) or _out_of_bounds(entities)
        if problem:
            return refused(OUT_OF_BOUNDS, problem)
        try:
            answer = cedarpy.is_authorized(
                dict(request), self._policies, [dict(entity) for entity in entities], self._schema
            )
        except Exception as error:  # noqa: BLE001 - whatever stops the engine is a no
            return refused(NOT_EVALUATED, f"the rules were not evaluated: {_one_line(error)}")
        return interpret(answer, self.rules)


def interpret(answer: Answer, rules: Mapping[str, Rule]) -> Decision:
    """An answer of the engine as a decision: yes only for Allow without any error."""
    kind = getattr(answer.decision, "value", answer.decision)
    errors, reasons = list(answer.diagnostics.errors), list(answer.diagnostics.reasons)
    if kind == "Allow" and not errors and reasons:
        return Allowed(tuple(sorted(map(str, reasons))))
    whys = []
    if kind == "Deny":
        for name in sorted(map(str, reasons)):
            rule = rules.get(name)
            said = rule.why if rule is not None and rule.why else ""
            whys.append(
                Why(name if is_rule_id(name) else NO_PERMIT, said or f"rule {name} forbids")
            )
        if not whys and not errors:
            whys.append(Why(NO_PERMIT, "no rule permits it"))
    elif kind != "Allow":
        said = _one_line(errors[0]) if errors else "the engine gave no decision"
        return refused(NOT_EVALUATED, f"the request does not fit the schema: {said}")
    if errors or not whys:
        said = _one_line(errors[0]) if errors else f"an answer {kind} without a reason"
        whys.append(Why(CONDITION_ERROR, f"a rule could not be computed: {said}"))
    return Refused(tuple(whys))


def _out_of_bounds(value: Any, depth: int = 0) -> str:
    """Why a request could overflow the engine; empty: it cannot."""
    if depth > _MAX_DEPTH:
        return "the request is nested too deeply"
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, int):
        return "" if 0 <= value <= MAX_NUMBER else f"{value} is not between 0 and {MAX_NUMBER}"
    if isinstance(value, float):
        return f"{value} is not a whole number"
    inner = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, Mapping | list | tuple):
        return next((said for item in inner if (said := _out_of_bounds(item, depth + 1))), "")
    return ""
