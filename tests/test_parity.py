"""The twins compute the same numbers: starting weights, outputs, loss, gradients, training curves, samples."""

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
import torch
from folders import BACKENDS, CASES, FOLDERS, batches, load, make_trainer
from mlx.utils import tree_flatten


def distance(a, b):
    """The norm of the difference over the norm."""
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)


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


@pytest.mark.parametrize("name, i", CASES)
def test_weights(name, i):
    def weights(backend, seed):
        return load(name, backend).get_weights(make_trainer(name, i, backend, seed=seed).model)

    a, b, other = weights("torch", 3), weights("mlx", 3), weights("torch", 4)
    assert a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)
    assert any((a[key] != other[key]).any() for key in a)


@pytest.mark.parametrize("name, i", CASES)
def test_gradients(name, i):
    arrays = batches(name, i, 1)[0]
    (loss, grads), (mlx_loss, mlx_grads) = (
        loss_and_grads(name, make_trainer(name, i, backend), backend, arrays) for backend in ("torch", "mlx")
    )
    assert mlx_loss == pytest.approx(loss, rel=1e-5)
    assert grads.keys() == mlx_grads.keys()
    for key in grads:
        assert np.linalg.norm(grads[key]) > 0, f"{key} gets no gradient"
        assert distance(mlx_grads[key], grads[key]) < 1e-4, key


@pytest.mark.parametrize("name, i", CASES)
def test_curves(name, i):
    """The same losses step by step; then both give the same outputs for a batch, and write the same."""
    steps, curves, outputs = batches(name, i, FOLDERS[name].curve[i]), [], []
    for backend in ("torch", "mlx"):
        trainer = make_trainer(name, i, backend)
        curves.append([float(trainer.step(*arrays, lr=3e-3)["loss"]) for arrays in steps])
        outputs.append(FOLDERS[name].outputs(trainer, *steps[0]))
    assert np.ptp(curves[0]) > 0.01, "the loss does not move: the comparison would be empty"
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, i", CASES)
def test_overfit(name, i, backend):
    """One batch is memorised."""
    folder, arrays, trainer = FOLDERS[name], batches(name, i, 1)[0], make_trainer(name, i, backend)
    losses = [float(trainer.step(*arrays, lr=folder.lr)["loss"]) for _ in range(folder.overfit[0])]
    assert losses[-1] < folder.overfit[1], f"from {losses[0]:.3f} to {losses[-1]:.3f}"
