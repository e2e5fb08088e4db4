"""The largest values that a call or a command takes: what lies beyond is a slip or an attack, and would cost hours."""

from __future__ import annotations

SIDE = 8192  # pixels of a generated image, along a side
PIXELS = SIDE * SIDE  # of an image that is given
FILE_BYTES = 256 << 20  # of an image file
STEPS = 10_000
IMAGES = 10_000  # of a call, or of a command
GUIDANCE = 1000.0  # in magnitude; float16 reaches 65504
TOKENS = 4096  # of a text
CHARACTERS = 20_000  # of a prompt: more than any text encoder here reads
