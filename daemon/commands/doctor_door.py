"""What `daemon doctor` says about the door: the certificate, pages, names, proxies, operators and open files."""

import resource
import ssl
import stat
import time
from collections.abc import Iterator, Sequence
from ipaddress import ip_network
from itertools import pairwise
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from daemon.app.node import gateway_limits
from daemon.commands.findings import Finding, State, failed
from daemon.core.errors import OperatorFault
from daemon.gateway.door import UNIX, host_name, is_this_machine
from daemon.gateway.limits import RESERVED
from daemon.gateway.tls import EXPIRY_WARNING, TlsFiles
from daemon.settings import Address, Settings

UNIT_FILES: Final = 65536  # LimitNOFILE of the systemd unit
WIDE: Final = {4: 8, 6: 16}  # a network of trusted proxies with a shorter prefix has more than proxies in it
DAY: Final = 86_400  # seconds


def door(settings: Settings) -> Iterator[Finding]:
    """How the door stands. Needs no database, and no daemon."""
    yield from _certificate(settings)
    yield from _origins(settings)
    yield _hosts(settings)
    yield from _proxies(settings)
    yield _operators(settings)
    yield files(settings)


def _is_behind(listen: Address) -> bool:
    """Whether only this machine, and a proxy on it, can reach this address."""
    return listen.is_unix or is_this_machine(listen.host)


def _certificate(settings: Settings) -> Iterator[Finding]:
    if settings.tls_certificate is None or settings.tls_key is None:
        if _is_behind(settings.listen):
            yield Finding(
                "certificate", State.OK, f"none is needed at {settings.listen}, which only this machine reaches"
            )
        elif settings.trusted_proxies:
            yield Finding("certificate", State.OK, "none: connections to the proxies are not encrypted")
        else:
            remedy = "set ROWCAST_TLS_CERTIFICATE and ROWCAST_TLS_KEY, or put a proxy in front that speaks TLS"
            yield Finding("certificate", State.WARN, f"clients of {settings.listen} are not encrypted", remedy)
        return
    files = TlsFiles(settings.tls_certificate, settings.tls_key)
    try:
        files.read()
        chain = x509.load_pem_x509_certificates(files.certificate.read_bytes())
    except OperatorFault as fault:
        yield from failed("certificate", fault)
        return
    except (OSError, ValueError):
        remedy = "let the certificate be followed by those of its issuers, and by nothing else"
        yield Finding("certificate", State.FAIL, f"{files.certificate} has something that is no certificate", remedy)
        return
    if files.key.stat().st_mode & stat.S_IROTH:
        yield Finding(
            "certificate", State.WARN, f"everybody on this machine can read {files.key}", f"chmod o= {files.key}"
        )
    yield from _chain(chain)
    yield from _names(chain[0], settings.hosts)


def _chain(chain: Sequence[x509.Certificate]) -> Iterator[Finding]:
    """Until when the certificates are valid, and whether each was issued by the next."""
    renew = "renew it, and reload the daemon"
    now = time.time()
    for number, certificate in enumerate(chain):
        what = "the certificate" if not number else f"the issuer's certificate {_subject(certificate)}"
        left = certificate.not_valid_after_utc.timestamp() - now
        if certificate.not_valid_before_utc.timestamp() > now:
            begin = certificate.not_valid_before_utc.date()
            yield Finding("certificate", State.FAIL, f"{what} is not valid before {begin}", "set the clock, or wait")
        elif left <= 0:
            yield Finding("certificate", State.FAIL, f"{what} ended {-left / DAY:.1f} days ago", renew)
        elif left <= EXPIRY_WARNING:
            yield Finding("certificate", State.WARN, f"{what} ends in {left / DAY:.1f} days", renew)
        elif not number:
            yield Finding("certificate", State.OK, f"{what} is valid for {left / DAY:.0f} days")
    for certificate, issuer in pairwise(chain):
        if not _has_issued(issuer, certificate):
            text = f"{_subject(issuer)} did not issue {_subject(certificate)}, which it follows"
            yield Finding("certificate", State.FAIL, text, "let each certificate be followed by that of its issuer")
            return
    if _has_issued(chain[-1], chain[-1]):
        if len(chain) == 1:
            text = "the certificate is its own issuer, so clients refuse it unless they are told to trust it"
            yield Finding("certificate", State.WARN, text, "use one of an authority that they trust")
    elif not _is_trusted_here(chain[-1].issuer):
        text = f"the certificate of {_name(chain[-1].issuer)} is missing, and this system does not have it"
        yield Finding("certificate", State.WARN, text, "append it to the file, unless every client has it")


def _names(certificate: x509.Certificate, hosts: Sequence[str]) -> Iterator[Finding]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        text = "the certificate names no host (subjectAltName), so every client refuses it"
        yield Finding("certificate", State.FAIL, text, "use one for the names of this daemon")
        return
    names = [name.lower() for name in extension.get_values_for_type(x509.DNSName)]
    addresses = list(map(str, extension.get_values_for_type(x509.IPAddress)))
    if missing := [host for host in hosts if not _is_covered(host, names)]:
        text = f"the certificate is not for {', '.join(missing)} of ROWCAST_HOSTS"
        yield Finding("certificate", State.WARN, text, "use one for all names, or correct ROWCAST_HOSTS")
    else:
        yield Finding("certificate", State.OK, f"it is for {', '.join(names + addresses)}")


def _is_covered(host: str, names: Sequence[str]) -> bool:
    """Whether one of the names is this host; an asterisk is one label."""
    return host in names or f"*.{host.partition('.')[2]}" in names


def _has_issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _is_trusted_here(issuer: x509.Name) -> bool:
    """Whether this system trusts an authority of that name."""
    known = ssl.create_default_context().get_ca_certs(binary_form=True)
    return any(issuer.public_bytes() in certificate for certificate in known)


def _subject(certificate: x509.Certificate) -> str:
    return _name(certificate.subject)


def _name(name: x509.Name) -> str:
    return name.rfc4514_string() or "without a name"


def _origins(settings: Settings) -> Iterator[Finding]:
    """Which pages may connect. Outside production, those of this machine may anyway."""
    in_production = settings.environment == "production"
    problems = []
    if "*" in settings.origins:
        problems.append(("pages of every origin may connect (`*`)", "list those of your pages"))
    if in_production and "null" in settings.origins:
        problems.append(("files, and pages in a sandbox of any site, may connect (`null`)", "list an origin instead"))
    if in_production and not settings.origins:
        remedy = "list the origins of your pages in ROWCAST_ORIGINS, such as https://chat.example.com"
        problems.append(("only pages that are served under the daemon's own name may connect", remedy))
    plain = [
        origin
        for origin in settings.origins
        if origin.startswith("http://") and not is_this_machine(host_name(origin.partition("://")[2]))
    ]
    if in_production and plain:
        problems.append((f"pages of {plain[0]} can be changed on their way", "list only origins with https"))
    for text, remedy in problems:
        yield Finding("origins", State.WARN, text, remedy)
    if not problems:
        listed = ", ".join(settings.origins) or "the daemon's own, and those on this machine"
        yield Finding("origins", State.OK, f"pages of these may connect: {listed}")


def _hosts(settings: Settings) -> Finding:
    if settings.hosts:
        return Finding("hosts", State.OK, f"requests are answered for {', '.join(settings.hosts)} and for addresses")
    if settings.environment == "production":
        remedy = "list the names of this daemon in ROWCAST_HOSTS"
        return Finding("hosts", State.WARN, "requests are answered for every name that points here", remedy)
    return Finding(
        "hosts", State.OK, "every name is answered; sample users and consoles need an address or localhost"
    )


def _proxies(settings: Settings) -> Iterator[Finding]:
    """Who is believed about the address of a client."""
    proxies = settings.trusted_proxies
    networks = [ip_network(proxy) for proxy in proxies if proxy != UNIX]
    problems = []
    if wide := [network for network in networks if network.prefixlen < WIDE[network.version]]:
        text = f"{wide[0]} has more than proxies in it, and each of these may claim to be any client"
        problems.append((State.FAIL if not wide[0].prefixlen else State.WARN, text, "list the addresses of proxies"))
    if settings.listen.is_unix and UNIX not in proxies:
        text = "what comes through the Unix socket has no address, so limits per address do not count it"
        problems.append((State.WARN, text, "add `unix` to ROWCAST_TRUSTED_PROXIES if only a proxy can reach it"))
    elif not proxies and settings.max_clients_per_address and _is_behind(settings.listen):
        text = f"all clients of {settings.listen} have one address, which may have only "
        text += f"{settings.max_clients_per_address} connections"
        problems.append((State.WARN, text, "name the proxy in ROWCAST_TRUSTED_PROXIES"))
    elif not proxies and settings.environment == "production" and _is_behind(settings.listen):
        text = f"clients of {settings.listen} come through a proxy whose word about their address does not count"
        problems.append((State.WARN, text, "name the proxy in ROWCAST_TRUSTED_PROXIES"))
    for state, text, remedy in problems:
        yield Finding("proxies", state, text, remedy)
    if not problems:
        listed = f"{', '.join(proxies)} by {settings.proxy_header}" if proxies else "nobody"
        yield Finding("proxies", State.OK, f"these are believed about the address of a client: {listed}")


def _operators(settings: Settings) -> Finding:
    place = settings.metrics_listen
    if place is None:
        if settings.environment == "production" or not _is_behind(settings.listen):
            text = f"whoever reaches {settings.listen} can read the metrics, and why the daemon is not ready"
            return Finding("operators", State.WARN, text, "set ROWCAST_METRICS_LISTEN, for example to 127.0.0.1:9187")
        return Finding("operators", State.OK, f"metrics and the console are at {settings.listen}")
    if _is_behind(place):
        return Finding("operators", State.OK, f"metrics, reasons and the console are at {place} only")
    text = f"metrics, reasons and the console are at {place}, without TLS"
    remedy = "let only operators and your monitoring reach it, or use 127.0.0.1 with a proxy"
    return Finding("operators", State.WARN, text, remedy)


def files(settings: Settings) -> Finding:
    """Whether this process might open as many files as the clients need. The unit has limits of its own."""
    limits = gateway_limits(settings)
    allowed, possible = resource.getrlimit(resource.RLIMIT_NOFILE)
    clients, pending = limits.max_clients(), limits.max_pending()
    if clients < settings.max_clients or pending < settings.max_unauthenticated:
        needed = settings.max_clients + settings.max_unauthenticated + RESERVED
        needed = max(needed, 4 * settings.max_unauthenticated + RESERVED)
        text = f"with {allowed} open files, a process started here serves only {clients} clients"
        text += f", and {pending} that are not authenticated" if pending < settings.max_unauthenticated else ""
        how = "ulimit -n" if possible == resource.RLIM_INFINITY or possible >= needed else "ulimit -Hn, as root"
        remedy = f"raise the limit to {needed} ({how}; LimitNOFILE={max(UNIT_FILES, needed)} in the unit), or lower "
        remedy += "ROWCAST_MAX_CLIENTS" if clients < settings.max_clients else "ROWCAST_MAX_UNAUTHENTICATED"
        return Finding("files", State.WARN, text, remedy)
    return Finding("files", State.OK, f"{allowed} open files are enough for {clients} clients in each process")
