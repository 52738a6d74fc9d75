"""A plan that keeps to the example policy, a site that takes part, and small changes of both."""

from __future__ import annotations

from copy import deepcopy
from datetime import UTC, datetime
from typing import Any

from policies.consortium import ConsortiumPolicy
from policies.plan_terms import Facts, Member
from policies.site import SitePolicy
from policies.site_check import SiteState
from protocols.plan import Plan
from protocols.secagg.threshold import SecaggTerms
from tests.support.plans import MANIFEST
from tests.support.policies import example

NOW = datetime(2026, 12, 2, 3, 0, tzinfo=UTC)  # a Wednesday; midnight in Santiago
COUNTRY = {
    "ar-hpc-1": "AR", "bo-univ-1": "BO", "br-univ-1": "BR", "cl-univ-1": "CL", "co-univ-1": "CO",
    "cr-univ-1": "CR", "ec-univ-1": "EC", "gt-univ-1": "GT", "mx-univ-1": "MX", "pa-univ-1": "PA",
    "pe-univ-1": "PE", "uy-univ-1": "UY",
}  # fmt: skip
ROSTER = sorted(COUNTRY)
ME = "cl-univ-1"


def change(value: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A JSON value with some dotted paths replaced; ``-`` removes."""
    value = deepcopy(value)
    for path, new in changes.items():
        *way, last = path.split(".")
        at: Any = value
        for name in way:
            at = at[int(name)] if isinstance(at, list) else at[name]
        if new == "-":
            del at[last]
        else:
            at[last] = new
    return value


def plan_value(policy: ConsortiumPolicy | None = None) -> dict[str, Any]:
    """A plan of twelve nodes under a policy, as JSON."""
    policy = policy or example()
    base, code = policy.models.bases[0], policy.code.allowed[0]
    sizes = SecaggTerms.for_roster(len(ROSTER))
    return {
        "federation": policy.federation,
        "run": "andes-7",
        "mode": "aggregate-only",
        "roster": ROSTER,
        "min_participants": 9,
        "rounds": 3,
        "model": {
            "family": "vector",
            "manifest": MANIFEST.digest,
            "initial": base.digest.removeprefix("sha256:"),
        },
        "trainable": ["lora_a.weight"],
        "local_step": {"kind": "builtin", "max_steps": 100},
        "vector": {"clip_norm": 0.5},
        "deadlines": {"train": 3600, "upload": 1800},
        "secagg": {
            "threshold": sizes.threshold,
            "colluders": sizes.colluders,
            "min_surviving": sizes.min_surviving,
            "keys": {name: f"{number:064x}" for number, name in enumerate(ROSTER)},
        },
        "terms": {
            "policy": {"version": policy.policy_version, "sha256": policy.digest},
            "code": {"image": code.image.removeprefix("sha256:"), "entrypoint": "train"},
            "base": {"id": base.id, "digest": base.digest.removeprefix("sha256:")},
            "data": {
                "classes": ["public", "sensitive"],
                "licences": ["CC-BY-4.0", "CC0-1.0"],
                "use": "research",
                "personal": "pseudonymised",
            },
            "limits": {
                "gpu_minutes": 10_000,
                "gpu_minutes_node": 1000,
                "energy_wh": 100_000,
                "energy_wh_node": 10_000,
                "cost_usd_cents": 10_000,
                "bandwidth_bytes_node": 10**9,
            },
        },
    }


def governed_plan(
    changes: dict[str, Any] | None = None, policy: ConsortiumPolicy | None = None
) -> Plan:
    """A plan that keeps to a policy, with some values replaced."""
    return Plan.from_value(change(plan_value(policy), changes or {}))


def facts(**changes: Any) -> Facts:
    """Everybody is a member, the log is witnessed."""
    values: dict[str, Any] = {
        "now": NOW,
        "members": {name: Member(country=c, status="active") for name, c in COUNTRY.items()},
        "witness_quorum": 7,
        "auditors": 1,
        "accountant": "0.6.0",
    }
    return Facts(**values | changes)


SITE: dict[str, Any] = {
    "schema": "minga.site-policy/1",
    "salt": "00" * 32,
    "time_zone": "America/Santiago",
    "requires_approval": False,
    "approvers": [],
    "hours": [{"days": ["mon", "tue", "wed", "thu", "fri"], "from": "20:00", "to": "07:00"}],
    "limits": {
        "gpu_minutes_round": 2000,
        "gpu_minutes_day": 2500,
        "energy_wh_round": "consortium",
        "energy_wh_day": "consortium",
        "eps_round_max_micro": 250_000,
        "bandwidth_bytes_round": "consortium",
    },
    "deny": {"bases": [], "code": [], "modes": ["open"], "institutions": []},
    "datasets": [
        {
            "id": "leyes",
            "title": "Laws and official texts",
            "paths": ["text/train", "text/valid"],
            "class": "public",
            "licence": "CC0-1.0",
            "jurisdiction": "CL",
            "legal_basis": "public-domain",
            "records": "1e3-1e4",
            "languages": ["es"],
            "personal_data": "none",
            "dpia": False,
            "indigenous": False,
            "fpic_record": "none",
            "care_label": "none",
            "residency": "in-institution",
            "declarations": ["croissant-1.1", "datasheet"],
            "use": ["research"],
            "eps_total_micro": "consortium",
        }
    ],
}


def site(changes: dict[str, Any] | None = None) -> SitePolicy:
    """A site's policy with some values replaced."""
    return SitePolicy.from_value(change(SITE, changes or {}))


def site_state(**changes: Any) -> SiteState:
    """Wednesday, 23:00 at the site."""
    values: dict[str, Any] = {
        "local": datetime(2026, 12, 2, 23, 0),  # noqa: DTZ001 - wall-clock time of the site
        "paths": ("text/train", "text/valid"),
    }
    return SiteState(**values | changes)
