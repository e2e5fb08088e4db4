"""Samples that cannot be used: counted, logged by name, left out; too many stop the run."""

from __future__ import annotations

import logging
import re
from collections import Counter

from ...checks import finite
from ...errors import ConfigurationError, InputError

logger = logging.getLogger("impasto")

_SHOWN = 3  # in the error
_LOGGED = 100  # by name; beyond that they are counted only
_QUOTED = re.compile(r"'[^']*' ?")  # such as the path of a file


class Faults:
    """The faults of one source, or of a run.

    Args:
        what: whose faults, for messages.
        limit: how many faults are accepted: below 1 a share of ``total``, but at least one (unless it is
            0) and not all; else a number.
        total: the number of samples.
    """

    def __init__(self, what: str, limit: float, total: int):
        limit = finite("max_broken", limit, 0, error=ConfigurationError)
        self.what, self.total = what, total
        self.limit = min(max(1.0, limit * total), total - 1) if 0 < limit < 1 else limit
        self.reasons: dict[str, str] = {}  # by the sample's name

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, name: str, reason: str) -> None:
        """Count a sample once.

        Raises:
            InputError: there are more faults than accepted.
        """
        if name in self.reasons:
            return
        self.reasons[name] = reason
        if len(self) <= _LOGGED:
            more = "; more are counted, but not named" if len(self) == _LOGGED else ""
            logger.warning("%s is left out: %s%s", name, reason, more)
        if len(self) > self.limit:
            names = "; ".join(f"{name}: {why}" for name, why in list(self.reasons.items())[:_SHOWN])
            raise InputError(
                f"{len(self)} of {self.total} samples of {self.what} cannot be used, and at most {self.limit:g} may be "
                f"left out (max_broken): {names}. Repair or remove them, or raise max_broken"
            )

    def counts(self) -> Counter[str]:
        """How many faults there are, by reason, without what differs from file to file."""
        return Counter(_QUOTED.sub("", reason).split(":")[0] for reason in self.reasons.values())
