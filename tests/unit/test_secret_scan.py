"""`make secrets` finds secrets in the files and in the history, and shows none."""

import json
import secrets
import shutil
import string
import subprocess
import sys
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

ROOT = Path(__file__).parents[2]
SCANNER = Path(".ci/scan_secrets.py")


def random_text(count: int) -> str:
    return "".join(secrets.choice(string.ascii_letters) for _ in range(count))


def key() -> str:
    """The first lines of a private key."""
    private = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private.decode().splitlines()[1]


HIDDEN = {
    "url.py": (
        random_text(12),
        'DATABASE_URL = "postgresql://antone:{}@db.example/antone"',
        "Basic Auth Credentials",
    ),
    "no_user.md": (random_text(12), "See postgres://:{}@/antone?host=/run/postgresql.", "Database Password"),
    "query.md": (random_text(12), "See postgres://db.example/antone?user=app&password={}", "Database Password"),
    "psql.md": (random_text(12), "    PGPASSWORD={} psql antone", "Database Password"),
    "token.js": (jwt.encode({"sub": random_text(8)}, random_text(32)), "authorize('{}')", "JSON Web Token"),
    "cloud.md": (f"AKIA{random_text(16).upper()}", "The key is {}.", "AWS Access Key"),
    "key.txt": (key(), "-----BEGIN PRIVATE" + " KEY-----\n{}\n-----END PRIVATE" + " KEY-----", "Private Key"),
    "noise.sql": (secrets.token_hex(20), "select f('{}');", "Hex High Entropy String"),
    "call.py": (secrets.token_urlsafe(40), 'f("{}")', "Base64 High Entropy String"),
    "assigned.py": (random_text(12), 'db_password = "{}"', "Secret Keyword"),
    ".env.production": (random_text(12), "DB_PASSWORD={}", "Secret Keyword"),
    "noise.yaml": (secrets.token_hex(20), "a:\n  b: {}", "Hex High Entropy String"),
    "comment.yaml": (random_text(12), "a: 1  # postgresql://antone:{}@db.example/antone", "Basic Auth Credentials"),
}


class Repository:
    """A git repository with the scanner and its settings, and nothing in the baseline."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.git("init", "--quiet")
        shutil.copytree(ROOT / ".ci", path / ".ci", ignore=shutil.ignore_patterns("__pycache__"))
        settings = json.loads((ROOT / ".secrets.baseline").read_text(encoding="utf-8"))
        (path / ".secrets.baseline").write_text(json.dumps(settings | {"scanned_up_to": "", "results": {}}))
        self.commit()

    def git(self, *arguments: str, check: bool = True) -> None:
        who = ("-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", self.path, *who, *arguments], check=check, stdout=subprocess.DEVNULL)

    def write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "next")

    def scan(self, *arguments: str) -> tuple[int, str]:
        """The exit code, and everything that was printed."""
        done = subprocess.run(
            [sys.executable, SCANNER, *arguments], cwd=self.path, text=True, stderr=subprocess.STDOUT, stdout=-1
        )
        return done.returncode, done.stdout


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def test_every_kind_of_secret_is_found_in_a_file_and_none_is_shown(repository: Repository) -> None:
    assert 0 == repository.scan("--record")[0]
    for name, (secret, text, _) in HIDDEN.items():
        repository.write(name, "import os\n" * (name == "url.py") + text.format(secret))
    code, output = repository.scan()
    assert 1 == code
    found = [line for line in output.splitlines() if line.startswith(tuple(f"{name}:" for name in HIDDEN))]
    missing = {
        name for name, (*_, kind) in HIDDEN.items()
        if not any(line.startswith(f"{name}:") and line.endswith(f": {kind}") for line in found)
    }  # fmt: skip
    assert set() == missing
    assert "url.py:2: Basic Auth Credentials" in found
    assert not [name for name, (secret, *_) in HIDDEN.items() if secret in output]


def test_a_secret_that_a_later_commit_deleted_is_found_in_the_history(repository: Repository) -> None:
    assert 0 == repository.scan("--record")[0]
    secret, text, _ = HIDDEN["url.py"]
    repository.write("old.py", f"one\n\n{text.format(secret)}\n")
    repository.commit()
    (repository.path / "old.py").unlink()
    repository.commit()
    for arguments in ([], ["--all"]):
        code, output = repository.scan(*arguments)
        assert (1, 1) == (code, output.count("old.py:3 (commit "))
        assert secret not in output


def test_a_secret_in_the_index_or_in_a_merge_is_found(repository: Repository) -> None:
    secret, text, _ = HIDDEN["assigned.py"]
    repository.git("checkout", "--quiet", "-b", "other")
    repository.write("other.py", "x = 1\n")
    repository.commit()
    repository.git("checkout", "--quiet", "-")
    repository.write("staged.py", text.format(secret))
    repository.git("add", "staged.py")
    (repository.path / "staged.py").unlink()
    assert "staged.py:1: Secret Keyword\n" in repository.scan()[1]
    repository.git("reset", "--quiet", "--hard")
    repository.write("other.py", "y = 1\n")
    repository.commit()
    repository.git("merge", "--quiet", "other", check=False)  # it stops at the conflict
    assert 0 == repository.scan()[0]
    repository.write("other.py", text.format(secret))
    repository.commit()
    repository.write("other.py", "x = 1\n")
    repository.commit()
    assert "other.py:1 (commit " in repository.scan()[1]


def test_what_was_accepted_or_is_marked_in_its_line_is_no_finding(repository: Repository) -> None:
    secret, text, _ = HIDDEN["assigned.py"]
    repository.write("marked.py", f"{text.format(secret)}  # pragma: allowlist" + " secret\n")
    repository.write("accepted.py", "# pragma: allowlist nextline" + f" secret\n{text.format(secret)}")
    code, output = repository.scan()
    assert (1, True, False) == (code, "accepted.py:2: " in output, "marked.py" in output)
    assert 0 == repository.scan("--accept")[0]
    assert secret not in (repository.path / ".secrets.baseline").read_text()
    repository.commit()
    assert 0 == repository.scan()[0]
    repository.write("moved.py", text.format(secret))
    assert 1 == repository.scan()[0]


def test_a_record_that_is_not_in_the_history_makes_it_scan_everything(repository: Repository) -> None:
    repository.write("old.py", HIDDEN["assigned.py"][1].format(HIDDEN["assigned.py"][0]))
    repository.commit()
    baseline = repository.path / ".secrets.baseline"
    settings = json.loads(baseline.read_text())
    for change in ({"scanned_up_to": "f" * 40}, {"scanned_up_to": "HEAD", "version": "0"}):
        baseline.write_text(json.dumps(settings | change))
        assert "old.py:1 (commit " in repository.scan()[1]
    baseline.write_text(json.dumps(settings | {"scanned_up_to": "HEAD"}))
    assert 0 == repository.scan()[0]
