"""sentencepiece's table of replacements: a trie over bytes, and the strings that its leaves point to.

The library that reads it does not check offsets: one outside the table crashes the process, possibly later. So the trie
is validated here. Its layout is that of Darts-clone: a unit of 32 bits has a label, an offset to its children, and a
flag for whether the first of them is a leaf, which holds a value.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: The most bytes that may replace a character; Unicode's longest compatibility form has 33.
MOST_GROWTH = 64

_Units = NDArray[np.int64]


def fault_of_charsmap(table: bytes) -> str | None:
    """What is wrong with a table of replacements, or None. An empty table is valid."""
    if not table:
        return None
    size = int.from_bytes(table[:4], "little")
    if len(table) < 4 or size % 4 or not 4 <= size <= len(table) - 4:
        return f"its trie has {size} bytes, and the table {len(table)}"
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
    return f"it replaces a character by {lengths.max()} bytes" if (lengths > MOST_GROWTH).any() else None


def _targets(units: _Units) -> _Units | None:
    """The values of all reachable leaves; None if a node's children would lie outside."""
    labels = units & 0x800000FF
    places = np.flatnonzero((labels >= 1) & (labels <= 255))
    origins = places ^ labels[places]  # the index of a child: the offset of its node XOR its label
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
