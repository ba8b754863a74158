"""What README.md names is there: folders, classes, functions, flags and pictures."""

import re

import pytest
from folders import FOLDERS, ROOT

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
    """Each flag of the commands shown is one of the folder's."""
    commands = re.findall(rf"{name}/train\.py([^`\n]*)", README)
    assert commands, f"no command of {name} is shown"
    for flag in re.findall(r"--[a-z][a-z-]*", " ".join(commands)):
        assert f'"{flag}"' in text_of(name), f"{name}/train.py has no {flag}"


def test_links():
    for place in re.findall(r"\]\(([^):#]+)\)", README):
        assert (ROOT / place).exists(), place
