"""Recurrent networks in MLX: RNN, LSTM and GRU, by hand and built in.

    x (B, T) tokens and / or (B, T, n_in) numbers -> n_layer times [cell over t = 1 ... T] -> Linear -> answers

A cell carries a state from one time to the next; sigma is the sigmoid, * is elementwise, W_hh is (gates H, H):
    RNN    h' = tanh(a + b_hh + W_hh h)                                              a = W_ih x + b_ih
    LSTM   i, f, g, o = the four parts of  a + b_hh + W_hh h                         input, forget, candidate, output
           c' = sigma(f) * c + sigma(i) * tanh(g)
           h' = sigma(o) * tanh(c')
    GRU    r, z, n = the three parts of  a,  and of  b = b_hh + W_hh h               reset, update, candidate
           h' = (1 - z) * tanh(a_n + r * b_n) + z * h,   r = sigma(a_r + b_r),  z = sigma(a_z + b_z)
Only W_hh h must wait for the previous time; a is one matrix product for all times at once.

Back through time, dh_T/dh_t is a product of T - t Jacobians dh'/dh. For the RNN each is diag(1 - h'^2) W_hh: the
product shrinks or grows as a power of the spectral radius of W_hh and of the slopes. The LSTM's dc'/dc has the diagonal
sigma(f), the GRU's dh'/dh the diagonal z, both near 1 where the gate keeps the state. Truncated backpropagation stops
after a batch's T steps, and hands the state on to the next batch.

Elman 1990, "Finding structure in time". Hochreiter & Schmidhuber 1997, "Long short-term memory"; Gers et al. 2000 added
the forget gate. Cho et al. 2014, "Learning phrase representations using RNN encoder-decoder", has the GRU, here in the
form of both frameworks: reset after the product. Pascanu et al. 2013, "On the difficulty of training recurrent neural
networks", shows why gradients vanish and explode, and clips them.
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
    cell: str = "lstm"  # rnn, lstm or gru
    impl: str = "by-hand"  # by-hand or builtin
    vocab_size: int = 0  # number of different input tokens; 0: no tokens
    n_embd: int = 64
    n_in: int = 0  # input numbers at each time, beside the tokens or instead of them
    n_hidden: int = 256
    n_layer: int = 1
    n_out: int = 65
    read: str = "each"  # each or last: an answer at each time, or one at the end
    loss: str = "cross_entropy"  # cross_entropy or mse
    optimizer: str = "muon"  # muon, adamw or sgd
    weight_decay: float = 0.1  # of the matrices
    clip: float = 1.0  # the largest norm of the gradient of all parameters; inf: no clipping
    radius: float = 0.0  # the spectral radius that each gate's W_hh starts with; 0: orthogonal


class Cell(nn.Module):
    """The parameters that the three cells have in common, named as in nn.LSTM."""

    n_gates, n_states = 1, 1

    def __init__(self, n_in, n_hidden):
        super().__init__()
        self.weight_ih_l0 = mx.zeros((self.n_gates * n_hidden, n_in))
        self.weight_hh_l0 = mx.zeros((self.n_gates * n_hidden, n_hidden))
        self.bias_ih_l0 = mx.zeros(self.n_gates * n_hidden)
        self.bias_hh_l0 = mx.zeros(self.n_gates * n_hidden)

    def from_input(self, x):
        """a = W_ih x + b_ih: x (..., n_in) -> (..., gates H)"""
        return mx.addmm(self.bias_ih_l0, x, self.weight_ih_l0.T)

    def from_state(self, h):
        """b_hh + W_hh h: h (B, H) -> (B, gates H)"""
        return mx.addmm(self.bias_hh_l0, h, self.weight_hh_l0.T)


class RNNCell(Cell):
    def __call__(self, a, state):
        (h,) = state
        return (mx.tanh(a + self.from_state(h)),)


class LSTMCell(Cell):
    n_gates, n_states = 4, 2

    def __call__(self, a, state):
        h, c = state
        i, f, g, o = mx.split(a + self.from_state(h), 4, -1)
        c = mx.sigmoid(f) * c + mx.sigmoid(i) * mx.tanh(g)
        h = mx.sigmoid(o) * mx.tanh(c)
        return h, c


class GRUCell(Cell):
    n_gates, n_states = 3, 1

    def __call__(self, a, state):
        (h,) = state
        (a_r, a_z, a_n), (b_r, b_z, b_n) = mx.split(a, 3, -1), mx.split(self.from_state(h), 3, -1)
        r, z = mx.sigmoid(a_r + b_r), mx.sigmoid(a_z + b_z)
        n = mx.tanh(a_n + r * b_n)
        return ((1 - z) * n + z * h,)


CELLS = {"rnn": RNNCell, "lstm": LSTMCell, "gru": GRUCell}


class ByHand(nn.Module):
    """A cell over time."""

    def __init__(self, cell, n_in, n_hidden):
        super().__init__()
        self.rnn = CELLS[cell](n_in, n_hidden)

    def __call__(self, x, state):
        """x (B, T, n_in), state (S, B, H): h, or h and c -> every h (B, T, H), and the last state."""
        a, state, every_h = self.rnn.from_input(x.swapaxes(0, 1)), tuple(state), []
        for a_t in a:  # (B, gates H)
            state = self.rnn(a_t, state)
            every_h.append(state[0])
        return mx.stack(every_h, 1), mx.stack(state)


class Builtin(nn.Module):
    """The framework's own layer. MLX's has one bias, or b and b_n, instead of two: there the two are added."""

    def __init__(self, cell, n_in, n_hidden):
        super().__init__()
        self.rnn = CELLS[cell](n_in, n_hidden)  # for its parameters; _own is not one, as its name starts with _
        self._own = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[cell](n_in, n_hidden)

    def __call__(self, x, state):
        """As in ByHand."""
        own, rnn, H = self._own, self.rnn, state.shape[-1]
        if isinstance(own, nn.LSTM):
            own.Wx, own.Wh, own.bias = rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0 + rnn.bias_hh_l0
            every_h, every_c = own(x, state[0], state[1])
            return every_h, mx.stack([every_h[:, -1], every_c[:, -1]])
        if isinstance(own, nn.GRU):
            own.Wx, own.Wh, own.bhn = rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_hh_l0[2 * H :]
            own.b = rnn.bias_ih_l0 + mx.concatenate([rnn.bias_hh_l0[: 2 * H], mx.zeros(H)])
        else:
            own.Wxh, own.Whh, own.bias = rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0 + rnn.bias_hh_l0
        every_h = own(x, state[0])
        return every_h, every_h[None, :, -1]


class RecurrentNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        n_in = config.n_in + (config.n_embd if config.vocab_size else 0)
        if config.vocab_size:
            self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        sizes = [n_in] + [config.n_hidden] * config.n_layer
        layer = ByHand if config.impl == "by-hand" else Builtin
        self.layers = [layer(config.cell, n, config.n_hidden) for n in sizes[:-1]]
        self.head = nn.Linear(config.n_hidden, config.n_out)

    def zero_state(self, B):
        """(n_layer, S, B, H); S is 2 for the LSTM, else 1."""
        shape = self.config.n_layer, CELLS[self.config.cell].n_states, B, self.config.n_hidden
        return mx.zeros(shape)

    def __call__(self, x, state=None, beside=None):
        """x (B, T) tokens or (B, T, n_in), beside (B, T, n_in) numbers beside tokens -> answers, and the last state.

        Answers are (B, T, n_out), or (B, n_out) where only the last is read.
        """
        state, last = self.zero_state(len(x)) if state is None else state, []
        if self.config.vocab_size:
            x = self.embed(x)
            x = x if beside is None else mx.concatenate([x, beside], -1)
        for layer, begin in zip(self.layers, state):
            x, end = layer(x, begin)
            last.append(end)
        return self.head(x if self.config.read == "each" else x[:, -1]), mx.stack(last)


def loss_fn(out, y, loss):
    """The mean -log softmax(out)[y], in nats, over y (B,) or (B, T); or the mean squared error, y of out's shape."""
    if loss == "cross_entropy":
        return nn.losses.cross_entropy(out, y, reduction="mean")
    return nn.losses.mse_loss(out, y, reduction="mean")


def state_gradients(model, x):
    """|dh_T/ds_t| for t = 1 ... T, x (T, n_in), s the state (h, or h and c) of the first layer, a by-hand one: (T,).

    The Frobenius norm over sqrt(H), so that dh_T/dh_T has norm 1. H copies of the sequence run in parallel, and copy k
    gives the gradient of h_T[k]: a zero is added to each state, and we want the gradient with respect to that zero.
    """
    cell, H = model.layers[0].rnn, model.config.n_hidden
    a, eye = cell.from_input(x), mx.eye(H)

    def last_h(zeros):
        state = tuple(model.zero_state(H)[0])
        for a_t, zero in zip(a, zeros):
            state = tuple(s + z for s, z in zip(cell(a_t, state), zero))
        return (state[0] * eye).sum()

    grads = mx.grad(last_h)(mx.zeros((len(a), cell.n_states, H, H)))
    return ((grads**2).sum((1, 2, 3)) / H) ** 0.5


# ---- generation ------------------------------------------------------------------------------------------------------


def pick(logits, u, temperature):
    """One token per row: logits (B, V), u (B,) from [0, 1) -> (B,), where u falls in the cumulative distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = mx.softmax(logits / temperature, -1).cumsum(-1)
    return (cdf < u[:, None] * cdf[:, -1:]).sum(-1)


def generate(model, idx, u, temperature=1.0, beside=None):
    """Continue the prompt idx (B, T): yields the tokens (B,) for each row of u (n, B), uniform from [0, 1).

    beside (B, T + n - 1, n_in): the numbers that go with the prompt, and with each new token but the last.
    """
    state, at, new = None, 0, idx
    for u_i in u:
        now = None if beside is None else beside[:, at : at + new.shape[1]]
        at += new.shape[1]
        logits, state = model(new, state, now)
        new = pick(logits[:, -1], u_i, temperature)[:, None]
        yield new[:, 0]


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
    """Embeddings N(0, 1), other matrices uniform of variance 1 / (3 n_in); each gate's W_hh orthogonal (Saxe et al.
    2014) or of the given spectral radius; biases 0, but 1 for the gate that keeps the state: forget or update."""
    rng, weights, config = np.random.default_rng(seed), get_weights(model), model.config
    for name, w in sorted(weights.items()):
        if w.ndim == 1:
            w[:] = 0
            if "bias_ih" in name and config.cell != "rnn":  # the second gate: forget or update
                w[config.n_hidden : 2 * config.n_hidden] = 1
        elif "weight_hh" in name:
            for gate in np.split(w, len(w) // config.n_hidden):  # views of w
                gate[:] = rng.normal(size=gate.shape)
                if config.radius:
                    gate *= config.radius / np.abs(np.linalg.eigvals(gate)).max()
                else:
                    gate[:] = np.linalg.qr(gate)[0]
        elif name == "embed.weight":
            w[:] = rng.normal(size=w.shape)
        else:
            w[:] = rng.uniform(-1, 1, w.shape) / w.shape[1] ** 0.5
    set_weights(model, weights)


def devices():
    """The devices that can be used here, the best first."""
    return ["gpu", "cpu"] if mx.is_available(mx.gpu) else ["cpu"]


class Trainer:
    """A network and its optimizer. Takes and returns numpy; figures stay on the device until float() reads them."""

    def __init__(self, config, seed=0, device=None):
        self.config, self.device, self.t, self.state = config, device or devices()[0], 0, None
        mx.set_default_device(getattr(mx, self.device))
        self.model = RecurrentNet(config)
        init_weights(self.model, seed)
        self.m = {name: mx.zeros_like(p) for name, p in tree_flatten(self.model.parameters())}
        self.v = {name: mx.zeros_like(p) for name, p in tree_flatten(self.model.parameters())}
        if self.device == "gpu":  # compile the whole step; plain numbers would become constants
            state = [self.model.state, self.m, self.v]
            update = mx.compile(self.update, inputs=state, outputs=state)
            self.update = lambda x, y, beside, state, *numbers: update(x, y, beside, state, *map(mx.array, numbers))

    def arrays(self, x, y, *more):
        """Numpy to the framework; None stays. Tokens and classes are checked: MLX would silently read past the end."""
        for ids, n in ((x, self.config.vocab_size), (y, self.config.n_out)):
            if ids.dtype == np.int64 and not 0 <= ids.min() <= ids.max() < n:
                raise ValueError(f"a token or a label is outside 0 ... {n - 1}")
        return [a if a is None else mx.array(a) for a in (x, y, *more)]

    def step(self, x, y, keep=None, beside=None, *, lr):
        """One update; returns {"loss", "grad_norm"}, before the update and before clipping.

        x and beside as the network takes them, y (B, T) or (B,) int64 classes or (B, n_out) numbers. keep (B,) is 1
        where a row continues that of the previous step and its state, 0 where it begins anew; without keep, all do.
        """
        x, y, keep, beside = self.arrays(x, y, keep, beside)
        self.t += 1
        loss, last, norm = self.update(x, y, beside, self.carried(len(x), keep), lr, self.t)
        self.state = None if keep is None else last  # here backpropagation through time is truncated
        mx.eval(loss, last, norm, self.model.parameters(), self.m, self.v)  # MLX is lazy: the step is computed here
        return {"loss": loss, "grad_norm": norm}

    def update(self, x, y, beside, state, lr, t):
        """Update weights and moments, at step t; returns the loss before the update, the last state and the norm."""

        def total():
            out, last = self.model(x, state, beside)
            return loss_fn(out, y, self.config.loss), last

        (loss, last), grads = nn.value_and_grad(self.model, total)()
        grads, norm = optim.clip_grad_norm(grads, self.config.clip)
        grads, params = dict(tree_flatten(grads)), dict(tree_flatten(self.model.parameters()))
        for name, p in params.items():
            decay = self.config.weight_decay if p.ndim == 2 else 0.0
            if self.config.optimizer == "sgd":
                params[name] = p - lr * grads[name]
            elif self.config.optimizer == "muon" and p.ndim == 2 and name.startswith("layers."):  # the cells' matrices
                params[name], self.m[name] = muon(p, grads[name], self.m[name], lr, decay)
            else:
                g, m, v = grads[name], self.m[name], self.v[name]
                params[name], self.m[name], self.v[name] = adamw(p, g, m, v, lr, t, decay)
        self.model.update(tree_unflatten(list(params.items())))
        return loss, last, norm

    def carried(self, B, keep):
        """The state after the last step where keep (B,) is 1, else 0; a batch of another size starts from 0."""
        if keep is None or self.state is None or self.state.shape[2] != B:
            return self.model.zero_state(B)
        return self.state * keep[:, None]

    def evaluate(self, x, y, beside=None):
        """{"val_loss"} and, for one class per row, {"accuracy"}. A long text is read in parts, carrying the state."""
        x, y, beside = self.arrays(x, y, beside)
        if self.config.read == "last":
            out = self.model(x)[0]
            figures = {"val_loss": loss_fn(out, y, self.config.loss)}
            if self.config.loss == "cross_entropy":
                figures["accuracy"] = (out.argmax(-1) == y).mean()
            return figures
        total, state = 0.0, None
        for at in range(0, x.shape[1], 128):
            x_t, y_t, beside_t = (a if a is None else a[:, at : at + 128] for a in (x, y, beside))
            out, state = self.model(x_t, state, beside_t)
            total = total + loss_fn(out, y_t, self.config.loss) * (y_t.shape[1] / y.shape[1])
        return {"val_loss": total}

    def predict(self, x, beside=None):
        """The answers to x, numpy: (B, n_out), or (B, T, n_out) where each time has one."""
        arrays = [mx.array(a) for a in (x, beside) if a is not None]
        return np.array(self.model(arrays[0], None, *arrays[1:])[0])

    def generate(self, prompt, n, temperature=1.0, seed=0, beside=None):
        """Yield the next token of each row, numpy (B,), n times, after prompt (B, T) int64; temperature 0 is greedy."""
        u = np.random.default_rng((seed, 2)).random((n, len(prompt)), np.float32)
        idx, u, beside = self.arrays(prompt, u, beside)
        for token in generate(self.model, idx, u, temperature, beside):
            yield np.array(token)

    def state_gradients(self, x):
        """|dh_T/ds_t| for x (T, n_in), numpy (T,)."""
        return np.array(state_gradients(self.model, mx.array(x)))

    def save(self, path, step, **extra):
        """Save weights, moments, state, step, config and what train.py adds to one .npz: all or nothing."""
        arrays = get_weights(self.model)
        arrays |= {f"m.{name}": np.array(m) for name, m in self.m.items()}
        arrays |= {f"v.{name}": np.array(v) for name, v in self.v.items()}
        if self.state is not None:
            arrays["state"] = np.array(self.state)
        meta = {"model": "rnn", "config": asdict(self.config), "step": step, **extra}
        with open(f"{path}.part", "wb") as f:
            np.savez(f, meta=json.dumps(meta), **arrays)
        os.replace(f"{path}.part", path)

    def load(self, path):
        """Load what save wrote, in either framework; returns the step to continue from."""
        with np.load(path, allow_pickle=False) as f:
            arrays, meta = dict(f), json.loads(str(f["meta"]))
        set_weights(self.model, arrays)
        self.t = meta["step"]
        for key, moments in (("m", self.m), ("v", self.v)):
            for name in moments:
                if arrays[f"{key}.{name}"].shape != arrays[name].shape:
                    raise ValueError(f"{key}.{name} does not have the shape of {name}")
                moments[name] = mx.array(arrays[f"{key}.{name}"])
        self.state = mx.array(arrays["state"]) if "state" in arrays else None
        return self.t
