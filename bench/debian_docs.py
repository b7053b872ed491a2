"""python -m bench.debian_docs --out DIR: text of Debian's documentation in eight languages, as a source for data_prep.

Downloads packages by name with apt-get, unpacks them with dpkg-deb, and writes DIR/LANGUAGE/PACKAGE/PAGE.txt for each
page. It does not install them and does not need root. With the text in data/debian-text,

    python -m data_prep data/debian-text --as text --tokenizer-mb 32 --out data/debian
    python -m data_prep data/debian-text/de --as text --tokenizer data/debian/tokenizer.model --out data/debian-de

make a corpus of all languages, whose tokenizer sees all of the text, and one of a single language as a domain for
dynmoe.evaluate. Both split off the same documents for validation, because data_prep chooses them by their content.

A paragraph that an earlier page contains is left out. English comes first, so the other languages keep only what is
translated. The same packages always give the same bytes; DIR.json records their versions and hashes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.html_text import paragraphs
from dynmoe.cli import run_tool
from dynmoe.errors import UserError

# As pages declare them, with or without a country. English is first.
LANGUAGES = ("en", "de", "es", "fr", "it", "ja", "ru", "zh-cn")
# The manuals that Debian 12 has in most of these languages; the handbook and the installation guide contain all.
PACKAGES = (
    "aptitude-doc-en", "aptitude-doc-es", "aptitude-doc-fr", "aptitude-doc-it", "aptitude-doc-ja", "aptitude-doc-ru",
    "debian-edu-doc-de", "debian-edu-doc-en", "debian-edu-doc-es", "debian-edu-doc-fr", "debian-edu-doc-it",
    "debian-edu-doc-ja", "debian-edu-doc-zh-cn", "debian-faq", "debian-faq-de", "debian-faq-fr", "debian-faq-it",
    "debian-faq-ja", "debian-faq-ru", "debian-faq-zh-cn", "debian-handbook", "debian-reference-de",
    "debian-reference-en", "debian-reference-es", "debian-reference-fr", "debian-reference-it", "debian-reference-ja",
    "debian-reference-zh-cn", "developers-reference", "developers-reference-de", "developers-reference-fr",
    "developers-reference-it", "developers-reference-ja", "developers-reference-ru", "installation-guide-amd64",
    "maint-guide", "maint-guide-de", "maint-guide-es", "maint-guide-fr", "maint-guide-it", "maint-guide-ja",
    "maint-guide-ru", "maint-guide-zh-cn",
)  # fmt: skip
_SHORTEST_REPEAT = 40  # characters; shorter paragraphs, such as headings, may repeat
_SHORTEST_PAGE = 400  # bytes of text; less is a title or a list of links
_declared_language = re.compile(r"""<[a-z][^>]*\blang\s*=\s*["']([A-Za-z_-]+)["']""").search
_missing_package = re.compile(r"Unable to locate package (\S+)|package (\S+) as it has no candidate").search


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.debian_docs",
        description="Writes the text of Debian's documentation, downloaded as packages by name, into one folder for "
        f"each language: {', '.join(LANGUAGES)}. Each of them, or all, is a source for data_prep.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("data/debian-text"),
        help="directory for the text; versions and hashes of the packages go into a file beside it, OUT.json (default: "
        "%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--packages", nargs="+", default=PACKAGES, metavar="NAME",
        help=f"packages with HTML pages (default: {len(PACKAGES)} manuals, {PACKAGES[0]} to {PACKAGES[-1]})",
    )  # fmt: skip
    given = parser.parse_args()
    if given.out.exists():
        check(given.out, given.packages)
        print(f"{given.out} is up to date")
        return
    manifest = build(given.packages, given.out)
    for language, facts in manifest["languages"].items():
        print(f"{language}: {facts['pages']} pages, {facts['bytes'] / 1e6:.2f} MB of text")
    print(f"written to {given.out}; versions and hashes of the packages: {_manifest_path(given.out)}")


def build(packages: Sequence[str], out: Path) -> dict[str, Any]:
    """Downloads packages, writes the text of their pages into ``out``, a new directory, and returns its manifest.

    Raises:
        UserError: a tool or a package is missing, or the packages contain no page in these languages.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        work = Path(folder)
        debs = _download(sorted(set(packages)), work)
        manifest = write_text(debs, work / "text")
        _manifest_path(out).write_text(json.dumps(manifest, indent=1) + "\n")
        (work / "text").rename(out)
    return manifest


def check(out: Path, packages: Sequence[str]) -> None:
    """Raises a UserError unless ``out`` is the unchanged text of these packages."""
    cure = "remove it, or use another directory"
    path = _manifest_path(out)
    if not path.exists():
        raise UserError(f"--out {out}: exists, but not {path}, which would describe its text; {cure}")
    manifest = json.loads(path.read_text())
    if list(manifest["packages"]) != sorted(set(packages)):
        raise UserError(f"--out {out}: is text of other packages; {cure}")
    if manifest["sha256"] != _describe(out)["sha256"]:
        raise UserError(f"--out {out}: was changed after it was written; {cure}")


def _manifest_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")  # beside the text, because data_prep would read it as a document


def _download(names: Sequence[str], folder: Path) -> list[Path]:
    """Downloads packages into a folder and returns their files in the order of the names."""
    _run("apt-get", "download", "--quiet", *names, folder=folder)
    files = {path.name.partition("_")[0]: path for path in folder.glob("*.deb")}
    return [files[name] for name in names]


def write_text(debs: Sequence[Path], text: Path) -> dict[str, Any]:
    """Writes the text of the pages in packages into ``text``, a new directory, and returns its manifest.

    Raises:
        UserError: dpkg-deb is missing, or the packages contain no page in these languages.
    """
    facts = {}
    with tempfile.TemporaryDirectory(dir=text.parent) as folder:
        for deb in debs:
            name = _run("dpkg-deb", "--field", str(deb), "Package").strip()
            version = _run("dpkg-deb", "--field", str(deb), "Version").strip()
            facts[name] = {"version": version, "sha256": hashlib.sha256(deb.read_bytes()).hexdigest()}
            _run("dpkg-deb", "--extract", str(deb), str(Path(folder, name)))
        _write_pages(Path(folder), text)
    manifest = {"packages": facts, **_describe(text)}
    if not manifest["languages"]:
        raise UserError(f"packages {', '.join(facts)}: no page is in {', '.join(LANGUAGES)}; use other packages")
    return manifest


def _run(*command: str, folder: Path | None = None) -> str:
    """Runs a tool of Debian and returns what it prints."""
    own = os.environ | {"LC_ALL": "C.UTF-8"}  # English messages
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=own)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: is not installed; run this on Debian, for example in a container") from None
    if done.returncode:
        raise _failure(command, done.stderr)
    return done.stdout


def _failure(command: Sequence[str], said: str) -> UserError:
    missing = _missing_package(said)
    if missing:
        return UserError(
            f"package {missing[1] or missing[2]}: apt-get does not find it; run apt-get update, and see that Debian 12 "
            "is among the sources of apt"
        )
    lines = said.splitlines()
    problem = next((line for line in lines if line.startswith("E: ") or "error: " in line), said.strip())
    return UserError(f"{' '.join(command[:2])}: failed ({problem}); check network and free space, and repeat")


def _write_pages(unpacked: Path, text: Path) -> None:
    """Writes the paragraphs of every page that no earlier page contains, unless they are too few."""
    seen: set[str] = set()
    pages = [(LANGUAGES.index(language), path) for language, path in _pages(unpacked)]
    for language, path in sorted(pages):
        fresh = [part for part in paragraphs(_read(path)) if part not in seen]
        seen.update(part for part in fresh if len(part) >= _SHORTEST_REPEAT)
        content = ("\n\n".join(fresh) + "\n").encode()
        if len(content) >= _SHORTEST_PAGE:
            package = path.relative_to(unpacked).parts[0]
            target = text / LANGUAGES[language] / package / f"{path.stem}.txt"
            if target.exists():
                raise UserError(f"package {package}: has two pages {path.name} in {LANGUAGES[language]}; leave it out")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def _pages(unpacked: Path) -> Iterator[tuple[str, Path]]:
    """Yields the HTML pages in LANGUAGES with their language.

    Only some pages declare a language; it holds for their folder.
    """
    # Links may point to files of this machine.
    paths = (path for path in unpacked.rglob("*.html") if path.is_file() and not path.is_symlink())
    for _, group in groupby(sorted(paths, key=lambda path: (path.parent, path)), lambda path: path.parent):
        pages = list(group)
        declared = (_declared_language(_read(page)) for page in pages)
        tag = next((found[1].lower() for found in declared if found), "")
        language = next((known for known in LANGUAGES if f"{tag}-".startswith(f"{known}-")), None)
        if language is not None:
            yield from ((language, page) for page in pages)


def _read(page: Path) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"page {page.name}: is not in UTF-8; leave its package out of --packages") from None


def _describe(text: Path) -> dict[str, Any]:
    """Numbers of pages and bytes by language, and a hash over names and content of all pages."""
    languages: dict[str, dict[str, int]] = {}
    digest = hashlib.sha256()
    for path in sorted(text.rglob("*.txt")):
        content = path.read_bytes()
        name = path.relative_to(text)
        digest.update(f"{name.as_posix()}\0{len(content)}\0".encode() + content)
        facts = languages.setdefault(name.parts[0], {"pages": 0, "bytes": 0})
        facts["pages"] += 1
        facts["bytes"] += len(content)
    return {"sha256": digest.hexdigest(), "languages": languages}


if __name__ == "__main__":
    run_tool(main)
