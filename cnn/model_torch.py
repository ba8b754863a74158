"""Convolutional networks in PyTorch: LeNet, a ResNet, convolution and pooling by hand, and style transfer.

    LeNet    x (B, H, W, C) -> [conv 5x5 -> max-pool -> ReLU] twice -> Linear -> ReLU -> Linear -> logits (B, n_out)
    ResNet   x (B, H, W, C) -> conv 3x3 -> norm -> ReLU -> [max-pool -> Block] n times -> mean -> Linear -> logits
    Block    y = ReLU(f(x) + shortcut(x)),  f = conv 3x3 -> norm -> ReLU -> conv 3x3 -> norm

Convolution, with filters w (N, C, k, k), stride s and p rows and columns of padding:
    y[b,i,j,n] = b[n] + sum_{c,u,v} w[n,c,u,v] x[b, s i + u - p, s j + v - p, c]
Write the k x k x C inputs of each output position as one row of a matrix P, and w as a matrix W with a column for each
filter; then the sum is a matrix product, and so are its gradients:
    Y = P W + b        dW = P^T dY        db = sum over the rows of dY        dP = dY W^T
An input is read for up to k x k positions, so its gradient dx is the sum of the entries of dP that belong to it.
Max-pooling takes the largest entry of each window; the gradient goes back to that entry.

Style transfer looks for an image x with the features F_c (H W, C) of the content image in a layer c of a fixed network
and the Gram matrices G_l = F_l^T F_l / (H W) of the style image in several layers l. These say which features occur
together, but not where:
    loss = |F_c - F_c*|^2 / |F_c*|^2  +  strength mean_l |G_l - G_l*|^2 / |G_l*|^2  +  tv mean (differences of x)^2

LeCun et al. 1998, "Gradient-based learning applied to document recognition".
He et al. 2016, "Deep residual learning for image recognition". Wu and He 2018, "Group normalization".
Gatys, Ecker and Bethge 2016, "Image style transfer using convolutional neural networks".
Ustyuzhaninov et al. 2016, "Texture synthesis using shallow convolutional networks with random filters".
"""

import json
import math
import os
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.backends.cudnn.allow_tf32 = False  # full float32, for convolutions on CUDA too

EXPORTS = {".pt2": "torch", ".mlpackage": "coremltools"}  # the files that export writes, and the package it needs


@dataclass
class Config:
    model: str = "lenet"  # lenet, resnet or style
    size: int = 28  # side of the square images; a ResNet takes other sizes, too
    n_in: int = 1  # channels of the images
    n_out: int = 10
    channels: tuple = (16, 32, 128)  # lenet: both convolutions and the hidden layer; resnet: the stem and each block
    label_smoothing: float = 0.0
    weight_decay: float = 0.05
    impl: str = "builtin"  # builtin or by-hand: whose convolution and pooling

    def __post_init__(self):
        if self.model == "lenet" and len(self.channels) != 3:
            raise ValueError("a lenet needs three channels: for two convolutions and the hidden layer")
        if self.model == "resnet" and not self.size >> len(self.channels) - 1:
            raise ValueError(f"channels: {len(self.channels) - 1} blocks halve size {self.size} to nothing: use fewer")


class Conv2d(nn.Conv2d):
    """A convolution that keeps the image size, by the library or by hand; the parameters are the same."""

    def __init__(self, n_in, n_out, k, impl):
        super().__init__(n_in, n_out, k, padding=k // 2)
        self.impl = impl

    def forward(self, x):
        """x (B, n_in, H, W) -> (B, n_out, H, W)."""
        if self.impl == "builtin":
            return super().forward(x)
        return conv2d(x.permute(0, 2, 3, 1), self.weight, self.bias, 1, self.padding[0]).permute(0, 3, 1, 2)


class MaxPool2d(nn.MaxPool2d):
    """The largest of each 2 x 2 pixels, by the library or by hand."""

    def __init__(self, impl):
        super().__init__(2)
        self.impl = impl

    def forward(self, x):
        """x (B, C, H, W) -> (B, C, H/2, W/2)."""
        if self.impl == "builtin":
            return super().forward(x)
        return max_pool2d(x.permute(0, 2, 3, 1), 2, 2).permute(0, 3, 1, 2)


class LeNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        c1, c2, hidden = config.channels
        self.conv1 = Conv2d(config.n_in, c1, 5, config.impl)
        self.conv2 = Conv2d(c1, c2, 5, config.impl)
        self.fc1 = nn.Linear(c2 * (config.size // 4) ** 2, hidden)
        self.fc2 = nn.Linear(hidden, config.n_out)
        self.pool = MaxPool2d(config.impl)

    def forward(self, x):
        """x (B, H, W, C), pixels from 0 to 1 -> logits (B, n_out)."""
        x = x.permute(0, 3, 1, 2)  # torch wants (B, C, H, W); in memory the channels stay last, which is fastest
        x = F.relu(self.pool(self.conv1(x)))  # (B, c1, H/2, W/2); ReLU first gives the same, at four times the work
        x = F.relu(self.pool(self.conv2(x)))  # (B, c2, H/4, W/4)
        x = x.flatten(1)  # in the order c2, H/4, W/4
        return self.fc2(F.relu(self.fc1(x)))


class Block(nn.Module):
    """Two convolutions and a shortcut, through which the gradient reaches earlier layers directly."""

    def __init__(self, n_in, n_out, impl):
        super().__init__()
        self.conv1 = Conv2d(n_in, n_out, 3, impl)
        self.norm1 = nn.GroupNorm(math.gcd(8, n_out), n_out)
        self.conv2 = Conv2d(n_out, n_out, 3, impl)
        self.norm2 = nn.GroupNorm(math.gcd(8, n_out), n_out)
        self.shortcut = nn.Identity() if n_in == n_out else Conv2d(n_in, n_out, 1, impl)

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        widths = config.channels
        self.stem = Conv2d(config.n_in, widths[0], 3, config.impl)
        self.norm = nn.GroupNorm(math.gcd(8, widths[0]), widths[0])
        self.blocks = nn.ModuleList([Block(n, m, config.impl) for n, m in zip(widths, widths[1:])])
        self.head = nn.Linear(widths[-1], config.n_out)
        self.pool = MaxPool2d(config.impl)

    def forward(self, x):
        """x (B, H, W, C), pixels from 0 to 1 -> logits (B, n_out)."""
        x = x.permute(0, 3, 1, 2)  # torch wants (B, C, H, W); in memory the channels stay last, which is fastest
        x = F.relu(self.norm(self.stem(4 * x - 2)))  # pixels with about mean 0 and deviation 1
        for block in self.blocks:
            x = block(self.pool(x))  # (B, widths[k], H/2^k, W/2^k)
        return self.head(x.mean((2, 3)))


def loss_fn(logits, y, label_smoothing=0.0):
    """The mean -log p of the classes y (B,) under logits (B, n_out); with smoothing, every class is a little right."""
    return F.cross_entropy(logits, y, label_smoothing=label_smoothing)


# ---- by hand, on (B, H, W, C): x input, w (N, C, k, k) filters, b (N,) bias, dy gradient of the output --------------


def patches(x, k, stride, padding, value=0.0):
    """The window under each output position: x (B, H, W, C) -> (B, H', W', k k, C); the border is filled with value."""
    H, W = ((n + 2 * padding - k) // stride + 1 for n in x.shape[1:3])
    x = F.pad(x, (0, 0, padding, padding, padding, padding), value=value)
    rows, columns = stride * (H - 1) + 1, stride * (W - 1) + 1
    windows = [x[:, u : u + rows : stride, v : v + columns : stride] for u in range(k) for v in range(k)]
    return torch.stack(windows, 3)


def add_patches(dP, shape, k, stride, padding):
    """The transpose: each entry of dP (B, H', W', k k, C) added where patches read it -> dx of shape (B, H, W, C)."""
    _, H, W, _, _ = dP.shape
    dx = dP.new_zeros((shape[0], shape[1] + 2 * padding, shape[2] + 2 * padding, shape[3]))
    rows, columns = stride * (H - 1) + 1, stride * (W - 1) + 1
    for i in range(k * k):
        u, v = i // k, i % k
        dx[:, u : u + rows : stride, v : v + columns : stride] += dP[:, :, :, i]
    return dx[:, padding : padding + shape[1], padding : padding + shape[2]]


def conv2d(x, w, b, stride=1, padding=0):
    """x (B, H, W, C) -> y (B, H', W', N)."""
    P = patches(x, w.shape[2], stride, padding)
    B, H, W, K, C = P.shape
    return P.reshape(B, H, W, K * C) @ w.permute(2, 3, 1, 0).reshape(K * C, -1) + b


def conv2d_backward(dy, x, w, stride=1, padding=0):
    """dy (B, H', W', N) -> the gradients dx, dw, db of x, w, b."""
    N, C, k, _ = w.shape
    P = patches(x, k, stride, padding)
    dY, W = dy.reshape(-1, N), w.permute(2, 3, 1, 0).reshape(-1, N)
    dW = P.reshape(-1, k * k * C).T @ dY  # (k k C, N)
    dx = add_patches((dY @ W.T).reshape(P.shape), x.shape, k, stride, padding)
    return dx, dW.reshape(k, k, C, N).permute(3, 2, 0, 1), dY.sum(0)


def max_pool2d(x, k, stride, padding=0):
    """x (B, H, W, C) -> y (B, H', W', C)."""
    return patches(x, k, stride, padding, -math.inf).amax(3)


def max_pool2d_backward(dy, x, k, stride, padding=0):
    """dy (B, H', W', C) -> the gradient dx of x."""
    largest = patches(x, k, stride, padding, -math.inf).argmax(3)  # (B, H', W', C)
    dP = torch.where(torch.arange(k * k, device=x.device)[:, None] == largest[:, :, :, None], dy[:, :, :, None], 0.0)
    return add_patches(dP, x.shape, k, stride, padding)


# ---- style transfer --------------------------------------------------------------------------------------------------


class RandomFilters(nn.Module):
    """Random 7x7 filters at five scales, each half as fine as the one before: they need no training and no download."""

    content, style = [2], [0, 1, 2, 3, 4]  # which of the features hold the content, and which the style

    def __init__(self, seed=0, n=64, k=7):
        super().__init__()
        w = np.random.default_rng((seed, 3)).standard_normal((len(self.style), n, 3, k, k), np.float32)
        w = w - 0.9 * w.mean((3, 4), keepdims=True)  # edges count for more than the colours of flat areas
        self.w = torch.from_numpy(w / np.sqrt((w**2).sum((2, 3, 4), keepdims=True)))

    def forward(self, x):
        """x (1, H, W, 3) -> the features of each scale, (H' W', n)."""
        x, features = x.permute(0, 3, 1, 2) - 0.5, []
        for w in self.w.to(x.device):
            if features:  # 4x4 and not 2x2, whose squares would show in the image
                x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "reflect"), 4, 2)
            features.append(F.relu(F.conv2d(x, w, None, 1, 3)).flatten(2)[0].T)
        return features


class VGG(nn.Module):
    """VGG-19 (Simonyan and Zisserman 2015) as far as relu5_1, with the weights of a file in torchvision's layout."""

    content, style = [4], [0, 1, 2, 3, 5]  # relu4_2; relu1_1, relu2_1 ... relu5_1
    layers = "0 * 2 pool 5 * 7 pool 10 * 12 14 16 pool 19 * 21 * 23 25 pool 28 *".split()

    def __init__(self, path):
        super().__init__()
        self.w = torch.load(path, map_location="cpu", weights_only=True)  # only arrays: no code in the file is run

    def forward(self, x):
        """x (1, H, W, 3) -> the features of each layer with a *, (H' W', C)."""
        x = (x - x.new_tensor([0.485, 0.456, 0.406])) / x.new_tensor([0.229, 0.224, 0.225])
        x, features = x.permute(0, 3, 1, 2), []
        for layer in self.layers:
            if layer == "*":
                features.append(x.flatten(2)[0].T)
            elif layer == "pool":
                x = F.max_pool2d(x, 2)
            else:
                w, b = self.w[f"features.{layer}.weight"], self.w[f"features.{layer}.bias"]
                x = F.relu(F.conv2d(x, w.to(x.device), b.to(x.device), 1, 1))
        return features


def gram(f):
    """Features (H W, C) -> (C, C): how strongly each pair occurs together, wherever that is."""
    return f.T @ f / f.shape[0]


def distance(a, b):
    """The squared distance of a from b, relative to b."""
    return ((a - b) ** 2).sum() / (b**2).sum()


class Canvas(nn.Module):
    """The image being painted: its pixels are the only parameters."""

    def __init__(self, image):
        super().__init__()
        self.image = nn.Parameter(torch.tensor(image[None]))  # (1, H, W, 3), a copy


# ---- optimizers: p parameter, g gradient, m and v running moments (zeros at first), t = 1, 2, ... --------------------


@torch.no_grad()
def adamw(p, g, m, v, lr, t, weight_decay, beta1=0.9, beta2=0.99, eps=1e-8):
    """Loshchilov & Hutter 2019: Adam, with weight decay applied directly to the weights."""
    m.lerp_(g, 1 - beta1)  # m = beta1 m + (1 - beta1) g
    v.lerp_(g * g, 1 - beta2)
    v_hat = v / (1 - beta2**t)
    p.mul_(1 - lr * weight_decay).addcdiv_(m, v_hat.sqrt() + eps, value=-lr / (1 - beta1**t))


@torch.no_grad()
def muon(p, g, m, lr, weight_decay, beta=0.9):
    """Jordan et al. 2024: momentum for matrices, made orthogonal, so that all directions move equally far.

    The factor makes the update as large as AdamW's, about 0.2 per entry (Liu et al. 2025), so one rate fits both.
    """
    m.lerp_(g, 1 - beta)
    update = orthogonalize(torch.lerp(g, m, beta))  # Nesterov: the momentum one step ahead
    p.mul_(1 - lr * weight_decay).sub_(lr * 0.2 * max(p.shape) ** 0.5 * update)


def orthogonalize(g):
    """U V^T for g = U S V^T, approximately: five Newton-Schulz steps bring every singular value close to 1.

    A step is x <- p x with p = a I + b x x^T + c (x x^T)^2, which takes a singular value s to a s + b s^3 + c s^5.
    All these p commute, so it is enough to update their product q, and x x^T: only small matrices are multiplied.
    """
    x = g.T if g.shape[0] > g.shape[1] else g  # wide, so that x x^T is the smaller of the two squares
    x = x / (x.norm() + 1e-7)
    xxt, eye = x @ x.T, torch.eye(x.shape[0], device=x.device)
    q = p = 3.4445 * eye - 4.7750 * xxt + 2.0315 * xxt @ xxt
    for _ in range(4):
        xxt = p @ xxt @ p
        p = 3.4445 * eye - 4.7750 * xxt + 2.0315 * xxt @ xxt
        q = p @ q
    return (q @ x).T if g.shape[0] > g.shape[1] else q @ x


# ---- training --------------------------------------------------------------------------------------------------------


def to_numpy(model, arrays):
    """One array for each parameter, {name: array}, as numpy; filters as (n_out, n_in, k, k), as in torch."""
    return {name: a.detach().cpu().numpy().copy() for name, a in arrays.items()}


def from_numpy(model, arrays):
    """The inverse. Raises ValueError if an array does not have the shape of its parameter."""
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
    """N(0, 2/fan_in), which keeps the variance through ReLUs (He et al. 2015); norms 1, biases 0."""
    rng, weights = np.random.default_rng(seed), get_weights(model)
    for name, w in sorted(weights.items()):
        if w.ndim > 1:
            weights[name] = rng.standard_normal(w.shape, np.float32) * np.float32((2 / w[0].size) ** 0.5)
        else:
            weights[name] = np.full_like(w, name.endswith("weight"))
    set_weights(model, weights)


def devices():
    """The devices that can be used here, the best first."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, there in found.items() if there]


class Learner:
    """What Trainer and Stylist have in common: a model's parameters, their optimizer and the checkpoint."""

    def __init__(self, config, device):
        self.config, self.device, self.t = config, device or devices()[0], 0

    def start(self, model):
        self.model = model.to(self.device)
        self.m = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.v = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def learn(self, *arrays, lr):
        """One update on the arrays that self.loss takes; returns {"loss"} before it."""
        self.t += 1
        loss = self.update(arrays, lr, self.t)
        return {"loss": loss}

    def update(self, arrays, lr, t):
        """Step t down the gradient of the loss, by Muon for filters, else AdamW; returns the loss before it."""
        self.model.zero_grad()
        loss = self.loss(*arrays)
        loss.backward()
        for name, p in self.model.named_parameters():
            decay = self.config.weight_decay if p.ndim > 1 else 0.0
            if p.ndim == 4 and name.endswith("weight"):  # filters: a matrix with a row for each
                muon(p.data.flatten(1), p.grad.flatten(1), self.m[name].flatten(1), lr, decay)
            else:
                adamw(p, p.grad, self.m[name], self.v[name], lr, t, decay)
        return loss.detach()

    def save(self, path, step, **extra):
        """Save weights, moments, step, config and what train.py adds to one .npz: all or nothing."""
        arrays = get_weights(self.model)
        for kind, moments in (("m", self.m), ("v", self.v)):
            arrays |= {f"{kind}.{name}": a for name, a in to_numpy(self.model, moments).items()}
        meta = {"model": "cnn", "config": asdict(self.config), "step": step, **extra}
        with open(f"{path}.part", "wb") as f:
            np.savez(f, meta=json.dumps(meta), **arrays)
        os.replace(f"{path}.part", path)

    def load(self, path):
        """Load what save wrote, in either framework; returns the step to continue from."""
        with np.load(path, allow_pickle=False) as f:
            arrays, meta = dict(f), json.loads(str(f["meta"]))
        for name, w in get_weights(self.model).items():
            for key in (name, f"m.{name}", f"v.{name}"):
                if key not in arrays or arrays[key].shape != w.shape:
                    raise ValueError(f"{key} is missing or does not have the shape {w.shape}")
        set_weights(self.model, arrays)
        self.t = meta["step"]
        for kind, moments in (("m", self.m), ("v", self.v)):
            moments.update(from_numpy(self.model, {name: arrays[f"{kind}.{name}"] for name in moments}))
        return self.t


class Trainer(Learner):
    """A network and its optimizer. Takes and returns numpy; figures stay on the device until float() reads them."""

    def __init__(self, config, seed=0, device=None):
        super().__init__(config, device)
        model = (LeNet if config.model == "lenet" else ResNet)(config)
        init_weights(model, seed)
        self.start(model)

    def arrays(self, x, y):
        """Numpy to the framework. Labels are checked first: MLX would silently read past the end of an array."""
        if not 0 <= y.min() <= y.max() < self.config.n_out:
            raise ValueError(f"a label is outside 0 ... {self.config.n_out - 1}")
        return [torch.from_numpy(a).to(self.device, non_blocking=self.device == "cuda") for a in (x, y)]

    def step(self, x, y, lr):
        """One update on x (B, H, W, C) float32 and y (B,) int64; returns {"loss"} before the update."""
        return self.learn(*self.arrays(x, y), lr=lr)

    def loss(self, x, y):
        return loss_fn(self.model(x), y, self.config.label_smoothing)

    @torch.no_grad()
    def evaluate(self, x, y):
        """{"val_loss", "accuracy"} on x (B, H, W, C) and y (B,)."""
        x, y = self.arrays(x, y)
        logits = self.model(x)
        return {"val_loss": loss_fn(logits, y), "accuracy": (logits.argmax(1) == y).float().mean()}

    @torch.no_grad()
    def predict(self, x):
        """x (B, H, W, C) -> numpy (B, n_out): the probabilities of the classes."""
        return torch.softmax(self.model(torch.from_numpy(x).to(self.device)), 1).cpu().numpy()

    def filters(self):
        """The filters of the first layer, numpy (n_out, n_in, k, k)."""
        return get_weights(self.model)["conv1.weight" if self.config.model == "lenet" else "stem.weight"]

    def export(self, path, names=()):
        """Export the network to a file that runs without this code; returns a description of its input and output.

        .pt2: torch.export, any B. .mlpackage: Core ML, and .mlxfn: MLX, both for B from 1 to 64.
        """
        config = self.config
        says = f"pixels (B, {config.size}, {config.size}, {config.n_in}) from 0 to 1 -> logits (B, {config.n_out})"
        x = torch.zeros(2, config.size, config.size, config.n_in, device=self.device)
        if str(path).endswith(".pt2"):
            program = torch.export.export(self.model, (x,), dynamic_shapes=({0: torch.export.Dim("B")},))
            torch.export.save(program, path, extra_files={"classes.json": json.dumps(names)})
            return f"{says}, any B; the class names are in its classes.json"

        def group_norm(x, groups, weight, bias, eps):  # written out: the converter's own needs a fixed B
            C, H, W = map(int, x.shape[1:])
            h = F.layer_norm(x.reshape(-1, groups, C * H * W // groups), [C * H * W // groups], eps=eps)
            return h.reshape(-1, C, H, W) * weight[:, None, None] + bias[:, None, None]

        with redirect_stderr(StringIO()), mock.patch.object(F, "group_norm", group_norm):  # the converter is noisy
            import coremltools

            inputs = [coremltools.TensorType("image", (coremltools.RangeDim(1, 64), *x.shape[1:]))]
            traced = torch.jit.trace(self.model.cpu(), x.cpu())
            package = coremltools.convert(traced, inputs=inputs, outputs=[coremltools.TensorType("logits")])
        package.user_defined_metadata["classes"] = json.dumps(names)
        package.save(str(path))
        self.model.to(self.device)
        return f"{says}, B from 1 to 64; the class names are in its metadata"


class Stylist(Learner):
    """Paints an image, whose pixels are the parameters. content and style are images (H, W, 3) float32 from 0 to 1."""

    def __init__(self, config, content, style, weights=None, strength=100.0, tv=30.0, seed=0, device=None):
        super().__init__(config, device)
        self.strength, self.tv = strength, tv
        self.net = VGG(weights) if weights else RandomFilters(seed)
        self.start(Canvas(content))
        with torch.no_grad():
            content, style = (self.net(torch.from_numpy(a[None]).to(self.device)) for a in (content, style))
            self.content = [content[layer] for layer in self.net.content]
            self.style = [gram(style[layer]) for layer in self.net.style]

    def losses(self):
        x = self.model.image
        features = self.net(x)
        content = sum(distance(features[i], goal) for i, goal in zip(self.net.content, self.content))
        style = sum(distance(gram(features[i]), goal) for i, goal in zip(self.net.style, self.style)) / len(self.style)
        tv = ((x[:, 1:] - x[:, :-1]) ** 2).mean() + ((x[:, :, 1:] - x[:, :, :-1]) ** 2).mean()
        return content, style, tv

    def loss(self):
        content, style, tv = self.losses()
        return content + self.strength * style + self.tv * tv

    def step(self, lr):
        """One update of the image; returns {"loss"} before the update."""
        return self.learn(lr=lr)

    @torch.no_grad()
    def evaluate(self):
        """{"content_loss", "style_loss"}: the distance from the content and from the style, relative to each."""
        content, style, _ = self.losses()
        return {"content_loss": content, "style_loss": style}

    def image(self):
        """The image as it is now, numpy (H, W, 3) from 0 to 1."""
        return get_weights(self.model)["image"][0].clip(0, 1)
