"""The corpus of Debian's documentation: text of pages, packages made here by dpkg-deb, and errors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import debian_docs
from bench.debian_docs import LANGUAGES, PACKAGES, build, check, write_text
from bench.html_text import paragraphs
from data_prep.sources import list_units
from dynmoe.errors import UserError

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed: not on Debian")
ENGLISH = [f"Sentence number {number} of the manual is about the installation of packages." for number in range(12)]
GERMAN = [f"Satz {number} des Handbuchs handelt von der Installation der Pakete auf Rechnern." for number in range(12)]
APPENDIX = [f"Anhang {number} nennt alle Quellen, aus denen dieses Handbuch entstanden ist." for number in range(12)]
LISTING = "apt-get install   something-with-a-rather-long-name # also untranslated"


def page(texts: list[str], language: str | None) -> str:
    declared = f' lang="{language}"' if language else ""
    shown = "".join(f"<p>{text}</p>\n" for text in texts)
    return (
        f"<html><head><title>Title</title><style>p {{}}</style></head><body{declared}>"
        f'<div class="navheader"><div>Next page</div></div>{shown}<pre>{LISTING}</pre></body></html>'
    )


def make_deb(folder: Path, name: str, pages: dict[str, str]) -> Path:
    root = folder / name
    for path, content in pages.items():
        target = root / "usr/share/doc" / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content, encoding="utf-8")
    (root / "usr/share/doc" / name / "link.html").symlink_to("/etc/hostname")  # a link to a file of the host
    (root / "DEBIAN").mkdir()
    (root / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 1.0-1\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\nDescription: a\n"
    )
    deb = folder / f"{name}_1.0-1_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", str(root), str(deb)], check=True, capture_output=True)
    return deb


@pytest.fixture
def debs(tmp_path: Path) -> list[Path]:
    """Two packages: the translation sorts before the original, and only its index declares a language.

    In the order of paths, a folder of pictures lies between the pages of the translation.
    """
    folder = tmp_path / "debs"
    german = {
        "de/appendix.html": page(APPENDIX, None), "de/images/one.html": page([], None),
        "de/index.html": page([], "de-DE"), "de/one.html": page([*GERMAN, ENGLISH[3]], None),
    }  # fmt: skip
    return [
        make_deb(folder, "a-manual-de", german),
        make_deb(folder, "manual", {"one.html": page(ENGLISH, "en"), "el/one.html": page(GERMAN, "el")}),
    ]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_paragraphs_of_a_page() -> None:
    """Docbook's XHTML with elements that close themselves, and HTML with elements that are not closed."""
    html = """<?xml version="1.0"?><!DOCTYPE html><html><head><title>Not this</title><link rel="next" href="a"/></head>
    <body><div class="navheader"><div><hr/>Back</div></div><h1><a id="x"/>1. Caf&eacute;
      &amp; more<a class="headerlink" href="#x">\u00b6</a></h1><div class="toc extra"><dl><dt>1.1</dt></dl></div>
    <p>A <code>word</code>,
      and\tanother.<br/>Next line</p><script src="a.js"/><script>if (a < b) { "<p>code</p>" }</script>
    <ul><li>first<li>second</ul><table><tr><th>Name</th><td>Value</td></tr></table>
    <p>before<pre>
  indented   text
      more<br>end
</pre>\u5f8c<div role="navigation"><div>Menu</div></div>\u3000\u6587</p><nav>Up</nav></body></html>"""
    assert paragraphs(html) == [
        "1. Café & more", "A word, and another.\nNext line", "first", "second", "Name Value", "before",
        "  indented   text\n      more\nend", "後\u3000文",
    ]  # fmt: skip


def test_text_outside_of_blocks_is_kept_and_an_unclosed_comment_does_not_hang() -> None:
    assert paragraphs("just text") == ["just text"]
    assert paragraphs("") == []
    assert paragraphs("<p>a</p><div class=navfooter><div>x</div>y</div>b") == ["a", "b"]


def test_the_packages_are_sorted_and_cover_every_language() -> None:
    assert list(PACKAGES) == sorted(set(PACKAGES))
    for language in LANGUAGES[1:]:
        assert sum(name.endswith(f"-{language}") for name in PACKAGES) >= 4


@needs_dpkg
def test_writes_pages_by_language_without_what_is_not_translated(tmp_path: Path, debs: list[Path]) -> None:
    manifest = write_text(debs, tmp_path / "text")
    assert tree(tmp_path / "text") == {
        "en/manual/one.txt": ("\n\n".join([*ENGLISH, LISTING]) + "\n").encode(),
        "de/a-manual-de/one.txt": ("\n\n".join(GERMAN) + "\n").encode(),
        "de/a-manual-de/appendix.txt": ("\n\n".join(APPENDIX) + "\n").encode(),
    }
    assert manifest["packages"].keys() == {"a-manual-de", "manual"}
    assert manifest["packages"]["manual"]["version"] == "1.0-1"
    size = len("\n\n".join(GERMAN)) + len("\n\n".join(APPENDIX)) + 2
    assert manifest["languages"]["de"] == {"pages": 2, "bytes": size}


@needs_dpkg
def test_the_same_packages_give_the_same_bytes(tmp_path: Path, debs: list[Path]) -> None:
    manifests = [write_text(debs, tmp_path / name) for name in ("a", "b")]
    assert manifests[0] == manifests[1]
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.fixture
def offline(debs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads nothing: the packages of this test are already there."""
    monkeypatch.setattr(debian_docs, "_download", lambda names, folder: debs)


@needs_dpkg
@pytest.mark.usefixtures("offline")
def test_a_second_run_finds_the_text_up_to_date_and_a_changed_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data" / "text"
    names = ["manual", "a-manual-de"]
    monkeypatch.setattr(sys, "argv", ["debian_docs", "--out", str(out), "--packages", *names])
    debian_docs.main()
    assert "de: 2 pages, 0.00 MB of text" in capsys.readouterr().out
    assert sorted(os.listdir(out.parent)) == ["text", "text.json"]  # nothing temporary remains
    before = tree(out.parent)
    debian_docs.main()
    assert capsys.readouterr().out == f"{out} is up to date\n"
    assert tree(out.parent) == before
    with pytest.raises(UserError, match=r"is text of other packages; remove it"):
        check(out, ["manual"])
    (out / "de/a-manual-de/one.txt").write_text("x")
    with pytest.raises(UserError, match=r"was changed after it was written; remove it"):
        check(out, names)
    out.with_name("text.json").unlink()
    with pytest.raises(UserError, match=r"exists, but not .*text\.json"):
        check(out, names)


@needs_dpkg
@pytest.mark.usefixtures("offline")
def test_data_prep_reads_every_page_and_not_the_manifest(tmp_path: Path) -> None:
    build(["manual", "a-manual-de"], tmp_path / "text")
    units = list_units([str(tmp_path / "text")])
    assert {unit.kind for unit in units} == {"files"}
    names = [name for unit in units for name in unit.names]
    assert names == ["de/a-manual-de/appendix.txt", "de/a-manual-de/one.txt", "en/manual/one.txt"]


@needs_dpkg
def test_pages_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    strange = make_deb(tmp_path, "strange", {"one.html": page(GERMAN, "el")})
    with pytest.raises(UserError, match=r"packages strange: no page is in en, de, .*; use other packages"):
        write_text([strange], tmp_path / "text")
    double = make_deb(tmp_path, "double", {"a/one.html": page(ENGLISH, "en"), "b/one.html": page(GERMAN, "en")})
    with pytest.raises(UserError, match=r"package double: has two pages one.html in en; leave it out"):
        write_text([double], tmp_path / "text")


def tool(folder: Path, name: str, script: str) -> None:
    """A program of this name that stands before the real one."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def error_line(out: Path, path: str, *packages: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "bench.debian_docs", "--out", str(out), "--packages", *packages],
        capture_output=True, text=True, check=False, timeout=60, env=os.environ | {"PATH": path},
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 2, done
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not out.exists()
    return done.stderr


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "E: Unable to locate package no-such-doc",
            "package no-such-doc: apt-get does not find it; run apt-get update",
        ),
        (
            "E: Can't select candidate version from package no-such-doc as it has no candidate",
            "package no-such-doc: apt-get does not find it; run apt-get update",
        ),
        (
            "W: something\nE: Failed to fetch http://a  Could not connect\nE: Some",
            "apt-get download: failed (E: Failed to fetch http://a  Could not connect); check network and free space",
        ),
    ],
)
def test_a_failed_download_is_one_line_with_a_cure(tmp_path: Path, said: str, expected: str) -> None:
    tool(tmp_path / "bin", "apt-get", f"cat >&2 <<'END'\n{said}\nEND\nexit 100")
    assert expected in error_line(tmp_path / "text", f"{tmp_path / 'bin'}:{os.environ['PATH']}", "no-such-doc")


def test_missing_tools_are_named(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    assert "apt-get: is not installed; run this on Debian" in error_line(tmp_path / "text", str(tools), "manual")
    tool(tools, "apt-get", ": > manual_1_all.deb")
    assert "dpkg-deb: is not installed; run this on Debian" in error_line(tmp_path / "text", str(tools), "manual")


@needs_dpkg
def test_a_damaged_package_is_one_line(tmp_path: Path) -> None:
    tool(tmp_path / "bin", "apt-get", "echo broken > manual_1_all.deb")
    said = error_line(tmp_path / "text", f"{tmp_path / 'bin'}:{os.environ['PATH']}", "manual")
    assert "dpkg-deb --field: failed (dpkg-deb: error: " in said
