"""Builds a prepared corpus: tokenizer, tokens, manifest. Repeating an interrupted build resumes it."""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from data_prep.encode import encode_all, hash_all, read_facts
from data_prep.merge import Merged, merge
from data_prep.overview import overview
from data_prep.recipe import Nodes, Recipe, recipe_digest
from data_prep.sources import fingerprint, list_units, stamp
from data_prep.units import Unit
from data_prep.vocabulary import train_tokenizer
from dynmoe.data.corpus import FORMAT, MANIFEST, SPLITS, Corpus, describe_files
from dynmoe.data.sentencepiece_tokenizer import TOKENIZER_MODEL
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.data.tokenizer_files import open_tokenizer
from dynmoe.errors import UserError
from dynmoe.lock import Lock

_RECIPE = "recipe.json"
_PARTS = "parts"
_REPORT_EVERY_S = 30.0
_CLOCK_SKEW_S = 10.0


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy of the token frequencies in nats: the loss of the best model that uses only frequencies."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def build(recipe: Recipe, out: Path, workers: int, nodes: Nodes | None = None) -> dict[str, Any] | None:
    """Writes the corpus into ``out`` and returns its manifest; nodes other than the first only write their parts.

    Everything is written next to ``out`` and renamed when complete. An interrupted build therefore leaves the previous
    content intact, and the same build resumes after the units that were encoded.

    Raises:
        UserError: text or options are unusable, or this build is already running.
    """
    nodes = nodes or Nodes()
    started = time.time()
    try:
        return _build(recipe, out, workers, nodes)
    except FileNotFoundError:
        # Node 0 found all parts of an earlier build, and finished before this node looked.
        if nodes.own and _written_since(out, started):
            return None
        raise


def _written_since(out: Path, moment: float) -> bool:
    """Whether the corpus was written after ``moment``, allowing for clock skew between host and file system."""
    manifest = out / MANIFEST
    return manifest.exists() and manifest.stat().st_mtime > moment - _CLOCK_SKEW_S


def _build(recipe: Recipe, out: Path, workers: int, nodes: Nodes) -> dict[str, Any] | None:
    units = list_units(recipe.sources, recipe.read_as)
    summary = overview(units, recipe.json_key)  # on every node, so that an error there ends all of them
    if not nodes.own:
        print(*summary, sep="\n", flush=True)
    building = out.with_name(f"{out.name}.building")
    _enter(building, recipe_digest(recipe) + stamp(units), nodes, out)
    with _claim(building / f"node_{nodes.own}.lock"):
        main_file = _provide_tokenizer(recipe, units, building, nodes)
        parts = [building / _PARTS / f"{number:08d}.npz" for number in range(len(units))]
        _encode_own(recipe, units, parts, building / main_file, workers, nodes)
        if nodes.own:
            return None
        _wait_for_parts(parts, nodes)
        tokenizer = open_tokenizer(building / main_file)
        finished = building / "finished"
        shutil.rmtree(finished, ignore_errors=True)
        finished.mkdir()
        merged = merge(parts, units, finished, tokenizer.vocab_size, recipe.deduplicate)
        for split, count in merged.counts.items():
            if count.documents == 0:
                cure = f"{merged.refusals}use more text or another --validation-fraction"
                raise UserError(f"{', '.join(recipe.sources)}: gave no {split} document; {cure}")
        for name, file in tokenizer.files.items():
            (finished / name).write_bytes(file)
        content = fingerprint(units, (read_facts(part, "content")[0] for part in parts))
        manifest = _manifest(recipe, finished, tokenizer, merged, content)
        (finished / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        Corpus.open(finished)
        if out.exists():  # moved away first, so that a half-replaced corpus never exists
            out.rename(building / f"replaced-{secrets.token_hex(4)}")
        finished.rename(out)
        shutil.rmtree(building)
    return manifest


def _enter(building: Path, build_id: str, nodes: Nodes, out: Path) -> None:
    """Creates the directory of the build, or finds the one of an interrupted build with the same input."""
    recipe = building / _RECIPE
    if nodes.own:
        started = time.time()

        def is_this_build() -> bool:
            # There may be a build that node 0 is about to remove, or the build is complete and already gone.
            if not recipe.exists() and _written_since(out, started):
                raise FileNotFoundError(recipe)
            return recipe.exists() and recipe.read_text() == build_id

        _wait_until(is_this_build, lambda: f"node 0 to build from this text with these options in {building}")
        return
    if recipe.exists() and recipe.read_text() == build_id:
        done = len(list((building / _PARTS).glob("[0-9]*.npz")))
        print(f"{building}: resuming an interrupted build with {done} finished parts", flush=True)
        return
    if building.exists():
        with _claim(building / "node_0.lock"):
            shutil.rmtree(building)
    try:
        (building / _PARTS).mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); use another directory") from None
    _write(recipe, build_id.encode())


@contextmanager
def _claim(lock: Path) -> Iterator[None]:
    try:
        held = Lock(lock, patience_s=0.0)
    except BlockingIOError:
        raise UserError(f"{lock.parent}: another process is running this build; wait for it or stop it") from None
    try:
        yield
    finally:
        held.release()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    temporary.rename(path)


def _wait_until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    """Waits for another node, and regularly prints for what."""
    reported = time.monotonic()
    while not condition():
        if time.monotonic() > reported + _REPORT_EVERY_S:
            print(f"waiting for {what()}", flush=True)
            reported = time.monotonic()
        time.sleep(1.0)


def _provide_tokenizer(recipe: Recipe, units: Sequence[Unit], building: Path, nodes: Nodes) -> str:
    """Writes the tokenizer, trained or given, or waits until node 0 has; returns the name of its main file."""
    given = recipe.given
    path = building / (TOKENIZER_MODEL if given is None else given.main_file)
    if nodes.own:

        def is_there() -> bool:
            if not building.exists():
                raise FileNotFoundError(building)
            return path.exists()

        _wait_until(is_there, lambda: f"the tokenizer of node 0 in {building}")
    elif not path.exists():
        files = {path.name: train_tokenizer(recipe, units)} if given is None else given.files
        for name, content in reversed(files.items()):  # the main file last: with it there is a tokenizer
            _write(building / name, content)
    return path.name


def _encode_own(
    recipe: Recipe, units: Sequence[Unit], parts: Sequence[Path], tokenizer: Path, workers: int, nodes: Nodes
) -> None:
    """Encodes this node's missing units, every ``nodes.count``-th unit."""
    numbers = [number for number in range(nodes.own, len(units), nodes.count) if not parts[number].exists()]
    tasks = [(units[number], recipe.json_key, recipe.validation_fraction, parts[number]) for number in numbers]
    if not tasks:
        return
    started = time.perf_counter()
    documents = 0
    text_bytes = 0
    workers = min(workers, len(tasks))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("text", total=len(tasks))
        for own_documents, own_bytes in encode_all(tasks, tokenizer, workers):
            documents += own_documents
            text_bytes += own_bytes
            speed = text_bytes / 1e6 / (time.perf_counter() - started)
            progress.update(bar, advance=1, description=f"{text_bytes / 1e6:.1f} MB of text, {speed:.1f} MB/s")
    seconds = time.perf_counter() - started
    megabytes = text_bytes / 1e6
    speed = megabytes / seconds
    each = f", {speed / workers:.1f} in each of {workers} processes" if workers > 1 else ""
    print(f"encoded {documents} documents, {megabytes:.1f} MB of text, in {seconds:.1f} s: {speed:.1f} MB/s{each}")


def _wait_for_parts(parts: Sequence[Path], nodes: Nodes) -> None:
    def missing() -> list[int]:
        return [number for number, part in enumerate(parts) if not part.exists()]

    def what() -> str:
        others = sorted({number % nodes.count for number in missing()})
        return f"{len(missing())} parts of node(s) {', '.join(str(other) for other in others)}"

    _wait_until(lambda: not missing(), what)


def _manifest(recipe: Recipe, directory: Path, tokenizer: Tokenizer, merged: Merged, content: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "recipe": recipe_digest(recipe),
        "input": content,
        "sources": [Path(source).name for source in recipe.sources],
        "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod},
        "splits": {
            split: dataclasses.asdict(merged.counts[split]) | figures(merged.occurrences[split], tokenizer)
            for split in SPLITS
        },
        "refused": {"counts": merged.refusals.counts, "first_names": merged.refusals.names},
        **describe_files(directory),
    }


def figures(occurrences: np.ndarray, tokenizer: Tokenizer) -> dict[str, float]:
    """Loss and perplexity of a model that uses only token frequencies, and the number of unknown tokens.

    Args:
        occurrences: the count of each token [V].
        tokenizer: the tokenizer of the corpus.
    """
    entropy = unigram_entropy(occurrences)
    return {
        "unigram_entropy_nats": round(entropy, 6),
        "unigram_perplexity": round(math.exp(entropy), 3),
        "unknown_tokens": 0 if tokenizer.unknown is None else int(occurrences[tokenizer.unknown]),
    }


def is_current(recipe: Recipe, out: Path, workers: int = 1) -> bool:
    """Whether ``out`` is an intact corpus made from this recipe and this text.

    Raises:
        UserError: ``out`` is a damaged corpus.
    """
    corpus = Corpus.open(out)
    if corpus.manifest.get("recipe") != recipe_digest(recipe):
        return False
    units = list_units(recipe.sources, recipe.read_as)
    if corpus.manifest.get("input") != fingerprint(units, hash_all(units, recipe.json_key, workers)):
        return False
    corpus.verify()
    return True
