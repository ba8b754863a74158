"""The structure of the collection: which files there are, what they import, and that twins are twins."""

import ast
import subprocess
import sys

import pytest
from folders import FOLDERS, ROOT

ALL = "mlp cnn rnn gan autoencoder transformer gpt llama diffusion".split()
PACKAGES = {"numpy", "PIL", "tiktoken"}
OPTIONAL = {"cnn": {"coremltools"}}


def parse(name, file):
    return ast.parse((ROOT / name / file).read_text(encoding="utf-8"))


def outline(tree):
    """Classes with their methods, and functions, in order and with their arguments; forward counts as __call__."""
    rows = []
    for node in tree.body:
        inner = [f for f in node.body if isinstance(f, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []
        rows += [node.name] if isinstance(node, ast.ClassDef) else []
        for f in inner or ([node] if isinstance(node, ast.FunctionDef) else []):
            name = "__call__" if f.name == "forward" else f.name
            rows.append((node.name, name, [a.arg for a in f.args.posonlyargs + f.args.args + f.args.kwonlyargs]))
    return rows


def test_top_level():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    top = {file.split("/")[0] for file in listed.stdout.split() if not file.startswith(".")}
    if listed.returncode == 0:  # a copy without git has nothing to say here
        assert top <= {*ALL, "tests", "README.md"}


@pytest.mark.parametrize("name", FOLDERS)
def test_files(name):
    files = {path.name for path in (ROOT / name).iterdir()} - {"out", "data", "__pycache__", ".DS_Store"}
    four = {"model_torch.py", "model_mlx.py", "data.py", "train.py"}
    assert four <= files <= four | {"sample.png"}
    if "sample.png" in files:
        assert (ROOT / name / "sample.png").stat().st_size < 100_000


@pytest.mark.parametrize("name", FOLDERS)
def test_short(name):
    """train.py stays short, and so does its main."""
    lines = (ROOT / name / "train.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= (200 if name in ("mlp", "cnn") else 250)
    main = next(f for f in parse(name, "train.py").body if getattr(f, "name", "") == "main")
    assert main.end_lineno - main.lineno < 60


@pytest.mark.parametrize("file", ["model_torch.py", "model_mlx.py", "data.py", "train.py"])
@pytest.mark.parametrize("name", FOLDERS)
def test_imports(name, file):
    own = {"model_torch.py": {"torch"}, "model_mlx.py": {"mlx"}, "data.py": set(), "train.py": {"data"}}[file]
    allowed = set(sys.stdlib_module_names) | PACKAGES | own | OPTIONAL.get(name, set())
    for node in ast.walk(parse(name, file)):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] in allowed


@pytest.mark.parametrize("name", FOLDERS)
def test_twins(name):
    trees = [parse(name, "model_torch.py"), parse(name, "model_mlx.py")]
    assert outline(trees[0]) == outline(trees[1])
    docs = [ast.get_docstring(tree).replace("PyTorch", "X").replace("MLX", "X") for tree in trees]
    assert docs[0] == docs[1]
    configs = [[ast.unparse(node) for node in tree.body if getattr(node, "name", "") == "Config"] for tree in trees]
    assert configs[0] == configs[1] and configs[0]
