"""Rules of this repository that no linter knows: who imports whom, what documents name, sizes."""

import ast
import importlib.util
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cnsdiff_dist"
SOURCES = ("cnsdiff_dist", "tests", "benchmarks", "launch", "configs", "docs", "requirements")
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES, MAX_90TH_PERCENTILE, MAX_MEDIAN = 50, 22, 10
MAX_MODULES_AT_THE_TOP = 8


def _python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


# --- imports --------------------------------------------------------------------------------


def _modules_named_in(path: Path) -> Iterator[str]:
    """What a file imports, and what it names in texts such as those of ``python -c``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"\b(?:from|import) (tests\.[\w.]+)", node.value)


def test_no_test_module_is_imported() -> None:
    test_modules = {path.stem for path in _python_files("tests") if path.stem.startswith("test_")}
    wrong = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in _python_files("tests")
        for module in _modules_named_in(path)
        if module.startswith("test") and test_modules.intersection(module.split("."))
    ]
    assert not wrong, "move what they share to tests/support: " + ", ".join(wrong)


def test_test_modules_have_names_of_their_own() -> None:
    """pytest imports them by their base names."""
    names = [path.stem for path in _python_files("tests") if path.stem.startswith("test_")]
    assert len(names) == len(set(names))


# --- documents ------------------------------------------------------------------------------

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_documents = pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if path.exists()], ids=lambda path: path.name
)


def _paths_named_in(text: str) -> set[str]:
    """Names of files that belong to the tree: code, scripts, and all below a folder of sources.

    Others, such as runs/demo/manifest.json, are what a command writes.
    """
    words = re.findall(r"(?<![\w$./:{}*-])[\w.-]+(?:/[\w.*-]+)+/?", text)
    return {
        word.rstrip(".")
        for word in words
        if word.endswith((".py", ".sh", ".sbatch")) or word.split("/")[0] in SOURCES
    }


def _is_in_the_tree(name: str, document: Path) -> bool:
    # Modules are also named as seen from the package.
    places = (ROOT, PACKAGE, document.parent)
    return any(
        any(place.glob(name)) if "*" in name else (place / name).exists() for place in places
    )


@_documents
def test_files_named_in_documents_exist(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)
    missing = {name for name in _paths_named_in(text) if not _is_in_the_tree(name, document)}
    missing |= {link for link in links if not (document.parent / link).exists()}
    known = {path.name for path in _python_files(*SOURCES)}
    missing |= {name for name in re.findall(r"`(\w+\.py)`", text) if name not in known}
    assert not missing


def _is_a_module(name: str) -> bool:
    top, *rest = name.split(".")
    if not (ROOT / top).is_dir():
        return importlib.util.find_spec(top) is not None  # a library's, such as pip
    path = ROOT.joinpath(top, *rest)
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@_documents
def test_modules_that_documents_run_exist(document: Path) -> None:
    modules = re.findall(r"python3? -m ([\w.]*\w)", document.read_text())
    assert not [module for module in modules if not _is_a_module(module)]


# --- sizes ----------------------------------------------------------------------------------


def test_no_file_is_too_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in _python_files("cnsdiff_dist", "tests", "benchmarks")
    }
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES}


def _function_lengths() -> dict[str, int]:
    """Lines from ``def`` to the last one, of every function and method of the package."""
    found = {}
    for path in _python_files("cnsdiff_dist"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                found[name] = (node.end_lineno or node.lineno) - node.lineno + 1
    return found


def test_no_function_is_too_long() -> None:
    lengths = _function_lengths()
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}


def test_most_functions_are_short() -> None:
    lengths = list(_function_lengths().values())
    assert statistics.quantiles(lengths, n=10)[-1] <= MAX_90TH_PERCENTILE
    assert statistics.median(lengths) <= MAX_MEDIAN


def test_few_modules_lie_at_the_top_of_the_package() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_MODULES_AT_THE_TOP
