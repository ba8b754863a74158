"""Autoencoder and variational autoencoder (VAE) in MLX.

    Autoencoder    x (B, H, W, C) -> encoder -> z (B, latent) -> decoder -> s (B, H, W, C), image sigmoid(s)
    VAE            x -> encoder -> mu, logvar (B, latent) -> z = mu + sigma eps, eps ~ N(0, I) -> decoder -> s

An autoencoder squeezes x through a few numbers z and back. Trained on noisy x with clean targets y, it denoises.

A VAE is a model of images: z ~ N(0, I), then x ~ p(x|z), which is one of
    bernoulli    log p(x|z) = sum over pixels of x log sigmoid(s) + (1 - x) log(1 - sigmoid(s))
    gaussian     log p(x|z) = sum over pixels of -(x - sigmoid(s))^2 / (2 std^2) - log(std sqrt(2 pi))
With bernoulli, a grey x stands for all black-and-white images in which each pixel is white with probability x: log p is
the mean of theirs. So the bound below holds for that mean; the encoder sees only x.

log p(x) is an integral over all z. The encoder's q(z|x) = N(mu, sigma^2), sigma^2 = e^logvar, covers the z that matter;
the logarithm is concave (Jensen), so a mean of logarithms is a lower bound, the evidence lower bound (ELBO):
    log p(x) = log E_q[p(x|z) p(z) / q(z|x)]  >=  E_q[log p(x|z)] - KL,    KL = E_q[log q(z|x) - log p(z)]
One sample z = mu + sigma eps estimates the first term; as eps is data, gradients pass through z to mu and sigma.
The KL needs no sample: in each dimension, with E[eps] = 0 and E[eps^2] = 1,
    log q(z|x) = -log sqrt(2 pi) - log sigma - eps^2 / 2        log p(z) = -log sqrt(2 pi) - (mu + sigma eps)^2 / 2
    KL         = E[-log sigma - eps^2 / 2 + (mu + sigma eps)^2 / 2]  =  (mu^2 + sigma^2 - 1 - log sigma^2) / 2
The loss is -E_q[log p(x|z)] + beta KL in nats per image, the negative ELBO if beta = 1. The KL is also the cost of z:
a code for it is about KL / log 2 bits long, and a larger beta gives shorter codes but worse images.

Hinton and Salakhutdinov 2006, "Reducing the dimensionality of data with neural networks"; Kingma and Welling 2014,
"Auto-encoding variational Bayes"; Higgins et al. 2017, "beta-VAE"; Vincent et al. 2008, on denoising.
"""

import json
import math
import os
from dataclasses import asdict, dataclass

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # full float32 on CUDA and Apple M5 too; read on import

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten


@dataclass
class Config:
    image: tuple = (28, 28, 1)  # height, width, channels
    latent: int = 20
    hidden: tuple = (512, 512)  # widths of the encoder's layers, channels for conv; the decoder has them in reverse
    net: str = "linear"  # linear, or conv: each layer halves height and width
    model: str = "vae"  # vae or ae
    likelihood: str = "bernoulli"  # bernoulli or gaussian
    std: float = 0.1  # the gaussian's standard deviation
    beta: float = 1.0  # weight of the KL


class LinearEncoder(nn.Module):
    def __init__(self, config, n_out):
        super().__init__()
        sizes = [math.prod(config.image), *config.hidden]
        self.layers = [nn.Linear(n, m) for n, m in zip(sizes, sizes[1:])]
        self.out = nn.Linear(sizes[-1], n_out)

    def __call__(self, x):
        """x (B, H, W, C) -> (B, n_out)"""
        x = x.reshape(len(x), -1)
        for layer in self.layers:
            x = nn.silu(layer(x))
        return self.out(x)


class LinearDecoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.image, sizes = config.image, [config.latent, *reversed(config.hidden)]
        self.layers = [nn.Linear(n, m) for n, m in zip(sizes, sizes[1:])]
        self.out = nn.Linear(sizes[-1], math.prod(config.image))

    def __call__(self, z):
        """z (B, latent) -> s (B, H, W, C)"""
        for layer in self.layers:
            z = nn.silu(layer(z))
        return self.out(z).reshape(-1, *self.image)


class Down(nn.Conv2d):
    """A convolution, 4x4, stride 2: half as high and as wide."""

    def __init__(self, n, m):
        super().__init__(n, m, 4, stride=2, padding=1)

    def __call__(self, x):
        B, H, W, n = x.shape
        m, h, w = self.weight.shape[0], H // 2 + 1, W // 2 + 1
        # blocks of 2x2 pixels are folded into 4 n channels: on a CPU the gradient with a stride is slow
        x = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)]).reshape(B, h, 2, w, 2, n)
        weight = self.weight.reshape(m, 2, 2, 2, 2, n).transpose(0, 1, 3, 2, 4, 5).reshape(m, 2, 2, 4 * n)
        return mx.conv2d(x.transpose(0, 1, 3, 2, 4, 5).reshape(B, h, w, 4 * n), weight) + self.bias


class ConvEncoder(nn.Module):
    def __init__(self, config, n_out):
        super().__init__()
        (H, W, C), half = config.image, 2 ** len(config.hidden)
        sizes = [C, *config.hidden]
        self.layers = [Down(n, m) for n, m in zip(sizes, sizes[1:])]
        self.out = nn.Linear(sizes[-1] * (H // half) * (W // half), n_out)

    def __call__(self, x):
        """x (B, H, W, C) -> (B, n_out)"""
        for layer in self.layers:
            x = nn.silu(layer(x))
        return self.out(x.transpose(0, 3, 1, 2).flatten(1))  # in torch's order, so that self.out is the same


class ConvDecoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        (H, W, C), half = config.image, 2 ** len(config.hidden)
        sizes = [*reversed(config.hidden), C]
        self.small = (sizes[0], H // half, W // half)
        self.inp = nn.Linear(config.latent, math.prod(self.small))
        self.layers = [nn.Conv2d(n, m, 3, 1, 1) for n, m in zip(sizes, sizes[1:])]
        self.upsample = nn.Upsample(scale_factor=2)  # each pixel four times

    def __call__(self, z):
        """z (B, latent) -> s (B, H, W, C)"""
        x = self.inp(z).reshape(-1, *self.small).transpose(0, 2, 3, 1)  # from torch's order
        for layer in self.layers:
            x = layer(self.upsample(nn.silu(x)))
        return x


class Autoencoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        n_out = config.latent * (2 if config.model == "vae" else 1)
        if config.net == "conv":
            self.encoder, self.decoder = ConvEncoder(config, n_out), ConvDecoder(config)
        else:
            self.encoder, self.decoder = LinearEncoder(config, n_out), LinearDecoder(config)

    def __call__(self, x, eps):
        """x (B, H, W, C) -> s (B, H, W, C), and the KL (B,) of z, which is 0. eps is unused."""
        return self.decoder(self.encoder(x)), mx.zeros(len(x))


class VAE(Autoencoder):
    def __call__(self, x, eps):
        """x (B, H, W, C), eps (B, latent) ~ N(0, I) -> s (B, H, W, C), and KL(q(z|x) || p(z)) (B,)."""
        mu, logvar = mx.split(self.encoder(x), 2, -1)
        z = mu + mx.exp(logvar / 2) * eps
        return self.decoder(z), kl_divergence(mu, logvar)


def kl_divergence(mu, logvar):
    """KL(N(mu, e^logvar) || N(0, I)) in nats, summed over the dimensions: (B, latent) -> (B,)."""
    return (mu**2 + mx.exp(logvar) - 1 - logvar).sum(-1) / 2


def log_likelihood(s, y, config):
    """log p(y|z) in nats, summed over the pixels: s, y (B, H, W, C) -> (B,)."""
    if config.likelihood == "bernoulli":
        each = y * s - nn.softplus(s)  # y log sigmoid(s) + (1 - y) log(1 - sigmoid(s)), and e^s never overflows
    else:
        each = -((y - mx.sigmoid(s)) ** 2) / (2 * config.std**2) - math.log(config.std * math.sqrt(2 * math.pi))
    return each.reshape(len(y), -1).sum(-1)


def loss_fn(model, x, y, eps):
    """-log p(y|z) for z from x, and the KL: means over the batch. Where y = x, their sum is the negative ELBO."""
    s, kl = model(x, eps)
    return -log_likelihood(s, y, model.config).mean(), kl.mean()


# ---- training ------------------------------------------------------------------------------------------------------


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


def init_weights(model, seed):
    """Biases 0; weights N(0, 2/n_in), n_in inputs per output (He et al. 2015), a tenth as large for mu and logvar."""
    rng, weights = np.random.default_rng(seed), get_weights(model)
    for name, w in sorted(weights.items()):
        if name.endswith("weight"):
            std = math.sqrt(2 / math.prod(w.shape[1:])) * (0.1 if name == "encoder.out.weight" else 1)
            weights[name] = rng.standard_normal(w.shape, np.float32) * np.float32(std)
        else:
            weights[name] = np.zeros_like(w)
    set_weights(model, weights)


def devices():
    """The devices that can be used here, the best first."""
    return ["gpu", "cpu"] if mx.is_available(mx.gpu) else ["cpu"]


class Trainer:
    """A model and its optimizer. Takes and returns numpy; figures stay on the device until float() reads them."""

    def __init__(self, config, seed=0, device=None):
        self.config, self.device = config, device or devices()[0]
        mx.set_default_device(getattr(mx, self.device))
        self.model = (VAE if config.model == "vae" else Autoencoder)(config)
        init_weights(self.model, seed)
        self.optimizer = optim.Adam(0.0, betas=(0.9, 0.99), bias_correction=True)
        self.optimizer.init(self.model.trainable_parameters())
        if self.device == "gpu":  # compile the whole step
            state = [self.model.state, self.optimizer.state]
            self.update = mx.compile(self.update, inputs=state, outputs=state)

    def arrays(self, *arrays):
        """Numpy to the framework."""
        return [mx.array(a) for a in arrays]

    def step(self, x, y, eps, lr):
        """One update, x to y (B, H, W, C) float32 in [0, 1], eps (B, latent); {"loss"} before it, in nats per image."""
        x, y, eps = self.arrays(x, y, eps)
        self.optimizer.learning_rate = lr
        loss = self.update(x, y, eps)
        mx.eval(loss, self.model.parameters(), self.optimizer.state)  # MLX is lazy: the step is computed here
        return {"loss": loss}

    def update(self, x, y, eps):
        """Update the weights and the optimizer's state; returns the loss before the update."""

        def total(x, y, eps):
            nll, kl = loss_fn(self.model, x, y, eps)
            return nll + self.config.beta * kl

        loss, grads = nn.value_and_grad(self.model, total)(x, y, eps)
        self.optimizer.update(self.model, grads)
        return loss

    def evaluate(self, x, y, eps):
        """{"nelbo", "kl"} or, without a KL, {"val_loss"}: nats per image, for x, y (B, H, W, C), eps (B, latent)."""
        nll, kl = loss_fn(self.model, *self.arrays(x, y, eps))
        return {"nelbo": nll + kl, "kl": kl} if self.config.model == "vae" else {"val_loss": nll}

    def encode(self, x):
        """x (B, H, W, C) -> numpy mu and sigma (B, latent); an autoencoder's sigma is 0."""
        z = self.model.encoder(*self.arrays(x))
        if self.config.model == "ae":
            return np.array(z), np.array(mx.zeros_like(z))
        mu, logvar = mx.split(z, 2, -1)
        return np.array(mu), np.array(mx.exp(logvar / 2))

    def decode(self, z):
        """z (B, latent) float32 -> images, numpy (B, H, W, C) in [0, 1]."""
        return np.array(mx.sigmoid(self.model.decoder(*self.arrays(z))))

    def reconstruct(self, x):
        """x (B, H, W, C) -> the images decoded from its mu."""
        return self.decode(self.encode(x)[0])

    def save(self, path, step, **extra):
        """Save weights, moments, step, config and what train.py adds to one .npz: all or nothing."""
        arrays, state = get_weights(self.model), dict(tree_flatten(self.optimizer.state))
        for kind in ("m", "v"):
            moments = {name: state[f"{name}.{kind}"] for name, _ in tree_flatten(self.model.parameters())}
            arrays |= {f"{kind}.{name}": a for name, a in to_numpy(self.model, moments).items()}
        meta = {"model": "autoencoder", "config": asdict(self.config), "step": step, **extra}
        with open(f"{path}.part", "wb") as f:
            np.savez(f, meta=json.dumps(meta), **arrays)
        os.replace(f"{path}.part", path)

    def load(self, path):
        """Load what save wrote, in either framework; returns the step to continue from."""
        with np.load(path, allow_pickle=False) as f:
            arrays, meta = dict(f), json.loads(str(f["meta"]))
        set_weights(self.model, arrays)
        state = {"step": mx.array(meta["step"], mx.uint64)}
        for kind in ("m", "v"):
            moments = {name[2:]: a for name, a in arrays.items() if name[:2] == f"{kind}."}
            state |= {f"{name}.{kind}": a for name, a in from_numpy(self.model, moments).items()}
        self.optimizer.state.update(tree_unflatten(list(state.items())))
        self.optimizer.init(self.model.trainable_parameters())  # adds branches of the tree that have no arrays
        return meta["step"]
