"""What can be wrong with the SSH tunnel: one fault for each thing that the operator can do about it."""

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from daemon.core.errors import OperatorFault


class SshFault(OperatorFault):
    """The SSH connection to {address} failed ({reason}): see the log of the SSH server."""

    exit_code: ClassVar[int] = 10
    transient: ClassVar[bool] = True  # it may pass by itself, and is retried at startup

    def __init__(self, address: str, reason: str = "") -> None:
        self.address, self.reason = address, reason


class SshRefused(SshFault):
    """SSH connection refused. Check host and port. Nothing answers at {address}: correct SSH_HOST and SSH_PORT, or \
start the SSH server there."""


class SshTimeout(SshFault):
    """No answer from {address} over SSH in time: check SSH_HOST, SSH_PORT, the network and the firewall."""

    exit_code = 19


class SshHostUnknown(SshFault):
    """SSH host not found. Check DNS or host address. {address} has no address ({reason}): correct SSH_HOST."""

    exit_code = 12
    transient = False


class SshAuthenticationFailed(SshFault):
    """{address} does not admit the user {user} with the key {key}: correct SSH_USER or SSH_KEY_PATH, or add the key \
to authorized_keys there."""

    exit_code = 11
    transient = False

    def __init__(self, address: str, user: str, key: Path) -> None:
        super().__init__(address)
        self.user, self.key = user, key


class HostKeyUnknown(SshFault):
    """The host key of {address} is not known ({reason}): compare it with the key of the host, then add it to \
{files}."""

    exit_code = 76
    transient = False

    def __init__(self, address: str, reason: str, files: Iterable[Path]) -> None:
        super().__init__(address, reason)
        self.files = " or ".join(map(str, files))


class HostKeyChanged(HostKeyUnknown):
    """The host key of {address} has changed ({reason}): someone may be intercepting the connection. Only if the \
host does have a new key, replace the one in {files}."""


class ForwardingProhibited(SshFault):
    """{address} does not forward to {database} ({reason}): allow that in its sshd_config (AllowTcpForwarding, \
AllowStreamLocalForwarding, PermitOpen) and in authorized_keys."""

    exit_code = 14
    transient = False

    def __init__(self, address: str, reason: str, database: str) -> None:
        super().__init__(address, reason)
        self.database = database


class SshKeyUnusable(OperatorFault):
    """The SSH key {path} cannot be used: {reason}."""

    exit_code: ClassVar[int] = 78

    def __init__(self, path: Path, reason: str = "") -> None:
        self.path, self.reason = path, reason


class SshKeyMissing(SshKeyUnusable):
    """SSH key file not found. Check SSH_KEY_PATH. There is no file {path}."""


class KnownHostsUnusable(OperatorFault):
    """The known SSH hosts cannot be read ({reason}): put the key of SSH_HOST into {files}, or set SSH_KNOWN_HOSTS."""

    exit_code: ClassVar[int] = 78

    def __init__(self, files: Iterable[Path], reason: str) -> None:
        self.files, self.reason = " or ".join(map(str, files)), reason


class TunnelDirectoryUnusable(OperatorFault):
    """The socket of the SSH tunnel cannot be made in {path} ({reason}): set TMPDIR to another directory."""

    exit_code: ClassVar[int] = 73

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason


class SshUnavailable(OperatorFault):
    """The SSH library is missing: install Rowcast with the extra ssh, or unset SSH_HOST."""

    exit_code: ClassVar[int] = 41
