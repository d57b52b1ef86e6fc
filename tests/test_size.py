"""How large the files may be, in code tokens: whoever adds a thing takes one away.

python tests/test_size.py prints the sizes. Comments, docstrings and blank lines do not count.
"""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
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


def source_of(name):
    """Return a file's source."""
    return (ROOT / name).read_text()


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


def nested_conditionals(tree):
    """Return the lines of conditional expressions inside others."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp):
            found += [
                n.lineno for n in ast.walk(node) if isinstance(n, ast.IfExp) and n is not node
            ]
    return found


def parallel_assignments(tree):
    """Return the lines that assign a tuple of values to a tuple of names, swaps excepted."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            target = node.targets[0]
            if isinstance(target, ast.Tuple):
                names = {ast.unparse(part) for part in target.elts}
                if names != {ast.unparse(part) for part in node.value.elts}:
                    found.append(node.lineno)
    return found


@pytest.mark.parametrize("name", SIZES)
def test_files_are_small_and_airy(name):
    source = source_of(name)
    counts = tokens_by_line(source)
    tree = ast.parse(source)
    assert sum(counts.values()) <= SIZES[name]
    assert sum(counts.values()) / len(counts) <= 12
    assert [line for line, count in counts.items() if count > 30] == []
    long = [i for i, line in enumerate(source.splitlines(), 1) if len(line) > 100]
    assert long == []
    assert nested_conditionals(tree) == []
    assert parallel_assignments(tree) == []


def test_together():
    names = {path.name for path in ROOT.glob("*.py")}
    assert set(SIZES) == names, "every file has a figure"
    assert sum(sum(tokens_by_line(source_of(name)).values()) for name in names) <= 93_600


if __name__ == "__main__":
    for file in sorted(path.name for path in ROOT.glob("*.py")):
        counts = tokens_by_line(source_of(file))
        total = sum(counts.values())
        print(f"{file:<16}{total:>7} tokens{total / len(counts):>7.1f} a line")
