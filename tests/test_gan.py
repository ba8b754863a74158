"""The mathematics of gan/ against independent calculations; its classifier, classes and tasks."""

import math
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import BACKENDS, batches, copy_quick, load, load_file, make_run, make_task, make_trainer, result, run_here
from PIL import Image
from test_parity import array, randomise

data = load_file("gan", "data")


def players(w, z, x):
    """G's images, each norm with its running statistics, and D's s, for the first and the third of the small models."""
    running, w = ([a for name, a in w.items() if ("running" in name) == kind] for kind in (True, False))
    if not running:  # linear layers
        y = F.linear(F.leaky_relu(F.linear(F.leaky_relu(F.linear(z, *w[:2]), 0.2), *w[2:4]), 0.2), *w[4:6])
        s = F.leaky_relu(F.linear(F.leaky_relu(F.linear(x.flatten(1), *w[6:8]), 0.2), *w[8:10]), 0.2)
        return torch.tanh(y).reshape(x.shape), F.linear(s, *w[10:])
    y = F.linear(z, *w[:2]).reshape(16, 2, 2, 12).permute(0, 3, 1, 2)
    y = F.interpolate(F.relu(F.batch_norm(y, *running[:2], *w[2:4])), scale_factor=2)
    y = F.relu(F.batch_norm(F.conv2d(y, w[4], padding=1), *running[2:], *w[5:7]))
    y = torch.tanh(F.conv2d(F.interpolate(y, scale_factor=2), *w[7:9], padding=1)).permute(0, 2, 3, 1)
    s = F.leaky_relu(F.conv2d(x.permute(0, 3, 1, 2), *w[9:11], stride=2, padding=1), 0.2)
    s = F.batch_norm(F.conv2d(s, w[11], stride=2, padding=1), None, None, *w[12:14], training=True)
    return y, F.linear(F.leaky_relu(s, 0.2).permute(0, 2, 3, 1).flatten(1), *w[14:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("i", [0, 2])
def test_players(i, backend):
    """G, D and V equal these chains of torch functions; of D's outputs, the one for the class counts."""
    trainer, (x, z, _) = make_trainer("gan", i, backend), (a[0] for a in batches("gan", i, 1)[0])
    w = randomise("gan", backend, trainer, 0.2)
    load("gan", backend).set_weights(trainer.average, {name.removeprefix("generator."): a for name, a in w.items()})
    w = {name: torch.from_numpy(a) for name, a in w.items()}
    made, s = players(w, torch.from_numpy(z), torch.from_numpy(x))
    np.testing.assert_allclose(trainer.generate(z), made, rtol=1e-3, atol=1e-4)
    ours = np.array(trainer.model.discriminator(array(backend, x), array(backend, z[:, 5:])).tolist())
    s, of_made = (a[range(16), z[:, 5:].argmax(1)] for a in (s, players(w, torch.from_numpy(z), made)[1]))
    np.testing.assert_allclose(ours, s, rtol=1e-3, atol=1e-3)
    value = (F.logsigmoid(s) + F.logsigmoid(-of_made)).mean()
    assert float(trainer.evaluate(x, z)["value"]) == pytest.approx(float(value), rel=1e-3)


def test_losses():
    """Both players' losses from D alone, and G's gradients in s: the table at the top of the file."""
    net, s = load("gan", "torch"), np.float32([-20, -2, -0.3, 0, 1, 5])
    players = dict(generator=lambda z: z, discriminator=lambda x, c: x)  # images are their own s
    d, real, fake = 1 / (1 + np.exp(-np.float64(s))), torch.from_numpy(s), torch.from_numpy(s[::-1].copy())
    for loss, values, slopes in (  # G's loss and its gradient
        ("minimax", np.log(1 - d), -d), ("non-saturating", -np.log(d), d - 1), ("wgan-gp", -s, -np.ones(6)),
    ):  # fmt: skip
        z = torch.tensor(s, requires_grad=True)
        ours, _ = net.generator_loss(SimpleNamespace(config=net.Config(loss=loss), **players), z[:, None])
        ours.backward()
        assert ours.item() == pytest.approx(values.mean(), rel=1e-5)
        np.testing.assert_allclose(z.grad * 6, slopes, rtol=1e-4, atol=1e-7)
    for smoothing in (0.0, 0.1):  # real images against the target 1 - smoothing
        model = SimpleNamespace(config=net.Config(smoothing=smoothing), **players)
        ours, seen = net.discriminator_loss(model, real, fake, None, None)
        target = torch.tensor([1 - smoothing] * 6 + [0.0] * 6)
        theirs = 2 * F.binary_cross_entropy_with_logits(torch.cat([real, fake]), target)
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5) and (seen == real).all()
    assert float(net.value(real, fake - 1, "wgan-gp")) == pytest.approx(1)


def test_critic():
    """The critic's whole loss in double precision, its slopes and its gradient by finite differences."""
    net, h = load("gan", "torch"), 1e-5
    model = make_trainer("gan", 1, "torch", penalty=net.Config.penalty).model.double()
    x, z, u = (torch.from_numpy(a[0, :3]).double() for a in batches("gan", 1, 1)[0])
    critic, fake = model.discriminator, model.generator(z).detach()
    net.set_weights(critic, {name: 10 * w for name, w in net.get_weights(critic).items()})
    with torch.no_grad():
        y = u[:, None, None, None] * x + (1 - u[:, None, None, None]) * fake
        steps = h * torch.eye(y[0].numel(), dtype=y.dtype).reshape(-1, 1, *y[0].shape)
        up, down = (critic((y + step).flatten(0, 1)).reshape(-1, 3) for step in (steps, -steps))
        slope = (((up - down) / (2 * h)) ** 2).sum(0) ** 0.5
        expected = critic(fake).mean() - critic(x).mean() + 10 * ((slope - 1) ** 2).mean()
    assert net.discriminator_loss(model, x, fake, None, u)[0].item() == pytest.approx(expected.item(), rel=1e-6)
    for w in (critic.net[0].weight, critic.out.weight):
        torch.autograd.gradcheck(lambda w: net.discriminator_loss(model, x, fake, None, u)[0], w, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_average(backend, tmp_path):
    """The average follows G's weights and its norms' statistics, makes the images, and is restored from a file."""
    net, trainer = load("gan", backend), make_trainer("gan", 0, backend, ema=0.28)
    expected, steps = net.get_weights(trainer.model.generator), batches("gan", 0, 4)
    for (x, z, u), ema in zip(steps, (2 / 11, 3 / 12, 0.28, 0.28)):  # at first it follows more closely
        trainer.evaluate(x[0], z[0])
        trainer.step(x, z, u, lr=1e-2)
        for name, w in net.get_weights(trainer.model.generator).items():
            expected[name] = ema * expected[name] + (1 - ema) * w
    average = net.get_weights(trainer.average)
    assert average.keys() == expected.keys() and (average["net.0.running_mean"] != 0).all()  # as evaluation is over
    for name in average:
        np.testing.assert_allclose(average[name], expected[name], rtol=1e-5, atol=1e-6)
    x = trainer.generate(z := steps[0][1][0])
    assert np.abs(trainer.generate(z[:3]) - x[:3]).max() < 1e-6  # an image does not depend on the others in its batch
    trainer.save(tmp_path / "ckpt.npz", 4)
    for other in BACKENDS:
        again = make_trainer("gan", 0, other, seed=9)
        assert again.load(tmp_path / "ckpt.npz") == again.t == 4 and np.abs(again.generate(z) - x).max() < 1e-6
    assert np.abs(make_trainer("gan", 0, backend).generate(z) - x).max() > 0.01


def test_formulas():
    """V if q = p, far apart, for the best D; draws of p fall on the grid as P says; Fréchet's distance of normals."""
    rng, least = np.random.default_rng(0), -math.log(4)
    assert data.theory(data.P, np.full(100, 0.5)) == pytest.approx({"value": least, "bound": least, "off": 0}, abs=1e-9)
    apart = np.float64(data.P < 3e-4)
    assert data.theory(apart / apart.sum(), np.full(100, 0.5))["bound"] == pytest.approx(0, abs=0.02)
    q = (q := rng.random(100) * (data.GRID > -0.2)) / q.sum()
    figures = data.theory(q, best := data.P / (data.P + q))
    assert figures["value"] == pytest.approx(figures["bound"], abs=1e-6) and figures["off"] < 1e-9
    for _ in range(20):
        other = data.theory(q, (best + rng.normal(0, 0.1, 100)).clip(0.001, 0.999))
        assert other["value"] < figures["value"] and other["off"] > 0.01
    entropies = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in (data.P, q, (data.P + q) / 2)]
    assert figures["bound"] == pytest.approx(2 * entropies[2] - entropies[0] - entropies[1] + least)
    share = np.histogram(x := data.draw_p(rng, (400, 500)), 100, (-1, 1))[0] / x.size
    assert x.dtype == np.float32 and np.abs(share - data.P).max() < 6 * math.sqrt(data.P.max() / x.size)
    std, turn = np.array([[1, 2, 0.5], [2, 1, 0.5]]), np.linalg.qr(rng.standard_normal((3, 3)))[0]
    a, b = rng.standard_normal((2, 200_000, 3)) * std[:, None] + np.array([[0, 0, 0], [1, 0, 2]])[:, None]
    assert data.frechet(a @ turn, b @ turn) == pytest.approx(5 + np.square(std[0] - std[1]).sum(), rel=0.02)
    assert data.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_best_discriminator():
    """With G fixed, D learns p / (p + q), and the value rises to -log 4 + 2 JSD(p, q) and not above."""
    net, rng = load("gan", "mlx"), np.random.default_rng(0)
    trainer = net.Trainer(net.Config([1, 1, 1], latent=4, hidden=[32, 32], model="gan", ema=0.0), device="cpu")
    first = data.theory(*data.look_at_game(trainer, 0))
    for step in range(150):
        x, z = data.draw_p(rng, (256, 1, 1, 1)), rng.standard_normal((256, 4), np.float32)
        loss = partial(net.discriminator_loss, trainer.model, mx.array(x), mx.array(trainer.generate(z)), None, None)
        trainer.update("discriminator", loss, 5e-3)
    figures = data.theory(*data.look_at_game(trainer, 0))
    assert first["off"] > 0.1 and first["value"] < first["bound"] - 0.1 and figures["bound"] == first["bound"] > -1.3
    assert figures["off"] < 0.05 and figures["bound"] - 0.05 < figures["value"] < figures["bound"]


def test_classes(tmp_path, capsys, monkeypatch):
    """The images in x[i] have the classes in z[i], and G is asked for all classes; images of a folder have none.

    Once D is right at 0.9, the run says so, but once.
    """
    task, trainer, _ = make_run("gan", "--size", 28, "--count", 1000, "--d-steps", 2, "--hidden", 8, "--out", tmp_path)
    (x, z, u), shape = task.batch(3), (64, 28, 28, 1)
    class_of = {(data.floats(a) * 2 - 1).tobytes(): y for a, y in zip(task.train, data.make_digits(1000, 0)[1])}
    assert x.shape == (2, 32, 28, 28, 1) and z.shape == (3, 32, 74) and u.shape == (2, 32)
    assert (z[..., 64:].sum(-1) == 1).all() and z[2, :, 64:].any(0).all()
    assert [class_of[a.tobytes()] for a in x.reshape(shape)] == z[:2, :, 64:].argmax(-1).ravel().tolist()
    assert (task.z[:, 64:].argmax(1) == task.y).all() and task.test.shape == (1000, 28, 28, 1)
    for value, said in ((2 * math.log(0.89), 0), (2 * math.log(0.91), 1), (-0.1, 0)):
        monkeypatch.setattr(trainer, "evaluate", lambda x, z, value=value: {"value": value})
        task.evaluate(trainer)
        assert capsys.readouterr().out.count("discriminator has won") == said
    (tmp_path / "looks.png").unlink()
    for i, image in enumerate(data.make_flowers(18, 24, 0)[0]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    task = make_task("gan", "--data", tmp_path, "--size", 16)
    assert task.config == {"image": [16, 16, 3], "n_class": 0} and task.batch(0)[1].shape == (2, 32, 64)


def test_runs(tmp_path):
    """Flowers in colour, wgan-gp; the twin continues where the first stopped: the strips of both are in the image."""
    folder, heights = copy_quick("gan", tmp_path / "gan"), []
    args = "--data flowers --size 16 --count 200 --hidden 8 --loss wgan-gp --batch-size 16 --d-steps 2 --steps".split()
    for backend, more in (("mlx", ["3"]), ("torch", ["6", "--resume"])):
        ended = result(folder, backend, *args, *more, run=run_here)
        assert {"D(x)", "D(G(z))", "g_loss"} <= set(ended["printed"].split()) and "has won" not in ended["printed"]
        with Image.open(ended["out"] / "looks.png") as looks, Image.open(ended["out"] / "sample.png") as sample:
            assert looks.width == 12 * 16 and np.asarray(looks).std() > 0.5
            heights.append((looks.height, sample.height))
    assert heights[0][0] % 16 == 0 and heights[1] > heights[0]
