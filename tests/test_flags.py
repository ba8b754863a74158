"""Flags that no other test changes do change the result of a short run: none is without effect."""

import json

import pytest
from adversary import SHORT
from folders import FOLDERS, copy_alone, run_here

TURNED = {  # flags before the |, if any, are in both runs
    "mlp": ["--seed 1", "--activation tanh", "--optimizer sgd", "--lr 0.5"],
    "cnn": ["--seed 1", "--model resnet", "--lr 0.5", "--task style --size 24 | --strength 1"],
    "rnn": ["--seed 1", "--cell gru", "--n-layer 2", "--n-embd 9", "--optimizer adamw", "--batch-size 5",
            "--weight-decay 9", "--task series | --horizon 6"],
    "gan": ["--seed 1", "--latent 5"],
    "autoencoder": ["--seed 1", "--likelihood gaussian", "--jitter 0.1"],
    "transformer": ["--seed 1", "--norm post", "--n-head 2", "--optimizer adamw"],
    "gpt": ["--seed 1"],
    "llama": ["--seed 1", "--window 4", "--optimizer adamw"],
    "diffusion": ["--seed 1", "--predict noise", "--schedule linear", "--ema 0"],
}


def figures(folder, *args):
    """The result line, except what differs from run to run."""
    code, out, err = run_here(folder, "mlx", *args)
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
    assert figures(folder, *SHORT[name]) == seen[""]  # and a repeated run gives the same
