"""The mathematics of gan/ against independent calculations; what it learns, as judged by a classifier."""

import math
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import BACKENDS, batches, copy_alone, load, load_file, make_run, make_task, make_trainer, result
from PIL import Image

data = load_file("gan", "data")


def array(backend, x):
    return torch.from_numpy(x) if backend == "torch" else mx.array(x)


def numpy(x):
    return x.detach().numpy() if isinstance(x, torch.Tensor) else np.array(x)


# ---- players and losses ----------------------------------------------------------------------------------------------


def conv_players(w, z, x):
    """G's images, each norm with its running statistics, and D's s, for the first of the small models."""
    statistics = [(w[f"generator.net.{i}.running_mean"], w[f"generator.net.{i}.running_var"]) for i in (0, 3)]
    w = [a for name, a in w.items() if "running" not in name]
    y = F.linear(z, *w[:2]).reshape(16, 2, 2, 12).permute(0, 3, 1, 2)
    y = F.relu(F.batch_norm(y, *statistics[0], *w[2:4])).repeat_interleave(2, 2).repeat_interleave(2, 3)
    y = F.relu(F.batch_norm(F.conv2d(y, w[4], padding=1), *statistics[1], *w[5:7]))
    y = torch.tanh(F.conv2d(y.repeat_interleave(2, 2).repeat_interleave(2, 3), *w[7:9], padding=1))
    s = F.leaky_relu(F.conv2d(x.permute(0, 3, 1, 2), *w[9:11], stride=2, padding=1), 0.2)
    s = F.batch_norm(F.conv2d(s, w[11], stride=2, padding=1), None, None, *w[12:14], training=True)
    return y.permute(0, 2, 3, 1), F.linear(F.leaky_relu(s, 0.2).permute(0, 2, 3, 1).flatten(1), *w[14:])


def linear_players(w, z, x):
    """The same for the third model, with linear layers."""
    w = list(w.values())
    y = F.linear(F.leaky_relu(F.linear(F.leaky_relu(F.linear(z, *w[:2]), 0.2), *w[2:4]), 0.2), *w[4:6])
    s = F.leaky_relu(F.linear(F.leaky_relu(F.linear(x.flatten(1), *w[6:8]), 0.2), *w[8:10]), 0.2)
    return torch.tanh(y).reshape(x.shape), F.linear(s, *w[10:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("i, players", [(0, conv_players), (2, linear_players)])
def test_players(i, players, backend):
    """G and D equal these chains of torch functions; of D's outputs, the one for the class counts."""
    net, trainer, rng = load("gan", backend), make_trainer("gan", i, backend), np.random.default_rng(0)
    names = load("gan", "torch").get_weights(make_trainer("gan", i, "torch").model)  # in the order of the layers
    w = {name: np.float32(rng.normal(0, 0.4, a.shape)) for name, a in names.items()}
    w = {name: a**2 + 0.1 if "var" in name else a for name, a in w.items()}
    net.set_weights(trainer.model, w)
    net.set_weights(trainer.average, {name[10:]: a for name, a in w.items() if name.startswith("generator.")})
    x, z, _ = (a[0] for a in batches("gan", i, 1)[0])
    made, s = players({name: torch.from_numpy(a) for name, a in w.items()}, torch.from_numpy(z), torch.from_numpy(x))
    np.testing.assert_allclose(trainer.generate(z), made, rtol=1e-3, atol=1e-4)
    ours = numpy(trainer.model.discriminator(array(backend, x), array(backend, z[:, 5:])))
    np.testing.assert_allclose(ours, s[range(16), z[:, 5:].argmax(1)], rtol=1e-3, atol=1e-3)


class Numbers:
    """Players whose images are their own s, to test the losses only: G(z) = z and s(x) = x."""

    def __init__(self, config):
        self.config, self.generator, self.discriminator = config, lambda z: z, lambda x, c: x


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses(backend):
    """Both players' losses from D alone, and their gradients in s: the table at the top of the file."""
    net, s = load("gan", backend), np.float32([-20, -2, -0.3, 0, 1, 5])
    d = 1 / (1 + np.exp(-np.float64(s)))
    expected = {  # G's loss, its gradient
        "minimax": (np.log(1 - d), -d),
        "non-saturating": (-np.log(d), d - 1),
        "wgan-gp": (-s, -np.ones(6)),
    }
    for loss, (values, slopes) in expected.items():
        model = Numbers(net.Config(loss=loss))

        def of(z):
            return net.generator_loss(model, z[:, None])[0]

        if backend == "torch":
            z = torch.from_numpy(s).requires_grad_()
            of(z).backward()
            slope = z.grad.numpy()
        else:
            slope = np.array(mx.grad(of)(mx.array(s)))
        np.testing.assert_allclose(float(numpy(of(array(backend, s)))), values.mean(), rtol=1e-5)
        np.testing.assert_allclose(slope * 6, slopes, rtol=1e-4, atol=1e-7)
    real, fake = array(backend, s), array(backend, s[::-1].copy())
    for smoothing in (0.0, 0.1):  # binary cross-entropy, real images against the target 1 - smoothing
        config, logits = net.Config(smoothing=smoothing), torch.from_numpy(s)
        ours, seen = net.discriminator_loss(Numbers(config), real, fake, None, None)
        theirs = F.binary_cross_entropy_with_logits(logits, torch.full((6,), 1 - smoothing))
        theirs = theirs + F.binary_cross_entropy_with_logits(logits.flip(0), torch.zeros(6))
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5) and (numpy(seen) == s).all()
    assert float(net.value(real, fake - 1, "wgan-gp")) == pytest.approx(1)
    with np.errstate(divide="ignore"):
        v = np.log(d).mean() + np.log(1 - d).mean()
    assert float(net.value(real, fake, "minimax")) == pytest.approx(v, rel=1e-5)


def test_critic():
    """The critic's whole loss in double precision, its slopes and then its gradient by finite differences."""
    net, trainer = load("gan", "torch"), make_trainer("gan", 1, "torch")
    x, z, u = (torch.from_numpy(a[0, :3]).double() for a in batches("gan", 1, 1)[0])
    model, h = trainer.model.double(), 1e-5
    with torch.no_grad():
        for p in model.discriminator.parameters():
            p *= 10
        fake, critic = model.generator(z), model.discriminator
        y = u[:, None, None, None] * x + (1 - u[:, None, None, None]) * fake
        steps = h * torch.eye(y[0].numel(), dtype=y.dtype).reshape(-1, 1, *y[0].shape)

        def loss():
            up, down = (critic((y + step).flatten(0, 1)).reshape(-1, 3) for step in (steps, -steps))
            slope = (((up - down) / (2 * h)) ** 2).sum(0) ** 0.5
            return critic(fake).mean() - critic(x).mean() + 2 * ((slope - 1) ** 2).mean()

        expected, p = loss(), critic.net[0].weight
        p[0, 2, 1, 3] += 1e-4
        up = loss()
        p[0, 2, 1, 3] -= 2e-4
        slope = (up - loss()) / 2e-4
        p[0, 2, 1, 3] += 1e-4
    ours, _ = net.discriminator_loss(model, x, fake, None, u)
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(expected), rel=1e-6)
    assert float(p.grad[0, 2, 1, 3]) == pytest.approx(float(slope), rel=1e-4) and abs(slope) > 0.003


# ---- the start, two rates, two optimizers, the average ---------------------------------------------------------------


@pytest.mark.parametrize("i, hidden", [(0, [32, 64]), (2, [400, 300])])
def test_start(i, hidden):
    """DCGAN's weights N(0, 0.02^2), its norms' N(1, 0.02^2); linear ones N(0, 2/n_in); biases 0, variances 1."""
    trainer = make_trainer("gan", i, "torch", device=None, hidden=hidden)
    for name, w in load("gan", "torch").get_weights(trainer.model).items():
        if name.endswith("weight"):
            scale = (w.std() if w.ndim > 1 else (w - 1).std()) / (0.02 if i == 0 else math.sqrt(2 / w.shape[1]))
            assert scale == pytest.approx(1, abs=5 / math.sqrt(w.size)), name
            assert abs(w.mean() - (w.ndim == 1)) < 5 * w.std() / math.sqrt(w.size), name
        else:
            assert (w == name.endswith("running_var")).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("i, betas", [(0, (0.5, 0.999)), (1, (0.0, 0.9))])
def test_rates(i, betas, backend, tmp_path):
    """Adam's first update moves a weight by its rate: lr for G and d_lr times that for D; moments have these betas."""
    net, trainer = load("gan", backend), make_trainer("gan", i, backend, d_lr=3.0, d_steps=1)
    before = net.get_weights(trainer.model)
    trainer.step(*(a[-2:] if len(a) == 3 else a[-1:] for a in batches("gan", i, 1)[0]), lr=1e-3)
    trainer.save(tmp_path / "ckpt.npz", 1)
    after = dict(np.load(tmp_path / "ckpt.npz"))
    for name, rate in (("generator.inp.weight", 1e-3), ("discriminator.out.weight", 3e-3)):
        assert np.abs(after[name] - before[name]).max() == pytest.approx(rate, rel=0.02)
        m, v = after[f"m.{name}"] / (1 - betas[0]), after[f"v.{name}"] / (1 - betas[1])  # the gradient, its square
        np.testing.assert_allclose(m**2, v, rtol=1e-2, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_average(backend, tmp_path):
    """The average follows G's weights and its norms' statistics, makes the images, and is restored from a file."""
    net, trainer = load("gan", backend), make_trainer("gan", 0, backend, ema=0.28)
    expected = net.get_weights(trainer.model.generator)
    for arrays, ema in zip(batches("gan", 0, 4), (2 / 11, 3 / 12, 0.28, 0.28)):  # at first it follows more closely
        trainer.step(*arrays, lr=1e-2)
        for name, w in net.get_weights(trainer.model.generator).items():
            expected[name] = ema * expected[name] + (1 - ema) * w
    average = net.get_weights(trainer.average)
    assert average.keys() == expected.keys() and any("running_var" in name for name in average)
    for name in average:
        np.testing.assert_allclose(average[name], expected[name], rtol=1e-5, atol=1e-6)
    z = batches("gan", 0, 1)[0][1][0]
    x = trainer.generate(z)
    assert np.abs(trainer.generate(z[:3]) - x[:3]).max() < 1e-6  # an image does not depend on the others in its batch
    trainer.save(tmp_path / "ckpt.npz", 4)
    for other in BACKENDS:
        again = make_trainer("gan", 0, other, seed=9)
        again.load(tmp_path / "ckpt.npz")
        assert again.t == 4 and np.abs(again.generate(z) - x).max() < 1e-6
    assert np.abs(make_trainer("gan", 0, backend).generate(z) - x).max() > 0.01


# ---- the theory ------------------------------------------------------------------------------------------------------


def test_theory():
    """If q = p the value is -log 4, if they never overlap it is 0; and no D does better than the best."""
    half = np.full(100, 0.5)
    assert data.P.sum() == pytest.approx(1) and data.theory(data.P, half)["bound"] == pytest.approx(-math.log(4))
    assert data.theory(data.P, half)["off"] == pytest.approx(0, abs=1e-9)
    q = np.float64(data.P < 3e-4)
    assert data.theory(q / q.sum(), half)["bound"] == pytest.approx(0, abs=0.02)
    rng = np.random.default_rng(0)
    q = rng.random(100) * (data.GRID > -0.2)
    q, best = q / q.sum(), data.P / (data.P + q / q.sum())
    figures = data.theory(q, best)
    assert figures["value"] == pytest.approx(figures["bound"], abs=1e-6) and figures["off"] < 1e-9
    for _ in range(20):
        other = data.theory(q, (best + rng.normal(0, 0.1, 100)).clip(0.001, 0.999))
        assert other["value"] < figures["value"] and other["off"] > 0.01
    m = (data.P + q) / 2  # and the divergence by its definition
    with np.errstate(divide="ignore", invalid="ignore"):
        jsd = (np.nansum(data.P * np.log(data.P / m)) + np.nansum(q * np.log(q / m))) / 2
    assert figures["bound"] == pytest.approx(2 * jsd - math.log(4))
    x = data.draw_p(rng, (400, 500))  # samples of p fall on the grid as P says
    share = np.histogram(x, 100, (-1, 1))[0] / x.size
    assert x.dtype == np.float32 and np.abs(share - data.P).max() < 6 * math.sqrt(data.P.max() / x.size)


def test_best_discriminator():
    """With G fixed, D learns p / (p + q), and the value rises to -log 4 + 2 JSD(p, q) and not above."""
    net, rng = load("gan", "mlx"), np.random.default_rng(0)
    config = net.Config(image=[1, 1, 1], latent=4, hidden=[32, 32], model="gan", ema=0.0)
    trainer = net.Trainer(config, seed=0, device="cpu")
    q, d = data.look_at_game(trainer, 0)
    first = data.theory(q, d)
    for step in range(150):
        x, z = data.draw_p(rng, (256, 1, 1, 1)), rng.standard_normal((256, 4), np.float32)
        loss = partial(net.discriminator_loss, trainer.model, mx.array(x), mx.array(trainer.generate(z)), None, None)
        trainer.update("discriminator", loss, 5e-3)
    figures = data.theory(q, data.look_at_game(trainer, 0)[1])
    assert first["off"] > 0.1 and first["value"] < first["bound"] - 0.1
    assert figures["bound"] == first["bound"] > -1.3
    assert figures["off"] < 0.05 and figures["bound"] - 0.05 < figures["value"] < figures["bound"]


def test_toy(tmp_path):
    """A sixth of the usual game: q comes near p, and D stays at p / (p + q), better than the constant's -log 4."""
    folder = copy_alone("gan", tmp_path / "gan")
    first = result(folder, "mlx", "--task", "toy", "--steps", "0")
    last = result(folder, "torch", *"--task toy --steps 500 --out on".split())
    assert first["bound"] > -1.15 and first["off"] > 0.2 and first["value"] < first["bound"] - 0.2
    assert last["bound"] - 0.02 < last["value"] < last["bound"] < -1.28 and last["off"] < 0.05
    with Image.open(folder / "on/sample.png") as image:
        assert image.size == (800, 720) and np.asarray(image.convert("L")).std() > 8


# ---- data, figures, pictures -----------------------------------------------------------------------------------------


def test_frechet():
    """Normal samples against the closed form for covariances that commute; the distance to itself is 0."""
    rng, std = np.random.default_rng(0), np.array([[1, 2, 0.5], [2, 1, 0.5]])
    a, b = rng.standard_normal((2, 200_000, 3)) * std[:, None] + np.array([[0, 0, 0], [1, 0, 2]])[:, None]
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    assert data.frechet(a @ turn, b @ turn) == pytest.approx(5 + np.square(std[0] - std[1]).sum(), rel=0.02)
    assert data.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_classes(tmp_path):
    """The images in x[i] have the classes in z[i], and G is asked for all classes; images of a folder have none."""
    task = make_task("gan", "--count", 100, "--d-steps", 2, "--batch-size", 50)
    x, z, u = task.batch(3)
    class_of = {(data.floats(a) * 2 - 1).tobytes(): y for a, y in zip(task.train, data.make_digits(100, 0)[1])}
    assert x.shape == (2, 50, 32, 32, 1) and z.shape == (3, 50, 74) and u.shape == (2, 50)
    assert (z[..., 64:].sum(-1) == 1).all() and z[2, :, 64:].any(0).all()
    assert [class_of[a.tobytes()] for a in x.reshape(100, 32, 32, 1)] == z[:2, :, 64:].argmax(-1).ravel().tolist()
    assert (task.z[:, 64:].argmax(1) == task.y).all() and task.test.shape == (1000, 32, 32, 1)
    for i, image in enumerate(data.make_flowers(18, 24, 0)[0]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    task = make_task("gan", "--data", tmp_path, "--size", 16)
    assert task.config == {"image": [16, 16, 3], "n_class": 0} and task.batch(0)[1].shape == (2, 32, 64)


def test_runs(tmp_path):
    """Flowers in colour, wgan-gp; the twin continues where the first stopped: the strips of both are in the image."""
    folder = copy_alone("gan", tmp_path / "gan")
    args = ["--data", "flowers", "--size", "16", "--count", "200", "--hidden", "8", "--loss", "wgan-gp"]
    args += ["--batch-size", "16", "--d-steps", "2"]
    heights = []
    for backend, more in (("mlx", ["--steps", "6"]), ("torch", ["--steps", "12", "--resume"])):
        ended = result(folder, backend, *args, *more)
        assert {"D(x)", "D(G(z))", "g_loss"} <= set(ended["printed"].split()) and "has won" not in ended["printed"]
        with Image.open(ended["out"] / "looks.png") as looks, Image.open(ended["out"] / "sample.png") as sample:
            assert looks.width == 12 * 16 and np.asarray(looks).std() > 0.5
            heights.append((looks.height, sample.height))
    assert heights[0][0] == 16 and heights[1] > heights[0]


def test_won(tmp_path, capsys):
    """Once D(x) and 1 - D(G(z)) are 0.9, the run says that the discriminator has won; but once."""
    task, trainer, _ = make_run("gan", *"--count 100 --model gan --hidden 8 --out".split(), tmp_path)
    for value, said in ((2 * math.log(0.89), 0), (2 * math.log(0.91), 1), (-0.1, 0)):
        trainer.evaluate = lambda x, z: {"value": value}
        task.evaluate(trainer)
        assert capsys.readouterr().out.count("discriminator has won") == said


# ---- what it learns --------------------------------------------------------------------------------------------------


def test_quality(tmp_path):
    """A short run: all ten digits, mostly those asked for, and their features near those of real ones."""
    folder = copy_alone("gan", tmp_path / "gan")
    last = result(folder, "torch", *"--hidden 8 32 --size 28 --count 1500 --ema 0.98 --steps 300".split())
    assert last["frechet"] < 800 and last["least_share"] > 0.03 and last["asked"] > 0.7
    assert last["judge"] > 0.97 and 0.5 < last["sure"] < 1
