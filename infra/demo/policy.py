"""The policies of the demonstration: the consortium's, which its admins sign, and each site's own.

The consortium's is a whole policy with real numbers; only what a machine of one's own cannot have
is loosened (hours, waiting times; the first model and the installed program are what is allowed).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from node_agent.site_policy import STARTING_RULES, starting_policy
from policies.consortium import POLICY_SCHEMA, ConsortiumPolicy
from protocols.identifiers import Digest, FederationId
from protocols.secagg.threshold import MIN_ROSTER

BASE: Final = "demo-first-model"
LICENCE: Final = "CC0-1.0"
# What a plan of the demonstration says of data; the rest of its terms follows from the policy.
TERMS: Final[dict[str, Any]] = {
    "data": {"classes": ["public"], "licences": [LICENCE], "use": "research", "personal": "none"}
}
RULES: Final = STARTING_RULES


def country_of(site: str) -> str:
    """The country in a site's name: ``pe-escuela`` is in PE; XX where the name says none."""
    prefix, dash, _ = site.partition("-")
    return prefix.upper() if dash and len(prefix) == 2 and prefix.isalpha() else "XX"


def demo_policy(
    *,
    federation: FederationId,
    sites: Sequence[str],
    base: Digest,
    code: Digest,
    admins: Sequence[str],
    threshold: int,
    witnesses: int,
    now: datetime,
    version: int = 1,
    min_countries: int = 2,
    origin: str = "",
) -> ConsortiumPolicy:
    """The consortium policy of a demonstration.

    Args:
        federation: its name.
        sites: that take part.
        base: root of the first model.
        code: digest of the installed program.
        admins: handles, each of another institution; two of them approved the code.
        threshold: admins that must sign.
        witnesses: how many cosign the log; a majority must.
        now: UTC; the policy counts from now on, without delay.
        version: of the policy.
        min_countries: among the signers.
        origin: of the round log; empty: ``log.minga.example/<federation>``.
    """
    n, all_admins = len(sites), len(admins)
    need = max(1, n - 1)  # one site may be away
    high = min(all_admins, threshold + 1)
    stamp = "%Y-%m-%dT%H:%M:%SZ"
    return ConsortiumPolicy.from_value(
        {
            "schema": POLICY_SCHEMA,
            "policy_version": version,
            "federation": federation,
            "valid_from": f"{now - timedelta(minutes=5):{stamp}}",
            "expires": f"{now + timedelta(days=90):{stamp}}",
            "governance": {
                "admins": {
                    "n": all_admins,
                    "threshold": threshold,
                    "min_countries": min_countries,
                    "max_keys_per_institution": 1,
                },
                "decisions": {
                    "admit": threshold,
                    "suspend": threshold,
                    "expel": high,
                    "policy": threshold,
                    "root": threshold,
                    "code_approvers": 2,
                    "budget_increase": high,
                    "amendment": high,
                    "amendment_notice_days": 0,
                },
                "emergency": {"threshold": 2, "ttl_hours": 72},
                "override": {
                    "threshold": threshold,
                    "ttl_hours": 24,
                    "never": ["privacy.budget", "residency", "secagg.required"],
                },
                "policy_delay_hours": 0,
                "release_board": {"n": 3, "threshold": 2},
            },
            "log": {
                "origin": origin or f"log.minga.example/{federation}",
                "max_checkpoint_interval_s": 60,
                "heartbeat_s": 3600,
                "witness": {
                    "committee": witnesses,
                    "quorum": witnesses // 2 + 1,
                    "max_cosignature_age_hours": 24,
                    "auditor_required": False,
                },
            },
            "participation": {
                "min_participants": need,
                "min_countries": 1,
                "max_weight_share_permille": 1000,
                "dropout_permille": 500,
                "allowed_status": ["active"],
            },
            "rounds": {
                "max_duration_min": 60,
                "max_steps_local": 200,
                "hours_utc": [["00:00", "24:00"]],
                "concurrent_max": 2,
                "min_interval_min": 0,
            },
            "secagg": {
                "required": n >= MIN_ROSTER,  # two would learn each other's update from the sum
                "protocol": ["bonawitz17/1"],
                "threshold": [2, 3],
                "min_surviving": 2,
                "reveal": "aggregate-only",
            },
            "privacy": {
                "modes": [
                    "open",
                    "aggregate-only",
                    "record-local",
                    "record-distributed",
                    "institution",
                ],
                "unit": ["document", "sequence", "institution"],
                "accountant": {"name": "dp-accounting", "version": "0.6.0"},
                "delta_max": "0.01",
                "eps_round_max_micro": 50_000_000,
                "budgets": {
                    "default": {
                        "eps_total_micro": 100_000_000,
                        "period": "P1Y",
                        "reset": "never-carry",
                    },
                    "overrides": [],
                },
                "on_exhausted": "refuse",
                "dropout_noise": "distributed-ge-threshold",
            },
            "updates": {
                "clip_norm_max_micro": 100_000_000,
                "norm_check": "post-aggregate",
                "bits": [16, 20, 24],
                "parts": ["all"],
                "robust": "none",
            },
            "models": {
                "bases": [
                    {
                        "id": BASE,
                        "digest": f"sha256:{base}",
                        "format": "float32",
                        "licence": LICENCE,
                        "obligations": [],
                    }
                ],
                "outputs": {"max_growth_bytes": 0},
            },
            "code": {
                "allowed": [
                    {
                        "image": f"sha256:{code}",
                        "source_commit": "installed",
                        "provenance": "none",
                        "approved_by": list(admins[:2]),
                        "expires": f"{now + timedelta(days=90):{stamp}}",
                    }
                ],
                "network": "deny-all",
                "entrypoints": ["train", "evaluate"],
            },
            "data": {
                "licences_allowed": [LICENCE],
                "licences_denied": ["unknown"],
                "declaration_required": ["datasheet"],
                "personal_data": {"allowed": "none", "dpia_required": True},
                "indigenous": {"requires": ["fpic-record", "care-label"]},
                "use": ["research"],
            },
            "jurisdictions": {
                "residency": {"raw_data": "in-institution", "updates": "masked-only"},
                "transfers": [],
                "blocked": [],
            },
            "resources": {
                "gpu_minutes_round": 1000,
                "energy_wh_round": 10_000,
                "cost_usd_cents_round": 100,
                "bandwidth_bytes_node": 10**9,
            },
            "gates": [],
            "evaluators": {"min_independent": 1},
            "retention": {
                "round_artifacts_days": 30,
                "logs": "permanent",
                "salts": "until-erasure",
            },
            "audit": {
                "access": "public-log",
                "evidence": "auditors",
                "objection_window_hours": 48,
            },
        }
    )


def demo_site_policy(
    site: str, *, paths: Sequence[str], languages: Sequence[str], salt: bytes
) -> str:
    """A site's ``policy.toml`` as a person would have edited it: what its texts are."""
    text = starting_policy(
        paths=paths,
        jurisdiction=country_of(site),
        time_zone="UTC",
        salt=salt,
        residency="in-institution",
    )
    for before, after in (
        ('title = "The texts of this site"', f'title = "Demonstration texts of {site}"'),
        ('class = "sensitive"', 'class = "public"'),
        ('licence = "unknown"', f'licence = "{LICENCE}"'),
        ('legal_basis = "undeclared"', 'legal_basis = "public-domain"'),
        ('records = "1e3-1e4"', 'records = "below-1e3"'),
        ("languages = []", f"languages = {_list(languages)}"),
        ('personal_data = "identified"', 'personal_data = "none"'),
        ("declarations = []", 'declarations = ["datasheet"]'),
        ("\nuse = []", '\nuse = ["research"]'),
    ):
        if text.count(before) != 1:
            raise AssertionError(f"the starting policy no longer holds {before!r} once")
        text = text.replace(before, after)
    return text


def _list(words: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{word}"' for word in words) + "]"
