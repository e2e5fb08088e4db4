"""Buckets: the nearest aspect ratio, and what is dropped for which reason."""

from __future__ import annotations

import numpy as np
import pytest

from impasto.errors import ConfigurationError, InputError
from impasto.training.data.buckets import REASONS, TOO_EXTREME, TOO_SMALL, Buckets, cover, sizes_of


def test_each_image_goes_to_the_nearest_ratio_by_its_logarithm() -> None:
    buckets = Buckets(((100, 100), (100, 200), (200, 100)))
    sizes = [(300, 300), (300, 420), (300, 430), (420, 300), (430, 300)]  # the border is at sqrt(2)
    chosen, reasons = buckets.assign(np.array(sizes))
    assert chosen.tolist() == [0, 0, 1, 0, 2]
    assert not reasons.any()


@pytest.mark.parametrize(("base", "count"), [(256, 33), (512, 33), (1024, 33), (2048, 40), (2880, 40)])
def test_the_tables_of_pixart(base: int, count: int) -> None:
    buckets = Buckets.of_base(base)
    assert len(buckets.sizes) == count
    assert (base, base) in buckets.sizes
    own = np.array(buckets.sizes)
    assert buckets.assign(own)[0].tolist() == list(range(count))
    assert buckets.assign(own[:, ::-1] * 3)[0].min() >= 0


def test_of_one_ratio_the_largest_that_needs_no_enlargement() -> None:
    buckets = Buckets(((64, 64), (128, 128), (256, 256)), max_upscale=8)
    assert buckets.assign(np.array([(40, 40), (64, 64), (130, 130), (1000, 1000)]))[0].tolist() == [0, 0, 1, 2]


def test_what_is_dropped_and_why() -> None:
    buckets = Buckets(((64, 64),), max_upscale=2.0, max_crop=0.5)
    chosen, reasons = buckets.assign(np.array([(32, 32), (31, 31), (64, 128), (64, 130), (31, 1000)]))
    assert chosen.tolist() == [0, -1, 0, -1, -1]
    assert [REASONS[r] for r in reasons] == ["", TOO_SMALL, "", TOO_EXTREME, TOO_SMALL]


def test_an_image_covers_its_bucket() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = tuple(rng.integers(1, 500, 2).tolist())
        target = tuple(rng.integers(1, 500, 2).tolist())
        height, width = cover(size, target)
        assert height >= target[0]
        assert width >= target[1]
        assert height == target[0] or width == target[1]
    with pytest.raises(InputError, match="empty"):
        cover((0, 4), (8, 8))


def test_what_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not of 300"):
        Buckets.of_base(300)
    with pytest.raises(ConfigurationError, match="no buckets"):
        Buckets(())
    with pytest.raises(ConfigurationError, match="twice"):
        Buckets(((8, 8), (8, 8)))
    with pytest.raises(ConfigurationError, match="the width of a bucket"):
        Buckets(((8, 0),))
    with pytest.raises(ConfigurationError, match="max_crop"):
        Buckets(((8, 8),), max_crop=2)
    with pytest.raises(ConfigurationError, match="pairs"):
        sizes_of([[8, 8, 8]])
