"""Copies between scripts are exact: what stands under `# Copied from NAME.py` equals its namesake.

`python tests/test_copies.py --fix` brings the copies up to date.
"""

import ast
import difflib
import functools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"^# Copied from (\w+\.py)$")


@functools.cache
def definitions(source):
    """Return {name: (first line, end line)} of top-level functions, classes and assignments.

    Lines count from 0. Decorators belong to what they decorate.
    """
    found = {}
    for node in ast.parse(source).body:
        decorators = getattr(node, "decorator_list", [])
        first = min(part.lineno for part in [node, *decorators]) - 1
        if isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = (first, node.end_lineno)
        elif hasattr(node, "name"):
            found[node.name] = (first, node.end_lineno)
    return found


def stale(root):
    """Yield (file, first line, end line, source, lines there) of each copy that is not exact."""
    texts = {path.name: path.read_text() for path in sorted(root.glob("*.py"))}
    for file, text in texts.items():
        lines = text.splitlines()
        starts = {first: (name, end) for name, (first, end) in definitions(text).items()}
        for number, line in enumerate(lines, start=1):
            mark = MARK.match(line)
            if mark:
                name, end = starts.get(number, ("nothing", number))
                source = texts[mark[1]]
                place = definitions(source).get(name, (0, 0))
                theirs = source.splitlines()[slice(*place)]
                if not theirs or lines[number:end] != theirs:
                    yield root / file, number, end, f"{mark[1]}:{name}", theirs


def differences(root):
    """Return a printable diff for each copy that is not exact."""
    found = []
    for path, first, end, source, theirs in stale(root):
        ours = path.read_text().splitlines()[first:end]
        found += difflib.unified_diff(theirs, ours, source, path.name, lineterm="")
    return "\n".join(found)


def fix(root):
    """Bring copies up to date."""
    # from the bottom, so that line numbers above stay true
    for path, first, end, _, theirs in reversed(list(stale(root))):
        lines = path.read_text().splitlines()
        lines[first:end] = theirs or lines[first:end]
        path.write_text("\n".join(lines) + "\n")


def test_copies_equal_their_sources():
    found = differences(ROOT)
    assert not found, f"{found}\n\npython tests/test_copies.py --fix brings copies up to date"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_imports_and_doc_strings(path):
    """No script imports another; packages are the known ones; public definitions are described."""
    tree = ast.parse(path.read_text())
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "PIL", "av", "tqdm", "common"}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        assert {name.split(".")[0] for name in names} <= allowed - {path.stem}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


if __name__ == "__main__":
    if "--fix" in sys.argv:
        fix(ROOT)
    print(differences(ROOT))
