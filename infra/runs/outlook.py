"""What a plan would come to, for people: sizes, noise, epsilon, who would refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from infra.runs.client import AdminClient
from infra.runs.facts import human_bytes
from infra.runs.plan_file import InitialModel
from infra.runs.show import Sheet
from policies.planning import (
    LINKS,
    SiteBefore,
    SiteOutlook,
    Traffic,
    noise_outlook,
    site_outlook,
    traffic_of,
)
from policies.privacy.claim import claim_of
from protocols.identifiers import NodeId
from protocols.outer_optimizers import optimizer_for
from protocols.plan import Plan
from protocols.plan_privacy import promise
from protocols.round_vector import round_layout, sizes_of_rounds

INSTALL = "pip install 'minga[privacy]'"


def outlook_facts(plan: Plan, model: InitialModel, client: AdminClient | None) -> dict[str, Any]:
    """Everything that can be said of a plan before it runs.

    Args:
        plan: complete.
        model: what round 0 starts from.
        client: of the coordinator, whose ledger knows what is spent; None: without it.

    Raises:
        PlanRefusedError: the plan's privacy terms cannot be kept.
    """
    layout = round_layout(plan, 0, model.manifest)
    coordinates = sizes_of_rounds(plan, model.manifest)[-1]  # of the dearest round
    traffic = traffic_of(plan, layout, buffers=len(optimizer_for(plan.outer).buffer_names))
    noise = noise_outlook(plan, coordinates)
    sites, unknown = _sites(plan, coordinates, client)
    return {
        "run": plan.run,
        "plan_digest": plan.digest,
        "promise": promise(plan),
        "coordinates": coordinates,
        "training_rounds": plan.rounds,
        "held_out": _held_out(plan),
        "traffic": _traffic(traffic),
        "noise": None if noise is None else asdict(noise),
        "sites": [asdict(site) for site in sites],
        "refusals": [site.node for site in sites if site.rule],
        "unknown": unknown,
    }


def _held_out(plan: Plan) -> dict[str, Any] | None:
    """What is opened of held-out text; None: nothing."""
    if not plan.evaluation.languages:
        return None
    strata = plan.strata
    if strata is None:
        return {"strata": list(plan.evaluation.languages), "min_sites": None, "merged": []}
    opened = {**strata.languages, **(strata.countries or dict.fromkeys(_countries(plan), ""))}
    return {
        "strata": list(strata.names),
        "min_sites": plan.evaluation.min_sites,
        "merged": sorted(name for name, stratum in opened.items() if stratum != name),
    }


def _countries(plan: Plan) -> list[str]:
    return sorted({site.country for site in (plan.evaluation.sites or {}).values()})


def _traffic(traffic: Traffic) -> dict[str, Any]:
    return {
        "bytes_up_per_round": traffic.up,
        "bytes_down_per_round": traffic.down,
        "bytes_of_first_model": traffic.first,
        "seconds_per_round": {name: traffic.seconds(rate) for name, rate in LINKS.items()},
    }


def _sites(
    plan: Plan, coordinates: int, client: AdminClient | None
) -> tuple[Sequence[SiteOutlook], list[str]]:
    unknown = ["each site's own budget and rules: `minga node status` there"]
    if client is not None:
        return client.plan_run(plan, coordinates), unknown
    unknown.append("what was spent before, and who is a member: the coordinator was not asked")
    try:
        claim = claim_of(plan, 0, coordinates)
        sites = [SiteBefore(node=node) for node in plan.roster_ids]
        return site_outlook(plan, claim, sites, now=datetime.now(UTC)), unknown
    except ImportError:
        return (), [*unknown, f"epsilon: the accountant is not installed ({INSTALL})"]


def outlook_view(facts: dict[str, Any]) -> RenderableType:
    """The same as text."""
    traffic, noise = facts["traffic"], facts["noise"]
    parts: list[RenderableType] = [
        Text.assemble((facts["run"], "bold"), f"  plan {facts['plan_digest']}"),
        Text(facts["promise"]),
        Text(f"{facts['coordinates']} coordinates, {facts['training_rounds']} training rounds"),
    ]
    times = ", ".join(
        f"{seconds:.1f} s at {name}" for name, seconds in traffic["seconds_per_round"].items()
    )
    parts.append(
        Text(
            f"each node and round: {human_bytes(traffic['bytes_up_per_round'])} up,"
            f" {human_bytes(traffic['bytes_down_per_round'])} down, {times};"
            f" once {human_bytes(traffic['bytes_of_first_model'])} for the first model"
        )
    )
    if facts["held_out"] is not None:
        parts.append(Text(_held_out_text(facts["held_out"])))
    if noise is not None:
        parts.append(
            Text(
                f"noise: {noise['per_coordinate']:.3g} in each coordinate of the mean,"
                f" {noise['per_signal']:.3g} times as long as the most that all sites can say"
                f" together; grid 2^-{noise['grid']}, {noise['shares']} honest shares"
            )
        )
    if facts["sites"]:
        parts += [Text(""), _table(facts["sites"])]
    parts += [
        Text(f"{site['node']} would refuse ({site['rule']}): {site['why']}")
        for site in facts["sites"]
        if site["rule"]
    ]
    parts += [Text(f"not known here: {what}") for what in facts["unknown"]]
    return Group(*parts)


def _held_out_text(said: dict[str, Any]) -> str:
    text = f"held-out figures by {', '.join(said['strata'])}"
    if said["min_sites"] is None:
        return f"{text}: of however few sites, the plan has no [evaluation.sites]"
    text += f"; none, nor any difference of some, is of fewer than {said['min_sites']} sites"
    merged = ", ".join(said["merged"])
    return f"{text}; not by itself: {merged}" if merged else text


def _table(sites: Sequence[dict[str, Any]]) -> Sheet:
    made = Sheet(
        "Epsilon by institution, over all runs",
        ("institution", "before", "after", "allowed", "delta", "rounds that fit"),
    )
    for site in sites:
        made.row(
            site["node"],
            site["before"] or "-",
            site["after"] or "-",
            site["budget"] or "-",
            site["delta"] or "-",
            site["rounds"],
        )
    return made


def read_outlook(found: Sequence[Any]) -> tuple[SiteOutlook, ...]:
    """The coordinator's answer as values."""
    return tuple(
        SiteOutlook(
            node=NodeId(site.node),
            before=site.before,
            after=site.after,
            delta=site.delta,
            budget=site.budget,
            rounds=int(site.rounds),
            rule=site.rule,
            why=site.why,
        )
        for site in found
    )
