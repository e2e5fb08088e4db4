"""The errors that callers can do something about.

    ImpastoError
    ├── ConfigurationError (ValueError)        a constructor argument or config value that cannot be used
    ├── InputError (ValueError)                an argument of a call that cannot be used: prompt, size, mask, ...
    ├── CheckpointError (ValueError)           a folder or file that is not a readable checkpoint
    │   ├── CheckpointNotFoundError (FileNotFoundError)   a model, a component or a file is missing
    │   └── WeightsMismatchError               tensors that do not fit the model: missing, extra, misshapen
    ├── HubError (ConnectionError)             a model cannot be downloaded
    ├── MissingDependencyError (ImportError)   an optional library is missing; the message has the install command
    ├── ResourceError (RuntimeError)           the machine lacks a device, a dtype or memory
    └── OutputError (OSError)                  a result cannot be written

Users' mistakes raise one of these; broken invariants inside the package are plain assertions.
"""

from __future__ import annotations


class ImpastoError(Exception):
    """Root of every error that this package raises on purpose."""


class ConfigurationError(ImpastoError, ValueError):
    """A constructor argument or a config value that cannot be used."""


class InputError(ImpastoError, ValueError):
    """An argument of a call that cannot be used."""


class CheckpointError(ImpastoError, ValueError):
    """A folder or file that is not a readable checkpoint."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A model, one of its components or one of its files is missing."""


class WeightsMismatchError(CheckpointError):
    """Stored tensors do not fit the model: missing, unexpected or misshapen."""


class HubError(ImpastoError, ConnectionError):
    """A model cannot be downloaded."""


class MissingDependencyError(ImpastoError, ImportError):
    """An optional library is not installed; the message has the install command."""


class ResourceError(ImpastoError, RuntimeError):
    """The machine lacks the requested device, dtype or memory."""


class OutputError(ImpastoError, OSError):
    """A result cannot be written."""
