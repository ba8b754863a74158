"""Generative adversarial network (GAN) and its convolutional form (DCGAN) in PyTorch.

    Generator        z (B, latent) ~ N(0, I) -> image G(z) (B, H, W, C) in [-1, 1]
    Discriminator    x (B, H, W, C) -> s (B,), and D(x) = sigmoid(s): how probably x is real

A game for two: D tells real images x ~ p from those that G generates, G(z) ~ q; G tries to fool D.
    min over G, max over D of  V = E_x[log D(x)] + E_z[log(1 - D(G(z)))]
At each x, p log D + q log(1 - D) is largest where p / D = q / (1 - D), so the best D is D* = p / (p + q), and there
    V = E_p[log(p / (p + q))] + E_q[log(q / (p + q))]  =  -log 4 + 2 JSD(p, q)
The Jensen-Shannon divergence JSD is 0 if q = p and log 2 if they never overlap: the best G imitates the data.

What G minimises, with s = s(G(z)), and its gradient with respect to s:
    minimax          log(1 - D)     -D        it vanishes as D wins, D -> 0: just where G has the most to learn
    non-saturating   -log D         -(1 - D)  the same fixed point, and the strongest push where D wins
    wgan-gp          -s             -1        everywhere; D is a critic here: any number, with slopes kept near 1
The critic maximises E[s(x)] - E[s(G(z))] - penalty E[(|grad s(y)| - 1)^2], y = u x + (1 - u) G(z), u from 0 to 1. Among
all s with slopes of 1 or less, the largest difference is the Wasserstein distance: it falls as q approaches p.

Where pictures have classes, the two play one such game per class: z ends in the class c, one-hot, and D has one output
s per class, of which the one for c counts. G need not discover the classes, and D judges a 7 as a 7.

Goodfellow et al. 2014, "Generative adversarial nets"; Radford et al. 2016, DCGAN; Gulrajani et al. 2017, WGAN-GP;
Mirza and Osindero 2014, classes; Odena et al. 2016, checkerboards; Salimans et al. 2016, label smoothing; Heusel et al.
2017, two rates; Yazici et al. 2019, the average of G.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.backends.cudnn.allow_tf32 = False  # full float32, for convolutions on CUDA too


@dataclass
class Config:
    image: tuple = (28, 28, 1)  # height, width, channels
    latent: int = 64
    n_class: int = 0  # if there are classes, z (B, latent + n_class) ends in one of them, one-hot
    hidden: tuple = (16, 64)  # widths of D's layers, channels for dcgan; G has them in reverse
    model: str = "dcgan"  # dcgan: each layer halves (G: doubles) height and width; or gan: linear layers
    loss: str = "non-saturating"  # non-saturating, minimax or wgan-gp
    smoothing: float = 0.0  # D's target for real x is 1 minus this: a D that is never sure leaves G a gradient
    penalty: float = 10.0  # wgan-gp's
    d_lr: float = 1.0  # D's learning rate relative to G's: high keeps D near D*, low keeps D from winning
    d_steps: int = 1  # updates of D per update of G: more keep D near D*, too; wgan-gp needs 5
    ema: float = 0.99  # images come from an average of G's weights: G itself circles around the fixed point


class Up(nn.Conv2d):
    """Nearest-neighbour upsampling, then a 3x3 convolution: twice as high and as wide, without a checkerboard.

    A transposed convolution with a stride makes odd and even pixels with different weights, and it shows.
    """

    def __init__(self, n, m, bias=True):
        super().__init__(n, m, 3, padding=1, bias=bias)
        self.upsample = nn.Upsample(scale_factor=2)

    def forward(self, x):
        return super().forward(self.upsample(x))


class Down(nn.Conv2d):
    """A convolution, 4x4, stride 2: half as high and as wide. In files its weight is (m, n, 4, 4)."""

    def __init__(self, n, m, bias=True):
        super().__init__(n, m, 4, stride=2, padding=1, bias=bias)

    def forward(self, x):
        return super().forward(x)  # slow in MLX on a CPU, so model_mlx.py does it differently


def of_class(s, c):
    """s (B, n_class), one per class -> (B,), the one for c (B, n_class), one-hot; without classes s is (B, 1)."""
    return s[:, 0] if s.shape[1] == 1 else (s * c).sum(-1)


class Generator(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.image, sizes, layers = config.image, [config.latent + config.n_class, *reversed(config.hidden)], []
        for n, m in zip(sizes, sizes[1:]):
            layers += [nn.Linear(n, m), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], math.prod(self.image)), nn.Tanh())

    def forward(self, z):
        """z (B, latent + n_class) -> (B, H, W, C)"""
        return self.net(z).reshape(-1, *self.image)


class Discriminator(nn.Module):
    def __init__(self, config):
        super().__init__()
        sizes, layers = [math.prod(config.image), *config.hidden], []
        for n, m in zip(sizes, sizes[1:]):
            layers += [nn.Linear(n, m), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], max(1, config.n_class)))

    def forward(self, x, c=None):
        """x (B, H, W, C), c (B, n_class) one-hot if there are classes -> s (B,)"""
        return of_class(self.net(x.reshape(len(x), -1)), c)


class ConvGenerator(nn.Module):
    def __init__(self, config):
        super().__init__()
        (H, W, C), half = config.image, 2 ** len(config.hidden)
        sizes = [*reversed(config.hidden)]
        self.small = (H // half, W // half, sizes[0])
        self.inp = nn.Linear(config.latent + config.n_class, math.prod(self.small))
        # the batch norm keeps G from making one image for all z; a bias before it would have no effect
        layers = [nn.BatchNorm2d(sizes[0]), nn.ReLU()]
        for n, m in zip(sizes, sizes[1:]):
            layers += [Up(n, m, bias=False), nn.BatchNorm2d(m), nn.ReLU()]
        self.net = nn.Sequential(*layers, Up(sizes[-1], C), nn.Tanh())

    def forward(self, z):
        """z (B, latent + n_class) -> (B, H, W, C)"""
        x = self.inp(z).reshape(-1, *self.small)
        return self.net(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # torch's layers want (B, C, H, W)


class ConvDiscriminator(nn.Module):
    def __init__(self, config):
        super().__init__()
        (H, W, C), half, sizes = config.image, 2 ** len(config.hidden), config.hidden
        layers, norm = [Down(C, sizes[0]), nn.LeakyReLU(0.2)], config.loss != "wgan-gp"
        for n, m in zip(sizes, sizes[1:]):
            # the critic has no norm: the penalty is on its slope at each image by itself, and a norm would mix them
            layers += [Down(n, m, bias=not norm), nn.BatchNorm2d(m, track_running_stats=False)][: 1 + norm]
            layers += [nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers)
        self.out = nn.Linear(H // half * (W // half) * sizes[-1], max(1, config.n_class))

    def forward(self, x, c=None):
        """x (B, H, W, C), c (B, n_class) one-hot if there are classes -> s (B,)"""
        x = self.net(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return of_class(self.out(x.reshape(len(x), -1)), c)


class GAN(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.model == "dcgan":
            self.generator, self.discriminator = ConvGenerator(config), ConvDiscriminator(config)
        else:
            self.generator, self.discriminator = Generator(config), Discriminator(config)


# ---- the game --------------------------------------------------------------------------------------------------------


def gradient_penalty(critic, y):
    """E[(|grad s(y)| - 1)^2] at the images y (B, H, W, C): the loss is differentiated through this gradient."""
    y = y.detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(y).sum(), y, create_graph=True)
    return (((slope**2).reshape(len(y), -1).sum(-1) ** 0.5 - 1) ** 2).mean()


def discriminator_loss(model, x, fake, c, u):
    """What D minimises, and s (B,) of x, for x and fake = G(z) (B, H, W, C), both of the classes c (B, n_class).

    u (B,) from 0 to 1 mixes the two, for the penalty.
    """
    config, real, s = model.config, model.discriminator(x, c), model.discriminator(fake, c)
    if config.loss == "wgan-gp":
        u = u.reshape(-1, 1, 1, 1)
        penalty = gradient_penalty(lambda y: model.discriminator(y, c), u * x + (1 - u) * fake)
        return s.mean() - real.mean() + config.penalty * penalty, real
    # -log sigmoid(s) = softplus(s) - s and -log(1 - sigmoid(s)) = softplus(s); smoothed, real x are t real, 1 - t fake.
    # One-sided: if fakes counted as a little real, too, D would pull G to where it already puts them
    t = 1 - config.smoothing
    return (F.softplus(real) - t * real).mean() + F.softplus(s).mean(), real


def generator_loss(model, z):
    """What G minimises, and s (B,) of G(z), for z (B, latent + n_class)."""
    s = model.discriminator(model.generator(z), z[:, model.config.latent :])
    if model.config.loss == "wgan-gp":
        return -s.mean(), s  # its gradient in s is -1, always
    if model.config.loss == "minimax":
        return -F.softplus(s).mean(), s  # log(1 - D); its gradient is -D: 0 where D has won
    return F.softplus(-s).mean(), s  # -log D; its gradient is -(1 - D): -1 where D has won


def value(real, s, loss):
    """V of the game that the loss belongs to, for D's s (B,) of real and of generated images."""
    if loss == "wgan-gp":
        return real.mean() - s.mean()
    return -F.softplus(-real).mean() - F.softplus(s).mean()


# ---- training --------------------------------------------------------------------------------------------------------


def to_numpy(model, arrays):
    """One array for each parameter, {name: array}, as numpy, a copy. Files have torch's names and layout."""
    return {name: a.detach().cpu().numpy().copy() for name, a in arrays.items()}


def from_numpy(model, arrays):
    """The inverse, for the names that the model has. Raises ValueError if a shape is not that of the parameter."""
    found = {name: p for name, p in model.state_dict().items() if name in arrays}
    for name, p in found.items():
        if arrays[name].shape != tuple(p.shape):
            raise ValueError(f"{name} has shape {arrays[name].shape}, this model expects {tuple(p.shape)}")
    return {name: torch.from_numpy(arrays[name]).to(p.device) for name, p in found.items()}


def get_weights(model):
    """Every parameter and running statistic as numpy, {name: array}, a copy."""
    return to_numpy(model, {name: p for name, p in model.state_dict().items() if p.is_floating_point()})


def set_weights(model, weights):
    """Replace the model's parameters and running statistics by {name: numpy array}."""
    if missing := sorted(get_weights(model).keys() - weights.keys()):
        raise ValueError(f"{missing[0]} is missing")
    weights = from_numpy(model, {name: weights[name] for name in get_weights(model)})
    model.load_state_dict(weights, strict=False)  # without the norms' count of batches, which nothing reads


def init_weights(model, seed):
    """DCGAN: N(0, 0.02^2), norms N(1, 0.02^2), as in the paper. Linear: N(0, 2/n_in) (He et al. 2015). Biases 0."""
    rng, weights = np.random.default_rng(seed), get_weights(model)
    for name, w in sorted(weights.items()):
        if name.endswith("weight"):
            std = 0.02 if model.config.model == "dcgan" else math.sqrt(2 / w.shape[1])
            weights[name] = np.float32(w.ndim == 1) + rng.standard_normal(w.shape, np.float32) * np.float32(std)
        else:
            weights[name] = np.full_like(w, name.endswith("running_var"))
    set_weights(model, weights)


def devices():
    """The devices that can be used here, the best first."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, there in found.items() if there]


class Trainer:
    """The two players and their optimizers. Takes and returns numpy; figures stay on the device until float()."""

    def __init__(self, config, seed=0, device=None):
        self.config, self.device, self.t = config, device or devices()[0], 0
        self.model = GAN(config).to(self.device)
        init_weights(self.model, seed)
        self.average = type(self.model.generator)(config).to(self.device).eval()  # its norms use running statistics
        self.average.load_state_dict(self.model.generator.state_dict())
        # momentum would keep pushing in outdated directions as the other player moves: less of it, none for the critic
        betas, self.optimizers = (0.0, 0.9) if config.loss == "wgan-gp" else (0.5, 0.999), {}
        for player in ("generator", "discriminator"):
            params = list(getattr(self.model, player).parameters())
            self.optimizers[player] = torch.optim.Adam(params, betas=betas, fused=True)
            for p in params:
                self.optimizers[player].state[p] = {"step": torch.zeros((), device=p.device)}
                self.optimizers[player].state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def arrays(self, *arrays):
        """Numpy to the framework."""
        return [torch.from_numpy(a).to(self.device, non_blocking=self.device == "cuda") for a in arrays]

    def step(self, x, z, u, lr):
        """n = d_steps updates of D and one of G: x (n, B, H, W, C), z (n + 1, B, latent + n_class), u (n, B).

        The classes in z[i] are those of x[i]. Returns {"loss", "g_loss"}, of D and G, each before its last update; and
        D(x), D(G(z)), or the critic's s.
        """
        x, z, u = self.arrays(x, z, u)
        self.t += 1
        ema = min(self.config.ema, (1 + self.t) / (10 + self.t))  # the start, plain grey, is soon forgotten
        loss, g_loss, real, s = self.play(x, z, u, lr, ema)
        return {"loss": loss, "g_loss": g_loss, "D(x)": real, "D(G(z))": s}

    def play(self, x, z, u, lr, ema):
        """Update both players, and the average of G with decay ema; returns the figures of step."""
        for x_i, z_i, u_i in zip(x, z, u):
            with torch.no_grad():
                fake = self.model.generator(z_i)
            loss = partial(discriminator_loss, self.model, x_i, fake, z_i[:, self.config.latent :], u_i)
            loss, real = self.update("discriminator", loss, lr * self.config.d_lr)
        g_loss, s = self.update("generator", partial(generator_loss, self.model, z[-1]), lr)
        for a, p in zip(self.average.state_dict().values(), self.model.generator.state_dict().values()):
            if a.is_floating_point():
                a.lerp_(p, 1 - ema)
        return loss, g_loss, real, s

    def update(self, player, loss, lr):
        """One step of a player down the first output of loss(); returns it, and the mean of D(.) from the second."""
        net, optimizer = getattr(self.model, player), self.optimizers[player]
        optimizer.param_groups[0]["lr"] = lr
        first, s = loss()
        optimizer.zero_grad()
        first.backward(inputs=list(net.parameters()))  # these alone: the other player stays as it is
        optimizer.step()
        return first.detach(), self.opinion(s.detach()).mean()

    def opinion(self, s):
        return s if self.config.loss == "wgan-gp" else torch.sigmoid(s)

    @torch.no_grad()
    def evaluate(self, x, z):
        """{"value"} of the game as it stands, for x (B, H, W, C) of the classes of z."""
        x, z = self.arrays(x, z)
        self.model.generator.eval()  # its norms' statistics stay as they are
        c = z[:, self.config.latent :]
        real, s = self.model.discriminator(x, c), self.model.discriminator(self.model.generator(z), c)
        self.model.generator.train()
        return {"value": value(real, s, self.config.loss)}

    @torch.no_grad()
    def discriminate(self, x):
        """D(x), or the critic's s, of x (B, H, W, C): numpy (B,)."""
        return self.opinion(self.model.discriminator(*self.arrays(x))).cpu().numpy()

    @torch.no_grad()
    def generate(self, z):
        """z (B, latent + n_class) float32 -> images from the average of G, numpy (B, H, W, C) in [-1, 1]."""
        return self.average(*self.arrays(z)).cpu().numpy()

    def save(self, path, step, **extra):
        """Save weights, average, moments, step, config and what train.py adds to one .npz: all or nothing."""
        arrays, m, v = get_weights(self.model), {}, {}
        arrays |= {f"average.{name}": a for name, a in get_weights(self.average).items()}
        for name, p in self.model.named_parameters():
            state = self.optimizers[name.split(".")[0]].state[p]
            m[name], v[name] = state["exp_avg"], state["exp_avg_sq"]
        arrays |= {f"m.{name}": a for name, a in to_numpy(self.model, m).items()}
        arrays |= {f"v.{name}": a for name, a in to_numpy(self.model, v).items()}
        meta = {"model": "gan", "config": asdict(self.config), "step": step, **extra}
        with open(f"{path}.part", "wb") as f:
            np.savez(f, meta=json.dumps(meta), **arrays)
        os.replace(f"{path}.part", path)

    def load(self, path):
        """Load what save wrote, in either framework; returns the step to continue from."""
        with np.load(path, allow_pickle=False) as f:
            arrays, meta = dict(f), json.loads(str(f["meta"]))
        set_weights(self.model, arrays)
        set_weights(self.average, {name.removeprefix("average."): a for name, a in arrays.items()})
        self.t = meta["step"]
        m, v = ({name[2:]: a for name, a in arrays.items() if name[:2] == f"{kind}."} for kind in "mv")
        for name in get_weights(self.model):
            if "running" not in name and not (name in m and name in v):
                raise ValueError(f"the moments of {name} are missing")
        m, v = from_numpy(self.model, m), from_numpy(self.model, v)
        for name, p in self.model.named_parameters():
            player = name.split(".")[0]
            updates = self.t * (self.config.d_steps if player == "discriminator" else 1)
            self.optimizers[player].state[p] = {"step": torch.tensor(float(updates), device=p.device)}
            self.optimizers[player].state[p] |= {"exp_avg": m[name], "exp_avg_sq": v[name]}
        return self.t
