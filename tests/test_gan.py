"""The mathematics of gan/ against other ways to the same figures; what it learns, as a classifier sees it."""

import math
from functools import partial

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import BACKENDS, batches, copy_alone, load, load_file, make_task, make_trainer, result
from PIL import Image

data = load_file("gan", "data")


def array(backend, x):
    return torch.from_numpy(x) if backend == "torch" else mx.array(x)


def numpy(x):
    return x.detach().numpy() if isinstance(x, torch.Tensor) else np.array(x)


# ---- layers and losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["Up", "Down"])
def test_layers(kind, bias):
    """Up and Down are torch's functions, and MLX's own layers, with the weights where the checkpoint has them."""
    rng = np.random.default_rng(0)
    x, b = rng.standard_normal((2, 6, 4, 3), np.float32), rng.standard_normal(5, np.float32)
    w = rng.standard_normal((3, 5, 4, 4) if kind == "Up" else (5, 3, 4, 4), np.float32)
    function = F.conv_transpose2d if kind == "Up" else F.conv2d
    channels = torch.from_numpy(x).permute(0, 3, 1, 2)
    expected = function(channels, torch.from_numpy(w), torch.from_numpy(b * bias), stride=2, padding=1)
    assert expected.shape == ((2, 5, 12, 8) if kind == "Up" else (2, 5, 3, 2))
    for backend in BACKENDS:
        layer = getattr(load("gan", backend), kind)(3, 5, bias=bias)
        if backend == "torch":
            layer.load_state_dict({"weight": torch.from_numpy(w)} | ({"bias": torch.from_numpy(b)} if bias else {}))
            y = layer(channels).detach()
        else:
            layer.weight = mx.array(w.transpose((1, 2, 3, 0) if kind == "Up" else (0, 2, 3, 1)))
            if bias:
                layer.bias = mx.array(b)
            y = np.array(layer(mx.array(x)))
            own = {"Up": mlx_nn.ConvTranspose2d, "Down": mlx_nn.Conv2d}[kind].__call__(layer, mx.array(x))
            np.testing.assert_allclose(y, np.array(own), atol=1e-4)
            y = y.transpose(0, 3, 1, 2)
        np.testing.assert_allclose(y, expected, atol=1e-4)


class Numbers:
    """Players whose pictures are their own s, for the losses alone: G(z) = z and s(x) = x."""

    def __init__(self, config):
        self.config, self.generator, self.discriminator = config, lambda z: z, lambda x: x


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses(backend):
    """Both players' losses from D alone, and what their gradients do in s: the table at the head of the file."""
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
            return net.generator_loss(model, z)[0]

        if backend == "torch":
            z = torch.from_numpy(s).requires_grad_()
            of(z).backward()
            slope = z.grad.numpy()
        else:
            slope = np.array(mx.grad(of)(mx.array(s)))
        np.testing.assert_allclose(float(numpy(of(array(backend, s)))), values.mean(), rtol=1e-5)
        np.testing.assert_allclose(slope * 6, slopes, rtol=1e-4, atol=1e-7)
    for smoothing in (0.0, 0.1):  # binary cross-entropy, real pictures against the target 1 - smoothing
        config = net.Config(smoothing=smoothing)
        ours, real = net.discriminator_loss(Numbers(config), array(backend, s), array(backend, s[::-1].copy()), None)
        logits = torch.from_numpy(s)
        theirs = F.binary_cross_entropy_with_logits(logits, torch.full((6,), 1 - smoothing))
        theirs = theirs + F.binary_cross_entropy_with_logits(logits.flip(0), torch.zeros(6))
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5) and (numpy(real) == s).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_penalty(backend):
    """A critic s = w x has the slope |w| everywhere: (|w| - 1)^2, and in w the gradient 2 (|w| - 1) w / |w|."""
    net, rng = load("gan", backend), np.random.default_rng(0)
    w, y = rng.standard_normal((4, 3, 2), np.float32), rng.standard_normal((5, 4, 3, 2), np.float32)

    def penalty(w):
        return net.gradient_penalty(lambda y: (y * w).reshape(len(y), -1).sum(-1), array(backend, y))

    norm = np.linalg.norm(w)
    if backend == "torch":
        v = torch.from_numpy(w).requires_grad_()
        penalty(v).backward()
        slope = v.grad.numpy()
    else:
        slope = np.array(mx.grad(penalty)(mx.array(w)))
    assert float(numpy(penalty(array(backend, w)))) == pytest.approx((norm - 1) ** 2, rel=1e-5)
    np.testing.assert_allclose(slope, 2 * (norm - 1) * w / norm, rtol=1e-4)


def test_critic():
    """The critic's whole loss in double precision, its slopes and then its gradient taken by small differences."""
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
    ours, _ = net.discriminator_loss(model, x, fake, u)
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(expected), rel=1e-6)
    assert float(p.grad[0, 2, 1, 3]) == pytest.approx(float(slope), rel=1e-4) and abs(slope) > 0.003


# ---- two rates, two optimizers, the average --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_rates(backend):
    """Adam's first update moves a weight by its rate: lr for G and d_lr as much for D; D's count of updates is kept."""
    net, trainer = load("gan", backend), make_trainer("gan", 0, backend, d_lr=3.0)
    before = net.get_weights(trainer.model)
    trainer.step(*batches("gan", 0, 1)[0], lr=1e-3)
    after = net.get_weights(trainer.model)
    for player, rate in (("generator", 1e-3), ("discriminator", 3e-3)):
        moved = max(np.abs(after[name] - before[name]).max() for name in after if name == f"{player}.net.0.bias")
        assert moved == pytest.approx(rate, rel=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_average(backend, tmp_path):
    """The average runs after G's weights and its norms' statistics, makes the pictures, and comes back from a file."""
    net, trainer = load("gan", backend), make_trainer("gan", 0, backend, ema=0.7)
    expected = net.get_weights(trainer.model.generator)
    for arrays in batches("gan", 0, 4):
        trainer.step(*arrays, lr=1e-2)
        for name, w in net.get_weights(trainer.model.generator).items():
            expected[name] = 0.7 * expected[name] + 0.3 * w
    average = net.get_weights(trainer.average)
    assert average.keys() == expected.keys() and any("running_var" in name for name in average)
    for name in average:
        np.testing.assert_allclose(average[name], expected[name], rtol=1e-5, atol=1e-6)
    z = batches("gan", 0, 1)[0][1][0]
    x = trainer.generate(z)
    assert np.abs(trainer.generate(z[:3]) - x[:3]).max() < 1e-6  # a picture does not depend on those beside it
    trainer.save(tmp_path / "ckpt.npz", 4)
    for other in BACKENDS:
        again = make_trainer("gan", 0, other, seed=9)
        again.load(tmp_path / "ckpt.npz")
        np.testing.assert_allclose(again.generate(z), x, atol=1e-6)
    assert np.abs(make_trainer("gan", 0, backend).generate(z) - x).max() > 0.01


# ---- the theory ------------------------------------------------------------------------------------------------------


def test_theory():
    """Where q = p the value is -log 4, where they never meet it is 0; and no D does better than the best."""
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


def test_draw_p():
    """Samples of p fall on the grid as P says."""
    x = data.draw_p(np.random.default_rng(0), (400, 500))
    assert x.shape == (400, 500) and x.dtype == np.float32
    share = np.histogram(x, 100, (-1, 1))[0] / x.size
    assert np.abs(share - data.P).max() < 6 * math.sqrt(data.P.max() / x.size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_best_discriminator(backend):
    """G held still, D learns p / (p + q), and the value climbs to -log 4 + 2 JSD(p, q) and not above."""
    net, rng = load("gan", backend), np.random.default_rng(0)
    trainer = net.Trainer(net.Config([1, 1, 1], 4, [32, 32], "gan", ema=0.0), seed=0, device="cpu")
    q, d = data.look_at_game(trainer, 0)
    first = data.theory(q, d)
    for step in range(150):
        x, z = data.draw_p(rng, (256, 1, 1, 1)), rng.standard_normal((256, 4), np.float32)
        fake = array(backend, trainer.generate(z))
        loss = partial(net.discriminator_loss, trainer.model, array(backend, x), fake, None)
        trainer.update("discriminator", loss, 5e-3)
    figures = data.theory(q, data.look_at_game(trainer, 0)[1])
    assert first["off"] > 0.1 and first["value"] < first["bound"] - 0.1
    assert figures["bound"] == first["bound"] > -1.3
    assert figures["off"] < 0.05 and figures["bound"] - 0.05 < figures["value"] < figures["bound"]


def test_toy(tmp_path):
    """A short game: q comes near p, and D stays near p / (p + q)."""
    folder = copy_alone("gan", tmp_path / "gan")
    first = result(folder, "mlx", "--task", "toy", "--steps", "0")
    last = result(folder, "mlx", *"--task toy --lr 5e-4 --ema 0 --steps 150 --out on".split())
    assert first["bound"] > -1.15 and last["bound"] < -1.2
    assert first["off"] > 0.2 and last["off"] < 0.1
    assert first["value"] < first["bound"] - 0.2 and last["bound"] - 0.08 < last["value"] < last["bound"]
    with Image.open(folder / "on/sample.png") as image:
        assert image.size == (800, 720) and np.asarray(image.convert("L")).std() > 8


# ---- data, figures, pictures -----------------------------------------------------------------------------------------


def test_frechet():
    """Normal samples against the closed form for covariances that commute; no distance to oneself."""
    rng, std = np.random.default_rng(0), np.array([[1, 2, 0.5], [2, 1, 0.5]])
    a, b = rng.standard_normal((2, 200_000, 3)) * std[:, None] + np.array([[0, 0, 0], [1, 0, 2]])[:, None]
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    assert data.frechet(a @ turn, b @ turn) == pytest.approx(5 + np.square(std[0] - std[1]).sum(), rel=0.02)
    assert data.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_runs(tmp_path):
    """Flowers in colour, wgan-gp; the twin goes on where the first stopped: the strips of both are in the picture."""
    folder = copy_alone("gan", tmp_path / "gan")
    args = ["--data", "flowers", "--size", "16", "--count", "200", "--hidden", "8", "--loss", "wgan-gp"]
    args += ["--batch-size", "16", "--d-steps", "2"]
    first = result(folder, "torch", *args, "--steps", "6")
    assert {"D(x)", "D(G(z))", "g_loss"} <= set(first["printed"].split()) and "has won" not in first["printed"]
    heights = []
    for backend, more in (("mlx", ["--steps", "6"]), ("torch", ["--steps", "12", "--resume"])):
        ended = result(folder, backend, *args, *more)
        with Image.open(ended["out"] / "looks.png") as looks, Image.open(ended["out"] / "sample.png") as sample:
            assert looks.width == 12 * 16 and np.asarray(looks).std() > 0.5
            heights.append((looks.height, sample.height))
    assert heights[0][0] == 16 and heights[1] > heights[0]


def test_held_out():
    """The pictures held out are never in a batch."""
    task = make_task("gan", "--count", 100, "--batch-size", 64)
    batches = np.concatenate([task.batch(step)[0][0] for step in range(10)]).reshape(640, -1)
    assert not {x.tobytes() for x in batches} & {x.tobytes() for x in task.test}


def test_won(tmp_path):
    """A discriminator that learns 20 times as fast wins, and the run says so."""
    folder = copy_alone("gan", tmp_path / "gan")
    args = ["--steps", "100", "--count", "200", "--model", "gan", "--hidden", "64", "--smoothing", "0"]
    assert "discriminator has won" in result(folder, "mlx", *args, "--lr", "1e-4", "--d-lr", "20")["printed"]
    assert "discriminator has won" not in result(folder, "mlx", *args, "--d-lr", "0.01")["printed"]


# ---- what it learns --------------------------------------------------------------------------------------------------


class Judge:
    """A classifier trained on the same pictures (N, 28, 28, 1): its classes, how sure it is, its features."""

    def __init__(self, x, labels, steps=200):
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(1, 8, 4, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 4, 2, 1), torch.nn.ReLU()]
        self.body = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(16 * 49, 32), torch.nn.ReLU())
        self.head, rng = torch.nn.Linear(32, 10), np.random.default_rng(0)
        optimizer = torch.optim.Adam([*self.body.parameters(), *self.head.parameters()], 5e-3)
        for _ in range(steps):
            i = rng.integers(0, len(x), 64)
            logits = self.head(self.body(torch.from_numpy(x[i]).permute(0, 3, 1, 2)))
            optimizer.zero_grad()
            F.cross_entropy(logits, torch.from_numpy(labels[i])).backward()
            optimizer.step()

    @torch.no_grad()
    def __call__(self, x):
        features = self.body(torch.from_numpy(x).permute(0, 3, 1, 2))
        return torch.softmax(self.head(features), 1).numpy(), features.numpy()


def test_quality(tmp_path):
    """A short run: all ten digits among the samples, the judge mostly sure of them, the features near the real ones."""
    folder = copy_alone("gan", tmp_path / "gan")
    args = ["--hidden", "8", "32", "--size", "28", "--count", "1500", "--ema", "0.98"]
    last = result(folder, "torch", *args, "--steps", "300")
    assert last["frechet"] < 2000 and last["least_share"] > 0.005 and last["sure"] > 0.2 and last["judge"] > 0.97
    images, labels = data.make_digits(3000, 7)
    x = data.centred(data.pixels((images - 40.0) / 105))[..., None].astype(np.float32) / 127.5 - 1
    judge = Judge(x[:2000], labels[:2000])
    sure, real = judge(x[2000:])
    assert (sure.argmax(1) == labels[2000:]).mean() > 0.9
    net, z = load("gan", "mlx"), np.random.default_rng(1).standard_normal((1000, 64), np.float32)
    trainer = net.Trainer(net.Config(hidden=[8, 32]), seed=0, device="cpu")
    assert data.frechet(real, judge(trainer.generate(z))[1]) > 1500
    trainer.load(folder / "out/pictures/ckpt.npz")  # torch trained it, MLX draws
    sure, features = judge(trainer.generate(z))
    share = np.bincount(sure.argmax(1), minlength=10) / len(z)
    assert share.min() > 0.02 and share.max() < 0.4, share
    assert sure.max(1).mean() > 0.7 and data.frechet(real, features) < 600
