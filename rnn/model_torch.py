"""Recurrent networks in PyTorch: RNN, LSTM and GRU, by hand and built in.

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

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.backends.cudnn.allow_tf32 = False  # full float32, for convolutions on CUDA too


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
        self.weight_ih_l0 = nn.Parameter(torch.zeros(self.n_gates * n_hidden, n_in))
        self.weight_hh_l0 = nn.Parameter(torch.zeros(self.n_gates * n_hidden, n_hidden))
        self.bias_ih_l0 = nn.Parameter(torch.zeros(self.n_gates * n_hidden))
        self.bias_hh_l0 = nn.Parameter(torch.zeros(self.n_gates * n_hidden))

    def from_input(self, x):
        """a = W_ih x + b_ih: x (..., n_in) -> (..., gates H)"""
        return F.linear(x, self.weight_ih_l0, self.bias_ih_l0)

    def from_state(self, h):
        """b_hh + W_hh h: h (B, H) -> (B, gates H)"""
        return F.linear(h, self.weight_hh_l0, self.bias_hh_l0)


class RNNCell(Cell):
    def forward(self, a, state):
        (h,) = state
        return (torch.tanh(a + self.from_state(h)),)


class LSTMCell(Cell):
    n_gates, n_states = 4, 2

    def forward(self, a, state):
        h, c = state
        i, f, g, o = (a + self.from_state(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, c


class GRUCell(Cell):
    n_gates, n_states = 3, 1

    def forward(self, a, state):
        (h,) = state
        (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, -1), self.from_state(h).chunk(3, -1)
        r, z = torch.sigmoid(a_r + b_r), torch.sigmoid(a_z + b_z)
        n = torch.tanh(a_n + r * b_n)
        return ((1 - z) * n + z * h,)


CELLS = {"rnn": RNNCell, "lstm": LSTMCell, "gru": GRUCell}


class ByHand(nn.Module):
    """A cell over time."""

    def __init__(self, cell, n_in, n_hidden):
        super().__init__()
        self.rnn = CELLS[cell](n_in, n_hidden)

    def forward(self, x, state):
        """x (B, T, n_in), state (S, B, H): h, or h and c -> every h (B, T, H), and the last state."""
        a, state, every_h = self.rnn.from_input(x.swapaxes(0, 1)), tuple(state), []
        for a_t in a:  # (B, gates H)
            state = self.rnn(a_t, state)
            every_h.append(state[0])
        return torch.stack(every_h, 1), torch.stack(state)


class Builtin(nn.Module):
    """The framework's own layer. MLX's has one bias, or b and b_n, instead of two: there the two are added."""

    def __init__(self, cell, n_in, n_hidden):
        super().__init__()
        self.rnn = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[cell](n_in, n_hidden, batch_first=True)

    def forward(self, x, state):
        """As in ByHand."""
        if isinstance(self.rnn, nn.LSTM):
            every_h, (h, c) = self.rnn(x, state.split(1))
            return every_h, torch.cat([h, c])
        return self.rnn(x, state)


class RecurrentNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        n_in = config.n_in + (config.n_embd if config.vocab_size else 0)
        if config.vocab_size:
            self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        sizes = [n_in] + [config.n_hidden] * config.n_layer
        layer = ByHand if config.impl == "by-hand" else Builtin
        self.layers = nn.ModuleList([layer(config.cell, n, config.n_hidden) for n in sizes[:-1]])
        self.head = nn.Linear(config.n_hidden, config.n_out)

    def zero_state(self, B):
        """(n_layer, S, B, H); S is 2 for the LSTM, else 1."""
        shape = self.config.n_layer, CELLS[self.config.cell].n_states, B, self.config.n_hidden
        return torch.zeros(shape, device=self.head.weight.device)

    def forward(self, x, state=None, beside=None):
        """x (B, T) tokens or (B, T, n_in), beside (B, T, n_in) numbers beside tokens -> answers, and the last state.

        Answers are (B, T, n_out), or (B, n_out) where only the last is read.
        """
        state, last = self.zero_state(len(x)) if state is None else state, []
        if self.config.vocab_size:
            x = self.embed(x)
            x = x if beside is None else torch.cat([x, beside], -1)
        for layer, begin in zip(self.layers, state):
            x, end = layer(x, begin)
            last.append(end)
        return self.head(x if self.config.read == "each" else x[:, -1]), torch.stack(last)


def loss_fn(out, y, loss):
    """The mean -log softmax(out)[y], in nats, over y (B,) or (B, T); or the mean squared error, y of out's shape."""
    if loss == "cross_entropy":
        return F.cross_entropy(out.reshape(-1, out.shape[-1]), y.reshape(-1))
    return F.mse_loss(out, y)


def state_gradients(model, x):
    """|dh_T/ds_t| for t = 1 ... T, x (T, n_in), s the state (h, or h and c) of the first layer, a by-hand one: (T,).

    The Frobenius norm over sqrt(H), so that dh_T/dh_T has norm 1. H copies of the sequence run in parallel, and copy k
    gives the gradient of h_T[k]: a zero is added to each state, and we want the gradient with respect to that zero.
    """
    cell, H = model.layers[0].rnn, model.config.n_hidden
    a, eye = cell.from_input(x), torch.eye(H, device=x.device)

    def last_h(zeros):
        state = tuple(model.zero_state(H)[0])
        for a_t, zero in zip(a, zeros):
            state = tuple(s + z for s, z in zip(cell(a_t, state), zero))
        return (state[0] * eye).sum()

    zeros = torch.zeros(len(a), cell.n_states, H, H, device=x.device, requires_grad=True)
    (grads,) = torch.autograd.grad(last_h(zeros), zeros)
    return ((grads**2).sum((1, 2, 3)) / H) ** 0.5


# ---- generation ------------------------------------------------------------------------------------------------------


def pick(logits, u, temperature):
    """One token per row: logits (B, V), u (B,) from [0, 1) -> (B,), where u falls in the cumulative distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = torch.softmax(logits / temperature, -1).cumsum(-1)
    return (cdf < u[:, None] * cdf[:, -1:]).sum(-1)


@torch.inference_mode()
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


def get_weights(model):
    """Every parameter as numpy, {name: array}, a copy."""
    return {name: p.detach().cpu().numpy().copy() for name, p in model.named_parameters()}


def set_weights(model, weights):
    """Replace the model's parameters with {name: numpy array}."""
    for name, p in model.named_parameters():
        if weights[name].shape != tuple(p.shape):
            raise ValueError(f"{name} has shape {weights[name].shape}, this model expects {tuple(p.shape)}")
        p.data.copy_(torch.from_numpy(weights[name]))


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
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, there in found.items() if there]


class Trainer:
    """A network and its optimizer. Takes and returns numpy; figures stay on the device until float() reads them."""

    def __init__(self, config, seed=0, device=None):
        self.config, self.device, self.t, self.state = config, device or devices()[0], 0, None
        self.model = RecurrentNet(config).to(self.device)
        init_weights(self.model, seed)
        self.m = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        self.v = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}

    def arrays(self, x, y, *more):
        """Numpy to the framework; None stays. Tokens and classes are checked: MLX would silently read past the end."""
        for ids, n in ((x, self.config.vocab_size), (y, self.config.n_out)):
            if ids.dtype == np.int64 and not 0 <= ids.min() <= ids.max() < n:
                raise ValueError(f"a token or a label is outside 0 ... {n - 1}")
        go_on = self.device == "cuda"  # it copies while the host prepares what comes next
        return [a if a is None else torch.from_numpy(a).to(self.device, non_blocking=go_on) for a in (x, y, *more)]

    def step(self, x, y, keep=None, beside=None, *, lr):
        """One update; returns {"loss", "grad_norm"}, before the update and before clipping.

        x and beside as the network takes them, y (B, T) or (B,) int64 classes or (B, n_out) numbers. keep (B,) is 1
        where a row continues that of the previous step and its state, 0 where it begins anew; without keep, all do.
        """
        x, y, keep, beside = self.arrays(x, y, keep, beside)
        self.t += 1
        loss, last, norm = self.update(x, y, beside, self.carried(len(x), keep), lr, self.t)
        self.state = None if keep is None else last  # here backpropagation through time is truncated
        return {"loss": loss, "grad_norm": norm}

    def update(self, x, y, beside, state, lr, t):
        """Update weights and moments, at step t; returns the loss before the update, the last state and the norm."""
        self.model.zero_grad()
        out, last = self.model(x, state, beside)
        loss = loss_fn(out, y, self.config.loss)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for name, p in self.model.named_parameters():
            decay = self.config.weight_decay if p.ndim == 2 else 0.0
            if self.config.optimizer == "sgd":
                p.data.sub_(lr * p.grad)
            elif self.config.optimizer == "muon" and p.ndim == 2 and name.startswith("layers."):  # the cells' matrices
                muon(p, p.grad, self.m[name], lr, decay)
            else:
                adamw(p, p.grad, self.m[name], self.v[name], lr, t, decay)
        return loss.detach(), last.detach(), norm

    def carried(self, B, keep):
        """The state after the last step where keep (B,) is 1, else 0; a batch of another size starts from 0."""
        if keep is None or self.state is None or self.state.shape[2] != B:
            return self.model.zero_state(B)
        return self.state * keep[:, None]

    @torch.no_grad()
    def evaluate(self, x, y, beside=None):
        """{"val_loss"} and, for one class per row, {"accuracy"}. A long text is read in parts, carrying the state."""
        x, y, beside = self.arrays(x, y, beside)
        if self.config.read == "last":
            out = self.model(x)[0]
            figures = {"val_loss": loss_fn(out, y, self.config.loss)}
            if self.config.loss == "cross_entropy":
                figures["accuracy"] = (out.argmax(-1) == y).float().mean()
            return figures
        total, state = 0.0, None
        for at in range(0, x.shape[1], 128):
            x_t, y_t, beside_t = (a if a is None else a[:, at : at + 128] for a in (x, y, beside))
            out, state = self.model(x_t, state, beside_t)
            total = total + loss_fn(out, y_t, self.config.loss) * (y_t.shape[1] / y.shape[1])
        return {"val_loss": total}

    @torch.no_grad()
    def predict(self, x, beside=None):
        """The answers to x, numpy: (B, n_out), or (B, T, n_out) where each time has one."""
        arrays = [torch.from_numpy(a).to(self.device) for a in (x, beside) if a is not None]
        return self.model(arrays[0], None, *arrays[1:])[0].cpu().numpy()

    def generate(self, prompt, n, temperature=1.0, seed=0, beside=None):
        """Yield the next token of each row, numpy (B,), n times, after prompt (B, T) int64; temperature 0 is greedy."""
        u = np.random.default_rng((seed, 2)).random((n, len(prompt)), np.float32)
        idx, u, beside = self.arrays(prompt, u, beside)
        for token in generate(self.model, idx, u, temperature, beside):
            yield token.cpu().numpy()

    def state_gradients(self, x):
        """|dh_T/ds_t| for x (T, n_in), numpy (T,)."""
        return state_gradients(self.model, torch.from_numpy(x).to(self.device)).cpu().numpy()

    def save(self, path, step, **extra):
        """Save weights, moments, state, step, config and what train.py adds to one .npz: all or nothing."""
        arrays = get_weights(self.model)
        arrays |= {f"m.{name}": m.cpu().numpy() for name, m in self.m.items()}
        arrays |= {f"v.{name}": v.cpu().numpy() for name, v in self.v.items()}
        if self.state is not None:
            arrays["state"] = self.state.cpu().numpy()
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
                moments[name] = torch.from_numpy(arrays[f"{key}.{name}"]).to(self.device)
        self.state = torch.from_numpy(arrays["state"]).to(self.device) if "state" in arrays else None
        return self.t
