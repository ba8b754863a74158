"""The by-hand half of mlp/ against the frameworks' own: activations, losses, gradients, optimizers, training."""

import csv
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
import torch
from folders import BACKENDS, FOLDERS, copy_alone, load, load_file, make_task, make_trainer, result, run_here
from test_parity import loss_and_grads

LOSSES = ["cross_entropy", "binary_cross_entropy", "mse"]
ACTIVATIONS = ["relu", "sigmoid", "tanh"]


# ---- by hand ---------------------------------------------------------------------------------------------------------


def array(backend, x):
    return torch.from_numpy(x) if backend == "torch" else mx.array(x)


@pytest.mark.parametrize("scale", [1.0, 60.0])  # 60: extreme logits, where a naive softmax or logarithm overflows
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_by_hand(activation, loss, scale):
    """The loss and the gradients are autograd's; the biases are not 0."""
    for backend in BACKENDS:
        net, rng = load("mlp", backend), np.random.default_rng(1)
        trainer = make_trainer("mlp", 0, backend, hidden=[9, 7], n_out=4, activation=activation, loss=loss)
        weights = {name: w + rng.normal(0, 0.1, w.shape) for name, w in net.get_weights(trainer.model).items()}
        net.set_weights(trainer.model, {name: w.astype(np.float32) for name, w in weights.items()})
        x, y = FOLDERS["mlp"].batch(trainer.config, rng)
        x = x * np.float32(scale)
        value, grads = net.loss_and_grads_by_hand(trainer.model, array(backend, x), array(backend, y))
        expected, theirs = loss_and_grads("mlp", trainer, backend, (x, y))
        assert float(value) == pytest.approx(expected, rel=1e-5) and grads.keys() == theirs.keys()
        for name, g in theirs.items():
            np.testing.assert_allclose(np.array(grads[name].tolist()), g, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name, moments", [("sgd", 0), ("momentum", 1), ("adam", 2)])
def test_optimizers_by_hand(name, moments):
    """Twelve updates are those of torch.optim, also where gradients are as small as Adam's eps."""
    rng = np.random.default_rng(2)
    p, grads = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=(12, 4, 3)).astype(np.float32)
    grads[:, 0] *= 1e-8
    a = torch.nn.Parameter(torch.tensor(p))
    theirs = torch.optim.Adam([a], 0.1) if name == "adam" else torch.optim.SGD([a], 0.1, momentum=0.9 * moments)
    for a.grad in map(torch.from_numpy, grads):
        theirs.step()
    for backend in BACKENDS:
        ours, state = array(backend, p), [array(backend, np.zeros_like(p)) for _ in range(moments)]
        for t, g in enumerate(grads, 1):
            ours, *state = getattr(load("mlp", backend), name)(ours, array(backend, g), 0.1, t, *state)
        assert np.abs(np.array(ours.tolist()) - p).max() > 0.1
        np.testing.assert_allclose(np.array(ours.tolist()), a.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_by_hand(backend, optimizer):
    """--grad by-hand gives the curve of autograd and the framework's own optimizer."""
    curves = []
    for grad in ("autograd", "by-hand"):
        trainer = make_trainer("mlp", 0, backend, grad=grad, optimizer=optimizer)
        rng = np.random.default_rng(0)
        steps = [FOLDERS["mlp"].batch(trainer.config, rng)] * 60
        curves.append([float(trainer.step(x, y, lr=0.01)["loss"]) for x, y in steps])
    assert curves[0][-1] < curves[0][0] - 0.02
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)


# ---- the trainer and the tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_starting_weights(backend):
    """N(0, 2/n_in) for relu, else N(0, 2/(n_in + n_out)), biases 0; an invalid class number is refused."""
    net = load("mlp", backend)
    for activation in ACTIVATIONS:
        trainer = net.Trainer(net.Config(n_in=50, hidden=[90], n_out=40, activation=activation))
        assert trainer.device in net.devices()
        for name, w in net.get_weights(trainer.model).items():
            if w.ndim == 1:
                assert not w.any()
            else:
                n = w.shape[1] / 2 if activation == "relu" else sum(w.shape) / 2
                assert w.std() * n**0.5 == pytest.approx(1, abs=0.05) and abs(w.mean()) < w.std() / 10
        with pytest.raises(ValueError, match="label"):
            trainer.step(np.zeros((2, 50), np.float32), np.array([0, 40]), lr=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("i", [0, 1, 2])
def test_predict(i, backend):
    """Probabilities that sum to 1; that of the answer 1; or the values: consistent with the loss and the figures."""
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


def test_drawn_data():
    """Three arms of four thirds of a turn, two half-circles in one another, a sine: with noise of 0.02, 0.12, 0.2."""
    data, n = load_file("mlp", "data"), 20000
    x, y = data.make_spiral(n, 0)
    r = np.hypot(*x.T)
    turn = (np.arctan2(x[:, 1], x[:, 0]) / 2 / np.pi - y / 3 - 4 / 3 * (r - 0.1) / 0.9 + 0.5) % 1 - 0.5
    assert abs(turn.mean()) < 0.005 and turn[r > 0.5].std() == pytest.approx(0.03, rel=0.05)
    np.testing.assert_allclose(np.quantile(r, [0.01, 0.5, 0.99]), [0.11, 0.55, 0.99], atol=0.02)
    np.testing.assert_allclose(np.bincount(y) / n, 1 / 3, atol=0.02)
    x, y = data.make_moons(n, 0)
    u = np.where(y[:, None] == 1, [1, 0.5] - (x + [0.5, 0.25]), x + [0.5, 0.25])
    assert np.hypot(*u.T).std() == pytest.approx(0.12, rel=0.05) and np.hypot(*u.T).mean() == pytest.approx(1, abs=0.02)
    for label in (0, 1):
        np.testing.assert_allclose(u[y == label].mean(0), [0, 2 / np.pi], atol=0.03)
    assert np.bincount(y)[1] / n == pytest.approx(0.5, abs=0.02)
    x, y = data.make_sine(n, 0)
    noise = y - np.sin(x[:, 0])
    assert abs(noise.mean()) < 0.01 and noise.std() == pytest.approx(0.2, rel=0.05)
    np.testing.assert_allclose(np.quantile(x, [0, 0.5, 1]), [-6, 0, 6], atol=0.15)


@pytest.mark.parametrize("name", ["spiral", "binary", "regression"])
def test_figures_are_of_held_out_rows(name):
    """The figures of a task are computed on data that is in no batch."""
    task, trainer = make_task("mlp", "--task", name), mock.Mock(evaluate=mock.Mock(return_value={"val_loss": 0.25}))
    task.evaluate(trainer, whole=True)
    held, answers = trainer.evaluate.call_args.args
    rows = {row.tobytes() for row in held}
    assert len(held) == len(answers) == 2000 and len(rows) > 1990
    assert not any(row.tobytes() in rows for row in task.batch(0)[0])


# ---- the user's own tables -------------------------------------------------------------------------------------------


def write(path, rows, header="", end="\n"):
    lines = [header] * bool(header) + [",".join(f"{cell:.12g}" for cell in row) for row in rows]
    path.write_text("\n".join(lines) + end)


def houses(n, seed):
    """Rows of three features of very different sizes, and a price of about 100,000 that depends on them."""
    x = np.random.default_rng(seed).normal(size=(n, 3))
    price = 100_000 + 5_000 * x[:, 0] - 3_000 * np.tanh(2 * x[:, 1]) * x[:, 2]
    return np.column_stack([x * [1000, 1, 1e-6] + [5, -80, 0], price])


def test_prices(tmp_path):
    """A target far from 0 is learned; figures and predictions are in its units, and the twin continues from there."""
    folder, table, rows = copy_alone("mlp", tmp_path / "mlp"), houses(500, 0), houses(40, 1)
    write(folder / "houses.csv", table, "size,place,age,price", end="\n\n")
    write(folder / "rows.csv", rows[:, :3])
    args = ["--task", "regression", "--data", "houses.csv"]
    trained = result(folder, "torch", *args, "--steps", 300, "--batch-size", 64, run=run_here)
    resumed = ["--task", "regression", "--steps", 0, "--resume", "--predict"]
    answered = result(folder, "mlx", *resumed, "rows.csv", run=run_here)
    for figures in (trained, answered):  # 0.98; unscaled, the target would be out of reach
        assert figures["r2"] > 0.9
        held = table[4::5, 3]
        assert figures["r2"] == pytest.approx(1 - figures["val_loss"] / held.var(), abs=1e-3)
    with open(answered["out"] / "predictions.csv") as f:
        (name,), *answers = csv.reader(f)
    errors = np.array(answers, float)[:, 0] - rows[:, 3]
    assert name == "prediction" and 1 - (errors**2).mean() / rows[:, 3].var() > 0.8
    code, _, err = run_here(folder, "torch", *resumed, "houses.csv")
    assert code == 2 and "houses.csv has 4 columns" in err and err.count("\n") == 1


def test_a_small_table(tmp_path):
    """150 rows of three kinds, sorted by the kind and without a header, are learned by the defaults, as iris is."""
    folder, rng = copy_alone("mlp", tmp_path / "mlp"), np.random.default_rng(0)
    y = np.arange(150) // 50
    x = rng.normal(size=(150, 4)) * 0.4 + np.array([[5, 3.4, 1.5, 0.2], [5.9, 2.8, 4.3, 1.3], [6.6, 3, 5.6, 2]])[y]
    write(folder / "iris.csv", np.column_stack([x, y]))
    write(folder / "rows.csv", x, "a,b,c,d")
    figures = result(folder, "torch", "--data", "iris.csv", "--predict", "rows.csv", run=run_here)
    assert "120 to train on, 30 held out, each 3% of" in figures["printed"] and figures["accuracy"] > 0.85
    with open(figures["out"] / "predictions.csv") as f:
        header, *answers = csv.reader(f)
    table = np.array(answers, float)
    assert header == ["class", "p0", "p1", "p2"] and (table[:, 0] == y).mean() > 0.9
    np.testing.assert_allclose(table[:, 1:].sum(1), 1, rtol=1e-5)
    assert (table[:, 1:].argmax(1) == table[:, 0]).all()


@pytest.mark.parametrize("text", [
    "a,b\n" + "1,0\n" * 12, "1,0\n" * 12 + "\n\n", "\ufeffa,b\r\n" + "1,0\r\n" * 12, "1e-3, -2.5\n" * 12,
])  # fmt: skip
def test_read_csv(text, tmp_path):
    (tmp_path / "t.csv").write_bytes(text.encode())
    assert load_file("mlp", "data").read_csv(tmp_path / "t.csv").shape == (12, 2)


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
