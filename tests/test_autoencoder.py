"""The mathematics of autoencoder/ against other ways to the same figures; its codes, rivals, data and tasks."""

import math

import mlx.core as mx
import numpy as np
import pytest
import torch
from folders import BACKENDS, ROOT, batches, load, load_file, make_trainer, result
from PIL import Image

data = load_file("autoencoder", "data")


def array(backend, x):
    return torch.from_numpy(x) if backend == "torch" else mx.array(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kl_by_samples(backend):
    """The closed form lies within the error of the mean of log q(z) - log p(z) over 200,000 samples of q."""
    rng = np.random.default_rng(0)
    mu, logvar = rng.normal(size=(2, 6, 4))
    z = mu + np.exp(logvar / 2) * rng.normal(size=(200_000, 6, 4))
    log_q = -((z - mu) ** 2) / (2 * np.exp(logvar)) - logvar / 2
    samples = (log_q + z**2 / 2).sum(-1)
    kl = load("autoencoder", backend).kl_divergence(*(array(backend, a) for a in np.float32([mu, logvar])))
    kl = np.array(kl.tolist())
    error = samples.std(0) / math.sqrt(len(samples))
    assert kl.shape == (6,) and kl.min() > 20 * error.max()
    assert (np.abs(kl - samples.mean(0)) < 4.5 * error).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_likelihoods(backend):
    """Bernoulli and Gaussian as torch.distributions has them, at logits far out too."""
    net, rng = load("autoencoder", backend), np.random.default_rng(0)
    s, y = np.float32(rng.normal(0, 30, (3, 4, 5, 2))), np.float32(rng.integers(0, 2, (3, 4, 5, 2)))
    logits = torch.from_numpy(s).double()
    theirs = {
        "bernoulli": torch.distributions.Bernoulli(logits=logits),
        "gaussian": torch.distributions.Normal(torch.sigmoid(logits), 0.3),
    }
    for likelihood, p in theirs.items():
        config = net.Config(image=[4, 5, 2], likelihood=likelihood, std=0.3)
        ours = net.log_likelihood(array(backend, s), array(backend, y), config)
        np.testing.assert_allclose(ours.tolist(), p.log_prob(torch.from_numpy(y)).sum((1, 2, 3)), rtol=1e-5)


def test_elbo():
    """log p(x), summed over a grid of two latents, is the ELBO and KL(q(z|x) || p(z|x)), which the same grid gives."""
    net = load("autoencoder", "torch")
    trainer = make_trainer("autoencoder", 0, "torch", latent=2)
    images, rng = batches("autoencoder", 0, 1)[0][0], np.random.default_rng(0)
    for _ in range(60):
        trainer.step(images, images, rng.standard_normal((16, 2), np.float32), lr=0.01)
    x, line = torch.from_numpy(images[:1]), torch.linspace(-7, 7, 561)
    z = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    cell = math.log((line[1] - line[0]) ** 2)
    normal = torch.distributions.Normal
    with torch.no_grad():
        mu, logvar = trainer.model.encoder(x).chunk(2, -1)
        log_q = normal(mu, torch.exp(logvar / 2)).log_prob(z).sum(-1)
        log_px_z = net.log_likelihood(trainer.model.decoder(z), x.expand(len(z), -1, -1, -1), trainer.config)
        log_joint = log_px_z + normal(0, 1).log_prob(z).sum(-1)
        log_px = torch.logsumexp(log_joint, 0) + cell
        q = torch.exp(log_q + cell)
        elbo = float((q * log_px_z).sum() - net.kl_divergence(mu, logvar))
        gap = float((q * (log_q - (log_joint - log_px))).sum())
    assert q.sum() == pytest.approx(1, abs=1e-3) and gap > 0.01
    assert elbo + gap == pytest.approx(float(log_px), abs=2e-3)
    # and what evaluate says is that ELBO, within the spread of its samples
    many = np.repeat(images[:1], 20_000, 0)
    nelbo = float(trainer.evaluate(many, many, rng.standard_normal((20_000, 2), np.float32))["nelbo"])
    assert nelbo == pytest.approx(-elbo, abs=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_beta(backend):
    """The loss is -log p(x|z) + beta KL."""
    x, y, eps = batches("autoencoder", 0, 1)[0]
    figures = make_trainer("autoencoder", 0, backend).evaluate(x, y, eps)
    nelbo, kl = float(figures["nelbo"]), float(figures["kl"])
    assert kl > 0.01
    for beta in (0.0, 1.0, 50.0):
        loss = float(make_trainer("autoencoder", 0, backend, beta=beta).step(x, y, eps, lr=0.1)["loss"])
        assert loss == pytest.approx(nelbo + (beta - 1) * kl, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_conv(backend):
    """The convolutional net is this chain of torch's functions, with the weights laid out as checkpoints have them."""
    trainer, rng = make_trainer("autoencoder", 2, backend), np.random.default_rng(0)
    net, (images, _, _) = load("autoencoder", backend), batches("autoencoder", 2, 1)[0]
    weights = net.get_weights(trainer.model)
    weights = {name: np.float32(rng.normal(0, 0.3, w.shape)) for name, w in sorted(weights.items())}
    net.set_weights(trainer.model, weights)
    w, F = {name: torch.from_numpy(a) for name, a in weights.items()}, torch.nn.functional
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    for i in range(2):
        x = F.silu(F.conv2d(x, w[f"encoder.layers.{i}.weight"], w[f"encoder.layers.{i}.bias"], stride=2, padding=1))
    mu, logvar = F.linear(x.flatten(1), w["encoder.out.weight"], w["encoder.out.bias"]).chunk(2, 1)
    x = F.linear(mu, w["decoder.inp.weight"], w["decoder.inp.bias"]).reshape(-1, 24, 2, 1)
    for i in range(2):
        x = F.silu(x).repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = F.conv2d(x, w[f"decoder.layers.{i}.weight"], w[f"decoder.layers.{i}.bias"], padding=1)
    ours = trainer.encode(images)
    np.testing.assert_allclose(ours[0], mu, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours[1], torch.exp(logvar / 2), rtol=1e-4, atol=1e-5)
    pictures = trainer.reconstruct(images)
    np.testing.assert_allclose(pictures, torch.sigmoid(x.permute(0, 2, 3, 1)), rtol=1e-3, atol=1e-4)
    assert pictures.shape == (16, 8, 4, 3) and pictures.std() > 0.05


def test_files(tmp_path):
    """After three steps of a convolutional net the two checkpoints hold the same arrays, moments too."""
    files = []
    for backend in BACKENDS:
        trainer = make_trainer("autoencoder", 2, backend)
        for arrays in batches("autoencoder", 2, 3):
            trainer.step(*arrays, lr=1e-3)
        trainer.save(tmp_path / backend, 3)
        with np.load(tmp_path / backend) as f:
            files.append({name: f[name] for name in f.files if name != "meta"})
    assert files[0].keys() == files[1].keys() and files[1]["m.encoder.layers.0.weight"].shape == (16, 3, 4, 4)
    for name, a in files[0].items():
        assert np.abs(files[1][name] - a).max() < 1e-3 * np.abs(a).max(), name


def test_codes():
    """Latents to bytes and back: off by sigma in the root mean square, idle dimensions for nothing."""
    rng = np.random.default_rng(0)
    sigma = np.array([0.01, 0.05, 0.3, 1.0], np.float32)
    mu = np.float32(rng.normal(size=(5000, 4)) * [1, 1, 1, 0.001])
    packed = data.pack(mu, sigma)
    back = data.unpack(packed, 4)
    assert back.shape == mu.shape and back.dtype == np.float32
    assert (data.unpack(data.pack(back, sigma), 4) == back).all()
    np.testing.assert_allclose((back - mu).std(0)[:3], sigma[:3], rtol=0.03)
    assert (back[:, 3] == 0).all()
    codes = np.rint(back / (math.sqrt(12) * sigma)).astype(int)
    counts = [np.unique(column, return_counts=True)[1] / len(mu) for column in codes.T]
    entropy = sum(-(p * np.log2(p)).sum() for p in counts) / 8
    assert entropy < len(packed) / len(mu) < 1.1 * entropy + 0.05


def test_codes_across():
    """What one framework encodes, the other decodes."""
    x = batches("autoencoder", 0, 1)[0][0]
    a, b = (make_trainer("autoencoder", 0, backend) for backend in BACKENDS)
    mu, sigma = a.encode(x)
    z = data.unpack(data.pack(mu, sigma.mean(0) / 10), 5)
    np.testing.assert_allclose(b.decode(z), a.decode(z), atol=1e-5)
    assert np.abs(b.decode(z) - b.reconstruct(x)).max() < 0.1 < np.ptp(b.decode(z))


@pytest.mark.parametrize("form", ["JPEG", "WebP"])
def test_rival(form):
    """At least the bytes asked for, and the pictures come back whole and in their order; grey ones too."""
    x = data.floats(data.make_flowers(30, 32, 0)[0])
    small, big = (data.rival(form, x, size) for size in (3_000, 10_000))
    assert 3_000 <= small[1] < 3_500 and 10_000 <= big[1] < 11_000
    assert data.psnr(small[0], x) + 2 < data.psnr(big[0], x)
    assert min(data.psnr(y, x_i) for y, x_i in zip(big[0], x)) > 22
    grey, _ = data.rival(form, x[..., :1], 3_000)
    assert grey.shape == (30, 32, 32, 1) and data.psnr(grey, x[..., :1]) > 25


def test_median():
    x = data.floats(np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3)).astype(np.uint8))
    y = data.median(x)
    assert y.shape == x.shape
    np.testing.assert_allclose(y[1, 4, 3], np.median(x[1, 3:6, 2:5].reshape(9, 3), 0), atol=1e-6)


def test_psnr():
    x = np.zeros((2, 4, 4, 1), np.float32)
    assert data.psnr(x + np.float32(0.1), x) == pytest.approx(20, abs=1e-4)


def test_flowers():
    images, petals = data.make_flowers(60, 24, 5)
    assert images.shape == (60, 24, 24, 3) and images.dtype == np.uint8 and set(petals) == set(range(4, 10))
    assert (images == data.make_flowers(60, 24, 5)[0]).all() and (images != data.make_flowers(60, 24, 6)[0]).any()
    green = images[:, 0].mean((0, 1))  # the upper edge is grass
    assert green.argmax() == 1 and images[:, 12, 12].std(0).max() > 5


def test_folder(tmp_path):
    """Pictures of all sizes and modes, in subfolders too; other files are passed over."""
    for i, mode in enumerate(["RGB", "L", "RGBA", "P", "1"] * 4):
        file = tmp_path / f"{i % 3}" / f"{i:02}.{'png' if i % 2 else 'gif'}"
        file.parent.mkdir(exist_ok=True)
        Image.new(mode, (20 + i, 40 - i), 1 if mode in "P1" else None).save(file)
    (tmp_path / "notes.txt").write_text("no picture")
    images, number, held, rest = data.read_folder(tmp_path, 16)
    assert images.shape == (18, 16, 16, 3) and held.shape == (2, 16, 16, 3)
    assert sorted([*number, *rest]) == list(range(20))


def test_jitter():
    """Bent about the middle: nothing at 0 but for a shift, the more the larger; every picture in its own way."""
    x = data.make_digits(50, 0)[0][..., None]
    bent = {amount: data.jitter(x, amount, np.random.default_rng(0)) for amount in (0.0, 0.06, 0.3)}
    psnr = [data.psnr(data.floats(y), data.floats(x)) for y in bent.values()]
    assert psnr[0] > psnr[1] + 2 > psnr[2] + 4
    rows, columns = np.nonzero(bent[0.06].mean(0)[..., 0] > 40)
    assert abs(rows.mean() - 13.5) < 1 and abs(columns.mean() - 13.5) < 1
    same = data.jitter(np.repeat(x[:1], 2, 0), 0.06, np.random.default_rng(0))
    assert same.dtype == np.uint8 and (same[0] != same[1]).any()
    assert data.jitter(np.zeros((2, 9, 7, 3), np.uint8), 0.1, np.random.default_rng(0)).shape == (2, 9, 7, 3)


SHORT = ["--steps", "400", "--batch-size", "64", "--hidden", "512", "--count", "2000", "--lr", "4e-3"]


def test_denoise(tmp_path):
    """A short run gains much over the noise and beats the median filter."""
    figures = result(ROOT / "autoencoder", "torch", "--task", "denoise", *SHORT, "--out", tmp_path)
    assert 13 < figures["psnr_noisy"] < 13.3 and 17.5 < figures["psnr_median"] < 17.9
    assert figures["psnr"] > figures["psnr_median"] + 0.5


def test_compress(tmp_path):
    """A short run beats JPEG, which can't make its file as small; the file has the size that the result says."""
    figures = result(ROOT / "autoencoder", "torch", "--task", "compress", *SHORT, "--std", "0.15", "--out", tmp_path)
    assert figures["bytes"] < 0.9 * figures["bytes_jpeg"] and figures["bytes"] < 0.9 * figures["bytes_webp"]
    assert figures["psnr"] > figures["psnr_jpeg"] + 0.3
    assert (tmp_path / "test.codes").stat().st_size == pytest.approx(400 * figures["bytes"], abs=4)
    assert str(tmp_path / "test.codes") in figures["files"]


def test_map(tmp_path):
    """With two latents the picture has the map of their plane below the walks: 12 rows more, no two of them alike."""
    sizes = []
    for latent in ("3", "2"):
        short = "--steps 60 --batch-size 32 --hidden 64 --count 500".split()
        result(ROOT / "autoencoder", "torch", *short, "--latent", latent, "--out", tmp_path)
        with Image.open(tmp_path / "sample.png") as image:
            sizes.append(image.height)
            sheet = np.asarray(image, np.float32)
    assert sizes[1] == sizes[0] + 28 + 12 * 58
    rows = sheet[sizes[0] + 22 : sizes[0] + 22 + 12 * 58, 6:700].reshape(12, 58, 694)
    assert min(np.abs(a - b).mean() for a, b in zip(rows, rows[1:])) > 0.1
