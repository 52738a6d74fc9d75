"""The log in other people's formats. Only leaves that hold are written.

    leaves.jsonl      index, leaf_hash, kind, signer, time, subject, predicate, inclusion proof
    csv/*.csv         rounds, participation, privacy, overrides, certificates
    prov.json         W3C PROV-JSON: models, rounds, institutions and how they hang together
    slsa/*.json       in-toto Statement v1 with SLSA provenance v1, one for each model that came out

Spreadsheets run what begins with = + - or @, so such cells get an apostrophe in front.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from infra.audit.loading import Loaded
from infra.audit.mirror import write_file
from policies.audit.evidence import Evidence, released
from policies.audit.spending import spent_claims
from protocols.canonical import canonical_bytes
from protocols.errors import ExistsError
from protocols.tlog.kinds import CertIssued, parse_round_subject
from protocols.tlog.proofs import make_inclusion
from protocols.tlog.text import encode_base64

FORMATS: Final = ("jsonl", "csv", "prov", "slsa")
BUILD_TYPE: Final = "https://minga.example/build-types/round/v1"
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


def write_exports(loaded: Loaded, folder: Path, formats: Iterable[str]) -> list[Path]:
    """Write the chosen formats into ``folder``; the files that were written.

    Raises:
        ExistsError: the folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ExistsError(f"{folder} is not empty")
    written = []
    for name in formats:
        for path, data in _WRITERS[name](loaded).items():
            target = folder / path
            write_file(target, data)
            written.append(target)
    return written


# -- JSON Lines --------------------------------------------------------------------------------


def leaves_jsonl(loaded: Loaded) -> dict[str, bytes]:
    """One leaf a line, with the proof that it is under the newest checkpoint."""
    tree = loaded.audit.evidence.tree
    lines = []
    for taken in loaded.audit.evidence.taken:
        said = taken.statement
        proof = [] if tree.faults else make_inclusion(tree.subtrees, taken.index, tree.size)
        lines.append(
            canonical_bytes(
                {
                    "index": taken.index,
                    "leaf_hash": taken.leaf.hash,
                    "kind": said.kind,
                    "signer": {
                        "key": taken.leaf.signer,
                        "role": taken.holder.role.value,
                        "name": taken.holder.name,
                    },
                    "time": f"{said.time:%Y-%m-%dT%H:%M:%SZ}",
                    "subject": {"name": said.subject, "sha256": said.digest},
                    "predicate": dict(said.fields),
                    "proof": {
                        "size": tree.size,
                        "hashes": [encode_base64(value) for value in proof],
                    },
                    "entry": encode_base64(taken.leaf.entry),
                }
            )
        )
    return {
        "leaves.jsonl": b"".join(line + b"\n" for line in lines),
        "checkpoint": loaded.files.checkpoint,
    }


# -- CSV -----------------------------------------------------------------------------------------


def cell(value: object) -> str:
    """Text that no spreadsheet takes for a formula."""
    text = "" if value is None else str(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def _table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([cell(value) for value in row] for row in rows)
    return out.getvalue().encode()


def tables_csv(loaded: Loaded) -> dict[str, bytes]:
    """Tables for people with spreadsheets."""
    evidence = loaded.audit.evidence
    return {
        "csv/rounds.csv": _table(
            ("round", "mode", "outcome", "attempts", "included", "model_in", "model_out", "leaf"),
            _rounds(evidence),
        ),
        "csv/participation.csv": _table(
            ("round", "institution", "answer", "in_sum", "detail", "verdict"),
            _participation(evidence),
        ),
        "csv/privacy.csv": _table(
            ("round", "institution", "dataset", "unit", "mechanism", "count", "delta", "leaf"),
            _privacy(evidence),
        ),
        "csv/overrides.csv": _table(
            ("leaf", "rule", "code", "plan_sha256", "expires"),
            (
                (index, override.rule, override.code, override.plan, override.expires)
                for index, override, _ in (evidence.signed.overrides() if evidence.signed else ())
            ),
        ),
        "csv/certificates.csv": _table(
            ("leaf", "uri", "certificate_sha256", "not_after", "request"),
            (
                (t.index, t.said.uri, t.said.certificate_sha256, t.said.not_after, t.said.request)
                for t in evidence.of(CertIssued)
                if isinstance(t.said, CertIssued)
            ),
        ),
    }


def _rounds(evidence: Evidence) -> Iterable[Sequence[object]]:
    for round_, state in evidence.rounds.items():
        attempt = released(state)
        said = attempt.aggregate if attempt else None
        last = state.ended or (state.attempt.aborted if state.attempt else None)
        outcome = "released" if said else last.outcome if last else "open"
        yield (
            round_,
            state.plan.mode,
            outcome,
            len(state.attempts),
            said.survivors if said else 0,
            state.plan.model_in,
            said.model_out if said else None,
            state.plan_at,
        )


def _participation(evidence: Evidence) -> Iterable[Sequence[object]]:
    for round_, state in evidence.rounds.items():
        attempt = released(state)
        said = attempt.aggregate if attempt else None
        lost = {d.node: f"{d.phase}: {d.code}" for d in said.dropped} if said else {}
        everybody = (state.roster or frozenset()) | state.joins.keys() | state.declines.keys()
        for node in sorted(everybody):
            declined = state.declines.get(node)
            answer = "declined" if declined else "joined" if node in state.joins else "none"
            verdict = attempt.verdicts.get(node) if attempt else None
            yield (
                round_,
                node,
                answer,
                "yes" if said and node in said.included else "no",
                " ".join(declined) if declined else lost.get(node),
                verdict.value if verdict else None,
            )


def _privacy(evidence: Evidence) -> Iterable[Sequence[object]]:
    for taken, claim in spent_claims(evidence):
        _, round_ = parse_round_subject(taken.statement.subject)
        yield (
            round_,
            taken.holder.name,
            claim.dataset,
            claim.unit,
            claim.event.kind,
            claim.count,
            claim.delta,
            taken.index,
        )


# -- W3C PROV ------------------------------------------------------------------------------------


def prov_json(loaded: Loaded) -> dict[str, bytes]:
    """PROV-JSON (W3C submission of 2013): entities are models, activities rounds."""
    evidence = loaded.audit.evidence
    document: dict[str, Any] = {
        "prefix": {
            "minga": "https://minga.example/ns#",
            "model": "urn:sha256:",
            "round": "urn:minga:round:",
            "inst": "urn:minga:institution:",
        },
        "entity": {},
        "activity": {},
        "agent": {},
        "used": {},
        "wasGeneratedBy": {},
        "wasAssociatedWith": {},
        "wasDerivedFrom": {},
    }
    for round_, state in evidence.rounds.items():
        attempt = released(state)
        said = attempt.aggregate if attempt else None
        activity = f"round:{round_}"
        began = evidence.taken[state.plan_at].statement.time
        document["activity"][activity] = {
            "prov:startTime": f"{began:%Y-%m-%dT%H:%M:%SZ}",
            "minga:mode": state.plan.mode,
            "minga:plan": state.plan_sha256,
            "minga:leaf": state.plan_at,
        }
        model_in = f"model:{state.plan.model_in}"
        document["entity"].setdefault(model_in, {"prov:type": "minga:Model"})
        document["used"][f"_:u{round_}"] = {"prov:activity": activity, "prov:entity": model_in}
        if attempt is None or said is None:
            continue
        model_out = f"model:{said.model_out}"
        done = evidence.taken[attempt.aggregate_at or state.plan_at].statement.time
        document["activity"][activity]["prov:endTime"] = f"{done:%Y-%m-%dT%H:%M:%SZ}"
        document["entity"].setdefault(model_out, {"prov:type": "minga:Model"})
        document["wasGeneratedBy"][f"_:g{round_}"] = {
            "prov:entity": model_out,
            "prov:activity": activity,
        }
        document["wasDerivedFrom"][f"_:d{round_}"] = {
            "prov:generatedEntity": model_out,
            "prov:usedEntity": model_in,
            "prov:activity": activity,
        }
        for node in said.included:
            agent = f"inst:{node}"
            document["agent"].setdefault(agent, {"prov:type": "prov:Organization"})
            document["wasAssociatedWith"][f"_:a{round_}.{node}"] = {
                "prov:activity": activity,
                "prov:agent": agent,
            }
    return {"prov.json": _pretty(document)}


# -- SLSA ----------------------------------------------------------------------------------------


def slsa_json(loaded: Loaded) -> dict[str, bytes]:
    """in-toto Statement v1 with the predicate https://slsa.dev/provenance/v1, for each model."""
    evidence, found = loaded.audit.evidence, {}
    for round_, state in evidence.rounds.items():
        attempt = released(state)
        said = attempt.aggregate if attempt else None
        if attempt is None or said is None:
            continue
        plan, code = evidence.plan_of(state), state.plan.code
        materials = [_resource("model", state.plan.model_in), _resource("sum", said.sum_blob)]
        if code is not None and code.image is not None:
            materials.append(_resource("container", code.image))
        began = evidence.taken[state.plan_at].statement.time
        done = evidence.taken[attempt.aggregate_at or state.plan_at].statement.time
        statement = {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [{"name": f"{round_}/model", "digest": {"sha256": said.model_out}}],
            "predicateType": "https://slsa.dev/provenance/v1",
            "predicate": {
                "buildDefinition": {
                    "buildType": BUILD_TYPE,
                    "externalParameters": {
                        "plan": plan.model_dump(mode="json", by_alias=True) if plan else None,
                        "planSha256": state.plan_sha256,
                        "round": str(round_),
                    },
                    "internalParameters": {"attempt": attempt.number, "included": said.included},
                    "resolvedDependencies": materials,
                },
                "runDetails": {
                    "builder": {"id": f"https://minga.example/logs/{evidence.tree.origin}"},
                    "metadata": {
                        "invocationId": f"{evidence.tree.origin}#{attempt.aggregate_at}",
                        "startedOn": f"{began:%Y-%m-%dT%H:%M:%SZ}",
                        "finishedOn": f"{done:%Y-%m-%dT%H:%M:%SZ}",
                    },
                },
            },
        }
        found[f"slsa/{round_.run}-{round_.number}.json"] = _pretty(statement)
    return found


def _resource(name: str, digest: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": digest}}


def _pretty(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


_WRITERS: Final[Mapping[str, Callable[[Loaded], dict[str, bytes]]]] = {
    "jsonl": leaves_jsonl,
    "csv": tables_csv,
    "prov": prov_json,
    "slsa": slsa_json,
}
