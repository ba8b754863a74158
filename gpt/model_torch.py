"""GPT-2 in PyTorch: a Transformer decoder that predicts the next token.

    idx (B, T) -> token + position -> n_layer times [x + attention(norm(x)), x + mlp(norm(x))] -> norm -> logits

The probability of a text is the product over its tokens, each given those before it; the loss, in nats per token, is
    -1/T log p(x_1 ... x_T)  =  -1/T sum_t log p(x_t | x_1 ... x_{t-1})
Attention: every position t attends to the positions s <= t, with n_head heads of head_size = C / n_head:
    y_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(head_size)) v_s            q, k and v are three linear maps of x

Radford et al. 2019, "Language models are unsupervised multitask learners". Names as in the released weights.
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

torch.backends.cudnn.allow_tf32 = False  # full float32, for convolutions on CUDA too


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
        self.kv = [like.new_zeros(shape) for _ in range(config.n_layer)]
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

    def forward(self, x, layer, cache):
        B, T, C = x.shape
        heads = (part.reshape(B, T, self.n_head, -1).swapaxes(1, 2) for part in self.c_attn(x).chunk(3, -1))
        q, k, v = heads  # (B, n_head, T, head_size) each
        if cache is not None:
            k, v = cache.append(layer, torch.stack([k, v]))  # (B, n_head, S, head_size)
        # query t comes after S - T older keys, and sees the keys 0 ... S - T + t. MLX's "causal" is just that; torch's
        # is_causal lines queries and keys up at their starts, and needs a mask where there are older keys
        S = k.shape[2]
        mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S)
        return self.c_proj(y.swapaxes(1, 2).reshape(B, T, C))


def gelu(x):
    """GPT-2's form of x Phi(x), with a tanh: x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, layer, cache):
        x = x + self.drop(self.attn(self.ln_1(x), layer, cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)

    def forward(self, idx, cache=None):
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
    return -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").reshape(targets.shape)


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
        order = dict(norm_first=True, batch_first=True)
        layer = nn.TransformerEncoderLayer(c.n_embd, c.n_head, 4 * c.n_embd, c.dropout, gelu, **order)
        self.encoder = nn.TransformerEncoder(layer, c.n_layer, nn.LayerNorm(c.n_embd), enable_nested_tensor=False)
        names = {"h.": "layers.", "attn.c_attn.": "self_attn.in_proj_", "attn.c_proj": "self_attn.out_proj",
                 "mlp.c_fc": "linear1", "mlp.c_proj": "linear2", "ln_f": "norm", "ln_": "norm"}  # fmt: skip
        theirs = {}
        for name, w in model.named_parameters():
            for ours, other in names.items():
                name = name.replace(ours, other)
            theirs[name] = w
        for name, p in self.encoder.named_parameters():  # biases that ours may lack are 0
            p.data.copy_(theirs.get(name, torch.zeros_like(p)))

    def forward(self, idx):
        """idx (B, T) -> logits (B, T, V)"""
        x = self.wte(idx) + self.wpe.weight[: idx.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(idx.shape[1], idx.device)  # 0, or -inf for what is ahead
        return self.encoder(x, mask, is_causal=True) @ self.wte.weight.T


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
        idx = torch.cat([idx, new], dim=1)[:, -block_size:]
        yield new[:, 0]


@torch.inference_mode()
def beam_search(model, idx, n, beam):
    """Roughly the most likely n tokens (n,) after the prompt idx (1, T): at each length the `beam` best are kept."""
    cache, V = KVCache(model, beam), model.config.vocab_size
    new, tokens = idx.expand(beam, -1), idx.new_zeros(beam, 0)
    logp = torch.tensor([0.0] + [-math.inf] * (beam - 1), device=idx.device)[:, None]  # at first one candidate
    for _ in range(n):
        total = (logp + torch.log_softmax(model(new, cache)[:, -1], -1)).reshape(-1)  # (beam V,)
        best = total.argsort(descending=True, stable=True)[:beam]
        rows, new, logp = best // V, best[:, None] % V, total[best][:, None]
        tokens = torch.cat([tokens[rows], new], dim=1)
        cache.reorder(rows)
    return tokens[0]


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
    """A GPT and its optimizer. Takes and returns numpy; figures stay on the device until float() reads them.

    accumulate: how many parts a batch is computed in, one after the other, if it is too large for the memory;
    dtype: what the forward and backward pass are computed in, "float32" or "bfloat16"; the weights stay float32.
    """

    def __init__(self, config, seed=0, device=None, accumulate=1, dtype="float32", compile=False):
        self.config, self.seed, self.device, self.t = config, seed, device or devices()[0], 0
        self.reference = None  # what keep_reference makes
        self.accumulate, self.dtype, (self.rank, self.size) = accumulate, getattr(torch, dtype), join()
        if self.device == "cuda" and self.size > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        self.model = GPT(config).to(self.device)
        init_weights(self.model, seed)
        self.m = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        self.v = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        self.net = torch.compile(self.model) if compile else self.model  # the same weights
        self.net = nn.parallel.DistributedDataParallel(self.net) if self.size > 1 else self.net

    def arrays(self, *arrays):
        """Numpy to the framework. Tokens are checked first: MLX would silently read past the end of an array."""
        if any(a.dtype.kind == "i" and (a.min() < 0 or a.max() >= self.config.vocab_size) for a in arrays):
            raise ValueError(f"a token is outside 0 ... {self.config.vocab_size - 1}")
        return [torch.from_numpy(a).to(self.device, non_blocking=self.device == "cuda") for a in arrays]

    def step(self, x, y, weights=None, *, lr):
        """One update on x (B, T) int64 and y, the tokens that follow; returns {"loss"}, before the update.

        The loss is the mean of -log p(y), in nats per token, or its sum times weights (B, T) float32.
        """
        weights = np.full(y.shape, 1 / y.size, np.float32) if weights is None else weights
        self.t += 1
        torch.manual_seed(self.seed + 1_000_003 * self.t + self.rank)  # for dropout, the framework's only randomness
        self.model.train()
        self.model.zero_grad()
        loss = 0.0
        parts = np.array_split(np.arange(self.rank, len(x), self.size), self.accumulate)  # of this process's rows
        for part in parts:
            xs, ys, ws = self.arrays(x[part], y[part], weights[part] * self.size)  # the processes' mean will be taken
            self.net.require_backward_grad_sync = part is parts[-1]  # which takes time: once per step
            with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                part_loss = loss_fn(self.net(xs).float(), ys, ws)
            part_loss.backward()
            loss = loss + part_loss.detach()
        if self.size > 1:
            dist.all_reduce(loss.div_(self.size))
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for name, p in self.model.named_parameters():
            decay = self.config.weight_decay if p.ndim == 2 else 0.0
            if self.config.optimizer == "muon" and p.ndim == 2 and name.startswith("h."):  # the matrices of the blocks
                muon(p, p.grad, self.m[name], lr, decay)
            else:
                adamw(p, p.grad, self.m[name], self.v[name], lr, self.t, decay)
        return {"loss": loss}

    @torch.no_grad()
    def evaluate(self, x, y, *weights):
        """{"val_loss"}: the loss of step on held-out data."""
        x, y, *weights = self.arrays(x, y, *weights)
        self.model.eval()
        return {"val_loss": loss_fn(self.model(x), y, *weights)}

    def keep_reference(self):
        """Keep a copy of the current model: what log_prob and generate call the reference."""
        self.reference = GPT(self.config).to(self.device)
        set_weights(self.reference, get_weights(self.model))

    @torch.no_grad()
    def log_prob(self, x, y, reference=False):
        """log p of each token of y (B, T) after those of x (B, T) so far, numpy (B, T)."""
        x, y = self.arrays(x, y)
        model = self.reference if reference else self.model
        model.eval()
        return log_prob(model(x), y).cpu().numpy()

    def generate(self, prompt, n, temperature=1.0, top_k=None, top_p=1.0, seed=0, reference=False):
        """Yield the next token of each row, numpy (B,), n times, after prompt (B, T) int64; temperature 0 is greedy."""
        (idx,) = self.arrays(prompt)
        u = torch.from_numpy(np.random.default_rng((seed, 2)).random((n, len(prompt)), np.float32)).to(self.device)
        model = self.reference if reference else self.model
        model.eval()
        for token in generate(model, idx, u, temperature, top_k, top_p):
            yield token.cpu().numpy()

    def search(self, prompt, n, beam):
        """The most likely n tokens after prompt (1, T) int64 by beam search, numpy (n,); T + n <= block_size."""
        self.model.eval()
        return beam_search(self.model, *self.arrays(prompt), n, beam).cpu().numpy()

    def save(self, path, step, **extra):
        """Save weights, moments, step, config and what train.py adds to one .npz: all or nothing."""
        if self.rank > 0:
            return
        arrays = get_weights(self.model)
        arrays |= {f"m.{name}": m.cpu().numpy() for name, m in self.m.items()}
        arrays |= {f"v.{name}": v.cpu().numpy() for name, v in self.v.items()}
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
                moments[name] = torch.from_numpy(arrays[f"{key}.{name}"]).to(self.device)
        return self.t
