"""Llama 2 and 3 in PyTorch: GPT-2's decoder with better parts; released weights, LoRA, 8 and 4 bits, endless text.

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

import atexit
import json
import math
import os
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

torch.backends.cudnn.allow_tf32 = False  # full float32, for convolutions on CUDA too


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
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])


def rotate(x, turn):
    """Turn each pair of x (..., T, head_size): (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 being its two halves."""
    return x * turn[0] + x.roll(x.shape[-1] // 2, -1) * turn[1]


class KVCache:
    """Keys and values of the positions read so far: arrays allocated once and written in place.

    Once full, it rolls: the first config.sinks stay, and each new one replaces the oldest of the others. The sinks are
    rotated each time, so that they stay right before the others, however far these have gone (StreamingLLM).
    """

    def __init__(self, model, batch_size, n):
        config, like = model.config, model._frequencies
        self.sinks, self.size, self.length = config.sinks, min(n, config.reach), 0
        shape = (batch_size, config.n_kv_head, self.size, config.head_size)
        self.k = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.v = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.one = rope(like.new_ones(1), like)  # a turn by one position

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
        self.weight, self.rank = nn.Parameter(torch.zeros(n_out, n_in)), rank
        if rank:
            self.lora_a, self.lora_b = nn.Parameter(torch.zeros(rank, n_in)), nn.Parameter(torch.zeros(n_out, rank))

    def forward(self, x):
        cores = torch.get_num_threads()
        if x.is_cpu and x.numel() == x.shape[-1] and not torch.is_grad_enabled() and self.weight.shape[0] % cores == 0:
            # one token is a matrix times a vector, which MKL leaves to one core: here each core takes some of the rows
            parts = self.weight.unflatten(0, (cores, -1))  # (cores, n_out / cores, n_in)
            y = torch.bmm(x.reshape(1, 1, -1).expand(cores, -1, -1), parts.mT).reshape(*x.shape[:-1], -1)
        else:
            y = x @ self.weight.T
        return y + 2 * (x @ self.lora_a.T @ self.lora_b.T) if self.rank else y

    def rows(self, idx):
        return F.embedding(idx, self.weight)


class Quantized(nn.Module):
    """A matrix in 8 or 4 bits per weight: w = q scale with a scale per row, or w = q scale + edge in groups of 32.

    torch has products for the CPU that take q as it is and x in bfloat16; MLX has groups in 8 bits too, and takes x in
    float32.
    """

    def __init__(self, weight, bits):
        super().__init__()
        self.bits = bits
        if bits == 8:
            scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
            q, scale = (weight / scale).round().char(), scale[:, 0]
        else:
            groups = weight.unflatten(1, (-1, 32))  # (n_out, n_in / 32, 32)
            low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
            edge = torch.where(-low > high, low, high)  # the end farther from 0: q = 0, and 0 itself is one of the 16
            steps = (15 * edge.abs() / (high - low).clamp(min=1e-8)).round()  # from one to the other
            scale = torch.where(edge == 0, 1.0, -edge / steps)
            q = ((groups - edge) / scale).round().clamp(0, 15).int().reshape(weight.shape)
            q = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)  # two per byte
            scale = torch.cat([scale, edge + 8 * scale], 2).swapaxes(0, 1)  # this product has w = (q - 8) scale + zero
        self.register_buffer("q", q)
        self.register_buffer("scale", scale.bfloat16().contiguous())

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1]).bfloat16()
        if self.bits == 8:
            y = torch._weight_int8pack_mm(flat, self.q, self.scale)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.q, 32, self.scale)
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def rows(self, idx):
        return self.q[idx].float() * self.scale[idx][..., None].float()


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        n_out = (config.n_head + 2 * config.n_kv_head) * config.head_size
        self.qkv_proj = Linear(config.n_embd, n_out, config.rank("qkv_proj"))  # q, k, v of all heads at once
        self.o_proj = Linear(config.n_head * config.head_size, config.n_embd, config.rank("o_proj"))

    def forward(self, x, turn, layer, cache):
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
        mask = None  # a single query sees all that is held
        if T > 1 and (T < S or T > self.config.reach):
            t, s = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)
            mask = (s <= t) & ((s > t - (self.config.window or S)) | (s < self.config.sinks))
        causal = T > 1 and mask is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = Linear(config.n_embd, 2 * config.n_hidden, config.rank("gate_up_proj"))
        self.down_proj = Linear(config.n_hidden, config.n_embd, config.rank("down_proj"))

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, turn, layer, cache):
        x = x + self.self_attn(self.input_layernorm(x), turn, layer, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = Linear(config.n_embd, config.vocab_size)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        if not config.tied:
            self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.register_buffer("_frequencies", torch.from_numpy(rope_frequencies(config)), persistent=False)
        for name, p in self.named_parameters():
            p.requires_grad = "lora" in name or not config.lora_rank

    def forward(self, idx, cache=None):
        """idx (B, T) -> logits (B, T, V). With a cache, which idx continues, only the last logits: (B, 1, V)."""
        start = cache.length if cache is not None else 0
        x = self.embed_tokens.rows(idx)  # (B, T, C)
        turn = rope(torch.arange(start, start + idx.shape[1], device=idx.device), self._frequencies).to(x.dtype)
        for layer, block in enumerate(self.layers):
            x = block(x, turn, layer, cache)
        if cache is not None:
            cache.length += idx.shape[1]
            x = x[:, -1:]
        head = self.embed_tokens if self.config.tied else self.lm_head
        return head(self.norm(x))


def loss_fn(logits, targets):
    """The sum of -log p of the targets (B, T) under the logits (B, T, V), in nats; targets below 0 do not count."""
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten().clamp(min=0), reduction="none")
    return (loss * (targets.flatten() >= 0)).sum()


def merge(model):
    """Add each 2 B A to its W: the same model, but from now on without LoRA."""
    for module in model.modules():
        if isinstance(module, Linear) and module.rank:
            module.weight.data += 2 * module.lora_b.data @ module.lora_a.data
            module.rank = 0
            del module.lora_a, module.lora_b
    model.config.lora_rank = 0
    model.requires_grad_(True)


def quantize(model, bits):
    """Replace the matrices by quantized ones; the embedding and the head, which suffer most, never have 4 bits."""
    merge(model)
    for block in model.layers:
        for part, names in (block.self_attn, ("qkv_proj", "o_proj")), (block.mlp, ("gate_up_proj", "down_proj")):
            for name in names:
                setattr(part, name, Quantized(getattr(part, name).weight.data, bits))
    for name in ("embed_tokens", "lm_head")[: 1 if model.config.tied else 2]:
        setattr(model, name, Quantized(getattr(model, name).weight.data, 8))


# ---- generation ------------------------------------------------------------------------------------------------------


def sample(logits, u, temperature, top_k, top_p):
    """One token per row: logits (B, V), u (B,) from [0, 1) -> (B,), where u falls in the cumulative distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    p, token = torch.softmax(logits / temperature, -1).sort(dim=-1, descending=True)
    keep = torch.arange(p.shape[-1], device=p.device) < top_k  # the top_k most likely, and of these the
    keep = keep & (p.cumsum(-1) - p < top_p)  # nucleus: the fewest with total probability top_p (Holtzman et al. 2020)
    cdf = (p * keep).cumsum(-1)
    rank = (cdf < u[:, None] * cdf[:, -1:]).sum(-1, keepdim=True)
    return token.gather(-1, rank)[:, 0]


@torch.inference_mode()
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


def trained(model):
    """The parameters that training changes, {name: array}: all, or with LoRA the adapters."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gather(p):
    """The whole of an array as numpy, a copy; with several processes each holds a part."""
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu().numpy().copy()


def scatter(w, p):
    """The numpy array w on the device, and in the shards, of p."""
    w = torch.from_numpy(w).to(p.device)
    return distribute_tensor(w, p.device_mesh, p.placements) if isinstance(p, DTensor) else w


def get_weights(model):
    """Every parameter as numpy, {name: array}, a copy."""
    return {name: gather(p) for name, p in model.named_parameters()}


def set_weights(model, weights):
    """Replace the model's parameters of these names by {name: numpy array}."""
    for name, p in model.named_parameters():
        if name in weights:
            if weights[name].shape != tuple(p.shape):
                raise ValueError(f"{name} has shape {weights[name].shape}, this model expects {tuple(p.shape)}")
            p.data.copy_(scatter(weights[name], p))


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
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, there in found.items() if there]


def join():
    """(rank, size): which of how many processes this is; (0, 1) unless torchrun started it."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(time.sleep, 0.2)  # runs last: a gloo thread that frees a tensor as Python ends aborts
        atexit.register(dist.destroy_process_group)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def agree(flag):
    """Whether the flag is set in any process. All processes must call this, and each waits for the others."""
    flags = torch.tensor(float(flag))
    dist.all_reduce(flags)
    return flags.item() > 0


class Trainer:
    """A Llama and its optimizer. Takes and returns numpy; figures stay on the device until float() reads them.

    weights: initial ones, {name: numpy array}; accumulate: how many parts a batch is computed in, one after the other;
    dtype: what the forward and backward pass are computed in, "float32" or "bfloat16"; the weights stay float32.
    Several processes, started by torchrun, share a batch. Each holds a part of the weights, and a layer's other
    parts while that layer runs (FSDP). This saves memory; for a small model on the cores of one CPU, it saves no time.
    """

    def __init__(self, config, seed=0, device=None, weights=None, accumulate=1, dtype="float32", compile=False):
        self.config, self.seed, self.device, self.t = config, seed, device or devices()[0], 0
        self.accumulate, self.dtype, (self.rank, self.size) = accumulate, getattr(torch, dtype), join()
        if self.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        self.model = Llama(config).to(self.device)
        init_weights(self.model, seed, weights or {})
        if self.size > 1:
            mesh = init_device_mesh(self.device, (self.size,))
            for part in [*self.model.layers, self.model]:
                fully_shard(part, mesh=mesh, reshard_after_forward=True)  # also the root: zero_grad needs the parts
        self.net = torch.compile(self.model) if compile else self.model  # the same weights
        self.m, self.v = {}, {}  # moments, made at the first step

    def arrays(self, x, *y):
        """Numpy to the framework. Tokens are checked first: MLX would silently read past the end of an array."""
        if x.min() < 0 or any(a.min() < -1 or a.max() >= self.config.vocab_size for a in (x, *y)):
            raise ValueError(f"a token is outside 0 ... {self.config.vocab_size - 1}")
        return [torch.from_numpy(a).to(self.device, non_blocking=self.device == "cuda") for a in (x, *y)]

    def step(self, x, y, lr):
        """One update on x (B, T) int64 and y, x shifted by one, -1 where a token does not count.

        Returns {"loss"} in nats per token, before the update.
        """
        self.t += 1
        self.model.zero_grad()
        n, loss, parts = int((y >= 0).sum()), 0.0, self.accumulate
        x, y = x[self.rank :: self.size], y[self.rank :: self.size]
        for part in zip(np.array_split(x, parts), np.array_split(y, parts)):
            x, y = self.arrays(*part)
            with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                share = loss_fn(self.net(x).float(), y) / n
            (share * self.size).backward()  # adds to the gradients; the mean over processes will be taken
            loss = loss + share.detach()
        params = trained(self.model)
        if not self.m:
            self.m, self.v = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
        grads, m, v = {name: p.grad for name, p in params.items()}, self.m, self.v
        if self.size > 1:  # only this process's parts, as plain arrays: operations on a DTensor cost far more
            params, grads, m, v = ({k: x.detach().to_local() for k, x in a.items()} for a in (params, grads, m, v))
        norm = nn.utils.get_total_norm(grads.values())
        if self.size > 1:
            sums = torch.stack([loss, norm * norm])
            dist.all_reduce(sums)
            loss, norm = sums[0], sums[1].sqrt()
        for name, p in params.items():
            g = grads[name].mul_((1 / (norm + 1e-6)).clamp(max=1))  # clipped to a norm of 1
            decay = self.config.weight_decay if p.ndim == 2 else 0.0
            if self.config.optimizer == "muon" and p.ndim == 2 and name.startswith("layers."):  # the blocks' matrices
                muon(p, g, m[name], lr, decay)
            else:
                adamw(p, g, m[name], v[name], lr, self.t, decay)
        return {"loss": loss}

    @torch.no_grad()
    def evaluate(self, x, y):
        """{"val_loss"} in nats per token on x (B, T) and y, x shifted by one, -1 where it does not count."""
        x, y = self.arrays(x, y)
        return {"val_loss": loss_fn(self.model(x), y) / (y >= 0).sum()}

    def generate(self, prompt, n, temperature=1.0, top_k=None, top_p=1.0, seed=0):
        """Yield the next token of each row, numpy (B,), n times, after prompt (B, T) int64; temperature 0 is greedy."""
        (idx,) = self.arrays(prompt)
        u = torch.from_numpy(np.random.default_rng((seed, 2)).random((n, len(prompt)), np.float32)).to(self.device)
        for token in generate(self.model, idx, u, temperature, top_k, top_p):
            yield token.cpu().numpy()

    def quantize(self, bits):
        """Quantize to 8 or 4 bits, 32 changes nothing; returns the megabytes that the weights take."""
        if bits < 32:
            quantize(self.model, bits)
        return sum(w.nbytes for w in self.model.state_dict().values()) / 1e6

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
