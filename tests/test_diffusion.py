"""The mathematics of diffusion/ against closed forms; the samplers where the best guess is known; what it learns."""

import io
import math
import tarfile
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import BACKENDS, batches, copy_alone, load, load_file, make_run, make_task, make_trainer, result, run_here
from PIL import Image

data = load_file("diffusion", "data")


def array(backend, x):
    return torch.from_numpy(x) if backend == "torch" else mx.array(x)


def numpy(x):
    return x.detach().numpy() if isinstance(x, torch.Tensor) else np.array(x)


# ---- the networks and a step of training -----------------------------------------------------------------------------


def reference(w, config, x, y, t, noise, first):
    """The loss once more, from torch's functions, in (B, C, H, W); w: the weights by name; first: the autoencoder's."""

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def channels(name, x):
        return linear(name, x.movedim(1, -1)).movedim(-1, 1)

    def conv(name, x):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)

    def norm(name, x):  # in eight groups
        return F.group_norm(x, 8, w[f"{name}.weight"], w[f"{name}.bias"])

    def fold(x, k):
        return torch.cat([x[..., i::k, j::k] for i in range(k) for j in range(k)], 1)

    def unfold(x, k):  # torch's order of the channels is (C, k, k)
        return F.pixel_shuffle(x.unflatten(1, (k * k, -1)).transpose(1, 2).flatten(1, 2), k)

    def block(name, x, c):
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)))
        scale, shift = linear(f"{name}.cond", c)[:, :, None, None].chunk(2, 1)
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h) * (1 + scale) + shift))
        return h + (channels(f"{name}.shortcut", x) if f"{name}.shortcut.weight" in w else x)

    def attention(name, x, context=None):  # (B, N, C); a head has 32 channels
        h = F.layer_norm(x, x.shape[2:], w[f"{name}.norm.weight"], w[f"{name}.norm.bias"])
        parts = linear(f"{name}.q", h), *linear(f"{name}.kv", h if context is None else context).chunk(2, -1)
        q, k, v = (a.unflatten(-1, (max(1, x.shape[2] // 32), -1)).transpose(1, 2) for a in parts)
        a = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v
        return x + linear(f"{name}.out", a.transpose(1, 2).flatten(2))

    def unet(x):
        n = config.widths[0]
        waves = t[:, None] * 10000.0 ** (-torch.arange(n // 2) / (n // 2))
        waves = torch.cat([waves.cos(), waves.sin()], 1)
        if config.net == "mlp":
            h = linear("unet.inp", x[..., 0, 0]) + linear("unet.time", waves) + w["unet.label.weight"][y]
            for i in range(len(config.widths)):
                h = h + linear(f"unet.layers.{i}", F.silu(h))
            return linear("unet.out", F.silu(h))[..., None, None]
        c = linear("unet.time2", F.silu(linear("unet.time1", waves)))
        if config.vocab_size:
            words = attention("unet.text.attention", w["unet.text.word.weight"][y] + w["unet.text.place.weight"])
            h = F.layer_norm(words, words.shape[2:], w["unet.text.norm.weight"], w["unet.text.norm.bias"])
            words = words + linear("unet.text.fc2", F.silu(linear("unet.text.fc1", h)))
        c = F.silu(c + (words.mean(1) if config.vocab_size else w["unet.label.weight"][y]))
        x, skips, levels = conv("unet.inp", fold(x, config.fold)), [], range(len(config.widths) - 1)
        for i in levels:
            skips.append(block(f"unet.left.{i}", x, c))
            x = channels(f"unet.down.{i}", fold(skips[i], 2))
        x = block("unet.middle.0", x, c)
        h = attention("unet.attention", x.flatten(2).mT)
        h = attention("unet.cross", h, words) if config.vocab_size else h
        x = block("unet.middle.1", h.mT.reshape(x.shape), c)
        for i in reversed(levels):
            x = block(f"unet.right.{i}", torch.cat([unfold(channels(f"unet.up.{i}", x), 2), skips[i]], 1), c)
        return unfold(conv("unet.out", F.silu(norm("unet.norm", x))), config.fold)

    x, y, t, noise = (torch.from_numpy(a) for a in (x.transpose(0, 3, 1, 2), y, t, noise.transpose(0, 3, 1, 2)))
    target = x
    if config.latent:
        x = F.silu(conv("autoencoder.enc2", fold(F.silu(conv("autoencoder.enc1", fold(x, 2))), 2)))
        x = F.layer_norm(conv("autoencoder.enc3", x), (config.latent, *x.shape[2:]))
    if first:
        x = F.silu(conv("autoencoder.dec2", F.silu(conv("autoencoder.dec1", x + 0.1 * noise))))
        return F.mse_loss(unfold(conv("autoencoder.dec3", unfold(x, 2)), 2), target)
    a = torch.from_numpy(load("diffusion", "torch").alpha_bars(config))[t][:, None, None, None].float()
    x = x.detach()
    target = noise if config.predict == "noise" else a.sqrt() * noise - (1 - a).sqrt() * x
    return F.mse_loss(unet(a.sqrt() * x + (1 - a).sqrt() * noise), target)


@pytest.mark.parametrize("i, backend", [(0, "torch"), (1, "mlx"), (2, "torch"), (2, "mlx"), (3, "torch")])
def test_steps(i, backend, monkeypatch):
    """Losses as by the reference; steps as by torch.optim's Muon and, for vectors and embeddings, AdamW; averages."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's Muon rounds to 8 bits
    net, rng = load("diffusion", backend), np.random.default_rng(0)
    more = {2: {"widths": [16, 64]}, 3: {"ema": 0.2}}.get(i, {})  # two heads; a short average
    trainer = make_trainer("diffusion", i, backend, **more)
    start = {name: w + np.float32(rng.normal(0, 0.1, w.shape)) for name, w in net.get_weights(trainer.model).items()}
    for model in (trainer.model, trainer.average):
        net.set_weights(model, start)  # norms and biases are random, too
    params = {name: torch.tensor(w).flatten(1) if w.ndim > 1 else torch.tensor(w) for name, w in start.items()}
    average, config, rules, lr, steps = {name: 1 * w for name, w in start.items()}, trainer.config, {}, 0.02, 0
    for part in ("autoencoder", "unet"):
        kinds = [], []
        for name, p in params.items():
            if name.startswith(part):
                words = any(f".{table}." in name for table in ("label", "word", "place"))
                kinds[p.ndim > 1 and not words].append(p.requires_grad_())
        if kinds[0]:
            muon = torch.optim.Muon(kinds[1], lr, weight_decay=0, momentum=0.9, adjust_lr_fn="match_rms_adamw")
            rules[part] = torch.optim.AdamW(kinds[0], lr, betas=(0.9, 0.99), weight_decay=0), muon
    for step, arrays in enumerate(batches("diffusion", i, config.first + 3)):
        part = "autoencoder" if step < config.first else "unet"
        steps = 1 if step == config.first else steps + 1  # of this part
        w = {name: p.view(start[name].shape) for name, p in params.items()}
        loss = reference(w, config, *arrays, part == "autoencoder")
        assert float(trainer.step(*arrays, lr=lr)["loss"]) == pytest.approx(loss.item(), rel=1e-3)
        for rule in rules[part]:
            rule.zero_grad()
        loss.backward()
        for rule in rules[part]:
            rule.step()
        moved, means = map(net.get_weights, (trainer.model, trainer.average))
        keep = min(config.ema, steps / (steps + 10))
        if step == config.first - 1:  # latents come from the average from now on
            assert all((moved[name] == means[name]).all() for name in moved)
            average |= means
        for name, p in params.items():
            if step == config.first - 1:
                p.data = torch.tensor(means[name].reshape(p.shape))
            elif name.startswith(part):
                average[name] = keep * average[name] + (1 - keep) * moved[name]
                np.testing.assert_allclose(means[name], average[name], rtol=1e-4, atol=1e-6)
    for name, w in net.get_weights(trainer.model).items():
        if not name.endswith("kv.bias"):  # adding the same to all keys changes nothing, so AdamW moves it at random
            expected = params[name].detach().numpy().reshape(w.shape)
            assert np.linalg.norm(w - expected) < 0.02 * np.linalg.norm(expected - start[name]), name
    loss = reference({name: torch.from_numpy(w) for name, w in average.items()}, config, *arrays, False)
    assert float(trainer.evaluate(*arrays)["val_loss"]) == pytest.approx(loss.item(), rel=1e-3)


def test_init():
    """The distributions of the initial weights, and how many there are in the default and in the text network."""
    net, counts = load("diffusion", "torch"), []
    for more in ({}, dict(image=[32, 32, 3], fold=1, widths=[64, 128], n_class=0, vocab_size=26, length=6, latent=4)):
        weights = net.get_weights(net.Trainer(net.Config(**more), device="cpu").model)
        counts.append(sum(w.size for w in weights.values()))
        for name, w in weights.items():
            if w.ndim == 1:
                assert (w == name.endswith("weight")).all(), name
                continue
            deviation = w.std() * w[0].size ** 0.5
            if any(f".{last}." in name for last in ("conv2", "out", "fc2")):
                deviation *= 10
            elif any(f".{table}." in name for table in ("label", "word", "place")):
                deviation = w.std()
            assert deviation == pytest.approx(1, abs=4 / (2 * w.size) ** 0.5), name
    assert counts == [264516, 1407924]


# ---- the forward process and the bound -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_schedules(backend):
    """From pure image to pure noise; the linear one is the product of 1 - beta, the cosine one its formula."""
    net = load("diffusion", backend)
    for schedule in ("cosine", "linear"):
        a = net.alpha_bars(net.Config(schedule=schedule))
        assert a.shape == (1001,) and a[0] == 1 and (np.diff(a) < 0).all()
    beta = 1 - a[1:] / a[:-1]
    assert beta[0] == pytest.approx(1e-4) and beta[-1] == pytest.approx(0.02) and np.ptp(np.diff(beta)) < 1e-9
    a, t = net.alpha_bars(net.Config(schedule="cosine")), np.array([1, 250, 500, 900])
    f = np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(a[t], f, rtol=1e-6)
    assert a[-1] == pytest.approx(a[-2] / 1000)  # the last beta would be 1


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits(backend):
    """The whole bound: the divergence at the end of the chain, and the terms of a few steps, in bits per dimension."""
    net, trainer = load("diffusion", backend), make_trainer("diffusion", 3, backend, T=10)
    for model in (trainer.model, trainer.average):
        model.a = np.linspace(1, 0.3, 11)
    net.set_weights(trainer.model, {name: 0 * w for name, w in net.get_weights(trainer.model).items()})
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 1, 1, 2), np.float32), np.zeros(50, int)
    end = torch.distributions.Normal(0.3**0.5 * torch.from_numpy(x), 0.7**0.5)
    total = torch.distributions.kl_divergence(end, torch.distributions.Normal(0, 1)).sum()
    rng = np.random.default_rng(1)
    for s, t in ((0, 1), (1, 3), (3, 10)):
        noise = array(backend, rng.standard_normal(x.shape, np.float32))
        total += numpy(net.bound_term(trainer.average, array(backend, x), array(backend, y), t, s, noise)).sum()
    bits = trainer.bound(x, y, np.random.default_rng(1), steps=3)
    assert bits == pytest.approx(float(total) / 100 / math.log(2), rel=1e-5) and bits > 1


# ---- samplers --------------------------------------------------------------------------------------------------------

MEAN, STD = 0.6, 0.3  # of the data, N(MEAN, STD^2): the best guess of x_0 and the ODE's solution are known


def best_guess(a, calls=None):
    def guess(x, t):
        if calls is not None:
            calls.append(t)
        alpha, var = float(a[t]) ** 0.5, float(a[t] * STD**2 + 1 - a[t])
        x_0 = MEAN + alpha * STD**2 / var * (x - alpha * MEAN)
        return x_0, (x - alpha * x_0) / float(1 - a[t]) ** 0.5

    return guess


@pytest.mark.parametrize("sampler, steps", [("ddpm", 200), ("ddim", 100), ("heun", 50), ("langevin", 400)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_samplers(backend, sampler, steps):
    """With the best guess, each follows the density of noisy data, and ends with that of the data."""
    net, rng, calls = load("diffusion", backend), np.random.default_rng(0), []
    a, ts = net.alpha_bars(net.Config()), np.linspace(1000, 0, steps + 1).round().astype(int)

    def noise():
        return array(backend, rng.standard_normal((4000, 1, 1, 1), np.float32))

    path = list(net.SAMPLERS[sampler](best_guess(a, calls), noise(), ts, a, noise))
    assert len(path) == steps and len(calls) == {"heun": 2 * steps, "langevin": 6 * steps + 1}.get(sampler, steps)
    for x, s in list(zip(path, ts[1:]))[-1 if sampler == "langevin" else 0 :]:
        mean, var = numpy(x).mean(), numpy(x).var()
        assert mean == pytest.approx(MEAN * a[s] ** 0.5, abs=0.08 if s else 0.02), s
        assert var == pytest.approx(a[s] * STD**2 + 1 - a[s], rel=0.1), s


@pytest.mark.parametrize("sampler, predict", [("ddim", "v"), *((s, "noise") for s in ("ddpm", "ddim", "heun"))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_guess(backend, sampler, predict):
    """A network whose predictions are a little wrong makes images that are a little wrong, in latents too."""
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
    """Images of four equal pixels, two of them known: these stay unchanged, and the others become equal to them."""
    net, rng, calls, shape = load("diffusion", backend), np.random.default_rng(0), [], (1000, 1, 1, 4)
    a, ts = net.alpha_bars(net.Config()), np.linspace(1000, 0, 51).round().astype(int)
    known = np.float32(rng.standard_normal((1000, 1, 1, 1)) * np.ones(4))
    mask = np.float32([1, 1, 0, 0]) * np.ones(shape, np.float32)

    def guess(x, t):
        alpha, var = float(a[t]) ** 0.5, float(1 - a[t])
        x_0 = alpha * x.sum(-1)[..., None] / (4 * alpha**2 + var) + 0 * x
        calls.append(t)
        return x_0, (x - alpha * x_0) / var**0.5

    def noise():
        return array(backend, rng.standard_normal(shape, np.float32))

    path = list(net.repaint(guess, noise(), ts, a, noise, array(backend, known), array(backend, mask)))
    assert len(path) == 50 and len(calls) == 49 * 5 + 1  # five times back and again
    for x, s in zip(path, ts[1:]):
        assert numpy(x).var() == pytest.approx(1, abs=0.2)  # as known.var() is
        added = numpy(x)[..., :2] - math.sqrt(a[s]) * known[..., :2]
        assert added.var() == pytest.approx(1 - a[s], rel=0.15, abs=1e-9)
    assert np.corrcoef(numpy(x)[..., 2].ravel(), known[..., 0].ravel())[0, 1] > 0.97
    assert np.abs(numpy(x)[..., 2:] - known[..., 2:]).mean() < 0.2


@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance(backend):
    """0: as without the class, 1: as with it, 3: three times as far from the one to the other."""
    net, trainer, rng = load("diffusion", backend), make_trainer("diffusion", 0, backend), np.random.default_rng(0)
    x, y = array(backend, rng.standard_normal((3, 8, 8, 1), np.float32)), array(backend, np.array([0, 1, 2]))
    none, a = array(backend, np.array([3, 3, 3])), trainer.model.a

    def eps(y, guidance):  # before pixels are clipped to -1 ... 1: from a guess that was not clipped
        x_0, eps = net.guess(trainer.model, 0.1 * x, 500, y, none, guidance)
        assert np.abs(numpy(x_0)).max() < 1
        return numpy(eps)

    without, with_y = eps(none, 1.0), eps(y, 1.0)
    assert np.abs(with_y - without).max() > 0.01 and a[500] > 0.1
    np.testing.assert_allclose(eps(y, 0.0), without, atol=1e-5)
    for guidance in (2.0, 3.0):
        np.testing.assert_allclose(eps(y, guidance), without + guidance * (with_y - without), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sample(backend, monkeypatch):
    """From the last t at which something is left of the image down to 0; some stages are kept, and decoded."""
    net, trainer, seen = load("diffusion", backend), make_trainer("diffusion", 2, backend), []

    def spy(guess, x, ts, a, noise, **more):
        seen.append((guess(x, 500)[0], x, ts, more["mask"]))
        yield from ((i + 1) * x for i in range(len(ts) - 1))

    monkeypatch.setitem(net.SAMPLERS, "ddim", spy)
    y, rng, mask = np.array([[1, 2, 0, 0]] * 3), np.random.default_rng(0), np.zeros(5, np.float32)
    kept = trainer.sample(y, rng, "ddim", 6, guidance=3.0, keep=3, mask=mask)
    (x_0, x, ts, there), *_ = seen
    assert ts[0] == np.flatnonzero(trainer.model.a > 1e-3)[-1] and ts[-1] == 0 and len(ts) == 7
    assert (numpy(x) == np.random.default_rng(0).standard_normal((3, 4, 4, 2), np.float32)).all()
    assert kept.shape == (3, 3, 16, 16, 3) and (numpy(there) == mask).all()
    for picture, n in zip(kept, (2, 4, 6)):
        np.testing.assert_allclose(picture, numpy(trainer.average.autoencoder.decode(n * x)), atol=1e-5)
    expected = net.guess(trainer.average, x, 500, *(array(backend, words) for words in (y, 0 * y)), 3.0)[0]
    np.testing.assert_allclose(numpy(x_0), numpy(expected), atol=1e-5)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_average(backend):
    """The average generates, is evaluated and bounds the likelihood; its guess of pixels stays from -1 to 1."""
    net, trainer = load("diffusion", backend), make_trainer("diffusion", 0, backend)
    arrays = batches("diffusion", 0, 1)[0]
    trainer.step(*arrays, lr=1e-2)
    x, y = arrays[:2]

    def said():
        rng = np.random.default_rng(0)
        drawn = trainer.sample(y, rng, steps=4).tobytes()
        return float(trainer.evaluate(*arrays)["val_loss"]), trainer.bound(x, y, rng, 5), drawn

    before = said()
    net.set_weights(trainer.model, {name: 0 * w for name, w in net.get_weights(trainer.model).items()})
    assert said() == before
    net.set_weights(trainer.average, {name: 9 * w for name, w in net.get_weights(trainer.average).items()})
    assert said() != before and np.abs(trainer.denoise(x, y, 900)[0]).max() == 1


def test_told():
    """A tenth of the classes is hidden, in batches of images and of texts; else guidance would learn nothing."""
    rng, y = np.random.default_rng(0), np.arange(4000) % 10
    _, told, t, _ = data.noised(np.zeros((4000, 1, 1, 1), np.float32), y, 10, rng)
    assert 0.08 < (told == 10).mean() < 0.12 and (told[told < 10] == y[told < 10]).all()
    assert t.min() == 1 and t.max() == data.T
    task = make_task("diffusion", "--task", "text", "--count", 100)
    y = np.concatenate([task.batch(step)[1] for step in range(40)])
    assert 0.05 < (y == 0).all(1).mean() < 0.16


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


def test_toy(tmp_path, monkeypatch):
    """A short training: the learned score is near the true one; SDE, ODE and Langevin's chain end near the density."""
    args = "--task toy --sample-steps 20 --batch-size 128 --widths 64 64 --steps 800 --seed 0".split()
    task, trainer, rate = make_run("diffusion", *args, "--out", tmp_path)
    monkeypatch.setattr(data, "fokker_planck", lambda p, time: p)  # it is slow, and the test above covers it
    before = task.report(trainer)[0]
    for step in range(800):
        trainer.step(*task.batch(step), rate(step))
    after, files = task.report(trainer)
    assert before["score_error"] > 0.4 and after["score_error"] < 0.25
    for name in ("SDE", "ODE", "Langevin"):
        assert after[name] < 0.4 < before[name] - 0.1, (name, before[name], after[name])
    with Image.open(tmp_path / files[0]) as image:
        assert image.size[0] > 700 and np.asarray(image.convert("L")).std() > 10


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_cifar10(tmp_path, monkeypatch):
    """Records of a label and red, green and blue planes become images with the channels last."""
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


@pytest.mark.parametrize("part", range(7))
def test_files_that_do_not_fit(part, monkeypatch, capsys):
    """Public datasets that lack labels or test images, or have a class too many, are refused in one line."""
    x, y = np.zeros((20, 28, 28), np.uint8), np.arange(20, dtype=np.uint8) % 10
    whole = [x, y, x[:10], y[:10]]
    bad = [(1, y[:19]), (3, y[:9]), (2, x[:0]), (1, y + 1), (3, y[:10] + 1), (0, x[:, 1:]), (1, x)]
    monkeypatch.setattr(data, "load_idx", lambda name: whole)
    assert len(make_task("diffusion", "--data", "mnist").test) == 10
    whole[bad[part][0]] = bad[part][1]
    with pytest.raises(SystemExit):
        make_task("diffusion", "--data", "mnist")
    assert "do not fit together" in capsys.readouterr().err


def test_count_petals():
    """The check on flowers: right on nearly all real ones, wrong on those with another number, and on a disc."""
    images, petals = data.make_flowers(300, 32, 1)
    seen = np.array([data.count_petals(image) for image in images])
    assert (seen == petals).mean() > 0.98 and len(set(petals)) == 6
    disc = np.hypot(*(np.indices((32, 32)) - 15.3)) < 11
    assert data.count_petals(np.where(disc[..., None], images[0].max((0, 1)), [46, 98, 52])) == 0


def test_read_shape(monkeypatch):
    """The check on images for a text: right for what draw_shape draws, wrong for other captions."""
    rng = np.random.default_rng(0)
    images = [data.draw_shape(caption, rng) for caption in data.CAPTIONS]
    seen = {id(image): data.read_shape(image) for image in images}
    monkeypatch.setattr(data, "read_shape", lambda image: seen[id(image)])
    assert min(data.right(images, data.CAPTIONS).values()) > 0.97
    assert data.right(images, [*data.CAPTIONS[1:], data.CAPTIONS[0]])["accuracy"] < 0.1
    for i in range(4):  # one word of each caption, or its place, is changed
        names = "size", "colour", "shape", "place"
        others = data.SIZES, list(data.COLOURS), data.SHAPES, data.PLACES
        asked = [caption.split(" ", 3) for caption in data.CAPTIONS]
        asked = [[*w[:i], others[i][others[i].index(w[i]) - 1], *w[i + 1 :]] for w in asked]
        figures = data.right(images, map(" ".join, asked))
        assert figures[names[i]] < 0.05 and figures["accuracy"] < 0.05


def test_judge():
    """The classifier that scores: right on held-out digits, far from images of noise, near real ones."""
    x, y = (a[..., None] if a.ndim == 3 else a for a in data.make_digits(3000, 0))
    judge = data.Judge(x[:2500], y[:2500])
    p, real = judge(x[2500:])
    assert (p.argmax(1) == y[2500:]).mean() > 0.93 and np.allclose(p.sum(1), 1, atol=1e-4)
    spoiled = np.random.default_rng(0).permuted(x[2500:], axis=1)
    assert data.frechet(real, judge(x[:500])[1]) * 10 < data.frechet(real, judge(spoiled)[1])
    even = np.full((3, 8, 8, 3), 7, np.uint8)  # one class, nothing to see, the smallest size
    assert np.isfinite(data.Judge(even, np.zeros(3, int))(even)[1]).all()


@pytest.mark.parametrize("blind", [False, True])
def test_inpaint(blind, tmp_path, monkeypatch):
    """To fill holes, the network gets the class of each image, or none; the known part is passed complete."""
    task = make_task("diffusion", "--task", "inpaint", "--count", 100, "--out", tmp_path, *["--blind"] * blind)
    asked = {}

    def sample(y, rng, **options):
        asked.update(options, y=y)
        return (options["known"] + 3 * (1 - options["mask"]))[None]

    monkeypatch.setattr(task, "judged", lambda x, y: ({"accuracy": (x[:, 0, 0, 0] + y).sum()},))
    figures, _ = task.report(SimpleNamespace(sample=sample))
    assert (asked["y"] == (10 if blind else task.test_y[:24])).all() and asked["sampler"] == "repaint"
    assert asked["guidance"] == 2 and figures["changed"] < 1e-6 and 0.2 < 1 - asked["mask"].mean() < 0.3
    assert (asked["known"] == data.floats(task.test[:24]) * 2 - 1).all() and np.ptp(asked["mask"].argmin(1).max(1)) > 3


def test_tasks(tmp_path):
    """Inpainting keeps the known part; flowers; your images; texts in latents, from one framework to the other."""
    folder = copy_alone("diffusion", tmp_path / "diffusion")
    (folder / "mine").mkdir()
    for i in range(2):
        Image.new("RGB", (20, 30), (i, 9 * i, 100)).save(folder / f"mine/{i}.png")

    def train(backend, *args):
        few = "--widths 16 16 --count 100 --batch-size 8 --sample-steps 2 --steps 3".split()
        return result(folder, backend, *few, *args, run=run_here)

    blind = train("torch", "--task", "inpaint", "--blind", "--data", "flowers", "--fold", "4")
    assert blind["changed"] < 1e-6 and blind["counter"] > 0.98 and {"accuracy", "judge", "petals"} <= set(blind)
    mine = train("torch", "--data", "mine", "--size", "16", "--sampler", "langevin", "--out", "of_mine")
    assert mine["frechet"] > 1 and mine["bits"] > 1 and "accuracy" not in mine
    text = ["--task", "text", "--prompt", "big red star", "--out", "text"]
    train("torch", *text, "--steps", "6")
    last = train("mlx", *text, "--steps", "8", "--resume", "--sampler", "heun")
    assert {"size", "colour", "shape", "place", "accuracy"} <= set(last) and last["judge"] > 0.97


def test_quality(tmp_path):
    """A short run draws the digits asked for far more often than chance."""
    args = "--count 1000 --steps 120 --widths 64 64 --fold 7 --lr 0.02".split()
    task, trainer, rate = make_run("diffusion", *args, "--out", tmp_path)
    judge, y, shares = data.Judge(task.x, task.y, 300), np.arange(100) % 10, []
    for steps in (0, 120):
        for step in range(steps):
            trainer.step(*task.batch(step), rate(step))
        x = trainer.sample(y, np.random.default_rng(0), steps=10, guidance=4.0)[-1] / 2 + 0.5
        shares.append((judge(data.pixels(x))[0].argmax(1) == y).mean())
    assert shares[0] < 0.25 and shares[1] > 0.35
