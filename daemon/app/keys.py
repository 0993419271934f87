"""The keys of tokens, and the certificate, from where the settings say, and the users whom tokens name."""

from daemon.files import folder
from daemon.gateway.auth import Authenticator
from daemon.gateway.key_source import KeyPlaces, KeySource
from daemon.gateway.tls import Tls, TlsFiles
from daemon.schema import sql_files
from daemon.settings import BadSettings, Reloads, Settings


async def load_keys(settings: Settings, reloads: Reloads | None) -> tuple[Authenticator, KeySource]:
    """What verifies tokens, with all keys, and what keeps these current. Raises an OperatorFault."""
    authenticator = Authenticator.configured(settings)
    keys = KeySource(_key_places(settings), authenticator.use)
    await keys.load()

    async def reload(settings: Settings) -> int:
        return await keys.load(_key_places(settings))

    if reloads is not None:
        reloads.register("keys", reload)
    return authenticator, keys


def _key_places(settings: Settings) -> KeyPlaces:
    """Where the keys are. Raises BadSettings if there are none."""
    if not settings.public_keys and settings.jwks is None:
        settings.require_secret()
    return KeyPlaces(settings.secrets, settings.public_keys, settings.jwks)


def users_statement(settings: Settings) -> str | None:
    """The statement that knows another issuer's users, if that is wanted. Raises BadSettings."""
    if not settings.map_subjects:
        return None
    files = {pack: folder("ddl") / pack / "identity.sql" for pack in settings.packs}
    found = [pack for pack, file in files.items() if file.is_file()]
    if len(found) != 1:
        raise BadSettings(
            "ROWCAST_MAP_SUBJECTS needs one pack that knows the users of another issuer, and "
            f"{len(found)} in ROWCAST_PACKS do: turn it off, or choose other packs"
        )
    return sql_files.read(files[found[0]], pack=found[0], schema=settings.schemas[found[0]]).text


async def load_certificate(settings: Settings, reloads: Reloads | None) -> Tls:
    """What encrypts connections, if there is a certificate. Raises TlsFilesUnusable."""
    tls = Tls()

    async def load(settings: Settings) -> int:
        assert settings.tls_certificate is not None
        assert settings.tls_key is not None
        return await tls.load(TlsFiles(settings.tls_certificate, settings.tls_key))

    if settings.tls_certificate is not None:
        await load(settings)
        if reloads is not None:
            reloads.register("certificates", load)
    return tls
