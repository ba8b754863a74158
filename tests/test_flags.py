"""A flag that no other test turns does change the result of a short run: none is without effect."""

import json

import pytest
from folders import FOLDERS, copy_alone, run
from test_faults import SHORT

TURNED = {  # flags before the |, if any, are in both runs
    "mlp": ["--seed 1", "--activation tanh"],
    "cnn": ["--seed 1", "--task style --size 24 | --strength 1"],
    "rnn": ["--seed 1", "--cell gru", "--task series | --horizon 6"],
    "gan": ["--seed 1"],
    "autoencoder": ["--seed 1", "--likelihood gaussian", "--jitter 0.1"],
    "transformer": ["--seed 1", "--norm post"],
    "gpt": ["--seed 1"],
    "diffusion": ["--seed 1", "--predict noise", "--ema 0"],
}


def figures(folder, *args):
    """What the result line says, but for what differs from run to run."""
    code, out, err = run(folder, "mlx", *args)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1].removeprefix("result "))
    return {name: x for name, x in result.items() if name != "seconds" and "per_s" not in name and name != "files"}


@pytest.mark.parametrize("name", FOLDERS)
def test_effect(name, tmp_path):
    folder, seen = copy_alone(name, tmp_path / name), {}
    for turned in TURNED[name]:
        both, _, more = turned.rpartition("|")
        if both not in seen:
            seen[both] = figures(folder, *SHORT[name], *both.split())
        assert figures(folder, *SHORT[name], *both.split(), *more.split()) != seen[both], turned
    assert figures(folder, *SHORT[name]) == seen[""]  # and the same again gives the same
