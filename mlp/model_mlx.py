"""Multilayer perceptron in MLX, with backpropagation and the optimizers also written by hand.

    x (B, n_in) -> [Linear -> activation] per hidden layer -> Linear -> z_L (B, n_out) -> loss

Forward, for the layers k = 1 ... L, with a_0 = x:
    z_k = a_{k-1} W_k^T + b_k        (B, n_k); W_k is (n_k, n_{k-1}), the way both frameworks store it
    a_k = f(z_k)                     f is relu, sigmoid or tanh; the last layer has none
Loss, the mean over the batch and, except for cross_entropy, the outputs:
    cross_entropy                    -log softmax(z_L)[y]                                  y (B,) class numbers
    binary_cross_entropy             -y log sigmoid(z_L) - (1 - y) log(1 - sigmoid(z_L))   y (B, n_out) of 0 and 1
    mse                              (z_L - y)^2                                           y (B, n_out)
Backward, with delta_k = dloss/dz_k (B, n_k), by the chain rule from the last layer to the first:
    delta_L     = (softmax(z_L) - onehot(y)) / B,  (sigmoid(z_L) - y) / (B n_out)  or  2 (z_L - y) / (B n_out)
    dloss/dW_k  = sum over the batch of the outer products delta_k (x) a_{k-1}  =  delta_k^T a_{k-1}
    dloss/db_k  = sum over the batch of delta_k
    delta_{k-1} = (delta_k W_k) * f'(z_{k-1})

Rumelhart, Hinton and Williams 1986, "Learning representations by back-propagating errors", Nature 323.
"""

import json
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
    n_in: int = 2
    hidden: tuple = (64, 64)  # width of each hidden layer; () is a linear model
    n_out: int = 3
    activation: str = "relu"  # relu, sigmoid or tanh
    loss: str = "cross_entropy"  # cross_entropy, binary_cross_entropy or mse
    optimizer: str = "adam"  # sgd, momentum or adam
    grad: str = "autograd"  # autograd or by-hand


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        sizes = [config.n_in, *config.hidden, config.n_out]
        self.layers = [nn.Linear(n, m) for n, m in zip(sizes, sizes[1:])]
        self.activation = {"relu": nn.relu, "sigmoid": mx.sigmoid, "tanh": mx.tanh}[config.activation]

    def __call__(self, x):
        """x (B, n_in) -> z_L (B, n_out): logits, or the values themselves for mse."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def loss_fn(z, y, loss):
    """The mean -log p of the class y, or of the answer y = 0 or 1, under logits z; or the mean squared error of z."""
    if loss == "cross_entropy":
        return nn.losses.cross_entropy(z, y, reduction="mean")
    if loss == "binary_cross_entropy":
        return nn.losses.binary_cross_entropy(z, y, reduction="mean")
    return nn.losses.mse_loss(z, y, reduction="mean")


# ---- by hand: forward, backward ------------------------------------------------------------------------------------


def activate(z, activation):
    """f(z) and f'(z), both of z's shape."""
    if activation == "relu":  # max(z, 0): slope 1 where z > 0, else 0
        return mx.where(z > 0, z, 0.0), mx.where(z > 0, 1.0, 0.0)
    if activation == "sigmoid":  # s = 1 / (1 + e^-z): slope e^-z / (1 + e^-z)^2 = s (1 - s), at most 1/4
        s = 1 / (1 + mx.exp(-z))
        return s, s * (1 - s)
    t = mx.tanh(z)  # (e^z - e^-z) / (e^z + e^-z): slope 1 - t^2, at most 1
    return t, 1 - t * t


def loss_and_delta(z, y, loss):
    """The mean loss, and delta_L = dloss/dz (B, n_out), from the last layer's z (B, n_out)."""
    B, n_out = z.shape
    if loss == "cross_entropy":
        # -log softmax(z)[y] = log(sum e^z) - z[y]; the largest z is subtracted first, so that no e^z overflows
        z = z - z.max(1, keepdims=True)
        log_p = z - mx.log(mx.exp(z).sum(1, keepdims=True))
        onehot = mx.eye(n_out)[y]
        return -(onehot * log_p).sum() / B, (mx.exp(log_p) - onehot) / B
    if loss == "binary_cross_entropy":
        # -y log s - (1 - y) log(1 - s) = max(z, 0) - y z + log(1 + e^-|z|), which never overflows either
        each = mx.where(z > 0, z, 0.0) - y * z + mx.log1p(mx.exp(-mx.abs(z)))
        return each.sum() / (B * n_out), (mx.sigmoid(z) - y) / (B * n_out)
    return ((z - y) ** 2).sum() / (B * n_out), 2 * (z - y) / (B * n_out)


def loss_and_grads_by_hand(model, x, y):
    """The loss, and its gradient for every parameter: {name: array}. No autograd is involved."""
    W, b = [layer.weight for layer in model.layers], [layer.bias for layer in model.layers]
    L = len(W)
    # forward: a[k] is the input of layer k + 1, slope[k] is f'(z) there; the backward pass needs both
    a, slope = [x], [None]
    for k in range(L - 1):
        f, df = activate(a[k] @ W[k].T + b[k], model.config.activation)
        a.append(f)
        slope.append(df)
    loss, delta = loss_and_delta(a[-1] @ W[-1].T + b[-1], y, model.config.loss)
    # backward
    grads = {}
    for k in reversed(range(L)):
        grads[f"layers.{k}.weight"] = delta.T @ a[k]  # sum_i delta[i] (x) a[i]: (n_out, B) @ (B, n_in)
        grads[f"layers.{k}.bias"] = delta.sum(0)
        if k > 0:
            delta = (delta @ W[k]) * slope[k]  # (dloss/dz dz/da) da/dz, one layer further down
    return loss, grads


# ---- by hand: optimizers. p parameter, g gradient, m and v running moments (zeros at first), t = 1, 2, ... ----------


def sgd(p, g, lr, t):
    """Robbins & Monro 1951: downhill, against the gradient of a batch."""
    return (p - lr * g,)


def momentum(p, g, lr, t, m, beta=0.9):
    """Polyak 1964: a ball that rolls down the loss and keeps a fraction beta of its speed m."""
    m = beta * m + g
    return p - lr * m, m


def adam(p, g, lr, t, m, v, beta1=0.9, beta2=0.999, eps=1e-8):
    """Kingma & Ba 2015. m and v start at 0; dividing by 1 - beta^t makes up for it."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return p - lr * m_hat / (v_hat**0.5 + eps), m, v


# ---- training ------------------------------------------------------------------------------------------------------


def get_weights(model):
    """Every parameter as numpy, {name: array}, a copy."""
    return {name: np.array(p) for name, p in tree_flatten(model.parameters())}


def set_weights(model, weights):
    """Replace the model's parameters with {name: numpy array}."""
    params = dict(tree_flatten(model.parameters()))
    for name, p in params.items():
        if weights[name].shape != p.shape:
            raise ValueError(f"{name} has shape {weights[name].shape}, this model expects {p.shape}")
        params[name] = mx.array(weights[name], mx.float32)
    model.update(tree_unflatten(list(params.items())))


def init_weights(model, seed):
    """Biases 0. Weights N(0, 2/n_in) for relu (He et al. 2015), else N(0, 2/(n_in + n_out)) (Glorot & Bengio 2010)."""
    rng, weights = np.random.default_rng(seed), get_weights(model)
    for name, w in sorted(weights.items()):
        if name.endswith("weight"):
            n_out, n_in = w.shape
            variance = 2 / n_in if model.config.activation == "relu" else 2 / (n_in + n_out)
            weights[name] = rng.normal(0, variance**0.5, w.shape)
        else:
            weights[name] = np.zeros(w.shape)
    set_weights(model, weights)


def devices():
    """The devices that can be used here, the best first."""
    return ["gpu", "cpu"] if mx.is_available(mx.gpu) else ["cpu"]


class Trainer:
    """An MLP and its optimizer. Takes and returns numpy; figures stay on the device until float() reads them."""

    def __init__(self, config, seed=0, device=None):
        self.config, self.device, self.t = config, device or devices()[0], 0
        mx.set_default_device(getattr(mx, self.device))
        self.model = MLP(config)
        init_weights(self.model, seed)
        # what MLX calls m and v; Adam's bias correction is off unless asked for
        self.moments = {"sgd": [], "momentum": ["v"], "adam": ["m", "v"]}[config.optimizer]
        if config.optimizer == "adam":
            self.optimizer = optim.Adam(0.0, bias_correction=True)
        else:
            self.optimizer = optim.SGD(0.0, momentum=0.9 if config.optimizer == "momentum" else 0.0)
        self.optimizer.init(self.model.trainable_parameters())
        if self.device == "gpu":  # compile the whole step; plain numbers would become constants
            state = [self.model.state, self.optimizer.state]
            update = mx.compile(self.update, inputs=state, outputs=state)
            self.update = lambda x, y, *numbers: update(x, y, *map(mx.array, numbers))

    def arrays(self, x, y):
        """Numpy to the framework. Labels are checked first: MLX would silently read past the end of an array."""
        if self.config.loss == "cross_entropy" and not 0 <= y.min() <= y.max() < self.config.n_out:
            raise ValueError(f"a label is outside 0 ... {self.config.n_out - 1}")
        return [mx.array(a) for a in (x, y)]

    def step(self, x, y, lr):
        """One update on x (B, n_in) float32 and y as the loss needs it; returns {"loss"} before the update."""
        x, y = self.arrays(x, y)
        self.t += 1
        loss = self.update(x, y, lr, self.t)
        mx.eval(loss, self.model.parameters(), self.optimizer.state)  # MLX is lazy: the step is computed here
        return {"loss": loss}

    def update(self, x, y, lr, t):
        """Update the weights and the optimizer's state, at step t = 1, 2, ...; returns the loss before the update."""
        if self.config.grad == "by-hand":
            return self.update_by_hand(x, y, lr, t)
        self.optimizer.learning_rate = lr
        loss_and_grads = nn.value_and_grad(self.model, lambda x, y: loss_fn(self.model(x), y, self.config.loss))
        loss, grads = loss_and_grads(x, y)
        self.optimizer.update(self.model, grads)
        return loss

    def update_by_hand(self, x, y, lr, t):
        loss, grads = loss_and_grads_by_hand(self.model, x, y)
        update = {"sgd": sgd, "momentum": momentum, "adam": adam}[self.config.optimizer]
        params, state = dict(tree_flatten(self.model.parameters())), dict(tree_flatten(self.optimizer.state))
        for name, p in params.items():
            keys = [f"{name}.{key}" for key in self.moments]
            params[name], *moments = update(p, grads[name], lr, t, *(state[key] for key in keys))
            state.update(zip(keys, moments))
        self.model.update(tree_unflatten(list(params.items())))
        self.optimizer.state.update(tree_unflatten(list(state.items())))
        return loss

    def evaluate(self, x, y):
        """{"val_loss"} and, for classes, {"accuracy"} on x (B, n_in) and y."""
        x, y = self.arrays(x, y)
        z = self.model(x)
        figures = {"val_loss": loss_fn(z, y, self.config.loss)}
        if self.config.loss == "cross_entropy":
            figures["accuracy"] = (z.argmax(1) == y).mean()
        if self.config.loss == "binary_cross_entropy":
            figures["accuracy"] = ((z > 0) == (y > 0)).mean()
        return figures

    def predict(self, x):
        """x (B, n_in) -> numpy (B, n_out): class probabilities, the probability of 1, or the values."""
        z = self.model(mx.array(x))
        if self.config.loss == "cross_entropy":
            z = mx.softmax(z, 1)
        if self.config.loss == "binary_cross_entropy":
            z = mx.sigmoid(z)
        return np.array(z)

    def save(self, path, step, **extra):
        """Save weights, moments, step, config and what train.py adds to one .npz: all or nothing."""
        arrays, state = get_weights(self.model), dict(tree_flatten(self.optimizer.state))
        for name in list(arrays):
            for letter, key in zip("mv", self.moments):
                arrays[f"{letter}.{name}"] = np.array(state[f"{name}.{key}"])
        meta = {"model": "mlp", "config": asdict(self.config), "step": step, **extra}
        with open(f"{path}.part", "wb") as f:
            np.savez(f, meta=json.dumps(meta), **arrays)
        os.replace(f"{path}.part", path)

    def load(self, path):
        """Load what save wrote, in either framework; returns the step to continue from."""
        with np.load(path, allow_pickle=False) as f:
            arrays, meta = dict(f), json.loads(str(f["meta"]))
        for name, w in get_weights(self.model).items():
            for key in (name, *(f"{letter}.{name}" for letter, _ in zip("mv", self.moments))):
                if key not in arrays or arrays[key].shape != w.shape:
                    raise ValueError(f"{key} is missing or does not have the shape {w.shape}")
        set_weights(self.model, arrays)
        self.t = meta["step"]
        state = dict(tree_flatten(self.optimizer.state)) | {"step": mx.array(self.t, mx.uint64)}
        for name in get_weights(self.model):
            for letter, key in zip("mv", self.moments):
                state[f"{name}.{key}"] = mx.array(arrays[f"{letter}.{name}"])
        self.optimizer.state.update(tree_unflatten(list(state.items())))
        return self.t
