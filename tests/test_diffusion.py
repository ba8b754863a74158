"""The mathematics of diffusion/ against closed forms; samplers where the best guess is known; data and tasks."""

import functools
import math
import tarfile
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import test_cnn
import torch
import torch.nn.functional as F
from folders import BACKENDS, batches, copy_quick, load, load_file, make_args, make_task, make_trainer, result, run_here
from PIL import Image
from test_parity import array, randomise

data = load_file("diffusion", "data")


def numpy(x):
    return x.detach().numpy() if isinstance(x, torch.Tensor) else np.array(x)


# ---- the networks and a step of training -----------------------------------------------------------------------------


def reference(w, config, x, y, t, noise, first):
    """The loss once more, from torch's functions, in (B, C, H, W); w: the weights by name; first: the autoencoder's."""
    layer = functools.partial(test_cnn.layer, w)

    def fold(x, k):
        return torch.cat([x[..., i::k, j::k] for i in range(k) for j in range(k)], 1)

    def unfold(x, k):  # torch's order of the channels is (C, k, k)
        return F.pixel_shuffle(x.unflatten(1, (k * k, -1)).transpose(1, 2).flatten(1, 2), k)

    def block(name, x, c):
        h = layer(f"{name}.conv1", F.silu(layer(f"{name}.norm1", x)))
        scale, shift = layer(f"{name}.cond", c)[:, :, None, None].chunk(2, 1)
        h = layer(f"{name}.conv2", F.silu(layer(f"{name}.norm2", h) * (1 + scale) + shift))
        return h + (layer(f"{name}.shortcut", x) if f"{name}.shortcut.weight" in w else x)

    def attention(name, x, context=None):  # (B, N, C); a head has 32 channels
        h = layer(f"{name}.norm", x)
        parts = layer(f"{name}.q", h), *layer(f"{name}.kv", h if context is None else context).chunk(2, -1)
        q, k, v = (a.unflatten(-1, (max(1, x.shape[2] // 32), -1)).transpose(1, 2) for a in parts)
        a = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v
        return x + layer(f"{name}.out", a.transpose(1, 2).flatten(2))

    def unet(x):
        n, levels = config.widths[0], range(len(config.widths) - 1)
        waves = t[:, None] * 10000.0 ** (-torch.arange(n // 2) / (n // 2))
        waves = torch.cat([waves.cos(), waves.sin()], 1)
        if config.net == "mlp":
            h = layer("unet.inp", x) + (layer("unet.time", waves) + w["unet.label.weight"][y])[:, :, None, None]
            for i in range(len(config.widths)):
                h = h + layer(f"unet.layers.{i}", F.silu(h))
            return layer("unet.out", F.silu(h))
        c = layer("unet.time2", F.silu(layer("unet.time1", waves)))
        if config.vocab_size:
            words = attention("unet.text.attention", w["unet.text.word.weight"][y] + w["unet.text.place.weight"])
            words = words + layer("unet.text.fc2", F.silu(layer("unet.text.fc1", layer("unet.text.norm", words))))
        c = F.silu(c + (words.mean(1) if config.vocab_size else w["unet.label.weight"][y]))
        x, skips = layer("unet.inp", fold(x, config.fold)), []
        for i in levels:
            skips.append(block(f"unet.left.{i}", x, c))
            x = layer(f"unet.down.{i}", fold(skips[i], 2))
        x = block("unet.middle.0", x, c)
        h = attention("unet.attention", x.flatten(2).mT)
        h = attention("unet.cross", h, words) if config.vocab_size else h
        x = block("unet.middle.1", h.mT.reshape(x.shape), c)
        for i in reversed(levels):
            x = block(f"unet.right.{i}", torch.cat([unfold(layer(f"unet.up.{i}", x), 2), skips[i]], 1), c)
        return unfold(layer("unet.out", F.silu(layer("unet.norm", x))), config.fold)

    x, y, t, noise = (torch.from_numpy(a) for a in (x.transpose(0, 3, 1, 2), y, t, noise.transpose(0, 3, 1, 2)))
    target = x
    if config.latent:
        x = F.silu(layer("autoencoder.enc2", fold(F.silu(layer("autoencoder.enc1", fold(x, 2))), 2)))
        x = F.layer_norm(layer("autoencoder.enc3", x), (config.latent, *x.shape[2:]))
    if first:
        x = F.silu(layer("autoencoder.dec2", F.silu(layer("autoencoder.dec1", x + 0.1 * noise))))
        return F.mse_loss(unfold(layer("autoencoder.dec3", unfold(x, 2)), 2), target)
    a, x = torch.from_numpy(load("diffusion", "torch").alpha_bars(config))[t][:, None, None, None].float(), x.detach()
    target = noise if config.predict == "noise" else a.sqrt() * noise - (1 - a).sqrt() * x
    return F.mse_loss(unet(a.sqrt() * x + (1 - a).sqrt() * noise), target)


@pytest.mark.parametrize("i, backend", [(0, "torch"), (1, "mlx"), (2, "torch"), (2, "mlx"), (3, "torch")])
def test_steps(i, backend, monkeypatch):
    """Losses as by the reference; steps as by torch.optim's Muon and, for vectors and embeddings, AdamW; averages."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's Muon rounds to 8 bits
    more = {2: {"widths": [16, 64]}, 3: {"ema": 0.2}}.get(i, {})  # two heads; a short average
    net, trainer, kinds, lr = load("diffusion", backend), make_trainer("diffusion", i, backend, **more), {}, 0.02
    config, start = trainer.config, randomise("diffusion", backend, trainer)  # norms are not 1 now, nor biases 0
    net.set_weights(trainer.average, start)
    average = dict(start)
    params = {name: torch.tensor(w).flatten(min(1, w.ndim - 1)).requires_grad_() for name, w in start.items()}
    for name, p in params.items():
        kinds.setdefault(p.ndim == 1 or name.split(".")[-2] in ("label", "word", "place"), []).append(p)
    muon = dict(weight_decay=0, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adam = dict(weight_decay=0, betas=(0.9, 0.99))
    rules = torch.optim.AdamW(kinds[True], lr, **adam), torch.optim.Muon(kinds[False], lr, **muon)
    for step, arrays in enumerate(batches("diffusion", i, config.first + 3)):
        first = step < config.first
        loss = reference({name: p.view(start[name].shape) for name, p in params.items()}, config, *arrays, first)
        assert float(trainer.step(*arrays, lr=lr)["loss"]) == pytest.approx(loss.item(), rel=1e-3)
        loss.backward()
        for rule in rules:
            rule.step()
            rule.zero_grad()  # to None: what the next loss does not depend on stays as it is
        moved, means = map(net.get_weights, (trainer.model, trainer.average))
        n = step + 1 - (0 if first else config.first)  # steps of this part
        keep = min(config.ema, n / (n + 10))
        for name, p in params.items():
            if step == config.first - 1:  # latents come from the average from now on
                p.data, average[name] = torch.tensor(means[name].reshape(p.shape)), means[name]
            average[name] = keep * average[name] + (1 - keep) * moved[name]
            np.testing.assert_allclose(means[name], average[name], rtol=1e-4, atol=1e-6)
    for name, w in net.get_weights(trainer.model).items():
        if not name.endswith("kv.bias"):  # adding the same to all keys changes nothing, so AdamW moves it at random
            expected = params[name].detach().numpy().reshape(w.shape)
            assert np.linalg.norm(w - expected) < 0.02 * np.linalg.norm(expected - start[name]), name
    loss = reference({name: torch.from_numpy(w) for name, w in average.items()}, config, *arrays, False)
    assert float(trainer.evaluate(*arrays)["val_loss"]) == pytest.approx(loss.item(), rel=1e-3)


# ---- the forward process and the bound -------------------------------------------------------------------------------


def test_chain():
    """The linear schedule is the product of 1 - beta, the cosine one its formula; a step back is as by Bayes."""
    net = load("diffusion", "torch")
    a, linear = (net.alpha_bars(net.Config(schedule=schedule)) for schedule in ("cosine", "linear"))
    np.testing.assert_allclose(linear, np.append(1, 1 - np.linspace(1e-4, 0.02, 1000)).cumprod(), rtol=1e-9)
    f = np.cos((np.arange(1000) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(a, [*f / f[0], f[-1] / f[0] / 1000], rtol=1e-6)  # the last beta would be 1
    for t, s in ((900, 899), (500, 300), (1000, 20)):  # q(x_s | x_0) q(x_t | x_s): precisions add up
        a_ts = a[t] / a[s]
        var = 1 / (1 / (1 - a[s]) + a_ts / (1 - a_ts))
        expected = var * a[s] ** 0.5 / (1 - a[s]), var * a_ts**0.5 / (1 - a_ts), var
        assert net.posterior(a, t, s) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("predict, backend", [(p, b) for p in ("v", "noise") for b in BACKENDS])
def test_bound(predict, backend):
    """A term of the bound is the divergence of two Gaussians, and it is the simple loss, weighted."""
    net, y = load("diffusion", backend), np.zeros(6, int)
    trainer = net.Trainer(net.Config([1, 1, 3], widths=[16], n_class=0, net="mlp", predict=predict), device="cpu")
    x, noise = np.random.default_rng(0).standard_normal((2, 6, 1, 1, 3), np.float32)
    for t, s in ((700, 699), (400, 300)):
        a_t, a_s = trainer.model.a[[t, s]]
        x_t = np.float32(math.sqrt(a_t) * x + math.sqrt(1 - a_t) * noise)
        x_0, eps = trainer.denoise(x_t, y, t)
        np.testing.assert_allclose(math.sqrt(a_t) * x_0 + math.sqrt(1 - a_t) * eps, x_t, atol=1e-4)
        of_0, of_t, var = net.posterior(trainer.model.a, t, s)
        normal = (torch.distributions.Normal(torch.from_numpy(of_0 * m + of_t * x_t), var**0.5) for m in (x, x_0))
        kl = torch.distributions.kl_divergence(*normal).sum((1, 2, 3))
        term = net.bound_term(trainer.model, array(backend, x), array(backend, y), t, s, array(backend, noise))
        np.testing.assert_allclose(numpy(term), kl, rtol=1e-3)
        arrays = (array(backend, b) for b in (x, y, np.full(6, t), noise))
        weight = (a_s / (1 - a_s) - a_t / (1 - a_t)) / 2 * (1 - a_t) / (1 if predict == "v" else a_t)
        loss = float(numpy(net.loss_fn(trainer.model, *arrays)))
        assert 1e-4 < kl.mean() == pytest.approx(3 * weight * loss, rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits(backend):
    """The last term: probabilities of a pixel's values, a millionth or more. The whole bound, in bits per dimension."""
    net, trainer = load("diffusion", backend), make_trainer("diffusion", 3, backend, T=10)
    net.set_weights(trainer.model, {name: 0 * w for name, w in net.get_weights(trainer.model).items()})  # not used
    a = trainer.model.a = trainer.average.a = np.linspace(1, 0.3, 11)
    values = np.float32(np.arange(-1000, 1001)) * 2 / 255  # more than 256, so that none is lost
    x, y = np.stack([values, np.zeros_like(values)], -1)[:, None, None], np.zeros(2001, int)
    arrays = [array(backend, b) for b in (x, y, -x * np.float32((a[1] / (1 - a[1])) ** 0.5))]  # x_t is 0 for all x
    p = np.exp(-numpy(net.bound_term(trainer.average, *arrays[:2], 1, 0, arrays[2])))
    x_0, std = trainer.denoise(0 * x, y, 1)[0][0, 0, 0, 1], math.sqrt((1 - a[1]) / a[1])
    other = math.erf((1 / 255 - x_0) / std / 2**0.5) / 2 - math.erf((-1 / 255 - x_0) / std / 2**0.5) / 2
    assert p.sum() / other == pytest.approx(1, rel=0.02) and p.min() / other == pytest.approx(1e-6, rel=1e-3)
    x, y, rng = np.random.default_rng(0).standard_normal((50, 1, 1, 2), np.float32), y[:50], np.random.default_rng(1)
    ends = torch.distributions.Normal(0.3**0.5 * torch.from_numpy(x), 0.7**0.5), torch.distributions.Normal(0, 1)
    total = torch.distributions.kl_divergence(*ends).sum()
    for s, t in ((0, 1), (1, 3), (3, 10)):
        noise = array(backend, rng.standard_normal(x.shape, np.float32))
        total += numpy(net.bound_term(trainer.average, array(backend, x), array(backend, y), t, s, noise)).sum()
    bits = trainer.bound(x, y, np.random.default_rng(1), steps=3)
    assert bits == pytest.approx(float(total) / 100 / math.log(2), rel=1e-5) and bits > 1


# ---- samplers --------------------------------------------------------------------------------------------------------


def walk(backend, sampler, steps, mean, std, shape, *more):
    """A sampler with the best guess for images of equal pixels, N(mean, std^2): pairs of x and a; times; all noise."""
    net, rng, times, drawn = load("diffusion", backend), np.random.default_rng(0), [], []
    a, ts = net.alpha_bars(net.Config()), np.linspace(1000, 0, steps + 1).round().astype(int)

    def guess(x, t):
        times.append(t)
        alpha, var = float(a[t]) ** 0.5, float(1 - a[t])
        away = (x - alpha * mean).sum(-1)[..., None] * alpha * std**2 / (shape[-1] * alpha**2 * std**2 + var)
        x_0 = mean + away + 0 * x
        return x_0, (x - alpha * x_0) / var**0.5

    def noise():
        drawn.append(rng.standard_normal(shape, np.float32))
        return array(backend, drawn[-1])

    path = net.SAMPLERS[sampler](guess, noise(), ts, a, noise, *(array(backend, b) for b in more))
    return list(zip(map(numpy, path), a[ts[1:]], strict=True)), times, drawn


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sampler, steps", [("ddpm", 200), ("ddim", 100), ("heun", 50), ("langevin", 200)])
def test_samplers(sampler, steps, backend):
    """With the best guess, each follows the density of noisy data; the ODE keeps x's distance in deviations."""
    path, times, drawn = walk(backend, sampler, steps, 0.6, 0.3, (4000, 1, 1, 1))
    assert len(times) == {"heun": 2 * steps, "langevin": 6 * steps + 1}.get(sampler, steps)
    assert times[-1] == (1 if sampler == "heun" else 1000 // steps)
    for x, a in path[-1 if sampler == "langevin" else 0 :]:
        assert x.mean() == pytest.approx(0.6 * a**0.5, abs=0.08 if a < 1 else 0.02), a
        assert x.var() == pytest.approx(1 - 0.91 * a, rel=0.1), a
    assert np.corrcoef(path[0][0].ravel(), drawn[(len(drawn) - 1) // steps].ravel())[0, 1] > 0.1  # noise is added
    if sampler in ("ddim", "heun"):  # Euler's error falls with the step, Heun's with its square
        assert np.abs(x - (0.6 + 0.3 * drawn[0])).max() < {"ddim": 0.05, "heun": 0.005}[sampler]


@pytest.mark.parametrize("sampler, predict", [("ddim", "v"), *((s, "noise") for s in ("ddpm", "ddim", "heun"))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_guess(backend, sampler, predict):
    """A network whose predictions are a little wrong makes images that are a little wrong."""
    trainer = make_trainer("diffusion", 3, backend, predict=predict, image=[1, 1, 1])

    def unet(x, t, y):
        a = float(trainer.model.a[int(numpy(t)[0])])
        x_0 = 0.6 + a**0.5 * 0.09 / (1 - 0.91 * a) * (x - a**0.5 * 0.6)
        eps = (x - a**0.5 * x_0) / (1 - a) ** 0.5
        return 0.02 + (eps if predict == "noise" else a**0.5 * eps - (1 - a) ** 0.5 * x_0)

    trainer.average = SimpleNamespace(config=trainer.config, a=trainer.model.a, unet=unet)
    x = trainer.sample(np.zeros(4000, int), np.random.default_rng(0), sampler, 50)[-1]
    assert x.mean() == pytest.approx(0.6, abs=0.15) and x.std() == pytest.approx(0.3, rel=0.15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repaint(backend):
    """Images of four equal pixels, two of them known: these stay unchanged, and the others become equal to them."""
    known = np.random.default_rng(1).standard_normal((1000, 1, 1, 1), np.float32).repeat(4, -1)
    mask = np.float32([1, 1, 0, 0]) * np.ones_like(known)
    path, times, drawn = walk(backend, "repaint", 50, 0, 1, known.shape, known, mask)
    assert len(times) == 49 * 5 + 1  # five times back and again
    for x, a in path:
        assert x.var() == pytest.approx(1, abs=0.2)  # as known.var() is
        added = x[..., :2] - math.sqrt(a) * known[..., :2]
        assert added.var() == pytest.approx(1 - a, rel=0.15, abs=1e-9)
    for part, last in ((slice(2, 4), -3), (slice(2, 4), -2), (slice(0, 2), -1)):  # the way there, inside, outside
        assert np.corrcoef(path[24][0][..., part].ravel(), drawn[25 * 15 + last][..., part].ravel())[0, 1] > 0.1
    assert np.corrcoef(x[:, 0, 0, 2], known[:, 0, 0, 0])[0, 1] > 0.97 and np.abs(x - known).mean() < 0.1


@pytest.mark.parametrize("i, backend", [(i, b) for i in (0, 2) for b in BACKENDS])
def test_sample(i, backend, monkeypatch):
    """The average samples, where something is left of the image; guidance doubles what y changes; stages are kept."""
    net, trainer = load("diffusion", backend), make_trainer("diffusion", i, backend)
    net.set_weights(trainer.model, {name: 0 * w for name, w in net.get_weights(trainer.model).items()})  # not used
    spy = Mock(side_effect=lambda guess, x, ts, a, noise, mask: (n * x for n in range(1, len(ts))))
    monkeypatch.setitem(net.SAMPLERS, "ddim", spy)
    y, none = (np.array([0, 1, 2]), np.full(3, 3)) if i == 0 else (np.array([[1, 2, 0, 0]] * 3), np.zeros((3, 4), int))
    mask = np.zeros(5, np.float32)
    kept = trainer.sample(y, np.random.default_rng(0), "ddim", 6, guidance=2.0, keep=3, mask=mask)
    guess, x, ts, *_ = spy.call_args.args
    assert ts[0] == np.flatnonzero(trainer.model.a > 1e-3)[-1] and ts[-1] == 0 and len(ts) == 7
    assert (numpy(x) == np.random.default_rng(0).standard_normal(x.shape, np.float32)).all()
    assert kept.shape == (3, 3, *trainer.config.image) and (numpy(spy.call_args.kwargs["mask"]) == mask).all()
    for picture, n in zip(kept, (2, 4, 6)):
        decoded = trainer.average.autoencoder.decode(n * x) if i else n * x
        np.testing.assert_allclose(picture, numpy(decoded), atol=1e-5)
    without, told = (numpy(net.guess(trainer.average, 0.1 * x, 500, array(backend, a))[0]) for a in (none, y))
    x_0 = numpy(guess(0.1 * x, 500)[0])
    assert np.abs(told - without).max() > 0.01 and np.abs(x_0).max() < 1
    np.testing.assert_allclose(x_0, without + 2 * (told - without), atol=1e-5)
    if i == 0:  # pixels are from -1 to 1
        assert np.abs(trainer.denoise(9 * numpy(x), y, 900)[0]).max() == 1
    y += 5 if i else 2  # one more than there are
    for use in (lambda: trainer.denoise(numpy(x), y, 900), lambda: trainer.sample(y, np.random.default_rng(0))):
        with pytest.raises(ValueError, match="outside"):
            use()


# ---- points and pictures ---------------------------------------------------------------------------------------------


def test_density():
    """It sums to 1, the score is the slope of its logarithm, points fall where it says, Fokker-Planck leads to it."""
    for a in (1.0, 0.5, 0.01):
        assert data.on_grid(a).sum() / 256 == pytest.approx(1, abs=2e-3)
        x, steps = np.random.default_rng(0).normal(0, 0.8, (20, 2)), 1e-5 * np.eye(2)
        up, down = (data.density(x[:, None] + step, a)[0] for step in (steps, -steps))
        np.testing.assert_allclose(data.density(x, a)[1], np.log(up / down) / 2e-5, rtol=1e-4, atol=1e-4)
    points = data.histogram(data.draw_points(100_000, np.random.default_rng(0)))
    assert data.variation(points, data.on_grid(1.0)) < 0.01 and data.variation(points, data.on_grid(0.3)) > 0.2
    for a, b in ((1.0, 0.8), (0.8, 0.1)):
        p, q = data.on_grid(a), data.on_grid(b)
        assert data.variation(data.fokker_planck(p, math.log(a / b)), q, 1) < 0.015 < 0.15 < data.variation(p, q, 1)


def test_told():
    """A tenth of the classes is hidden, in batches of images and of texts; else guidance would learn nothing."""
    y = np.arange(4000) % 10
    _, told, t, _ = data.noised(np.zeros((4000, 1, 1, 1), np.float32), y, 10, np.random.default_rng(0))
    assert 0.08 < (told == 10).mean() < 0.12 and (told == y)[told < 10].all() and (t.min(), t.max()) == (1, data.T)
    task = make_task("diffusion", "--task", "text", "--count", 100, saved={"config": {"latent": 3, "first": 7}})
    assert (task.config["latent"], task.config["first"]) == (3, 7) and task.batch(0)[3].shape == (32, 8, 8, 3)
    y = np.concatenate([task.batch(step)[1] for step in range(40)])
    assert 0.05 < (y == 0).all(1).mean() < 0.16


def test_cifar10(tmp_path, monkeypatch):
    """Records of a label and red, green and blue planes become images with the channels last."""
    rows = np.zeros((6, 100, 3073), np.uint8)
    rows[..., 0] = np.arange(6)[:, None]
    rows[..., 1 + 1024 + 32 * 3 + 7] = 200  # green, line 3, column 7
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt"]
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz", compresslevel=1) as tar:
        for name, content in zip(names, [*rows, b"cat\ndog\n\n"], strict=True):
            (tmp_path / name).write_bytes(content)
            tar.add(tmp_path / name, f"cifar-10-batches-bin/{name}")
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    (x_train, y_train, x_test, y_test), names = data.load_cifar10()
    assert names == ["cat", "dog"] and x_train.shape == (500, 32, 32, 3) and x_test.shape == (100, 32, 32, 3)
    assert (y_train[::100] == range(5)).all() and (y_test == 5).all()
    assert (x_train[:, 3, 7] == [0, 200, 0]).all() and x_train[0].sum() == 200


def test_read_shape(monkeypatch):
    """The check on images for a text: right for what draw_shape draws, wrong if a part of the caption is changed."""
    rng, captions = np.random.default_rng(0), np.array(data.CAPTIONS).reshape(2, 8, 6, 5)  # sizes, colours, ...
    images = [data.draw_shape(caption, rng) for caption in data.CAPTIONS]
    seen = {id(image): data.read_shape(image) for image in images}
    monkeypatch.setattr(data, "read_shape", lambda image: seen[id(image)])
    assert min(data.right(images, data.CAPTIONS).values()) > 0.97
    for i, name in enumerate(("size", "colour", "shape", "place")):
        figures = data.right(images, np.roll(captions, 1, i).ravel())
        assert figures[name] < 0.05 and figures["accuracy"] < 0.05


def test_judge():
    """The classifier that scores: right on held-out digits, far from images of noise, near real ones."""
    x, y = (a[..., None] if a.ndim == 3 else a for a in data.make_digits(2000, 0))
    judge = data.Judge(x[:1500], y[:1500])
    p, real = judge(x[1500:])
    assert (p.argmax(1) == y[1500:]).mean() > 0.93 and np.allclose(p.sum(1), 1, atol=1e-4)
    spoiled = np.random.default_rng(0).permuted(x[1500:], axis=1)
    assert data.frechet(real, judge(x[:500])[1]) * 10 < data.frechet(real, judge(spoiled)[1])
    even = np.full((3, 8, 8, 3), 7, np.uint8)  # one class, nothing to see, the smallest size
    assert np.isfinite(data.Judge(even, np.zeros(3, int), 20)(even)[1]).all()


@pytest.mark.parametrize("blind", [False, True])
def test_inpaint(blind, tmp_path, monkeypatch):
    """To fill holes, the network gets the class of each image, or none; the known part is passed complete."""
    task = make_task("diffusion", "--task", "inpaint", "--count", 100, "--out", tmp_path, *["--blind"] * blind)
    sample = Mock(side_effect=lambda y, rng, known, mask, **more: (known + 3 * (1 - mask))[None])
    monkeypatch.setattr(task, "judged", lambda x, y: ({},))
    figures, _ = task.report(Mock(sample=sample))
    (y, _), asked = sample.call_args
    assert (y == (10 if blind else task.test_y[:24])).all() and asked["sampler"] == "repaint"
    assert asked["guidance"] == 2 and figures["changed"] < 1e-6 and 0.2 < 1 - asked["mask"].mean() < 0.3
    assert (asked["known"] == data.floats(task.test[:24]) * 2 - 1).all() and np.ptp(asked["mask"].argmin(1).max(1)) > 3


def test_tasks(tmp_path):
    """Flowers with a hole; your images, which have no classes; texts in latents."""
    folder = copy_quick("diffusion", tmp_path / "diffusion")
    few = "--widths 16 16 --count 100 --batch-size 8 --sample-steps 2 --steps 3".split()
    (folder / "mine").mkdir()
    for i in range(2):
        Image.new("RGB", (20, 30), (i, 9 * i, 100)).save(folder / f"mine/{i}.png")
    blind = result(folder, "torch", *few, *"--task inpaint --blind --data flowers --fold 4".split(), run=run_here)
    assert blind["changed"] < 1e-6 and blind["counter"] > 0.98 and {"accuracy", "judge", "petals"} <= set(blind)
    mine = result(folder, "torch", *few, *"--data mine --size 16 --sampler langevin --out mine2".split(), run=run_here)
    assert mine["frechet"] > 1 and mine["bits"] > 1 and not {"accuracy", "frechet_real"} & set(mine)
    sizes = [make_args("diffusion", "--size", n) for n in (32, 64, 96)]
    assert [(len(a.widths), a.batch_size, a.steps) for a in sizes] == [(2, 32, 1100), (3, 16, 700), (2, 32, 1100)]
    text = result(folder, "mlx", *few, "--task", "text", "--prompt", "big red star", "--sampler", "heun", run=run_here)
    assert {"size", "colour", "shape", "place", "accuracy"} <= set(text) and text["judge"] > 0.97
