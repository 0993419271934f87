"""Token authentication: JSON Web Tokens (RFC 7519), issued with a shared secret and verified with a table of keys."""

import base64
import hashlib
import hmac
import json
import re
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, NoReturn, Self

import jwt
from jwt import InvalidSignatureError

from daemon.core.errors import BadToken
from daemon.gateway.keys import SECRET_ALGORITHM, Key, KeyTable, secret_key
from daemon.settings import Settings

MAX_TOKEN: Final = 8 * 1024  # bytes; checked before anything is parsed
MAX_USER: Final = 128  # characters
MAX_KID: Final = 128  # characters
MAX_KNOWN_TOKENS: Final = 10_000
MAX_LIFETIME: Final = 30 * 86400.0  # seconds
MAX_HEADERS: Final = 64  # parsed ones that are kept; a longer text than MAX_TOKEN is none

_COMPACT_JWS: Final = re.compile(r"([A-Za-z0-9_-]+)\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_TYPES: Final = ("JWT", "at+jwt")


@dataclass(frozen=True, slots=True)
class Claims:
    """The claims of a valid token: its user, its end in seconds since 1970, and whether it is an operator's.

    `is_foreign`: it was signed with a private key, so `user` may be a name that only the issuer knows.
    """

    user: str
    expires: float
    operator: bool = False
    is_foreign: bool = False


class Authenticator:
    """Issues tokens with the first of some secrets, and verifies those of all keys. Raises BadSecret.

    Every key has one algorithm; a token that names another one is invalid. `leeway` is how many seconds the clock of
    the issuer may be ahead: `iat` and `nbf` may lie that far in the future. `exp` has no such grace, and lies at most
    `max_lifetime` seconds ahead. The claims of the newest `max_known` valid tokens are cached by the token's digest
    until they expire: clients that reconnect all at once do so with the tokens they had.
    """

    def __init__(
        self,
        *secrets: bytes,
        issuer: str = "rowcast",
        audience: str = "rowcast",
        leeway: float = 30.0,
        max_lifetime: float = MAX_LIFETIME,
        max_known: int = MAX_KNOWN_TOKENS,
    ) -> None:
        self._issuer = issuer
        self._audience = audience
        self._leeway = leeway
        self._max_lifetime = max_lifetime
        self._max_known = max_known
        self._jwt = _StrictJwt({"require": ["exp", "iat", "sub", "aud", "iss"]})
        self.use(KeyTable(map(secret_key, secrets)))

    @classmethod
    def configured(cls, settings: Settings, *secrets: bytes) -> Self:
        """One that issues and verifies tokens as the settings say, with these secrets. Raises BadSecret."""
        lifetime = settings.token_lifetime.total_seconds()
        return cls(*secrets, issuer=settings.issuer, audience=settings.audience, max_lifetime=lifetime)

    def use(self, keys: KeyTable) -> None:
        """Verify with these keys from now on."""
        self._keys = keys
        self._known: OrderedDict[bytes, Claims] = OrderedDict()  # a token's key may be gone

    def issue(self, user: str, ttl: float, *, operator: bool = False) -> str:
        """A token for `user`, valid for `ttl` seconds. Raises ValueError if no such token would be accepted.

        An operator's token also opens the console.
        """
        if not _is_user(user):
            raise ValueError(f"a user is 1 to {MAX_USER} printable characters")
        if ttl > self._max_lifetime:
            raise ValueError("its lifetime would be longer than ROWCAST_TOKEN_LIFETIME")
        now = int(time.time())
        claims: dict[str, Any] = {"iss": self._issuer, "aud": self._audience, "sub": user}
        claims |= {"iat": now, "exp": int(now + ttl)}
        if operator:
            claims["operator"] = True
        signing = next(key for key in self._keys.find(None) if key.is_secret)
        return self._jwt.encode(claims, signing.jwk)

    def verify(self, token: str) -> Claims:
        """The claims of `token`. Raises BadToken, which does not reveal the reason."""
        if len(token) > MAX_TOKEN:
            raise BadToken from None  # refusals look alike
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        known = self._known.get(digest)
        if known is not None and known.expires > time.time():
            return known
        try:
            claims = self._known[digest] = self._decode(token)
        except (jwt.PyJWTError, ValueError, OverflowError, RecursionError):
            raise BadToken from None
        if len(self._known) > self._max_known:
            self._known.popitem(last=False)
        return claims

    def _decode(self, token: str) -> Claims:
        header = _header(token)
        for key in self._keys.find(header.get("kid")):
            if key.algorithm == header["alg"]:
                try:
                    return self._claims(token, key)
                except InvalidSignatureError:
                    continue  # another secret, while they are being replaced
        raise InvalidSignatureError

    def _claims(self, token: str, key: Key) -> Claims:
        claims = self._jwt.decode(
            token, key.jwk, [key.algorithm], audience=self._audience, issuer=self._issuer, leeway=self._leeway
        )
        # PyJWT also accepts "1e3" and True as numbers.
        if any(type(claims[name]) not in {int, float} for name in ("exp", "iat", "nbf") if name in claims):
            raise ValueError("a time is not a number")
        if not _is_user(claims["sub"]):
            raise ValueError("sub is not a valid user")
        # PyJWT applies the leeway to `exp` too.
        if not 0 < claims["exp"] - time.time() <= self._max_lifetime + self._leeway:
            raise ValueError("expired, or valid for too long")
        operator = claims.get("operator", False)
        if not isinstance(operator, bool):
            raise ValueError("operator is not a boolean")  # noqa: TRY004 - one kind of error for every bad token
        # Another issuer knows nothing of operators: its users may be able to choose their claims.
        is_operator = operator and key.is_secret
        return Claims(claims["sub"], float(claims["exp"]), is_operator, is_foreign=not key.is_secret)


def named_key(token: str) -> str | None:
    """The name of the key that a token claims to be signed with. None if it names none, or is no token."""
    try:
        return _header(token).get("kid")
    except (ValueError, RecursionError):
        return None


class _StrictJwt(jwt.PyJWT):
    """PyJWT that rejects ambiguous payloads, such as one that repeats a name."""

    def __init__(self, options: Any) -> None:  # noqa: ANN401 - PyJWT has no public name for it
        super().__init__(options)
        self._jws = _Signatures()

    def _decode_payload(self, decoded: dict[str, Any]) -> dict[str, Any]:
        return _json_object(decoded["payload"])


class _Signatures(jwt.PyJWS):
    """Verifies a signature with a secret directly, and leaves those of other keys to PyJWT.

    PyJWT takes several times as long, since it prepares the key anew for each token and checks each character. What
    it would find wrong with the header, `_header` has found before.
    """

    def decode_complete(
        self,
        jwt: str | bytes,
        key: Any = "",  # noqa: ANN401 - PyJWT takes many kinds
        algorithms: Any = None,  # noqa: ANN401
        options: Any = None,  # noqa: ANN401
        detached_payload: bytes | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> dict[str, Any]:
        """The payload of a token. Raises an error of PyJWT, or ValueError."""
        if not (isinstance(jwt, str) and algorithms == [SECRET_ALGORITHM] == [key.algorithm_name]):
            return super().decode_complete(jwt, key, algorithms, options, detached_payload, **kwargs)
        unsigned, _, signature = jwt.rpartition(".")
        # Compared as text: a signature that ends in other spare bits is another one.
        if not hmac.compare_digest(_to_base64(hmac.digest(key.key, unsigned.encode(), "sha256")), signature):
            raise InvalidSignatureError
        return {"payload": _from_base64(unsigned.partition(".")[2])}


def _header(token: str) -> Mapping[str, str]:
    """The header of a token. Raises ValueError unless it says only which key the token means, by a plain name.

    Nothing in a header may bring a key along, or say where one is.
    """
    if len(token) > MAX_TOKEN or not (compact := _COMPACT_JWS.fullmatch(token)):
        raise ValueError("not a compact JWS")
    return _parsed_header(compact[1])


@lru_cache(MAX_HEADERS)
def _parsed_header(text: str) -> Mapping[str, str]:
    """The header with this text: an issuer has few, and what is refused is not kept."""
    header = _json_object(_from_base64(text))
    thumbprint = {"x5t", "x5t#S256"}  # of the certificate of the key, which some issuers add
    if not {"alg"} <= header.keys() <= {"alg", "typ", "kid", *thumbprint}:
        raise ValueError("unexpected header")
    if not all(isinstance(value, str) for value in header.values()) or header.get("typ", "JWT") not in _TYPES:
        raise ValueError("unexpected header")
    if not 1 <= len(header.get("kid", "-")) <= MAX_KID:
        raise ValueError("kid is not a plain name")
    return MappingProxyType(header)


def _from_base64(text: str) -> bytes:
    """What these characters of the URL-safe alphabet encode. Raises ValueError if they are not how it is encoded."""
    decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if _to_base64(decoded) != text:
        raise ValueError("not the only encoding")
    return decoded


def _to_base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _is_user(user: str) -> bool:
    return 1 <= len(user) <= MAX_USER and user.isprintable()


def _json_object(text: bytes) -> dict[str, Any]:
    """Parse one JSON object. Raises ValueError for anything else, for NaN, and for repeated names."""
    found = _JSON.decode(text.decode())
    if not isinstance(found, dict):
        raise ValueError("not an object")  # noqa: TRY004 - one kind of error for every bad token
    return found


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("repeated name")
    return found


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(constant)


_JSON: Final = json.JSONDecoder(object_pairs_hook=_unique_names, parse_constant=_refuse_constant)
