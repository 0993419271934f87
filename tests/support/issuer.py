"""An issuer of tokens outside Rowcast: its keys, and the key set that it serves over HTTP."""

import asyncio
import base64
import datetime as dt
import json
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

RSA: Final = rsa.generate_private_key(65537, 2048)
EC: Final = ec.generate_private_key(ec.SECP256R1())
ED: Final = ed25519.Ed25519PrivateKey.generate()


def algorithm_of(key: PrivateKey) -> str:
    match key:
        case rsa.RSAPrivateKey():
            return "RS256"
        case ec.EllipticCurvePrivateKey():
            return "ES256"
    return "EdDSA"


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def public_pem(key: PrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def private_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_jwk(key: PrivateKey, **members: object) -> dict[str, Any]:
    """The key as a member of a key set. A member that is None is left out."""
    found = jwt.get_algorithm_by_name(algorithm_of(key)).to_jwk(key.public_key(), as_dict=True)
    assert isinstance(found, dict)
    found.pop("key_ops", None)
    full = found | {"use": "sig", "alg": algorithm_of(key)} | members
    return {name: value for name, value in full.items() if value is not None}


def key_set(*members: object) -> bytes:
    return json.dumps({"keys": members}).encode()


def claims(subject: str, **more: object) -> dict[str, Any]:
    """The claims of a valid token, with changes. A claim that is `...` is left out."""
    now = int(time.time())
    full = {"iss": "rowcast", "aud": "rowcast", "sub": subject, "iat": now - 1, "exp": now + 3600} | more
    return {name: value for name, value in full.items() if value is not ...}


def token_of(key: PrivateKey, subject: str, kid: str | None = None, **more: object) -> str:
    """A token signed with this key, whose header names it as `kid`."""
    return jwt.encode(
        claims(subject, **more),
        key,
        algorithm_of(key),
        headers=None if kid is None else {"kid": kid},
    )


def page(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """An HTTP response."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class KeyServer:
    """An HTTP server that gives every request the same answer. Until `gate` is set, it gives none."""

    port: int
    answer: bytes
    requests: list[str] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    endless: bool = False
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/.well-known/jwks.json"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            request = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(request.decode())
            self.asked.set()
            await self.gate.wait()
            writer.write(self.answer)
            await writer.drain()
            while self.endless:
                writer.write(b" " * 65536)
                await writer.drain()
        writer.close()


def self_signed(folder: Path, *, days: float = 1) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody has signed but itself, and its key. It ends in so many days."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, EC.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=10))
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .sign(EC, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    return write(folder / "certificate.pem", pem), write(folder / "key.pem", private_pem(EC))


@asynccontextmanager
async def key_server(answer: bytes, tls: ssl.SSLContext | None = None) -> AsyncIterator[KeyServer]:
    """A key server on a port of the loopback address."""
    served = KeyServer(0, answer)
    served.gate.set()
    server = await asyncio.start_server(served.serve, "127.0.0.1", 0, ssl=tls)
    served.port = server.sockets[0].getsockname()[1]
    try:
        yield served
    finally:
        server.close()
        served.gate.set()
        served.endless = False


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
