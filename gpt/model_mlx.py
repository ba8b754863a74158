"""GPT-2 in MLX: a Transformer decoder that predicts the next token.

    idx (B, T) -> token + position -> n_layer times [x + attention(norm(x)), x + mlp(norm(x))] -> norm -> logits

The probability of a text is the product over its tokens, each given those before it; the loss, in nats per token, is
    -1/T log p(x_1 ... x_T)  =  -1/T sum_t log p(x_t | x_1 ... x_{t-1})
Attention: every position t attends to the positions s <= t, with n_head heads of head_size = C / n_head:
    y_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(head_size)) v_s            q, k and v are three linear maps of x

Radford et al. 2019, "Language models are unsupervised multitask learners". Names as in the released weights.
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
from mlx.utils import tree_flatten, tree_map, tree_unflatten


@dataclass
class Config:
    block_size: int = 1024  # the context: the most positions that the model can see
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # of the embeddings and of each branch's output
    bias: bool = True  # in Linear and LayerNorm; GPT-2 has them
    optimizer: str = "muon"  # muon or adamw
    weight_decay: float = 0.1


class KVCache:
    """Keys and values of the positions read so far: one array per layer, allocated once and written in place."""

    def __init__(self, model, batch_size):
        config, like = model.config, model.wte.weight
        shape = (2, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.kv = [mx.zeros(shape, like.dtype) for _ in range(config.n_layer)]
        self.length = 0

    def append(self, layer, kv):
        """Write kv (2, B, n_head, T, head_size) after the others; returns all of them (2, B, n_head, S, head_size)."""
        end = self.length + kv.shape[3]
        self.kv[layer][:, :, :, self.length : end] = kv
        return self.kv[layer][:, :, :, :end]

    def reorder(self, rows):
        """Continue with these rows (B,) of the batch: the beginnings that a beam search keeps."""
        self.kv = [kv[:, rows] for kv in self.kv]


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def __call__(self, x, layer, cache):
        B, T, C = x.shape
        heads = (part.reshape(B, T, self.n_head, -1).swapaxes(1, 2) for part in mx.split(self.c_attn(x), 3, -1))
        q, k, v = heads  # (B, n_head, T, head_size) each
        if cache is not None:
            k, v = cache.append(layer, mx.stack([k, v]))  # (B, n_head, S, head_size)
        # query t comes after S - T older keys, and sees the keys 0 ... S - T + t. MLX's "causal" is just that; torch's
        # is_causal lines queries and keys up at their starts, and needs a mask where there are older keys
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")
        return self.c_proj(y.swapaxes(1, 2).reshape(B, T, C))


def gelu(x):
    """GPT-2's form of x Phi(x), with a tanh: x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x * mx.sigmoid(1.5957691 * (x + 0.044715 * x * x * x))  # nn.gelu_approx has a power, slow on a CPU


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def __call__(self, x):
        return self.c_proj(gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def __call__(self, x, layer, cache):
        x = x + self.drop(self.attn(self.ln_1(x), layer, cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = [Block(config) for _ in range(config.n_layer)]
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)

    def __call__(self, idx, cache=None):
        """idx (B, T) -> logits (B, T, V). With a cache, which idx continues, only the last logits: (B, 1, V)."""
        start = cache.length if cache is not None else 0
        x = self.drop(self.wte(idx) + self.wpe.weight[start : start + idx.shape[1]])  # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, layer, cache)
        if cache is not None:
            cache.length += idx.shape[1]
            x = x[:, -1:]
        return self.ln_f(x) @ self.wte.weight.T  # the head is tied to the embedding


def log_prob(logits, targets):
    """log p of the targets (B, T) under the logits (B, T, V), in nats."""
    return -nn.losses.cross_entropy(logits, targets, reduction="none")


def loss_fn(logits, targets, weights=None):
    """The mean -log p of the targets (B, T), in nats per token; or the sum of -log p times weights (B, T)."""
    nll = -log_prob(logits, targets)
    return nll.mean() if weights is None else (nll * weights).sum()


class BuiltinGPT(nn.Module):
    """The same model from the framework's own layers, with the weights of a GPT: it gives the same logits.

    A GPT is called a decoder, yet its layers are those of nn.TransformerEncoder: a layer of nn.TransformerDecoder also
    attends to the output of an encoder, and there is no encoder here. Only the mask makes it a decoder: no position
    sees those after it.
    """

    def __init__(self, model):
        super().__init__()
        self.wte, self.wpe, c = model.wte, model.wpe, model.config
        order = dict(norm_first=True)
        self.encoder = nn.TransformerEncoder(c.n_layer, c.n_embd, c.n_head, 4 * c.n_embd, c.dropout, gelu, **order)
        for layer in self.encoder.layers:  # whose attention has no biases
            layer.attention = nn.MultiHeadAttention(c.n_embd, c.n_head, bias=True)
        names = {"h.": "layers.", "attn.c_proj": "attention.out_proj",
                 "mlp.c_fc": "linear1", "mlp.c_proj": "linear2", "ln_f": "ln", "ln_": "ln"}  # fmt: skip
        theirs = {}
        for name, w in tree_flatten(model.parameters()):
            for ours, other in names.items():
                name = name.replace(ours, other)
            for kind, part in zip(("query", "key", "value"), mx.split(w, 3) if "c_attn" in name else [w]):
                theirs[name.replace("attn.c_attn", f"attention.{kind}_proj")] = part
        own = dict(tree_flatten(self.encoder.parameters()))  # biases that ours may lack are 0
        self.encoder.update(tree_unflatten([(name, theirs.get(name, mx.zeros_like(p))) for name, p in own.items()]))

    def __call__(self, idx):
        """idx (B, T) -> logits (B, T, V)"""
        x = self.wte(idx) + self.wpe.weight[: idx.shape[1]]
        mask = nn.MultiHeadAttention.create_additive_causal_mask(idx.shape[1])  # 0, or nearly -inf for what is ahead
        return self.encoder(x, mask) @ self.wte.weight.T


# ---- generation ------------------------------------------------------------------------------------------------------


def sample(logits, u, temperature, top_k, top_p):
    """One token per row: logits (B, V), u (B,) from [0, 1) -> (B,), where u falls in the cumulative distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    token = mx.argsort(-logits, axis=-1)
    p = mx.softmax(mx.take_along_axis(logits, token, -1) / temperature, -1)
    keep = mx.arange(p.shape[-1]) < top_k  # the top_k most likely, and of these the
    keep = keep & (p.cumsum(-1) - p < top_p)  # nucleus: the fewest with total probability top_p (Holtzman et al. 2020)
    cdf = (p * keep).cumsum(-1)
    rank = (cdf < u[:, None] * cdf[:, -1:]).sum(-1, keepdims=True)
    return mx.take_along_axis(token, rank, -1)[:, 0]


def generate(model, idx, u, temperature=1.0, top_k=None, top_p=1.0):
    """Continue the prompt idx (B, T): yields the tokens (B,) for each row of u (n, B), uniform from [0, 1).

    The prompt is read in one pass, then one token at a time with the cache. Positions are learned, so a full cache
    can't slide: the second half of the context is then read again, as positions 0, 1, ...
    """
    block_size, top_k = model.config.block_size, top_k or model.config.vocab_size
    cache = KVCache(model, idx.shape[0])
    new = idx = idx[:, -block_size:]
    for u_i in u:
        if cache.length + new.shape[1] > block_size:
            cache.length = 0
            new = idx[:, -block_size // 2 :]
        new = sample(model(new, cache)[:, -1], u_i, temperature, top_k, top_p)[:, None]
        idx = mx.concatenate([idx, new], axis=1)[:, -block_size:]
        yield new[:, 0]


def beam_search(model, idx, n, beam):
    """Roughly the most likely n tokens (n,) after the prompt idx (1, T): at each length the `beam` best are kept."""
    cache, V = KVCache(model, beam), model.config.vocab_size
    new, tokens = mx.repeat(idx, beam, axis=0), mx.zeros((beam, 0), idx.dtype)
    logp = mx.array([0.0] + [-math.inf] * (beam - 1))[:, None]  # at first one candidate
    for _ in range(n):
        total = (logp + nn.log_softmax(model(new, cache)[:, -1], -1)).reshape(-1)  # (beam V,)
        best = mx.argsort(-total)[:beam]
        rows, new, logp = best // V, best[:, None] % V, total[best][:, None]
        tokens = mx.concatenate([tokens[rows], new], axis=1)
        cache.reorder(rows)
    return tokens[0]


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
    """GPT-2's: N(0, 0.02^2), divided by sqrt(2 n_layer) if added to the residual stream; norms 1, biases 0."""
    rng, weights = np.random.default_rng(seed), get_weights(model)
    for name, w in sorted(weights.items()):
        if w.ndim == 2:
            std = 0.02 / math.sqrt(2 * model.config.n_layer) if name.endswith("c_proj.weight") else 0.02
            weights[name] = rng.standard_normal(w.shape, np.float32) * np.float32(std)
        else:
            weights[name] = np.full_like(w, name.endswith("weight"))
    set_weights(model, weights)


def devices():
    """The devices that can be used here, the best first."""
    return ["gpu", "cpu"] if mx.is_available(mx.gpu) else ["cpu"]


def join():
    """(rank, size): which of how many processes this is; (0, 1) unless mlx.launch started it."""
    group = mx.distributed.init()
    return group.rank(), group.size()


def agree(flag):
    """Whether the flag is set in any process. All processes must call this, and each waits for the others."""
    return mx.distributed.all_sum(mx.array(float(flag))).item() > 0


class Trainer:
    """A GPT and its optimizer. Takes and returns numpy; figures stay on the device until float() reads them.

    accumulate: how many parts a batch is computed in, one after the other, if it is too large for the memory;
    dtype: what the forward and backward pass are computed in, "float32" or "bfloat16"; the weights stay float32.
    """

    def __init__(self, config, seed=0, device=None, accumulate=1, dtype="float32", compile=False):
        self.config, self.seed, self.device, self.t = config, seed, device or devices()[0], 0
        self.reference = None  # what keep_reference makes
        self.accumulate, self.dtype, (self.rank, self.size) = accumulate, getattr(mx, dtype), join()
        mx.set_default_device(getattr(mx, self.device))
        self.model = GPT(config)
        init_weights(self.model, seed)
        self.m = {name: mx.zeros_like(p) for name, p in tree_flatten(self.model.parameters())}
        self.v = {name: mx.zeros_like(p) for name, p in tree_flatten(self.model.parameters())}

        def loss(params, x, y, weights):
            self.model.update(tree_unflatten([(name, p.astype(self.dtype)) for name, p in params.items()]))
            return loss_fn(self.model(x).astype(mx.float32), y, weights)

        self.loss_and_grads = mx.value_and_grad(loss)
        if compile or self.device == "gpu":  # few kernels instead of many; the random state is for dropout
            self.loss_and_grads = mx.compile(self.loss_and_grads, inputs=mx.random.state, outputs=mx.random.state)

    def arrays(self, *arrays):
        """Numpy to the framework. Tokens are checked first: MLX would silently read past the end of an array."""
        if any(a.dtype.kind == "i" and (a.min() < 0 or a.max() >= self.config.vocab_size) for a in arrays):
            raise ValueError(f"a token is outside 0 ... {self.config.vocab_size - 1}")
        return [mx.array(a) for a in arrays]

    def step(self, x, y, weights=None, *, lr):
        """One update on x (B, T) int64 and y, the tokens that follow; returns {"loss"}, before the update.

        The loss is the mean of -log p(y), in nats per token, or its sum times weights (B, T) float32.
        """
        weights = np.full(y.shape, 1 / y.size, np.float32) if weights is None else weights
        self.t += 1
        mx.random.seed(self.seed + 1_000_003 * self.t + self.rank)  # for dropout, the framework's only randomness
        self.model.train()
        params = dict(tree_flatten(self.model.parameters()))
        loss, grads = 0.0, None
        parts = np.array_split(np.arange(self.rank, len(x), self.size), self.accumulate)  # of this process's rows
        for part in parts:
            xs, ys, ws = self.arrays(x[part], y[part], weights[part] * self.size)  # the processes' mean will be taken
            part_loss, part_grads = self.loss_and_grads(params, xs, ys, ws)
            loss, grads = loss + part_loss, tree_map(mx.add, grads, part_grads) if grads else part_grads
            mx.eval(loss, grads)  # MLX is lazy: the part is computed here, which frees its memory
        loss = mx.distributed.all_sum(loss / self.size)
        grads, _ = optim.clip_grad_norm(dict(tree_flatten(nn.average_gradients(grads))), 1.0)
        for name, p in params.items():
            decay = self.config.weight_decay if p.ndim == 2 else 0.0
            if self.config.optimizer == "muon" and p.ndim == 2 and name.startswith("h."):  # the matrices of the blocks
                params[name], self.m[name] = muon(p, grads[name], self.m[name], lr, decay)
            else:
                moments = self.m[name], self.v[name]
                params[name], self.m[name], self.v[name] = adamw(p, grads[name], *moments, lr, self.t, decay)
        self.model.update(tree_unflatten(list(params.items())))
        mx.eval(loss, params, self.m, self.v)
        return {"loss": loss}

    def evaluate(self, x, y, *weights):
        """{"val_loss"}: the loss of step on held-out data."""
        x, y, *weights = self.arrays(x, y, *weights)
        self.model.eval()
        return {"val_loss": loss_fn(self.model(x), y, *weights)}

    def keep_reference(self):
        """Keep a copy of the current model: what log_prob and generate call the reference."""
        self.reference = GPT(self.config)
        set_weights(self.reference, get_weights(self.model))

    def log_prob(self, x, y, reference=False):
        """log p of each token of y (B, T) after those of x (B, T) so far, numpy (B, T)."""
        x, y = self.arrays(x, y)
        model = self.reference if reference else self.model
        model.eval()
        return np.array(log_prob(model(x), y))

    def generate(self, prompt, n, temperature=1.0, top_k=None, top_p=1.0, seed=0, reference=False):
        """Yield the next token of each row, numpy (B,), n times, after prompt (B, T) int64; temperature 0 is greedy."""
        (idx,) = self.arrays(prompt)
        u = mx.array(np.random.default_rng((seed, 2)).random((n, len(prompt)), np.float32))
        model = self.reference if reference else self.model
        model.eval()
        for token in generate(model, idx, u, temperature, top_k, top_p):
            yield np.array(token)

    def search(self, prompt, n, beam):
        """The most likely n tokens after prompt (1, T) int64 by beam search, numpy (n,); T + n <= block_size."""
        self.model.eval()
        return np.array(beam_search(self.model, *self.arrays(prompt), n, beam))

    def save(self, path, step, **extra):
        """Save weights, moments, step, config and what train.py adds to one .npz: all or nothing."""
        if self.rank > 0:
            return
        arrays = get_weights(self.model)
        arrays |= {f"m.{name}": np.array(m) for name, m in self.m.items()}
        arrays |= {f"v.{name}": np.array(v) for name, v in self.v.items()}
        if self.reference is not None:
            arrays |= {f"ref.{name}": w for name, w in get_weights(self.reference).items()}
        meta = {"model": "gpt", "config": asdict(self.config), "step": step, **extra}
        with open(f"{path}.part", "wb") as f:
            np.savez(f, meta=json.dumps(meta), **arrays)
        os.replace(f"{path}.part", path)

    def load(self, path):
        """Load what save wrote, in either framework; returns the step to continue from."""
        with np.load(path, allow_pickle=False) as f:
            arrays, meta = dict(f), json.loads(str(f["meta"]))
        set_weights(self.model, arrays)
        if "ref.wte.weight" in arrays:
            self.keep_reference()
            set_weights(self.reference, {name[4:]: w for name, w in arrays.items() if name.startswith("ref.")})
        self.t = meta["step"]
        for key, moments in (("m", self.m), ("v", self.v)):
            for name in moments:
                if arrays[f"{key}.{name}"].shape != arrays[name].shape:
                    raise ValueError(f"{key}.{name} does not have the shape of {name}")
                moments[name] = mx.array(arrays[f"{key}.{name}"])
        return self.t
