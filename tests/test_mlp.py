"""The by-hand half of mlp/ against the frameworks' own: activations, losses, gradients, optimizers, training."""

import csv

import mlx.core as mx
import mlx.optimizers as mlx_optim
import numpy as np
import pytest
import torch
from folders import FOLDERS, copy_alone, load, load_file, make_task, make_trainer, result, run

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


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_damaged_checkpoints(backend, tmp_path):
    """load refuses, by its name, an array that is missing or has another shape: weights and moments."""
    trainer = make_trainer("mlp", 0, backend)
    trainer.save(tmp_path / "a.npz", 1)
    with np.load(tmp_path / "a.npz") as f:
        arrays = dict(f)
    for name in ("layers.0.weight", "m.layers.1.bias", "v.layers.2.weight"):
        for other in ({}, {name: arrays[name][:1]}):
            np.savez(tmp_path / "b.npz", **{key: a for key, a in arrays.items() if key != name} | other)
            with pytest.raises(ValueError, match=f"^{name} "):
                trainer.load(tmp_path / "b.npz")


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("i", [0, 1, 2])
def test_predict(i, backend):
    """Probabilities that sum to 1; that of the answer 1; or the values: each is what the loss and figures speak of."""
    trainer = make_trainer("mlp", i, backend)
    x, y = FOLDERS["mlp"].batch(trainer.config, np.random.default_rng(0))
    p, figures = trainer.predict(x), {name: float(value) for name, value in trainer.evaluate(x, y).items()}
    loss = trainer.config.loss
    if loss == "mse":
        assert figures == {"val_loss": pytest.approx(((p - y) ** 2).mean(), rel=1e-4)} and p.min() < 0
    elif loss == "cross_entropy":
        np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
        assert figures["val_loss"] == pytest.approx(-np.log(p[np.arange(len(y)), y]).mean(), rel=1e-4)
        assert figures["accuracy"] == pytest.approx((p.argmax(1) == y).mean())
    else:
        nll = -np.log(np.where(y > 0, p, 1 - p)).mean()
        assert figures["val_loss"] == pytest.approx(nll, rel=1e-4)
        assert figures["accuracy"] == pytest.approx(((p > 0.5) == (y > 0)).mean())


@pytest.mark.parametrize("name", ["spiral", "binary", "regression", "digits"])
def test_figures_are_of_held_out_rows(name):
    """The figures of a task are those of the part that no batch comes from."""
    task, seen = make_task("mlp", "--task", name), []

    class Listener:
        def evaluate(self, x, y):
            seen.append((x, y))
            return {"val_loss": 0.25}

    task.evaluate(Listener())
    task.evaluate(Listener(), whole=True)
    x, y = task.batch(0)
    assert len(seen[-1][0]) == len(seen[-1][1]) == 2000 and seen[-1][0].shape[1:] == x.shape[1:]
    rows = {row.tobytes() for row in seen[-1][0]}
    assert len(rows) > 1990 and not any(row.tobytes() in rows for row in x)


# ---- the user's own tables -------------------------------------------------------------------------------------------


def write(path, rows, header="", end="\n"):
    lines = [header] * bool(header) + [",".join(f"{cell:.12g}" for cell in row) for row in rows]
    path.write_text("\n".join(lines) + end)


def houses(n, seed):
    """Rows of three features of quite different sizes, and a price of about 100,000 that hangs on them."""
    x = np.random.default_rng(seed).normal(size=(n, 3))
    price = 100_000 + 5_000 * x[:, 0] - 3_000 * np.tanh(2 * x[:, 1]) * x[:, 2]
    return np.column_stack([x * [1000, 1, 1e-6] + [5, -80, 0], price])


def test_prices(tmp_path):
    """A target far from 0 is learned; figures and predictions are in its units, and the twin goes on from there."""
    folder, table, rows = copy_alone("mlp", tmp_path / "mlp"), houses(500, 0), houses(40, 1)
    write(folder / "houses.csv", table, "size,place,age,price", end="\n\n")
    write(folder / "rows.csv", rows[:, :3])
    args = ["--task", "regression", "--data", "houses.csv"]
    trained = result(folder, "torch", *args, "--steps", 300, "--batch-size", 64)
    answered = result(folder, "mlx", "--task", "regression", "--steps", 0, "--resume", "--predict", "rows.csv")
    for figures in (trained, answered):  # 0.98; not scaled, the target is out of reach by then
        assert figures["r2"] > 0.9
        held = table[4::5, 3]
        assert figures["r2"] == pytest.approx(1 - figures["val_loss"] / held.var(), abs=1e-3)
    with open(answered["out"] / "predictions.csv") as f:
        (name,), *answers = csv.reader(f)
    errors = np.array(answers, float)[:, 0] - rows[:, 3]
    assert name == "prediction" and 1 - (errors**2).mean() / rows[:, 3].var() > 0.8
    code, _, err = run(folder, "torch", *args, "--steps", 0, "--resume", "--predict", "houses.csv")
    assert code == 2 and "houses.csv has 4 columns" in err and err.count("\n") == 1


def test_a_small_table(tmp_path):
    """150 rows of three kinds, sorted by the kind and without a header, are learned by the defaults, as iris is."""
    folder, rng = copy_alone("mlp", tmp_path / "mlp"), np.random.default_rng(0)
    y = np.arange(150) // 50
    x = rng.normal(size=(150, 4)) * 0.4 + np.array([[5, 3.4, 1.5, 0.2], [5.9, 2.8, 4.3, 1.3], [6.6, 3, 5.6, 2]])[y]
    write(folder / "iris.csv", np.column_stack([x, y]))
    write(folder / "rows.csv", x, "a,b,c,d")
    figures = result(folder, "torch", "--data", "iris.csv", "--predict", "rows.csv")
    assert "120 to train on, 30 held out" in figures["printed"] and figures["accuracy"] > 0.85
    with open(figures["out"] / "predictions.csv") as f:
        header, *answers = csv.reader(f)
    table = np.array(answers, float)
    assert header == ["class", "p0", "p1", "p2"] and (table[:, 0] == y).mean() > 0.9
    np.testing.assert_allclose(table[:, 1:].sum(1), 1, rtol=1e-5)
    assert (table[:, 1:].argmax(1) == table[:, 0]).all()


@pytest.mark.parametrize("text, rows", [
    ("a,b\n" + "1,0\n" * 12, 12),
    ("1,0\n" * 12 + "\n\n", 12),
    ("\ufeffa,b\r\n" + "1,0\r\n" * 12, 12),
    ("1e-3, -2.5\n" * 12, 12),
])  # fmt: skip
def test_read_csv(text, rows, tmp_path):
    (tmp_path / "t.csv").write_bytes(text.encode())
    assert load_file("mlp", "data").read_csv(tmp_path / "t.csv").shape == (rows, 2)


@pytest.mark.parametrize("text, reason", [
    ("1,0\n" * 12 + "1\n", "columns"),
    ("1,0\n" * 12 + "nan,1\n", "no gap"),
    ("1,0\n" * 12 + "1e31,1\n", "1e30"),
    ("a,b\n", "no gap"),
    ("1,0\n" * 12 + "1,1e9\n", "0 to 1000"),
    ("1,0\n" * 12 + "1,1001\n", "0 to 1000"),
    ("1,0\n" * 5, "10 rows"),
    ("0," * 20000 + "0\n", "10,000 columns"),
])  # fmt: skip
def test_bad_tables(text, reason, tmp_path, capsys):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(SystemExit):
        make_task("mlp", "--data", tmp_path / "t.csv")
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1
