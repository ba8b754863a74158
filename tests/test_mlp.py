"""The by-hand half of mlp/ against the frameworks' own: activations, losses, gradients, optimizers, training."""

import itertools
from unittest import mock

import numpy as np
import pytest
import torch
from folders import BACKENDS, FOLDERS, copy_alone, load, load_file, make_task, make_trainer, result, run_here
from test_parity import array, loss_and_grads, randomise, refusal

LOSSES = ["cross_entropy", "binary_cross_entropy", "mse"]
EACH = pytest.mark.parametrize("backend", BACKENDS)


@EACH
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_by_hand(loss, backend):
    """The loss and the gradients are autograd's, for extreme logits too; the biases are not 0."""
    net, rng = load("mlp", backend), np.random.default_rng(1)
    for activation, scale in itertools.product(("relu", "sigmoid", "tanh"), (1, 60)):  # at 60, exp overflows
        trainer = make_trainer("mlp", 0, backend, hidden=[9, 7], n_out=4, activation=activation, loss=loss)
        randomise("mlp", backend, trainer)
        x, y = FOLDERS["mlp"].batch(trainer.config, rng)
        x *= np.float32(scale)
        value, grads = net.loss_and_grads_by_hand(trainer.model, array(backend, x), array(backend, y))
        expected, theirs = loss_and_grads("mlp", trainer, backend, (x, y))
        assert float(value) == pytest.approx(expected, rel=1e-5) and grads.keys() == theirs.keys()
        for name, g in theirs.items():
            np.testing.assert_allclose(np.array(grads[name].tolist()), g, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name, moments", [("sgd", 0), ("momentum", 1), ("adam", 2)])
def test_optimizers_by_hand(name, moments):
    """Twelve updates are those of torch.optim, also where gradients are as small as Adam's eps; so is a training."""
    rng, curves = np.random.default_rng(2), []
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
        for grad in ("autograd", "by-hand"):
            trainer, net = make_trainer("mlp", 0, backend, grad=grad, optimizer=name), load("mlp", backend)
            x, y = FOLDERS["mlp"].batch(trainer.config, np.random.default_rng(0))
            with mock.patch.object(net, "loss_and_grads_by_hand", wraps=net.loss_and_grads_by_hand) as by_hand:
                curves.append([float(trainer.step(x, y, lr=0.01)["loss"]) for _ in range(60)])
            assert by_hand.called == (grad == "by-hand")
    assert curves[0][-1] < curves[0][0] - 0.02
    np.testing.assert_allclose(curves, [curves[0]] * 4, rtol=1e-4)


@EACH
def test_predict(backend):
    """Probabilities that sum to 1; that of the answer 1; or the values: consistent with the loss and the figures."""
    for i, loss in enumerate(LOSSES):
        trainer = make_trainer("mlp", i, backend)
        x, y = FOLDERS["mlp"].batch(trainer.config, np.random.default_rng(0))
        p, figures = trainer.predict(x), {name: float(value) for name, value in trainer.evaluate(x, y).items()}
        if loss == "cross_entropy":
            np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
            expected, right = -np.log(p[np.arange(len(y)), y]).mean(), p.argmax(1) == y
        elif loss == "binary_cross_entropy":
            expected, right = -np.log(np.where(y > 0, p, 1 - p)).mean(), (p > 0.5) == (y > 0)
        else:
            expected, right = ((p - y) ** 2).mean(), []
            assert p.min() < 0
        accuracy = {"accuracy": pytest.approx(np.mean(right))} if len(right) else {}
        assert figures == {"val_loss": pytest.approx(expected, rel=1e-4), **accuracy}


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


def test_prices(tmp_path):
    """A target far from 0 is learned; figures and predictions are in its units, and the twin continues from there."""
    folder, x = copy_alone("mlp", tmp_path / "mlp"), np.random.default_rng(0).normal(size=(540, 3))
    price = 100_000 + 5_000 * x[:, 0] - 3_000 * np.tanh(2 * x[:, 1]) * x[:, 2]
    table = np.column_stack([x * [1000, 1, 1e-6] + [5, -80, 0], price])  # features of very different sizes
    table, rows = table[:500], table[500:]
    np.savetxt(folder / "houses.csv", table, "%.12g", ",", header="size,place,age,price", comments="")
    np.savetxt(folder / "rows.csv", rows[:, :3], "%.12g", ",")
    args = ["--task", "regression", "--steps", 0, "--resume", "--predict"]
    trained = result(folder, "torch", *args[:2], *"--data houses.csv --steps 300 --batch-size 64".split(), run=run_here)
    answered = result(folder, "mlx", *args, "rows.csv", run=run_here)
    for figures in (trained, answered):  # 0.98; unscaled, the target would be out of reach
        assert figures["r2"] > 0.9
        assert figures["r2"] == pytest.approx(1 - figures["val_loss"] / table[4::5, 3].var(), abs=1e-3)
    header, *answers = (answered["out"] / "predictions.csv").read_text().splitlines()
    errors = np.array(answers, float) - rows[:, 3]
    assert header == "prediction" and 1 - (errors**2).mean() / rows[:, 3].var() > 0.8
    code, _, err = run_here(folder, "torch", *args, "houses.csv")
    assert code == 2 and "houses.csv has 4 columns" in err and err.count("\n") == 1


def test_a_small_table(tmp_path):
    """150 rows of three kinds, sorted by the kind and without a header, are learned by the defaults, as iris is."""
    folder, rng, y = copy_alone("mlp", tmp_path / "mlp"), np.random.default_rng(0), np.arange(150) // 50
    x = rng.normal(size=(150, 4)) * 0.4 + np.array([[5, 3.4, 1.5, 0.2], [5.9, 2.8, 4.3, 1.3], [6.6, 3, 5.6, 2]])[y]
    np.savetxt(folder / "iris.csv", np.column_stack([x, y]), "%.12g", ",")
    np.savetxt(folder / "rows.csv", x, "%.12g", ",", header="a,b,c,d", comments="")
    figures = result(folder, "torch", "--data", "iris.csv", "--predict", "rows.csv", run=run_here)
    assert "120 to train on, 30 held out, each worth 3%" in figures["printed"] and figures["accuracy"] > 0.85
    header, *answers = (figures["out"] / "predictions.csv").read_text().splitlines()
    table = np.loadtxt(answers, delimiter=",")
    assert header == "class,p0,p1,p2" and (table[:, 0] == y).mean() > 0.9
    np.testing.assert_allclose(table[:, 1:].sum(1), 1, rtol=1e-5)
    assert (table[:, 1:].argmax(1) == table[:, 0]).all()


def test_read_csv(tmp_path, capsys):
    """A header, blank lines, a byte-order mark and spaces are read; what is wrong in a table is said in one line."""
    path, rows = tmp_path / "t.csv", "1,0\n" * 12
    for text in ("a,b\n" + rows, rows + "\n\n", "\ufeffa,b\r\n" + "1,0\r\n" * 12, "1e-3, -2.5\n" * 12):
        path.write_bytes(text.encode())
        assert load_file("mlp", "data").read_csv(path).shape == (12, 2)
    for text, reason in (
        (rows + "1\n", "columns"), (rows + "nan,1\n", "missing"), (rows + "1e31,1\n", "1e30"), ("a,b\n", "missing"),
        (rows + "1,1e9\n", "0 to 1000"), (rows + "1,1001\n", "0 to 1000"), (rows + "1,0.5\n", "class numbers"),
        ("1,0\n" * 9, "10 rows"), ("1\n" * 12, "2 columns"), ("0," * 20000 + "0\n", "10,000 columns"),
    ):  # fmt: skip
        path.write_text(text)
        assert reason in refusal(capsys, make_task, "mlp", "--data", path)
