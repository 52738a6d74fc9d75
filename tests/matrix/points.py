"""Where something becomes durable, found in the source itself.

A *commit point* is one of

    tx:NAME              a transaction of the coordinator's ledger, ``ledger.run("NAME", ...)``
    sql:MODULE.FUNCTION  a transaction of a node's journal, privacy ledger or log store
    file:MODULE.FUNCTION#OPERATION
                         a file that is made durable or gets its name: fsync, fdatasync, replace,
                         rename, link, or one of our own functions that do it

A process can die right before it and right after it. A point that is added to the source is in
``commit_points`` at once, and ``tests/unit/test_fault_matrix.py`` fails until the matrix visits it.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from coordinator.secure_sum import _ACCEPT

ROOT: Final = Path(__file__).parents[2]
Part = Literal["coordinator", "node", "worker"]

# What makes a file durable or names it; our own helpers count as one operation of who calls them.
OPERATIONS: Final = frozenset(
    {"fsync", "fdatasync", "rename", "link", "replace"}
    | {"sync_folder", "_sync_folder", "replace_file", "write_private", "atomic_write"}
    | {"write_status", "publish"}
)
FILES: Final = OPERATIONS - {"publish"} | {"_write"}  # in the coordinator's files
SQL: Final = frozenset({"_write", "_transaction"})  # context managers of a node's databases
_SECURE: Final = tuple(sorted(f"secure_{kind}" for kind in _ACCEPT))


def qualified(path: Path) -> str:
    """The import name of a source file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


_WORKER: Final = re.compile(
    r"(node_agent\.worker\.|node_agent\.resident\.|node_agent\.flower|"
    r"node_agent\.spool\.(DeltaWriter|StatusWriter|keep_spent))"
)


def part_of(name: str) -> Part:
    """Whose process runs a module or a function."""
    if name.startswith("coordinator."):
        return "coordinator"
    return "worker" if _WORKER.match(name) else "node"


@functools.cache
def commit_points(part: Part) -> frozenset[str]:
    """Every commit point of a part, as the source has it now."""
    package = "coordinator" if part == "coordinator" else "node_agent"
    found: set[str] = set()
    for path in sorted((ROOT / package).rglob("*.py")):
        module = qualified(path)
        if "migrations.versions" not in module:
            found.update(_of_module(module, ast.parse(path.read_text("utf-8"))))
    return frozenset(point for point in found if part_of(_place(point, package)) == part)


def _place(point: str, package: str) -> str:
    """The function that a point is in; of a transaction only the package."""
    kind, _, rest = point.partition(":")
    return f"{package}." if kind == "tx" else rest.partition("#")[0]


def _of_module(module: str, tree: ast.Module) -> Iterator[str]:
    if module.startswith("coordinator."):
        yield from _transactions(tree)
    for name, function in _functions(tree, ""):
        ours = operations(module)
        if name.rpartition(".")[2] in ours | SQL:
            continue  # its callers are the points
        for call in _calls(function):
            said = _called(call)
            if said in SQL and not call.args and not module.startswith("coordinator."):
                yield f"sql:{module}.{name}"
            if said in ours and _is_operation(said, call):
                yield f"file:{module}.{name}#{said}"
            for argument in call.args:  # handed to a thread, which then calls it
                name_of = _name(argument)
                if name_of in ours:
                    yield f"file:{module}.{name}#{name_of}"


def _transactions(tree: ast.Module) -> Iterator[str]:
    """Names of transactions; also those that a method hands on to ``ledger.run``."""
    functions = list(_functions(tree, ""))
    takes_name = {"run"}
    while True:
        before = len(takes_name)
        for name, function in functions:
            for call in _calls(function):
                match _transaction(call, takes_name):
                    case ast.Name(id=handed_on) if handed_on in _parameters(function):
                        takes_name.add(name.rpartition(".")[2])
        if len(takes_name) == before:
            break
    for _, function in functions:
        for call in _calls(function):
            match _transaction(call, takes_name):
                case None:
                    continue
                case ast.Constant(value=str(text)):
                    yield f"tx:{text}"
                case ast.IfExp():  # secure_<kind>: one name for each kind of message
                    yield from (f"tx:{kind}" for kind in _SECURE)
                case ast.Name(id=handed_on) if handed_on in _parameters(function):
                    continue
                case other:
                    raise ValueError(f"a transaction without a fixed name: {ast.unparse(other)}")


def _transaction(call: ast.Call, takes_name: set[str]) -> ast.expr | None:
    """The name that a call gives to a transaction, if it makes one."""
    said = _called(call)
    if said not in takes_name or not call.args or not isinstance(call.func, ast.Attribute):
        return None
    if said == "run" and "ledger" not in ast.unparse(call.func.value).lower():
        return None
    return call.args[0]


def _parameters(function: ast.AST) -> set[str]:
    arguments = getattr(function, "args", None)
    return {each.arg for each in arguments.args} if arguments is not None else set()


def _is_operation(said: str, call: ast.Call) -> bool:
    """``path.replace(target)`` is one; ``text.replace(a, b)`` and ``replace(value, x=1)`` not."""
    if said in ("_write", "publish"):
        return bool(call.args)
    if said != "replace":
        return True
    return isinstance(call.func, ast.Attribute) and len(call.args) == 1 and not call.keywords


def operations(module: str) -> frozenset[str]:
    """Names of the operations in a module."""
    if module.startswith("coordinator.ledger."):
        return frozenset()  # its files are the database's
    return FILES if module.startswith("coordinator.") else OPERATIONS


def _called(call: ast.Call) -> str:
    return _name(call.func)


def _name(expression: ast.expr) -> str:
    match expression:
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
        case _:
            return ""


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    """Functions of a module and of its classes; what is inside a function belongs to it."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.ClassDef(name=name):
                yield from _functions(child, f"{prefix}{name}.")
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield f"{prefix}{name}", child


def _calls(function: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(function) if isinstance(node, ast.Call))


# Points that no round of the matrix comes to, with the reason and where they are tested instead.
# An entry that is visited, or is no point any more, fails the test as well.
ELSEWHERE: Final[dict[str, str]] = {
    "file:coordinator.aggregation.release._Files.write#fdatasync": (
        "only in models of several units; tests/unit/test_aggregation.py"
    ),
    "file:coordinator.flower_state.save#": (
        "the state of a Flower strategy, whole or absent; tests/conformance"
    ),
    "file:coordinator.log_files.LogFiles.describe#_write": (
        "before the first round of a new coordinator; tests/faults/test_log_writer_killed.py"
    ),
    "file:coordinator.log_files.LogFiles.keep_blob#_write": (
        "plans too large for a leaf; tests/faults/test_log_writer_killed.py"
    ),
    "file:coordinator.log_parts.make_keys#write_private": "`coordinator init`, run by hand",
    "file:coordinator.setup.initialise#write_private": "`coordinator init`, run by hand",
    "file:coordinator.trust_repository.": (
        "what admins signed; tests/faults/test_governed_federation.py"
    ),
    "tx:publish_trust": "what admins signed; tests/faults/test_governed_federation.py",
    "tx:register_operator": "`coordinator init`, run by hand",
    "tx:release_lease": "a polite end; a kill there is a kill at any other time",
    "tx:renew": "once a month for each certificate; tests/contract/test_node_enrolment.py",
    "tx:report_cost": "only after real training; tests/faults/test_launcher_local.py",
    "tx:enrol_person": "a person's certificate, asked for by hand; tests/contract",
    "tx:secure_abort": "a node that refuses a list; tests/attacks",
    "tx:secure_complaint": "a dealer that cheats; tests/attacks",
    "tx:statement": "what people sign by hand; tests/contract",
    "tx:sum_failed": "a sum that cannot be opened; tests/unit, tests/simulation",
    "tx:leave": "a node whose work failed; tests/faults/test_node_agent.py",
    "file:node_agent.bulk.fetch#": "large blobs only; tests/faults/test_node_killed.py",
    "file:node_agent.carry.": "work that came too late; tests/property/test_carry.py",
    "file:node_agent.cli.joining.": "`node join`, run by hand; may be repeated",
    "file:node_agent.governed.write_approval#": "`node approve`, run by hand",
    "file:node_agent.keys.write_secret#": "`node join` and renewals; may be repeated",
    "file:node_agent.launchers.": "the worker's start; tests/faults/test_launcher_*.py",
    "file:node_agent.models.Models.compute_next#link": "buffers that a round did not change",
    "file:node_agent.models.Models.obtain#link": "files that two models share",
    "file:node_agent.spool.write_job#": "real training; tests/faults/test_launcher_local.py",
    "file:node_agent.trust.": "what admins signed; tests/faults/test_governed_federation.py",
    "file:node_agent.flower_state.save#": (
        "the state of a Flower client, whole or absent; tests/conformance"
    ),
    "file:node_agent.worker.init_model.write_model#": "a model to start from, made by hand",
    "file:node_agent.witness.write_key#": "`node join`, run by hand; may be repeated",
    "sql:node_agent.journal.Journal.stop_run": "a node that stops for good; tests/attacks",
    "sql:node_agent.log_store.LogStore.clear_alarms": "a person, by hand; tests/attacks",
    "sql:node_agent.log_store.LogStore.raise_alarm": "a coordinator that lies; tests/attacks",
    "sql:node_agent.privacy_ledger.PrivacyLedger.reserve": (
        "private plans; tests/faults/test_private_federation.py"
    ),
    "sql:node_agent.privacy_ledger.PrivacyLedger.start": (
        "private plans; tests/faults/test_private_federation.py"
    ),
}
# Points that `make faults` can visit and that its last run, where it was cut short, did not come
# to: a debt. An entry that was visited meanwhile fails the test.
NOT_YET: Final[frozenset[str]] = frozenset()


def reason_elsewhere(point: str) -> str:
    """Why the matrix does not visit a point; empty: it must."""
    return next((why for name, why in ELSEWHERE.items() if names(name, point)), "")


def names(entry: str, point: str) -> bool:
    """Whether an entry is about a point: its whole name, or a part that ends with . or #."""
    return point == entry or (entry.endswith((".", "#")) and point.startswith(entry))
