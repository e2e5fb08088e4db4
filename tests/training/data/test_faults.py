"""Samples that cannot be used."""

from __future__ import annotations

import pytest

from impasto.errors import InputError
from impasto.training.data.faults import Faults


@pytest.mark.parametrize(
    ("limit", "total", "accepted"), [(0, 1000, 0), (0.01, 5, 1), (0.01, 1, 0), (0.01, 300, 3), (1, 300, 1), (2, 5, 2)]
)
def test_a_share_of_few_samples_is_at_least_one(limit: float, total: int, accepted: int) -> None:
    faults = Faults("the folder", limit, total)
    for number in range(accepted):
        faults.add(str(number), "truncated")
    with pytest.raises(InputError, match=f"at most {accepted} may be left out"):
        faults.add("last", "truncated")
