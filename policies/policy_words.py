"""What each value of the consortium policy is called, for people who sign it.

One entry for each path of the document; a test fails when one is missing. ``STRICTER`` says which
direction narrows what may happen: up, down, or neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

Stricter = Literal["up", "down", ""]


@dataclass(frozen=True, slots=True)
class Words:
    """How one value is spoken of."""

    name: str
    unit: str = ""  # micro | permille | one that is printed behind the number
    stricter: Stricter = ""


# Keys that name an entry of a list of objects: entries are compared by them, not by position.
KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "privacy.budgets.overrides": ("institution", "dataset_class"),
    "models.bases": ("id",),
    "code.allowed": ("image",),
    "jurisdictions.transfers": ("from", "to"),
    "gates": ("id",),
}
ENTRIES: Final[Mapping[str, str]] = {
    "privacy.budgets.overrides": "special privacy budget",
    "models.bases": "base model",
    "code.allowed": "approved code",
    "jurisdictions.transfers": "basis for transfers",
    "gates": "release gate",
}

WORDS: Final[Mapping[str, Words]] = {
    "schema": Words("format of the document"),
    "policy_version": Words("version of the policy"),
    "federation": Words("name of the federation"),
    "valid_from": Words("day from which the policy counts"),
    "expires": Words("day on which the policy expires"),
    "governance.admins.n": Words("number of admins", "keys"),
    "governance.admins.threshold": Words("number of admins who must sign", "signatures", "up"),
    "governance.admins.min_countries": Words("countries among the signers", "countries", "up"),
    "governance.admins.max_keys_per_institution": Words("admin keys of one institution", "keys"),
    "governance.decisions.admit": Words("signatures that admit a member", "signatures", "up"),
    "governance.decisions.suspend": Words("signatures that keep a suspension", "signatures", "up"),
    "governance.decisions.expel": Words("signatures that expel a member", "signatures", "up"),
    "governance.decisions.policy": Words("signatures that change the policy", "signatures", "up"),
    "governance.decisions.root": Words("signatures that change the root", "signatures", "up"),
    "governance.decisions.code_approvers": Words("people who approve code", "people", "up"),
    "governance.decisions.budget_increase": Words(
        "signatures that raise a privacy budget", "signatures", "up"
    ),
    "governance.decisions.amendment": Words(
        "signatures that change how the federation is governed", "signatures", "up"
    ),
    "governance.decisions.amendment_notice_days": Words("notice of an amendment", "days", "up"),
    "governance.emergency.threshold": Words("admins who may suspend at once", "signatures", "up"),
    "governance.emergency.ttl_hours": Words("duration of an emergency", "hours", "down"),
    "governance.override.threshold": Words("signatures that grant an override", "signatures", "up"),
    "governance.override.ttl_hours": Words("duration of an override", "hours", "down"),
    "governance.override.never": Words("rules that nobody may override", "", "up"),
    "governance.policy_delay_hours": Words("delay before a new policy counts", "hours", "up"),
    "governance.release_board.n": Words("members of the release board", "people"),
    "governance.release_board.threshold": Words(
        "signatures that release a model", "signatures", "up"
    ),
    "log.origin": Words("name of the round log"),
    "log.max_checkpoint_interval_s": Words("time between checkpoints", "s", "down"),
    "log.heartbeat_s": Words("time between heartbeats of the log", "s", "down"),
    "log.witness.committee": Words("witnesses", "witnesses"),
    "log.witness.quorum": Words("witnesses who must cosign", "witnesses", "up"),
    "log.witness.max_cosignature_age_hours": Words("age of a cosignature", "hours", "down"),
    "log.witness.auditor_required": Words("cosignature of an auditor is required", "", "up"),
    "participation.min_participants": Words("nodes in a round, at least", "nodes", "up"),
    "participation.min_countries": Words("countries in a round, at least", "countries", "up"),
    "participation.max_weight_share_permille": Words(
        "weight of one node in a sum, at most", "permille", "down"
    ),
    "participation.dropout_permille": Words(
        "nodes that a round may lose, at most", "permille", "down"
    ),
    "participation.allowed_status": Words("status of members that take part"),
    "rounds.max_duration_min": Words("duration of a round, at most", "min", "down"),
    "rounds.max_steps_local": Words("local steps of a round, at most", "steps", "down"),
    "rounds.hours_utc": Words("hours (UTC) in which rounds begin"),
    "rounds.concurrent_max": Words("runs of a node at one time, at most", "runs", "down"),
    "rounds.min_interval_min": Words("time between two rounds, at least", "min", "up"),
    "secagg.required": Words(
        "secure aggregation is required for data that is not public", "", "up"
    ),
    "secagg.protocol": Words("protocols of the secure sum", "", "down"),
    "secagg.threshold": Words("share of the roster that must open a sum"),
    "secagg.min_surviving": Words("nodes in any opened sum, at least", "nodes", "up"),
    "secagg.reveal": Words("what a secure sum reveals"),
    "privacy.modes": Words("privacy modes that are allowed", "", "down"),
    "privacy.unit": Words("units that privacy may protect", "", "down"),
    "privacy.accountant.name": Words("accountant"),
    "privacy.accountant.version": Words("version of the accountant"),
    "privacy.delta_max": Words("delta, at most"),
    "privacy.eps_round_max_micro": Words("epsilon of one round, at most", "micro", "down"),
    "privacy.budgets.default.eps_total_micro": Words(
        "privacy budget of a data set", "micro", "down"
    ),
    "privacy.budgets.default.period": Words("period of a privacy budget"),
    "privacy.budgets.default.reset": Words("what becomes of an unspent budget"),
    "privacy.budgets.overrides.institution": Words("institution"),
    "privacy.budgets.overrides.dataset_class": Words("class of data"),
    "privacy.budgets.overrides.eps_total_micro": Words("privacy budget", "micro", "down"),
    "privacy.budgets.overrides.period": Words("period"),
    "privacy.on_exhausted": Words("what happens when a budget is spent"),
    "privacy.dropout_noise": Words("noise when nodes are lost"),
    "updates.clip_norm_max_micro": Words("norm of an update, at most", "micro", "down"),
    "updates.norm_check": Words("how norms are checked"),
    "updates.bits": Words("bits of the ring that are allowed", "", "down"),
    "updates.parts": Words("parts of a model that are trained", "", "down"),
    "updates.robust": Words("robust aggregation"),
    "models.bases.id": Words("id"),
    "models.bases.digest": Words("digest"),
    "models.bases.format": Words("format"),
    "models.bases.licence": Words("licence"),
    "models.bases.obligations": Words("obligations"),
    "models.outputs.max_growth_bytes": Words("growth of a model, at most", "bytes", "down"),
    "code.allowed.image": Words("digest"),
    "code.allowed.source_commit": Words("source"),
    "code.allowed.provenance": Words("provenance"),
    "code.allowed.approved_by": Words("approved by", "", "up"),
    "code.allowed.expires": Words("expires"),
    "code.network": Words("network of the code that trains"),
    "code.entrypoints": Words("entry points of the code that trains", "", "down"),
    "data.licences_allowed": Words("licences that are allowed", "", "down"),
    "data.licences_denied": Words("licences that are denied", "", "up"),
    "data.declaration_required": Words("declarations that a data set needs", "", "up"),
    "data.personal_data.allowed": Words("personal data that is allowed"),
    "data.personal_data.dpia_required": Words("impact assessment is required", "", "up"),
    "data.indigenous.requires": Words("what data of indigenous peoples needs", "", "up"),
    "data.use": Words("purposes that are allowed", "", "down"),
    "jurisdictions.residency.raw_data": Words("where raw data stays"),
    "jurisdictions.residency.updates": Words("updates that may cross a border"),
    "jurisdictions.transfers.from": Words("from"),
    "jurisdictions.transfers.to": Words("to"),
    "jurisdictions.transfers.basis": Words("basis"),
    "jurisdictions.transfers.evidence": Words("evidence"),
    "jurisdictions.blocked": Words("countries that are blocked", "", "up"),
    "resources.gpu_minutes_round": Words("GPU time of a round, at most", "GPU minutes", "down"),
    "resources.energy_wh_round": Words("energy of a round, at most", "Wh", "down"),
    "resources.cost_usd_cents_round": Words("cost of a round, at most", "US cents", "down"),
    "resources.bandwidth_bytes_node": Words(
        "traffic of a node and round, at most", "bytes", "down"
    ),
    "gates.id": Words("id"),
    "gates.metric": Words("score"),
    "gates.op": Words("comparison"),
    "gates.ref": Words("reference"),
    "gates.margin_micro": Words("margin", "micro"),
    "gates.no_regression_vs": Words("no language worse than in"),
    "gates.per_language_min_micro": Words("margin of each language"),
    "gates.test": Words("test"),
    "gates.max_micro": Words("at most", "micro", "down"),
    "gates.max_fail_micro": Words("failures, at most", "micro", "down"),
    "gates.max_overlap_micro": Words("overlap, at most", "micro", "down"),
    "evaluators.min_independent": Words("independent evaluators, at least", "people", "up"),
    "retention.round_artifacts_days": Words("time that uploads are kept", "days"),
    "retention.logs": Words("time that the log is kept"),
    "retention.salts": Words("time that salts are kept"),
    "audit.access": Words("what everybody may read"),
    "audit.evidence": Words("who may read evidence"),
    "audit.objection_window_hours": Words("time to object", "hours", "up"),
}


def spoken(value: Any, unit: str = "") -> str:
    """One value as a person writes it.

    Millionths are decimals (``0.5``), shares per cent (``25 %``); a time, a digest and a word stand
    as they are.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        if unit == "micro":
            sign, size = ("-", -value) if value < 0 else ("", value)
            return f"{sign}{size // 10**6}.{size % 10**6:06d}".rstrip("0").rstrip(".")
        if unit == "permille":
            return f"{value // 10}.{value % 10} %".replace(".0 %", " %")
        return f"{value:,}".replace(",", " ") + (f" {unit}" if unit else "")
    if isinstance(value, dict):
        return ", ".join(f"{key}: {spoken(item, 'micro')}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], list | tuple):
            return ", ".join(f"{pair[0]}-{pair[1]}" for pair in value)
        return ", ".join(spoken(item) for item in value) or "none"
    return str(value)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every end value of a policy with its path; entries of keyed lists share one path.

    Lists of words and of numbers, and the languages of a gate, are end values.
    """
    whole = path.endswith("per_language_min_micro")
    if isinstance(value, dict) and not whole:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else key)
    elif path in KEYS:
        for item in value:
            yield from leaves(item, path)
    else:
        yield path, value
