"""Encryption of OAuth tokens, with keys that can be rotated."""

import json
from collections.abc import Sequence
from typing import ClassVar, Final

from pydantic import SecretStr

from daemon.core.errors import OperatorFault
from daemon.settings import BadSettings, Settings

MAX_NAMED: Final = 20
"""Accounts that one message names."""


class EncryptionUnavailable(OperatorFault):
    """The encryption library is missing: install Rowcast with the extra email_unsubscribe."""

    exit_code: ClassVar[int] = 41


class TokenUndecryptable(OperatorFault):
    """No key decrypts the {field} of an account: add the key it was encrypted with after the others."""

    exit_code: ClassVar[int] = 42

    def __init__(self, field: str) -> None:
        self.field = field


class RotationIncomplete(TokenUndecryptable):
    """No key decrypts tokens of {accounts}: add the keys they were encrypted with after the others. {done}."""

    def __init__(self, accounts: Sequence[str], renewed: int) -> None:
        named = [account if account.isprintable() else ascii(account) for account in accounts[:MAX_NAMED]]
        others = [f"{len(accounts) - MAX_NAMED} more accounts"] if len(accounts) > MAX_NAMED else []
        self.accounts = ", ".join([*named, *others])
        self.done = f"The tokens of {renewed} account{'' if renewed == 1 else 's'} were re-encrypted"


class Cipher:
    """Encrypts tokens with the first of its keys, and decrypts them with any of its keys.

    A ciphertext contains its account and field, so a token copied to another row or column does not decrypt.
    Raises EncryptionUnavailable and BadSettings.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        try:
            from cryptography.fernet import Fernet, InvalidToken, MultiFernet  # noqa: PLC0415 - it is an extra
        except ImportError:
            raise EncryptionUnavailable from None
        try:
            fernets = [Fernet(key) for key in keys]
            self._newest, self._all = fernets[0], MultiFernet(fernets)
        except (ValueError, IndexError):
            raise BadSettings("Each key for OAuth tokens must be 32 bytes in URL-safe base64.") from None
        self._invalid = InvalidToken

    def encrypt(self, token: SecretStr, account: str, field: str) -> str:
        """The ciphertext of a token, as it is stored."""
        return self._all.encrypt(json.dumps([account, field, token.get_secret_value()]).encode()).decode()

    def decrypt(self, stored: str, account: str, field: str) -> SecretStr:
        """The token. Raises TokenUndecryptable if no key decrypts it, or if it belongs to another row or column."""
        try:
            *place, token = json.loads(self._all.decrypt(stored))
        except self._invalid:
            raise TokenUndecryptable(field) from None
        if place != [account, field]:
            raise TokenUndecryptable(field)
        return SecretStr(token)

    def renew(self, stored: str, field: str) -> str:
        """Re-encrypt with the first key; a ciphertext of that key is returned as it is. Raises TokenUndecryptable."""
        try:
            self._newest.decrypt(stored)
        except self._invalid:
            try:
                return self._all.rotate(stored).decode()
            except self._invalid:
                raise TokenUndecryptable(field) from None
        return stored


def token_keys(settings: Settings) -> list[str]:
    """The keys that encrypt OAuth tokens, newest first. Raises BadSettings if none is configured."""
    keys = settings.pack_secret("token_keys")
    if keys is None:
        raise BadSettings(
            "No keys for OAuth tokens are configured: set ROWCAST_TOKEN_KEYS_FILE, or ROWCAST_TOKEN_KEYS."
        )
    return keys.get_secret_value().split()
