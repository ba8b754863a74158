"""A function that two folders share is the same text in both: the price of copying one folder, kept from drifting."""

import ast

import pytest
from folders import FOLDERS, ROOT

OWN = {"main", "load_data", "init_weights", "loss_fn", "generate"}  # one name, but each folder's own
OWN |= {"get_weights", "set_weights", "to_numpy", "from_numpy"}


def functions(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    return {f.name: ast.get_source_segment(text, f) for f in ast.parse(text).body if isinstance(f, ast.FunctionDef)}


@pytest.mark.parametrize("file", ["train.py", "model_torch.py", "model_mlx.py"])
def test_copies(file):
    seen = {}
    for name in FOLDERS:
        for function, text in functions(f"{name}/{file}").items():
            if function not in OWN:
                first = seen.setdefault(function, (name, text))
                assert text == first[1], f"{function} differs between {first[0]}/{file} and {name}/{file}"
