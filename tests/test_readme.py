"""What README.md names exists: folders, classes, functions, flags and images."""

import re
import shlex
import sys

import pytest
from adversary import SHORT
from folders import BACKENDS, FOLDERS, ROOT, copy_quick, load_file, make_args, make_run, run_here

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHAPTERS = README.split("## From the chapters to the code")[-1]
ELSEWHERE = {"mnist", "cifar10", "tinyshakespeare", "multi30k", "seattle-weather.csv", "--init", "--resume"}


def text_of(name):
    return "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / name).glob("*.py")))


@pytest.mark.parametrize("name", FOLDERS)
def test_chapters(name):
    """In the map of the books, a folder's link is followed by its classes, functions and flags."""
    texts, text = re.findall(rf"\[{name}\]\([^)]*\)([^|\[]*)", CHAPTERS), text_of(name)
    assert texts, f"no chapter leads to {name}"
    for mark in re.findall(r"`([^`]+)`", " ".join(texts)):
        words = [f'"{word}"' if word.startswith("--") else word for word in mark.split()] if mark[0] == "-" else []
        assert all(word in text for word in words) if words else re.search(rf"(class|def) {mark}\b", text), mark


@pytest.mark.parametrize("name", FOLDERS)
def test_commands(name, tmp_path):
    """Commands before the table of figures run, in order, small and for two steps; of the others, one step is made."""
    parts = README.split("## Measured figures")[0], README
    begin, commands = (re.findall(rf"python {name}/train\.py([^`\n]*)", part) for part in parts)
    assert len(commands) > 2, f"few commands of {name} are shown"
    folder = copy_quick(name, tmp_path / name)
    (tmp_path / "houses.csv").write_text("a,b,price\n" + "1,2,3.5\n3,4,7\n" * 20)
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n3,4\n")
    small = SHORT[name] if name in ("rnn", "gpt", "llama") else FOLDERS[name].smoke
    for command in dict.fromkeys(commands):
        words = shlex.split(command)
        make_args(name, *(word for word in words if word not in ("--resume", "--backend", "mlx")))
        if command not in begin or "chat" in command:  # a dialogue takes longer: test_gpt.py has short ones
            if not set(words) & ELSEWHERE:
                task, trainer, rate = make_run(name, *words, *["--count", "300"] * ("--count" in text_of(name)))
                trainer.step(*task.batch(0), lr=rate(0))
            continue
        short = small[2:] + ["--steps", "2"] * ("--resume" not in words)  # of two flags the second counts
        code, _, err = run_here(folder, "torch", *words, *short, cwd=tmp_path)
        assert code == 0, f"{command}: {err}"


def test_page():
    """The class shown in both frameworks is that of the files, links lead to files, and the manual is the one named."""
    blocks = re.findall(r"```python\n(class .*?)```", README, re.S)
    for block, backend in zip(blocks, BACKENDS, strict=True):
        assert block in (ROOT / f"rnn/model_{backend}.py").read_text(encoding="utf-8")
    for place in re.findall(r"\]\(([^):#]+)\)", README):
        assert (ROOT / place).exists(), place
    assert sys.version_info[:3] != (3, 11, 7) or f"{len(load_file('gpt', 'data').load_text('')):,} characters" in README
