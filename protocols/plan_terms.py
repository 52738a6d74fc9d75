"""What a plan promises the consortium: its policy, code, base model, data and limits.

The section of a plan that admins and sites check against the signed policy. It names everything by
digest, so that a plan which was signed cannot come to mean something else when a policy, a program
or a model changes under its name. Whether the promises are allowed: ``policies.plan_terms``.
Normative text: protocols/spec/plan.md, section 6.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from protocols.plan_types import DigestText, Part

MAX_AMOUNT: Final = 2**40


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _ascending(value: tuple[str, ...]) -> tuple[str, ...]:
    if list(value) != sorted(set(value)):
        raise ValueError("must be unique and in ascending order")
    return value


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/+-]{0,119}$")]
Names = Annotated[
    tuple[Name, ...], Field(max_length=200), BeforeValidator(_as_tuple), AfterValidator(_ascending)
]
Amount = Annotated[int, Field(ge=0, le=MAX_AMOUNT)]
PersonalData = Literal["none", "pseudonymised", "any"]


class PolicyNamed(Part):
    """The consortium policy that the plan was written for."""

    version: Annotated[int, Field(ge=1, le=2**31 - 1)]
    sha256: DigestText  # of its canonical bytes


class CodeNamed(Part):
    """The program that trains."""

    image: DigestText  # digest of the installed program, or of an image
    entrypoint: Name = "train"


class BaseNamed(Part):
    """The model that the run starts from, as the policy lists it."""

    id: Name
    digest: DigestText  # root of the starting snapshot


class DataContract(Part):
    """Which data a site may use for the run."""

    classes: Names  # of data sets
    licences: Names  # SPDX ids
    use: Name  # purpose
    personal: PersonalData = "none"


class Limits(Part):
    """What a round may use at most."""

    gpu_minutes: Amount  # over all nodes
    gpu_minutes_node: Amount
    energy_wh: Amount  # over all nodes
    energy_wh_node: Amount
    cost_usd_cents: Amount  # over all nodes
    bandwidth_bytes_node: Amount  # up and down


class Terms(Part):
    """The plan's promises."""

    policy: PolicyNamed
    code: CodeNamed
    base: BaseNamed
    data: DataContract
    limits: Limits
