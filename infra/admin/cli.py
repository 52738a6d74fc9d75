"""`minga admin`: keys, policy, members and plans, by threshold signatures.

propose (anybody, offline) -> sign (each admin, offline) -> publish (whoever reaches the
coordinator). Nothing here needs a network but `publish`, and nothing here decides: whether enough
signed is counted by the coordinator, and by every node again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.admin import statement_cli

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    help="Propose, sign and publish keys, policy, members and plans.",
)

Request = Annotated[Path, typer.Argument(metavar="REQUEST", help="A signing request.")]
Repository = Annotated[
    Path,
    typer.Option(
        "--repo", metavar="DIR", envvar="MINGA_TRUST", help="The trust repository, or a copy."
    ),
]
Root = Annotated[
    Path | None,
    typer.Option("--root", metavar="FILE", help="The root that you hold; else unanchored."),
]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="The signing request to write.")]
Passphrase = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        metavar="FILE",
        help="Passphrase or PIN; else MINGA_ADMIN_PASSPHRASE, else a prompt.",
    ),
]
Module = Annotated[
    Path | None,
    typer.Option("--module", metavar="FILE", help="PKCS#11 library, for a key in a token."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")]


def _group(name: str, text: str) -> typer.Typer:
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=text)
    group.command("show")(show)
    group.command("sign")(sign)
    group.command("publish")(publish)
    app.add_typer(group, name=name)
    return group


def _json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


# -- what every group has --------------------------------------------------------------------------


def show(request: Request, root: Root = None, as_json: AsJson = False) -> None:
    """Say in words what a request changes, who has signed it and who still must."""
    from infra.admin import acts

    seen = acts.view(
        acts.read_request(request),
        acts.read_signatures(request, ()),
        root=acts.root_bytes(root),
        now=acts.utc_now(),
    )
    if as_json:
        _json(seen.facts())
    else:
        typer.echo("\n".join(seen.lines()))


def sign(
    request: Request,
    key: Annotated[Path, typer.Option(metavar="KEY", help="Your key file; its card beside it.")],
    root: Root = None,
    passphrase_file: Passphrase = None,
    module: Module = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: you have read it.")] = False,
) -> None:
    """Sign a request offline, after reading what it changes."""
    from infra.admin import acts

    def confirm(seen: acts.View) -> bool:
        typer.echo("\n".join(seen.lines()))
        return yes or typer.confirm("Sign this?", default=False)

    made = acts.sign(
        request,
        key,
        root=acts.root_bytes(root),
        secret=acts.ask_secret(passphrase_file),
        module=module,
        confirm=confirm,
        now=acts.utc_now(),
    )
    if made is None:
        typer.echo("nothing was signed", err=True)
        raise typer.Exit(3)
    typer.echo(f"signed: {made}")


def publish(
    request: Request,
    signatures: Annotated[
        list[Path] | None,
        typer.Argument(metavar="SIGNATURES", help="Default: all beside the request."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="Folder of the federation.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Operator file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring what enough have signed to the coordinator. Doing it again is harmless."""
    from infra.admin import acts

    files = acts.signed_files(request, signatures or (), now=acts.utc_now())
    changes = acts.publish(files, folder=folder, config=config)
    if as_json:
        _json({"changes": changes})
    elif changes:
        typer.echo("in force now:")
        for words in changes:
            typer.echo(f"  - {words}")
    else:
        typer.echo("it was in force already")


def _proposed(path: Path, request: Any, as_json: bool = False) -> None:
    from infra.admin import acts

    acts.write_request(path, request)
    seen = acts.view(request, (), root=None, now=acts.utc_now())
    if as_json:
        _json(seen.facts())
        return
    typer.echo("\n".join(seen.lines()))
    typer.echo(f"wrote {path}: admins sign it with `sign {path} --key KEY`", err=True)


def _base(repository: Path, root: Path | None) -> Any:
    from infra.admin import acts
    from infra.admin.proposals import read_base

    return read_base(repository, now=acts.utc_now(), root=acts.root_bytes(root))


keys = _group("key", "Keys of admins and institutions, the root, its rotation.")
policies = _group("policy", "The consortium's policy, its rules, the text of GOVERNANCE.md.")
members = _group("member", "Members: admit, suspend, expel, leave, keys.")
plans = _group("plan", "Plans of runs, as signed terms.")
app.add_typer(statement_cli.app, name="statement")


# -- keys ------------------------------------------------------------------------------------------

Person = Annotated[str, typer.Option(help="A handle, such as admin-ar; no person's name.")]


@keys.command("make")
def key_make(
    path: Annotated[Path, typer.Argument(metavar="KEY", help="The key file to make.")],
    person: Person,
    institution: Annotated[str, typer.Option(help="Its institution's id.")],
    country: Annotated[str, typer.Option(metavar="CC", help="ISO 3166-1, two letters.")],
    passphrase_file: Passphrase = None,
    token: Annotated[
        bool, typer.Option("--token", help="The key is in a PKCS#11 token: write its card only.")
    ] = False,
    token_label: Annotated[str | None, typer.Option(help="Which token, by its label.")] = None,
    token_key: Annotated[int, typer.Option(help="Which key in it; PIV slot 9c is 2.")] = 2,
    module: Module = None,
    as_json: AsJson = False,
) -> None:
    """Make an Ed25519 key with a passphrase and its card, or the card of a key in a token."""
    import os

    from infra.admin import acts
    from infra.admin.keys import MODULE_VARIABLE, card_path, import_token, make_key
    from protocols.governance.keys import Holder, parse_country
    from protocols.identifiers import parse_node_id

    holder = Holder(
        person=parse_node_id(person),
        institution=parse_node_id(institution),
        country=parse_country(country),
    )
    secret = acts.ask_secret(passphrase_file)
    if token:
        library = module or Path(os.environ.get(MODULE_VARIABLE, ""))
        card = import_token(
            path, holder, label=token_label, keyid=token_key, module=library, pin=secret
        )
    else:
        card = make_key(path, holder, secret())
    facts = {"keyid": card.public.keyid, "holder": str(holder), "card": str(card_path(path))}
    if as_json:
        _json(facts)
    else:
        typer.echo(f"key {facts['keyid']} of {holder}")
        typer.echo(f"give {card_path(path)} to the others; the key file stays here", err=True)


@keys.command("certify")
def key_certify(
    key: Annotated[Path, typer.Argument(metavar="KEY", help="Your key file; its card beside it.")],
    role: Annotated[str, typer.Option(help="admin, auditor, partner, release-board or witness.")],
    coordinator: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the coordinator serves.")
    ],
    ca: Annotated[
        Path, typer.Option(metavar="FILE", help="The federation's root certificate, ca.crt.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for certificate and client.toml.")
    ],
    enrolment: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Default: the coordinator's port plus one."),
    ] = None,
    passphrase_file: Passphrase = None,
    module: Module = None,
    as_json: AsJson = False,
) -> None:
    """Get a client certificate for a day, as the person whom the signed list names."""
    from infra.admin import acts
    from infra.admin.certificates import certify
    from infra.admin.keys import card_path, load_signer, read_card
    from protocols.decimals import split_address

    address = split_address(coordinator)
    if address is None:
        raise typer.BadParameter("--coordinator is HOST:PORT")
    facts = certify(
        out,
        person=read_card(card_path(key)).holder.person,
        role=role,
        signer=load_signer(key, acts.ask_secret(passphrase_file), module=module),
        root=ca,
        coordinator=coordinator,
        enrolment=enrolment or f"{address[0]}:{address[1] + 1}",
        now=acts.utc_now(),
    )
    if as_json:
        _json(facts)
    else:
        typer.echo(f"{facts['identity']} of {facts['federation']}, until {facts['until']}")
        typer.echo(f"use it with --config {facts['config']}", err=True)


@keys.command("found")
def key_found(
    coordinator: Annotated[
        Path, typer.Option(metavar="FILE", help="The coordinator's founding.json.")
    ],
    admin: Annotated[
        list[Path], typer.Option(metavar="CARD", help="An admin's card; three or more.")
    ],
    member: Annotated[list[Path], typer.Option(metavar="CARD", help="An institution's key card.")],
    policy: Annotated[Path, typer.Option(metavar="FILE", help="The policy, JSON.")],
    out: Out,
    threshold: Annotated[int, typer.Option(min=2, help="How many admins must sign.")],
    min_countries: Annotated[int, typer.Option(min=1, help="Countries among the signers.")] = 1,
    rules: Annotated[Path | None, typer.Option(metavar="FILE", help="Cedar rules.")] = None,
    charter: Annotated[Path | None, typer.Option(metavar="FILE", help="GOVERNANCE.md.")] = None,
    auditor: Annotated[list[Path] | None, typer.Option(metavar="CARD", help="An auditor.")] = None,
    board: Annotated[
        list[Path] | None, typer.Option(metavar="CARD", help="A member of the release board.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Propose the first root of a federation: who decides, who is a member, what holds."""
    from infra.admin import acts
    from infra.admin.keys import read_card
    from infra.admin.proposals import Founding, founding_members, propose_founding
    from protocols.identifiers import parse_federation_id

    name, online = acts.online_key_of(coordinator)
    now = acts.utc_now()
    founding = Founding(
        federation=parse_federation_id(name),
        online=online,
        admins=[read_card(path) for path in admin],
        threshold=threshold,
        min_countries=min_countries,
        policy=_policy_documents(policy, rules, charter),
        members=founding_members(name, [read_card(path) for path in member], now),
        others=[(read_card(path), ("auditor",)) for path in auditor or ()],
        board=[read_card(path) for path in board or ()],
    )
    _proposed(out, propose_founding(founding, now=now), as_json)


@keys.command("rotate")
def key_rotate(
    repository: Repository,
    out: Out,
    add: Annotated[
        list[Path] | None, typer.Option(metavar="CARD", help="A key that comes.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="PERSON", help="Whose key goes.")
    ] = None,
    threshold: Annotated[int | None, typer.Option(min=2, help="Another threshold.")] = None,
    min_countries: Annotated[int | None, typer.Option(min=1, help="Other countries.")] = None,
    coordinator: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="founding.json of a coordinator with another key."),
    ] = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Propose another root; it is signed under the old and the new threshold.

    Without options the root is signed again, for another year.
    """
    from infra.admin import acts
    from infra.admin.keys import read_card
    from infra.admin.proposals import propose_rotation

    request = propose_rotation(
        _base(repository, root),
        add=[read_card(path) for path in add or ()],
        remove=remove or (),
        threshold=threshold,
        min_countries=min_countries,
        online=acts.online_key_of(coordinator)[1] if coordinator else None,
    )
    _proposed(out, request, as_json)


@keys.command("renew")
def key_renew(
    repository: Repository,
    out: Out,
    role: Annotated[
        list[str] | None, typer.Argument(metavar="ROLE", help="Default: what expires in 14 days.")
    ] = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Propose to sign roles again before they expire; nothing else changes."""
    from infra.admin.proposals import expiring, propose_renewal

    base = _base(repository, root)
    names = role or expiring(base)
    if not names:
        typer.echo("nothing expires within 14 days")
        return
    _proposed(out, propose_renewal(base, names), as_json)


@keys.command("status")
def key_status(repository: Repository, root: Root = None, as_json: AsJson = False) -> None:
    """Say who decides, what is in force and until when."""
    from infra.admin import acts

    state = _base(repository, root).state
    facts = {
        "federation": state.federation,
        "first_root_sha256": acts.fingerprint(repository),
        "threshold": state.charter.terms.threshold,
        "min_countries": state.charter.terms.min_countries,
        "admins": {keyid: str(holder) for keyid, holder in state.charter.holders.items()},
        "members": {item.id: item.status for item in state.members.institutions},
        "people": {person.id: list(person.roles) for person in state.admins.people},
        "roles": {
            role: {"version": version, "expires": f"{state.expires[role]:%FT%TZ}"}
            for role, version in sorted(state.versions.items())
        },
        "emergencies": {name: item.until for name, item in state.emergencies.items()},
    }
    if as_json:
        _json(facts)
        return
    typer.echo(f"federation {facts['federation']}, first root {facts['first_root_sha256']}")
    typer.echo(
        f"{state.charter.terms.threshold} of {state.charter.terms.admins} admins decide, from "
        f"{state.charter.terms.min_countries} countries or more:"
    )
    for keyid, holder in sorted(state.charter.holders.items(), key=lambda item: item[1]):
        typer.echo(f"  {keyid[:16]}  {holder}")
    for item in state.members.institutions:
        typer.echo(f"member {item.id} ({item.country}): {item.status}")
    for role, version in sorted(state.versions.items()):
        typer.echo(f"{role} {version}, until {state.expires[role]:%F %H:%M}Z")
    for name, notice in state.emergencies.items():
        typer.echo(f"EMERGENCY {name} until {notice.until}")


# -- policy ----------------------------------------------------------------------------------------


def _policy_documents(
    policy: Path | None, rules: Path | None, charter: Path | None
) -> dict[str, bytes]:
    from infra.admin import acts
    from policies.consortium import ConsortiumPolicy
    from policies.effect import POLICY_DOCUMENT
    from protocols.canonical import canonical_bytes, parse_json

    found: dict[str, bytes] = {}
    if policy is not None:
        data = canonical_bytes(parse_json(acts.read_bytes(policy)))
        ConsortiumPolicy.from_bytes(data)  # refused here, where it can still be changed
        found[POLICY_DOCUMENT] = data
    if rules is not None:
        found["policy/consortium.cedar"] = acts.read_bytes(rules)
    if charter is not None:
        found["governance/GOVERNANCE.md"] = acts.read_bytes(charter)
    return found


@policies.command("propose")
def policy_propose(
    repository: Repository,
    out: Out,
    policy: Annotated[Path | None, typer.Option(metavar="FILE", help="The policy, JSON.")] = None,
    rules: Annotated[Path | None, typer.Option(metavar="FILE", help="Cedar rules.")] = None,
    charter: Annotated[Path | None, typer.Option(metavar="FILE", help="GOVERNANCE.md.")] = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Propose another policy, other rules or another text."""
    from infra.admin.proposals import propose_policy

    documents = _policy_documents(policy, rules, charter)
    if not documents:
        raise typer.BadParameter("give --policy, --rules or --charter")
    _proposed(out, propose_policy(_base(repository, root), documents), as_json)


@policies.command("agree")
def policy_agree(
    request: Annotated[
        Path, typer.Argument(metavar="REQUEST", help="The proposal of the new policy.")
    ],
    institution: Annotated[str, typer.Argument(metavar="INSTITUTION", help="Which one agrees.")],
    repository: Repository,
    out: Out,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Agree to a policy that may raise an institution's privacy budget; its own key signs."""
    from infra.admin import acts
    from infra.admin.proposals import propose_agreement
    from policies.consortium import ConsortiumPolicy
    from policies.effect import POLICY_DOCUMENT

    base = _base(repository, root)
    proposed = acts.proposed_document(request, POLICY_DOCUMENT, now=base.now)
    policy = ConsortiumPolicy.from_bytes(proposed)
    _proposed(out, propose_agreement(base, institution, policy), as_json)


# -- members ---------------------------------------------------------------------------------------

Name = Annotated[str, typer.Argument(metavar="INSTITUTION", help="Its id, e.g. ar-univ-1.")]


@members.command("admit")
def member_admit(
    card: Annotated[Path, typer.Argument(metavar="CARD", help="The institution's key card.")],
    repository: Repository,
    out: Out,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Propose to admit an institution, or to take one back."""
    from infra.admin.keys import read_card
    from infra.admin.proposals import admitted, institution_of_card, propose_members

    base = _base(repository, root)
    item = institution_of_card(read_card(card), base.now)
    request = propose_members(base, admitted(base.state.members, item), f"admit {item.id}")
    _proposed(out, request, as_json)


def _status(
    name: str,
    status: str,
    title: str,
    repository: Path,
    out: Path,
    root: Path | None,
    as_json: bool,
) -> None:
    from infra.admin.proposals import propose_members, with_status

    base = _base(repository, root)
    request = propose_members(base, with_status(base.state.members, name, status), title)
    _proposed(out, request, as_json)


@members.command("suspend")
def member_suspend(
    name: Name,
    repository: Repository,
    out: Out,
    code: Annotated[str, typer.Option(help="Why, as a code such as key-leak.")] = "suspended",
    ratify: Annotated[
        bool, typer.Option("--ratify", help="For good, in the membership, by the full majority.")
    ] = False,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Propose to suspend a member: by any two admins, at once, for 72 hours."""
    from infra.admin.proposals import propose_emergency
    from protocols.governance.documents import Denials

    if ratify:
        _status(name, "suspended", f"suspend {name}", repository, out, root, as_json)
        return
    base = _base(repository, root)
    deny = Denials.make(
        institutions=[name], runs=[], plans=[], code=[], certificates=[], all_rounds=False
    )
    request = propose_emergency(base, f"suspend-{name}", deny=deny, code=code)
    _proposed(out, request, as_json)


@members.command("stop")
def member_stop(
    repository: Repository,
    out: Out,
    run: Annotated[list[str] | None, typer.Option(help="A run; repeatable.")] = None,
    everything: Annotated[bool, typer.Option("--all-rounds", help="Every round.")] = False,
    code: Annotated[str, typer.Option(help="Why, as a code such as key-leak.")] = "stopped",
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Propose to stop runs, or every round: by any two admins, at once, for 72 hours."""
    from infra.admin.proposals import propose_emergency
    from protocols.governance.documents import Denials

    base = _base(repository, root)
    deny = Denials.make(
        institutions=[], runs=run or [], plans=[], code=[], certificates=[], all_rounds=everything
    )
    name = "stop-everything" if everything else f"stop-{'-'.join(run or ())}"
    _proposed(out, propose_emergency(base, name, deny=deny, code=code), as_json)


@members.command("reinstate")
def member_reinstate(
    name: Name, repository: Repository, out: Out, root: Root = None, as_json: AsJson = False
) -> None:
    """Propose to let a suspended member back in."""
    _status(name, "active", f"reinstate {name}", repository, out, root, as_json)


@members.command("expel")
def member_expel(
    name: Name, repository: Repository, out: Out, root: Root = None, as_json: AsJson = False
) -> None:
    """Propose to expel a member; it needs a higher majority."""
    _status(name, "expelled", f"expel {name}", repository, out, root, as_json)


@members.command("leave")
def member_leave(
    name: Name, repository: Repository, out: Out, root: Root = None, as_json: AsJson = False
) -> None:
    """Propose to record that a member left."""
    _status(name, "left", f"{name} leaves", repository, out, root, as_json)


@members.command("keys")
def member_keys(
    name: Name,
    card: Annotated[list[Path], typer.Argument(metavar="CARD", help="All its keys from now on.")],
    repository: Repository,
    out: Out,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Propose other keys for an institution; its node joins again with an approval by one."""
    from infra.admin.keys import read_card
    from infra.admin.proposals import propose_members, with_keys

    base = _base(repository, root)
    new = [read_card(path).public.keyval["public"] for path in card]
    changed = with_keys(base.state.members, name, new)
    _proposed(out, propose_members(base, changed, f"keys of {name}"), as_json)


@members.command("approve")
def member_approve(
    statement: Annotated[
        Path, typer.Argument(metavar="FILE", help="What `minga node join --request-out` wrote.")
    ],
    key: Annotated[Path, typer.Option(metavar="KEY", help="The institution's key file.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The approval to write.")],
    passphrase_file: Passphrase = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: you have read it.")] = False,
) -> None:
    """Approve the keys of your institution's node, offline."""
    from infra.admin import acts
    from infra.admin.keys import load_private
    from protocols.canonical import parse_json
    from protocols.governance.approval import Statement, approve

    said = Statement.from_value(parse_json(acts.read_bytes(statement), limit=65_536))
    typer.echo(f"node {said.node} of {said.institution} in federation {said.federation}")
    typer.echo(f"signing key {said.signing_key}")
    typer.echo(f"TLS key {said.spki_sha256}")
    if not yes and not typer.confirm("Are these your node's keys?", default=False):
        raise typer.Exit(3)
    made = approve(said, load_private(key, acts.ask_secret(passphrase_file)))
    acts.write_new(out, made.to_bytes())
    typer.echo(f"approved: {out}")


# -- plans -----------------------------------------------------------------------------------------


@plans.command("propose")
def plan_propose(
    plan: Annotated[
        Path,
        typer.Argument(metavar="PLAN", help="As `minga run submit --dry-run --out` wrote it."),
    ],
    repository: Repository,
    out: Out,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Propose the terms of a run; it starts only once they are signed."""
    from infra.admin import acts
    from infra.admin.proposals import propose_plan
    from protocols.plan import Plan

    request = propose_plan(_base(repository, root), Plan.from_bytes(acts.read_bytes(plan)))
    _proposed(out, request, as_json)


@plans.command("override")
def plan_override(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan, as it was signed.")],
    rule: Annotated[str, typer.Option(metavar="ID", help="The rule that it may pass by.")],
    code: Annotated[str, typer.Option(metavar="WORD", help="Why, as a code.")],
    repository: Repository,
    out: Out,
    hours: Annotated[int, typer.Option(min=1, max=168, help="How long, from now on.")] = 24,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Propose to let one plan past one rule of the consortium, for a while; never a site's rule."""
    from datetime import timedelta

    from infra.admin import acts
    from infra.admin.proposals import propose_override
    from policies.overrides import OVERRIDE_SCHEMA, Override
    from protocols.canonical import canonical_bytes
    from protocols.governance.documents import time_text
    from protocols.plan import Plan

    named, now = Plan.from_bytes(acts.read_bytes(plan)), acts.utc_now()
    value = {
        "schema": OVERRIDE_SCHEMA,
        "federation": named.federation,
        "plan": named.digest,
        "rule": rule,
        "code": code,
        "granted_at": time_text(now),
        "expires": time_text(now + timedelta(hours=hours)),
    }
    override = Override.from_bytes(canonical_bytes(value))
    _proposed(out, propose_override(_base(repository, root), override), as_json)
