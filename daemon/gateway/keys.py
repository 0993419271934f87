"""The keys that verify tokens: secrets, public keys from PEM files, and JSON Web Key Sets (RFC 7517).

Each key has one algorithm, which follows from the key. A token only says which key it means.
"""

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import jwt
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from daemon.core.errors import OperatorFault

SECRET_ALGORITHM: Final = "HS256"  # noqa: S105 - not a password
MIN_SECRET: Final = 32  # bytes
MIN_RSA: Final = 2048  # bits
MAX_RSA: Final = 8192  # bits: each verification with a larger key takes milliseconds
MAX_KEYS: Final = 64  # in one set: each costs memory, and a set without names costs time for each token
MAX_SET: Final = 256 * 1024  # bytes of a JSON Web Key Set

_PUBLIC: Final[Mapping[str, tuple[str, ...]]] = {
    "RS256": ("kty", "n", "e"),
    "ES256": ("kty", "crv", "x", "y"),
    "EdDSA": ("kty", "crv", "x"),
}
"""The algorithms of public keys, each with the members of a JSON Web Key that it needs."""

_ALGORITHMS: Final[Mapping[tuple[object, object], str]] = {
    ("RSA", None): "RS256",
    ("EC", "P-256"): "ES256",
    ("OKP", "Ed25519"): "EdDSA",
}
"""The algorithm of a public key, by its type and curve."""


_BEGIN: Final = re.compile(rb"^-----BEGIN ", re.MULTILINE)


class BadSecret(OperatorFault):
    """The token secret {problem}: use 32 random bytes or more, and the same key where tokens are issued."""

    exit_code: ClassVar[int] = 78

    def __init__(self, problem: str) -> None:
        self.problem = problem


class KeyFileUnusable(OperatorFault):
    """The key file {path} cannot be used ({reason}): correct ROWCAST_PUBLIC_KEYS or ROWCAST_JWKS, or the file."""

    exit_code: ClassVar[int] = 78

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason


class BadKeySet(ValueError):
    """Why a text is no JSON Web Key Set that can be used. It reveals nothing of the text."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key, with its only algorithm. `kid` is its name, if it has one."""

    jwk: jwt.PyJWK
    kid: str | None = None

    @property
    def algorithm(self) -> str:
        """The algorithm of every token that this key verifies."""
        return self.jwk.algorithm_name

    @property
    def is_secret(self) -> bool:
        """Whether the key also signs, so that its tokens come from whoever shares it."""
        return self.algorithm == SECRET_ALGORITHM


class KeyTable:
    """All keys, by their names."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._unnamed: list[Key] = []
        self._named: dict[str, list[Key]] = {}
        for key in keys:
            (self._unnamed if key.kid is None else self._named.setdefault(key.kid, [])).append(key)

    def find(self, kid: str | None) -> Sequence[Key]:
        """The keys that a token may mean, which names a key or does not.

        A secret has no name, so no token that names a key means it. A public key from a PEM file has none either, but
        its issuer may have given it one.
        """
        if kid is None:
            return self._unnamed
        return [*self._named.get(kid, ()), *(key for key in self._unnamed if not key.is_secret)]

    def knows(self, kid: str) -> bool:
        """Whether a key has this name."""
        return kid in self._named


def secret_key(secret: bytes) -> Key:
    """The key for tokens that are signed with a shared secret. Raises BadSecret."""
    if len(secret) < MIN_SECRET:
        raise BadSecret(f"has only {len(secret)} bytes")
    try:
        jwt.encode({}, secret, SECRET_ALGORITHM)
    except jwt.PyJWTError:
        # PyJWT refuses a public key as the secret of an HMAC: anybody could sign with it.
        raise BadSecret("looks like a key or certificate of another algorithm") from None
    encoded = base64.urlsafe_b64encode(secret).rstrip(b"=").decode()
    # A prepared key: PyJWT would check plain bytes again for each token.
    return Key(jwt.PyJWK({"kty": "oct", "k": encoded, "alg": SECRET_ALGORITHM}))


def read_public_key(path: Path) -> Key:
    """The public key in a PEM file, which may be a certificate. Raises KeyFileUnusable."""
    return Key(_from_pem(path, _read(path)))


def read_key_set(path: Path) -> list[Key]:
    """The public keys of the JSON Web Key Set in a file. Raises KeyFileUnusable."""
    try:
        return parse_key_set(_read(path))
    except BadKeySet as problem:
        raise KeyFileUnusable(path, str(problem)) from None


def parse_key_set(text: bytes) -> list[Key]:
    """The usable public keys of a JSON Web Key Set, at least one. Raises BadKeySet.

    Keys for encryption, of other algorithms or with weak parameters are left out, as RFC 7517, section 5, says.
    """
    if len(text) > MAX_SET:
        raise BadKeySet(f"it is larger than {MAX_SET // 1024} KiB")
    try:
        found = json.loads(text.decode())
    except (ValueError, RecursionError):
        raise BadKeySet("it is not JSON") from None
    listed = found.get("keys") if isinstance(found, dict) else None
    if not isinstance(listed, list):
        raise BadKeySet('it is not a JSON Web Key Set: it has no list "keys"')
    if len(listed) > MAX_KEYS:
        raise BadKeySet(f"it has more than {MAX_KEYS} keys")
    keys = [key for member in listed if (key := _from_jwk(member)) is not None]
    if not keys:
        raise BadKeySet("it has no public key for RS256, ES256 or EdDSA")
    return keys


def _from_jwk(member: object) -> Key | None:
    """The key, or None if it is not one that verifies tokens."""
    if not isinstance(member, dict) or member.get("use", "sig") != "sig":
        return None
    operations, kid = member.get("key_ops", ["verify"]), member.get("kid")
    if not isinstance(operations, list) or "verify" not in operations or not isinstance(kid, str | None):
        return None
    kty, crv = member.get("kty"), member.get("crv")
    if not isinstance(kty, str) or not isinstance(crv, str | None):
        return None
    algorithm = _ALGORITHMS.get((kty, crv))
    if algorithm is None or member.get("alg", algorithm) != algorithm:
        return None
    try:
        # Only the public members: a private key has no business in a set, and is not kept if it is in one.
        jwk = jwt.PyJWK({name: member[name] for name in _PUBLIC[algorithm]}, algorithm)
    except (jwt.PyJWTError, KeyError, ValueError, TypeError, AttributeError):
        return None
    if algorithm == "RS256" and not MIN_RSA <= jwk.key.key_size <= MAX_RSA:
        return None
    return Key(jwk, kid)


def _from_pem(path: Path, text: bytes) -> jwt.PyJWK:
    if b"PRIVATE KEY-----" in text:
        raise KeyFileUnusable(path, "it is a private key, and only the public one is needed here")
    if (number := len(_BEGIN.findall(text))) > 1:
        # Of a chain, only the first certificate is meant; of other keys, the rest would be ignored without a word.
        raise KeyFileUnusable(path, f"it contains {number} keys or certificates: put each into a file of its own")
    try:
        if b"-----BEGIN CERTIFICATE-----" in text:
            key: Any = x509.load_pem_x509_certificate(text).public_key()
        else:
            key = serialization.load_pem_public_key(text)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise KeyFileUnusable(path, "it is not a public key in PEM format") from None
    for algorithm in _PUBLIC:
        try:
            member = jwt.get_algorithm_by_name(algorithm).to_jwk(key, as_dict=True)
        except (jwt.PyJWTError, TypeError, ValueError, AttributeError):
            continue
        if isinstance(member, dict) and (found := _from_jwk(member)):
            return found.jwk
    raise KeyFileUnusable(path, f"it is not a key for RS256 ({MIN_RSA} bits or more), ES256 or EdDSA")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_SET + 1)
    except OSError as error:
        raise KeyFileUnusable(path, error.strerror or str(error)) from None
