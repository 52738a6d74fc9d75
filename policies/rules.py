"""Every rule that the code applies to plans, data, sites and overrides, by its id.

The charter cites rules from this list, and a test compares it with the code that applies them.
"""

from __future__ import annotations

from typing import Final

PLAN: Final = frozenset(
    {
        "terms.missing", "terms.policy", "policy.not_yet", "policy.expired",
        "participation.minimum", "participation.countries", "participation.weight",
        "participation.dropout", "participation.status",
        "rounds.duration", "rounds.steps", "rounds.hours", "rounds.concurrent", "rounds.interval",
        "secagg.required", "secagg.threshold", "secagg.survivors", "secagg.protocol",
        "privacy.mode", "privacy.unit", "privacy.delta", "privacy.round", "privacy.accountant",
        "privacy.budget", "updates.clip", "updates.bits", "updates.parts", "join.base", "join.code",
        "data.licence", "data.use", "data.personal", "data.class", "residency",
        "jurisdictions.blocked", "resources.gpu", "resources.energy", "resources.cost",
        "resources.bandwidth", "log.witnesses", "log.auditor", "log.fresh",
    }
)  # fmt: skip
DATA: Final = frozenset(
    {"data.dpia", "data.declaration", "data.indigenous", "jurisdictions.transfer"}
)
SITE: Final = frozenset(
    {
        "site.hours", "site.mode", "site.base", "site.code", "site.with", "site.gpu",
        "site.gpu_day", "site.energy", "site.energy_day", "site.bandwidth", "site.epsilon",
        "site.datasets", "site.policy", "site.approval", "code.installed",
    }
)  # fmt: skip
OVERRIDE: Final = frozenset(
    {
        "override.never", "override.site", "override.rule", "override.federation",
        "override.quorum", "override.ttl", "override.expired", "override.not_yet",
    }
)  # fmt: skip
CHANGE: Final = frozenset({"policy.federation", "policy.version"})
# Of what is published: refused by the coordinator, by every node and by auditors alike.
PUBLICATION: Final = frozenset(
    {
        "trust.majority", "trust.consent", "trust.hearing", "trust.emergency", "trust.board",
        "trust.release", "release.gate", "release.evaluators",
    }
)  # fmt: skip
ALL: Final = PLAN | DATA | SITE | OVERRIDE | CHANGE | PUBLICATION
