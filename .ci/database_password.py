"""A kind of secret that detect-secrets does not know: a database's password in a URL or in the environment."""

import re

from detect_secrets.plugins.base import RegexBasedDetector


class DatabasePasswordDetector(RegexBasedDetector):
    """Passwords of URLs without a user or in their query, and those that libpq reads."""

    secret_type = "Database Password"  # pragma: allowlist secret
    denylist = (
        re.compile(r"://:([^{}\s@]+)@"),
        re.compile(r"postgres(?:ql)?://\S*[?&]password=([^{}\s&'\"`]+)"),
        re.compile(r"\bPGPASSWORD=([^{}\s'\"`$]+)"),
    )
