"""The plan: the terms of a run, as one value that everybody hashes alike.

A plan says which model is trained, by whom, how one round goes, what leaves a site and when each
phase ends. It is fixed before the run; a change is another run. Its digest is bound into every
upload header. Who must sign a plan is policy, not format: the bytes below are what gets signed.

Canonical form: RFC 8785 JSON of all fields, defaults written out (``Plan.to_bytes``). Reading is
strict: unknown fields, wrong types and non-canonical bytes are refused. Normative text:
protocols/spec/plan.md.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from protocols.canonical import canonical_bytes, hash_hex, parse_canonical
from protocols.errors import MalformedMessageError, PlanRefusedError
from protocols.identifiers import (
    Digest,
    FederationId,
    NodeId,
    RunId,
    parse_federation_id,
    parse_run_id,
)
from protocols.plan_evaluation import Evaluation
from protocols.plan_model import Model, check_factors, factors_in
from protocols.plan_privacy import SHARED_NOISE_MODES, Privacy, check_privacy
from protocols.plan_terms import Terms
from protocols.plan_types import (
    Count,
    Finite,
    KeyText,
    NodeName,
    NonNegative,
    Part,
    Positive,
    Seconds,
)
from protocols.secagg.threshold import MAX_ROSTER, SecaggTerms
from protocols.strata import Strata, strata_of

PLAN_SCHEMA: Final = "minga.plan/1"

Mode = Literal["open", "aggregate-only", "record-local", "record-distributed", "institution"]
MODES: Final[tuple[Mode, ...]] = get_args(Mode)


class Synthetic(Part):
    """A local step without training: every coordinate of the delta is this constant."""

    delta: Finite = 0.001


class LocalStep(Part):
    """What a site does between receiving a model and being ready."""

    kind: Literal["builtin", "flower", "synthetic"] = "builtin"
    app: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", max_length=200)
    app_config: dict[str, int | float | bool | str] = Field(default_factory=dict, max_length=64)
    synthetic: Synthetic | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-3
    betas: tuple[Finite, Finite] = (0.9, 0.95)
    weight_decay: NonNegative = 0.0
    momentum: NonNegative = 0.0
    warmup_steps: int = Field(default=0, ge=0, le=10**9)
    batch_size: int = Field(default=8, ge=1, le=2**20)  # sequences, over all ranks of a site
    sequence_length: int = Field(default=128, ge=8, le=2**20)  # tokens
    grad_clip: Positive | None = None  # L2 norm of the batch gradient
    proximal_mu: NonNegative = 0.0  # FedProx
    max_steps: Count | None = None
    max_tokens: Count | None = None
    max_seconds: Seconds | None = None
    min_steps: Count = 1  # with fewer a node leaves the round: its update would be noise
    keep_optimizer: bool = True

    @field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.kind == "flower") != (self.app is not None):
            raise ValueError("local_step.app is given exactly when kind is flower")
        if (self.kind == "synthetic") != (self.synthetic is not None):
            raise ValueError("local_step.synthetic is given exactly when kind is synthetic")
        limits = (self.max_steps, self.max_tokens, self.max_seconds)
        if self.kind == "builtin" and all(limit is None for limit in limits):
            raise ValueError("local_step needs max_steps, max_tokens or max_seconds")
        if self.max_steps is not None and self.min_steps > self.max_steps:
            raise ValueError("local_step.min_steps is more than max_steps")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("local_step.betas must be in [0, 1)")
        return self


class Outer(Part):
    """How the mean update becomes the next model."""

    optimizer: str = Field(default="average", pattern=r"^(average|nesterov|flower:[A-Za-z]+)$")
    lr: Positive = 1.0
    momentum: NonNegative = 0.0
    options: dict[str, float] = Field(default_factory=dict, max_length=16)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.optimizer == "average" and self.momentum:
            raise ValueError("outer.momentum needs optimizer nesterov")
        if self.momentum >= 1:
            raise ValueError("outer.momentum must be below 1")
        if self.options and not self.optimizer.startswith("flower:"):
            raise ValueError("outer.options are for flower optimizers")
        return self


class Scale(Part):
    """Public fixed-point scales, powers of two, known before the round."""

    mode: Literal["per-block", "fixed"] = "per-block"
    first_bound: Positive = 0.05  # largest |weight * delta| expected per coordinate in round 0
    k_permille: int = Field(default=8000, ge=1, le=10**6)  # headroom over the rms of the mean
    floor: Positive = 1e-7  # smallest bound a block's scale is made for
    exponent: int | None = Field(default=None, ge=-100, le=100)  # mode "fixed": scale = 2**exponent

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.mode == "fixed") != (self.exponent is not None):
            raise ValueError("vector.scale.exponent is given exactly when mode is fixed")
        return self


class Vector(Part):
    """How an update becomes integers."""

    ring_bits: Literal[16, 20, 24] = 20
    weight_cap_tokens: Count | None = None  # None: every survivor weighs the same
    clip_norm: Positive | None = None  # L2, of the whole update
    resources: bool = False  # what local steps cost, as coordinates of the sum
    scale: Scale = Scale()


class Deadlines(Part):
    """How long each phase may last, in seconds."""

    join: Seconds = 120
    train: Seconds = 3600
    deal: Seconds = 120
    upload: Seconds = 3600
    commit: Seconds = 120
    reveal: Seconds = 120


class SecureAggregation(Part):
    """Sizes of the secure sum; needed by every mode but ``open``."""

    threshold: int = Field(ge=2, le=MAX_ROSTER)  # nodes that must see it through
    colluders: int = Field(ge=0, le=MAX_ROSTER)  # nodes assumed to side with the coordinator
    min_surviving: int = Field(ge=2, le=MAX_ROSTER)  # nodes in any opened sum
    # The Ed25519 key (hex) of every node on the roster: the plan's digest pins who may speak.
    keys: dict[NodeName, KeyText] = Field(max_length=MAX_ROSTER)


class Plan(Part):
    """The terms of one run."""

    schema_: Literal["minga.plan/1"] = Field(default=PLAN_SCHEMA, alias="schema")
    federation: Annotated[str, AfterValidator(parse_federation_id)]
    run: Annotated[str, AfterValidator(parse_run_id)]
    title: str = Field(default="", max_length=200)
    mode: Mode = "open"
    roster: tuple[NodeName, ...] = Field(min_length=1, max_length=MAX_ROSTER)
    min_participants: int = Field(ge=1, le=MAX_ROSTER)
    rounds: int = Field(ge=1, le=10**5)  # training rounds
    model: Model
    trainable: Literal["all"] | tuple[str, ...] = "all"
    local_step: LocalStep = LocalStep(max_steps=100)
    outer: Outer = Outer()
    vector: Vector = Vector()
    deadlines: Deadlines = Deadlines()
    evaluation: Evaluation = Evaluation()
    secagg: SecureAggregation | None = None
    privacy: Privacy | None = None  # exactly in the modes that are differentially private
    terms: Terms | None = None  # None: a run without a consortium policy

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, populate_by_name=True
    )

    @field_validator("roster", "trainable", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if list(self.roster) != sorted(set(self.roster)):
            raise ValueError("roster must be unique and in ascending order")
        if self.min_participants > len(self.roster):
            raise ValueError(
                f"min_participants={self.min_participants} is more than the roster's"
                f" {len(self.roster)} nodes"
            )
        if isinstance(self.trainable, tuple) and not self.trainable:
            raise ValueError("trainable must name at least one tensor")
        if (self.mode == "open") != (self.secagg is None):
            raise ValueError("secagg is given exactly when mode is not open")
        if self.secagg is not None:
            try:
                terms = SecaggTerms(
                    roster_size=len(self.roster),
                    threshold=self.secagg.threshold,
                    colluders=self.secagg.colluders,
                    min_surviving=self.secagg.min_surviving,
                )
            except PlanRefusedError as error:
                raise ValueError(f"secagg: {error}") from None
            if sorted(self.secagg.keys) != list(self.roster):
                raise ValueError("secagg.keys must hold one key for each node of the roster")
            if len(set(self.secagg.keys.values())) != len(self.roster):
                raise ValueError("secagg.keys: two nodes have the same key")
            if self.min_participants < max(3, terms.threshold):
                raise ValueError("secagg: min_participants must be at least the threshold and 3")
        self._check_strata()
        if self.model.lora is not None:
            check_factors(self.trainable, self.model.lora)
        check_privacy(self)
        return self

    def _check_strata(self) -> None:
        if strangers := sorted(set(self.evaluation.sites or ()) - set(self.roster)):
            raise ValueError(f"evaluation.sites: {strangers[0]} is not on the roster")
        try:
            _ = self.strata
        except ValueError as error:
            raise ValueError(f"evaluation.sites: {error}") from None

    # -- held-out figures --------------------------------------------------------------------

    @property
    def strata(self) -> Strata | None:
        """What is opened of held-out text; None: sums by language, as the plan lists them.

        A masked sum may lack as many nodes as the plan lets it lose: they do not count.
        """
        declared = self.evaluation.sites
        if not declared:
            return None
        lost = 0
        if self.secagg is not None:
            lost = len(self.roster) - max(self.secagg.threshold, self.secagg.min_surviving)
        sites = tuple((n, t.country, t.languages) for n, t in sorted(declared.items()))
        return strata_of(sites, self.evaluation.min_sites + lost)

    # -- rounds of the run -------------------------------------------------------------------

    @property
    def total_rounds(self) -> int:
        """Training rounds and, where asked for, the evaluation-only round after them."""
        return self.rounds + (1 if self.evaluation.final and self.evaluation.languages else 0)

    def trains_in(self, number: int) -> bool:
        """Whether round ``number`` trains; the one after the last training round evaluates."""
        return number < self.rounds

    def evaluates_in(self, number: int) -> bool:
        """Whether the starting model of round ``number`` is evaluated."""
        if not self.evaluation.languages:
            return False
        return not self.trains_in(number) or number % self.evaluation.every == 0

    @property
    def adds_noise(self) -> bool:
        """Whether sites add whole-number noise to the vector itself."""
        return self.mode in SHARED_NOISE_MODES

    def selection_in(self, number: int) -> Literal["all", "none"] | tuple[str, ...]:
        """The tensors whose update leaves the sites in round ``number``: public, by the plan."""
        if not self.trains_in(number):
            return "none"
        if self.model.lora is not None and self.trainable != "all":
            return factors_in(self.trainable, self.model.lora, number)
        return self.trainable

    # -- bytes -------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Canonical JSON, defaults written out."""
        return canonical_bytes(self.model_dump(mode="json", by_alias=True))

    @property
    def digest(self) -> Digest:
        """What headers, logs and signatures name."""
        return hash_hex("minga/plan/v1", self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """Read a canonical plan.

        Raises:
            MalformedMessageError: not canonical, or a field is wrong; the sentence names it.
        """
        return cls.from_value(parse_canonical(data))

    @classmethod
    def from_value(cls, value: Any) -> Plan:
        """Read a plan from parsed JSON or TOML.

        Raises:
            MalformedMessageError: the sentence names the first wrong field.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "plan"
            more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
            message = first["msg"].removeprefix("Value error, ")
            raise MalformedMessageError(f"plan: {where}: {message}{more}") from None

    # typed views of validated names

    @property
    def federation_id(self) -> FederationId:
        """The federation, typed."""
        return FederationId(self.federation)

    @property
    def run_id(self) -> RunId:
        """The run, typed."""
        return RunId(self.run)

    @property
    def roster_ids(self) -> tuple[NodeId, ...]:
        """The roster, typed, ascending."""
        return tuple(NodeId(name) for name in self.roster)
