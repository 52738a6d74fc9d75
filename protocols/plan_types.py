"""What the parts of a plan are made of: frozen values, bounded numbers, checked names."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from protocols.identifiers import parse_digest, parse_node_id


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return value


Finite = Annotated[float, AfterValidator(_finite)]
Positive = Annotated[float, Field(gt=0, le=1e12), AfterValidator(_finite)]
NonNegative = Annotated[float, Field(ge=0, le=1e12), AfterValidator(_finite)]
Count = Annotated[int, Field(ge=1, le=2**53 - 1)]
Seconds = Annotated[int, Field(ge=1, le=30 * 86_400)]
Language = Annotated[str, Field(pattern=r"^[a-z]{2,8}(-[a-z0-9]{1,8})*$")]
Country = Annotated[str, Field(pattern=r"^[A-Z]{2}$")]  # ISO 3166
NodeName = Annotated[str, AfterValidator(parse_node_id)]
KeyText = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
DigestText = Annotated[str, AfterValidator(parse_digest)]


class Part(BaseModel):
    """A frozen part of a plan: strict types, no unknown fields."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants"
    )
