"""Hand-over: what a run has learned, in the formats of other programs."""

from __future__ import annotations
