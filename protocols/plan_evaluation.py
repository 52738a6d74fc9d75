"""What a plan says of held-out evaluation: how often, in which languages, and who holds what."""

from __future__ import annotations

from typing import Any, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from protocols.plan_types import Count, Country, Language, NodeName, Part
from protocols.secagg.threshold import MAX_ROSTER
from protocols.strata import ELSEWHERE, OTHER


class SiteTexts(Part):
    """Where a site's held-out texts belong, in public."""

    country: Country
    languages: tuple[Language, ...] = Field(min_length=1, max_length=64)

    @field_validator("languages", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if list(self.languages) != sorted(set(self.languages)):
            raise ValueError("a site's languages must be unique and in ascending order")
        if OTHER in self.languages or self.country == ELSEWHERE:
            raise ValueError(f"{OTHER} and {ELSEWHERE} stand for what is not opened by itself")
        return self


class Evaluation(Part):
    """Held-out evaluation of each round's starting model, at the sites, through the same sum."""

    languages: tuple[Language, ...] = Field(default=(), max_length=64)
    max_documents: Count | None = None  # per site
    final: bool = True  # one evaluation-only round after the last training round
    every: int = Field(default=1, ge=1, le=10**6)  # rounds
    # What sites hold. Given, figures are opened by country too, and never for few sites.
    sites: dict[NodeName, SiteTexts] | None = Field(default=None, max_length=MAX_ROSTER)
    min_sites: int = Field(default=3, ge=2, le=MAX_ROSTER)  # that any opened figure depends on

    @field_validator("languages", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("languages")
    @classmethod
    def _unique(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("evaluation.languages must be unique and in ascending order")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sites is None:
            if self.min_sites != 3:
                raise ValueError("evaluation.min_sites needs evaluation.sites")
        elif self.languages != tuple(sorted({x for s in self.sites.values() for x in s.languages})):
            raise ValueError("evaluation.languages must be those of evaluation.sites")
        return self

    @model_serializer(mode="wrap")
    def _without_new(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A plan that does not say what sites hold keeps the bytes it had before it could."""
        value: dict[str, Any] = handler(self)
        if self.sites is None:
            value.pop("sites", None)
            value.pop("min_sites", None)
        return value
