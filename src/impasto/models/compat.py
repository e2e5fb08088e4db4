"""The rest of the documented surface of transformers: switches that their mathematics does not need."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from ..errors import ConfigurationError
from ..nn.fused_linear import FusedLinear


class GradientCheckpointing:
    """The switch of gradient checkpointing."""

    gradient_checkpointing = False

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass, to save memory."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations for the backward pass."""
        self.gradient_checkpointing = False


class FusedProjections:
    """The switch of fused projections, of a module whose attentions have a place ``_fused`` and ``fusible`` layers."""

    def fuse_qkv_projections(self) -> None:
        """One product for query, key and value of self-attention, and one for key and value of cross-attention.

        The state dict stays as it is. Raises ``ConfigurationError`` where an adapter wraps a projection.
        """
        try:
            for attention in self._attentions():
                attention._fused = FusedLinear(attention.fusible)
        except ConfigurationError:
            self.unfuse_qkv_projections()
            raise

    def unfuse_qkv_projections(self) -> None:
        """Undo ``fuse_qkv_projections``."""
        for attention in self._attentions():
            attention._fused = None

    def _attentions(self) -> list[Any]:
        return [module for module in cast(nn.Module, self).modules() if hasattr(module, "fusible")]

    def set_default_attn_processor(self) -> None:
        """Go back to the default attention: that is, undo ``fuse_qkv_projections``."""
        self.unfuse_qkv_projections()
