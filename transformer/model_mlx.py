"""Transformers in MLX: encoder and decoder for translation, encoders only for ViT and CLIP.

    Seq2Seq    src (B, S) -> encoder -> memory (B, S, C);  tgt (B, T), memory -> decoder -> logits (B, T, V)
    ViT        x (B, H, W, C) -> patches -> Linear, after a class token -> encoder -> class token -> logits (B, n_out)
    CLIP       x (B, H, W, C) and captions (B, S) -> two encoders -> unit vectors, similar where they match

Attention: a query q weights every position s by how well its key k_s matches, and returns the mean of the values v_s:
    y = sum_s p_s v_s        p = softmax(a)        a_s = q . k_s / sqrt(d)
q . k_s, a sum of d products, grows with d; dividing by sqrt(d) keeps it where the softmax has a gradient.
Backward pass, with dy the gradient of y:
    y = sum_s p_s v_s             gives    dv_s = p_s dy        dp_s = dy . v_s
    p_s = e^a_s / sum_r e^a_r     gives    dp_s / da_r = p_s ([s = r] - p_r),  so that da_s = p_s (dp_s - p . dp)
    a_s = q . k_s / sqrt(d)       gives    dq = sum_s da_s k_s / sqrt(d)        dk_s = da_s q / sqrt(d)
n_head heads do this in parallel, each with queries, keys and values of d = C / n_head numbers: linear maps of x.
Attention ignores order: waves of many lengths, or learned vectors, are added to the input to encode the positions.

Vaswani et al. 2017, "Attention is all you need"; Dosovitskiy et al. 2021, "An image is worth 16x16 words";
Radford et al. 2021, "Learning transferable visual models from natural language supervision".
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
from mlx.utils import tree_flatten, tree_unflatten

PAD, BOS, EOS = 0, 1, 2  # tokens: padding, the beginning and the end of a sentence


@dataclass
class Config:
    model: str = "seq2seq"  # seq2seq, vit or clip
    src_vocab: int = 1000  # of the source; clip: of the captions
    tgt_vocab: int = 1000
    length: int = 64  # the most tokens in a sentence
    image: tuple = (28, 28, 1)  # vit, clip: height, width, channels
    patch: int = 4  # height and width of a patch
    n_out: int = 10  # vit: classes; clip: dimensions of the space that images and captions share
    n_layer: int = 3  # of each encoder and decoder
    n_head: int = 4
    width: int = 128
    norm: str = "pre"  # pre: x + f(norm(x)), which is easier to train; post: norm(x + f(x)), as in the paper
    positions: str = "sinusoidal"  # or learned
    dropout: float = 0.0  # of the embeddings and of each branch's output
    label_smoothing: float = 0.0  # the share of each label that is spread over all tokens
    ema: float = 0.0  # all but training uses an average of the weights, with this decay per step; 0: no average
    optimizer: str = "muon"  # muon or adamw
    weight_decay: float = 0.0

    def __post_init__(self):
        if self.width % 2 or self.width % self.n_head:
            raise ValueError(f"width {self.width} must be even and a multiple of n_head, which is {self.n_head}")
        if self.model != "seq2seq" and any(side % self.patch for side in self.image[:2]):
            raise ValueError(f"patch {self.patch} must divide height and width of the images, {self.image[:2]}")


# ---- blocks ----------------------------------------------------------------------------------------------------------


def attention(q, k, v, mask=None):
    """q (B, h, T, d), k and v (B, h, S, d), mask True where a query may look -> y (B, h, T, d) and p (B, h, T, S)."""
    a = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        a = mx.where(mask, a, -math.inf)
    p = mx.softmax(a, -1)
    return p @ v, p


def attention_backward(dy, q, k, v, p):
    """dy (B, h, T, d) -> the gradients dq, dk, dv. Where the mask is False, p is 0, and so is its part of them."""
    dv = p.swapaxes(-1, -2) @ dy
    dp = dy @ v.swapaxes(-1, -2)
    da = p * (dp - (p * dp).sum(-1, keepdims=True)) / math.sqrt(q.shape[-1])
    return da @ k, da.swapaxes(-1, -2) @ q, dv


class MultiHeadAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.by_hand = config.n_head, False
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.k = nn.Linear(config.width, config.width, bias=False)
        self.v = nn.Linear(config.width, config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def heads(self, x):
        """(B, T, C) -> (B, h, T, d)"""
        return x.reshape(*x.shape[:2], self.n_head, -1).swapaxes(1, 2)

    def keys_values(self, x):
        """x (B, S, C) -> k and v, (B, h, S, d) each"""
        return self.heads(self.k(x)), self.heads(self.v(x))

    def __call__(self, x, kv, mask):
        """The queries of x (B, T, C) attend to kv where the mask, broadcast to (B, h, T, S), is True -> (B, T, C)."""
        q, (k, v) = self.heads(self.q(x)), kv
        if self.by_hand:  # the same, but keeps p for inspection
            y, self._p = attention(q, k, v, mask)
        else:
            y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
        return self.out(y.swapaxes(1, 2).reshape(x.shape))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.width, 4 * config.width)
        self.fc2 = nn.Linear(4 * config.width, config.width)

    def __call__(self, x):
        return self.fc2(nn.relu(self.fc1(x)))


class EncoderBlock(nn.Module):
    """Every token attends to every other, and is then processed by itself."""

    def __init__(self, config):
        super().__init__()
        self.pre = config.norm == "pre"
        self.norm1, self.attn = nn.LayerNorm(config.width, eps=1e-5), MultiHeadAttention(config)
        self.norm2, self.ff = nn.LayerNorm(config.width, eps=1e-5), FeedForward(config)
        self.drop = nn.Dropout(config.dropout)

    def add(self, x, norm, f):
        """Add f(x) to x. With the norm before f, the path from x to x + f(x) has no norm in it."""
        return x + self.drop(f(norm(x))) if self.pre else norm(x + self.drop(f(x)))

    def __call__(self, x, mask):
        x = self.add(x, self.norm1, lambda y: self.attn(y, self.attn.keys_values(y), mask))
        return self.add(x, self.norm2, self.ff)


class DecoderBlock(EncoderBlock):
    """Every token attends to those before it, then to the encoder's memory, and is then processed by itself."""

    def __init__(self, config):
        super().__init__(config)
        self.norm3, self.cross = nn.LayerNorm(config.width, eps=1e-5), MultiHeadAttention(config)

    def __call__(self, x, mask, memory, memory_mask, cache, layer):
        """x (B, T, C); memory: the keys and values of the encoder's output. With a cache, x continues it."""

        def look_back(y):
            kv = self.attn.keys_values(y)
            return self.attn(y, kv if cache is None else cache.append(layer, kv), mask)

        x = self.add(x, self.norm1, look_back)
        x = self.add(x, self.norm2, lambda y: self.cross(y, memory, memory_mask))
        return self.add(x, self.norm3, self.ff)


class Positions(nn.Module):
    """Adds to each token its position: sin and cos, of wavelengths 2 pi to nearly 20,000 pi, or a learned vector."""

    def __init__(self, config, length):
        super().__init__()
        if config.positions == "learned":
            self.weight = mx.zeros((length, config.width))
        else:
            angle = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, config.width, 2) / config.width)
            table = np.stack([np.sin(angle), np.cos(angle)], -1).reshape(length, -1)  # sin, cos, sin, cos ...
            self._table = mx.array(table.astype(np.float32))  # the underscore: not a parameter
        self.learned, self.drop = config.positions == "learned", nn.Dropout(config.dropout)

    def __call__(self, x, start=0):
        """x (B, T, C), whose first token is at the place `start`."""
        table = self.weight if self.learned else self._table
        return self.drop(x + table[start : start + x.shape[1]])


class Cache:
    """What decoding needs of the past: the keys and values, in each layer, of the memory and of the tokens so far."""

    def __init__(self, decoder, memory):
        self.memory = [block.cross.keys_values(memory) for block in decoder.blocks]
        self.past, self.length = [None] * len(decoder.blocks), 0

    def append(self, layer, kv):
        if self.past[layer] is not None:
            kv = [mx.concatenate(both, 2) for both in zip(self.past[layer], kv)]
        self.past[layer] = kv
        return kv

    def reorder(self, rows):
        """Continue with these rows."""
        self.past = [[a[rows] for a in kv] for kv in self.past]


# ---- models ----------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """What encoder and decoder have in common: embeddings of the tokens, their positions, blocks and a final norm."""

    def __init__(self, config, vocab_size, block):
        super().__init__()
        self.scale = math.sqrt(config.width)
        self.embed = nn.Embedding(vocab_size, config.width)
        self.positions = Positions(config, config.length)
        self.blocks = [block(config) for _ in range(config.n_layer)]
        self.norm = nn.LayerNorm(config.width, eps=1e-5)

    def start(self, ids, place=0):
        """ids (B, T), the first of them at `place` -> (B, T, C): entries of about 0.2, and positions of up to 1"""
        return self.positions(self.scale * self.embed(ids), place)


class Encoder(Stack):
    """The tokens of a sentence, each in the context of all."""

    def __init__(self, config):
        super().__init__(config, config.src_vocab, EncoderBlock)

    def __call__(self, ids):
        """ids (B, S) -> (B, S, C), and the mask (B, 1, 1, S) that is False at the padding."""
        mask = (ids != PAD)[:, None, None]
        x = self.start(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x), mask


class Decoder(Stack):
    """Predicts each token of the target from those before it and the source."""

    def __init__(self, config):
        super().__init__(config, config.tgt_vocab, DecoderBlock)

    def __call__(self, ids, memory, memory_mask, cache=None):
        """ids (B, T), memory (B, S, C) -> logits (B, T, V). With a cache, ids (B, 1) continue what it holds."""
        T, place = ids.shape[1], 0 if cache is None else cache.length
        mask = mx.tril(mx.ones((T, T))).astype(mx.bool_)  # t sees 0 ... t
        x = self.start(ids, place)
        for layer, block in enumerate(self.blocks):
            seen = block.cross.keys_values(memory) if cache is None else cache.memory[layer]
            x = block(x, mask if cache is None else None, seen, memory_mask, cache, layer)
        if cache is not None:
            cache.length += T
        return self.norm(x) @ self.embed.weight.T  # the head is tied to the embedding


class Seq2Seq(nn.Module):
    """p(tgt | src) is the product over t of p(tgt_t | tgt_1 ... tgt_{t-1}, src)."""

    def __init__(self, config):
        super().__init__()
        self.config, self.encoder, self.decoder = config, Encoder(config), Decoder(config)

    def __call__(self, src, tgt):
        """src (B, S), tgt (B, T) -> logits (B, T, V)"""
        return self.decoder(tgt, *self.encoder(src))

    def loss(self, src, tgt):
        """The mean -log p of the tokens of tgt (B, T + 1) after BOS, in nats per token; and the accuracy."""
        logits, y = self(src, tgt[:, :-1]), tgt[:, 1:]
        smoothing = self.config.label_smoothing if self.training else 0.0
        nll = nn.losses.cross_entropy(logits, y, label_smoothing=smoothing, reduction="none")
        real = (y != PAD).astype(mx.float32)
        return (nll * real).sum() / real.sum(), ((logits.argmax(-1) == y) * real).sum() / real.sum()


class BuiltinSeq2Seq(nn.Module):
    """The same model as the framework's nn.Transformer, with the weights of a Seq2Seq: it gives the same logits."""

    def __init__(self, model):
        super().__init__()
        c, self.encoder, self.decoder = model.config, model.encoder, model.decoder
        self.transformer = nn.Transformer(
            c.width, c.n_head, c.n_layer, c.n_layer, 4 * c.width, 0.0, norm_first=c.norm == "pre"
        )
        theirs = {}
        for name, w in tree_flatten(model.parameters()):
            own = "self_attention" if name.startswith("decoder") else "attention"
            for a, b in {"blocks": "layers", "norm": "ln", "attn": own, "cross": "cross_attention", "ff.fc": "linear",
                         ".q.": ".query_proj.", ".k.": ".key_proj.", ".v.": ".value_proj.",
                         ".out.": ".out_proj."}.items():  # fmt: skip
                name = name.replace(a, b)
            theirs[name] = w
        names = [name for name, _ in tree_flatten(self.transformer.parameters())]
        self.transformer.update(tree_unflatten([(name, theirs[name]) for name in names]))

    def __call__(self, src, tgt):
        """src (B, S), tgt (B, T) -> logits (B, T, V)"""
        embed, T = (self.encoder.start(src), self.decoder.start(tgt)), tgt.shape[1]
        ahead = mx.tril(mx.ones((T, T))).astype(mx.bool_)  # here True is what may be seen
        pad = (src != PAD)[:, None, None]
        y = self.transformer(*embed, pad, ahead, pad)
        return y @ self.decoder.embed.weight.T


class ImageEncoder(nn.Module):
    """An image as a sentence of patches, after a class token that gathers what it shows."""

    def __init__(self, config):
        super().__init__()
        (H, W, C), self.patch = config.image, config.patch
        self.embed = nn.Linear(self.patch**2 * C, config.width)
        self.token = mx.zeros((config.width,))
        self.positions = Positions(config, H // self.patch * (W // self.patch) + 1)
        self.blocks = [EncoderBlock(config) for _ in range(config.n_layer)]
        self.norm = nn.LayerNorm(config.width, eps=1e-5)

    def __call__(self, x):
        """x (B, H, W, C), pixels from 0 to 1 -> the class token (B, width)"""
        (B, H, W, C), p = x.shape, self.patch
        x = (4 * x - 2).reshape(B, H // p, p, W // p, p, C).swapaxes(2, 3).reshape(B, -1, p * p * C)  # (B, N, p p C)
        x = mx.concatenate([mx.broadcast_to(self.token, (B, 1, len(self.token))), self.embed(x)], 1)
        x = self.positions(x)
        for block in self.blocks:
            x = block(x, None)
        return self.norm(x[:, 0])


class ViT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.encoder = config, ImageEncoder(config)
        self.head = nn.Linear(config.width, config.n_out)

    def __call__(self, x):
        """x (B, H, W, C) -> logits (B, n_out)"""
        return self.head(self.encoder(x))

    def loss(self, x, y):
        """The mean -log p of the classes y (B,); and the accuracy."""
        logits, smoothing = self(x), self.config.label_smoothing if self.training else 0.0
        loss = nn.losses.cross_entropy(logits, y, label_smoothing=smoothing, reduction="mean")
        return loss, (logits.argmax(-1) == y).mean()


class CLIP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.image, self.text = config, ImageEncoder(config), Encoder(config)
        self.image_proj = nn.Linear(config.width, config.n_out, bias=False)
        self.text_proj = nn.Linear(config.width, config.n_out, bias=False)
        self.logit_scale = mx.zeros(())

    def embed_images(self, x):
        """x (B, H, W, C) -> unit vectors (B, n_out)"""
        return unit(self.image_proj(self.image(x)))

    def embed_texts(self, ids):
        """ids (B, S) -> unit vectors (B, n_out), of the mean over the tokens; the paper uses the last token"""
        x, mask = self.text(ids)
        real = mask[:, 0, 0, :, None]
        return unit(self.text_proj((x * real).sum(1) / real.sum(1)))

    def __call__(self, x, ids):
        """x (B, H, W, C), ids (B', S) -> logits (B, B'): cosines over a learned temperature e^-logit_scale >= 0.01"""
        return self.embed_images(x) @ self.embed_texts(ids).T * mx.exp(mx.minimum(self.logit_scale, math.log(100)))

    def loss(self, x, ids):
        """Which caption belongs to each image, and which image to each caption? The mean -log p; the accuracy."""
        logits = self(x, ids)
        y = mx.arange(len(logits))
        loss = sum(nn.losses.cross_entropy(a, y, reduction="mean") for a in (logits, logits.T)) / 2
        right = (logits.argmax(1) == y).astype(mx.float32) + (logits.argmax(0) == y).astype(mx.float32)
        return loss, right.mean() / 2


def unit(x):
    """Each vector divided by its length."""
    return x / mx.sqrt((x * x).sum(-1, keepdims=True))


# ---- translation -----------------------------------------------------------------------------------------------------


def translate(model, src, beam=4, alpha=1.4, length=64):
    """The most likely sentence for each row of src (B, S), as lists of tokens, by beam search; a beam of 1 is greedy.

    The `beam` best beginnings of each sentence are kept. As each token lowers log p, n tokens are compared by
    log p / ((5 + n) / 6)^alpha (Wu et al. 2016); 1.4 was the best of 0.6, 1.0 and 1.4 on multi30k's validation part.
    Everything but the model is numpy.
    """
    B, rows = len(src), np.arange(len(src)).repeat(beam)
    memory, mask = (a[mx.array(rows)] for a in model.encoder(src))
    cache = Cache(model.decoder, memory)
    tokens, n = np.full((B * beam, 1), BOS), np.zeros(B * beam)
    logp, done = np.where(np.arange(B * beam) % beam, -np.inf, 0.0), np.zeros(B * beam, bool)  # at first one candidate
    for _ in range(length - 1):
        logits = model.decoder(mx.array(tokens[:, -1:]), memory, mask, cache)[:, 0]
        more = np.array(nn.log_softmax(logits, -1))  # (B beam, V)
        more[:, [PAD, BOS]] = -np.inf  # which never come next
        more[done] = np.where(np.arange(more.shape[1]) == PAD, 0.0, -np.inf)  # finished sentences stay as they are
        total, n = logp[:, None] + more, n + ~done
        worth = (total / ((5 + n[:, None]) / 6) ** alpha).reshape(B, -1)
        best = np.argpartition(-worth, beam - 1, 1)[:, :beam] + np.arange(B)[:, None] * worth.shape[1]
        rows, token = np.divmod(best.reshape(-1), more.shape[1])
        tokens, n, logp = np.concatenate([tokens[rows], token[:, None]], 1), n[rows], total[rows, token]
        done = done[rows] | (token == EOS)
        if done.all():
            break
        cache.reorder(mx.array(rows))
    best = (logp / ((5 + n) / 6) ** alpha).reshape(B, beam).argmax(1) + np.arange(B) * beam
    return [[int(t) for t in row[1:] if t not in (PAD, EOS)] for row in tokens[best]]


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


def checked(arrays, name, like):
    """The array of this name in {name: numpy array}, which must have the shape of `like`; float32."""
    if name not in arrays:
        raise ValueError(f"{name} is missing")
    if arrays[name].shape != tuple(like.shape):
        raise ValueError(f"{name} has shape {arrays[name].shape}, this model expects {tuple(like.shape)}")
    return arrays[name].astype(np.float32)


def set_weights(model, weights):
    """Replace the model's parameters with {name: numpy array}."""
    params = dict(tree_flatten(model.parameters()))
    for name, p in params.items():
        params[name] = mx.array(checked(weights, name, p))
    model.update(tree_unflatten(list(params.items())))


def init_weights(model, seed):
    """Embeddings N(0, 0.02^2); matrices N(0, 1/n_in), divided by sqrt(2 n_layer) if added to x; norms 1, biases 0."""
    rng, weights = np.random.default_rng(seed), get_weights(model)
    for name, w in sorted(weights.items()):
        if w.ndim == 2:
            std = 0.02 if name.endswith(("embed.weight", "positions.weight")) else 1 / math.sqrt(w.shape[1])
            std /= math.sqrt(2 * model.config.n_layer) if name.endswith(("out.weight", "fc2.weight")) else 1
            weights[name] = rng.standard_normal(w.shape, np.float32) * np.float32(std)
        elif name == "logit_scale":
            weights[name] = np.full_like(w, math.log(1 / 0.07))
        else:
            weights[name] = np.full_like(w, "norm" in name and name.endswith("weight"))
    set_weights(model, weights)


def devices():
    """The devices that can be used here, the best first."""
    return ["gpu", "cpu"] if mx.is_available(mx.gpu) else ["cpu"]


class Trainer:
    """A model and its optimizer. Takes and returns numpy; figures stay on the device until float() reads them."""

    def __init__(self, config, seed=0, device=None):
        self.config, self.seed, self.device, self.t = config, seed, device or devices()[0], 0
        mx.set_default_device(getattr(mx, self.device))
        kind = {"seq2seq": Seq2Seq, "vit": ViT, "clip": CLIP}[config.model]
        self.model = kind(config).eval()  # train mode is for steps only
        self.average = kind(config).eval() if config.ema else self.model
        for model in (self.model, self.average):
            init_weights(model, seed)
        self.m = {name: mx.zeros_like(p) for name, p in tree_flatten(self.model.parameters())}
        muons = [name for name, p in self.m.items() if p.ndim == 2 and "blocks." in name]  # the matrices of the blocks
        adamws = self.m.keys() - (muons if config.optimizer == "muon" else [])
        self.v = {name: mx.zeros_like(p) for name, p in self.m.items() if name in adamws}
        if self.device == "gpu":  # compile the whole step; plain numbers would become constants
            state = [self.model.state, self.average.state, self.m, self.v, mx.random.state]
            update = mx.compile(self.update, inputs=state, outputs=state)
            self.update = lambda arrays, *numbers: update(arrays, *map(mx.array, numbers))

    def arrays(self, *arrays):
        """Numpy to the framework. Ids are checked first: MLX would silently read past the end of an array."""
        c = self.config
        most = {"seq2seq": (c.src_vocab, c.tgt_vocab), "vit": (0, c.n_out), "clip": (0, c.src_vocab)}[c.model]
        for a, n in zip(arrays, most):
            if a.dtype == np.int64 and not 0 <= a.min() <= a.max() < n:
                raise ValueError(f"a token or a class is outside 0 ... {n - 1}")
        return [mx.array(a) for a in arrays]

    def step(self, *arrays, lr):
        """One update on arrays that model.loss takes; returns {"loss"} before it, in nats."""
        arrays = self.arrays(*arrays)
        self.t += 1
        mx.random.seed(self.seed + 1_000_003 * self.t)  # for dropout, the only randomness in the framework
        self.model.train()
        keep = min(self.config.ema, self.t / (self.t + 10))  # at first, average over fewer steps
        loss = self.update(arrays, lr, self.t, keep)
        self.model.eval()
        mx.eval(loss, self.model, self.average, self.m, self.v)  # MLX is lazy: the step is computed here
        return {"loss": loss}

    def update(self, arrays, lr, t, keep):
        """Update weights and moments, at step t, and the average with decay `keep`; returns the loss."""
        (loss, _), grads = nn.value_and_grad(self.model, self.model.loss)(*arrays)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        grads, params = dict(tree_flatten(grads)), dict(tree_flatten(self.model.parameters()))
        for name, p in params.items():
            decay = self.config.weight_decay if p.ndim == 2 else 0.0
            if name in self.v:
                moments = self.m[name], self.v[name]
                params[name], self.m[name], self.v[name] = adamw(p, grads[name], *moments, lr, t, decay)
            else:
                params[name], self.m[name] = muon(p, grads[name], self.m[name], lr, decay)
        self.model.update(tree_unflatten(list(params.items())))
        if self.config.ema:
            for name, average in tree_flatten(self.average.parameters()):
                params[name] = keep * average + (1 - keep) * params[name]
            self.average.update(tree_unflatten(list(params.items())))
        return loss

    def evaluate(self, *arrays):
        """{"val_loss", "accuracy"}, the share of tokens, classes or pairs that are right."""
        loss, accuracy = self.average.loss(*self.arrays(*arrays))
        return {"val_loss": loss, "accuracy": accuracy}

    def translate(self, src, beam=4, alpha=1.4):
        """src (B, S) -> B lists of tokens."""
        return translate(self.average, *self.arrays(src), beam, alpha, self.config.length)

    def predict(self, x):
        """x (B, H, W, C) -> numpy (B, n_out): vit: the probabilities of the classes."""
        return np.array(mx.softmax(self.average(*self.arrays(x)), -1))

    def embed(self, x, ids):
        """clip: x (B, H, W, C), ids (B', S) -> numpy unit vectors (B, n_out), (B', n_out)."""
        x, ids = self.arrays(x, ids)
        return np.array(self.average.embed_images(x)), np.array(self.average.embed_texts(ids))

    def attention(self, *arrays):
        """The last layer's attention, numpy (B, h, T, S): from target to source, or between the tokens of an image."""
        side = self.average.decoder if self.config.model == "seq2seq" else self.average.encoder
        layer = side.blocks[-1].cross if self.config.model == "seq2seq" else side.blocks[-1].attn
        layer.by_hand = True
        self.average(*self.arrays(*arrays))
        layer.by_hand = False
        return np.array(layer._p)

    def save(self, path, step, **extra):
        """Save weights, moments, step, config and what train.py adds to one .npz: all or nothing."""
        arrays = get_weights(self.model)
        arrays |= {f"m.{name}": np.array(m) for name, m in self.m.items()}
        arrays |= {f"v.{name}": np.array(v) for name, v in self.v.items()}
        if self.config.ema:
            arrays |= {f"average.{name}": a for name, a in get_weights(self.average).items()}
        meta = {"model": "transformer", "config": asdict(self.config), "step": step, **extra}
        with open(f"{path}.part", "wb") as f:
            np.savez(f, meta=json.dumps(meta), **arrays)
        os.replace(f"{path}.part", path)

    def load(self, path):
        """Load what save wrote, in either framework; returns the step to continue from."""
        with np.load(path, allow_pickle=False) as f:
            arrays, meta = dict(f), json.loads(str(f["meta"]))
        set_weights(self.model, arrays)
        if self.config.ema:  # a run without it may continue with it
            set_weights(self.average, {name: arrays.get(f"average.{name}", arrays[name]) for name in self.m})
        for kind, moments in (("m", self.m), ("v", self.v)):
            for name, a in moments.items():
                moments[name] = mx.array(checked(arrays, f"{kind}.{name}", a))
        self.t = meta["step"]
        return self.t
