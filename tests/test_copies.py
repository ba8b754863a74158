"""Functions of the same name have the same text in all folders: the price of folders that can be copied alone."""

import ast

import pytest
from folders import FOLDERS, ROOT, load_file

OWN = {  # the same name, but different in each folder
    "train.py": {"read_args", "rate", "defaults"},
    "data.py": {"BytePairs"},
    "model_torch.py": {"init_weights", "loss_fn", "generate", "get_weights", "set_weights", "to_numpy", "from_numpy"},
}
OWN["model_mlx.py"] = OWN["model_torch.py"]


def definitions(name, file):
    """{name: text} of the functions, and of the classes but for models and tasks."""
    text = (ROOT / name / file).read_text(encoding="utf-8")
    tasks = {task.__name__ for task in load_file(name, "data").TASKS.values()}
    own = OWN[file] | (tasks if file == "data.py" else set())
    kinds = ast.FunctionDef if file.startswith("model") else (ast.FunctionDef, ast.ClassDef)
    found = {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body if isinstance(node, kinds)}
    return {key: text for key, text in found.items() if key not in own}


@pytest.mark.parametrize("file", OWN)
def test_copies(file):
    seen = {}
    for name in FOLDERS:
        for key, text in definitions(name, file).items():
            first = seen.setdefault(key, (name, text))
            assert text == first[1], f"{key} differs between {first[0]}/{file} and {name}/{file}"
