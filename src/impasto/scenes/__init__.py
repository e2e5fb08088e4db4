"""The small captioned world of shaded solids that the bundled model is trained and judged on."""
