"""sentencepiece's table of replacements: a trie over bytes, and the texts that its leaves point to.

The library that reads it follows every offset without looking: one that leads out of the table ends the process, or a
later call. So the trie is walked here once. Its layout is that of Darts-clone: a unit of 32 bits has a label, an offset
to its children, and whether a leaf, which holds a value, is the first of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Bytes that one character may become: the longest of Unicode's compatibility forms takes 33.
MOST_GROWTH = 64

_Units = NDArray[np.int64]


def fault_of_charsmap(table: bytes) -> str | None:
    """What is wrong with a table of replacements; None if it can be used. An empty one replaces nothing."""
    if not table:
        return None
    size = int.from_bytes(table[:4], "little")
    if len(table) < 4 or size % 4 or not 4 <= size <= len(table) - 4:
        return f"its trie has {size} bytes, of {len(table)}"
    units = np.frombuffer(table, "<u4", size // 4, offset=4).astype(np.int64)
    targets = _targets(units)
    if targets is None:
        return "its trie leads out of it"
    texts = table[4 + size :]
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError:
        return "its replacements are not UTF-8"
    if len(targets) and targets.max() >= len(texts):
        return "its trie points past the end of its replacements"
    values = np.frombuffer(texts, np.uint8)
    if ((values[targets] & 0xC0) == 0x80).any():
        return "its trie points into the middle of a character"
    ends = np.append(np.flatnonzero(values == 0), len(values))
    lengths = ends[np.searchsorted(ends, targets)] - targets
    return f"it makes {lengths.max()} bytes of a character" if (lengths > MOST_GROWTH).any() else None


def _targets(units: _Units) -> _Units | None:
    """The values of all leaves that can be reached; None if a node's children would lie outside."""
    labels = units & 0x800000FF
    places = np.flatnonzero((labels >= 1) & (labels <= 255))
    origins = places ^ labels[places]  # a child lies at the offset of its node, changed by its label
    order = np.argsort(origins, kind="stable")
    places, origins = places[order], origins[order]
    seen = np.zeros(len(units), bool)
    nodes = np.array([0])
    leaves: list[_Units] = []
    while len(nodes):
        seen[nodes] = True
        children = nodes ^ _offsets(units[nodes])
        if (children | 0xFF).max() >= len(units):
            return None
        leaves.append(units[children[(units[nodes] >> 8) & 1 == 1]] & 0x7FFFFFFF)
        first, last = (np.searchsorted(origins, children, side) for side in ("left", "right"))
        runs = [places[start:end] for start, end in zip(first, last, strict=True) if end > start]
        nodes = np.unique(np.concatenate(runs)) if runs else nodes[:0]
        nodes = nodes[~seen[nodes]]
    return np.concatenate(leaves)


def _offsets(units: _Units) -> _Units:
    return (units >> 10) << ((units & 0x200) >> 6)
