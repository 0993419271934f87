"""From a token to who sent it."""

import base64
import hashlib
import json
import re
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import jwt

from daemon.core.errors import BadToken, OperatorFault

ALGORITHM: Final = "HS256"
MIN_SECRET: Final = 32  # bytes
MAX_TOKEN: Final = 8 * 1024  # bytes, looked at before anything is parsed
MAX_USER: Final = 128  # characters
MAX_KNOWN_TOKENS: Final = 10_000  # tokens

_FORM: Final = re.compile(r"([A-Za-z0-9_-]+)\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")


class BadSecret(OperatorFault):
    """The token secret {problem}: use 32 random bytes or more, and the same key where tokens are issued."""

    exit_code: ClassVar[int] = 78

    def __init__(self, problem: str) -> None:
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Claims:
    """What a good token says: who, and until when, in seconds since 1970."""

    user: str
    expires: float


class Authenticator:
    """Issues and verifies the tokens of one secret. Raises BadSecret for one that is no secret.

    The algorithm belongs to the secret; what a token says about it is only compared. `leeway` is how many
    seconds the clocks of issuer and verifier may differ. What the newest `most_known` good tokens say is kept, by
    their digests, for as long as they are good: a crowd that comes back does so with the tokens that it had.
    """

    def __init__(
        self,
        secret: bytes,
        *,
        issuer: str = "rowcast",
        audience: str = "rowcast",
        leeway: float = 30.0,
        max_known: int = MAX_KNOWN_TOKENS,
    ) -> None:
        if len(secret) < MIN_SECRET:
            raise BadSecret(f"has only {len(secret)} bytes")
        self._issuer = issuer
        self._audience = audience
        self._leeway = leeway
        self._max_known = max_known
        self._known: OrderedDict[bytes, Claims] = OrderedDict()
        self._jwt = _StrictJwt({"require": ["exp", "iat", "sub", "aud", "iss"]})
        try:
            self._jwt.encode({}, secret, ALGORITHM)
        except jwt.PyJWTError:
            # A public key as the secret of an HMAC: everybody could sign.
            raise BadSecret("looks like a key or certificate of another algorithm") from None
        encoded = base64.urlsafe_b64encode(secret).rstrip(b"=").decode()
        self._key = jwt.PyJWK({"kty": "oct", "k": encoded, "alg": ALGORITHM})  # bytes are looked at for each token

    def issue(self, user: str, ttl: float) -> str:
        """A token for `user`, good for `ttl` seconds. Raises ValueError for what cannot be a user."""
        if not _is_user(user):
            raise ValueError(f"a user is 1 to {MAX_USER} printable characters")
        now = int(time.time())
        claims = {"iss": self._issuer, "aud": self._audience, "sub": user, "iat": now, "exp": int(now + ttl)}
        return self._jwt.encode(claims, self._key)

    def verify(self, token: str) -> Claims:
        """Who this is. Raises BadToken, the same for every reason."""
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        known = self._known.get(digest)
        if known is not None and known.expires > time.time() - self._leeway:
            return known
        claims = self._known[digest] = self._decode(token)
        if len(self._known) > self._max_known:
            self._known.popitem(last=False)
        return claims

    def _decode(self, token: str) -> Claims:
        try:
            _check_header(token)
            claims = self._jwt.decode(
                token,
                self._key,
                [ALGORITHM],
                audience=self._audience,
                issuer=self._issuer,
                leeway=self._leeway,
            )
            return _claims(claims)
        except (jwt.PyJWTError, ValueError, OverflowError, RecursionError):
            raise BadToken from None


class _StrictJwt(jwt.PyJWT):
    """PyJWT, for which a payload with two meanings has none."""

    def _decode_payload(self, decoded: dict[str, Any]) -> dict[str, Any]:
        return _json_object(decoded["payload"])


def _check_header(token: str) -> None:
    """Refuse every header but the plainest: there is one key, and nothing in a token can point to another."""
    if len(token) > MAX_TOKEN or not (form := _FORM.fullmatch(token)):
        raise ValueError("not a compact JWS")
    header = _json_object(base64.urlsafe_b64decode(form[1] + "=" * (-len(form[1]) % 4)))
    if header not in ({"alg": ALGORITHM}, {"alg": ALGORITHM, "typ": "JWT"}):
        raise ValueError("not a header of ours")


def _claims(claims: dict[str, Any]) -> Claims:
    # PyJWT reads "1e3" and True as numbers too.
    if any(type(claims[name]) not in {int, float} for name in ("exp", "iat", "nbf") if name in claims):
        raise ValueError("a time is a number")
    if not _is_user(claims["sub"]):
        raise ValueError("sub is no user")
    return Claims(claims["sub"], float(claims["exp"]))


def _is_user(user: str) -> bool:
    return 1 <= len(user) <= MAX_USER and user.isprintable()


def _json_object(text: bytes) -> dict[str, Any]:
    """One JSON object. Raises ValueError for anything else, and for NaN and names that come twice."""
    found = json.loads(text.decode(), object_pairs_hook=_without_repeats, parse_constant=_refuse)
    if not isinstance(found, dict):
        raise ValueError("not an object")  # noqa: TRY004 - one kind of error for every bad token
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _refuse(constant: str) -> float:
    raise ValueError(constant)
