"""Content credentials (C2PA): a signed statement in each image that a model has generated it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

from ...errors import ConfigurationError
from ...optional import require
from .settings import Signer

#: https://cv.iptc.org/newscodes/digitalsourcetype/
_GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_ALGORITHMS = ("ES256", "ES384", "PS256", "ED25519")


def make_signer(certificate: Path, key: Path, version: str) -> Signer:
    """A function that signs image files, without a network.

    Args:
        certificate: the certificate and those that signed it, up to the root, which is left out (PEM).
        key: its private key (PEM, PKCS #8).
        version: the program, as it is named in images.

    Raises:
        MissingDependencyError: c2pa is not installed.
        ConfigurationError: a file cannot be read, or certificate and key cannot sign.
    """
    c2pa = require("c2pa", "--c2pa-cert", "impasto[provenance]")
    try:
        chain, secret = certificate.read_text("ascii"), key.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--c2pa-cert and --c2pa-key: {error}; give two files in PEM form") from error
    name, _, number = version.partition(" ")
    action = {"action": "c2pa.created", "digitalSourceType": _GENERATED}
    manifest = json.dumps(
        {
            "claim_generator_info": [{"name": name, "version": number}],
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
        }
    )

    def sign_as(algorithm: str, content: bytes, media_type: str) -> bytes:
        info = c2pa.C2paSignerInfo(getattr(c2pa.C2paSigningAlg, algorithm), chain.encode(), secret.encode(), None)
        signed = io.BytesIO()
        with c2pa.Builder(manifest) as builder, c2pa.Signer.from_info(info) as signer:
            builder.sign(signer, media_type, io.BytesIO(content), signed)
        return signed.getvalue()

    algorithm = _algorithm_of(sign_as)

    def sign(content: bytes, media_type: str) -> bytes:
        return sign_as(algorithm, content, media_type)

    return sign


def _algorithm_of(sign_as: Callable[[str, bytes, str], bytes]) -> str:
    """The algorithm that fits certificate and key: the one with which a small image can be signed."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    problem: Exception | None = None
    for algorithm in _ALGORITHMS:
        try:
            sign_as(algorithm, file.getvalue(), "image/png")
        except Exception as error:  # c2pa raises one class for each kind of fault
            problem = problem or error
        else:
            return algorithm
    raise ConfigurationError(f"certificate and key of --c2pa-cert and --c2pa-key cannot sign: {problem}") from problem
