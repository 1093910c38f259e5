"""Rules about the repository itself: sizes of files, words that do not belong, documents that point at what exists."""

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_source_file_is_long() -> None:
    """A file above 800 lines should be a package."""
    assert {str(p): lines(p) for p in SOURCES if lines(p) > 800} == {}


def test_source_stays_within_its_budget() -> None:
    """The whole package stays under 60,000 lines, data under 17,000 (docs/adr/0016), the median file under 200."""
    counts = sorted(lines(p) for p in SOURCES)
    assert sum(counts) < 60_000
    assert sum(lines(p) for p in SOURCES if "data" in p.relative_to(ROOT / "src" / "alloy").parts[:1]) < 17_000
    assert counts[len(counts) // 2] < 200


def code_lines(path: Path) -> int:
    """Lines that hold code: neither blank, nor of a comment or docstring alone."""
    text = path.read_text()
    layout = {getattr(tokenize, n) for n in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in layout]
    code = {line for t in tokens for line in range(t.start[0], t.end[0] + 1)}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node):
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(code)


def test_lines_of_code_are_counted_by_hand(tmp_path: Path) -> None:
    """Four of them: the two of a text that is no docstring, and two statements."""
    source = tmp_path / "x.py"
    source.write_text(
        '"""Doc\n\nstring."""\n\n# why\nX = """a\n# b"""\n\n\ndef f():\n    """Doc."""\n    return X  # c\n'
    )
    assert code_lines(source) == 4


def test_engine_and_server_are_small() -> None:
    """Engine and server together have at most 5,000 lines of code (docs/adr/0011)."""
    package = ROOT / "src" / "alloy"
    counts = {str(p): code_lines(p) for name in ("engine", "serve") for p in (package / name).rglob("*.py")}
    assert sum(counts.values()) <= 5_000, counts


def undocumented(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """Public methods without a docstring; validators and overloads need none."""
    methods = [m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
    free = ("validator", "overload", "setter")
    return [
        m
        for m in methods
        if not ast.get_docstring(m) and not any(f in ast.unparse(d) for d in m.decorator_list for f in free)
    ]


def test_every_public_function_is_documented() -> None:
    """Each module, and each public function and class at module level, has a docstring."""
    missing = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            missing.append(str(path.relative_to(ROOT)))
        for node in tree.body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if named and not ast.get_docstring(node):
                missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
            if named and isinstance(node, ast.ClassDef):
                missing += [f"{path.relative_to(ROOT)}:{m.lineno} {node.name}.{m.name}" for m in undocumented(node)]
    assert missing == []


def test_functions_on_tensors_state_shapes() -> None:
    """A public function that takes tensors has their shapes in its docstring, or names the function whose twin it is."""
    missing = []
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            arguments = [ast.unparse(a.annotation) for a in node.args.args + node.args.kwonlyargs if a.annotation]
            text = ast.get_docstring(node) or ""
            if {"Tensor", "Tensor | None"} & set(arguments) and not re.search(r"\(|As `alloy\.ops\.", text):
                missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert missing == []


def test_large_files_are_not_tracked() -> None:
    """Nothing above 500 KB is in the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    big = [f for f in listed.stdout.split("\0") if f and (ROOT / f).exists() and (ROOT / f).stat().st_size > 500_000]
    assert big == []


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.name
)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link in the documents names a file that exists."""
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text())
    assert [t for t in targets if not (page.parent / t).exists()] == []
