"""What README.md names is there: folders, classes, functions, flags and pictures."""

import re
import shlex

import pytest
from folders import BACKENDS, FOLDERS, ROOT, make_args

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHAPTERS = README.split("## From the chapters to the code")[-1]


def text_of(name):
    return "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / name).glob("*.py")))


@pytest.mark.parametrize("name", FOLDERS)
def test_chapters(name):
    """In the books' map a folder's link is followed by its classes, functions and flags."""
    texts = re.findall(rf"\[{name}\]\([^)]*\)([^|\[]*)", CHAPTERS)
    assert texts, f"no chapter leads to {name}"
    text = text_of(name)
    for mark in re.findall(r"`([^`]+)`", " ".join(texts)):
        if mark.startswith("--"):
            assert all((f'"{word}"' if word.startswith("--") else word) in text for word in mark.split()), mark
        else:
            assert re.search(rf"(class|def) {re.escape(mark)}\b", text), f"{name} has no {mark}"


@pytest.mark.parametrize("name", FOLDERS)
def test_commands(name):
    """Each command shown is one that the folder's train.py takes: its flags are there, their values in range."""
    commands = re.findall(rf"python {name}/train\.py([^`\n]*)", README)
    assert len(commands) > 2, f"few commands of {name} are shown"
    for command in commands:
        args = make_args(name, *(word for word in shlex.split(command) if word not in ("--resume", "--backend", "mlx")))
        assert args.steps >= 0


def test_side_by_side():
    """The class shown in both frameworks is that of the files."""
    blocks = re.findall(r"```python\n(class .*?)```", README, re.S)
    assert len(blocks) == 2
    for block, backend in zip(blocks, BACKENDS):
        assert block in (ROOT / f"rnn/model_{backend}.py").read_text(encoding="utf-8")


def test_links():
    for place in re.findall(r"\]\(([^):#]+)\)", README):
        assert (ROOT / place).exists(), place
