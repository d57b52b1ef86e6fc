"""How large the files may be, in code tokens: whoever adds a thing takes one away.

python tests/test_size.py prints the sizes. Comments, docstrings and blank lines do not count.
"""

import ast
import io
import tokenize

import pytest
from helpers import ROOT

FILES = sorted(ROOT.glob("*.py"))

SKIP = set("COMMENT NL NEWLINE INDENT DEDENT ENDMARKER FSTRING_END".split())

# code tokens of each file at most
SIZES = {
    "common.py": 10300,
    "ijepa.py": 6300,
    "msn.py": 6800,
    "pmsn.py": 7300,
    "dinov2.py": 11500,
    "vjepa.py": 10500,
    "iwm.py": 8200,
    "flexpredict.py": 7300,
    "pixel_vit.py": 11000,
    "llip.py": 10000,
    "mvp_eval.py": 7800,
}


def tokens_by_line(source):
    """Return {line: code tokens that start there}."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    documentation = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node):
            documentation.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    counts = {}
    inside = 0  # f-strings, which since Python 3.12 are many tokens; here each is one
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        kind = tokenize.tok_name[token.type]
        inside -= kind == "FSTRING_END"
        if not inside and kind not in SKIP and line not in documentation:
            counts[line] = counts.get(line, 0) + 1
        inside += kind == "FSTRING_START"
    return counts


def dense(tree):
    """Return the lines of conditionals inside others, and of parallel assignments but for swaps."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp):
            found += [part.lineno for part in ast.walk(node) if isinstance(part, ast.IfExp)][1:]
        elif isinstance(node, ast.Assign):
            sides = [node.targets[0], node.value]
            if all(isinstance(side, ast.Tuple) for side in sides):
                left, right = ({*map(ast.unparse, side.elts)} for side in sides)
                found += [node.lineno] * (left != right)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_small_and_airy(path):
    source = path.read_text()
    counts = tokens_by_line(source)
    assert sum(counts.values()) <= SIZES[path.name]
    assert sum(counts.values()) / len(counts) <= 12
    assert [line for line, count in counts.items() if count > 30] == []
    long = [i for i, line in enumerate(source.splitlines(), 1) if len(line) > 100]
    assert long == []
    assert dense(ast.parse(source)) == []


def test_together():
    assert set(SIZES) == {path.name for path in FILES}, "every file has a figure"
    assert sum(sum(tokens_by_line(path.read_text()).values()) for path in FILES) <= 93_600


if __name__ == "__main__":
    for path in FILES:
        counts = tokens_by_line(path.read_text())
        total = sum(counts.values())
        print(f"{path.name:<16}{total:>7} tokens{total / len(counts):>7.1f} a line")
