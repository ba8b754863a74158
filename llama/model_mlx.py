"""Llama 2 and 3 in MLX: GPT-2's decoder with better parts; released weights, LoRA, 8 and 4 bits, endless text.

    idx (B, T) -> token -> n_layer times [x + attention(norm(x)), x + mlp(norm(x))] -> norm -> logits

What differs from GPT-2:
    RMSNorm   y = w x / sqrt(mean(x^2) + eps)                  the mean is not subtracted, and there are no biases
    RoPE      q and k at position t are rotated, each pair (x_i, x_{i + d/2}) by the angle t f_i, f_i = theta^(-2i/d):
              then q_t . k_s depends on t - s alone, and no positions are learned        d = head_size
    GQA       each of n_kv_head keys and values serves n_head / n_kv_head queries: the cache is that much smaller
    SwiGLU    mlp(x) = W_down (silu(W_gate x) * W_up x)        three matrices where GPT-2 has two
    the head may be a separate matrix, not the embedding

LoRA trains y = W x + 2 B A x, A (rank, n_in), B (n_out, rank), and leaves W as it is; the paper calls the 2 alpha / r.

Touvron et al. 2023, "Llama 2"; Grattafiori et al. 2024, "The Llama 3 herd of models"; Su et al. 2021 (RoPE); Ainslie
et al. 2023 (GQA); Shazeer 2020 (SwiGLU); Hu et al. 2021 (LoRA); Xiao et al. 2023 (attention sinks). Names as in the
released weights, but q, k and v are one matrix, and so are gate and up: one product instead of several.
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
    block_size: int = 8192  # the context: the most positions that a token may look back on
    vocab_size: int = 49152
    n_layer: int = 30
    n_head: int = 9
    n_kv_head: int = 3
    head_dim: int = 0  # the size of a head; 0: n_embd // n_head
    n_embd: int = 576
    n_hidden: int = 1536  # width inside the MLP
    tied: bool = True  # the head is the embedding
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope: str = "default"  # default, linear or llama3: how rotation is slowed for texts longer than in training
    rope_factor: float = 1.0
    rope_low: float = 1.0  # llama3: pairs that turn less often than this in rope_context positions are slowed,
    rope_high: float = 4.0  # those that turn more often than this are not, and those between are slowed in part
    rope_context: int = 8192
    window: int = 0  # a position sees itself and the window - 1 before it; 0: all
    sinks: int = 4  # and the first few, as sinks for attention that is not needed elsewhere
    lora_rank: int = 0  # 0: train all weights
    lora_targets: tuple = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    optimizer: str = "muon"  # muon or adamw
    weight_decay: float = 0.1

    def __post_init__(self):
        self.head_size = self.head_dim or self.n_embd // self.n_head
        self.reach = self.window + self.sinks if self.window else self.block_size  # what a cache has to hold
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even")
        if not self.head_dim and self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of twice n_head, which is {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head {self.n_kv_head} must divide n_head, which is {self.n_head}")
        if self.sinks >= self.reach:
            raise ValueError(f"sinks {self.sinks} must be fewer than the tokens of the context, {self.reach}")

    def rank(self, name):
        """The rank of LoRA in the matrices of this name; 0: none."""
        return self.lora_rank if name in self.lora_targets else 0


def rope_frequencies(config):
    """The angle in radians by which a pair turns from one position to the next, (head_size / 2,) float32."""
    f = config.rope_theta ** (-np.arange(0, config.head_size, 2) / config.head_size)
    if config.rope == "linear":  # as if the positions stood closer together
        f = f / config.rope_factor
    if config.rope == "llama3":  # by turns in the training context: with many, it stays; with few, it slows; else mixed
        turns = config.rope_context * f / (2 * np.pi)
        stay = ((turns - config.rope_low) / (config.rope_high - config.rope_low)).clip(0, 1)
        f = stay * f + (1 - stay) * f / config.rope_factor
    return f.astype(np.float32)


def rope(positions, frequencies):
    """The cosines and sines of rotate for the positions (T,): (2, T, head_size)."""
    angles = positions[:, None] * frequencies
    cos, sin = mx.cos(angles), mx.sin(angles)
    return mx.stack([mx.concatenate([cos, cos], -1), mx.concatenate([-sin, sin], -1)])


def rotate(x, turn):
    """Turn each pair of x (..., T, head_size): (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 being its two halves."""
    return x * turn[0] + mx.roll(x, x.shape[-1] // 2, -1) * turn[1]


class KVCache:
    """Keys and values of the positions read so far: arrays allocated once and written in place.

    Once full, it rolls: the first config.sinks stay, and each new one replaces the oldest of the others. The sinks are
    rotated each time, so that they stay right before the others, however far these have gone (StreamingLLM).
    """

    def __init__(self, model, batch_size, n):
        config, like = model.config, model._frequencies
        self.sinks, self.size, self.length = config.sinks, min(n, config.reach), 0
        shape = (batch_size, config.n_kv_head, self.size, config.head_size)
        self.k = [mx.zeros(shape) for _ in range(config.n_layer)]
        self.v = [mx.zeros(shape) for _ in range(config.n_layer)]
        self.one = rope(mx.ones(1), like)  # a turn by one position

    def append(self, layer, k, v):
        """Write k and v (B, n_kv_head, T, head_size); returns all that is held. Rolling needs T = 1."""
        k_all, v_all, at = self.k[layer], self.v[layer], self.length
        if at >= self.size:
            at = self.sinks + (at - self.sinks) % (self.size - self.sinks)
            k_all[:, :, : self.sinks] = rotate(k_all[:, :, : self.sinks], self.one)
        k_all[:, :, at : at + k.shape[2]] = k
        v_all[:, :, at : at + k.shape[2]] = v
        held = self.length + k.shape[2]
        return k_all[:, :, :held], v_all[:, :, :held]


class Linear(nn.Module):
    """y = W x, and with a rank y = W x + 2 B (A x)."""

    def __init__(self, n_in, n_out, rank=0):
        super().__init__()
        self.weight, self.rank = mx.zeros((n_out, n_in)), rank
        if rank:
            self.lora_a, self.lora_b = mx.zeros((rank, n_in)), mx.zeros((n_out, rank))

    def __call__(self, x):
        y = x @ self.weight.T
        return y + 2 * (x @ self.lora_a.T @ self.lora_b.T) if self.rank else y

    def rows(self, idx):
        return self.weight[idx]


class Quantized(nn.Module):
    """A matrix in 8 or 4 bits per weight: w = q scale with a scale per row, or w = q scale + edge in groups of 32.

    torch has products for the CPU that take q as it is and x in bfloat16; MLX has groups in 8 bits too, and takes x in
    float32.
    """

    def __init__(self, weight, bits):
        super().__init__()
        self.bits = bits
        self.q, self.scale, self.edge = mx.quantize(weight, 32, bits)

    def __call__(self, x):
        return mx.quantized_matmul(x, self.q, self.scale, self.edge, True, 32, self.bits)

    def rows(self, idx):
        return mx.dequantize(self.q[idx], self.scale[idx], self.edge[idx], 32, self.bits)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        n_out = (config.n_head + 2 * config.n_kv_head) * config.head_size
        self.qkv_proj = Linear(config.n_embd, n_out, config.rank("qkv_proj"))  # q, k, v of all heads at once
        self.o_proj = Linear(config.n_head * config.head_size, config.n_embd, config.rank("o_proj"))

    def __call__(self, x, turn, layer, cache):
        B, T, _ = x.shape
        n, n_kv = self.config.n_head, self.config.n_kv_head
        qkv = self.qkv_proj(x).reshape(B, T, n + 2 * n_kv, -1).swapaxes(1, 2)  # (B, n + 2 n_kv, T, head_size)
        qk, v = rotate(qkv[:, : n + n_kv], turn), qkv[:, n + n_kv :]
        q, k = qk[:, :n], qk[:, n:]
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = self.attend(q, k, v)  # (B, n, T, head_size)
        return self.o_proj(y.swapaxes(1, 2).reshape(B, T, -1))

    def attend(self, q, k, v):
        """q (B, n_head, T, head_size): head h attends to head h // (n_head / n_kv_head) of k and v, without copies."""
        # query t comes after S - T older keys, and sees the keys 0 ... S - T + t. MLX's "causal" is just that; torch's
        # is_causal lines queries and keys up at their starts, and needs a mask where there are older keys
        T, S = q.shape[2], k.shape[2]
        mask = "causal" if T > 1 else None  # a single query sees all that is held
        if T > self.config.reach:
            t, s = mx.arange(S - T, S)[:, None], mx.arange(S)
            mask = (s <= t) & ((s > t - (self.config.window or S)) | (s < self.config.sinks))
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=self.config.head_size**-0.5, mask=mask)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = Linear(config.n_embd, 2 * config.n_hidden, config.rank("gate_up_proj"))
        self.down_proj = Linear(config.n_hidden, config.n_embd, config.rank("down_proj"))

    def __call__(self, x):
        gate, up = mx.split(self.gate_up_proj(x), 2, -1)
        return self.down_proj(nn.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x, turn, layer, cache):
        x = x + self.self_attn(self.input_layernorm(x), turn, layer, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = Linear(config.n_embd, config.vocab_size)
        self.layers = [Block(config) for _ in range(config.n_layer)]
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        if not config.tied:
            self.lm_head = Linear(config.n_embd, config.vocab_size)
        self._frequencies = mx.array(rope_frequencies(config))  # the underscore: not a parameter
        if config.lora_rank:
            self.freeze()
            self.unfreeze(keys=["lora_a", "lora_b"])

    def __call__(self, idx, cache=None):
        """idx (B, T) -> logits (B, T, V). With a cache, which idx continues, only the last logits: (B, 1, V)."""
        start = cache.length if cache is not None else 0
        x = self.embed_tokens.rows(idx)  # (B, T, C)
        turn = rope(mx.arange(start, start + idx.shape[1]), self._frequencies).astype(x.dtype)
        for layer, block in enumerate(self.layers):
            x = block(x, turn, layer, cache)
        if cache is not None:
            cache.length += idx.shape[1]
            x = x[:, -1:]
        head = self.embed_tokens if self.config.tied else self.lm_head
        return head(self.norm(x))


def loss_fn(logits, targets):
    """The sum of -log p of the targets (B, T) under the logits (B, T, V), in nats; targets below 0 do not count."""
    loss = nn.losses.cross_entropy(logits, mx.maximum(targets, 0), reduction="none")
    return (loss * (targets >= 0)).sum()


def merge(model):
    """Add each 2 B A to its W: the same model, but from now on without LoRA."""
    for module in model.modules():
        if isinstance(module, Linear) and module.rank:
            module.weight = module.weight + 2 * module.lora_b @ module.lora_a
            module.rank = 0
            del module.lora_a, module.lora_b
    model.config.lora_rank = 0
    model.unfreeze()


def quantize(model, bits):
    """Replace the matrices by quantized ones; the embedding and the head, which suffer most, never have 4 bits."""
    merge(model)
    for block in model.layers:
        for part, names in (block.self_attn, ("qkv_proj", "o_proj")), (block.mlp, ("gate_up_proj", "down_proj")):
            for name in names:
                setattr(part, name, Quantized(getattr(part, name).weight, bits))
    for name in ("embed_tokens", "lm_head")[: 1 if model.config.tied else 2]:
        setattr(model, name, Quantized(getattr(model, name).weight, 8))


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

    The prompt is read in one pass as far as the cache reaches, then token by token; the cache rolls when it is full.
    """
    cache, top_k = KVCache(model, idx.shape[0], idx.shape[1] + len(u)), top_k or model.config.vocab_size
    new, rest = idx[:, : cache.size], idx[:, cache.size :]
    for t in range(rest.shape[1]):
        model(new, cache)
        new = rest[:, t : t + 1]
    for u_i in u:
        new = sample(model(new, cache)[:, -1], u_i, temperature, top_k, top_p)[:, None]
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


def trained(model):
    """The parameters that training changes, {name: array}: all, or with LoRA the adapters."""
    return dict(tree_flatten(model.trainable_parameters()))


def gather(p):
    """The whole of an array as numpy, a copy; with several processes each holds all of it."""
    return np.array(p)


def scatter(w, p):
    """The numpy array w as an array like p."""
    return mx.array(w, p.dtype)


def get_weights(model):
    """Every parameter as numpy, {name: array}, a copy."""
    return {name: gather(p) for name, p in tree_flatten(model.parameters())}


def set_weights(model, weights):
    """Replace the model's parameters of these names by {name: numpy array}."""
    params = dict(tree_flatten(model.parameters()))
    for name, p in params.items():
        if name in weights:
            if weights[name].shape != p.shape:
                raise ValueError(f"{name} has shape {weights[name].shape}, this model expects {p.shape}")
            params[name] = scatter(weights[name], p)
    model.update(tree_unflatten(list(params.items())))


def init_weights(model, seed, given):
    """The `given` weights, else GPT-2's: N(0, 0.02^2), divided by sqrt(2 n_layer) if added to the stream; norms 1.

    LoRA: A N(0, 1 / n_in), B 0, so that training starts from the given model.
    """
    rng, weights = np.random.default_rng(seed), get_weights(model)
    for name, w in sorted(weights.items()):
        if given and "lora" not in name:
            weights[name] = given[name]
        elif w.ndim == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * model.config.n_layer) if residual else 0.02
            std = {"lora_a": w.shape[1] ** -0.5, "lora_b": 0.0}.get(name.split(".")[-1], std)
            weights[name] = rng.standard_normal(w.shape, np.float32) * np.float32(std)
        else:
            weights[name] = np.ones_like(w)
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
    """A Llama and its optimizer. Takes and returns numpy; figures stay on the device until float() reads them.

    weights: initial ones, {name: numpy array}; accumulate: how many parts a batch is computed in, one after the other;
    dtype: what the forward and backward pass are computed in, "float32" or "bfloat16"; the weights stay float32.
    Several processes, started by mlx.launch, share a batch; each holds all of the weights.
    """

    def __init__(self, config, seed=0, device=None, weights=None, accumulate=1, dtype="float32", compile=False):
        self.config, self.seed, self.device, self.t = config, seed, device or devices()[0], 0
        self.accumulate, self.dtype, (self.rank, self.size) = accumulate, getattr(mx, dtype), join()
        mx.set_default_device(getattr(mx, self.device))
        self.model = Llama(config)
        init_weights(self.model, seed, weights or {})
        self.m, self.v = {}, {}  # moments, made at the first step

        def loss(params, others, x, y, n):
            params = {name: p.astype(self.dtype) for name, p in (others | params).items()}
            self.model.update(tree_unflatten(list(params.items())))
            return loss_fn(self.model(x).astype(mx.float32), y) / n

        self.loss_and_grads = mx.value_and_grad(loss)
        if compile or self.device == "gpu":  # few kernels instead of many
            self.loss_and_grads = mx.compile(self.loss_and_grads)

    def arrays(self, x, *y):
        """Numpy to the framework. Tokens are checked first: MLX would silently read past the end of an array."""
        if x.min() < 0 or any(a.min() < -1 or a.max() >= self.config.vocab_size for a in (x, *y)):
            raise ValueError(f"a token is outside 0 ... {self.config.vocab_size - 1}")
        return [mx.array(a) for a in (x, *y)]

    def step(self, x, y, lr):
        """One update on x (B, T) int64 and y, x shifted by one, -1 where a token does not count.

        Returns {"loss"} in nats per token, before the update.
        """
        self.t += 1
        n, loss, grads, parts = mx.array(float((y >= 0).sum())), 0.0, None, self.accumulate
        params = trained(self.model)
        others = {name: p for name, p in tree_flatten(self.model.parameters()) if name not in params}  # LoRA's base
        x, y = x[self.rank :: self.size], y[self.rank :: self.size]
        for part in zip(np.array_split(x, parts), np.array_split(y, parts)):
            share, new = self.loss_and_grads(params, others, *self.arrays(*part), n)
            loss, grads = loss + share, tree_map(mx.add, grads, new) if grads else new
            mx.eval(loss, grads)
        if self.size > 1:
            loss, grads = tree_map(mx.distributed.all_sum, (loss, grads))
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        if not self.m:
            self.m, self.v = ({name: mx.zeros_like(p) for name, p in params.items()} for _ in range(2))
        for name, p in params.items():
            decay = self.config.weight_decay if p.ndim == 2 else 0.0
            if self.config.optimizer == "muon" and p.ndim == 2 and name.startswith("layers."):  # the blocks' matrices
                params[name], self.m[name] = muon(p, grads[name], self.m[name], lr, decay)
            else:
                moments = self.m[name], self.v[name]
                params[name], self.m[name], self.v[name] = adamw(p, grads[name], *moments, lr, self.t, decay)
        self.model.update(tree_unflatten(list((others | params).items())))
        mx.eval(loss, params, self.m, self.v)  # MLX is lazy: the step is computed here
        return {"loss": loss}

    def evaluate(self, x, y):
        """{"val_loss"} in nats per token on x (B, T) and y, x shifted by one, -1 where it does not count."""
        x, y = self.arrays(x, y)
        return {"val_loss": loss_fn(self.model(x), y) / (y >= 0).sum()}

    def generate(self, prompt, n, temperature=1.0, top_k=None, top_p=1.0, seed=0):
        """Yield the next token of each row, numpy (B,), n times, after prompt (B, T) int64; temperature 0 is greedy."""
        (idx,) = self.arrays(prompt)
        u = mx.array(np.random.default_rng((seed, 2)).random((n, len(prompt)), np.float32))
        for token in generate(self.model, idx, u, temperature, top_k, top_p):
            yield np.array(token)

    def quantize(self, bits):
        """Quantize to 8 or 4 bits, 32 changes nothing; returns the megabytes that the weights take."""
        if bits < 32:
            quantize(self.model, bits)
        return sum(w.nbytes for _, w in tree_flatten(self.model.parameters())) / 1e6

    def merge(self):
        """Fold LoRA's adapters into the weights. Their moments are dropped."""
        merge(self.model)
        self.m, self.v, self.t = {}, {}, 0

    def save(self, path, step, **extra):
        """Save trained weights, moments, step, config and what train.py adds to one .npz: all or nothing."""
        arrays = {name: gather(p) for name, p in trained(self.model).items()}
        arrays |= {f"m.{name}": gather(m) for name, m in self.m.items()}
        arrays |= {f"v.{name}": gather(v) for name, v in self.v.items()}
        if self.rank > 0:
            return
        meta = {"model": "llama", "config": asdict(self.config), "step": step, **extra}
        with open(f"{path}.part", "wb") as f:
            np.savez(f, meta=json.dumps(meta), **arrays)
        os.replace(f"{path}.part", path)

    def load(self, path):
        """Load what save wrote, in either framework; returns the step to continue from."""
        with np.load(path, allow_pickle=False) as f:
            arrays, meta = dict(f), json.loads(str(f["meta"]))
        self.t, params = meta["step"], trained(self.model)
        for key in ("", "m.", "v.") if self.t else ("",):
            for name, p in params.items():
                if (there := arrays[key + name].shape if key + name in arrays else "none") != tuple(p.shape):
                    raise ValueError(f"{key}{name} has shape {there}, this model expects {tuple(p.shape)}")
        set_weights(self.model, {name: arrays[name] for name in params})
        for moments, key in (self.m, "m"), (self.v, "v"):
            for name, p in params.items() if self.t else ():
                moments[name] = scatter(arrays[f"{key}.{name}"], p)
        return self.t
