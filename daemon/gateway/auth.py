"""Token authentication: JWTs signed with HS256 (RFC 7519), issued and verified with one shared secret."""

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
MAX_TOKEN: Final = 8 * 1024  # bytes; checked before anything is parsed
MAX_USER: Final = 128  # characters
MAX_KNOWN_TOKENS: Final = 10_000

_COMPACT_JWS: Final = re.compile(r"([A-Za-z0-9_-]+)\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")


class BadSecret(OperatorFault):
    """The token secret {problem}: use 32 random bytes or more, and the same key where tokens are issued."""

    exit_code: ClassVar[int] = 78

    def __init__(self, problem: str) -> None:
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Claims:
    """The claims of a valid token: its user, its end in seconds since 1970, and whether it is an operator's."""

    user: str
    expires: float
    operator: bool = False


class Authenticator:
    """Issues and verifies tokens with one secret. Raises BadSecret if the secret is unsuitable.

    The algorithm is fixed; a token that names another one is invalid. `leeway` is how many seconds the clock of
    the issuer may be ahead: `iat` and `nbf` may lie that far in the future. `exp` has no such grace. The claims of
    the newest `max_known` valid tokens are cached by the token's digest until they expire: clients that reconnect
    all at once do so with the tokens they had.
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
            # PyJWT refuses a public key as the secret of an HMAC: anybody could sign with it.
            raise BadSecret("looks like a key or certificate of another algorithm") from None
        encoded = base64.urlsafe_b64encode(secret).rstrip(b"=").decode()
        # A prepared key: PyJWT would check plain bytes again for each token.
        self._key = jwt.PyJWK({"kty": "oct", "k": encoded, "alg": ALGORITHM})

    def issue(self, user: str, ttl: float, *, operator: bool = False) -> str:
        """A token for `user`, valid for `ttl` seconds. Raises ValueError if `user` is not a valid user.

        An operator's token also opens the console.
        """
        if not _is_user(user):
            raise ValueError(f"a user is 1 to {MAX_USER} printable characters")
        now = int(time.time())
        claims: dict[str, Any] = {"iss": self._issuer, "aud": self._audience, "sub": user}
        claims |= {"iat": now, "exp": int(now + ttl)}
        if operator:
            claims["operator"] = True
        return self._jwt.encode(claims, self._key)

    def verify(self, token: str) -> Claims:
        """The claims of `token`. Raises BadToken, which does not reveal the reason."""
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        known = self._known.get(digest)
        if known is not None and known.expires > time.time():
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
    """PyJWT that rejects ambiguous payloads, such as one that repeats a name."""

    def _decode_payload(self, decoded: dict[str, Any]) -> dict[str, Any]:
        return _json_object(decoded["payload"])


def _check_header(token: str) -> None:
    """Allow only the two plainest headers: there is one key, and no token can name another. Raises ValueError."""
    if len(token) > MAX_TOKEN or not (compact := _COMPACT_JWS.fullmatch(token)):
        raise ValueError("not a compact JWS")
    header = _json_object(base64.urlsafe_b64decode(compact[1] + "=" * (-len(compact[1]) % 4)))
    if header not in ({"alg": ALGORITHM}, {"alg": ALGORITHM, "typ": "JWT"}):
        raise ValueError("unexpected header")


def _claims(claims: dict[str, Any]) -> Claims:
    # PyJWT also accepts "1e3" and True as numbers.
    if any(type(claims[name]) not in {int, float} for name in ("exp", "iat", "nbf") if name in claims):
        raise ValueError("a time is not a number")
    if not _is_user(claims["sub"]):
        raise ValueError("sub is not a valid user")
    # PyJWT applies the leeway to `exp` too.
    if claims["exp"] <= time.time():
        raise ValueError("expired")
    operator = claims.get("operator", False)
    if not isinstance(operator, bool):
        raise ValueError("operator is not a boolean")  # noqa: TRY004 - one kind of error for every bad token
    return Claims(claims["sub"], float(claims["exp"]), operator)


def _is_user(user: str) -> bool:
    return 1 <= len(user) <= MAX_USER and user.isprintable()


def _json_object(text: bytes) -> dict[str, Any]:
    """Parse one JSON object. Raises ValueError for anything else, for NaN, and for repeated names."""
    found = json.loads(text.decode(), object_pairs_hook=_unique_names, parse_constant=_refuse_constant)
    if not isinstance(found, dict):
        raise ValueError("not an object")  # noqa: TRY004 - one kind of error for every bad token
    return found


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("repeated name")
    return found


def _refuse_constant(constant: str) -> float:
    raise ValueError(constant)
