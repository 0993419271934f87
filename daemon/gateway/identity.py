"""Who a client is, according to its token: the keys, and the pack that knows the issuer's users."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from daemon.core.errors import BadToken, GrantsUnavailable, IdentityUnavailable
from daemon.gateway.auth import Authenticator, Claims, named_key
from daemon.gateway.key_source import KeySource
from daemon.logs import get_logger

log = get_logger()

TIMEOUT = 4.0  # seconds; a client has five for its hello

UserOf = Callable[[str], Awaitable[str | None]]
"""The user whom the subject of a token means; None if there is none. Raises GrantsUnavailable."""


class Identity:
    """Turns tokens into users: at once if that is possible, else with what has to be awaited.

    `user_of` translates the subjects of tokens that were signed with a private key; without it, they are users.
    """

    def __init__(self, authenticator: Authenticator, keys: KeySource, user_of: UserOf | None = None) -> None:
        self.keys = keys
        self._authenticator = authenticator
        self.user_of = user_of

    def verify(self, token: str) -> Claims:
        """The claims of a token of a key that is known, as its issuer names the user. Raises BadToken."""
        return self._authenticator.verify(token)

    def at_once(self, token: str) -> Claims | None:
        """The claims of a token; None if they have to be awaited. Raises BadToken."""
        try:
            claims = self._authenticator.verify(token)
        except BadToken:
            kid = named_key(token)
            if kid is not None and self.keys.may_learn(kid):
                return None
            raise
        return None if claims.is_foreign and self.user_of is not None else claims

    async def identify(self, token: str) -> Claims:
        """The claims of a token, with its user. Raises BadToken, and IdentityUnavailable without an answer."""
        try:
            async with asyncio.timeout(TIMEOUT):
                kid = named_key(token)
                if kid is not None and self.keys.may_learn(kid):
                    await self.keys.learn()
                claims = self._authenticator.verify(token)
                if not claims.is_foreign or self.user_of is None:
                    return claims
                user = await self.user_of(claims.user)
        except (TimeoutError, GrantsUnavailable) as error:
            log.debug("log_unavailable", reason=getattr(error, "reason", "no answer in time"))
            raise IdentityUnavailable from None
        if user is None:
            raise BadToken
        return replace(claims, user=user)
