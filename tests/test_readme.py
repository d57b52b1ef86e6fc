"""The commands that README and the scripts' docstrings name are ones that the scripts take."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from helpers import ROOT

import common

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "common")


def commands(text):
    """(script's name, its words) of every command line in a text."""
    for line in re.findall(
        r"^\s*(?:pip.*&& )?((?:python|torchrun) .*?)(?:  +#.*)?$", text, re.MULTILINE
    ):
        words = shlex.split(line.split(" && ")[0], comments=True)
        place = next((i for i, word in enumerate(words) if Path(word).stem in SCRIPTS), None)
        if place is not None:
            yield Path(words[place]).stem, words[place + 1 :]


BLOCKS = re.findall(
    r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
)
TEXTS = {"README.md": "\n".join(BLOCKS)}
TEXTS |= {
    f"{name}.py": ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()))
    for name in SCRIPTS
}
COMMANDS = [(place, *command) for place, text in TEXTS.items() for command in commands(text)]


def test_there_are_commands_of_every_script():
    assert {name for place, name, _ in COMMANDS if place == "README.md"} == set(SCRIPTS)
    assert all(any(place == f"{name}.py" for place, _, _ in COMMANDS) for name in SCRIPTS)


@pytest.mark.parametrize(
    "place, name, words", COMMANDS, ids=[f"{p}: {n} {' '.join(w)}"[:90] for p, n, w in COMMANDS]
)
def test_commands_are_understood(place, name, words):
    """All flags, presets and values are known; nothing is run."""
    module = importlib.import_module(name)
    if words[:1] in (["curate"], ["compare"]):  # which have parsers of their own
        known = re.findall(r'"(--[\w-]+)"', (ROOT / f"{name}.py").read_text())
        assert {word for word in words if word.startswith("--")} <= set(known)
    else:
        common.parse_config(module.Config, module.PRESETS, module.DATA_PRESETS, words)
