"""Networks that the recipes name."""

from __future__ import annotations

from torch import nn

from .glyphs import GlyphCNN

__all__ = ["GlyphCNN", "build_model"]


def build_model(name: str, *, num_classes: int, width: int) -> nn.Module:
    """The network called ``name`` in recipes. Raises ``ValueError`` for an unknown name."""
    if name == "glyph_cnn":
        return GlyphCNN(num_classes, width=width)
    raise ValueError(f"unknown model {name!r}; expected glyph_cnn")
