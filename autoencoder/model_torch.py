"""Autoencoder and variational autoencoder (VAE) in PyTorch.

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

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.backends.cudnn.allow_tf32 = False  # full float32, for convolutions on CUDA too


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
        self.layers = nn.ModuleList([nn.Linear(n, m) for n, m in zip(sizes, sizes[1:])])
        self.out = nn.Linear(sizes[-1], n_out)

    def forward(self, x):
        """x (B, H, W, C) -> (B, n_out)"""
        x = x.reshape(len(x), -1)
        for layer in self.layers:
            x = F.silu(layer(x))
        return self.out(x)


class LinearDecoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.image, sizes = config.image, [config.latent, *reversed(config.hidden)]
        self.layers = nn.ModuleList([nn.Linear(n, m) for n, m in zip(sizes, sizes[1:])])
        self.out = nn.Linear(sizes[-1], math.prod(config.image))

    def forward(self, z):
        """z (B, latent) -> s (B, H, W, C)"""
        for layer in self.layers:
            z = F.silu(layer(z))
        return self.out(z).reshape(-1, *self.image)


class Down(nn.Conv2d):
    """A convolution, 4x4, stride 2: half as high and as wide."""

    def __init__(self, n, m):
        super().__init__(n, m, 4, stride=2, padding=1)

    def forward(self, x):
        return super().forward(x)  # slow in MLX on a CPU, so model_mlx.py does it differently


class ConvEncoder(nn.Module):
    def __init__(self, config, n_out):
        super().__init__()
        (H, W, C), half = config.image, 2 ** len(config.hidden)
        sizes = [C, *config.hidden]
        self.layers = nn.ModuleList([Down(n, m) for n, m in zip(sizes, sizes[1:])])
        self.out = nn.Linear(sizes[-1] * (H // half) * (W // half), n_out)

    def forward(self, x):
        """x (B, H, W, C) -> (B, n_out)"""
        x = x.permute(0, 3, 1, 2)  # torch's order from here on
        for layer in self.layers:
            x = F.silu(layer(x))
        return self.out(x.flatten(1))


class ConvDecoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        (H, W, C), half = config.image, 2 ** len(config.hidden)
        sizes = [*reversed(config.hidden), C]
        self.small = (sizes[0], H // half, W // half)
        self.inp = nn.Linear(config.latent, math.prod(self.small))
        self.layers = nn.ModuleList([nn.Conv2d(n, m, 3, 1, 1) for n, m in zip(sizes, sizes[1:])])
        self.upsample = nn.Upsample(scale_factor=2)  # each pixel four times

    def forward(self, z):
        """z (B, latent) -> s (B, H, W, C)"""
        x = self.inp(z).reshape(-1, *self.small)
        for layer in self.layers:
            x = layer(self.upsample(F.silu(x)))
        return x.permute(0, 2, 3, 1)  # back from torch's order


class Autoencoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        n_out = config.latent * (2 if config.model == "vae" else 1)
        if config.net == "conv":
            self.encoder, self.decoder = ConvEncoder(config, n_out), ConvDecoder(config)
        else:
            self.encoder, self.decoder = LinearEncoder(config, n_out), LinearDecoder(config)

    def forward(self, x, eps):
        """x (B, H, W, C) -> s (B, H, W, C), and the KL (B,) of z, which is 0. eps is unused."""
        return self.decoder(self.encoder(x)), torch.zeros(len(x), device=x.device)


class VAE(Autoencoder):
    def forward(self, x, eps):
        """x (B, H, W, C), eps (B, latent) ~ N(0, I) -> s (B, H, W, C), and KL(q(z|x) || p(z)) (B,)."""
        mu, logvar = self.encoder(x).chunk(2, -1)
        z = mu + torch.exp(logvar / 2) * eps
        return self.decoder(z), kl_divergence(mu, logvar)


def kl_divergence(mu, logvar):
    """KL(N(mu, e^logvar) || N(0, I)) in nats, summed over the dimensions: (B, latent) -> (B,)."""
    return (mu**2 + torch.exp(logvar) - 1 - logvar).sum(-1) / 2


def log_likelihood(s, y, config):
    """log p(y|z) in nats, summed over the pixels: s, y (B, H, W, C) -> (B,)."""
    if config.likelihood == "bernoulli":
        each = y * s - F.softplus(s)  # y log sigmoid(s) + (1 - y) log(1 - sigmoid(s)), and e^s never overflows
    else:
        each = -((y - torch.sigmoid(s)) ** 2) / (2 * config.std**2) - math.log(config.std * math.sqrt(2 * math.pi))
    return each.reshape(len(y), -1).sum(-1)


def loss_fn(model, x, y, eps):
    """-log p(y|z) for z from x, and the KL: means over the batch. Where y = x, their sum is the negative ELBO."""
    s, kl = model(x, eps)
    return -log_likelihood(s, y, model.config).mean(), kl.mean()


# ---- training ------------------------------------------------------------------------------------------------------


def to_numpy(model, arrays):
    """One array for each parameter, {name: array}, as numpy; filters as (n_out, n_in, k, k), as in torch."""
    return {name: a.detach().cpu().numpy().copy() for name, a in arrays.items()}


def from_numpy(model, arrays):
    """The inverse. Raises ValueError if an array is missing or does not have the shape of its parameter."""
    if missing := [name for name, _ in model.named_parameters() if name not in arrays]:
        raise ValueError(f"{missing[0]} is missing")
    for name, p in model.named_parameters():
        if arrays[name].shape != tuple(p.shape):
            raise ValueError(f"{name} has shape {arrays[name].shape}, this model expects {tuple(p.shape)}")
    return {name: torch.from_numpy(arrays[name]).to(p.device) for name, p in model.named_parameters()}


def get_weights(model):
    """Every parameter as numpy, {name: array}, a copy."""
    return to_numpy(model, dict(model.named_parameters()))


def set_weights(model, weights):
    """Replace the model's parameters with {name: numpy array}."""
    model.load_state_dict(from_numpy(model, weights))


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
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, there in found.items() if there]


class Trainer:
    """A model and its optimizer. Takes and returns numpy; figures stay on the device until float() reads them."""

    def __init__(self, config, seed=0, device=None):
        self.config, self.device = config, device or devices()[0]
        self.model = (VAE if config.model == "vae" else Autoencoder)(config).to(self.device)
        init_weights(self.model, seed)
        params = list(self.model.parameters())
        self.optimizer = torch.optim.Adam(params, betas=(0.9, 0.99), fused=True)
        for p in params:
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device)}
            self.optimizer.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def arrays(self, *arrays):
        """Numpy to the framework."""
        return [torch.from_numpy(a).to(self.device, non_blocking=self.device == "cuda") for a in arrays]

    def step(self, x, y, eps, lr):
        """One update, x to y (B, H, W, C) float32 in [0, 1], eps (B, latent); {"loss"} before it, in nats per image."""
        x, y, eps = self.arrays(x, y, eps)
        self.optimizer.param_groups[0]["lr"] = lr
        loss = self.update(x, y, eps)
        return {"loss": loss}

    def update(self, x, y, eps):
        """Update the weights and the optimizer's state; returns the loss before the update."""
        self.optimizer.zero_grad()
        nll, kl = loss_fn(self.model, x, y, eps)
        loss = nll + self.config.beta * kl
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, x, y, eps):
        """{"nelbo", "kl"} or, without a KL, {"val_loss"}: nats per image, for x, y (B, H, W, C), eps (B, latent)."""
        nll, kl = loss_fn(self.model, *self.arrays(x, y, eps))
        return {"nelbo": nll + kl, "kl": kl} if self.config.model == "vae" else {"val_loss": nll}

    @torch.no_grad()
    def encode(self, x):
        """x (B, H, W, C) -> numpy mu and sigma (B, latent); an autoencoder's sigma is 0."""
        z = self.model.encoder(*self.arrays(x))
        if self.config.model == "ae":
            return z.cpu().numpy(), torch.zeros_like(z).cpu().numpy()
        mu, logvar = z.chunk(2, -1)
        return mu.cpu().numpy(), torch.exp(logvar / 2).cpu().numpy()

    @torch.no_grad()
    def decode(self, z):
        """z (B, latent) float32 -> images, numpy (B, H, W, C) in [0, 1]."""
        return torch.sigmoid(self.model.decoder(*self.arrays(z))).cpu().numpy()

    def reconstruct(self, x):
        """x (B, H, W, C) -> the images decoded from its mu."""
        return self.decode(self.encode(x)[0])

    def save(self, path, step, **extra):
        """Save weights, moments, step, config and what train.py adds to one .npz: all or nothing."""
        arrays = get_weights(self.model)
        for kind, key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
            moments = {name: self.optimizer.state[p][key] for name, p in self.model.named_parameters()}
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
        for kind, key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
            moments = {name[2:]: a for name, a in arrays.items() if name[:2] == f"{kind}."}
            moments = from_numpy(self.model, moments)
            for name, p in self.model.named_parameters():
                self.optimizer.state[p][key] = moments[name]
                self.optimizer.state[p]["step"].fill_(meta["step"])
        return meta["step"]
