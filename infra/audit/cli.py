"""`minga audit`: copy a log, verify it offline, prove, recompute, report, export.

Needs the base install only; ``minga[privacy]`` adds the accountant that recomputes epsilon. Answers
go to stdout, advice to stderr.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from protocols.errors import NotReadyError

if TYPE_CHECKING:
    from infra.audit.loading import Loaded, Places
    from policies.audit.verify import Audit

LogArgument = Annotated[
    Path, typer.Argument(metavar="LOG_DIR", help="A log's folder, or a copy made by mirror.")
]
PolicyOption = Annotated[
    Path | None,
    typer.Option(
        "--trust-policy",
        metavar="FILE",
        help="Keys of log and witnesses, from a place other than the log. Without it the file"
        " beside the log is used and the result is unanchored.",
    ),
]
RootOption = Annotated[
    Path | None,
    typer.Option("--root", metavar="FILE", help="The first root.json of the signed policy."),
]
TrustOption = Annotated[
    Path | None,
    typer.Option("--tuf", metavar="DIR", help="The trust repository; default: ../tuf."),
]
BlobsOption = Annotated[
    Path | None,
    typer.Option("--blobs", metavar="DIR", help="Sums, transcripts, models; default: ../blobs."),
]
UploadsOption = Annotated[
    Path | None,
    typer.Option("--uploads", metavar="DIR", help="Masked vectors; default: ../coordinator/spool."),
]
SeenOption = Annotated[
    Path | None,
    typer.Option(
        "--seen",
        metavar="FILE",
        help="A checkpoint from elsewhere, which the log must extend.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    help="Copy, verify and report the round log. Works offline.",
)


def _print(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _load(
    log: Path,
    trust_policy: Path | None,
    root: Path | None = None,
    blobs: Path | None = None,
    uploads: Path | None = None,
    seen: Path | None = None,
    trust: Path | None = None,
) -> Loaded:
    from infra.audit.loading import Places, load

    places: Places = Places(
        log=log,
        trust_policy=trust_policy,
        root=root,
        blobs=blobs,
        uploads=uploads,
        seen=seen,
        trust=trust,
    )
    return load(places)


@app.command()
def mirror(
    url: Annotated[str, typer.Argument(metavar="URL", help="Such as http://log.example.org/log")],
    log: Annotated[Path, typer.Argument(metavar="LOG_DIR", help="Where the copy is kept.")],
    trust_policy: PolicyOption = None,
    blobs: Annotated[
        bool, typer.Option("--blobs", help="Copy the documents too that leaves name.")
    ] = False,
    tuf: Annotated[
        str | None,
        typer.Option("--tuf", metavar="URL", help="Copy what admins signed from there."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a log, or bring a copy up to date. Interrupted copies go on where they were.

    What is there must extend what was copied before; if it does not, the copy stays as it is and
    the other checkpoint is kept under refused/.
    """
    from infra.audit.mirror import Source, mirror_documents, mirror_trust
    from infra.audit.mirror import mirror as copy

    source = Source(url)
    done = copy(source, log, trust_policy=trust_policy, say=_say)
    documents = mirror_documents(source, log) if blobs else None
    if tuf is not None:
        documents = (documents or 0) + mirror_trust(Source(tuf), log)
    if as_json:
        _print(done.to_json() | ({"documents": documents} if documents is not None else {}))
        return
    typer.echo(f"{done.origin}: {done.size} leaves, {done.size - done.before} new")
    typer.echo(f"fetched {source.files} files, {source.bytes} bytes")
    if documents is not None:
        typer.echo(f"{documents} documents that leaves name are here")
    if not done.anchored:
        _say("unanchored: the trust policy came from the log itself; give yours: --trust-policy")


@app.command()
def verify(
    log: LogArgument,
    trust_policy: PolicyOption = None,
    root: RootOption = None,
    tuf: TrustOption = None,
    blobs: BlobsOption = None,
    seen: SeenOption = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="What could not be checked is no success either.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check everything that can be checked offline, and answer the 22 questions.

    Ends with 5 and the first bad leaf where the log does not hold; with --strict, with 4 where
    something could not be checked.
    """
    found = _load(log, trust_policy, root, blobs, seen=seen, trust=tuf).audit
    if as_json:
        _print(found.to_json())
    else:
        from infra.audit.show import print_audit

        print_audit(found)
    _end(found, strict=strict)


class NotAllKnownError(NotReadyError):
    """Nothing is wrong, but not everything could be checked."""

    code = "audit_unknown"
    advice = "Give what is missing: --trust-policy, --root, --blobs; or leave out --strict."


def _end(found: Audit, *, strict: bool) -> None:
    from infra.audit.loading import AuditFailedError

    if found.first is not None:
        first = found.first
        raise AuditFailedError(f"first bad place: {first.place} ({first.check}): {first.reason}")
    if found.failed:
        record = found.failed[0]
        where = f", round {record.round}" if record.round else ""
        raise AuditFailedError(f"question {record.id}{where} fails: {record.reason}")
    if strict and found.unknown:
        raise NotAllKnownError(f"{len(found.unknown)} answers are unknown")


@app.command()
def proof(
    log: LogArgument,
    index: Annotated[int, typer.Argument(metavar="INDEX", min=0, help="Of the leaf, from 0.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Default: INDEX.tlog-proof here.")
    ] = None,
    trust_policy: PolicyOption = None,
) -> None:
    """Write one leaf and the proof that it is in the log, to be kept and checked anywhere.

    The proof is a c2sp.org/tlog-proof@v1 file; the leaf is the DSSE envelope beside it.
    """
    from infra.audit.proving import write_proof

    loaded = _load(log, trust_policy)
    target = out or Path(f"{index}.tlog-proof")
    entry = write_proof(loaded, index, target)
    typer.echo(f"{target}: leaf {index} under {loaded.audit.evidence.tree.size} leaves")
    typer.echo(f"{entry}: the leaf")


@app.command()
def recompute(
    log: LogArgument,
    blobs: BlobsOption = None,
    uploads: UploadsOption = None,
    round_: Annotated[
        int | None, typer.Option("--round", metavar="N", min=0, help="One round only.")
    ] = None,
    trust_policy: PolicyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add the masked uploads again, take the masks off, and derive every model digest.

    Ends with 5 where a round leads elsewhere than the log says, with 4 where nothing of it, or not
    all of it, is at hand.
    """
    from infra.audit.loading import AuditFailedError
    from infra.audit.recompute import Recomputer
    from policies.audit.records import Result
    from protocols.errors import ConfigurationError

    loaded = _load(log, trust_policy, blobs=blobs, uploads=uploads)
    folder = loaded.places.blob_folder
    if folder is None:
        raise ConfigurationError("there are no blobs beside the log: give --blobs DIR")
    if loaded.audit.first is not None:
        _end(loaded.audit, strict=False)
    done = []
    work = Recomputer(loaded.audit.evidence, folder, loaded.places.upload_folder)
    for item in work.rounds(round_):
        done.append(item)
        if not as_json:
            typer.echo(f"{item.round}: {item.result.value}: {item.reason}")
    if as_json:
        _print([item.to_json() for item in done])
    bad = [item for item in done if item.result is Result.FAIL]
    if bad:
        raise AuditFailedError(f"leaf {bad[0].leaf}, round {bad[0].round}: {bad[0].reason}")
    if not done or any(item.result is Result.UNKNOWN for item in done):
        raise NotAllKnownError("not every round was made again from its uploads")


@app.command()
def report(
    log: LogArgument,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The page; an older one is replaced.")
    ] = Path("report.html"),
    lang: Annotated[
        Literal["es", "pt", "en"], typer.Option("--lang", help="The language shown first.")
    ] = "es",
    trust_policy: PolicyOption = None,
    root: RootOption = None,
    tuf: TrustOption = None,
    blobs: BlobsOption = None,
    uploads: UploadsOption = None,
    remake: Annotated[
        bool, typer.Option("--recompute", help="Make every model again first; takes longer.")
    ] = False,
) -> None:
    """Write one page for people who decide: who took part, what was learned, what it cost.

    One HTML file in Spanish, Portuguese and English, without anything from elsewhere. A log that
    does not hold gives a page that says so, and exit status 5.
    """
    from infra.audit.report import write_report

    loaded = _load(log, trust_policy, root, blobs, uploads, trust=tuf)
    write_report(loaded, out, lang=lang, recompute=remake)
    typer.echo(f"written to {out}")
    _end(loaded.audit, strict=False)


@app.command()
def export(
    log: LogArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new or empty folder.")],
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="jsonl, csv, prov or slsa; repeatable. Default: all."),
    ] = None,
    trust_policy: PolicyOption = None,
    blobs: BlobsOption = None,
) -> None:
    """Write the log in other people's formats.

    jsonl: every leaf, with its inclusion proof. csv: tables for spreadsheets. prov: W3C PROV-JSON.
    slsa: in-toto statements with SLSA provenance v1, one for each model.
    """
    from infra.audit.export import FORMATS, write_exports

    wanted = tuple(formats or FORMATS)
    odd = set(wanted) - set(FORMATS)
    if odd:
        raise typer.BadParameter(f"{', '.join(sorted(odd))}: not one of {', '.join(FORMATS)}")
    loaded = _load(log, trust_policy, blobs=blobs)
    for path in write_exports(loaded, out, wanted):
        typer.echo(str(path))
    _end(loaded.audit, strict=False)


@app.command()
def witness(
    folder: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="Key and memory of this witness.")
    ],
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where logs ask.")
    ] = "127.0.0.1:8090",
    log: Annotated[
        list[Path] | None,
        typer.Option("--log", metavar="FILE", help="The vkey of a log to watch; repeatable."),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="Name of the key, when it is made.")
    ] = "witness.minga.example/auditor",
) -> None:
    """Cosign a log over HTTP, until interrupted: one history and no other."""
    from infra.audit.witness import prepare
    from node_agent.witness import serve_http
    from protocols.decimals import split_address
    from protocols.errors import ConfigurationError

    made = prepare(folder, name=name, log_keys=tuple(log or ()))
    address = split_address(listen)
    if address is None:
        raise ConfigurationError("--listen is HOST:PORT")
    try:
        server = serve_http(made, *address)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {listen}: {error.strerror}") from None
    print(made.signer.verifier.to_text(), flush=True)
    at = f"{address[0]}:{server.server_address[1]}"
    _say(f"cosigning on {at}; give the key above to the coordinator")
    try:
        server.serve_forever()
    finally:
        server.server_close()
        made.store.close()
