"""Copies between scripts are exact: what stands under `# Copied from NAME.py` equals its namesake.

`python tests/test_copies.py` brings the copies up to date.
"""

import ast
import re
import sys

import pytest
from helpers import ROOT

FILES = sorted(ROOT.glob("*.py"))
REST = r"\b.*\n(?:(?:[ )\]}].*)?\n)*"  # of a definition: what is indented, closes it, or is blank
COPY = re.compile(rf"^# Copied from (\w+\.py)\n((?:@.*\n)*(?:def |class )?(\w+){REST})", re.M)
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def updated(text):
    """Return the text of a script with its copies brought up to date."""

    def mend(copy):
        source, ours, name = copy.groups()
        pattern = rf"^(?:@.*\n)*(?:def |class )?{name}{REST}"
        theirs = re.search(pattern, (ROOT / source).read_text(), re.M)[0]
        return copy[0].replace(ours.rstrip(), theirs.rstrip())

    return COPY.sub(mend, text)


@each
def test_copies_equal_their_sources(path):
    text = path.read_text()
    assert len(COPY.findall(text)) == text.count("# Copied from"), "a mark stands above nothing"
    assert updated(text) == text, "python tests/test_copies.py brings copies up to date"


@each
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
    for path in FILES:
        path.write_text(updated(path.read_text()))
