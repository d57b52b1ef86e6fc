"""Copies between scripts are byte for byte: a definition under `# Copied from NAME.py` equals its namesake there.

`python tests/test_copies.py --fix` brings the copies up to date.
"""

import ast
import difflib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"^# Copied from (\w+\.py)$")


def definitions(source):
    """{name: (first line, end line)}, 0-based, of top-level functions, classes and assignments, decorators included."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            found[node.name] = (first, node.end_lineno)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Name, ast.Tuple)):
            found[ast.unparse(node.targets[0])] = (node.lineno - 1, node.end_lineno)
    return found


def copies(root):
    """(script, name, lines of the copy, source script, lines there or None) of every marked copy below root."""
    texts = {path: path.read_text() for path in sorted(root.glob("*.py"))}
    found = {path: definitions(text) for path, text in texts.items()}
    for path, text in texts.items():
        starts = {first: (name, end) for name, (first, end) in found[path].items()}
        for number, line in enumerate(text.splitlines()):
            mark = MARK.match(line)
            if mark:
                name, end = starts.get(number + 1, ("?", number + 1))
                original = root / mark[1]
                place = found.get(original, {}).get(name)
                theirs = texts[original].splitlines()[slice(*place)] if place else None
                yield path, name, (number + 1, end), mark[1], theirs


def differences(root):
    """One printable diff for each copy that is not its source."""
    found = []
    for path, name, (first, end), source, theirs in copies(root):
        ours = path.read_text().splitlines()[first:end]
        if theirs is None:
            found.append(f"{path.name}:{first}: {source} has no {name}")
        elif ours != theirs:
            lines = difflib.unified_diff(theirs, ours, f"{source}:{name}", f"{path.name}:{name}", lineterm="")
            found.append("\n".join(lines))
    return found


def fix(root):
    """Replace every copy that differs by its source; returns how many."""
    stale = []
    for path, _, (first, end), _, theirs in copies(root):
        if theirs is not None and path.read_text().splitlines()[first:end] != theirs:
            stale.append((path, first, end, theirs))
    for path, first, end, theirs in reversed(stale):  # from the bottom, so that line numbers above stay true
        lines = path.read_text().splitlines()
        path.write_text("\n".join(lines[:first] + theirs + lines[end:]) + "\n")
    return len(stale)


def test_copies_equal_their_sources():
    found = differences(ROOT)
    assert not found, "\n\n".join(found) + "\n\npython tests/test_copies.py --fix brings copies up to date"


def test_a_changed_copy_is_found_and_fixed(tmp_path):
    (tmp_path / "a.py").write_text("X = 1\n\n\n@cache\ndef f(x):\n    return x\n\n\nclass C:\n    y = 2\n")
    mark = "# Copied from a.py\n"
    copies = f"{mark}@cache\ndef f(x):\n    return x + 1\n\n\n{mark}class C:\n    y = 3\n\n\nz = 0\n"
    (tmp_path / "b.py").write_text(copies)
    assert len(differences(tmp_path)) == 2 and "+    return x + 1" in differences(tmp_path)[0]
    assert fix(tmp_path) == 2 and not differences(tmp_path)
    assert (tmp_path / "b.py").read_text().endswith("    y = 2\n\n\nz = 0\n")
    (tmp_path / "c.py").write_text("# Copied from a.py\ndef gone():\n    pass\n")
    assert "has no gone" in differences(tmp_path)[0]


def test_scripts_import_no_script_and_only_known_packages():
    scripts = {p.stem for p in ROOT.glob("*.py")}
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "PIL", "av", "tqdm", "common"}
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in (n.split(".")[0] for n in names):
                assert name in allowed and (name not in scripts or name == "common"), f"{path.name} imports {name}"
                assert path.stem != "common" or name != "common"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.name)
def test_public_definitions_have_doc_strings(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name}"


if __name__ == "__main__":
    if "--fix" in sys.argv:
        print(f"{fix(ROOT)} copies brought up to date")
    for difference in differences(ROOT):
        print(difference)
