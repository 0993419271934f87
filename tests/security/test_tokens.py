import base64
import hashlib
import hmac
import json
import time
import timeit
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512

from daemon.core.errors import BadToken, ClientFault
from daemon.gateway.auth import MAX_LIFETIME, MAX_TOKEN, Authenticator
from daemon.gateway.keys import BadSecret, KeyTable, parse_key_set, read_public_key, secret_key
from tests.support.issuer import EC, ED, RSA, encoded, key_set, public_jwk, public_pem, token_of, write

SECRET = b"a secret of thirty-two bytes, ok"
USER = "01JGQ4ZV8M0000000000000000"
PEM = b"""-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEEVs/o5+uQbTjL3chynL4wXgUg2R9
q9UU8I5mEovUf86QZ7kOBIjJwqnzD1omageEHWwHdBO6B+dFabmdT9POxg==
-----END PUBLIC KEY-----
"""


def signed(header: str, payload: str, *, secret: bytes = SECRET, digest: str = "sha256") -> str:
    """A token signed by hand, with any header and payload."""
    parts = encoded(header.encode()), encoded(payload.encode(errors="surrogateescape"))
    return signed_text(*parts, secret=secret, digest=digest)


def signed_text(header: str, payload: str, *, secret: bytes = SECRET, digest: str = "sha256") -> str:
    """The same with both in base64."""
    unsigned = f"{header}.{payload}"
    return f"{unsigned}.{encoded(hmac.new(secret, unsigned.encode(), digest).digest())}"


NOW = int(time.time())
GOOD: dict[str, Any] = {"iss": "rowcast", "aud": "rowcast", "sub": USER, "iat": NOW - 60, "exp": NOW + 36000}
HEADER = '{"alg":"HS256","typ":"JWT"}'
PAYLOAD = encoded(f"{json.dumps(GOOD)}{' ' * ((1 - len(json.dumps(GOOD))) % 3)}".encode())  # with spare bits
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def forged(secret: bytes = SECRET, header: dict[str, Any] | None = None, **claims: Any) -> str:
    """A valid token with changes. A claim set to `...` is left out."""
    full_header = {"alg": "HS256", "typ": "JWT"} | (header or {})
    kept = {name: value for name, value in (GOOD | claims).items() if value is not ...}
    return signed(json.dumps(full_header), json.dumps(kept), secret=secret)


def without_signature(header: str) -> str:
    return f"{encoded(header.encode())}.{encoded(json.dumps(GOOD).encode())}."


def with_last_character_changed(token: str) -> str:
    return token[:-1] + ("A" if token[-1] != "A" else "B")


def with_other_spare_bits(text: str) -> str:
    """The same bytes in base64, with other bits where the last character has more than they need."""
    last = ALPHABET[ALPHABET.index(text[-1]) ^ 1]
    assert decoded(text) == decoded(text[:-1] + last)
    return text[:-1] + last


def decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text.rpartition(".")[2] + "==")


def with_another_payload(token: str) -> str:
    header, _, signature = token.split(".")
    return f"{header}.{encoded(json.dumps(GOOD | {'sub': 'admin'}).encode())}.{signature}"


def test_a_valid_token_yields_its_user_and_expiry() -> None:
    claims = Authenticator(SECRET).verify(forged())
    assert claims.user == USER
    assert claims.expires == float(GOOD["exp"])


def test_an_issued_token_verifies() -> None:
    authenticator = Authenticator(SECRET)
    claims = authenticator.verify(authenticator.issue("ada lovelace ü", ttl=60))
    assert claims.user == "ada lovelace ü"
    assert 0 < claims.expires - time.time() <= 60


@pytest.mark.parametrize(
    "token",
    [
        signed('{"typ":"JWT","alg":"HS256"}', json.dumps(GOOD)),
        signed('{"alg":"HS256"}', json.dumps(GOOD)),
        forged(exp=NOW + 36000.5),
        forged(aud=["someone", "rowcast"]),
        forged(role="admin", jti="1"),
        forged(sub="u" * 128),
    ],
)
def test_other_valid_tokens_verify_too(token: str) -> None:
    Authenticator(SECRET).verify(token)


def test_an_operators_token_says_so_and_others_are_users() -> None:
    authenticator = Authenticator(SECRET)
    assert authenticator.verify(authenticator.issue("ada", ttl=60, operator=True)).operator
    assert not authenticator.verify(authenticator.issue("ada", ttl=60)).operator
    assert not authenticator.verify(forged(operator=False)).operator


@pytest.mark.parametrize("claim", ["iat", "nbf"])
def test_a_token_of_an_issuer_whose_clock_is_ahead_is_valid_within_the_leeway(claim: str) -> None:
    claims: dict[str, Any] = {claim: int(time.time()) + 10}
    Authenticator(SECRET).verify(forged(**claims))


@pytest.mark.parametrize("ago", [0, 0.001, 1, 10, 29.5])
def test_a_token_that_has_expired_is_refused_however_recently(ago: float) -> None:
    with pytest.raises(BadToken):
        Authenticator(SECRET, leeway=30).verify(forged(exp=time.time() - ago))


BAD = {
    "nothing": "",
    "operator a text": forged(operator="false"),
    "operator a number": forged(operator=1),
    "operator null": forged(operator=None),
    "no token": "hello",
    "two dots": "..",
    "two segments": forged().rpartition(".")[0],
    "four segments": forged() + ".e30",
    "five segments, as of JWE": "e30.e30.e30.e30.e30",
    "alg none": without_signature('{"alg":"none"}'),
    "alg None": without_signature('{"alg":"None"}'),
    "alg nOnE": without_signature('{"alg":"nOnE"}'),
    "alg none, signed": forged(header={"alg": "none"}),
    "alg null": forged(header={"alg": None}),
    "alg empty": forged(header={"alg": ""}),
    "alg a list": forged(header={"alg": ["HS256"]}),
    "alg in small letters": forged(header={"alg": "hs256"}),
    "no alg": signed('{"typ":"JWT"}', json.dumps(GOOD)),
    "HS512 with a valid signature": signed('{"alg":"HS512"}', json.dumps(GOOD), digest="sha512"),
    "RS256": forged(header={"alg": "RS256"}),
    "signed with a public key": forged(secret=PEM),
    "ES256 with r = s = 0": f"{without_signature(json.dumps({'alg': 'ES256'}))}{encoded(bytes(64))}",
    "an empty key": forged(secret=b""),
    "another key": forged(secret=SECRET[::-1]),
    "no signature": without_signature(HEADER),
    "half a signature": forged()[:-20],
    "a changed signature": with_last_character_changed(forged()),
    "a signature with other spare bits": with_other_spare_bits(forged()),
    "a header with other spare bits": signed_text(with_other_spare_bits(encoded(b'{"alg":"HS256"} ')), PAYLOAD),
    "a payload with other spare bits": signed_text(encoded(HEADER.encode()), with_other_spare_bits(PAYLOAD)),
    "a changed payload": with_another_payload(forged()),
    "padding": forged() + "=",
    "white space": " " + forged(),
    "a newline": forged() + "\n",
    "the other base64": forged().replace("_", "/").replace("-", "+") + "+",
    "a typ of something else": forged(header={"typ": "logout+jwt"}),
    "a typ that is no text": forged(header={"typ": 1}),
    "crit": forged(header={"crit": ["exp"]}),
    "crit with b64": forged(header={"crit": ["b64"], "b64": False}),
    "b64": forged(header={"b64": False}),
    "jku": forged(header={"jku": "https://evil.example/keys"}),
    "jwk": forged(header={"jwk": {"kty": "oct", "k": encoded(SECRET)}}),
    "x5u": forged(header={"x5u": "https://evil.example/cert"}),
    "x5c": forged(header={"x5c": ["MII"]}),
    "cty": forged(header={"cty": "JWT"}),
    "kid of a path": forged(header={"kid": "../../../dev/null"}),
    "kid of SQL": forged(header={"kid": "' union select 'k' --"}),
    "kid that is no text": forged(header={"kid": 1}),
    "kid empty": forged(header={"kid": ""}),
    "kid of the secret itself": forged(header={"kid": SECRET.decode()}),
    "kid of 5 KB": forged(header={"kid": "k" * 5000}),
    "alg twice": signed('{"alg":"none","alg":"HS256"}', json.dumps(GOOD)),
    "a header that is a list": signed("[]", json.dumps(GOOD)),
    "a header that is no JSON": signed("{", json.dumps(GOOD)),
    "a header that nests deeply": signed("[" * 2000, json.dumps(GOOD)),
    "a payload that nests deeply": signed(HEADER, "[" * 4000),
    "a payload that is a list": signed(HEADER, "[]"),
    "a payload that is no JSON": signed(HEADER, "{"),
    "a payload that is not UTF-8": signed(HEADER, json.dumps(GOOD)[:-1] + ', "\udcff": 1}'),
    "sub twice": signed(HEADER, json.dumps(GOOD)[:-1] + ', "sub": "admin"}'),
    "exp twice": signed(HEADER, json.dumps(GOOD)[:-1] + ', "exp": 99999999999}'),
    "expired": forged(exp=NOW - 1),
    "expired long ago": forged(exp=1),
    "exp missing": forged(exp=...),
    "exp null": forged(exp=None),
    "exp a string": forged(exp="99999999999"),
    "exp true": forged(exp=True),
    "exp infinite": signed(HEADER, json.dumps(GOOD | {"exp": 0}).replace('"exp": 0', '"exp": 1e400')),
    "exp NaN": signed(HEADER, json.dumps(GOOD | {"exp": float("nan")})),
    "exp of E13": forged(exp=10**18),
    "exp beyond the longest lifetime": forged(exp=NOW + MAX_LIFETIME + 3600),
    "exp negative": forged(exp=-1),
    "exp of 400 digits": forged(exp=10**400),
    "exp of 5,000 digits": signed(HEADER, json.dumps(GOOD)[:-1].replace(str(GOOD["exp"]), "9" * 5000) + "}"),
    "iat missing": forged(iat=...),
    "iat in the future": forged(iat=NOW + 3600),
    "iat null": forged(iat=None),
    "iat NaN": signed(HEADER, json.dumps(GOOD | {"iat": float("nan")})),
    "iat a string": forged(iat=str(NOW)),
    "nbf in the future": forged(nbf=NOW + 3600),
    "nbf a string": forged(nbf="0"),
    "aud missing": forged(aud=...),
    "aud of another": forged(aud="someone"),
    "aud empty": forged(aud=[]),
    "aud with the right prefix": forged(aud="rowcast2"),
    "aud an object": forged(aud={"rowcast": 1}),
    "iss missing": forged(iss=...),
    "iss of another": forged(iss="evil"),
    "iss a list": forged(iss=["rowcast"]),
    "aud a number": forged(aud=1),
    "aud of numbers": forged(aud=[1, "rowcast"]),
    "iss in capitals": forged(iss="ROWCAST"),
    "iss null": forged(iss=None),
    "sub a list": forged(sub=[USER]),
    "sub missing": forged(sub=...),
    "sub empty": forged(sub=""),
    "sub a number": forged(sub=1),
    "sub too long": forged(sub="u" * 129),
    "sub with a newline": forged(sub="ada\nlog: forged"),
    "sub with a NUL": forged(sub="ada\0"),
    "sub with an escape": forged(sub="\x1b[2J"),
    "sub half a surrogate pair": forged(sub="\ud800"),
    "a token within a token": signed('{"alg":"HS256","cty":"JWT"}', forged()),
    "a token as the payload": signed(HEADER, forged()),
    "a token as the payload, quoted": signed(HEADER, json.dumps(forged())),
    "a header in UTF-16": f"{encoded(HEADER.encode('utf-16'))}.{forged().split('.', 1)[1]}",
    "a byte order mark": signed("\ufeff" + HEADER, json.dumps(GOOD)),
    "too long": forged(note="x" * MAX_TOKEN),
    "a megabyte": "A" * 2**20,
    "a megabyte of dots": "." * 2**20,
    "not ASCII": forged().replace("e", "е"),  # noqa: RUF001 - a Cyrillic one
    "a surrogate": "\ud800.e30.e30",
}


@pytest.mark.parametrize("token", BAD.values(), ids=BAD.keys())
def test_every_bad_token_is_refused_with_the_same_error(token: str) -> None:
    with pytest.raises(BadToken) as refusal:
        Authenticator(SECRET).verify(token)
    assert str(refusal.value) == str(BadToken())
    assert refusal.value.code == "token"
    assert isinstance(refusal.value, ClientFault)
    assert refusal.value.__cause__ is None
    assert refusal.value.__suppress_context__


def test_no_token_with_one_character_changed_is_valid() -> None:
    authenticator, token = Authenticator(SECRET), forged()
    authenticator.verify(token)
    for place, character in enumerate(token):
        other = ALPHABET[ALPHABET.find(character) ^ 1]
        for changed in {other, "", "=", ".", f"{character}{character}"} - {character}:
            refused(authenticator, token[:place] + changed + token[place + 1 :])


def test_a_signature_with_a_secret_is_verified_without_the_detour_of_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = forged()
    monkeypatch.setattr(jwt.PyJWS, "decode_complete", None)
    assert USER == Authenticator(SECRET).verify(token).user


@pytest.fixture(scope="module")
def of_an_issuer(tmp_path_factory: pytest.TempPathFactory) -> Authenticator:
    """Verifies tokens of a secret, of a key from a PEM file, and of a key set with three names."""
    pem = write(tmp_path_factory.mktemp("keys") / "ed.pem", public_pem(ED))
    jwks = key_set(
        public_jwk(RSA, kid="rsa"),
        public_jwk(EC, kid="ec"),
        public_jwk(OTHER_EC, kid="other"),
        public_jwk(EC, kid="for encryption", use="enc"),
    )
    authenticator = Authenticator(SECRET)
    authenticator.use(KeyTable([secret_key(SECRET), read_public_key(pem), *parse_key_set(jwks)]))
    return authenticator


OTHER_RSA = rsa.generate_private_key(65537, 2048)
OTHER_EC = ec.generate_private_key(ec.SECP256R1())
P384 = ec.generate_private_key(ec.SECP384R1())
N = encoded(RSA.public_key().public_numbers().n.to_bytes(256))


def by_hand(header: dict[str, Any], sign: Callable[[bytes], bytes], **more: object) -> str:
    """A token with the good claims and `more`, signed in any way."""
    unsigned = f"{encoded(json.dumps(header).encode())}.{encoded(json.dumps(GOOD | more).encode())}"
    return f"{unsigned}.{encoded(sign(unsigned.encode()))}"


def hmac_with(key: bytes) -> Callable[[bytes], bytes]:
    return lambda data: hmac.new(key, data, "sha256").digest()


def rsa_pss(data: bytes) -> bytes:
    return RSA.sign(data, padding.PSS(padding.MGF1(SHA256()), 32), SHA256())


def ec_der(data: bytes) -> bytes:
    return EC.sign(data, ec.ECDSA(SHA256()))


def ec_raw(data: bytes) -> bytes:
    r, s = decode_dss_signature(ec_der(data))
    return r.to_bytes(32) + s.to_bytes(32)


def ec_other_s(data: bytes) -> bytes:
    """A signature that is valid mathematically but whose s is beyond the order of the curve."""
    r, s = decode_dss_signature(ec_der(data))
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    return r.to_bytes(33) + (s + order).to_bytes(33)


FORGED_KEYS = {
    "HS256 with the public key as the secret": by_hand({"alg": "HS256"}, hmac_with(public_pem(RSA))),
    "HS256 with the public key, by its name": by_hand({"alg": "HS256", "kid": "rsa"}, hmac_with(public_pem(RSA))),
    "HS256 with the modulus as the secret": by_hand({"alg": "HS256", "kid": "rsa"}, hmac_with(N.encode())),
    "HS256 with the key of the PEM file": by_hand({"alg": "HS256"}, hmac_with(public_pem(ED))),
    "HS256 with the secret, by the name of another key": by_hand({"alg": "HS256", "kid": "rsa"}, hmac_with(SECRET)),
    "HS256 with an empty secret, by name": by_hand({"alg": "HS256", "kid": "rsa"}, hmac_with(b"")),
    "RS256 with an HMAC": by_hand({"alg": "RS256", "kid": "rsa"}, hmac_with(SECRET)),
    "none, by name": by_hand({"alg": "none", "kid": "rsa"}, lambda _: b"x"),
    "no name": by_hand({"alg": "RS256"}, lambda data: RSA.sign(data, padding.PKCS1v15(), SHA256())),
    "an unknown name": token_of(RSA, USER, "nobody"),
    "the name in capitals": token_of(RSA, USER, "RSA"),
    "the name of another key": token_of(RSA, USER, "ec"),
    "the name of another key of the same kind": token_of(EC, USER, "other"),
    "the name of a key that is not for signatures": token_of(EC, USER, "for encryption"),
    "the name with a space": token_of(RSA, USER, "rsa "),
    "the name with a NUL": token_of(RSA, USER, "rsa\0"),
    "the name of a file": token_of(RSA, USER, "file:///etc/passwd"),
    "the name of a URL": token_of(RSA, USER, "https://evil.example/keys#rsa"),
    "a key of the same kind": token_of(OTHER_RSA, USER, "rsa"),
    "another curve": by_hand({"alg": "ES384", "kid": "ec"}, lambda data: P384.sign(data, ec.ECDSA(SHA384()))),
    "ES256 with another curve": by_hand(
        {"alg": "ES256", "kid": "ec"}, lambda data: P384.sign(data, ec.ECDSA(SHA256()))
    ),
    "PS256, by the name of a key for RS256": by_hand({"alg": "PS256", "kid": "rsa"}, rsa_pss),
    "PSS that says it is RS256": by_hand({"alg": "RS256", "kid": "rsa"}, rsa_pss),
    "RS512": by_hand({"alg": "RS512", "kid": "rsa"}, lambda data: RSA.sign(data, padding.PKCS1v15(), SHA512())),
    "RS256 with another hash": by_hand(
        {"alg": "RS256", "kid": "rsa"}, lambda data: RSA.sign(data, padding.PKCS1v15(), SHA512())
    ),
    "ECDSA in DER": by_hand({"alg": "ES256", "kid": "ec"}, ec_der),
    "ECDSA of zeros": by_hand({"alg": "ES256", "kid": "ec"}, lambda _: bytes(64)),
    "ECDSA with s beyond the order": by_hand({"alg": "ES256", "kid": "ec"}, ec_other_s),
    "ECDSA twice as long": by_hand({"alg": "ES256", "kid": "ec"}, lambda data: ec_raw(data) * 2),
    "ECDSA by half": by_hand({"alg": "ES256", "kid": "ec"}, lambda data: ec_raw(data)[:32]),
    "EdDSA of zeros": by_hand({"alg": "EdDSA"}, lambda _: bytes(64)),
    "EdDSA, by the name of another key": by_hand({"alg": "EdDSA", "kid": "ec"}, ec_raw),
    "Ed25519 as a name of the algorithm": by_hand({"alg": "Ed25519"}, ED.sign),
    "RSA of zeros": by_hand({"alg": "RS256", "kid": "rsa"}, lambda _: bytes(256)),
    "RSA of ones": by_hand({"alg": "RS256", "kid": "rsa"}, lambda _: bytes(255) + b"\1"),
    "an embedded key": by_hand(
        {"alg": "ES256", "jwk": public_jwk(OTHER_EC)},
        lambda data: OTHER_EC.sign(data, ec.ECDSA(SHA256())),
    ),
    "an embedded key, by the name of a real one": by_hand(
        {"alg": "ES256", "kid": "ec", "jwk": public_jwk(OTHER_EC)}, ec_raw
    ),
    "jku beside a real name": by_hand({"alg": "ES256", "kid": "ec", "jku": "https://evil.example"}, ec_raw),
    "x5u beside a real name": by_hand({"alg": "ES256", "kid": "ec", "x5u": "https://evil.example"}, ec_raw),
    "crit beside a real name": by_hand({"alg": "ES256", "kid": "ec", "crit": ["exp"], "exp": 1}, ec_raw),
    "b64 beside a real name": by_hand({"alg": "ES256", "kid": "ec", "crit": ["b64"], "b64": False}, ec_raw),
    "another issuer": token_of(RSA, USER, "rsa", iss="https://evil.example/"),
    "another audience": token_of(RSA, USER, "rsa", aud="someone"),
    "expired": token_of(RSA, USER, "rsa", exp=NOW - 1),
    "valid for too long": token_of(RSA, USER, "rsa", exp=10**18),
}


@pytest.mark.parametrize("token", FORGED_KEYS.values(), ids=FORGED_KEYS.keys())
def test_every_token_of_a_wrong_key_is_refused_with_the_same_error(of_an_issuer: Authenticator, token: str) -> None:
    with pytest.raises(BadToken) as refusal:
        of_an_issuer.verify(token)
    assert str(BadToken()) == str(refusal.value)
    assert refusal.value.__cause__ is None


def test_another_issuer_cannot_make_an_operator(of_an_issuer: Authenticator) -> None:
    claims = of_an_issuer.verify(by_hand({"alg": "ES256", "kid": "ec"}, ec_raw, operator=True))
    assert (True, False) == (claims.is_foreign, claims.operator)


@pytest.mark.parametrize(
    "token",
    [
        token_of(RSA, USER, "rsa"),
        token_of(EC, USER, "ec"),
        token_of(OTHER_EC, USER, "other"),
        token_of(ED, USER),
        token_of(ED, USER, "its issuer calls it so"),
        by_hand({"alg": "ES256", "kid": "ec"}, ec_raw),
        by_hand({"alg": "ES256", "kid": "ec", "typ": "at+jwt", "x5t": "a thumbprint"}, ec_raw),
    ],
)
def test_tokens_of_each_kind_of_key_verify_and_count_as_foreign(of_an_issuer: Authenticator, token: str) -> None:
    claims = of_an_issuer.verify(token)
    assert USER == claims.user
    assert claims.is_foreign


def test_tokens_of_every_secret_verify_and_the_first_signs() -> None:
    new, old = SECRET, SECRET[::-1]
    both = Authenticator(new, old)
    assert not both.verify(forged(secret=old)).is_foreign
    assert USER == Authenticator(new).verify(both.issue(USER, ttl=60)).user


def test_a_secret_that_is_gone_ends_the_validity_of_known_tokens() -> None:
    authenticator = Authenticator(SECRET)
    token = forged()
    authenticator.verify(token)
    authenticator.use(KeyTable([secret_key(SECRET[::-1])]))
    with pytest.raises(BadToken):
        authenticator.verify(token)


def test_each_refusal_takes_a_time_of_the_same_class() -> None:
    """The slowest refusals are those that verify a signature, as for a valid token; none takes many times as long."""
    authenticator = Authenticator(SECRET)

    def quickest(token: str) -> float:
        return min(timeit.repeat(lambda: refused(authenticator, token), number=1, repeat=20))

    valid = min(timeit.repeat(lambda: Authenticator.verify(Authenticator(SECRET), forged()), number=1, repeat=5))
    slow = {name: took for name, token in BAD.items() if (took := quickest(token)) > 100 * valid}
    assert {} == slow


def refused(authenticator: Authenticator, token: str) -> None:
    with pytest.raises(BadToken):
        authenticator.verify(token)


def test_no_token_is_issued_that_would_be_valid_for_too_long() -> None:
    with pytest.raises(ValueError, match="ROWCAST_TOKEN_LIFETIME"):
        Authenticator(SECRET, max_lifetime=60).issue(USER, ttl=61)


def test_a_token_at_the_size_limit_is_valid_and_a_larger_one_is_not() -> None:
    fits = next(
        token
        for size in range(5800, MAX_TOKEN)
        if len(token := forged(note="x" * size)) in {MAX_TOKEN - 1, MAX_TOKEN}
    )
    assert Authenticator(SECRET).verify(fits).user == USER
    assert len(forged(note="x" * 6000)) > MAX_TOKEN


def test_the_signature_is_hmac_sha256_with_the_secret() -> None:
    token = Authenticator(SECRET).issue(USER, ttl=60)
    unsigned, _, signature = token.rpartition(".")
    assert signature == encoded(hmac.new(SECRET, unsigned.encode(), hashlib.sha256).digest())
    assert json.loads(base64.urlsafe_b64decode(unsigned.split(".")[0] + "==")) == {"alg": "HS256", "typ": "JWT"}


def test_tokens_of_another_audience_issuer_or_secret_are_refused() -> None:
    token = Authenticator(SECRET, issuer="a", audience="b").issue(USER, ttl=60)
    assert Authenticator(SECRET, issuer="a", audience="b").verify(token).user == USER
    for other in (
        Authenticator(SECRET),
        Authenticator(SECRET, issuer="a"),
        Authenticator(SECRET, audience="b"),
        Authenticator(SECRET[::-1], issuer="a", audience="b"),
    ):
        with pytest.raises(BadToken):
            other.verify(token)


def test_the_leeway_can_be_zero() -> None:
    token = forged(nbf=int(time.time()) + 10)
    Authenticator(SECRET).verify(token)
    with pytest.raises(BadToken):
        Authenticator(SECRET, leeway=0).verify(token)


def test_a_cached_token_is_not_decoded_again_and_still_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    authenticator = Authenticator(SECRET, leeway=30)
    token = forged()
    claims = authenticator.verify(token)
    assert authenticator.verify(token) is claims
    monkeypatch.setattr(time, "time", lambda: claims.expires)
    with pytest.raises(BadToken):
        authenticator.verify(token)


def test_the_token_cache_is_bounded_and_holds_no_bad_tokens() -> None:
    authenticator = Authenticator(SECRET, max_known=2)
    tokens = [forged(note=note) for note in "abc"]
    claims = [authenticator.verify(token) for token in tokens]
    for token, known in zip(tokens[1:], claims[1:], strict=True):
        assert authenticator.verify(token) is known
    assert authenticator.verify(tokens[0]) is not claims[0]
    for _ in range(2):
        with pytest.raises(BadToken):
            authenticator.verify(with_another_payload(tokens[0]))


@pytest.mark.parametrize("user", ["", "u" * 129, "a\nb", "\ud800"])
def test_no_token_is_issued_for_an_invalid_user(user: str) -> None:
    with pytest.raises(ValueError, match="a user is 1 to 128 printable characters"):
        Authenticator(SECRET).issue(user, ttl=60)


@pytest.mark.parametrize("secret", [b"", b"short", SECRET[:31]])
def test_a_short_secret_is_an_operator_fault(secret: bytes) -> None:
    with pytest.raises(BadSecret, match=f"has only {len(secret)} bytes"):
        Authenticator(secret)


def test_a_public_key_is_refused_as_a_secret() -> None:
    with pytest.raises(BadSecret, match="another algorithm") as refusal:
        Authenticator(PEM)
    assert refusal.value.exit_code == 78
    assert "BEGIN" not in str(refusal.value)
