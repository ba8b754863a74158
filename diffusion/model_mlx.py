"""Denoising diffusion (DDPM) and a small Stable Diffusion in MLX.

    image x (B, H, W, C) -> noisy x_t -> UNet(x_t, t, y) -> the noise in it, or v -> x_0, step by step

The forward process is a fixed Markov chain: T steps, each of which adds a little noise,
    q(x_t | x_t-1) = N(sqrt(1 - beta_t) x_t-1, beta_t I)
so that with a_t = (1 - beta_1) ... (1 - beta_t), called alpha_bar in the paper,
    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps, eps ~ N(0, I)
and x_T is pure noise. A step back, if x_0 were known, would be Gaussian too, for any s < t and a_ts = a_t / a_s:
    q(x_s | x_t, x_0) = N(mu, sigma^2 I), sigma^2 = (1 - a_ts) (1 - a_s) / (1 - a_t)
    mu = sqrt(a_s) (1 - a_ts) / (1 - a_t) x_0 + sqrt(a_ts) (1 - a_s) / (1 - a_t) x_t
The network guesses x_0 from x_t, by predicting eps or v = sqrt(a_t) eps - sqrt(1 - a_t) x_0, which gives x_0 as
    x_0 = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t) = sqrt(a_t) x_t - sqrt(1 - a_t) v
and p(x_s | x_t) = q(x_s | x_t, the guess). This bounds the likelihood, with E_t over x_t ~ q(x_t | x_0), -log p(x_0) <=
    KL(q(x_T | x_0) | N(0, I)) + sum over t > 1 of E_t KL(q(x_t-1 | x_t, x_0) | p(x_t-1 | x_t)) - E_1 log p(x_0 | x_1)
Gaussians of equal sigma: KL = |mu - mu'|^2 / (2 sigma^2) = (snr_t-1 - snr_t) / 2 |x_0 - guess|^2, snr = a / (1 - a).
The simple loss has other weights: |eps - guess|^2 is snr_t times |x_0 - guess|^2, and for v (snr_t + 1) times.
The best guess of eps also gives the score, the gradient of the log density:
    grad log p_t(x_t) = -E[eps | x_t] / sqrt(1 - a_t)

Ho et al. 2020, DDPM; Nichol and Dhariwal 2021, the cosine schedule; Song et al. 2021, DDIM; Song et al. 2021, the score
and the ODE; Salimans and Ho 2022, v; Ho and Salimans 2022, guidance; Lugmayr et al. 2022, RePaint; Rombach et al. 2022,
Stable Diffusion.
"""

import json
import math
import os
from dataclasses import asdict, dataclass

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # full float32 on CUDA and Apple M5 too; read on import

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten


@dataclass
class Config:
    image: tuple = (28, 28, 1)  # height, width, channels
    fold: int = 2  # squares of fold x fold pixels become channels; 2: a quarter of the places, four times as fast
    widths: tuple = (32, 64)  # channels at each level; each level down halves the rows and columns
    n_class: int = 10  # y is a class, or n_class for none; 0: y is always 0
    vocab_size: int = 0  # y is a text in this many words, or all 0 for none; 0: no text
    length: int = 8  # words of a text, padded with 0
    latent: int = 0  # channels of the autoencoder's latents, in which the diffusion takes place; 0: in pixels
    first: int = 0  # the first steps of training are the autoencoder's
    net: str = "unet"  # unet, or mlp for points, (1, 1, C)
    predict: str = "v"  # v or noise
    schedule: str = "cosine"  # cosine or linear
    T: int = 1000  # steps from image to noise
    ema: float = 0.995  # images come from an average of the weights

    def __post_init__(self):
        if self.widths[0] % 2:
            raise ValueError(f"widths: the first must be even, not {self.widths[0]}: half are sines of t, half cosines")


# Torch's layers want (B, C, H, W), MLX's (B, H, W, C), as everywhere else here: hence these two classes.


class Conv(nn.Conv2d):
    """A convolution, 3x3, of x (B, H, W, n) -> (B, H, W, m)."""

    def __init__(self, n, m):
        super().__init__(n, m, 3, padding=1)

    def __call__(self, x):
        return super().__call__(x)


class GroupNorm(nn.GroupNorm):
    """Eight groups of channels, each normalised to mean 0 and variance 1 in each image; x (B, H, W, n)."""

    def __init__(self, n):
        super().__init__(math.gcd(8, n), n, pytorch_compatible=True)

    def __call__(self, x):
        return super().__call__(x)


def fold(x, k):
    """Squares of k x k pixels become channels: (B, H, W, C) -> (B, H/k, W/k, k k C)."""
    B, H, W, C = x.shape
    return x.reshape(B, H // k, k, W // k, k, C).transpose(0, 1, 3, 2, 4, 5).reshape(B, H // k, W // k, k * k * C)


def unfold(x, k):
    """The inverse: (B, H, W, k k C) -> (B, H k, W k, C)."""
    B, H, W, C = x.shape
    return x.reshape(B, H, W, k, k, C // k // k).transpose(0, 1, 3, 2, 4, 5).reshape(B, H * k, W * k, C // k // k)


def sinusoids(t, n):
    """t (B,) -> (B, n): waves of t, from fast to slow."""
    angle = t[:, None] * mx.exp(mx.arange(n // 2) * (-2 * math.log(10000) / n))
    return mx.concatenate([mx.cos(angle), mx.sin(angle)], 1)


class Block(nn.Module):
    def __init__(self, n, m, n_cond):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(n), Conv(n, m)
        self.norm2, self.conv2 = GroupNorm(m), Conv(m, m)
        self.cond = nn.Linear(n_cond, 2 * m)
        self.shortcut = nn.Identity() if n == m else nn.Linear(n, m)

    def __call__(self, x, c):
        h = self.conv1(nn.silu(self.norm1(x)))
        scale, shift = self.cond(c)[:, None, None].split(2, -1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(nn.silu(h))


class Attention(nn.Module):
    """Each place of x (B, N, n) attends to all places, or to the words of a context (B, L, n_context)."""

    def __init__(self, n, n_context):
        super().__init__()
        self.norm, self.q, self.kv = nn.LayerNorm(n), nn.Linear(n, n), nn.Linear(n_context, 2 * n)
        self.out, self.n_head = nn.Linear(n, n), math.gcd(n, max(1, n // 32))

    def __call__(self, x, context=None):
        (B, N, C), h = x.shape, self.norm(x)
        q = self.q(h).reshape(B, N, self.n_head, -1).swapaxes(1, 2)
        kv = self.kv(h if context is None else context).reshape(B, -1, 2, self.n_head, C // self.n_head)
        k, v = kv[:, :, 0].swapaxes(1, 2), kv[:, :, 1].swapaxes(1, 2)
        a = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        return x + self.out(a.swapaxes(1, 2).reshape(B, N, C))


class TextEncoder(nn.Module):
    def __init__(self, config, n):
        super().__init__()
        self.word, self.place = nn.Embedding(config.vocab_size, n), nn.Embedding(config.length, n)
        self.attention, self.norm = Attention(n, n), nn.LayerNorm(n)
        self.fc1, self.fc2 = nn.Linear(n, 2 * n), nn.Linear(2 * n, n)

    def __call__(self, ids):
        """ids (B, L) -> (B, L, n)"""
        x = self.attention(self.word(ids) + self.place.weight)
        return x + self.fc2(nn.silu(self.fc1(self.norm(x))))


class UNet(nn.Module):
    def __init__(self, config, image):
        super().__init__()
        self.config, widths, last = config, config.widths, config.widths[-1]
        n_in, n = image[2] * config.fold**2, 2 * widths[0]
        self.time1, self.time2 = nn.Linear(widths[0], n), nn.Linear(n, n)
        self.inp = Conv(n_in, widths[0])
        pairs = list(zip(widths, widths[1:]))
        self.left = [Block(n1, n1, n) for n1, _ in pairs]
        self.down = [nn.Linear(4 * n1, n2) for n1, n2 in pairs]
        self.middle = [Block(last, last, n) for _ in range(2)]
        self.attention = Attention(last, last)
        self.up = [nn.Linear(n2, 4 * n1) for n1, n2 in pairs]
        self.right = [Block(2 * n1, n1, n) for n1, _ in pairs]
        self.norm, self.out = GroupNorm(widths[0]), Conv(widths[0], n_in)
        if config.vocab_size:
            self.text, self.cross = TextEncoder(config, n), Attention(last, n)
        else:
            self.label = nn.Embedding(config.n_class + 1, n)

    def __call__(self, x, t, y):
        """x (B, H, W, C), t (B,), y (B,) or (B, length) -> (B, H, W, C)"""
        c, skips = self.time2(nn.silu(self.time1(sinusoids(t, self.config.widths[0])))), []
        words = self.text(y) if self.config.vocab_size else None  # (B, length, n)
        c = nn.silu(c + (self.label(y) if words is None else words.mean(1)))
        x = self.inp(fold(x, self.config.fold))
        for left, down in zip(self.left, self.down):
            x = left(x, c)
            skips.append(x)
            x = down(fold(x, 2))
        x = self.middle[0](x, c)
        h = self.attention(x.flatten(1, 2))
        h = h if words is None else self.cross(h, words)
        x = self.middle[1](h.reshape(x.shape), c)
        for up, right in zip(reversed(self.up), reversed(self.right)):
            x = right(mx.concatenate([unfold(up(x), 2), skips.pop()], -1), c)
        return unfold(self.out(nn.silu(self.norm(x))), self.config.fold)


class MLP(nn.Module):
    def __init__(self, config, image):
        super().__init__()
        self.config, n = config, config.widths[0]
        self.inp, self.time = nn.Linear(image[2], n), nn.Linear(n, n)
        self.label = nn.Embedding(config.n_class + 1, n)
        self.layers = [nn.Linear(n, n) for _ in config.widths]
        self.out = nn.Linear(n, image[2])

    def __call__(self, x, t, y):
        """x (B, 1, 1, C), t (B,), y (B,) -> (B, 1, 1, C)"""
        c = self.time(sinusoids(t, self.config.widths[0])) + self.label(y)
        h = self.inp(x) + c[:, None, None]
        for layer in self.layers:
            h = h + layer(nn.silu(h))
        return self.out(nn.silu(h))


class Autoencoder(nn.Module):
    """Images to latents with a quarter of the rows and columns, and back."""

    def __init__(self, config, n=32):
        super().__init__()
        C, latent = config.image[2], config.latent
        self.enc1, self.enc2, self.enc3 = Conv(4 * C, n), Conv(4 * n, 2 * n), Conv(2 * n, latent)
        self.dec1, self.dec2, self.dec3 = Conv(latent, 2 * n), Conv(2 * n, 4 * n), Conv(n, 4 * C)

    def encode(self, x):
        """x (B, H, W, C) -> z (B, H/4, W/4, latent), of mean 0 and variance 1 in each image, as the noise will be."""
        z = self.enc3(nn.silu(self.enc2(fold(nn.silu(self.enc1(fold(x, 2))), 2))))
        return mx.fast.layer_norm(z.flatten(1), None, None, 1e-5).reshape(z.shape)

    def decode(self, z):
        """z (B, H/4, W/4, latent) -> x (B, H, W, C)"""
        return unfold(self.dec3(nn.silu(unfold(self.dec2(nn.silu(self.dec1(z))), 2))), 2)


class Diffusion(nn.Module):
    def __init__(self, config):
        super().__init__()
        (H, W, C), n = config.image, config.latent
        self.config, self.a = config, alpha_bars(config)
        self.unet = (UNet if config.net == "unet" else MLP)(config, (H // 4, W // 4, n) if n else (H, W, C))
        if n:
            self.autoencoder = Autoencoder(config)


# ---- the forward process and the loss --------------------------------------------------------------------------------


def alpha_bars(config):
    """a_0 = 1, a_1 ... a_T, numpy.

    The cosine schedule ends at 2e-9: there x_0 from eps would have 20,000 times the error of eps. Sampling begins where
    a_t > 1e-3, with at most 31 times the error; an image there is noise except for a thirtieth.
    """
    if config.schedule == "linear":
        beta = np.linspace(1e-4, 0.02, config.T) * 1000 / config.T
    else:
        f = np.cos((np.arange(config.T + 1) / config.T + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clip(0, 0.999)
    return np.append(1, np.cumprod(1 - beta))


def coefficients(model, t):
    """sqrt(a_t) and sqrt(1 - a_t) of t (B,), as (B, 1, 1, 1)."""
    a = mx.array(np.float32(model.a))[t][:, None, None, None]
    return a**0.5, (1 - a) ** 0.5


def loss_fn(model, x, y, t, noise):
    """The simple loss for x, noise (B, H, W, C), y, t (B,): that of a denoising autoencoder, for all noise levels."""
    if model.config.latent:
        x = mx.stop_gradient(model.autoencoder.encode(x))
    alpha, sigma = coefficients(model, t)
    x_t = alpha * x + sigma * noise
    target = noise if model.config.predict == "noise" else alpha * noise - sigma * x
    return ((model.unet(x_t, t, y) - target) ** 2).mean()


def autoencoder_loss(model, x, y, t, noise):
    """The autoencoder's: its latents get a little noise, so that similar latents become similar images."""
    z = model.autoencoder.encode(x)
    return ((model.autoencoder.decode(z + 0.1 * noise) - x) ** 2).mean()


LOSSES = {"autoencoder.": autoencoder_loss, "unet.": loss_fn}  # of each part, by the prefix of its parameters' names


def guess(model, x, t, y, none=None, guidance=1.0):
    """The network's estimate of what x_t (B, H, W, C) was made of: (x_0, eps). t is a number.

    Guidance goes from the output without y towards that with y, and beyond it if guidance > 1.
    """
    config, a = model.config, float(model.a[t])
    alpha, sigma = a**0.5, (1 - a) ** 0.5
    ts = mx.full((len(x),), int(t))
    out = model.unet(x, ts, y)
    if guidance != 1:
        without = model.unet(x, ts, none)
        out = without + guidance * (out - without)
    x_0 = alpha * x - sigma * out if config.predict == "v" else (x - sigma * out) / alpha
    if config.net == "unet" and not config.latent:
        x_0 = mx.clip(x_0, -1, 1)  # pixels are from -1 to 1
    return x_0, (x - alpha * x_0) / sigma


def posterior(a, t, s):
    """q(x_s | x_t, x_0) = N(of_0 x_0 + of_t x_t, var I): (of_0, of_t, var)."""
    a_ts = a[t] / a[s]
    of_0, of_t = a[s] ** 0.5 * (1 - a_ts) / (1 - a[t]), a_ts**0.5 * (1 - a[s]) / (1 - a[t])
    return float(of_0), float(of_t), float((1 - a_ts) * (1 - a[s]) / (1 - a[t]))


def bound_term(model, x, y, t, s, noise):
    """The bound's term for the step from t to s, numbers, in nats for each image (B,): KL(q(x_s | x_t, x_0) | p).

    For s = 0 it is -log p(x_0 | x_t), where each pixel is one of 256 and p normal, N(the guess, (1 - a_t) / a_t).
    """
    a, snr = float(model.a[t]), model.a[[t, s]] / (1 - model.a[[t, s]] + 1e-12)
    x_0, _ = guess(model, a**0.5 * x + (1 - a) ** 0.5 * noise, t, y)
    if s:
        return (float(snr[1] - snr[0]) / 2 * (x - x_0) ** 2).flatten(1).sum(1)
    low, high = (mx.erf((x - x_0 + edge) * (a / (1 - a) / 2) ** 0.5) / 2 for edge in (-1 / 255, 1 / 255))
    return -mx.log(mx.clip(high - low, 1e-6, 1)).flatten(1).sum(1)


# ---- samplers: from x at ts[0] to x at ts[-1] = 0, each step yielded; guess(x, t) -> (x_0, eps); noise() ~ N(0, I) ---


def ddpm(guess, x, ts, a, noise):
    """The Markov chain backwards: x_s ~ q(x_s | x_t, the guess of x_0)."""
    for t, s in zip(ts, ts[1:]):
        of_0, of_t, var = posterior(a, t, s)
        x = of_0 * guess(x, t)[0] + of_t * x + var**0.5 * noise()
        yield x


def ddim(guess, x, ts, a, noise):
    """The same guess, but with the predicted noise kept: x_s = sqrt(a_s) x_0 + sqrt(1 - a_s) eps."""
    for t, s in zip(ts, ts[1:]):
        x_0, eps = guess(x, t)
        x = float(a[s] ** 0.5) * x_0 + float((1 - a[s]) ** 0.5) * eps
        yield x


def heun(guess, x, ts, a, noise):
    """The probability-flow ODE. With sqrt(a) = cos(phi), x = cos(phi) x_0 + sin(phi) eps, it is dx/dphi = v.

    The trapezoidal rule: an Euler step finds v at the end; the step is taken with the mean of both v. The network
    is called twice per step.
    """

    def velocity(x, t):
        x_0, eps = guess(x, t)
        return float(a[t] ** 0.5) * eps - float((1 - a[t]) ** 0.5) * x_0

    phi = np.arccos(np.sqrt(a))
    for t, s in zip(ts, ts[1:]):
        v, h = velocity(x, t), float(phi[s] - phi[t])
        x = x + h * (v + velocity(x + h * v, s or 1)) / 2  # at 0 there is no noise to predict
        yield x


def langevin(guess, x, ts, a, noise, inner=6, r=0.5):
    """Langevin dynamics at each level: x + h/2 score + sqrt(h) z, which turns any x into a sample of the density."""
    for t, s in zip(ts, ts[1:]):
        h = float(r * (1 - a[t]))
        for _ in range(inner):
            score = -guess(x, t)[1] / float(1 - a[t]) ** 0.5
            x = x + h / 2 * score + h**0.5 * noise()
        x = x if s else guess(x, t)[0]
        yield x


def repaint(guess, x, ts, a, noise, known, mask, again=5):
    """DDPM in the hole, mask = 0; known pixels, mask = 1, get as much noise. Steps are repeated to make both agree."""
    for t, s in zip(ts, ts[1:]):
        of_0, of_t, var = posterior(a, t, s)
        for i in range(again if s else 1):
            inside = of_0 * guess(x, t)[0] + of_t * x + var**0.5 * noise()
            outside = float(a[s] ** 0.5) * known + float((1 - a[s]) ** 0.5) * noise()
            x_s = mask * outside + (1 - mask) * inside
            x = float((a[t] / a[s]) ** 0.5) * x_s + float((1 - a[t] / a[s]) ** 0.5) * noise()  # q(x_t | x_s)
        x = x_s
        yield x


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "heun": heun, "langevin": langevin, "repaint": repaint}


# ---- optimizers: p parameter, g gradient, m and v running moments (zeros at first), t = 1, 2, ... --------------------


def adamw(p, g, m, v, lr, t, weight_decay, beta1=0.9, beta2=0.99, eps=1e-8):
    """Loshchilov & Hutter 2019: Adam, with weight decay applied directly to the weights."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    v_hat = v / (1 - beta2**t)
    return p * (1 - lr * weight_decay) - lr / (1 - beta1**t) * m / (mx.sqrt(v_hat) + eps), m, v


def muon(p, g, m, lr, weight_decay, beta=0.9):
    """Jordan et al. 2024: momentum for matrices, made orthogonal, so that all directions move equally far.

    The factor makes the update as large as AdamW's, about 0.2 per entry (Liu et al. 2025), so one rate fits both.
    """
    m = beta * m + (1 - beta) * g
    update = orthogonalize((1 - beta) * g + beta * m)  # Nesterov: the momentum one step ahead
    return p * (1 - lr * weight_decay) - lr * 0.2 * max(p.shape) ** 0.5 * update, m


def orthogonalize(g):
    """U V^T for g = U S V^T, approximately: five Newton-Schulz steps bring every singular value close to 1.

    A step is x <- p x with p = a I + b x x^T + c (x x^T)^2, which takes a singular value s to a s + b s^3 + c s^5.
    All these p commute, so it is enough to update their product q, and x x^T: only small matrices are multiplied.
    """
    x = g.T if g.shape[0] > g.shape[1] else g  # wide, so that x x^T is the smaller of the two squares
    x = x / (mx.linalg.norm(x) + 1e-7)
    xxt, eye = x @ x.T, mx.eye(x.shape[0])
    q = p = 3.4445 * eye - 4.7750 * xxt + 2.0315 * xxt @ xxt
    for _ in range(4):
        xxt = p @ xxt @ p
        p = 3.4445 * eye - 4.7750 * xxt + 2.0315 * xxt @ xxt
        q = p @ q
    return (q @ x).T if g.shape[0] > g.shape[1] else q @ x


# ---- training --------------------------------------------------------------------------------------------------------


def to_numpy(model, arrays):
    """One array for each parameter, {name: array}, as numpy; filters as (n_out, n_in, k, k), as in torch."""
    convs = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    return {name: np.array(a.transpose(0, 3, 1, 2) if name in convs else a) for name, a in arrays.items()}


def from_numpy(model, arrays):
    """The inverse. Raises ValueError if an array is missing or does not have the shape of its parameter."""
    if missing := [name for name, _ in tree_flatten(model.parameters()) if name not in arrays]:
        raise ValueError(f"{missing[0]} is missing")
    convs = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    arrays = {name: a.transpose(0, 2, 3, 1) if name in convs else a for name, a in arrays.items()}
    for name, p in tree_flatten(model.parameters()):
        if arrays[name].shape != p.shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}, this model expects {p.shape}")
    return {name: mx.array(arrays[name]) for name, _ in tree_flatten(model.parameters())}


def get_weights(model):
    """Every parameter as numpy, {name: array}, a copy."""
    return to_numpy(model, dict(tree_flatten(model.parameters())))


def set_weights(model, weights):
    """Replace the model's parameters with {name: numpy array}."""
    model.update(tree_unflatten(list(from_numpy(model, weights).items())))


def embedding(name):
    return name.split(".")[-2] in ("label", "word", "place")


def init_weights(model, seed):
    """N(0, 1/fan_in), embeddings N(0, 1); the last layer of a block a tenth of this, so that each is nearly the
    identity. Norms 1, biases 0."""
    rng, weights = np.random.default_rng(seed), get_weights(model)
    for name, w in sorted(weights.items()):
        if w.ndim > 1:
            std = 0.1 if name.split(".")[-2] in ("conv2", "out", "fc2") else 1.0
            std = 1.0 if embedding(name) else std * w[0].size ** -0.5
            weights[name] = rng.standard_normal(w.shape, np.float32) * np.float32(std)
        else:
            weights[name] = np.full_like(w, name.endswith("weight"))
    set_weights(model, weights)


def devices():
    """The devices that can be used here, the best first."""
    return ["gpu", "cpu"] if mx.is_available(mx.gpu) else ["cpu"]


class Trainer:
    """A model, the average of its weights, an optimizer. Takes and returns numpy; figures are read by float()."""

    def __init__(self, config, seed=0, device=None):
        self.config, self.device, self.t = config, device or devices()[0], 0
        mx.set_default_device(getattr(mx, self.device))
        self.model, self.average = (Diffusion(config) for _ in range(2))
        init_weights(self.model, seed)
        self.average.update(self.model.parameters())
        self.m = {name: mx.zeros_like(p) for name, p in tree_flatten(self.model.parameters())}
        self.v = {name: mx.zeros_like(p) for name, p in tree_flatten(self.model.parameters())}
        if self.device == "gpu":  # compile the whole step; plain numbers would become constants
            state = [self.model.state, self.average.state, self.m, self.v]
            update = mx.compile(self.update, inputs=state, outputs=state)
            self.update = lambda part, arrays, *numbers: update(part, arrays, *map(mx.array, numbers))

    def arrays(self, x, y, *more):
        """Numpy to the framework. y is checked first: MLX would silently read past the end of an array."""
        if not 0 <= y.min() <= y.max() < (self.config.vocab_size or self.config.n_class + 1):
            raise ValueError("a class or a word of y is outside the model's")
        return [mx.array(a) for a in (x, y, *more)]

    def phase(self):
        """The part that is trained now."""
        return "autoencoder." if self.t < self.config.first else "unet."

    def step(self, x, y, t, noise, lr):
        """One update on x (B, H, W, C) from -1 to 1, y (B,) or (B, length), t (B,) from 1 to T, noise as x or latents.

        Returns {"loss"}, the one before the update. Matrices are updated by Muon, the rest by AdamW.
        """
        arrays, part = self.arrays(x, y, t, noise), self.phase()
        self.t += 1
        n = self.t - (self.config.first if part == "unet." else 0)  # steps of this part
        keep = min(self.config.ema, n / (n + 10))  # at first, average over fewer steps
        loss = self.update(part, arrays, lr, n, keep)
        mx.eval(loss, self.model, self.average, self.m, self.v)  # MLX is lazy: the step is computed here
        if self.t == self.config.first:  # the U-Net learns the average's latents, which the average decodes
            self.model.update(self.average.parameters())
        return {"loss": loss}

    def update(self, part, arrays, lr, t, keep):
        """Update a part, at its step t, and the average with decay `keep`; returns the loss."""
        loss, grads = nn.value_and_grad(self.model, lambda: LOSSES[part](self.model, *arrays))()
        grads, params = dict(tree_flatten(grads)), dict(tree_flatten(self.model.parameters()))
        average = dict(tree_flatten(self.average.parameters()))
        for name, p in params.items():
            if not name.startswith(part):
                continue
            g, m, v = grads[name], self.m[name], self.v[name]
            if p.ndim > 1 and not embedding(name):  # filters: a matrix with a row for each
                p_m = muon(p.flatten(1), g.flatten(1), m.flatten(1), lr, 0.0)
                params[name], self.m[name] = (a.reshape(p.shape) for a in p_m)
            else:
                params[name], self.m[name], self.v[name] = adamw(p, g, m, v, lr, t, 0.0)
            average[name] = average[name] + (1 - keep) * (params[name] - average[name])
        self.model.update(tree_unflatten(list(params.items())))
        self.average.update(tree_unflatten(list(average.items())))
        return loss

    def evaluate(self, x, y, t, noise):
        """{"val_loss"} of the average of the weights: the autoencoder's while that is trained."""
        return {"val_loss": LOSSES[self.phase()](self.average, *self.arrays(x, y, t, noise))}

    def bound(self, x, y, rng, steps=50):
        """Upper bound on -log2 p(x | y), in bits per dimension of x (B, H, W, C), for a chain of `steps` of the T."""
        a, (x, y) = float(self.model.a[-1]), self.arrays(x, y)
        ts = np.unique(np.append(0, np.geomspace(1, self.config.T, steps).round().astype(int)))
        total = 0.5 * (a * x**2 - a - math.log(1 - a)).sum()  # KL(q(x_T | x_0) | N(0, I))
        for s, t in zip(ts, ts[1:]):
            noise = mx.array(rng.standard_normal(x.shape, np.float32))
            total = total + bound_term(self.average, x, y, t, s, noise).sum()
        return float(total) / math.log(2) / math.prod(x.shape)

    def denoise(self, x, y, t):
        """x_t (B, H, W, C), y, t a number -> the estimates of x_0 and eps, numpy."""
        x, y = self.arrays(x, y)
        return [np.array(a) for a in guess(self.average, x, t, y)]

    def sample(self, y, rng, sampler="ddim", steps=50, guidance=1.0, keep=1, **more):
        """y (B,) or (B, length), a numpy generator -> images at `keep` stages of sampling, numpy (keep, B, H, W, C)."""
        (H, W, C), n = self.config.image, self.config.latent
        shape = (len(y), H // 4, W // 4, n) if n else (len(y), H, W, C)
        none, y = self.arrays(np.full_like(y, self.config.n_class if not self.config.vocab_size else 0), y)
        more = {name: mx.array(a) for name, a in more.items()}

        def noise():
            return mx.array(rng.standard_normal(shape, np.float32))

        begin = (self.model.a > 1e-3).sum() - 1  # see alpha_bars
        ts, kept = np.linspace(begin, 0, steps + 1).round().astype(int), []
        path = SAMPLERS[sampler](lambda x, t: guess(self.average, x, t, y, none, guidance), noise(), ts,
                                 self.model.a, noise, **more)  # fmt: skip
        marks = np.linspace(0, steps, keep + 1).round()[1:]
        for i, x in enumerate(path, 1):
            mx.eval(x)
            kept += [x] if i in marks else []
        kept = [self.average.autoencoder.decode(x) if n else x for x in kept]
        return np.array(mx.stack(kept))

    def save(self, path, step, **extra):
        """Save weights, average, moments, step, config and what train.py adds to one .npz: all or nothing."""
        arrays = get_weights(self.model)
        arrays |= {f"average.{name}": a for name, a in get_weights(self.average).items()}
        for kind, moments in (("m", self.m), ("v", self.v)):
            arrays |= {f"{kind}.{name}": a for name, a in to_numpy(self.model, moments).items()}
        meta = {"model": "diffusion", "config": asdict(self.config), "step": step, **extra}
        with open(f"{path}.part", "wb") as f:
            np.savez(f, meta=json.dumps(meta), **arrays)
        os.replace(f"{path}.part", path)

    def load(self, path):
        """Load what save wrote, in either framework; returns the step to continue from."""
        with np.load(path, allow_pickle=False) as f:
            arrays, meta = dict(f), json.loads(str(f["meta"]))

        def part(start):
            return {name.removeprefix(start): a for name, a in arrays.items() if name.startswith(start)}

        set_weights(self.model, arrays)
        set_weights(self.average, part("average."))
        self.t = meta["step"]
        self.m.update(from_numpy(self.model, part("m.")))
        self.v.update(from_numpy(self.model, part("v.")))
        return self.t
