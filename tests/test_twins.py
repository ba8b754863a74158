"""The structure of the collection: which files there are, what they import, that twins are twins and copies copies."""

import ast
import subprocess
import sys

import pytest
from folders import FOLDERS, ROOT, load_file

FILES = {"model_torch.py": {"torch"}, "model_mlx.py": {"mlx"}, "data.py": set(), "train.py": {"data"}}  # and imports
PACKAGES = {"numpy", "PIL", "tiktoken"}
OPTIONAL = {"cnn": {"coremltools"}}
EACH = pytest.mark.parametrize("name", FOLDERS)
OWN = {  # the same name, but different in each folder
    "train.py": {"read_args", "rate", "defaults"}, "data.py": {"BytePairs"},
    "model_torch.py": {"init_weights", "loss_fn", "generate", "get_weights", "set_weights", "to_numpy", "from_numpy"},
}  # fmt: skip
OWN["model_mlx.py"] = OWN["model_torch.py"]


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


def definitions(name, file):
    """{name: lines} of the functions, the classes but for models and tasks, and what train.py does if it is run."""
    text, tasks = (ROOT / name / file).read_text(encoding="utf-8"), load_file(name, "data").TASKS.values()
    own = OWN[file] | ({task.__name__ for task in tasks} if file == "data.py" else set())
    kinds = ast.FunctionDef if file.startswith("model") else (ast.FunctionDef, ast.ClassDef, ast.If)
    nodes = {getattr(node, "name", "if"): node for node in ast.parse(text).body if isinstance(node, kinds)}
    lines = text.splitlines()
    return {key: lines[node.lineno - 1 : node.end_lineno] for key, node in nodes.items() if key not in own}


def test_top_level():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    top = {file.split("/")[0] for file in listed.stdout.split() if not file.startswith(".")}
    if listed.returncode == 0:  # a copy without git has nothing to say here
        assert top <= {*FOLDERS, "tests", "README.md"}


@EACH
def test_files(name):
    """Four files and an image; train.py stays short, and so does its main; only a few packages are imported."""
    files = {path.name for path in (ROOT / name).iterdir()} - {"out", "data", "__pycache__", ".DS_Store"}
    assert set(FILES) <= files <= {*FILES, "sample.png"}
    assert all((ROOT / name / file).stat().st_size < 100_000 for file in files - {*FILES})
    body = parse(name, "train.py").body
    main = next(f for f in body if getattr(f, "name", "") == "main")
    assert body[-1].end_lineno <= (200 if name in ("mlp", "cnn") else 250) and main.end_lineno - main.lineno < 60
    for file, own in FILES.items():
        allowed = set(sys.stdlib_module_names) | PACKAGES | own | OPTIONAL.get(name, set())
        for node in ast.walk(parse(name, file)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."]
                assert {name.split(".")[0] for name in names} <= allowed and not getattr(node, "level", 0)


@EACH
def test_twins(name):
    trees = [parse(name, "model_torch.py"), parse(name, "model_mlx.py")]
    assert outline(trees[0]) == outline(trees[1])
    docs = [ast.get_docstring(tree).replace("PyTorch", "X").replace("MLX", "X") for tree in trees]
    configs = [[ast.unparse(node) for node in tree.body if getattr(node, "name", "") == "Config"] for tree in trees]
    assert docs[0] == docs[1] and configs[0] == configs[1] and configs[0]


@pytest.mark.parametrize("file", FILES)
def test_copies(file):
    """Functions of the same name have the same text in all folders: the price of folders that can be copied alone."""
    seen = {}
    for name in FOLDERS:
        for key, lines in definitions(name, file).items():
            first = seen.setdefault(key, (name, lines))
            assert lines == first[1], f"{key} differs between {first[0]}/{file} and {name}/{file}"
