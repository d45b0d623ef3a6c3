"""What sections of settings are made of: a strict model, and kinds of numbers with their bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MOST_TEXT = 1000
"""Characters of a name."""

SINGLE = BeforeValidator(lambda v: [v] if isinstance(v, str) or type(v) is int else v)
"""Lets one name or number stand for the list of it: `-o mlb.views=flip`."""

FEW = Field(max_length=16)

# The numbers are far beyond any use: nothing above them can be computed, or ends.
Steps = Annotated[int, Field(ge=1, le=1_000_000_000)]
Patches = Annotated[int, Field(ge=1, le=4096)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Noise = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]
Ramp = Annotated[float, Field(gt=0, le=1)]
"""A share of the stage."""
Below1 = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A section of settings. A field's `description` is what help and reference say of it."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, allow_inf_nan=False, str_max_length=MOST_TEXT
    )
