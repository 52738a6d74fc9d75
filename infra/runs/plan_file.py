"""A plan as a person writes it (TOML or JSON), completed from the model it starts from.

What follows from the snapshot need not be typed: the digests of the parameter set and of the
initial model, and the federation, which the operator's certificate names. What is typed must agree.

A snapshot folder holds ``manifest.json`` (canonical) and ``theta.f32`` (raw little-endian float32
in manifest order), as the worker's ``init_model`` writes them. The scales of round 0 follow from
the plan; outer buffers start at zero and have no files.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from cryptography import x509

from policies.consortium import ConsortiumPolicy
from policies.drafting import terms_value
from protocols.canonical import parse_json
from protocols.errors import (
    ConfigurationError,
    DigestMismatchError,
    MalformedMessageError,
    ManifestMismatchError,
)
from protocols.identifiers import Digest, FederationId, parse_federation_id
from protocols.plan import Plan
from protocols.plan_privacy import PRIVATE_MODES
from protocols.secagg.threshold import SecaggTerms
from protocols.tensors.manifest import Manifest
from protocols.tensors.ring import Ring
from protocols.tensors.scales import Scales, initial_scales
from protocols.tensors.snapshot import Snapshot
from protocols.tensors.units import UnitHasher

_UNKNOWN: Final = "0" * 64  # stands for a digest that is not known yet
_READ: Final = 4 * 2**20  # bytes
_SPIFFE: Final = "spiffe://"
_DOMAIN_SUFFIX: Final = ".minga.example"


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialModel:
    """A snapshot folder: what it holds and what its files are called."""

    manifest_path: Path
    theta_path: Path
    manifest: Manifest
    theta: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A complete plan and the snapshot of its round 0."""

    plan: Plan
    snapshot: Snapshot
    scales: Scales


def read_initial_model(folder: Path) -> InitialModel:
    """Read a snapshot folder; theta is hashed, not kept in memory.

    Raises:
        ConfigurationError: a file is missing.
        MalformedMessageError: the manifest cannot be read.
        ManifestMismatchError: theta has another size than the manifest says.
    """
    manifest_path, theta_path = folder / "manifest.json", folder / "theta.f32"
    hasher = UnitHasher()
    try:
        manifest = Manifest.from_bytes(manifest_path.read_bytes())
        with theta_path.open("rb") as file:
            while piece := file.read(_READ):
                hasher.update(piece)
    except OSError as error:
        raise ConfigurationError(
            f"{error.filename} cannot be read ({error.strerror}): a snapshot folder holds "
            "manifest.json and theta.f32"
        ) from None
    if hasher.size != 4 * manifest.coordinates:
        raise ManifestMismatchError(
            f"{theta_path} has {hasher.size} bytes; {manifest.coordinates} float32 coordinates "
            f"have {4 * manifest.coordinates}"
        )
    return InitialModel(
        manifest_path=manifest_path,
        theta_path=theta_path,
        manifest=manifest,
        theta=hasher.digest(),
    )


def read_plan_file(path: Path) -> dict[str, Any]:
    """The plan's fields as written; ``.json`` is JSON, everything else TOML.

    Raises:
        ConfigurationError: the file is missing.
        MalformedMessageError: it is not TOML or JSON, or holds no table.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    try:
        value = parse_json(data) if path.suffix == ".json" else tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MalformedMessageError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise MalformedMessageError(f"{path}: a plan is a table of fields")
    return value


def complete_secure_sum(fields: dict[str, Any], keys: Mapping[str, str]) -> None:
    """Fill in the sizes of a secure sum and the keys of its members, where they are not written.

    Args:
        fields: of the plan; changed.
        keys: hex signing keys of enrolled nodes, as the coordinator has them. Each node compares
            its own, and pins those of the others.

    Raises:
        PlanRefusedError: too few or too many nodes for a secure sum.
    """
    roster = fields.get("roster")
    if fields.get("mode", "open") == "open" or not isinstance(roster, list):
        return
    part = fields.setdefault("secagg", {})
    if not isinstance(part, dict):
        return  # the plan's own check says what is wrong
    terms = SecaggTerms.for_roster(len(roster))
    part.setdefault("threshold", terms.threshold)
    part.setdefault("min_surviving", terms.min_surviving)
    part.setdefault("colluders", terms.colluders)
    part.setdefault("keys", {node: keys[node] for node in roster if node in keys})


def complete_adapters(fields: dict[str, Any], model: dict[str, Any], manifest: Manifest) -> None:
    """Fill in which factors of adapters are trained, and the tensors that they are.

    Args:
        fields: of the plan; changed.
        model: its part ``model``; changed.
        manifest: of the snapshot.
    """
    lora = model.get("lora")
    if not isinstance(lora, dict):
        return
    private = fields.get("mode") in PRIVATE_MODES
    lora.setdefault("factors", "ffa" if private else "rolora")
    fields.setdefault("trainable", [spec.name for spec in manifest.tensors])


def complete_plan(
    written: dict[str, Any],
    model: InitialModel,
    federation: FederationId,
    keys: Mapping[str, str] = MappingProxyType({}),
    *,
    policy: ConsortiumPolicy | None = None,
    code: Digest | None = None,
) -> Submission:
    """Fill in what follows from snapshot and policy, and check what was written against them.

    Args:
        written: fields as read from the file; not changed.
        model: what round 0 starts from.
        federation: that of the operator's certificate.
        keys: hex signing keys of enrolled nodes, for a secure sum.
        policy: the consortium's, in force; None: the plan has no terms, or all that it needs.
        code: digest of the program that shall train; None: the one that the policy lists.

    Raises:
        MalformedMessageError, PlanRefusedError: a field is wrong; the sentence names it.
        ManifestMismatchError, DigestMismatchError: the plan names another parameter set or model.
    """
    fields = deepcopy(written)
    fields.setdefault("federation", federation)
    complete_secure_sum(fields, keys)
    terms = fields.pop("terms", None)
    part = fields.get("model")
    if not isinstance(part, dict):
        raise MalformedMessageError("plan: model: the plan must say which model is trained")
    part.setdefault("manifest", model.manifest.digest)
    complete_adapters(fields, part, model.manifest)
    initial = part.setdefault("initial", _UNKNOWN)
    draft = Plan.from_value(fields)  # every field but `initial` is final now
    if draft.model.manifest != model.manifest.digest:
        raise ManifestMismatchError(
            f"the plan names the parameter set {draft.model.manifest[:12]}…, the snapshot has "
            f"{model.manifest.digest[:12]}…"
        )
    ring = Ring(draft.vector.ring_bits)
    scales = initial_scales(model.manifest, draft.vector.scale, ring, len(draft.roster))
    snapshot = Snapshot.initial(model.manifest, model.theta, scales)
    if initial not in (_UNKNOWN, snapshot.model_root):
        raise DigestMismatchError(
            f"the plan starts from model {initial:.12}…, the snapshot is "
            f"{snapshot.model_root[:12]}…"
        )
    part["initial"] = snapshot.model_root
    if policy is not None and isinstance(terms, dict | None):
        begins = Plan.from_value(fields).model.listed
        terms = terms_value(policy, initial=Digest(begins), written=terms or {}, code=code)
    fields["terms"] = terms
    return Submission(plan=Plan.from_value(fields), snapshot=snapshot, scales=scales)


def federation_of(certificate_pem: bytes) -> FederationId:
    """The federation that an operator's certificate belongs to.

    Raises:
        ConfigurationError: the certificate names none.
    """
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        domain = uri.removeprefix(_SPIFFE).partition("/")[0]
        return parse_federation_id(domain.removesuffix(_DOMAIN_SUFFIX))
    except (ValueError, x509.ExtensionNotFound) as error:
        raise ConfigurationError(
            f"the operator's certificate names no federation: {error}"
        ) from None
