"""Looks for secrets in the files and in every commit, with detect-secrets. `make secrets` runs it.

Nothing is scanned twice: the baseline records the commit up to which the history is clean, and of the commits and
files after it only the lines are scanned that are new to their path. A finding is shown as path, line, commit and
kind, and never with its text.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from detect_secrets.__version__ import VERSION
from detect_secrets.core.secrets_collection import SecretsCollection
from detect_secrets.settings import transient_settings

BASELINE = Path(".secrets.baseline")
SUBMODULE = "160000"
PARSED = (".cfg", ".conf", ".env", ".ini", ".properties", ".service", ".toml", ".yaml", ".yml")
NOTHING_PARSES = "}"  # neither as YAML nor as an INI file
HELP = """\
If it is real, replace it at its service first, whoever has seen it; then take it out of the file.
If it is not, see "Secrets" in CONTRIBUTING.md."""


class Version(NamedTuple):
    """What a file contained: in a commit, or, without one, in the working tree."""

    path: str
    commit: str
    content: bytes


class Place(NamedTuple):
    """Where a line was found first."""

    path: str
    line: int
    commit: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" + (f" (commit {self.commit[:7]})" if self.commit else "")


Document = list[tuple[str, Place]]  # lines that are scanned as one file


def git(*arguments: str, stdin: bytes = b"") -> bytes:
    """The output of a git command."""
    return subprocess.run(["git", *arguments], input=stdin, stdout=subprocess.PIPE, check=True).stdout


def names(*arguments: str) -> list[str]:
    """The names in the output of a git command with `-z`."""
    return [name for name in git(*arguments).decode(errors="replace").split("\0") if name]


def is_here(commit: str) -> bool:
    """False for a commit that a shallow clone lacks, or that was rewritten."""
    arguments = ["git", "cat-file", "-e", f"{commit}^{{commit}}"]
    return subprocess.run(arguments, check=False, stderr=subprocess.DEVNULL).returncode == 0


def contents(blobs: list[str]) -> Iterator[bytes]:
    """What these blobs contain, in this order."""
    output = git("cat-file", "--batch", stdin="\n".join(blobs).encode())
    start = 0
    for _ in blobs:
        header = output.index(b"\n", start)
        size = int(output[start:header].rsplit(b" ", 1)[1])
        yield output[header + 1 : header + 1 + size]
        start = header + size + 2


def versions(raw: bytes) -> Iterator[Version]:
    """The files in the output of `git log --raw`, whose other lines are the commits."""
    commit = ""
    found: dict[tuple[str, str], str] = {}
    for line in raw.decode(errors="replace").split("\n"):
        if line.startswith(":"):
            fields, path = line.split("\t", 1)
            _, mode, _, blob, _ = fields.split(" ")
            if mode != SUBMODULE:
                found.setdefault((path, blob), commit)
        else:
            commit = line or commit
    for ((path, _), commit), content in zip(found.items(), contents([blob for _, blob in found]), strict=True):
        yield Version(path, commit, content)


def changed_versions(since: str) -> Iterator[Version]:
    """What the commits after `since`, or all commits, wrote, then the index and the working tree."""
    raw = ("-c", "core.quotePath=false", "-c", "diff.renames=false")
    form = ("--raw", "--no-abbrev", "--diff-filter=du")  # neither what is deleted nor what is in conflict
    commits = f"{since}..HEAD" if since else "HEAD"
    # A merge is compared with its first parent: that also shows what neither parent has.
    log = (
        "log",
        *form,
        "--root",
        "--reverse",
        "--diff-merges=first-parent",
        "--no-show-signature",
        "--format=%H",
        commits,
    )
    yield from versions(git(*raw, *log))
    yield from versions(git(*raw, "diff", "--cached", *form))
    modified = names("diff", "--name-only", "--diff-filter=d", "-z", "HEAD")
    for name in (*modified, *names("ls-files", "--others", "--exclude-standard", "-z")):
        path = Path(name)
        if path.is_file() and not path.is_symlink():
            yield Version(name, "", path.read_bytes())


def lines_of(commit: str, paths: Iterable[str]) -> set[tuple[str, str]]:
    """The lines of these paths in a commit that was scanned."""
    wanted = set(paths)
    tree = [entry.split("\t", 1) for entry in names("ls-tree", "-r", "-z", commit)]
    blobs = {path: fields.split(" ")[2] for fields, path in tree if path in wanted and "blob" in fields}
    return {
        (path, line)
        for path, content in zip(blobs, contents(list(blobs.values())), strict=True)
        for line in content.decode(errors="replace").split("\n")
    }


def documents(since: str) -> Iterator[Document]:
    """What is to be scanned: of each path the new lines together, of configuration files also the whole versions.

    detect-secrets parses a configuration file if it can. There a secret needs no quotes, but comments are lost.
    """
    changed = [version for version in changed_versions(since) if b"\0" not in version.content]
    seen = lines_of(since, {version.path for version in changed}) if since else set()
    together: dict[str, Document] = {}
    for path, commit, content in changed:
        lines = content.decode(errors="replace").split("\n")
        whole = [(line, Place(path, number, commit)) for number, line in enumerate(lines, 1)]
        new = [(line, place) for line, place in whole if (path, line) not in seen]
        if new:
            seen.update((path, line) for line, _ in new)
            together.setdefault(path, [(NOTHING_PARSES, new[0][1])]).extend(new)
            if f".{path}".endswith(PARSED) or "/.env" in f"/{path}":
                yield whole
    yield from together.values()


def scan(baseline: dict[str, Any], since: str) -> dict[tuple[str, str, str], Place]:
    """What looks like a secret and is not in the baseline: its path, kind and hash, and where it was found."""
    allowed = {(path, s.type, s.secret_hash) for path, s in SecretsCollection.load_from_baseline(baseline)}
    found: dict[tuple[str, str, str], Place] = {}
    with TemporaryDirectory() as directory, transient_settings(baseline):
        scanned: dict[str, Document] = {}
        for number, document in enumerate(documents(since)):
            name = f"{number}/{document[0][1].path}"
            scanned[name] = document
            file = Path(directory, name)
            file.parent.mkdir(parents=True)
            # What allows the next line would allow another one here.
            lines = [line for line, _ in document]
            file.write_text("\n".join("" if "nextline" in line else line for line in lines), encoding="utf-8")
        secrets = SecretsCollection(root=directory)
        if scanned:
            secrets.scan_files(*scanned)
        for name, secret in secrets:
            _, place = scanned[name][secret.line_number - 1]
            key = (place.path, secret.type, secret.secret_hash)
            if key not in allowed:
                found.setdefault(key, place)
    return found


def accept(baseline: dict[str, Any], found: Iterable[tuple[str, str, str]]) -> None:
    """Add findings to the baseline, as no secrets."""
    for path, kind, digest in found:
        entry = {"type": kind, "filename": path, "hashed_secret": digest, "is_verified": False, "is_secret": False}
        baseline["results"].setdefault(path, []).append(entry)
    baseline["results"] = {
        path: sorted(entries, key=lambda entry: (entry["type"], entry["hashed_secret"]))
        for path, entries in sorted(baseline["results"].items())
    }


def main() -> int:
    """Print what was found, and return the exit code."""
    parser = argparse.ArgumentParser(description="Look for secrets in the files and in the history.")
    parser.add_argument("--all", action="store_true", help="scan the whole history, not only what is new")
    parser.add_argument("--accept", action="store_true", help="add what is found to the baseline")
    parser.add_argument("--record", action="store_true", help="if nothing is found, scan from HEAD on next time")
    arguments = parser.parse_args()
    baseline = json.loads(BASELINE.read_text(encoding="utf-8"))
    recorded = baseline.get("scanned_up_to", "")
    again = arguments.all or baseline["version"] != VERSION or not is_here(recorded)
    since = "" if again else recorded
    found = scan(baseline, since)
    for (_, kind, _), place in sorted(found.items(), key=lambda item: item[1]):
        sys.stdout.write(f"{place}: {kind}\n")
    if arguments.accept:
        accept(baseline, found)
    if arguments.record and (arguments.accept or not found):
        baseline["scanned_up_to"] = git("rev-parse", "HEAD").decode().strip()
        baseline["version"] = VERSION
    if arguments.accept or arguments.record:
        BASELINE.write_text(json.dumps(baseline, indent=2) + "\n", encoding="utf-8")
    if names("rev-parse", "--is-shallow-repository") == ["true\n"]:
        sys.stdout.write("This clone is shallow: the commits that it lacks were not scanned.\n")
    scope = f"since {since[:7]}" if since else "in the whole history"
    sys.stdout.write(f"{len(found)} possible secrets {scope}, besides those in {BASELINE}.\n")
    if found and not arguments.accept:
        sys.stdout.write(f"{HELP}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
