"""One word for one thing: the names that were given up for better ones stand nowhere.

House words such as doors, halls and guests made way for the field's.  Where such a name is plain
English as well, it is looked for as a name alone: of a module, or in the code of the folder that
had it.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

ANYWHERE = {
    "attendances?": "ConnectionHandler",
    "premises": "ServerContext",
    "conversations?": "Dispatcher, or an exchange of messages",
    "halls?": "Admission",
    "guests?": "LimitedConnection",
    "strangers?": "unauthenticated",
    "doors?": "Listener",
    "entrances?": "HandshakeQuota",
    "journals?": "TrainingRun",
    "fit_?plans?": "FitOptions",
    "seals?|sealed": "checksums",
    "check_?values": "check_finite, check_norm",
    "parkers?|parked|parking": "unload",
    "frontiers?": "traversals",
    "blame[ds]?": "attribute_errors_to",
    "broken_?work": "InternalModelError",
    "settle_.*": "make_..._explicit",
    "split_?pieces": "iter_chunks",
    "make_?room": "evict",
}
"""Words, and what is written in their place; in code, comments and prose, as parts of names too."""

NAMES = {
    "Link": ("", "Channel"),
    "Standing": ("", "ResumePoint"),
    "Half": ("", "TaskRunner"),
    "Position": ("", "DataPosition"),
    "place": ("runtime/client", "position"),
    "Access": ("", "Credentials"),
    "Incoming": ("", "ReceivedMessage"),
    "Pace": ("", "TokenBucket"),
    "Visit": ("", "HttpRequest"),
    "Handout": ("", "ClientFiles"),
    "Answer": ("runtime/edge", "HttpResponse"),
    "is_whole": ("", "has_valid_checksum"),
    "park": ("", "unload"),
    "take_up": ("", "load"),
    "_take_up": ("", "load"),
    "work": ("runtime/server/sessions.py", "handle_training"),
    "_answer": ("runtime/server/sessions.py", "handle_query"),
    "_asked": ("", "_query"),
    "GO_ON": ("", "CONTINUE"),
    "go_on": ("runtime", "continue_step"),
    "goOn": ("", "continueStep"),
    "judge": ("", "classify"),
    "Draft": ("", "NodeBuilder"),
    "draft": ("partitioner", "builder"),
    "settle": ("partitioner", "resolve, or what is done"),
    "_settle": ("partitioner", "resolve, or what is done"),
    "settled": ("partitioner", "replaced, known"),
    "Unsettled": ("", "Unresolved"),
    "Division": ("", "Partition"),
    "far": ("partitioner/cutting", "remote_shapes"),
    "doubled": ("partitioner/cutting", "duplicated"),
    "Kind": ("partitioner/normalization", "TensorKind"),
    "Cut": ("partitioner/reports", "CutCandidate"),
    "stand": ("", "find_resume_point"),
}
"""Names in code: the folder or file that had them, and what is written in their place."""

MODULES = {
    "accesses": "credentials",
    "answers": "http",
    "displays": "output",
    "draws": "random_operators",
    "estimators": "ml_operators",
    "extents": "shape_rules",
    "frontiers": "traversals",
    "isolations": "workers",
    "locks": "security",
    "norms": "validation",
    "pieces": "chunks",
    "plans": "options",
    "refusals": "http",
    "screens": "gate",
    "seals": "checksums",
    "uses": "parameters",
}
"""Names of modules, and what they are called now."""

EARLIER = "the earlier name of an option, which still works"
LABEL = "the label of a metric, by which dashboards know it"
LINUX = "Linux seals files"
EXCEPTIONS = {
    ("strangers?", "runtime/limits.py"): EARLIER,
    ("strangers?", "tests/commands/test_limits.py"): EARLIER,
    ("strangers?", "docs/security.md"): EARLIER,
    ("strangers?", "runtime/edge/http.py"): LABEL,
    ("strangers?", "tests/end_to_end/test_floods.py"): LABEL,
    ("seals?|sealed", "runtime/workers/blocks.py"): LINUX,
    ("seals?|sealed", "tests/runtime/workers/test_blocks.py"): LINUX,
}
"""A word and a file in which it stands all the same, and why."""

FOLDERS = ("splitonnx", "runtime", "partitioner", "tests", "examples", "benchmarks", "docs")
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
NOT_OURS = {"node_modules", "__pycache__", "dist", "build"}


def list_files() -> Iterator[Path]:
    """List the project's own code and prose, but for this file."""
    yield from (ROOT / page for page in PAGES)
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            is_ours = not NOT_OURS & set(path.relative_to(ROOT).parts)
            if is_ours and path.suffix in (".py", ".ts", ".mjs", ".md") and path != Path(__file__):
                yield path


@cache
def read_all() -> dict[str, str]:
    """Read all files, by their names."""
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in list_files()}


def list_words(text: str) -> set[str]:
    """List the words of a text in small letters, and those that its names consist of."""
    return set().union(*map(split_name, set(re.findall(r"[A-Za-z_]+", text))))


@cache
def split_name(name: str) -> frozenset[str]:
    """List a name, its parts and its tails in small letters."""
    parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    tails = [name[start.end() :] for start in re.finditer("^_*|_", name)]
    return frozenset(word.lower() for word in (name, *parts, *tails))


@cache
def list_names(path: str, text: str) -> set[str]:
    """List the identifiers of a module of Python or TypeScript."""
    if path.endswith(".py"):
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        return {token.string for token in tokens if token.type == tokenize.NAME}
    code = re.sub(r"/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|//[^\n]*", " ", text, flags=re.DOTALL)
    return set(re.findall(r"[A-Za-z_$][\w$]*", code))


@cache
def find_words() -> dict[str, set[str]]:
    """Find the files of each word."""
    places: dict[str, set[str]] = {}
    for path, text in read_all().items():
        for word in list_words(text):
            places.setdefault(word, set()).add(path)
    return places


def find_name(name: str, folder: str) -> set[str]:
    """Find the files of a folder that have an identifier; only where it stands are names listed."""
    return {
        path
        for path, text in read_all().items()
        if path.startswith(folder)
        and path.endswith((".py", ".ts"))
        and name in text
        and name in list_names(path, text)
    }


@pytest.mark.parametrize("word", ANYWHERE)
def test_a_word_that_was_given_up_stands_nowhere(word: str) -> None:
    pattern = re.compile(word)
    places = {
        path for found, paths in find_words().items() if pattern.fullmatch(found) for path in paths
    }
    excepted = {path for exception, path in EXCEPTIONS if exception == word}
    assert places == excepted, f"write {ANYWHERE[word]}"


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_was_given_up_stands_nowhere_in_code(name: str) -> None:
    folder, better = NAMES[name]
    places = find_name(name, folder)
    assert not places, f"write {better}"


def test_no_module_has_a_name_that_was_given_up() -> None:
    homes = ("splitonnx/", "runtime/", "partitioner/")
    modules = {Path(path).stem for path in read_all() if path.startswith(homes)}
    assert len(modules) > 150
    assert not modules & MODULES.keys()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("the stranger came", "stranger"),
        ("def open_premises(): ...", "premises"),
        ("class HallOfFame", "hall"),
        ("this._settle_scaler()", "settle_scaler"),
        ("const checkValues = 1", "checkvalues"),
        ('"TooManyStrangers"', "strangers"),
        ("MAX_GUESTS = 3", "guests"),
    ],
)
def test_words_are_found_within_names(text: str, word: str) -> None:
    assert word in list_words(text)


def test_names_are_found_in_code_alone() -> None:
    python = 'class Link:  # Half\n    "A Visit."\n'
    assert list_names("a.py", python) & {"Link", "Half", "Visit"} == {"Link"}
    script = 'class Link { /* Half */ a = "Visit"; } // Pace'
    assert list_names("a.ts", script) & {"Link", "Half", "Visit", "Pace"} == {"Link"}
