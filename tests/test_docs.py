"""README.md, CONTRIBUTING.md and docs/ name only what exists: files, headings, commands, options, fields."""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from trainer.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
SECTIONS = "data|model|diffusion|optimizer|train|checkpoint|log"
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def fields() -> set[str]:
    """Every configuration field as section.name."""
    found, section = set(), ""
    for line in (ROOT / "docs" / "configuration.md").read_text().splitlines():
        if line.startswith("## "):
            section = line.partition("]")[0].strip("# `[")
        elif line.startswith("| `"):
            found.add(f"{section}.{line.split('`')[1]}")
    return found | {"data.mixture"}


@cache
def known_options() -> set[str]:
    sources = [
        path for folder in ("trainer", "data_prep", "launch", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    return {option for path in sources for option in re.findall(r'"(--[a-z][\w-]*)"', path.read_text())} | {"--help"}


def commands(page: Path) -> list[str]:
    """The lines of its code blocks, continued ones joined, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0] for line in lines if line.split("#")[0].strip()]


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(
        r"(?<![\w/.])(?:trainer|data_prep|launch|configs|benchmarks|tests|docs)/[\w/-]+\.(?:py|toml|sh|sbatch|md|png)\b",
        page.read_text(),
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


@each_page
def test_commands_exist_with_their_options(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    text = page.read_text()
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets
    assert {line.split()[1] for line in commands(page) if re.match(r"make [a-z-]+(\s|$)", line)} <= targets
    assert {name for line in commands(page) for name in re.findall(r"^(ddpm-\w+)", line)} <= set(COMMANDS)
    ours = [
        name for name in re.findall(r"python3? -m ([\w.]+)", text) if re.match("trainer|data_prep|launch|bench", name)
    ]
    assert [name for name in ours if find_spec(name) is None] == []
    unknown = []
    for line in commands(page):
        start = re.search(
            r"(?:(?:trainer|launch|benchmarks)/\w+\.py|-m (?:data_prep|trainer)\S*|ddpm-(?!launch)\w+)(.*)", line
        )
        own = start.group(1).split(" -- ")[0] if start else ""
        unknown += [option for option in re.findall(r"(?<!\S)--[a-z][\w-]*", own) if option not in known_options()]
    assert unknown == []


@each_page
def test_fields_that_are_named_exist(page: Path) -> None:
    named = re.findall(rf"(?:`|--set )((?:{SECTIONS})\.[a-z]\w*)(?=[`=\s])", page.read_text())
    files = (".py", ".sbatch", ".mdb")
    assert [name for name in named if name not in fields() and not name.endswith(files)] == []


def test_the_readme_is_short_and_the_index_is_whole() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"]
    assert [name for name in pages if index.count(f"]({name})") != 1] == []


def test_tests_that_are_said_to_hold_a_promise_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)(?:::(test_\w+))?`", (ROOT / "tests" / "README.md").read_text())
    held = [(file, test) for file, test in named if Path(file).name.startswith("test_")]
    assert len(held) > 60
    missing = [
        f"{file}::{test}" for file, test in held if f"def {test}(" not in (ROOT / "tests" / file).read_text() and test
    ]
    assert missing == []
