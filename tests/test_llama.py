"""llama/ against transformers and closed forms: real weights, tokens, the rolling cache, LoRA, few bits, dialogues."""

import base64
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from folders import BACKENDS, copy_alone, environment, load, load_file, make_trainer, run, start
from test_gpt import array

data = load_file("llama", "data")

GOLDEN = Path(__file__).parent / "golden"
TORCH = load("llama", "torch")


def randomised(backend, **changes):
    """A small Llama with every parameter random, norms too."""
    net = load("llama", backend)
    config = dict(block_size=24, vocab_size=29, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=64)
    trainer = net.Trainer(net.Config(**{**config, **changes}), device="cpu")
    rng = np.random.default_rng(4)
    weights = dict(sorted(net.get_weights(trainer.model).items()))
    weights = {name: rng.normal(0, 0.3, w.shape).astype(np.float32) for name, w in weights.items()}
    net.set_weights(trainer.model, weights)
    return net, trainer


def logits(backend, trainer, idx):
    return np.array(trainer.model(array(backend, idx)).tolist())


@pytest.mark.parametrize("name", ["llama-tiny", "llama3-tiny"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend, name, ):
    """A model from the disk: logits and greedy tokens as transformers 5.23 computes them, llama3's positions too."""
    net, (config, weights) = load("llama", backend), data.load_llama(GOLDEN / name)
    trainer = net.Trainer(net.Config(**config), device="cpu", weights=weights)
    with np.load(GOLDEN / name / "expected.npz") as expected:
        ids, theirs, greedy = expected["ids"].astype(np.int64), expected["logits"], expected["greedy"]
    np.testing.assert_allclose(logits(backend, trainer, ids), theirs, atol=1e-4, rtol=0)
    new = [int(token[0]) for token in trainer.generate(ids[:1, :5], 12, temperature=0)]
    assert [*ids[0, :5], *new] == greedy.tolist()


def test_rope():
    """rotate is MLX's own rope; linear is the same with positions closer together; llama3 keeps fast pairs only."""
    config = TORCH.Config(n_head=2, n_kv_head=2, n_embd=32)
    x = np.random.default_rng(0).normal(size=(2, 3, 7, 16)).astype(np.float32)
    for changes, scale in (dict(), 1.0), (dict(rope="linear", rope_factor=4.0), 0.25):
        f = TORCH.rope_frequencies(TORCH.Config(n_head=2, n_kv_head=2, n_embd=32, **changes))
        ours = TORCH.rotate(torch.from_numpy(x), TORCH.rope(torch.arange(5, 12), torch.from_numpy(f)))
        theirs = mx.fast.rope(mx.array(x), 16, traditional=False, base=config.rope_theta, scale=scale, offset=5)
        np.testing.assert_allclose(ours.numpy(), np.array(theirs), atol=1e-5)
    llama3 = TORCH.Config(n_head=2, n_kv_head=2, n_embd=128, rope="llama3", rope_factor=8.0, rope_context=100)
    ratio = TORCH.rope_frequencies(TORCH.Config(n_head=2, n_kv_head=2, n_embd=128)) / TORCH.rope_frequencies(llama3)
    turns = 100 * TORCH.rope_frequencies(TORCH.Config(n_head=2, n_kv_head=2, n_embd=128)) / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 4], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[turns < 1], 8, rtol=1e-5)
    assert ((1 < ratio) & (ratio < 8)).sum() >= 3


@pytest.mark.parametrize("chunks", [[24], [1] * 24, [5, 1, 1, 7, 10], [23, 1]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cache(backend, chunks):
    """Prefill, single tokens and chunks on the cache give the logits of the whole text computed at once."""
    net, trainer = randomised(backend)
    idx = np.random.default_rng(0).integers(0, 29, (3, 24))
    whole, cache, at = logits(backend, trainer, idx), net.KVCache(trainer.model, 3, 24), 0
    before = [id(k) for k in cache.k]
    for n in chunks:
        at += n
        new = np.array(trainer.model(array(backend, idx[:, at - n : at]), cache).tolist())
        np.testing.assert_allclose(new[:, 0], whole[:, at - 1], atol=1e-4)
    assert cache.length == 24 and [id(k) for k in cache.k] == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_window(backend):
    """The rolling cache writes what the whole text under the mask of the window says, far beyond the window."""
    net, trainer = randomised(backend, window=6, sinks=0)
    prompt = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2]])
    tokens = np.stack(list(trainer.generate(prompt, 60, temperature=0)), 1)
    text = np.concatenate([prompt, tokens], 1)
    best = logits(backend, trainer, text).argmax(-1)
    assert (best[:, 8:-1] == tokens).all() and len(np.unique(tokens)) > 2
    changed = text.copy()
    changed[:, 20] = (text[:, 20] + 1) % 29  # seen by 6 positions in each of the two layers
    moved = np.abs(logits(backend, trainer, changed) - logits(backend, trainer, text)).max((0, 2)) > 0
    assert moved.nonzero()[0].tolist() == list(range(20, 31))


def streamed(model, idx):
    """StreamingLLM with unturned keys in a list: a token sees the sinks and the window at positions 0, 1, ..."""
    c, w = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    norm = lambda x, name: x / (x.square().mean() + c.norm_eps).sqrt() * w[name]  # noqa: E731
    kept, out = [[] for _ in range(c.n_layer)], []
    for token in idx:
        x = w["embed_tokens.weight"][token]
        for i in range(c.n_layer):
            at = f"layers.{i}."
            h = w[at + "self_attn.qkv_proj.weight"] @ norm(x, at + "input_layernorm.weight")
            q, k, v = h.view(-1, c.head_size).split([c.n_head, c.n_kv_head, c.n_kv_head])
            kept[i].append((k, v))
            if len(kept[i]) > c.sinks + c.window:
                del kept[i][c.sinks]
            angles = torch.arange(len(kept[i]))[:, None] * torch.from_numpy(TORCH.rope_frequencies(c)).double()

            def turned(x, t, angles=angles):
                a, b = x.chunk(2, -1)
                cos, sin = angles[t].cos(), angles[t].sin()
                return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

            K = torch.stack([turned(k, t) for t, (k, _) in enumerate(kept[i])])  # (S, n_kv_head, head_size)
            V, heads = torch.stack([v for _, v in kept[i]]), []
            for head, query in enumerate(turned(q, len(kept[i]) - 1)):
                of = head // (c.n_head // c.n_kv_head)
                heads.append((K[:, of] @ query / c.head_size**0.5).softmax(0) @ V[:, of])
            x = x + w[at + "self_attn.o_proj.weight"] @ torch.cat(heads)
            gate, up = (w[at + "mlp.gate_up_proj.weight"] @ norm(x, at + "post_attention_layernorm.weight")).chunk(2)
            x = x + w[at + "mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up)
        out.append(w["embed_tokens.weight"] @ norm(x, "norm.weight"))
    return torch.stack(out).numpy()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks(backend):
    """The rolling cache with sinks, token by token, is attention sinks as the paper has them; its memory stays."""
    net, trainer = randomised(backend, window=5, sinks=3)
    expected = streamed(randomised("torch", window=5, sinks=3)[1].model, idx := np.arange(40) * 7 % 29)
    cache = net.KVCache(trainer.model, 1, 10**9)
    for t, token in enumerate(idx):
        new = np.array(trainer.model(array(backend, token[None, None]), cache).tolist())
        np.testing.assert_allclose(new[0, 0], expected[t], atol=2e-3)
    assert cache.size == 8 and {tuple(k.shape) for k in cache.k + cache.v} == {(1, 2, 8, 8)}
    assert np.abs(expected[20:]).mean() > 0.4  # the bound is far below what there is


@pytest.mark.parametrize("backend", BACKENDS)
def test_head_dim(backend):
    """Heads of another size than n_embd / n_head, beside the same by hand."""
    sizes = dict(head_dim=12, window=40, sinks=0)  # a window that is wider than the text
    net, trainer = randomised(backend, **sizes)
    assert net.get_weights(trainer.model)["layers.0.self_attn.o_proj.weight"].shape == (32, 48)
    expected = streamed(randomised("torch", **sizes)[1].model, idx := np.arange(20) * 7 % 29)
    np.testing.assert_allclose(logits(backend, trainer, idx[None])[0], expected, atol=2e-3)
    new = [int(token[0]) for token in trainer.generate(idx[None, :1], 1, temperature=0)]
    assert new == [expected[0].argmax()]
    with pytest.raises(ValueError, match="head_dim"):
        net.Config(head_dim=7)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_clip(backend, optimizer):
    """A gradient longer than 1 enters the moments with length 1, a shorter one as it is."""
    x, y = np.arange(24)[None] % 29, np.arange(1, 25)[None] % 29
    lengths = []
    for scale in (1.0, 0.03):  # of the head, whose size is the gradient's
        net, trainer = randomised(backend, optimizer=optimizer, tied=False)
        weights = {"norm.weight": scale * net.get_weights(trainer.model)["norm.weight"]}
        weights["lm_head.weight"] = scale * net.get_weights(trainer.model)["lm_head.weight"]
        net.set_weights(trainer.model, weights)
        trainer.step(x, y, lr=1e-3)
        lengths.append(sum(float((net.gather(m) ** 2).sum()) for m in trainer.m.values()) ** 0.5)
    assert lengths[0] == pytest.approx(0.1, rel=1e-3) and 3e-4 < lengths[1] < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend):
    """Computed in bfloat16 the loss is another, but nearly the same; weights and moments stay float32."""
    x, y = np.arange(48).reshape(2, 24) % 29, np.arange(1, 49).reshape(2, 24) % 29
    for lora in (0, 3):
        losses = []
        for dtype in ("float32", "bfloat16"):
            net, base = randomised(backend, lora_rank=lora)
            weights = {name: 0.3 * w for name, w in net.get_weights(base.model).items()}
            trainer = net.Trainer(base.config, device="cpu", weights=weights, dtype=dtype)
            before = net.get_weights(trainer.model)
            losses.append([float(trainer.step(x, y, lr=1e-3)["loss"]) for _ in range(5)])
            after = net.get_weights(trainer.model)
        assert losses[0] != losses[1]
        np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)
        assert {w.dtype for w in after.values()} == {np.dtype(np.float32)}
        assert {name for name in after if (after[name] != before[name]).any()} == net.trained(trainer.model).keys()


@pytest.mark.parametrize("backend", BACKENDS)
def test_load_refuses(backend, tmp_path):
    """An array that is missing or has another shape is named, a moment's too, and nothing is taken up."""
    x, y = np.arange(24)[None] % 29, np.arange(1, 25)[None] % 29
    net, trainer = randomised(backend)
    trainer.step(x, y, lr=1e-3)
    trainer.save(tmp_path / "ckpt.npz", 1)
    with np.load(tmp_path / "ckpt.npz") as f:
        arrays = dict(f)
    for name in ("norm.weight", "m.norm.weight", "v.layers.1.mlp.down_proj.weight"):
        for bad in ({}, {name: arrays[name][:5]}):
            np.savez(tmp_path / "bad.npz", **{**{key: w for key, w in arrays.items() if key != name}, **bad})
            with pytest.raises(ValueError, match=name):
                trainer.load(tmp_path / "bad.npz")
    assert trainer.load(tmp_path / "ckpt.npz") == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_lora(backend, tmp_path):
    """It starts from the model as it is, trains and saves A and B alone, and merged it is the same model."""
    net, base = randomised(backend)
    lora = dict(optimizer="adamw", lora_rank=3, lora_targets=["qkv_proj", "down_proj"])
    config = net.Config(**{**vars_of(base.config), **lora})
    trainer = net.Trainer(config, device="cpu", weights=net.get_weights(base.model))
    x, y = np.arange(48).reshape(2, 24) % 29, np.arange(1, 49).reshape(2, 24) % 29
    np.testing.assert_allclose(logits(backend, trainer, x), logits(backend, base, x), atol=1e-5)
    losses = [float(trainer.step(x, y, lr=0.02)["loss"]) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    before, after = net.get_weights(base.model), net.get_weights(trainer.model)
    assert all((after[name] == before[name]).all() for name in before)
    trainer.save(tmp_path / "ckpt.npz", 30)
    with np.load(tmp_path / "ckpt.npz") as f:
        names = {name for name in f.files if name != "meta" and name[:2] not in ("m.", "v.")}
    parts = [f"layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.qkv_proj", "mlp.down_proj")]
    adapters = {f"{part}.lora_{k}" for part in parts for k in "ab"}
    assert names == adapters == net.trained(trainer.model).keys()
    again = net.Trainer(config, seed=5, device="cpu", weights=before)
    assert again.load(tmp_path / "ckpt.npz") == 30
    said = logits(backend, trainer, x)
    np.testing.assert_allclose(logits(backend, again, x), said, atol=1e-5)
    trainer.merge()
    np.testing.assert_allclose(logits(backend, trainer, x), said, atol=1e-3)
    assert net.get_weights(trainer.model).keys() == before.keys() == net.trained(trainer.model).keys()
    assert np.abs(said - logits(backend, base, x)).max() > 0.5


def vars_of(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_lora_is_small():
    """Of SmolLM2's parameters rank 8 trains less than 2 %."""
    with torch.device("meta"):
        model = TORCH.Llama(TORCH.Config(lora_rank=8))
    count = [sum(p.numel() for p in params) for params in (TORCH.trained(model).values(), model.parameters())]
    assert 0.01 < count[0] / count[1] < 0.02


@pytest.mark.parametrize("size, millions", [("135M", 134.5), ("1B", 1235.8), ("7B", 6738.4), ("8B", 8030.3)])
def test_sizes(size, millions):
    with torch.device("meta"):
        vocab = {"135M": 49152, "7B": 32000}.get(size, 128256)
        model = TORCH.Llama(TORCH.Config(vocab_size=vocab, **data.SIZES[size]))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("bits, error", [(8, 0.01), (4, 0.08)])
def test_quantized(bits, error):
    """Near the matrix itself, as near as so many bits allow; and the twins say nearly the same."""
    rng, said = np.random.default_rng(0), []
    w, x = rng.normal(size=(64, 96)).astype(np.float32), rng.normal(size=(2, 5, 96)).astype(np.float32)
    for backend in BACKENDS:
        q = load("llama", backend).Quantized(array(backend, w), bits)
        said.append(np.array(q(array(backend, x)).tolist()))
        off = np.linalg.norm(said[-1] - x @ w.T) / np.linalg.norm(x @ w.T)
        assert error / 10 < off < error
        if bits == 8:
            rows = np.array(q.rows(array(backend, np.array([[3, 60]]))).tolist())
            np.testing.assert_allclose(rows[0], w[[3, 60]], atol=0.03)
    assert np.linalg.norm(said[0] - said[1]) / np.linalg.norm(said[1]) < (0.01 if bits == 8 else 0.005)


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantized_model(backend):
    """The whole model in few bits is smaller and says nearly the same."""
    x = np.arange(24)[None] % 29
    sizes, off = [], []
    for bits in (32, 8, 4):
        net, trainer = randomised(backend, n_embd=64, n_hidden=128)
        whole = logits(backend, trainer, x)
        sizes.append(trainer.quantize(bits))
        off.append(np.linalg.norm(logits(backend, trainer, x) - whole) / np.linalg.norm(whole))
    assert sizes[0] > 2.5 * sizes[1] > 3 * sizes[2] and off[0] == 0 < off[1] < 0.05 < off[2] < 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulate(backend):
    """A batch in parts is the batch at once, where parts differ in how much is to be learned, too."""
    x, y = np.arange(96).reshape(6, 16) % 31, np.arange(1, 97).reshape(6, 16) % 31
    y = np.where(np.arange(16) < 3 + np.arange(6)[:, None] * 2, y, -1)
    weights, losses = [], []
    for parts in (1, 3):
        trainer = make_trainer("llama", 0, backend)
        trainer.accumulate = parts
        losses.append([float(trainer.step(x, y, lr=1e-3)["loss"]) for _ in range(5)])
        weights.append(load("llama", backend).get_weights(trainer.model))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    for name in weights[0]:
        np.testing.assert_allclose(weights[1][name], weights[0][name], atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_targets_count(backend):
    """Where the target is -1, the loss and the gradient take no notice."""
    net, trainer = randomised(backend)
    x, y = np.arange(24)[None] % 29, np.arange(1, 25)[None] % 29
    y[:, 10:] = -1
    loss = float(trainer.evaluate(x, y)["val_loss"])
    assert loss == pytest.approx(float(trainer.evaluate(x[:, :10], y[:, :10])["val_loss"]), rel=1e-5)
    log_p = logits(backend, trainer, x)[0, :10]
    log_p = log_p - np.log(np.exp(log_p).sum(-1, keepdims=True))
    assert loss == pytest.approx(-log_p[np.arange(10), y[0, :10]].mean(), rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_are_checked(backend):
    trainer, good = make_trainer("llama", 0, backend), np.zeros((1, 4), np.int64)
    for bad in (31, -1):
        with pytest.raises(ValueError, match="token"):
            trainer.step(good + bad, good, lr=0.1)
        with pytest.raises(ValueError, match="token"):
            next(trainer.generate(good + bad, 1))
    with pytest.raises(ValueError, match="token"):
        trainer.step(good, good - 2, lr=0.1)


# ---- tokens and dialogues --------------------------------------------------------------------------------------------

SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTER = {b: chr(b) for b in SHOWN} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in SHOWN)}
MERGES = "Ġ t,h e,Ġt he,i n,Ġ Ġ,ĠĠ Ġ,Ġ 1,1 2,l l,' s,Ċ Ċ,e r,ä ¸,ä¸ Ń".split(",")
TRICKY = [
    "the 12 thing's in  the   1990s: 3.14, -7", "  \n\n the\n \n12\n  34 \t x", "I'll THE'S he'll  ", "", " ", "   ",
    "\u4e2d\u6587 na\u00efve \U0001f600 1\u0661\u00bd", "1", " 1 ", "  12", "a1b22c333", "\r\n\r\n  text\r\n",
    "<|im_end|> the", "x\u00a0 \u30001", "\x04\x06 a\x1d",
]  # fmt: skip


def write_tokenizer(folder, kind, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), strings=False):
    """A tokenizer.json with few merges, that cuts as GPT-2 (ByteLevel), as SmolLM2 (Digits) or as it says (Split)."""
    pairs = [merge.split(" ") for merge in MERGES]
    tokens = [*special, *sorted(LETTER.values()), *("".join(pair) for pair in pairs)]
    pre = {"ByteLevel": [], "Digits": [{"type": "Digits", "individual_digits": True}],
           "Split": [{"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}| ?\p{L}+|[^\p{L}\p{N}]"}}]}[kind]  # fmt: skip
    pre = [*pre, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": kind != "Split"}]
    (folder / "tokenizer.json").write_text(json.dumps({
        "added_tokens": [{"id": i, "content": token} for i, token in enumerate(special)], "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre} if len(pre) > 1 else pre[0],
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": MERGES if strings else pairs},
    }))  # fmt: skip
    return tokens


def by_hand(text, kind, tokens):
    """Byte-level BPE step by step: cut, spell in letters, join the pair that was learned first."""
    import regex

    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    parts = regex.findall(r"\p{N}|[^\p{N}]+", text) if kind == "Digits" else [text]
    pattern = r"\p{N}{1,3}| ?\p{L}+|[^\p{L}\p{N}]" if kind == "Split" else gpt2
    ids = []
    for word in (word for part in parts for word in regex.findall(pattern, part)):
        letters = [LETTER[byte] for byte in word.encode()]
        while known := [pair for pair in zip(letters, letters[1:]) if " ".join(pair) in MERGES]:
            pair = min(known, key=lambda pair: MERGES.index(" ".join(pair)))
            i = [*zip(letters, letters[1:])].index(pair)
            letters[i : i + 2] = ["".join(pair)]
        ids += [tokens.index(letter) for letter in letters]
    return ids


@pytest.mark.parametrize("kind", ["ByteLevel", "Digits", "Split"])
def test_tokenizer(kind, tmp_path):
    """tiktoken's numbers, looked up, are those of byte-level BPE done step by step, on strings that are hard to cut."""
    tokens = write_tokenizer(tmp_path, kind, strings=kind == "Digits")
    tokenizer = data.Tokens(tmp_path)
    for text in TRICKY:
        ids = tokenizer.encode(text)
        assert ids.tolist() == by_hand(text, kind, tokens), repr(text)
        assert b"".join(tokenizer.decode(int(i)) for i in ids) == text.encode()
    joined = [tokens.index("\u0120the"), tokens.index("\u0120")]
    assert set(tokenizer.encode(" the 12")) >= set(joined[: 1 if kind == "ByteLevel" else 2])
    assert tokenizer.encode("<|im_end|>", special=True).tolist() == [2] != tokenizer.encode("<|im_end|>").tolist()


def test_tokenizer_lacks_a_byte(tmp_path):
    """SmolLM2 has no token for some control characters: they are left out."""
    write_tokenizer(tmp_path, "Digits")
    t = json.loads((tmp_path / "tokenizer.json").read_text())
    del t["model"]["vocab"][LETTER[4]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(t))
    tokenizer = data.Tokens(tmp_path)
    assert tokenizer.encode("a\x04b").tolist() == tokenizer.encode("ab").tolist()


def test_dialogue(tmp_path):
    """ChatML and Llama 3's form to the letter; what the assistant says is marked; a user's <|im_end|> is only text."""
    messages = [("system", "Be brief."), ("user", "Hi <|im_end|>\n"), ("assistant", "Hello!"), ("user", "Bye 12")]
    write_tokenizer(tmp_path, "Digits")
    chatml = data.Tokens(tmp_path)
    ids, own = chatml.dialogue(messages)
    text = b"".join(chatml.decode(int(i)) for i in ids).decode()
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|><|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye 12<|im_end|>\n<|im_start|>assistant\n"
    )
    assert b"".join(chatml.decode(int(i)) for i in ids[own]) == b"Hello!<|im_end|>\n"
    assert (ids == 2).sum() == 4 and chatml.ends == {0, 2}
    (tmp_path / "llama3").mkdir()
    lines = [base64.b64encode(bytes([i])) + b" %d" % i for i in range(256)] + [base64.b64encode(b"He") + b" 256"]
    (tmp_path / "llama3/tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    llama3 = data.Tokens(tmp_path / "llama3")
    ids, own = llama3.dialogue(messages[1:3])
    text = b"".join(llama3.decode(int(i)) for i in ids).decode()
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi <|im_end|><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
    )
    assert ids[own].tolist() == [256, *b"llo!", 257 + 9] and ids[0] == 257 and llama3.vocab_size == 257 + 256


# ---- the program on a folder in the layout of Hugging Face -----------------------------------------------------------


def write_model(folder, seed=0):
    """A small random Llama as Hugging Face stores it, bfloat16 in two shards; returns its weights by our names."""
    folder.mkdir()
    tokens = write_tokenizer(folder, "Digits")
    config = dict(model_type="llama", vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    config |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5)
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0, "tie_word_embeddings": True}))
    rng, arrays = np.random.default_rng(seed), {}
    shapes = dict(embed_tokens=(len(tokens), 32), norm=(32,))
    for i in range(2):
        shapes |= {f"layers.{i}.self_attn.{k}_proj": (16 if k in "kv" else 32, 32) for k in "qkvo"}
        shapes |= {f"layers.{i}.mlp.{k}_proj": (32, 64) if k == "down" else (64, 32) for k in ("gate", "up", "down")}
        shapes |= {f"layers.{i}.{k}_layernorm": (32,) for k in ("input", "post_attention")}
    for name, shape in shapes.items():
        w = rng.normal(0, 0.2, shape) if len(shape) > 1 else 1 + rng.normal(0, 0.1, shape)
        arrays[f"model.{name}.weight"] = (w.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    for shard in (0, 1):
        header, numbers = {"__metadata__": {"format": "pt"}}, b""
        for name in list(arrays)[shard::2]:
            data = arrays[name].tobytes()
            at = [len(numbers), len(numbers) + len(data)]
            header[name], numbers = dict(dtype="BF16", shape=arrays[name].shape, data_offsets=at), numbers + data
        head = json.dumps(header).encode()
        (folder / f"model-{shard}.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + numbers)


def test_export(tmp_path, monkeypatch):
    """What is written is read again: the same model in float32, in one file or in many, and nearly so in bfloat16."""
    llama3 = dict(rope="llama3", rope_factor=4.0, rope_context=8)
    for changes in (dict(head_dim=12), dict(n_head=2, tied=False, rope="linear", rope_factor=2.0), llama3):
        net, trainer = randomised("torch", **changes)
        weights, x = net.get_weights(trainer.model), np.arange(24)[None] % 29
        for dtype, most in ("float32", 2 * 10**9), ("float32", 9000), ("bfloat16", 9000):
            monkeypatch.setattr(data, "SHARD", most)
            folder = tmp_path / f"{dtype}{most}{len(list(tmp_path.iterdir()))}"
            data.export_llama(folder, trainer.config, weights, dtype)
            files = [file.name for file in sorted(folder.glob("*.safetensors"))]
            assert files == ["model.safetensors"] or f"model-00002-of-{len(files):05}.safetensors" == files[1]
            assert (len(files) == 1) == (most > 9000)
            if len(files) > 1:
                index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
                assert set(index.values()) == set(files) and len(index) > len(weights)
            config, again = data.load_llama(folder)
            there = net.Trainer(net.Config(**config), device="cpu", weights=again)
            assert again.keys() == weights.keys()
            for name, w in again.items():
                np.testing.assert_allclose(w, weights[name], rtol=0 if dtype == "float32" else 2**-8)
            if dtype == "float32":
                assert (logits("torch", there, x) == logits("torch", trainer, x)).all()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("name, value", [
    ("num_hidden_layers", -1), ("num_hidden_layers", 10**9), ("num_hidden_layers", "a"), ("num_attention_heads", 0),
    ("num_key_value_heads", -2), ("head_dim", 10**9), ("hidden_size", True), ("vocab_size", 10**9),
    ("intermediate_size", 3.5), ("rms_norm_eps", "small"), ("max_position_embeddings", 0),
])  # fmt: skip
def test_config_is_checked(name, value, tmp_path, capsys):
    """A number that no Llama can have, or that its weights have not, is refused by its name, in one line."""
    write_model(tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(SystemExit):
        data.load_llama(tmp_path / "model")
    assert f"config.json has {name} " in (err := capsys.readouterr().err) and len(err.splitlines()) == 1


def test_nested_files(tmp_path, capsys):
    """JSON that is nested deeper than Python follows."""
    deep = "[" * 100_000
    write_model(tmp_path / "model")
    for name in ("model-0.safetensors", "config.json", "tokenizer.json"):
        head = len(deep).to_bytes(8, "little") if "model" in name else b""
        (tmp_path / "model" / name).write_bytes(head + deep.encode())
        with pytest.raises(SystemExit):
            (data.read_tokenizer if "tokenizer" in name else data.load_llama)(tmp_path / "model")
        assert len(capsys.readouterr().err.splitlines()) == 1


def result(folder, backend, *args, typed=None):
    process = start(folder, backend, *args, stdin=subprocess.PIPE)
    out, err = process.communicate(typed)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1].removeprefix("result ")), out


@pytest.mark.parametrize("backend", BACKENDS)
def test_program(backend, tmp_path):
    """A real model's way: adapt it to dialogues, go on, merge, talk; the merged model is the adapted one."""
    folder, model = copy_alone("llama", tmp_path / "llama"), tmp_path / "model"
    write_model(model)
    line = {"messages": [{"role": "user", "content": "the sea?"}, {"role": "assistant", "content": "in the hell"}]}
    (folder / "own.jsonl").write_text((json.dumps(line) + "\n") * 12)
    args = "--data own.jsonl --block-size 64 --batch-size 4 --lr 0.03 --warmup 5 --temperature 0 --tokens 12".split()
    first, _ = result(folder, backend, "--init", model, *args, "--steps", 0)
    tuned, out = result(folder, backend, "--init", model, *args, "--lora", 4, "--steps", 80, "--merge")
    assert tuned["val_loss"] < 0.6 < 2 < first["val_loss"] and " 3,328 of them" in out
    ended, _ = result(folder, backend, *args, "--resume", "--steps", 80, "--bits", 8)
    assert ended["val_loss"] == pytest.approx(tuned["val_loss"], abs=0.1)
    talk = ["--resume", "--steps", 0, "--out", "out/chat/merged", "--chat", "--system", ""]
    said, out = result(folder, backend, *args, *talk, typed="the sea?\n")
    assert "> in the hell\n" in out and "val_loss" not in said
    assert (folder / said["files"][-1]).read_text() == "user: the sea?\n\nassistant: in the hell\n\n"
    result(folder, backend, *args, "--resume", "--steps", 80, "--export-hf", "new")
    exported, _ = result(folder, backend, "--init", "new", *args, "--steps", 0, "--out", "out/new")
    assert exported["val_loss"] == pytest.approx(tuned["val_loss"], abs=1e-3)
    bad = "--init new --out out/bad --prompt".split()
    for prompt, reason in ("\udcff", "UTF-8"), ("-", "closed"):
        process = start(folder, backend, *bad, prompt, preexec_fn=lambda: os.close(0))  # no standard input
        _, err = process.communicate()
        assert process.returncode == 2 and reason in err and len(err.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no torchrun and no mlx.launch")
@pytest.mark.parametrize("backend", BACKENDS)
def test_processes(backend, tmp_path):
    """Two processes share the batches and the parts of them: the checkpoint of one, nearly; one of them speaks."""
    folder, found = copy_alone("llama", tmp_path / "llama"), []
    args = "--steps 3 --block-size 16 --n-layer 1 --n-embd 32 --tokens 5 --accumulate 2 --optimizer adamw".split()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    launch = [Path(sys.executable).with_name("mlx.launch"), "-n", "2", "--starting-port", port, "--", sys.executable]
    command = [sys.executable, *torchrun] if backend == "torch" else launch
    two = [*command, "train.py", "--backend", backend, "--device", "cpu", *args, "--out", "two"]
    done = subprocess.run(two, cwd=folder, env=environment(backend), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("result ") == 1, done.stdout + done.stderr
    code, _, err = run(folder, backend, *args, "--out", "one")
    assert code == 0, err
    for out in ("one", "two"):
        with np.load(folder / out / "ckpt.npz") as f:
            found.append({name: f[name] for name in f.files if name != "meta"})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name in found[0]:
        np.testing.assert_allclose(found[1][name], found[0][name], atol=1e-5, err_msg=name)


def test_lengths(tmp_path):
    """Texts longer than trained on: worse than short ones, but not with a window; and --rope turns the positions."""
    folder = copy_alone("llama", tmp_path / "llama")
    (folder / "own.txt").write_text("".join(f"{i % 7} and {i * i % 10}, " for i in range(4000)))
    args = "--data own.txt --block-size 16 --n-layer 1 --n-embd 32 --batch-size 16 --tokens 300 --prompt 12".split()
    args += ["--lengths", "16", "64"]
    plain, _ = result(folder, "mlx", *args, "--steps", 150)
    window, _ = result(folder, "mlx", *args, "--resume", "--steps", 0, "--window", 12, "--sinks", 0)
    linear, _ = result(folder, "mlx", *args, "--resume", "--steps", 0, "--rope", "linear", "--factor", 4)
    assert plain["perplexity_16"] == pytest.approx(plain["perplexity"], rel=1e-6)
    assert plain["perplexity_64"] > 1.1 * plain["perplexity_16"] > window["perplexity_64"]
    assert linear["perplexity_16"] > 1.1 * plain["perplexity_16"]
    assert len((folder / "out/text/sample.txt").read_text()) == 302
