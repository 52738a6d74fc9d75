"""The privacy terms of a plan, and which combinations of terms would break what they promise.

    record-local         every local step is a step of DP-SGD at the site, the sum is secure on top
    record-distributed   one step a round; the noise of the sites adds up under the secure sum
    institution          a site's whole update is clipped; noise as in record-distributed

A plan that breaks its own guarantee is refused with the reason, never run with a warning. What
needs the number of coordinates is checked where the model is known: ``policies.privacy.terms``.
Normative text: protocols/spec/privacy.md and plan.md, section 5.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from protocols.plan_types import Count, Part, Positive

if TYPE_CHECKING:
    from protocols.plan import LocalStep, Plan

PRIVATE_MODES: Final = ("record-local", "record-distributed", "institution")
RECORD_MODES: Final = ("record-local", "record-distributed")
SHARED_NOISE_MODES: Final = ("record-distributed", "institution")  # noise is added as integers
NOT_PRIVATE: Final = "not differentially private"

_DELTA = re.compile(r"(0\.[0-9]{1,30}|[1-9](\.[0-9]{1,15})?e-[1-9][0-9]?)")


def promise(plan: Plan) -> str:
    """What the mode of a plan promises, in a few words for every place where it is shown."""
    terms = plan.privacy
    if terms is None:
        masked = "single updates are masked, their sum is" if plan.secagg else "updates are"
        return f"mode {plan.mode}: {masked} {NOT_PRIVATE}"
    z = f"noise {terms.noise_multiplier:g} times the sensitivity"
    if plan.mode == "institution":
        return f"mode institution: differentially private by institution, {z}, delta {terms.delta}"
    where = "at each site" if plan.mode == "record-local" else "shared by the sites"
    return (
        f"mode {plan.mode}: differentially private by {terms.unit}, {z} {where}, sampling rate"
        f" {terms.sampling_rate:g}, {terms.steps} steps a round, delta {terms.delta}"
    )


class Privacy(Part):
    """What is promised to whom, and the mechanism that keeps it."""

    unit: Literal["document", "sequence", "institution"]  # whose contribution is protected
    # Of one document (unit "document"): what is beyond does not take part in its round's step.
    max_sequences: int | None = Field(default=None, ge=1, le=2**20)
    clip_norm: Positive  # C, L2: of one record's gradient; mode institution: of the whole update
    noise_multiplier: Annotated[float, Field(gt=0, le=1e4)]  # z, the noise over the sensitivity
    sampling_rate: Annotated[float, Field(gt=0, le=1)] | None = None  # q, Poisson; public
    expected_batch: Positive | None = (
        None  # records a site and step, public: sums are divided by it
    )
    steps: Count | None = None  # of each round, fixed: a count that follows the data would tell
    delta: str = Field(max_length=40)  # decimal text, exact: "1e-6" or "0.000001"
    accountant: Literal["rdp"] = "rdp"
    colluders: int | None = Field(default=None, ge=1, le=64)  # c_dp: their noise does not count
    dataset: str = Field(default="default", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")  # whose budget
    held_out: Literal["none", "public"] = "none"  # "public": text that evaluation may speak about
    insist: bool = False  # run although the planner shows that noise drowns the signal

    @field_validator("delta")
    @classmethod
    def _decimal(cls, value: str) -> str:
        if not _DELTA.fullmatch(value) or not 0 < Decimal(value) < 1:
            raise ValueError('privacy.delta is a decimal above 0 and below 1 as text, like "1e-6"')
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.unit == "document") != (self.max_sequences is not None):
            raise ValueError("privacy.max_sequences is given exactly when the unit is a document")
        sampled = (self.sampling_rate, self.expected_batch, self.steps)
        if self.unit == "institution" and any(term is not None for term in sampled):
            raise ValueError(
                "privacy: a whole institution is protected without sampling_rate, expected_batch"
                " and steps: who takes part is visible, so sampling amplifies nothing"
            )
        if self.unit != "institution" and any(term is None for term in sampled):
            raise ValueError(
                "privacy: records are protected with sampling_rate, expected_batch and steps"
            )
        if self.sampling_rate is not None and self.expected_batch is not None and not self.insist:
            records = Fraction(self.expected_batch) / Fraction(self.sampling_rate)
            if self.delta_exact * records >= 1:
                raise ValueError(
                    f"privacy.delta = {self.delta} is not below 1 in {float(records):.0f} records:"
                    " a mechanism that publishes one record at random would meet it"
                )
        return self

    @property
    def delta_exact(self) -> Fraction:
        """Delta as a fraction."""
        return Fraction(Decimal(self.delta))

    def shares(self, least_survivors: int) -> int:
        """Honest shares of noise that every opened sum holds; 1 where each site adds all of it."""
        return 1 if self.colluders is None else least_survivors - self.colluders


def check_privacy(plan: Plan) -> None:
    """Refuse what is known to break the guarantee of the plan's mode.

    Raises:
        ValueError: the sentence says what breaks and why.
    """
    terms = plan.privacy
    if (plan.mode in PRIVATE_MODES) != (terms is not None):
        raise ValueError(
            f"privacy is given exactly in the modes {', '.join(PRIVATE_MODES)}; mode {plan.mode}"
            + (" needs it" if terms is None else f" is {NOT_PRIVATE}")
        )
    if terms is None:
        return
    if (plan.mode == "institution") != (terms.unit == "institution"):
        raise ValueError(f"privacy.unit {terms.unit} is not what mode {plan.mode} protects")
    if plan.vector.weight_cap_tokens is not None:
        raise ValueError(
            "vector.weight_cap_tokens: a weight that follows the number of tokens is private data"
            " that no noise covers; leave it out, and every survivor weighs the same"
        )
    if plan.evaluation.languages and terms.held_out != "public":
        raise ValueError(
            "evaluation.languages: scores on held-out text are not covered by the noise; leave them"
            ' out, or say privacy.held_out = "public" where that text is public'
        )
    if plan.mode == "institution":
        _check_shared_noise(plan, terms)
        return
    _check_record_step(plan.local_step, terms)
    if plan.mode == "record-local":
        if terms.colluders is not None:
            raise ValueError(
                "privacy.colluders: in mode record-local every site adds all of its own noise"
            )
        return
    _check_one_step(plan.local_step, terms)
    _check_shared_noise(plan, terms)


def _check_record_step(step: LocalStep, terms: Privacy) -> None:
    if step.kind == "flower":
        raise ValueError(
            "local_step.kind flower: Minga cannot see that an app clips each record and adds noise"
            " in every step; only mode institution, which clips the whole update, can run apps"
        )
    if step.grad_clip is not None:
        raise ValueError(
            "local_step.grad_clip: clipping a batch's gradient does not bound what one record"
            " does to it; privacy.clip_norm clips each record's"
        )
    if step.proximal_mu:
        raise ValueError("local_step.proximal_mu: mixes the model into what is clipped per record")
    if step.max_tokens is not None or step.max_seconds is not None:
        raise ValueError(
            "local_step: stopping by tokens or seconds makes the number of steps tell of the data;"
            " a private step has max_steps = privacy.steps alone"
        )
    if step.kind == "builtin" and step.max_steps != terms.steps:
        raise ValueError(
            f"local_step.max_steps = {step.max_steps} is not privacy.steps = {terms.steps}, which"
            " is what is charged"
        )


def _check_one_step(step: LocalStep, terms: Privacy) -> None:
    if terms.steps != 1:
        raise ValueError(
            "privacy.steps: noise shared between sites hides a record in one gradient only; after"
            " a second local step on it, it does not. Mode record-distributed has steps = 1"
        )
    if step.optimizer != "sgd" or step.momentum or step.weight_decay or step.warmup_steps:
        raise ValueError(
            "local_step: in mode record-distributed a site sends the sum of clipped gradients"
            " itself: optimizer sgd without momentum, weight_decay and warmup_steps"
        )
    if step.lr != 1.0:
        raise ValueError("local_step.lr is 1 in mode record-distributed: outer.lr is the rate")
    if step.keep_optimizer:
        raise ValueError(
            "local_step.keep_optimizer: what a site keeps from one sum for the next is gradient"
            " without noise; say false"
        )


def _check_shared_noise(plan: Plan, terms: Privacy) -> None:
    if terms.colluders is None:
        raise ValueError(
            "privacy.colluders: whoever knows its own share of the noise can take it off; say how"
            " many members' shares do not count, at least 1"
        )
    if plan.vector.clip_norm is not None:
        raise ValueError(
            f"vector.clip_norm: in mode {plan.mode} privacy.clip_norm is the one that noise is"
            " made for; leave the other out"
        )
    if plan.vector.scale.mode != "fixed":
        raise ValueError(
            f"vector.scale: mode {plan.mode} adds the same noise to every coordinate and needs one"
            " scale for all of them, known beforehand: mode fixed with an exponent"
        )
    if plan.secagg is None:
        return  # refused elsewhere
    least = max(plan.secagg.threshold, plan.secagg.min_surviving)
    if terms.shares(least) < 1:
        raise ValueError(
            f"privacy.colluders = {terms.colluders} leaves no honest share of noise in a sum of"
            f" {least} survivors"
        )
    if terms.colluders < plan.secagg.colluders:
        raise ValueError(
            f"privacy.colluders = {terms.colluders} is less than the {plan.secagg.colluders} that"
            " secagg.colluders assumes to side with the coordinator"
        )
