"""The mathematics of diffusion/ against closed forms; the samplers where the best guess is known; what it learns."""

import io
import json
import math
import tarfile
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import BACKENDS, batches, copy_alone, load, load_file, make_task, make_trainer, result
from PIL import Image

data = load_file("diffusion", "data")


def array(backend, x):
    return torch.from_numpy(x) if backend == "torch" else mx.array(x)


def numpy(x):
    return x.detach().numpy() if isinstance(x, torch.Tensor) else np.array(x)


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_fold(backend):
    """Each square of pixels becomes one place, row by row; and back."""
    net, x = load("diffusion", backend), np.arange(2 * 6 * 4 * 3, dtype=np.float32).reshape(2, 6, 4, 3)
    folded = numpy(net.fold(array(backend, x), 2))
    assert folded.shape == (2, 3, 2, 12)
    assert (folded[1, 2, 1].reshape(2, 2, 3) == x[1, 4:6, 2:4]).all()
    assert (numpy(net.unfold(array(backend, folded), 2)) == x).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers(backend):
    """Convolution, norm and attention against torch's functions, with the weights where the checkpoint has them."""
    net, rng = load("diffusion", backend), np.random.default_rng(0)
    x, words = rng.standard_normal((2, 5, 4, 64), np.float32), rng.standard_normal((2, 7, 24), np.float32)
    parts = {"conv": net.Conv(64, 6), "norm": net.GroupNorm(64), "attention": net.Attention(64, 24)}
    weights = {}
    for name, part in parts.items():
        shapes = {key: w.shape for key, w in net.get_weights(part).items()}
        weights[name] = {key: rng.standard_normal(shape, np.float32) / 4 for key, shape in shapes.items()}
        net.set_weights(part, weights[name])
    w = {name: {key: torch.from_numpy(a) for key, a in ws.items()} for name, ws in weights.items()}
    if backend == "mlx":
        w["conv"]["weight"] = w["conv"]["weight"].permute(0, 3, 1, 2)  # alone it is no part of a model: as MLX has it
    channels = torch.from_numpy(x).permute(0, 3, 1, 2)
    conv = F.conv2d(channels, w["conv"]["weight"], w["conv"]["bias"], padding=1).permute(0, 2, 3, 1)
    np.testing.assert_allclose(numpy(parts["conv"](array(backend, x))), conv, rtol=1e-3, atol=1e-3)
    norm = F.group_norm(channels, 8, w["norm"]["weight"], w["norm"]["bias"]).permute(0, 2, 3, 1)
    np.testing.assert_allclose(numpy(parts["norm"](array(backend, x))), norm, rtol=1e-3, atol=1e-3)
    a, flat, context = w["attention"], torch.from_numpy(x).flatten(1, 2), torch.from_numpy(words)
    h = F.layer_norm(flat, (64,), a["norm.weight"], a["norm.bias"])
    q, (k, v) = F.linear(h, a["q.weight"], a["q.bias"]), F.linear(context, a["kv.weight"], a["kv.bias"]).chunk(2, -1)
    heads = []
    for i in (slice(0, 32), slice(32, 64)):
        heads.append(torch.softmax(q[..., i] @ k[..., i].transpose(1, 2) / math.sqrt(32), -1) @ v[..., i])
    expected = flat + F.linear(torch.cat(heads, -1), a["out.weight"], a["out.bias"])
    y = parts["attention"](array(backend, x.reshape(2, 20, 64)), array(backend, words))
    np.testing.assert_allclose(numpy(y), expected, rtol=1e-3, atol=1e-3)


# ---- the forward process and the bound -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_schedules(backend):
    """From all picture to all noise; the linear one is the product of 1 - beta, the cosine one its formula."""
    net = load("diffusion", backend)
    for schedule in ("cosine", "linear"):
        a = net.alpha_bars(net.Config(schedule=schedule))
        assert a.shape == (1001,) and a[0] == 1 and (np.diff(a) < 0).all() and 0 < a[-1] < 1e-4
    beta = 1 - a[1:] / a[:-1]
    assert beta[0] == pytest.approx(1e-4) and beta[-1] == pytest.approx(0.02) and np.ptp(np.diff(beta)) < 1e-9
    a, t = net.alpha_bars(net.Config(schedule="cosine")), np.array([1, 250, 500, 900])
    f = np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(a[t], f, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_posterior(backend):
    """q(x_s | x_t, x_0) by Bayes on a grid: q(x_s | x_0) q(x_t | x_s), its mean and variance."""
    net = load("diffusion", backend)
    a, grid = net.alpha_bars(net.Config()), np.linspace(-8, 8, 20001)
    for t, s in ((900, 899), (500, 300), (1000, 20)):
        x_0, x_t, a_ts = 0.7, -1.1, a[t] / a[s]
        p = np.exp(-((grid - math.sqrt(a[s]) * x_0) ** 2) / (2 * (1 - a[s])))
        p *= np.exp(-((x_t - math.sqrt(a_ts) * grid) ** 2) / (2 * (1 - a_ts)))
        p /= p.sum()
        of_0, of_t, var = net.posterior(a, t, s)
        mean = (p * grid).sum()
        assert of_0 * x_0 + of_t * x_t == pytest.approx(mean, abs=1e-5)
        assert var == pytest.approx((p * (grid - mean) ** 2).sum(), rel=1e-4)


@pytest.mark.parametrize("predict", ["v", "noise"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bound(backend, predict):
    """A term of the bound is the divergence of two Gaussians, and it is the simple loss, weighted."""
    net = load("diffusion", backend)
    trainer = net.Trainer(net.Config([1, 1, 3], widths=[16], n_class=0, net="mlp", predict=predict), device="cpu")
    rng, a = np.random.default_rng(0), trainer.model.a
    x, noise = rng.standard_normal((2, 6, 1, 1, 3), np.float32)
    y = np.zeros(6, int)
    for t, s in ((700, 699), (400, 300)):
        x_t = np.float32(math.sqrt(a[t]) * x + math.sqrt(1 - a[t]) * noise)
        x_0, eps = trainer.denoise(x_t, y, t)
        np.testing.assert_allclose(math.sqrt(a[t]) * x_0 + math.sqrt(1 - a[t]) * eps, x_t, atol=1e-4)
        of_0, of_t, var = net.posterior(a, t, s)
        normal = (torch.distributions.Normal(torch.from_numpy(of_0 * m + of_t * x_t), var**0.5) for m in (x, x_0))
        kl = torch.distributions.kl_divergence(*normal).sum((1, 2, 3))
        term = numpy(net.bound_term(trainer.model, *(array(backend, b) for b in (x, y)), t, s, array(backend, noise)))
        np.testing.assert_allclose(term, kl, rtol=1e-3)
        simple = net.loss_fn(trainer.model, *(array(backend, b) for b in (x, y, np.full(6, t), noise)))
        snr_s, snr_t = a[s] / (1 - a[s]), a[t] / (1 - a[t])
        weight = (snr_s - snr_t) / 2 * ((1 - a[t]) if predict == "v" else (1 - a[t]) / a[t])
        assert term.mean() == pytest.approx(float(numpy(simple)) * weight * 3, rel=1e-3) and term.mean() > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_last_term(backend):
    """The probabilities of a pixel's 256 values sum to 1."""
    net, trainer = load("diffusion", backend), make_trainer("diffusion", 3, backend)
    values = np.float32(np.arange(-1000, 1001)) * 2 / 255  # and beyond, so that none is lost
    x = np.stack([values, np.zeros_like(values)], -1)[:, None, None]
    a, x_t = trainer.model.a, np.zeros((2001, 1, 1, 2), np.float32)
    noise = np.float32((x_t - math.sqrt(a[60]) * x) / math.sqrt(1 - a[60]))  # one x_t for all x
    y = np.zeros(2001, int)
    term = numpy(net.bound_term(trainer.model, *(array(backend, b) for b in (x, y)), 60, 0, array(backend, noise)))
    x_0, std = trainer.denoise(x_t, y, 60)[0][0, 0, 0, 1], math.sqrt((1 - a[60]) / a[60])
    other = math.erf((1 / 255 - x_0) / std / 2**0.5) / 2 - math.erf((-1 / 255 - x_0) / std / 2**0.5) / 2
    assert np.exp(-term).sum() / other == pytest.approx(1, rel=0.02)


# ---- samplers --------------------------------------------------------------------------------------------------------

MEAN, STD = 0.6, 0.3  # of the data, N(MEAN, STD^2): the best guess of x_0 and the ODE's solution are known


def best_guess(a):
    def guess(x, t):
        alpha, var = float(a[t]) ** 0.5, float(a[t] * STD**2 + 1 - a[t])
        x_0 = MEAN + alpha * STD**2 / var * (x - alpha * MEAN)
        return x_0, (x - alpha * x_0) / float(1 - a[t]) ** 0.5

    return guess


@pytest.mark.parametrize("sampler, steps", [("ddpm", 200), ("ddim", 100), ("heun", 50), ("langevin", 400)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_samplers(backend, sampler, steps):
    """With the best guess, each ends in the density of the data."""
    net, rng = load("diffusion", backend), np.random.default_rng(0)
    a, ts = net.alpha_bars(net.Config()), np.linspace(1000, 0, steps + 1).round().astype(int)

    def noise():
        return array(backend, rng.standard_normal((4000, 1, 1, 1), np.float32))

    path = list(net.SAMPLERS[sampler](best_guess(a), noise(), ts, a, noise))
    x = numpy(path[-1])
    assert len(path) == steps
    assert x.mean() == pytest.approx(MEAN, abs=0.02) and x.std() == pytest.approx(STD, rel=0.06)


@pytest.mark.parametrize("sampler, predict", [("ddim", "v"), *((s, "noise") for s in ("ddpm", "ddim", "heun"))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_guess(backend, sampler, predict):
    """A network that is a little wrong in what it predicts is a little wrong in what it draws, in latents too."""
    trainer = make_trainer("diffusion", 3, backend, predict=predict, image=[1, 1, 1])
    a = trainer.model.a

    def unet(x, t, y):
        t = int(numpy(t)[0])
        x_0, eps = best_guess(a)(x, t)
        return 0.02 + (eps if predict == "noise" else float(a[t]) ** 0.5 * eps - float(1 - a[t]) ** 0.5 * x_0)

    trainer.average = SimpleNamespace(config=trainer.config, a=a, unet=unet)
    x = trainer.sample(np.zeros(4000, int), np.random.default_rng(0), sampler, 50)[-1]
    assert x.mean() == pytest.approx(MEAN, abs=0.15) and x.std() == pytest.approx(STD, rel=0.15)


def test_ode():
    """Along the ODE (x - mean) / deviation stays what it is. Heun's error falls with the square of the step."""
    net, x, errors = load("diffusion", "torch"), torch.linspace(-2, 2, 9)[:, None, None, None], {}
    a = net.alpha_bars(net.Config())
    for sampler in ("ddim", "heun"):
        for steps in (10, 20):
            ts = np.linspace(1000, 0, steps + 1).round().astype(int)
            *_, y = net.SAMPLERS[sampler](best_guess(a), x, ts, a, None)
            errors[sampler, steps] = float((y - (MEAN + STD * x)).abs().max())
    assert errors["heun", 10] < errors["ddim", 10] / 2 and errors["heun", 20] < errors["heun", 10] / 3
    assert errors["ddim", 20] < errors["ddim", 10] / 1.7


@pytest.mark.parametrize("backend", BACKENDS)
def test_repaint(backend):
    """Pictures of four equal pixels, two of them known: those stay as they are, and the others become equal to them."""
    net, rng = load("diffusion", backend), np.random.default_rng(0)
    a, ts = net.alpha_bars(net.Config()), np.linspace(1000, 0, 51).round().astype(int)
    known = np.float32(rng.standard_normal((200, 1, 1, 1)) * np.ones(4))
    mask = np.float32([1, 1, 0, 0]) * np.ones((200, 1, 1, 4), np.float32)

    def guess(x, t):
        alpha, var = float(a[t]) ** 0.5, float(1 - a[t])
        x_0 = alpha * x.sum(-1)[..., None] / (4 * alpha**2 + var) + 0 * x
        return x_0, (x - alpha * x_0) / var**0.5

    def noise():
        return array(backend, rng.standard_normal((200, 1, 1, 4), np.float32))

    *_, x = net.repaint(guess, noise(), ts, a, noise, array(backend, known), array(backend, mask))
    x = numpy(x)
    assert (x[..., :2] == known[..., :2]).all()
    assert np.corrcoef(x[..., 2].ravel(), known[..., 0].ravel())[0, 1] > 0.97
    assert np.abs(x[..., 2:] - known[..., 2:]).mean() < 0.2


@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance(backend):
    """0: as without the class, 1: with it, 3: three times as far from the one to the other."""
    net, trainer, rng = load("diffusion", backend), make_trainer("diffusion", 0, backend), np.random.default_rng(0)
    x, y = array(backend, rng.standard_normal((3, 8, 8, 1), np.float32)), array(backend, np.array([0, 1, 2]))
    none, a = array(backend, np.array([3, 3, 3])), trainer.model.a

    def eps(y, guidance):  # before pixels are held to -1 ... 1: from a guess that is not cut off
        x_0, eps = net.guess(trainer.model, 0.1 * x, 500, y, none, guidance)
        assert np.abs(numpy(x_0)).max() < 1
        return numpy(eps)

    without, with_y = eps(none, 1.0), eps(y, 1.0)
    assert np.abs(with_y - without).max() > 0.01 and a[500] > 0.1
    np.testing.assert_allclose(eps(y, 0.0), without, atol=1e-5)
    np.testing.assert_allclose(eps(y, 3.0), without + 3 * (with_y - without), atol=1e-5)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_average(backend):
    """The average runs after the weights, faster at first, and draws the pictures."""
    net, trainer = load("diffusion", backend), make_trainer("diffusion", 3, backend)
    expected = net.get_weights(trainer.model)
    for step, arrays in enumerate(batches("diffusion", 3, 8), 1):
        trainer.step(*arrays, lr=1e-2)
        keep = min(0.5, step / (step + 10))
        for name, w in net.get_weights(trainer.model).items():
            expected[name] = keep * expected[name] + (1 - keep) * w
    average = net.get_weights(trainer.average)
    for name in average:
        np.testing.assert_allclose(average[name], expected[name], rtol=1e-4, atol=1e-6)
    y = np.zeros(4, int)
    before = trainer.sample(y, np.random.default_rng(0), steps=4)
    net.set_weights(trainer.model, {name: 0 * w for name, w in average.items()})
    assert (trainer.sample(y, np.random.default_rng(0), steps=4) == before).all()
    assert (trainer.sample(y, np.random.default_rng(1), steps=4) != before).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluate_average(backend):
    """The average is what is evaluated and bounds the likelihood, and the guess of pixels stays from -1 to 1."""
    net, trainer = load("diffusion", backend), make_trainer("diffusion", 0, backend)
    arrays = batches("diffusion", 0, 1)[0]
    trainer.step(*arrays, lr=1e-2)
    x, y = arrays[:2]

    def said():
        return float(trainer.evaluate(*arrays)["val_loss"]), trainer.bound(x, y, np.random.default_rng(0), 5)

    before = said()
    net.set_weights(trainer.model, {name: 0 * w for name, w in net.get_weights(trainer.model).items()})
    assert said() == before
    net.set_weights(trainer.average, {name: 9 * w for name, w in net.get_weights(trainer.average).items()})
    assert said() != before and np.abs(trainer.denoise(x, y, 900)[0]).max() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_block(backend):
    """The condition scales by 1 + its first half: a block whose conditions are 0 still hands on its input."""
    net, x = load("diffusion", backend), np.random.default_rng(0).standard_normal((2, 4, 4, 8), np.float32)
    block = net.Block(8, 8, 4)
    weights = net.get_weights(block)
    net.set_weights(block, {name: 0 * w if name.startswith("cond") else w for name, w in weights.items()})
    x, c = array(backend, x), array(backend, np.ones((2, 4), np.float32))
    silu = F.silu if backend == "torch" else mlx_nn.silu
    expected = x + block.conv2(silu(block.norm2(block.conv1(silu(block.norm1(x))))))
    np.testing.assert_allclose(numpy(block(x, c)), numpy(expected), atol=1e-6)


def test_told():
    """A tenth of the classes is not told, in batches of pictures and of texts; without that guidance learns nothing."""
    rng, y = np.random.default_rng(0), np.arange(4000) % 10
    _, told, t, _ = data.noised(np.zeros((4000, 1, 1, 1), np.float32), y, 10, rng)
    assert 0.08 < (told == 10).mean() < 0.12 and (told[told < 10] == y[told < 10]).all()
    assert t.min() == 1 and t.max() == data.T
    task = make_task("diffusion", "--task", "text", "--count", 100)
    y = np.concatenate([task.batch(step)[1] for step in range(40)])
    assert 0.05 < (y == 0).all(1).mean() < 0.16


@pytest.mark.parametrize("backend", BACKENDS)
def test_latents(backend):
    """First only the autoencoder learns, then only the rest; latents have mean 0 and variance 1 in each picture."""
    net, trainer = load("diffusion", backend), make_trainer("diffusion", 2, backend)
    for step, arrays in enumerate(batches("diffusion", 2, 4)):
        before = net.get_weights(trainer.model)
        trainer.step(*arrays, lr=1e-2)
        moved = {name: np.abs(w - before[name]).max() for name, w in net.get_weights(trainer.model).items()}
        assert {name.split(".")[0] for name, way in moved.items() if way} == {"autoencoder" if step < 2 else "unet"}
        if step in (0, 2):  # the first step of each part: AdamW goes as far as the rate says
            assert max(way for name, way in moved.items() if name.endswith("bias")) == pytest.approx(1e-2, rel=1e-3)
    z = numpy(trainer.model.autoencoder.encode(array(backend, arrays[0])))
    assert z.shape == (8, 4, 4, 2)
    np.testing.assert_allclose(z.mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(z.std((1, 2, 3)), 1, rtol=1e-3)


# ---- points ----------------------------------------------------------------------------------------------------------


def test_density():
    """The density sums to 1, its score is the slope of its logarithm, and points fall where it says."""
    for a in (1.0, 0.5, 0.01):
        assert data.on_grid(a).sum() / 256 == pytest.approx(1, abs=2e-3)
        x, h = np.random.default_rng(0).normal(0, 0.8, (20, 2)), 1e-5
        for i in (0, 1):
            step = h * np.eye(2)[i]
            slope = np.log(data.density(x + step, a)[0] / data.density(x - step, a)[0]) / (2 * h)
            np.testing.assert_allclose(data.density(x, a)[1][:, i], slope, rtol=1e-4, atol=1e-4)
    points = data.draw_points(100_000, np.random.default_rng(0))
    assert data.variation(data.histogram(points), data.on_grid(1.0)) < 0.01
    assert data.variation(data.histogram(points), data.on_grid(0.3)) > 0.2


def test_fokker_planck():
    """The equation carries the density of the data to what the closed form says; without the drift it does not."""
    for a, b in ((1.0, 0.8), (0.8, 0.1)):
        p = data.fokker_planck(data.on_grid(a), math.log(a / b))
        assert data.variation(p, data.on_grid(b), 1) < 0.015
        assert data.variation(data.on_grid(a), data.on_grid(b), 1) > 0.15


def test_toy(tmp_path):
    """A short training: the learned score is near the true one; SDE, ODE and Langevin's chain end near the density."""
    folder = copy_alone("diffusion", tmp_path / "diffusion")
    args = ["--task", "toy", "--sample-steps", "20", "--batch-size", "128", "--widths", "64", "64"]
    first = result(folder, "torch", *args, "--steps", "0", "--out", "zero")
    last = result(folder, "torch", *args, "--steps", "800")
    assert first["score_error"] > 0.4 and last["score_error"] < 0.25
    for name in ("SDE", "ODE", "Langevin"):
        assert last[name] < 0.4 < first[name] - 0.1, (name, first[name], last[name])
    with Image.open(folder / "out/toy/sample.png") as image:
        assert image.size[0] > 700 and np.asarray(image.convert("L")).std() > 10


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_cifar10(tmp_path, monkeypatch):
    """Records of a label and the planes red, green and blue become pictures that end in their channels."""
    rows = np.zeros((6, 100, 3073), np.uint8)
    rows[..., 0] = np.arange(6)[:, None]
    rows[..., 1 + 1024 + 32 * 3 + 7] = 200  # green, line 3, column 7
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz", compresslevel=1) as tar:
        for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = rows[i].nbytes
            tar.addfile(info, io.BytesIO(rows[i].tobytes()))
        info = tarfile.TarInfo("cifar-10-batches-bin/batches.meta.txt")
        info.size = 9
        tar.addfile(info, io.BytesIO(b"cat\ndog\n\n"[:9]))
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    (x_train, y_train, x_test, y_test), names = data.load_cifar10()
    assert names == ["cat", "dog"]
    assert x_train.shape == (500, 32, 32, 3) and x_test.shape == (100, 32, 32, 3)
    assert (y_train[::100] == range(5)).all() and (y_test == 5).all()
    assert (x_train[:, 3, 7] == [0, 200, 0]).all() and x_train[0].sum() == 200


def test_read_shape():
    """The check on what was drawn for a text: right on what draw_shape draws, wrong on other captions."""
    rng = np.random.default_rng(0)
    images = [data.draw_shape(caption, rng) for caption in data.CAPTIONS]
    assert min(data.right(images, data.CAPTIONS).values()) > 0.97
    assert data.right(images, [*data.CAPTIONS[1:], data.CAPTIONS[0]])["accuracy"] < 0.1
    for i in range(4):  # one word of each caption, or its place, is another
        names = "size", "colour", "shape", "place"
        others = data.SIZES, list(data.COLOURS), data.SHAPES, data.PLACES
        asked = [caption.split(" ", 3) for caption in data.CAPTIONS]
        asked = [[*w[:i], others[i][others[i].index(w[i]) - 1], *w[i + 1 :]] for w in asked]
        figures = data.right(images, map(" ".join, asked))
        assert figures[names[i]] < 0.05 and figures["accuracy"] < 0.05


def test_judge():
    """The classifier that scores: right on held-out digits, far from pictures of noise, near real ones."""
    x, y = (a[..., None] if a.ndim == 3 else a for a in data.make_digits(3000, 0))
    judge = data.Judge(x[:2500], y[:2500])
    p, real = judge(x[2500:])
    assert (p.argmax(1) == y[2500:]).mean() > 0.93 and np.allclose(p.sum(1), 1, atol=1e-4)
    spoiled = np.random.default_rng(0).permuted(x[2500:], axis=1)
    assert data.frechet(real, judge(x[:500])[1]) * 10 < data.frechet(real, judge(spoiled)[1])
    again = data.Judge(x[:2500], y[:2500])
    assert (again(x[2500:])[0] == p).all()
    even = np.full((3, 8, 8, 3), 7, np.uint8)  # one class, nothing to see, the smallest size
    assert np.isfinite(data.Judge(even, np.zeros(3, int))(even)[1]).all()


def test_tasks(tmp_path):
    """Inpainting leaves what is known; flowers; texts in latents, from one framework to the other, with a prompt."""
    folder = copy_alone("diffusion", tmp_path / "diffusion")
    args = ["--widths", "16", "16", "--count", "100", "--batch-size", "8", "--sample-steps", "3"]
    blind = result(folder, "mlx", *args, "--steps", "3", "--task", "inpaint", "--blind")
    assert blind["changed"] < 1e-6 and {"accuracy", "judge"} <= set(blind)
    flowers = ["--data", "flowers", "--size", "16", "--sampler", "heun", "--out", "flowers"]
    assert result(folder, "torch", *args, *flowers, "--steps", "3")["bits"] > 1
    (folder / "mine").mkdir()
    for i in range(2):
        Image.new("RGB", (20, 30), (i, 9 * i, 100)).save(folder / f"mine/{i}.png")
    mine = ["--data", "mine", "--size", "16", "--sampler", "langevin", "--out", "of_mine"]
    assert result(folder, "mlx", *args, *mine, "--steps", "3")["params"] > 1000
    text = [*args, "--task", "text", "--prompt", "big red star", "--out", "text"]
    result(folder, "torch", *text, "--steps", "6")
    last = result(folder, "mlx", *text, "--steps", "8", "--resume")
    assert {"size", "colour", "shape", "place", "accuracy"} <= set(last)


class Judge:
    """A classifier trained on the same pictures (N, 28, 28, 1): which digit each is."""

    def __init__(self, x, labels, steps=500):
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(1, 16, 4, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 4, 2, 1), torch.nn.ReLU()]
        self.net = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(32 * 49, 10))
        optimizer, rng = torch.optim.Adam(self.net.parameters(), 5e-3), np.random.default_rng(0)
        for _ in range(steps):
            i = rng.integers(0, len(x), 64)
            optimizer.zero_grad()
            F.cross_entropy(self.net(torch.from_numpy(x[i]).permute(0, 3, 1, 2)), labels[i]).backward()
            optimizer.step()

    @torch.no_grad()
    def __call__(self, x):
        return self.net(torch.from_numpy(x).permute(0, 3, 1, 2)).argmax(1).numpy()


def test_quality(tmp_path):
    """A short run draws the digits asked for far more often than chance."""
    folder = copy_alone("diffusion", tmp_path / "diffusion")
    result(folder, "torch", "--steps", "150", "--count", "2000", "--sample-steps", "3")
    images, labels = data.make_digits(5000, 7)
    x, labels = np.float32(images[..., None] / 127.5 - 1), torch.from_numpy(labels)
    judge = Judge(x[:4000], labels[:4000])
    assert (judge(x[4000:]) == labels[4000:].numpy()).mean() > 0.93
    net, y = load("diffusion", "torch"), np.arange(60) % 10
    with np.load(folder / "out/pictures/ckpt.npz") as f:
        config = json.loads(str(f["meta"]))["config"]
    trainer = net.Trainer(net.Config(**config), device="cpu")
    assert (judge(trainer.sample(y, np.random.default_rng(0), steps=2)[-1]) == y).mean() < 0.25
    trainer.load(folder / "out/pictures/ckpt.npz")
    asked = trainer.sample(y, np.random.default_rng(0), steps=10, guidance=4.0)[-1]
    assert (judge(asked) == y).mean() > 0.3
