"""How each record's gradient is made and clipped, or why it cannot be. Pure, no torch.

    hooks   Opacus keeps every record's gradient of a batch: one device, memory batch x d
    ghost   Opacus finds the norms without the gradients and goes back twice: one device, untied
            weights, one row a record
    loop    one record at a time: any number of ranks, recomputed activations, tied weights

All three clip the same gradients to the same norm. What is known to break the promise is refused
here, with a code and the reason: a warning that nobody reads protects nobody. What a plan can get
wrong by itself (a clip of the batch, momentum under shared noise) is refused where plans are read,
``protocols.plan_privacy``. tests/numerics/test_private_clipping.py shows what breaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from node_agent.resident import JobFailedError

Way = Literal["hooks", "ghost", "loop"]
WAYS: Final[tuple[Way, ...]] = ("hooks", "ghost", "loop")
HOOKS_BYTES: Final = 512 * 2**20  # of kept gradients before ghost or the loop is taken instead
MOST_ROWS: Final = 32  # rows of a batch on a device at once

# Modules whose parameters a gradient per record is known for, by class name.
KNOWN: Final = frozenset({"Linear", "Embedding", "LlamaRMSNorm", "RMSNorm", "LayerNorm"})
# Parts of the class names of modules whose output for one record depends on the others.
MIXING: Final = ("BatchNorm", "InstanceNorm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What matters about a model, as plain values."""

    trainable: int  # coordinates, d
    modules: frozenset[str]  # class names of modules that hold trained parameters
    mixing: tuple[str, ...]  # class names of modules that mix records
    dropout: float  # the largest probability in the model
    trainable_buffers: tuple[str, ...]  # trained modules with running statistics
    tied: bool  # one tensor is used in two places
    checkpointing: Literal["off", "reentrant", "non-reentrant"]
    routed: bool = False  # experts with a loss over the batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What matters about the machine and the plan."""

    ranks: int
    loss: Literal["record-mean", "token-mean"]
    sharded_trainables: bool  # a rank holds only a part of a record's gradient
    half_precision: bool  # matrix work in bfloat16
    longest_record: int  # rows
    wanted: Way | None = None  # the site insists on one


def _refuse(code: str, why: str) -> JobFailedError:
    return JobFailedError(f"private.{code}", why)


def check_structure(model: Structure) -> None:
    """Refuse models for which "one record's gradient" means nothing.

    Raises:
        JobFailedError: private.batch_statistics, .dropout, .routing, .module, .nothing.
    """
    if not model.trainable:
        raise _refuse("nothing", "no tensor is trained, so there is nothing to clip")
    if model.mixing or model.trainable_buffers:
        names = ", ".join((*model.mixing, *model.trainable_buffers))
        raise _refuse(
            "batch_statistics",
            f"{names} mixes the records of a batch: clipping one bounds nothing",
        )
    if model.dropout > 0:
        raise _refuse(
            "dropout",
            f"dropout of {model.dropout:g}: that records are clipped exactly under dropout was"
            " never shown; set it to 0",
        )
    if model.routed:
        raise _refuse(
            "routing", "experts balanced over a batch mix its records: clipping one bounds nothing"
        )
    unknown = sorted(model.modules - KNOWN)
    if unknown:
        raise _refuse(
            "module", f"no gradient per record is known for modules of kind {', '.join(unknown)}"
        )


def check_setting(setting: Setting) -> None:
    """Refuse arithmetic that does not bound what a record can do.

    Raises:
        JobFailedError: private.token_mean, private.clip_after_scatter.
    """
    if setting.loss == "token-mean":
        raise _refuse(
            "token_mean",
            "a mean over the tokens of a padded batch lets every record change the weight of all"
            " others: neighbouring sums were 5.6 clip norms apart",
        )
    if setting.sharded_trainables:
        raise _refuse(
            "clip_after_scatter",
            "a rank that holds a shard sees gradients only after they were added up over the"
            " ranks: the trained tensors must be whole on every rank",
        )


def way_for(model: Structure, setting: Setting) -> Way:
    """The way to take: what the site wants where it is right, else the quickest right one.

    Raises:
        JobFailedError: as ``check_structure`` and ``check_setting``; private.path: the way that is
            wanted is wrong here, and why.
    """
    check_structure(model)
    check_setting(setting)
    against = {way: _against(way, model, setting) for way in WAYS}
    if setting.wanted is not None:
        if why := against[setting.wanted]:
            raise _refuse("path", f"{setting.wanted}: {why}")
        return setting.wanted
    right = [way for way in WAYS if not against[way]]
    if "hooks" in right and rows_at_once("hooks", model, setting) >= min(
        MOST_ROWS, 4 * setting.longest_record
    ):
        return "hooks"
    return "ghost" if "ghost" in right else "loop"


def _against(way: Way, model: Structure, setting: Setting) -> str:
    """Why a way is wrong; empty if it is right."""
    if way == "loop":
        return ""
    if setting.ranks > 1:
        return (
            "Opacus hooks on several ranks scale gradients and noise by their number, silently;"
            " several ranks take one record at a time"
        )
    if model.checkpointing == "non-reentrant":
        return "with non-reentrant checkpointing the hooks miss gradients"
    if way == "ghost" and model.tied:
        return "a tensor used in two places has a norm that is not the sum of both"
    if way == "ghost" and setting.half_precision:
        return "norms in bfloat16 are not those of the gradients that are added up"
    if way == "ghost" and setting.longest_record > 1:
        return "a record of several rows is clipped once, and ghost norms are of single rows"
    if way == "hooks" and 4 * model.trainable * setting.longest_record > HOOKS_BYTES:
        return "the gradients of one record's rows do not fit"
    return ""


def rows_at_once(way: Way, model: Structure, setting: Setting, *, micro_batch: int = 0) -> int:
    """How many rows go through the model together; with hooks at least the longest record.

    Args:
        way: of ``way_for``.
        model, setting: as there.
        micro_batch: what the site allows; 0 says nothing.
    """
    rows = min(MOST_ROWS, micro_batch or MOST_ROWS)
    if way != "hooks":
        return rows
    return max(min(rows, HOOKS_BYTES // (4 * model.trainable)), setting.longest_record)
