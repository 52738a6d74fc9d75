"""From a policy to the terms of a plan under it: what need not be typed.

A person says which data and how much; policy, code and base model follow from the signed policy and
from the starting snapshot. The result is judged like any other plan: ``policies.plan_terms``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policies.consortium import ConsortiumPolicy
from protocols.errors import PlanRefusedError
from protocols.identifiers import Digest


def terms_value(
    policy: ConsortiumPolicy, *, initial: Digest, written: Mapping[str, Any], code: Digest | None
) -> dict[str, Any]:
    """The terms of a plan as JSON: what is written, completed from the policy.

    Args:
        policy: in force.
        initial: root of the starting snapshot.
        written: ``data`` and, where it differs from what is allowed at most, ``limits``; also
            ``policy``, ``code`` and ``base``, which then stand.
        code: digest of the program that shall train; None: the one that the policy lists, if one.

    Raises:
        PlanRefusedError: ``join.base``: the policy does not list the model; ``join.code``: no
            program, or several, could be meant.
    """
    terms = dict(written)
    terms.setdefault("policy", {"version": policy.policy_version, "sha256": policy.digest})
    if "base" not in terms:
        base = next((b for b in policy.models.bases if b.digest == f"sha256:{initial}"), None)
        if base is None:
            raise PlanRefusedError(
                f"the policy lists no base model with root {initial[:12]}…", rule="join.base"
            )
        terms["base"] = {"id": base.id, "digest": initial}
    if "code" not in terms:
        listed = [item.image.removeprefix("sha256:") for item in policy.code.allowed]
        if code is None and len(listed) != 1:
            raise PlanRefusedError(
                f"the policy lists {len(listed)} programs: say which one trains", rule="join.code"
            )
        terms["code"] = {"image": code or listed[0], "entrypoint": "train"}
    most = policy.resources
    terms["limits"] = {
        "gpu_minutes": most.gpu_minutes_round,
        "gpu_minutes_node": most.gpu_minutes_round,
        "energy_wh": most.energy_wh_round,
        "energy_wh_node": most.energy_wh_round,
        "cost_usd_cents": most.cost_usd_cents_round,
        "bandwidth_bytes_node": most.bandwidth_bytes_node,
    } | dict(terms.get("limits", {}))
    return terms
