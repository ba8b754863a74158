"""The by-hand half of mlp/ against the frameworks' own: activations, losses, gradients, optimizers, training."""

import mlx.core as mx
import mlx.optimizers as mlx_optim
import numpy as np
import pytest
import torch
from folders import FOLDERS, load, make_trainer

LOSSES = ["cross_entropy", "binary_cross_entropy", "mse"]
ACTIVATIONS = ["relu", "sigmoid", "tanh"]
TORCH, MLX = load("mlp", "torch"), load("mlp", "mlx")


def array(backend, x):
    return torch.from_numpy(x) if backend == "torch" else mx.array(x)


def case(backend, activation, loss, scale=1.0):
    net = load("mlp", backend)
    config = net.Config(n_in=6, hidden=[9, 7], n_out=4, activation=activation, loss=loss)
    model = net.MLP(config)
    net.init_weights(model, seed=5)
    x, y = FOLDERS["mlp"].batch(config, np.random.default_rng(1))
    return net, model, array(backend, x * np.float32(scale)), array(backend, y)


@pytest.mark.parametrize("scale", [1.0, 60.0])  # 60: logits far out, where a careless softmax or logarithm overflows
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_by_hand(activation, loss, scale):
    net, model, x, y = case("torch", activation, loss, scale)
    expected = net.loss_fn(model(x), y, loss)
    expected.backward()
    value, grads = net.loss_and_grads_by_hand(model, x, y)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert grads.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6)
    net, model, x, y = case("mlx", activation, loss, scale)
    mlx_value, mlx_grads = net.loss_and_grads_by_hand(model, x, y)
    assert float(mlx_value) == pytest.approx(float(value), rel=1e-5)
    expected = mx.grad(lambda w: net.loss_fn(x_of(model, w, x), y, loss))([(la.weight, la.bias) for la in model.layers])
    for k, (weight, bias) in enumerate(expected):
        np.testing.assert_allclose(mlx_grads[f"layers.{k}.weight"], weight, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(mlx_grads[f"layers.{k}.bias"], bias, rtol=1e-4, atol=1e-6)


def x_of(model, weights, x):
    """The MLP written once more, for mx.grad: the outputs for a list of (weight, bias)."""
    for weight, bias in weights[:-1]:
        x = model.activation(x @ weight.T + bias)
    return x @ weights[-1][0].T + weights[-1][1]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes(activation):
    """f' is what differences of f say."""
    z = torch.linspace(-4, 4, 80, dtype=torch.float64)
    h = 1e-6
    difference = (TORCH.activate(z + h, activation)[0] - TORCH.activate(z - h, activation)[0]) / (2 * h)
    torch.testing.assert_close(TORCH.activate(z, activation)[1].double(), difference, rtol=1e-5, atol=1e-6)


def theirs(name, p, grads, lr):
    """The same updates by torch.optim and by mlx.optimizers."""
    a = torch.nn.Parameter(torch.from_numpy(p.copy()))
    b = {"p": mx.array(p)}
    if name == "adam":
        torch_optimizer, mlx_optimizer = torch.optim.Adam([a], lr), mlx_optim.Adam(lr, bias_correction=True)
    else:
        beta = 0.9 if name == "momentum" else 0.0
        torch_optimizer, mlx_optimizer = torch.optim.SGD([a], lr, momentum=beta), mlx_optim.SGD(lr, momentum=beta)
    for g in grads:
        a.grad = torch.from_numpy(g)
        torch_optimizer.step()
        b = mlx_optimizer.apply_gradients({"p": mx.array(g)}, b)
    return a.detach().numpy(), np.array(b["p"])


@pytest.mark.parametrize("name, moments", [("sgd", 0), ("momentum", 1), ("adam", 2)])
def test_optimizers_by_hand(name, moments):
    rng = np.random.default_rng(2)
    p, grads = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=(12, 4, 3)).astype(np.float32)
    expected = theirs(name, p, grads, lr=0.1)
    for backend, other in zip(("torch", "mlx"), expected):
        ours, state = array(backend, p), [array(backend, np.zeros_like(p)) for _ in range(moments)]
        for t, g in enumerate(grads, 1):
            ours, *state = getattr(load("mlp", backend), name)(ours, array(backend, g), 0.1, t, *state)
        assert np.abs(np.array(ours.tolist()) - p).max() > 0.1
        np.testing.assert_allclose(np.array(ours.tolist()), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_training_by_hand(backend, optimizer):
    """--grad by-hand draws the curve of autograd and the framework's own optimizer."""
    curves = []
    for grad in ("autograd", "by-hand"):
        trainer = make_trainer("mlp", 0, backend, grad=grad, optimizer=optimizer)
        rng = np.random.default_rng(0)
        steps = [FOLDERS["mlp"].batch(trainer.config, rng)] * 60
        curves.append([float(trainer.step(x, y, lr=0.01)["loss"]) for x, y in steps])
    assert curves[0][-1] < curves[0][0] - 0.02
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_labels_are_checked(backend):
    trainer = make_trainer("mlp", 0, backend)
    x, y = np.zeros((2, 5), np.float32), np.array([0, 3])
    with pytest.raises(ValueError, match="label"):
        trainer.step(x, y, lr=0.1)
