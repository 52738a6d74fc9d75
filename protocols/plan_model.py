"""What a plan trains: a model of our own, or one from a folder that every site holds.

    llama        a byte-level Llama; all of it is in the snapshot
    huggingface  a causal language model from a local folder. Without ``lora`` its weights are the
                 snapshot; with it only the adapters are, and the folder's weights stay as they are
    vector       one float32 tensor, for tests and benchmarks

``base`` is the digest of the folder (``node_agent.model_folder``): sites with other files refuse.

LoRA: ``W + (alpha / rank) * B A``. Which factor is trained, and sent, is public for each round:

    ffa      B alone; A stays as the snapshot has it. The mean of updates is exact, noise is linear
    rolora   B in even rounds, A in odd ones. Exact in each round
    fedit    both. mean(B) mean(A) is not mean(B A): a baseline
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from protocols.plan_types import DigestText, Part, Positive

FACTOR_A: Final = ".lora_A."
FACTOR_B: Final = ".lora_B."

Factors = Literal["ffa", "rolora", "fedit"]


class Lora(Part):
    """Adapters of low rank on some linear layers."""

    factors: Factors
    rank: int = Field(ge=1, le=4096)  # one for the whole run: ranks are never padded
    alpha: Positive
    targets: tuple[str, ...] = Field(min_length=1, max_length=64)  # module names, as in peft
    base_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the folder's weights in memory

    @field_validator("targets", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("targets")
    @classmethod
    def _unique(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if list(value) != sorted(set(value)) or not all(value):
            raise ValueError("model.lora.targets must be unique and in ascending order")
        return value


class Model(Part):
    """What is trained. ``initial`` pins the very bytes of round 0."""

    family: Literal["llama", "huggingface", "vector"]
    config: dict[str, int | float | bool | str | None] = Field(default_factory=dict, max_length=64)
    seed: int = Field(default=0, ge=0, le=2**31 - 1)  # of the initial weights
    manifest: DigestText  # of the parameter set: names, shapes, order
    initial: DigestText  # model_root of the snapshot that round 0 starts from
    base: DigestText | None = None  # of the folder; exactly for family huggingface
    lora: Lora | None = None

    @property
    def listed(self) -> str:
        """What a policy lists: the folder of frozen weights under adapters, else the snapshot."""
        return self.base if self.base is not None and self.lora is not None else self.initial

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.family == "huggingface") != (self.base is not None):
            raise ValueError("model.base is given exactly when family is huggingface")
        if self.lora is not None and self.family != "huggingface":
            raise ValueError("model.lora needs family huggingface")
        if self.base is not None and self.config:
            raise ValueError("model.config: a model from a folder has the folder's config.json")
        return self


def check_factors(trainable: Literal["all"] | tuple[str, ...], lora: Lora) -> None:
    """Refuse a plan of adapters whose trained tensors are not its factors.

    Raises:
        ValueError: the sentence says why.
    """
    if trainable == "all":
        raise ValueError("trainable: a plan with model.lora names its tensors, for each factor")
    strange = [name for name in trainable if FACTOR_A not in name and FACTOR_B not in name]
    if strange:
        raise ValueError(f"trainable: {strange[0]} is no factor of an adapter")
    for factor, wanted in ((FACTOR_B, True), (FACTOR_A, lora.factors == "rolora")):
        if wanted and not any(factor in name for name in trainable):
            raise ValueError(f"trainable: model.lora.factors {lora.factors} needs {factor} tensors")


def factors_in(trainable: Iterable[str], lora: Lora, number: int) -> tuple[str, ...]:
    """The tensors that round ``number`` trains: round 0 of rolora trains B, for A has no gradient
    while B is zero."""
    match lora.factors:
        case "fedit":
            return tuple(trainable)
        case "ffa":
            wanted = FACTOR_B
        case "rolora":
            wanted = FACTOR_A if number % 2 else FACTOR_B
    return tuple(name for name in trainable if wanted in name)
