"""What `daemon doctor` says about the door: each thing that is wrong, with its remedy."""

import datetime as dt
import resource
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from daemon.commands.doctor_door import door, files
from daemon.commands.findings import Finding, State
from daemon.settings import Address, Settings
from daemon.settings.load import load

KEYS = [ec.generate_private_key(ec.SECP256R1()) for _ in range(3)]
ROOT, LEAF = KEYS[0], KEYS[1]
OUTSIDE = Address("0.0.0.0", 443)
UNREAD = {"max_clients": 1, "max_unauthenticated": 1}


def certificate(
    key: ec.EllipticCurvePrivateKey = LEAF,
    issuer: ec.EllipticCurvePrivateKey = ROOT,
    *,
    days: float = 90,
    begin: float = -1,
    names: tuple[str, ...] = ("chat.example.com", "*.example.org"),
) -> x509.Certificate:
    def named(key: ec.EllipticCurvePrivateKey) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"key {KEYS.index(key)}")])

    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder(named(issuer), named(key), key.public_key(), x509.random_serial_number())
        .not_valid_before(now + dt.timedelta(days=begin))
        .not_valid_after(now + dt.timedelta(days=days))
    )
    if names:
        alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
        alternatives.append(x509.IPAddress(IPv4Address("192.0.2.1")))
        made = made.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return made.sign(issuer, hashes.SHA256())


def about(check: str, **settings: Any) -> list[Finding]:
    """What the doctor says about one thing with these settings."""
    return [finding for finding in door(load(**UNREAD | settings)) if finding.check == check]


def problems(check: str, **settings: Any) -> list[tuple[State, str]]:
    """Everything that is not in order, as the line that is printed, which always ends with what to do."""
    found = [finding for finding in about(check, **settings) if finding.state is not State.OK]
    assert all(finding.remedy or "correct ROWCAST_" in finding.text for finding in found)
    return [(finding.state, f"{finding.text}: {finding.remedy}") for finding in found]


def of_files(folder: Path, *chain: x509.Certificate, more: bytes = b"", **settings: Any) -> list[tuple[State, str]]:
    """What is wrong with a file of these certificates, beside the key of the first."""
    pem = serialization.Encoding.PEM
    (folder / "chain.pem").write_bytes(b"".join(each.public_bytes(pem) for each in chain) + more)
    key = folder / "key.pem"
    key.write_bytes(LEAF.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    key.chmod(settings.pop("mode", 0o640))
    return problems("certificate", tls_certificate=folder / "chain.pem", tls_key=key, listen=OUTSIDE, **settings)


def test_a_whole_chain_for_all_names_is_in_order(tmp_path: Path) -> None:
    hosts = ("chat.example.com", "a.example.org")
    assert [] == of_files(tmp_path, certificate(), certificate(ROOT), hosts=hosts)
    found = about("certificate", tls_certificate=tmp_path / "chain.pem", tls_key=tmp_path / "key.pem")
    assert "the certificate is valid for 90 days" in str(found)
    assert "it is for chat.example.com, *.example.org, 192.0.2.1" in str(found)


def test_each_thing_that_is_wrong_with_a_certificate_is_a_line(tmp_path: Path) -> None:
    root = certificate(ROOT)
    for chain, more, state, text in (
        ((certificate(days=3), root), {}, State.WARN, "the certificate ends in 3.0 days: renew it, and reload"),
        ((certificate(begin=-9, days=-2), root), {}, State.FAIL, "the certificate ended 2.0 days ago: renew it"),
        ((certificate(begin=2), root), {}, State.FAIL, "the certificate is not valid before 2"),
        ((certificate(), certificate(ROOT, days=3)), {}, State.WARN, "the issuer's certificate CN=key 0 ends in"),
        ((certificate(), certificate(KEYS[2])), {}, State.FAIL, "CN=key 2 did not issue CN=key 1"),
        ((certificate(),), {}, State.WARN, "the certificate of CN=key 0 is missing, and this system does not"),
        ((certificate(LEAF, LEAF),), {}, State.WARN, "the certificate is its own issuer"),
        ((certificate(names=()), root), {}, State.FAIL, "the certificate names no host (subjectAltName)"),
        (
            (certificate(), root),
            {"hosts": ("chat.example.com", "a.b.example.org")},
            State.WARN,
            "the certificate is not for a.b.example.org of ROWCAST_HOSTS: use one for all names",
        ),
        ((certificate(), root), {"mode": 0o644}, State.WARN, "everybody on this machine can read "),
    ):
        [(found, line)] = of_files(tmp_path, *chain, **more)
        assert (state, True) == (found, line.startswith(text)), line


def test_files_that_tls_cannot_use_fail_with_their_reason(tmp_path: Path) -> None:
    settings = {"tls_certificate": tmp_path / "none", "tls_key": tmp_path / "none"}
    [found] = about("certificate", **settings)
    assert State.FAIL is found.state
    assert "No such file or directory" in found.text
    assert "correct ROWCAST_TLS_CERTIFICATE" in found.text
    of_files(tmp_path, certificate(ROOT))
    [other] = about("certificate", tls_certificate=tmp_path / "chain.pem", tls_key=tmp_path / "key.pem")
    assert (State.FAIL, True) == (other.state, "the key is of another certificate" in other.text)
    garbage = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    [(state, line)] = of_files(tmp_path, certificate(), more=garbage)
    assert State.FAIL is state
    assert "chain.pem" in line


@pytest.mark.parametrize(
    ("check", "settings", "line"),
    [
        ("certificate", {"listen": OUTSIDE}, "clients of 0.0.0.0:443 are not encrypted: set ROWCAST_TLS_CERTIFICATE"),
        ("origins", {"origins": ("*",)}, "pages of every origin may connect (`*`): list those of your pages"),
        ("origins", {"environment": "production"}, "only pages that are served under the daemon's own name may"),
        ("origins", {"environment": "production", "origins": ("null",)}, "files, and pages in a sandbox of any site"),
        (
            "origins",
            {"environment": "production", "origins": ("http://chat.example.com",)},
            "pages of http://chat.example.com can be changed on their way",
        ),
        ("hosts", {"environment": "production"}, "requests are answered for every name that points here: list the"),
        ("proxies", {"environment": "production"}, "clients of 127.0.0.1:8787 come through a proxy whose word"),
        ("proxies", {"max_clients_per_address": 9}, "all clients of 127.0.0.1:8787 have one address, which may have"),
        ("proxies", {"trusted_proxies": ("::/8",)}, "::/8 has more than proxies in it"),
        ("proxies", {"listen": Address("unix:/run/s", 0)}, "what comes through the Unix socket has no address"),
        ("operators", {"environment": "production"}, "whoever reaches 127.0.0.1:8787 can read the metrics"),
        (
            "operators",
            {"metrics_listen": OUTSIDE},
            "metrics, reasons and the console are at 0.0.0.0:443, without TLS",
        ),
    ],
)
def test_each_thing_that_is_wrong_with_the_door_is_a_line(check: str, settings: dict[str, Any], line: str) -> None:
    [(state, found)] = problems(check, **settings)
    assert State.WARN is state
    assert found.startswith(line)


def test_trusting_everybody_about_addresses_is_a_failure() -> None:
    [(state, line)] = problems("proxies", trusted_proxies=("0.0.0.0/0",))
    assert State.FAIL is state
    assert line.endswith("may claim to be any client: list the addresses of proxies")


def test_a_door_of_production_with_everything_set_has_no_problem() -> None:
    settings = load(
        max_clients=1,
        max_unauthenticated=1,
        environment="production",
        origins=("https://chat.example.com", "http://localhost:5173"),
        hosts=("chat.example.com",),
        trusted_proxies=("10.0.0.0/8", "unix"),
        listen=OUTSIDE,
        metrics_listen=Address("127.0.0.1", 9187),
    )
    found = list(door(settings))
    assert {State.OK} == {finding.state for finding in found}, found
    assert ["certificate", "origins", "hosts", "proxies", "operators", "files"] == [each.check for each in found]


def test_open_files_are_compared_with_clients_and_with_newcomers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1096, resource.RLIM_INFINITY))
    found = files(Settings(ROWCAST_MAX_CLIENTS=2000, ROWCAST_MAX_UNAUTHENTICATED=100))
    assert (State.WARN, "with 1096 open files, a process started here serves only 900 clients") == found[1:3]
    assert (
        "raise the limit to 2196 (ulimit -n; LimitNOFILE=65536 in the unit), or lower ROWCAST_MAX_CLIENTS" == found[3]
    )
    found = files(Settings(ROWCAST_MAX_CLIENTS=500, ROWCAST_MAX_UNAUTHENTICATED=400))
    assert "500 clients, and 250 that are not authenticated" in found.text
    assert found.remedy.endswith("or lower ROWCAST_MAX_UNAUTHENTICATED")
    assert State.OK is files(Settings(ROWCAST_MAX_CLIENTS=500, ROWCAST_MAX_UNAUTHENTICATED=200)).state
