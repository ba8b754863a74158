"""The twins compute the same numbers: starting weights, outputs, loss, gradients, training curves, samples."""

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
import torch
from folders import BACKENDS, CASES, FOLDERS, batches, load, make_trainer
from mlx.utils import tree_flatten


def array(backend, x):
    """A numpy array as one of the framework."""
    return torch.from_numpy(np.ascontiguousarray(x)) if backend == "torch" else mx.array(x)


def randomise(name, backend, trainer, scale=0.1):
    """Make every parameter random, biases and norms too; returns the weights."""
    net, rng = load(name, backend), np.random.default_rng(4)
    weights = sorted(net.get_weights(trainer.model).items())
    net.set_weights(trainer.model, {key: w + np.float32(rng.normal(0, scale, w.shape)) for key, w in weights})
    return net.get_weights(trainer.model)


def loss_and_grads(name, trainer, backend, arrays):
    net, folder = load(name, backend), FOLDERS[name]
    if backend == "torch":
        loss = folder.loss(net, trainer.model, *map(torch.from_numpy, arrays))
        loss.backward()
        return float(loss.detach()), {key: p.grad.numpy() for key, p in trainer.model.named_parameters()}
    function = mlx_nn.value_and_grad(trainer.model, lambda *a: folder.loss(net, trainer.model, *a))
    loss, grads = function(*map(mx.array, arrays))
    to_numpy = getattr(net, "to_numpy", lambda model, arrays: {key: np.array(g) for key, g in arrays.items()})
    return float(loss), to_numpy(trainer.model, dict(tree_flatten(grads)))


def refusal(capsys, function, *args):
    """The line that is printed before the program ends."""
    with pytest.raises(SystemExit):
        function(*args)
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("name, i", CASES)
def test_start(name, i):
    """A seed gives the same weights in both, another seed others; and these weights the same loss and gradients."""
    arrays, trainers = batches(name, i, 1)[0], [make_trainer(name, i, backend) for backend in BACKENDS]
    a, b = (load(name, backend).get_weights(trainer.model) for backend, trainer in zip(BACKENDS, trainers))
    np.testing.assert_equal(b, a)
    other = load(name, "torch").get_weights(make_trainer(name, i, "torch", seed=1).model)
    assert any((a[key] != other[key]).any() for key in a)
    (loss, grads), (mlx_loss, mlx_grads) = (loss_and_grads(name, *both, arrays) for both in zip(trainers, BACKENDS))
    assert mlx_loss == pytest.approx(loss, rel=1e-5) and grads.keys() == mlx_grads.keys()
    for key in grads:
        assert np.linalg.norm(mlx_grads[key] - grads[key]) < 1e-4 * np.linalg.norm(grads[key]), key


@pytest.mark.parametrize("name, i", CASES)
def test_curves(name, i):
    """The same losses step by step; then both give the same outputs for a batch, and write the same."""
    steps, curves, outputs = batches(name, i, FOLDERS[name].curve[i]), [], []
    for backend in BACKENDS:
        trainer = make_trainer(name, i, backend)
        curves.append([float(trainer.step(*arrays, lr=3e-3)["loss"]) for arrays in steps])
        outputs.append(FOLDERS[name].outputs(trainer, *steps[0]))
    assert np.ptp(curves[0]) > 0.01, "the loss does not move: the comparison would be empty"
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name, i", CASES)
def test_overfit(name, i):
    """One batch is memorised, by the twins in turn, as their curves are the same."""
    folder, arrays, trainer = FOLDERS[name], batches(name, i, 1)[0], make_trainer(name, i, BACKENDS[i % 2])
    losses = [float(trainer.step(*arrays, lr=folder.lr)["loss"]) for _ in range(folder.overfit[0])]
    assert losses[-1] < folder.overfit[1], f"from {losses[0]:.3f} to {losses[-1]:.3f}"
