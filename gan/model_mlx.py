"""Generative adversarial network (GAN) and its convolutional form (DCGAN) in MLX.

    Generator        z (B, latent) ~ N(0, I) -> picture G(z) (B, H, W, C) in [-1, 1]
    Discriminator    x (B, H, W, C) -> s (B,), and D(x) = sigmoid(s): how probably x is real

A game for two: D tells the pictures x ~ p of the data from those that G makes, G(z) ~ q; G tries to deceive it.
    min over G, max over D of  V = E_x[log D(x)] + E_z[log(1 - D(G(z)))]
At each x, p log D + q log(1 - D) is largest where p / D = q / (1 - D), so the best D is D* = p / (p + q), and there
    V = E_p[log(p / (p + q))] + E_q[log(q / (p + q))]  =  -log 4 + 2 JSD(p, q)
The Jensen-Shannon divergence JSD is 0 where q = p and log 2 where they never meet: G does best to imitate the data.

What G descends, with s = s(G(z)), and what its gradient in s does:
    minimax          log(1 - D)     -D        it vanishes as D wins, D -> 0: just where G has the most to learn
    non-saturating   -log D         -(1 - D)  the same fixed point, and the strongest push where D wins
    wgan-gp          -s             -1        everywhere; D is a critic here, any number, held to slopes of 1
The critic climbs E[s(x)] - E[s(G(z))] - penalty E[(|grad s(y)| - 1)^2], y = u x + (1 - u) G(z), u from 0 to 1. Among
all s with slopes of 1 or less, the highest such difference is the distance of Wasserstein: it falls as q draws near.

Goodfellow et al. 2014, "Generative adversarial nets"; Radford et al. 2016, DCGAN; Gulrajani et al. 2017, WGAN-GP;
Salimans et al. 2016, label smoothing; Heusel et al. 2017, two rates; Yazici et al. 2019, the average of G.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from functools import partial

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # float32 in full on CUDA and Apple M5, too; read at the import

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten


@dataclass
class Config:
    image: tuple = (28, 28, 1)  # height, width, channels
    latent: int = 64
    hidden: tuple = (16, 64)  # widths of D's layers, channels for dcgan; G has them in reverse
    model: str = "dcgan"  # dcgan: each layer halves (G: doubles) height and width; or gan: linear layers
    loss: str = "non-saturating"  # non-saturating, minimax or wgan-gp
    smoothing: float = 0.0  # D's target for real x is 1 less this: a D that is never sure leaves G a gradient
    penalty: float = 10.0  # wgan-gp's
    d_lr: float = 1.0  # D's rate over G's: higher keeps D near D*, where V tells G the truth; lower, D from winning
    d_steps: int = 1  # updates of D for one of G: more keep D near D* too; wgan-gp wants 5
    ema: float = 0.99  # pictures come from an average of G's weights: G itself circles around the fixed point


class Up(nn.ConvTranspose2d):
    """A transposed convolution, 4x4, stride 2: twice as high and as wide. In files its weight is (n, m, 4, 4)."""

    def __init__(self, n, m, bias=True):
        super().__init__(n, m, 4, stride=2, padding=1, bias=bias)

    def __call__(self, x):
        # on a CPU mx.conv_transpose2d is 30 times slower than this, the same as a convolution 2x2 without a stride:
        B, H, W, _ = x.shape
        m, _, _, n = self.weight.shape
        # each pixel gives to the 2x2 blocks of pixels around it; a block is 4 m channels, until it is unfolded
        w = self.weight.reshape(m, 2, 2, 2, 2, n)[:, ::-1, :, ::-1].transpose(2, 4, 0, 1, 3, 5)
        y = mx.conv2d(x, w.reshape(4 * m, 2, 2, n), padding=1).reshape(B, H + 1, W + 1, 2, 2, m)
        y = y.transpose(0, 1, 3, 2, 4, 5).reshape(B, 2 * H + 2, 2 * W + 2, m)[:, 1:-1, 1:-1]
        return y + self.bias if "bias" in self else y


class Down(nn.Conv2d):
    """A convolution, 4x4, stride 2: half as high and as wide. In files its weight is (m, n, 4, 4)."""

    def __init__(self, n, m, bias=True):
        super().__init__(n, m, 4, stride=2, padding=1, bias=bias)

    def __call__(self, x):
        B, H, W, n = x.shape
        m, h, w = self.weight.shape[0], H // 2 + 1, W // 2 + 1
        # blocks of 2x2 pixels are folded into 4 n channels; here it is the gradient that would be slow with a stride
        x = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)]).reshape(B, h, 2, w, 2, n)
        weight = self.weight.reshape(m, 2, 2, 2, 2, n).transpose(0, 1, 3, 2, 4, 5).reshape(m, 2, 2, 4 * n)
        y = mx.conv2d(x.transpose(0, 1, 3, 2, 4, 5).reshape(B, h, w, 4 * n), weight)
        return y + self.bias if "bias" in self else y


class Generator(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.image, sizes, layers = config.image, [config.latent, *reversed(config.hidden)], []
        for n, m in zip(sizes, sizes[1:]):
            layers += [nn.Linear(n, m), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], math.prod(self.image)), nn.Tanh())

    def __call__(self, z):
        """z (B, latent) -> (B, H, W, C)"""
        return self.net(z).reshape(-1, *self.image)


class Discriminator(nn.Module):
    def __init__(self, config):
        super().__init__()
        sizes, layers = [math.prod(config.image), *config.hidden], []
        for n, m in zip(sizes, sizes[1:]):
            layers += [nn.Linear(n, m), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def __call__(self, x):
        """x (B, H, W, C) -> s (B,)"""
        return self.net(x.reshape(len(x), -1))[:, 0]


class ConvGenerator(nn.Module):
    def __init__(self, config):
        super().__init__()
        (H, W, C), half = config.image, 2 ** len(config.hidden)
        sizes = [*reversed(config.hidden)]
        self.small = (H // half, W // half, sizes[0])
        self.inp = nn.Linear(config.latent, math.prod(self.small))
        # the norm, of each channel over the batch, keeps G from one picture for all z; a bias before it would be idle
        layers = [nn.BatchNorm(sizes[0]), nn.ReLU()]
        for n, m in zip(sizes, sizes[1:]):
            layers += [Up(n, m, bias=False), nn.BatchNorm(m), nn.ReLU()]
        self.net = nn.Sequential(*layers, Up(sizes[-1], C), nn.Tanh())

    def __call__(self, z):
        """z (B, latent) -> (B, H, W, C)"""
        x = self.inp(z).reshape(-1, *self.small)
        return self.net(x)


class ConvDiscriminator(nn.Module):
    def __init__(self, config):
        super().__init__()
        (H, W, C), half, sizes = config.image, 2 ** len(config.hidden), config.hidden
        layers, norm = [Down(C, sizes[0]), nn.LeakyReLU(0.2)], config.loss != "wgan-gp"
        for n, m in zip(sizes, sizes[1:]):
            # the critic has no norm: the penalty is on its slope at each picture alone, and a norm would mix them
            layers += [Down(n, m, bias=not norm), nn.BatchNorm(m, track_running_stats=False)][: 1 + norm]
            layers += [nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers)
        self.out = nn.Linear(H // half * (W // half) * sizes[-1], 1)

    def __call__(self, x):
        """x (B, H, W, C) -> s (B,)"""
        x = self.net(x)
        return self.out(x.reshape(len(x), -1))[:, 0]


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
    """E[(|grad s(y)| - 1)^2] at the pictures y (B, H, W, C): the loss goes through this gradient once more."""
    slope = mx.grad(lambda y: critic(y).sum())(y)
    return (((slope**2).reshape(len(y), -1).sum(-1) ** 0.5 - 1) ** 2).mean()


def discriminator_loss(model, x, fake, u):
    """What D descends, and s (B,) of x, for x and fake = G(z) (B, H, W, C); u (B,) from 0 to 1 mixes the two."""
    config, real, s = model.config, model.discriminator(x), model.discriminator(fake)
    if config.loss == "wgan-gp":
        u = u.reshape(-1, 1, 1, 1)
        penalty = gradient_penalty(model.discriminator, u * x + (1 - u) * fake)
        return s.mean() - real.mean() + config.penalty * penalty, real
    # -log sigmoid(s) = softplus(s) - s and -log(1 - sigmoid(s)) = softplus(s); smoothed, real x are t real, 1 - t fake.
    # One-sided: were fakes called a little real too, D would draw G to where it already puts them
    t = 1 - config.smoothing
    return (nn.softplus(real) - t * real).mean() + nn.softplus(s).mean(), real


def generator_loss(model, z):
    """What G descends, and s (B,) of G(z), for z (B, latent)."""
    s = model.discriminator(model.generator(z))
    if model.config.loss == "wgan-gp":
        return -s.mean(), s  # its gradient in s is -1, always
    if model.config.loss == "minimax":
        return -nn.softplus(s).mean(), s  # log(1 - D); its gradient is -D: 0 where D has won
    return nn.softplus(-s).mean(), s  # -log D; its gradient is -(1 - D): -1 where D has won


def value(real, s, loss):
    """V of the game that the loss belongs to, for D's s (B,) of real and of generated pictures."""
    if loss == "wgan-gp":
        return real.mean() - s.mean()
    return -nn.softplus(-real).mean() - nn.softplus(s).mean()


# ---- training --------------------------------------------------------------------------------------------------------


AXES = {Up: (3, 0, 1, 2), Down: (0, 3, 1, 2)}  # from MLX's (m, 4, 4, n) to torch's (n, m, 4, 4), (m, n, 4, 4)


def to_numpy(model, arrays):
    """What there is for each parameter, {name: array}, as numpy, a copy. Files have torch's names and layout."""
    axes = {f"{name}.weight": AXES[type(layer)] for name, layer in model.named_modules() if type(layer) in AXES}
    arrays = {name: a.transpose(axes[name]) if name in axes else a for name, a in arrays.items()}
    return {name.replace(".layers.", "."): np.array(a) for name, a in arrays.items()}  # layers: of nn.Sequential


def from_numpy(model, arrays):
    """The way back, for the names that the model has. Raises ValueError where a shape is not that of the parameter."""
    axes = {f"{name}.weight": AXES[type(layer)] for name, layer in model.named_modules() if type(layer) in AXES}
    found = {name: p for name, p in tree_flatten(model.parameters()) if name.replace(".layers.", ".") in arrays}
    given = {name: arrays[name.replace(".layers.", ".")] for name in found}
    given = {name: a.transpose(np.argsort(axes[name])) if name in axes else a for name, a in given.items()}
    for name, p in found.items():
        if given[name].shape != p.shape:
            raise ValueError(f"{name} has shape {given[name].shape}, this model wants {p.shape}")
    return {name: mx.array(a, mx.float32) for name, a in given.items()}


def get_weights(model):
    """Every parameter and running statistic as numpy, {name: array}, a copy."""
    return to_numpy(model, dict(tree_flatten(model.parameters())))


def set_weights(model, weights):
    """Put {name: numpy array} in place of the model's parameters and running statistics."""
    if missing := sorted(get_weights(model).keys() - weights.keys()):
        raise ValueError(f"{missing[0]} is missing")
    weights = from_numpy(model, {name: weights[name] for name in get_weights(model)})
    model.update(tree_unflatten(list(weights.items())))


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
    return ["gpu", "cpu"] if mx.is_available(mx.gpu) else ["cpu"]


class Trainer:
    """The two players and their optimizers. Takes and gives numpy; figures become numbers when float() is called."""

    def __init__(self, config, seed=0, device=None):
        self.config, self.device, self.t = config, device or devices()[0], 0
        mx.set_default_device(getattr(mx, self.device))
        self.model = GAN(config)
        init_weights(self.model, seed)
        self.average = type(self.model.generator)(config).eval()  # its norms use running statistics
        self.average.update(self.model.generator.parameters())
        # a long momentum would push on along the other player's last course: less of it, and none for the critic
        betas, self.optimizers = (0.0, 0.9) if config.loss == "wgan-gp" else (0.5, 0.999), {}
        for player in ("generator", "discriminator"):
            self.optimizers[player] = optim.Adam(0.0, betas=betas, bias_correction=True)
            self.optimizers[player].init(getattr(self.model, player).trainable_parameters())

    def arrays(self, *arrays):
        """Numpy to the framework."""
        return [mx.array(a) for a in arrays]

    def update(self, player, loss, lr):
        """One step of one player down the first of loss()'s two; returns it, and the mean of D(.) by the second."""
        net, optimizer = getattr(self.model, player), self.optimizers[player]
        optimizer.learning_rate = lr
        (first, s), grads = nn.value_and_grad(net, loss)()  # these alone: the other player stays as it is
        optimizer.update(net, grads)
        return first, self.opinion(s).mean()

    def step(self, x, z, u, lr):
        """d_steps updates of D and one of G: x (d_steps, B, H, W, C), z (d_steps + 1, B, latent), u (d_steps, B).

        Gives {"loss", "g_loss"}, of D and G, each before its last update; and D(x), D(G(z)), or the critic's s.
        """
        x, z, u = self.arrays(x, z, u)
        self.t += 1
        for x_i, z_i, u_i in zip(x, z, u):
            fake = self.model.generator(z_i)
            loss = partial(discriminator_loss, self.model, x_i, fake, u_i)
            loss, real = self.update("discriminator", loss, lr * self.config.d_lr)
        g_loss, s = self.update("generator", partial(generator_loss, self.model, z[-1]), lr)
        average, generator = self.average.parameters(), self.model.generator.parameters()
        self.average.update(tree_map(lambda a, p: a + (1 - self.config.ema) * (p - a), average, generator))
        state = [self.model.parameters(), self.average.parameters(), [o.state for o in self.optimizers.values()]]
        mx.eval(loss, g_loss, real, s, state)  # MLX is lazy: here the step is computed
        return {"loss": loss, "g_loss": g_loss, "D(x)": real, "D(G(z))": s}

    def opinion(self, s):
        return s if self.config.loss == "wgan-gp" else mx.sigmoid(s)

    def evaluate(self, x, z):
        """{"value"} of the game as it stands, for x (B, H, W, C) and z (B, latent)."""
        x, z = self.arrays(x, z)
        self.model.generator.eval()  # its norms' statistics stay as they are
        real, s = self.model.discriminator(x), self.model.discriminator(self.model.generator(z))
        self.model.generator.train()
        return {"value": value(real, s, self.config.loss)}

    def discriminate(self, x):
        """D(x), or the critic's s, of x (B, H, W, C): numpy (B,)."""
        return np.array(self.opinion(self.model.discriminator(*self.arrays(x))))

    def generate(self, z):
        """z (B, latent) float32 -> pictures by the average of G, numpy (B, H, W, C) in [-1, 1]."""
        return np.array(self.average(*self.arrays(z)))

    def save(self, path, step, **extra):
        """Weights, average, moments, step, config and what train.py wants to remember, to one .npz: all or nothing."""
        arrays, m, v = get_weights(self.model), {}, {}
        arrays |= {f"average.{name}": a for name, a in get_weights(self.average).items()}
        for player, optimizer in self.optimizers.items():
            for name, a in tree_flatten(optimizer.state):
                if name[-2:] in (".m", ".v"):
                    (m if name[-2:] == ".m" else v)[f"{player}.{name[:-2]}"] = a
        arrays |= {f"m.{name}": a for name, a in to_numpy(self.model, m).items()}
        arrays |= {f"v.{name}": a for name, a in to_numpy(self.model, v).items()}
        meta = {"model": "gan", "config": asdict(self.config), "step": step, **extra}
        with open(f"{path}.part", "wb") as f:
            np.savez(f, meta=json.dumps(meta), **arrays)
        os.replace(f"{path}.part", path)

    def load(self, path):
        """Take up what save wrote, in whichever framework; returns the step to go on from."""
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
        for player, optimizer in self.optimizers.items():
            updates = self.t * (self.config.d_steps if player == "discriminator" else 1)
            state = dict(tree_flatten(optimizer.state)) | {"step": mx.array(updates, mx.uint64)}
            for name, _ in tree_flatten(getattr(self.model, player).trainable_parameters()):
                state |= {f"{name}.m": m[f"{player}.{name}"], f"{name}.v": v[f"{player}.{name}"]}
            optimizer.state = tree_unflatten(list(state.items()))
        return self.t
