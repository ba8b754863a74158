"""The mathematics of autoencoder/ against independent calculations; its codes, rivals, data and tasks."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import BACKENDS, batches, load, load_file, make_run, make_task, make_trainer
from PIL import Image
from test_parity import randomise

data = load_file("autoencoder", "data")


def test_likelihoods():
    """Bernoulli and Gaussian as torch.distributions has them, at logits far out too."""
    net, rng = load("autoencoder", "torch"), np.random.default_rng(0)
    s, y = torch.from_numpy(rng.normal(0, 30, (3, 4, 5, 2))), torch.from_numpy(rng.integers(0, 2, (3, 4, 5, 2)) * 1.0)
    normal = torch.distributions.Normal(torch.sigmoid(s), 0.1)
    for likelihood, p in (("bernoulli", torch.distributions.Bernoulli(logits=s)), ("gaussian", normal)):
        ours = net.log_likelihood(s, y, net.Config(likelihood=likelihood))
        np.testing.assert_allclose(ours, p.log_prob(y).sum((1, 2, 3)), rtol=1e-5)


def test_elbo():
    """log p(x), summed over a grid of two latents, is the ELBO, as evaluate has it, and KL(q(z|x) || p(z|x))."""
    net, trainer = load("autoencoder", "torch"), make_trainer("autoencoder", 0, "torch", latent=2)
    images, rng, normal = batches("autoencoder", 0, 1)[0][0], np.random.default_rng(0), torch.distributions.Normal
    for _ in range(60):
        trainer.step(images, images, rng.standard_normal((16, 2), np.float32), lr=0.01)
    x, line = torch.from_numpy(images[:1]), torch.linspace(-7, 7, 141)  # in steps of 0.1
    z, cell = torch.cartesian_prod(line, line), 2 * math.log(0.1)
    with torch.no_grad():
        mu, logvar = trainer.model.encoder(x).chunk(2, -1)
        log_q = normal(mu, torch.exp(logvar / 2)).log_prob(z).sum(-1)
        log_px_z = net.log_likelihood(trainer.model.decoder(z), x.expand(len(z), -1, -1, -1), trainer.config)
        log_joint = log_px_z + normal(0, 1).log_prob(z).sum(-1)
        log_px, q = torch.logsumexp(log_joint, 0) + cell, torch.exp(log_q + cell)
        elbo = float((q * log_px_z).sum() - net.kl_divergence(mu, logvar))
        gap = float((q * (log_q - (log_joint - log_px))).sum())
    assert q.sum() == pytest.approx(1, abs=1e-3) and gap > 0.01 and elbo + gap == pytest.approx(float(log_px), abs=2e-3)
    many, eps = np.repeat(images[:1], 20_000, 0), rng.standard_normal((20_000, 2), np.float32)
    assert float(trainer.evaluate(many, many, eps)["nelbo"]) == pytest.approx(-elbo, abs=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_beta(backend):
    """The loss is -log p(x|z) + beta KL."""
    arrays = batches("autoencoder", 0, 1)[0]
    nelbo, kl = map(float, make_trainer("autoencoder", 0, backend).evaluate(*arrays).values())
    for more in ({}, {"beta": 0.0}, {"beta": 50.0}):
        loss = float(make_trainer("autoencoder", 0, backend, **more).step(*arrays, lr=0.1)["loss"])
        assert loss == pytest.approx(nelbo + (more.get("beta", 1) - 1) * kl, rel=1e-5) and kl > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_conv(backend):
    """The convolutional net is this chain of torch's functions, with the weights laid out as checkpoints have them."""
    trainer, images = make_trainer("autoencoder", 2, backend), batches("autoencoder", 2, 1)[0][0]
    w = [torch.from_numpy(a) for a in randomise("autoencoder", backend, trainer, 0.3).values()]
    x = F.silu(F.conv2d(torch.from_numpy(images).permute(0, 3, 1, 2), *w[:2], stride=2, padding=1))
    x = F.silu(F.conv2d(x, *w[2:4], stride=2, padding=1))
    mu, logvar = F.linear(x.flatten(1), *w[4:6]).chunk(2, 1)
    x = F.interpolate(F.silu(F.linear(mu, *w[6:8])).reshape(16, 24, 2, 1), scale_factor=2)
    x = F.interpolate(F.silu(F.conv2d(x, *w[8:10], padding=1)), scale_factor=2)
    x = torch.sigmoid(F.conv2d(x, *w[10:], padding=1)).permute(0, 2, 3, 1)
    for a, b in zip((*trainer.encode(images), trainer.reconstruct(images)), (mu, torch.exp(logvar / 2), x)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert x.std() > 0.05


# ---- codes, rivals, data and tasks -----------------------------------------------------------------------------------


def test_codes():
    """Latents to bytes and back: the root mean square error is sigma, and idle dimensions cost nothing."""
    rng, sigma = np.random.default_rng(0), np.array([0.01, 0.05, 0.3, 1.0], np.float32)
    mu = np.float32(rng.normal(size=(5000, 4)) * [1, 1, 1, 0.001])
    back = data.unpack(packed := data.pack(mu, sigma), 4)
    assert back.shape == mu.shape and back.dtype == np.float32 and (back[:, 3] == 0).all()
    assert (data.unpack(data.pack(back, sigma), 4) == back).all()
    np.testing.assert_allclose((back - mu).std(0)[:3], sigma[:3], rtol=0.03)
    shares = [np.unique(column, return_counts=True)[1] / len(mu) for column in back.T]
    entropy = sum(-(p * np.log2(p)).sum() for p in shares) / 8
    assert entropy < len(packed) / len(mu) < 1.1 * entropy + 0.05


@pytest.mark.parametrize("form", ["JPEG", "WebP"])
def test_rival(form):
    """At least the requested bytes, and the images come back complete and in order; grey ones too."""
    x = data.floats(data.make_flowers(30, 32, 0)[0])
    small, big = (data.rival(form, x, size) for size in (3_000, 10_000))
    assert 3_000 <= small[1] < 3_500 and 10_000 <= big[1] < 11_000
    assert data.psnr(small[0], x) + 2 < data.psnr(big[0], x) and min(map(data.psnr, big[0], x)) > 22
    grey, _ = data.rival(form, x[..., :1], 3_000)
    assert grey.shape == (30, 32, 32, 1) and data.psnr(grey, x[..., :1]) > 25


def test_flowers():
    """Of 3 to 6 petals, one upwards, countable at 24 pixels, each by chance of its seed, on grass; a disc has none."""
    images, petals = data.make_flowers(60, 24, 5)
    assert [data.count_petals(image) for image in images] == petals.tolist() and set(petals) == set(range(3, 7))
    assert (images == data.make_flowers(60, 24, 5)[0]).all() and images[:, 0].mean((0, 1)).argmax() == 1
    up, down = (images[petals == 3][:, [4, 19], 12].argmax(-1) != 1).mean(0)  # where a flower of three has a petal
    assert images.dtype == np.uint8 and up > 0.8 > 0.3 > down and (images != data.make_flowers(60, 24, 6)[0]).any()
    disc = np.where(np.hypot(*(np.indices((32, 32)) - 15.3))[..., None] < 11, images[0].max((0, 1)), [46, 98, 52])
    assert data.count_petals(disc) == 0


def test_folder(tmp_path):
    """Images of all sizes and modes, in subfolders too; other files are skipped."""
    for i, mode in enumerate(["RGB", "L", "RGBA", "P", "1"] * 4):
        file = tmp_path / f"{i % 3}" / f"{i:02}.{'png' if i % 2 else 'gif'}"
        file.parent.mkdir(exist_ok=True)
        Image.new(mode, (20 + i, 40 - i), 1 if mode in "P1" else None).save(file)
    (tmp_path / "notes.txt").write_text("no picture")
    images, number, held, rest = data.read_folder(tmp_path, 16)
    assert images.shape == (18, 16, 16, 3) and held.shape == (2, 16, 16, 3) and sorted([*number, *rest]) == [*range(20)]


def test_jitter():
    """Distorted around the middle: at 0 only a shift, more with larger amounts; every image in its own way."""
    x = data.make_digits(50, 0)[0][..., None]
    bent = [data.jitter(x, amount, np.random.default_rng(0)) for amount in (0.0, 0.06, 0.3)]
    psnr = [data.psnr(data.floats(y), data.floats(x)) for y in bent]
    assert psnr[0] > psnr[1] + 2 > psnr[2] + 4
    assert np.abs(np.argwhere(bent[1].mean(0)[..., 0] > 40).mean(0) - 13.5).max() < 1
    same = data.jitter(np.repeat(data.make_flowers(1, 16, 0)[0][:, :9], 2, 0), 0.06, np.random.default_rng(0))
    assert same.dtype == np.uint8 and same.shape == (2, 9, 16, 3) and (same[0] != same[1]).any()
    task = make_task("autoencoder", "--jitter", 0.1, "--count", 100, "--steps", 50)
    whole = {x.tobytes() for x in data.floats(task.train)}
    seen = [{x.tobytes() for x in task.batch(step)[1]} for step in (39, 40)]  # the last fifth of the steps goes without
    assert not seen[0] & whole and seen[1] <= whole


def test_map(tmp_path):
    """With two latents, the image has a map of their plane below the walks: 12 more rows, all different."""
    net, sheets = load("autoencoder", "torch"), []
    for latent in (3, 2):
        task, trainer, _ = make_run("autoencoder", "--latent", latent, "--count", 200, "--out", tmp_path)
        net.set_weights(trainer.model, {name: 3 * w for name, w in net.get_weights(trainer.model).items()})
        task.report(trainer)
        sheets.append(np.asarray(Image.open(tmp_path / "sample.png"), np.float32))
    rows = sheets[1][len(sheets[0]) + 22 : -6, 6:700].reshape(12, 58, 694)  # which fails if there are not as many
    assert min(np.abs(a - b).mean() for a, b in zip(rows, rows[1:])) > 0.1
