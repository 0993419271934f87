"""Where keys come from: files that are wrong, key sets that are down or lie, and keys that change."""

import asyncio
import ssl
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from structlog.testing import capture_logs

from daemon.core.errors import BadToken, OperatorFault
from daemon.gateway import key_source
from daemon.gateway.auth import Authenticator
from daemon.gateway.identity import Identity
from daemon.gateway.key_source import COOLDOWN, KeyPlaces, KeySource, KeysUnavailable
from daemon.gateway.keys import BadKeySet, KeyFileUnusable, parse_key_set, read_key_set, read_public_key
from tests.support.issuer import (
    EC,
    ED,
    RSA,
    KeyServer,
    encoded,
    key_server,
    key_set,
    page,
    private_pem,
    public_jwk,
    public_pem,
    self_signed,
    token_of,
    write,
)

SECRET = b"a secret of thirty-two bytes, ok"
WEAK = rsa.generate_private_key(65537, 1024)
P384 = ec.generate_private_key(ec.SECP384R1())


class Checked:
    """An Identity that fetches from a server, with a clock of its own."""

    def __init__(self, served: KeyServer, *secrets: bytes) -> None:
        self.now = 1000.0
        self.authenticator = Authenticator()
        self.keys = KeySource(KeyPlaces(secrets, key_set=served.url), self.authenticator.use, lambda: self.now)
        self.identity = Identity(self.authenticator, self.keys)

    async def accepts(self, token: str) -> bool:
        try:
            if self.identity.at_once(token) is None:
                await self.identity.identify(token)
        except BadToken:
            return False
        return True


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (private_pem(RSA), "it is a private key, and only the public one is needed here"),
        (public_pem(WEAK), "it is not a key for RS256 (2048 bits or more), ES256 or EdDSA"),
        (public_pem(P384), "it is not a key for RS256 (2048 bits or more), ES256 or EdDSA"),
        (b"", "it is not a public key in PEM format"),
        (b"\x00" * 1000, "it is not a public key in PEM format"),
        (public_pem(RSA)[:100], "it is not a public key in PEM format"),
        (b"-----BEGIN CERTIFICATE-----\nMII=\n-----END CERTIFICATE-----\n", "it is not a public key in PEM format"),
        (public_pem(RSA) + public_pem(EC), "it contains 2 keys or certificates: put each into a file of its own"),
        (public_pem(RSA) + private_pem(RSA), "it is a private key, and only the public one is needed here"),
    ],
    ids=[
        "private",
        "weak",
        "another curve",
        "empty",
        "zeros",
        "cut off",
        "a broken certificate",
        "two keys",
        "a public and a private key",
    ],
)
def test_a_wrong_key_file_is_refused_with_its_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = write(tmp_path / "key.pem", content)
    with pytest.raises(KeyFileUnusable) as refusal:
        read_public_key(path)
    assert reason == refusal.value.reason
    assert 78 == refusal.value.exit_code
    assert "BEGIN" not in str(refusal.value)


def test_a_key_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileUnusable, match="No such file or directory"):
        read_public_key(tmp_path / "absent.pem")
    with pytest.raises(KeyFileUnusable, match="Is a directory"):
        read_key_set(tmp_path)


@pytest.mark.parametrize("key", [RSA, EC, ED])
def test_a_pem_file_with_each_kind_of_public_key_is_read(tmp_path: Path, key: rsa.RSAPrivateKey) -> None:
    assert read_public_key(write(tmp_path / "key.pem", public_pem(key))).algorithm in {"RS256", "ES256", "EdDSA"}


UNUSABLE = {
    "not JSON": (b"<!doctype html><title>Sign in</title>", "it is not JSON"),
    "nothing": (b"", "it is not JSON"),
    "deep": (b"[" * 100_000, "it is not JSON"),
    "no set": (b'{"error": "not found"}', 'it is not a JSON Web Key Set: it has no list "keys"'),
    "a list": (b"[]", 'it is not a JSON Web Key Set: it has no list "keys"'),
    "empty": (key_set(), "it has no public key for RS256, ES256 or EdDSA"),
    "too many": (key_set(*[{}] * 65), "it has more than 64 keys"),
    "too large": (b" " * (256 * 1024 + 1), "it is larger than 256 KiB"),
    "no objects": (key_set(1, None, "x", []), "it has no public key for RS256, ES256 or EdDSA"),
    "a secret": (key_set({"kty": "oct", "k": encoded(SECRET)}), "it has no public key for RS256, ES256 or EdDSA"),
    "HS256 of an RSA key": (key_set(public_jwk(RSA, alg="HS256")), "it has no public key for RS256, ES256 or EdDSA"),
    "none": (key_set(public_jwk(RSA, alg="none")), "it has no public key for RS256, ES256 or EdDSA"),
    "for encryption": (key_set(public_jwk(RSA, use="enc")), "it has no public key for RS256, ES256 or EdDSA"),
    "for signing only": (
        key_set(public_jwk(RSA, key_ops=["sign"])),
        "it has no public key for RS256, ES256 or EdDSA",
    ),
    "weak": (key_set(public_jwk(WEAK)), "it has no public key for RS256, ES256 or EdDSA"),
    "another curve": (key_set(public_jwk(EC, crv="P-384")), "it has no public key for RS256, ES256 or EdDSA"),
    "not on the curve": (key_set(public_jwk(EC, x="AAAA")), "it has no public key for RS256, ES256 or EdDSA"),
    "members of other types": (
        key_set(public_jwk(RSA, n=1), public_jwk(RSA, kid=1), public_jwk(EC, crv=[]), {"kty": ["RSA"]}),
        "it has no public key for RS256, ES256 or EdDSA",
    ),
}


@pytest.mark.parametrize(("text", "reason"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_a_key_set_without_a_usable_key_is_refused_with_its_reason(text: bytes, reason: str) -> None:
    with pytest.raises(BadKeySet) as refusal:
        parse_key_set(text)
    assert reason == str(refusal.value)


def test_only_the_usable_keys_of_a_set_are_used() -> None:
    mixed = key_set(public_jwk(RSA, kid="a", alg=None), public_jwk(EC, use="enc"), {"kty": "new"}, public_jwk(ED))
    assert [("RS256", "a"), ("EdDSA", None)] == [(key.algorithm, key.kid) for key in parse_key_set(mixed)]


async def test_a_key_that_the_issuer_adds_is_fetched_when_a_token_names_it(served: KeyServer) -> None:
    checked = Checked(served)
    await checked.keys.load()
    assert await checked.accepts(token_of(RSA, "ada", "first"))
    served.answer = page(key_set(public_jwk(EC, kid="second")))
    with capture_logs() as logs:
        assert await checked.accepts(token_of(EC, "ada", "second"))
    assert ["keys_changed"] == [line["event"] for line in logs]
    assert not await checked.accepts(token_of(RSA, "ada", "first"))  # the issuer has removed its key


async def test_tokens_with_unknown_keys_cause_one_fetch_within_the_cooldown(served: KeyServer) -> None:
    checked = Checked(served)
    await checked.keys.load()
    forged = [token_of(EC, "ada", f"unknown {number}") for number in range(50)]
    assert not any([await checked.accepts(token) for token in forged])
    assert 2 == len(served.requests)
    checked.now += COOLDOWN
    assert not await checked.accepts(forged[0])
    assert 3 == len(served.requests)


async def test_clients_that_wait_for_the_same_fetch_share_it(served: KeyServer) -> None:
    checked = Checked(served)
    await checked.keys.load()
    served.gate.clear()
    served.answer = page(key_set(public_jwk(EC, kid="second")))
    tokens = [token_of(EC, f"user {number}", "second") for number in range(20)]
    waiting = [asyncio.ensure_future(checked.accepts(token)) for token in tokens]
    served.asked.clear()
    await served.asked.wait()
    waiting[0].cancel()  # one that leaves takes nothing from the others
    served.gate.set()
    assert [True] * 19 == await asyncio.gather(*waiting[1:])
    assert 2 == len(served.requests)


LIES = {
    "500": (page(b"{}", "500 Internal Server Error"), "it answers 500, not 200"),
    "404": (page(b"{}", "404 Not Found"), "it answers 404, not 200"),
    "HTML": (page(b"<html></html>"), "it is not JSON"),
    "other content": (page(b'{"keys": 1}'), 'it is not a JSON Web Key Set: it has no list "keys"'),
    "no keys": (page(key_set()), "it has no public key for RS256, ES256 or EdDSA"),
    "a redirect": (page(b"", "302 Found", "Location: http://127.0.0.1:1/"), "it answers 302, not 200"),
    "not HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n", "its answer is not HTTP"),
    "nothing": (b"", "its answer is not HTTP"),
    "cut off": (page(key_set(public_jwk(RSA)))[:-20], "it is not JSON"),
}


@pytest.mark.parametrize(("answer", "reason"), LIES.values(), ids=LIES.keys())
async def test_a_key_set_that_lies_ends_the_start_and_changes_nothing_later(
    served: KeyServer, answer: bytes, reason: str
) -> None:
    checked = Checked(served)
    await checked.keys.load()
    served.answer = answer
    with capture_logs() as logs:
        assert not await checked.accepts(token_of(EC, "ada", "unknown"))
    assert [("keys_unavailable", reason)] == [(line["event"], line["reason"]) for line in logs]
    assert [f"the keys cannot be fetched: {reason}"] == checked.keys.warnings()
    assert await checked.accepts(token_of(RSA, "ada", "first"))
    with pytest.raises(KeysUnavailable) as fault:
        await Checked(served).keys.load()
    assert (reason, 49) == (fault.value.reason, fault.value.exit_code)


async def test_an_endless_answer_is_cut_off(served: KeyServer) -> None:
    served.answer = page(b"")[:-4].replace(b"Content-Length: 0\r\n", b"") + b"\r\n\r\n"
    served.endless = True
    with pytest.raises(KeysUnavailable, match="its answer is too large"):
        await Checked(served).keys.load()


async def test_a_server_that_does_not_answer_is_given_up(served: KeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_source, "FETCH_TIMEOUT", 0.1)
    served.gate.clear()
    with pytest.raises(KeysUnavailable, match="no whole answer in time"):
        await Checked(served).keys.load()


async def test_an_address_where_nobody_listens_is_named(served: KeyServer) -> None:
    places = KeyPlaces(key_set="http://127.0.0.1:1/keys")
    with pytest.raises(KeysUnavailable, match=r"http://127\.0\.0\.1:1/keys cannot be fetched \(connect call failed"):
        await KeySource(places, Authenticator().use).load()


async def test_a_failure_is_logged_once_and_the_next_success_ends_it(served: KeyServer) -> None:
    checked = Checked(served)
    await checked.keys.load()
    good, served.answer = served.answer, page(b"", "500 Internal Server Error")
    with capture_logs() as logs:
        for number in range(3):
            checked.now += COOLDOWN
            assert not await checked.accepts(token_of(EC, "ada", f"unknown {number}"))
    assert ["keys_unavailable"] == [line["event"] for line in logs]
    assert 2 * COOLDOWN == checked.keys.age
    served.answer = good
    checked.now += COOLDOWN
    assert not await checked.accepts(token_of(EC, "ada", "unknown"))
    assert (0.0, []) == (checked.keys.age, checked.keys.warnings())


async def test_a_key_set_in_a_file_is_read_again_when_everything_is(served: KeyServer, tmp_path: Path) -> None:
    checked = Checked(served)
    file = KeyPlaces(key_set=str(write(tmp_path / "keys.json", key_set(public_jwk(RSA, kid="first")))))
    await checked.keys.load(file)
    assert await checked.accepts(token_of(RSA, "ada", "first"))
    write(tmp_path / "keys.json", key_set(public_jwk(EC, kid="second")))
    assert not await checked.accepts(token_of(EC, "ada", "second"))
    await checked.keys.load(file)
    assert await checked.accepts(token_of(EC, "ada", "second"))
    assert not await checked.accepts(token_of(RSA, "ada", "first"))
    assert [] == served.requests


async def test_a_secret_can_be_replaced_while_the_key_set_is_down(served: KeyServer) -> None:
    checked = Checked(served, SECRET)
    await checked.keys.load()
    served.answer = page(b"", "500 Internal Server Error")
    assert 2 == await checked.keys.load(KeyPlaces([SECRET[::-1]], key_set=served.url))
    assert not await checked.accepts(Authenticator(SECRET).issue("ada", ttl=60))
    assert await checked.accepts(Authenticator(SECRET[::-1]).issue("ada", ttl=60))
    assert await checked.accepts(token_of(RSA, "ada", "first"))


async def test_a_reload_that_fails_keeps_every_key(served: KeyServer, tmp_path: Path) -> None:
    checked = Checked(served, SECRET)
    await checked.keys.load()
    own = Authenticator(SECRET).issue("ada", ttl=60)
    wrong = write(tmp_path / "wrong.pem", b"wrong")
    for places in (
        KeyPlaces([b"short"], key_set=served.url),
        KeyPlaces([SECRET], [wrong], served.url),
        KeyPlaces([SECRET[::-1]], key_set="http://127.0.0.1:1/"),
    ):
        with pytest.raises(OperatorFault):
            await checked.keys.load(places)
        assert await checked.accepts(own)
        assert await checked.accepts(token_of(RSA, "ada", "first"))
    assert 1 == await checked.keys.load(KeyPlaces([SECRET[::-1]]))
    assert not await checked.accepts(own)
    assert not await checked.accepts(token_of(RSA, "ada", "first"))


async def test_a_certificate_that_nobody_vouches_for_is_refused_and_a_trusted_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = self_signed(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    async with key_server(page(key_set(public_jwk(RSA, kid="first"))), tls) as served:
        places = KeyPlaces(key_set=served.url.replace("http:", "https:"))
        with pytest.raises(KeysUnavailable, match="its certificate is not valid: self-signed certificate"):
            await KeySource(places, Authenticator().use).load()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert 1 == await KeySource(places, Authenticator().use).load()
        assert 1 == len(served.requests)


def test_a_certificate_is_read_as_its_public_key(tmp_path: Path) -> None:
    certificate, _ = self_signed(tmp_path)
    assert "ES256" == read_public_key(certificate).algorithm
