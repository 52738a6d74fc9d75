"""The site's own rules on disk: ``policy.toml`` and ``policy.cedar``, read together or not at all.

Both stand in the node's folder and never leave it. A file that is missing or broken means no: the
node declines with ``site.policy`` and says what to mend. What `minga node join` writes is a
starting point that a person edits: it names the texts, and declares nothing about them.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from node_agent.config import NodeFolder
from policies.cedar import consortium_text, schema_text
from policies.cedar.engine import MAX_RULES, RuleSet
from policies.site import SitePolicy, site_policy_digest
from protocols.errors import ConfigurationError, MalformedMessageError
from protocols.identifiers import Digest

MAX_TOML: Final = 2**20  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRules:
    """The site's policy, parsed and checked, and the one set of rules that it makes."""

    policy: SitePolicy
    rules: RuleSet = field(repr=False)  # the consortium's and the site's
    zone: tzinfo
    digest: Digest  # what a join tells of it
    stamp: tuple[int, ...]  # of the files, to see a change

    def local(self, now: datetime) -> datetime:
        """A time (UTC) on the site's clocks, summer time included."""
        return now.astimezone(self.zone)


def _stamp(folder: NodeFolder) -> tuple[int, ...]:
    found: list[int] = []
    for path in (folder.policy, folder.rules):
        try:
            facts = path.stat()
        except OSError:
            raise ConfigurationError(
                f"{path} is missing: without it this site says no; `minga node join` writes one to"
                " start from"
            ) from None
        found += [facts.st_mtime_ns, facts.st_size, facts.st_ino]
    return tuple(found)


def load_site_rules(folder: NodeFolder, known: SiteRules | None = None) -> SiteRules:
    """Read both files; ``known`` is given back while they are unchanged.

    Raises:
        ConfigurationError: a file is missing or broken; the sentence names it and the key.
    """
    stamp = _stamp(folder)
    if known is not None and known.stamp == stamp:
        return known
    written = read_site_policy(folder.policy)
    text = _read(folder.rules, limit=MAX_RULES)
    try:
        rules = RuleSet.load(schema=schema_text(), consortium=consortium_text(), site=text)
    except MalformedMessageError as error:
        raise ConfigurationError(f"{folder.rules}: {error}") from None
    return SiteRules(
        policy=_absolute(written, folder.policy),
        rules=rules,
        zone=zone_of(written),
        digest=site_policy_digest(written, text),
        stamp=stamp,
    )


def _read(path: Path, *, limit: int) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    if len(data) > limit:
        raise ConfigurationError(f"{path} is larger than {limit} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def read_site_policy(path: Path) -> SitePolicy:
    """Read ``policy.toml`` as it is written.

    Raises:
        ConfigurationError: missing, not TOML, or a key is missing or wrong.
    """
    try:
        value = tomllib.loads(_read(path, limit=MAX_TOML))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigurationError(f"{path}: {error!s:.200}") from None
    try:
        return SitePolicy.from_value(value)
    except MalformedMessageError as error:
        raise ConfigurationError(f"{path.parent}/{error}") from None


def _absolute(policy: SitePolicy, path: Path) -> SitePolicy:
    """Paths of data sets are relative to the file, as those of ``config.toml``."""
    base = path.resolve().parent
    datasets = tuple(
        item.model_copy(update={"paths": tuple(str(base / name) for name in item.paths)})
        for item in policy.datasets
    )
    return policy.model_copy(update={"datasets": datasets})


def zone_of(policy: SitePolicy) -> tzinfo:
    """The site's time zone.

    Raises:
        ConfigurationError: this machine does not know it.
    """
    try:
        return ZoneInfo(policy.time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigurationError(
            f"policy.toml: time_zone: this machine knows no time zone {policy.time_zone!r}"
        ) from None


# -- what a new site starts from -------------------------------------------------------------------

STARTING_RULES: Final = """\
// Rules of this site, in Cedar, beside policy.toml. Only `forbid`, each with an @id that begins
// with "site." and a sentence: a site narrows what the consortium allows and can never widen it.
// What rules may speak about is policies/cedar/minga.cedarschema. Check with `minga node doctor`.
//
// @id("site.no-weekend")
// @why("people are not here at weekends")
// forbid (principal, action == Minga::Action::"joinRound", resource is Minga::RoundPlan)
// when { context.weekday > 5 };
"""


NO_TEXTS: Final = """\
datasets = []                    # no texts were named: [[datasets]] takes the place of this line
"""


def starting_policy(
    *, paths: Sequence[str], jurisdiction: str, time_zone: str, salt: bytes, residency: str
) -> str:
    """The text of a new ``policy.toml``: every key is there, and a person has to look at it.

    Args:
        paths: the site's texts, as ``config.toml`` names them.
        jurisdiction: ISO 3166-1 code of the country; "XX" where it was not said.
        time_zone: IANA name.
        salt: random bytes, at least 16.
        residency: where the texts stay.
    """

    def text(value: object) -> str:  # a JSON string or list is TOML as well
        return json.dumps(value, ensure_ascii=False)

    collection = f"""
[[datasets]]
id = "default"
title = "The texts of this site"
paths = {text(list(paths))}
class = "sensitive"              # "public" only if anybody may read them
licence = "unknown"              # SPDX id, or LicenseRef-…: the consortium lists what it takes
jurisdiction = {text(jurisdiction)}              # ISO 3166-1 code
legal_basis = "undeclared"
records = "1e3-1e4"              # documents, roughly
languages = []
personal_data = "identified"     # "none", "pseudonymised" or "identified"
dpia = false                     # an impact assessment was made
indigenous = false               # texts in languages of indigenous peoples
fpic_record = "none"             # "sha256:…" of the record of consent
care_label = "none"
residency = {text(residency)}     # "in-institution", "in-country" or "anywhere"
declarations = []                # "croissant-1.1", "datasheet"
use = []                         # purposes: "research", "public-service"
eps_total_micro = "consortium"   # privacy budget in millionths, if less than the consortium's
"""
    return f"""\
# What this site allows of what the consortium allows. It never leaves this machine; only a salted
# digest does. Every key must be there; "consortium" means that the site adds nothing.
schema = "minga.site-policy/1"
salt = {text(salt.hex())}
time_zone = {text(time_zone)}
requires_approval = false        # true: a person approves each plan with `minga node approve`
approvers = []                   # who may; empty: whoever can write in this folder
{"" if paths else NO_TEXTS}
[[hours]]                        # when rounds may be joined, in local time
days = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
from = "00:00"
to = "24:00"

[limits]
gpu_minutes_round = "consortium"
gpu_minutes_day = "consortium"
energy_wh_round = "consortium"
energy_wh_day = "consortium"
eps_round_max_micro = "consortium"
bandwidth_bytes_round = "consortium"

[deny]
bases = []                       # ids of base models
code = []                        # "sha256:…"
modes = []                       # "open": a round that shows the coordinator this site's update
institutions = []                # in whose company this site does not train
{collection if paths else ""}"""
