"""Configurations of training. They need the extra ``train``."""

from __future__ import annotations

from ...optional import require

require("pydantic", "training", "impasto[train]")
