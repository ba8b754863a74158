"""llama/ against transformers and closed forms: real weights, tokens, the rolling cache, LoRA, few bits, dialogues."""

import base64
import io
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
import torch
from folders import BACKENDS, FOLDERS, batches, copy_alone, load, load_file, make_task, make_trainer, run_here
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
def test_golden(backend, name):
    """A model from disk: logits and greedy tokens as transformers 5.23 computes them, llama3's positions too."""
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
    """Prefill, single tokens and chunks with the cache give the logits of the whole text computed at once."""
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
    """The rolling cache gives the same as the whole text under the window's mask, far beyond the window."""
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


@pytest.mark.parametrize("sizes", [dict(window=5, sinks=3), dict(head_dim=12, window=40, sinks=0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks(backend, sizes):
    """The rolling cache, token by token, is attention sinks as the paper has them; its memory stays."""
    net, trainer = randomised(backend, **sizes)
    expected = streamed(randomised("torch", **sizes)[1].model, idx := np.arange(40) * 7 % 29)
    cache = net.KVCache(trainer.model, 1, 10**9)
    for t, token in enumerate(idx):
        new = np.array(trainer.model(array(backend, token[None, None]), cache).tolist())
        np.testing.assert_allclose(new[0, 0], expected[t], atol=2e-3)
    reach, head_size = sizes["window"] + sizes["sinks"], sizes.get("head_dim", 8)
    assert cache.size == reach and {tuple(k.shape) for k in cache.k + cache.v} == {(1, 2, reach, head_size)}
    assert np.abs(expected[20:]).mean() > 0.4  # the error bound is far below this
    if not sizes["sinks"]:  # then the text may as well be read at once
        np.testing.assert_allclose(logits(backend, trainer, idx[None])[0], expected, atol=2e-3)


@pytest.mark.parametrize("scale, parts", [(3.0, 3), (0.1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps(backend, scale, parts, monkeypatch):
    """Steps are those of torch.optim, Muon of the blocks' matrices, on the mean of what counts, in parts or at once.

    A gradient longer than 1 is made 1 long.
    """
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's Muon rounds to 8 bits
    net, trainer = randomised(backend, tied=False, weight_decay=0.2)
    start = {name: scale * w if name == "norm.weight" else w for name, w in net.get_weights(trainer.model).items()}
    model, trainer.accumulate = randomised("torch", tied=False)[1].model, parts
    net.set_weights(trainer.model, start)
    TORCH.set_weights(model, start)
    kinds = [[], [], []]
    for name, p in model.named_parameters():
        kinds[0 if p.ndim == 1 else 1 + name.startswith("layers.")].append(p)
    groups = [dict(params=kinds[0], weight_decay=0.0), dict(params=kinds[1], weight_decay=0.2)]
    muon = dict(lr=0.02, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    rules = [torch.optim.AdamW(groups, 0.02, betas=(0.9, 0.99)), torch.optim.Muon(kinds[2], **muon)]
    for step in range(3):
        x, y = (np.random.default_rng(step + i).integers(0, 29, (4, 24)) for i in (0, 10))
        y = np.where(np.arange(24) < 3 + np.arange(4)[:, None] * 6, y, -1)
        model.zero_grad()
        logits = model(torch.from_numpy(x)).mT
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y), ignore_index=-1)
        assert float(trainer.evaluate(x, y)["val_loss"]) == pytest.approx(loss.item(), rel=1e-4)
        assert float(trainer.step(x, y, lr=0.02)["loss"]) == pytest.approx(loss.item(), rel=1e-4)
        loss.backward()
        length = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert 1.5 < length if scale > 1 else 0.01 < length < 0.5
        for rule in rules:
            rule.step()
    for name, w in net.get_weights(trainer.model).items():
        moved, expected = w - start[name], TORCH.get_weights(model)[name] - start[name]
        assert np.linalg.norm(moved - expected) < 0.01 * np.linalg.norm(expected), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_init(backend):
    """Starting weights have GPT-2's spread, less where they add to the stream; LoRA's A is small and its B is 0."""
    net = load("llama", backend)
    shape = dict(vocab_size=99, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_hidden=96)
    config = net.Config(**shape, lora_rank=8, tied=False)
    trainer = net.Trainer(config)
    assert trainer.device == net.devices()[0]
    for name, w in net.get_weights(trainer.model).items():
        std = {"lora_a": w.shape[-1] ** -0.5, "lora_b": 0.0}.get(name.split(".")[-1], 0.0 if "norm" in name else 0.02)
        std *= 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1  # over sqrt(2 n_layer)
        assert w.std() == pytest.approx(std, rel=0.1) and abs(w.mean() - ("norm" in name)) < 0.02, name


@pytest.mark.parametrize("field, good, bad", [
    ("head_dim", [8, 10, 30], [7, 9]), ("n_head", [4, 8, 16], [3, 10, 32]), ("n_kv_head", [1, 2, 4], [3, 8]),
    ("sinks", [0, 4, 23], [24, 25]),
])  # fmt: skip
def test_shapes(field, good, bad):
    """What fits no Llama is refused by name, and nothing else."""
    config = dict(block_size=24, n_head=4, n_kv_head=1, n_embd=32)
    for value in good + bad:
        for net in map(partial(load, "llama"), BACKENDS):
            with pytest.raises(ValueError, match=field) if value in bad else nullcontext():
                net.Config(**{**config, field: value})


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend, monkeypatch):
    """The compiled step gives the same losses. Only the first half of torch's compiler: the second takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    if backend == "mlx" and not shutil.which("g++"):
        pytest.skip("on the CPU MLX compiles with g++")
    net, losses = load("llama", backend), []
    for compile in (False, True):
        config = net.Config(**{**FOLDERS["llama"].configs[2], "n_layer": 1})
        trainer = net.Trainer(config, device="cpu", compile=compile)
        losses.append([float(trainer.step(*arrays, lr=1e-3)["loss"]) for arrays in batches("llama", 2, 2)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend):
    """In bfloat16 the loss differs a little; weights and moments stay float32."""
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


@pytest.mark.parametrize("size, millions", [("135M", 134.5), ("1B", 1235.8), ("7B", 6738.4), ("8B", 8030.3)])
def test_sizes(size, millions):
    """The released sizes; and of SmolLM2's parameters LoRA of rank 8 trains less than 2 %."""
    vocab = {"135M": 49152, "7B": 32000}.get(size, 128256)
    with torch.device("meta"):
        models = [TORCH.Llama(TORCH.Config(vocab_size=vocab, lora_rank=r, **data.SIZES[size])) for r in (0, 8)]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts[0] / 1e6 == pytest.approx(millions, abs=0.05)
    trained = sum(p.numel() for p in TORCH.trained(models[1]).values())
    assert trained == counts[1] - counts[0] and 0 < trained < 0.02 * counts[0]


@pytest.mark.parametrize("bits, error", [(8, 0.01), (4, 0.08)])
def test_quantized(bits, error):
    """As close to the matrix as the bits allow; and the twins nearly agree."""
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
    """The whole model in few bits is smaller and gives nearly the same."""
    x = np.arange(24)[None] % 29
    sizes, off = [], []
    for bits in (32, 8, 4):
        net, trainer = randomised(backend, n_embd=64, n_hidden=128, lora_rank=2)
        whole = logits(backend, trainer, x)
        sizes.append(trainer.quantize(bits))
        off.append(np.linalg.norm(logits(backend, trainer, x) - whole) / np.linalg.norm(whole))
    assert sizes[0] > 2.5 * sizes[1] > 3 * sizes[2] and off[0] == 0 < off[1] < 0.05 < off[2] < 0.5


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
    """A tokenizer.json with few merges, which splits like GPT-2 (ByteLevel), SmolLM2 (Digits) or its regex (Split)."""
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


# ---- the program with a folder in Hugging Face's format --------------------------------------------------------------


def write_model(folder, seed=0):
    """A small random Llama in Hugging Face's format, bfloat16 in two shards; returns its weights by our names."""
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
    """A number that is impossible for a Llama, or contradicts its weights, is refused by name, in one line."""
    write_model(tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(SystemExit):
        data.load_llama(tmp_path / "model")
    assert f"config.json has {name} " in (err := capsys.readouterr().err) and len(err.splitlines()) == 1


def test_nested_files(tmp_path, capsys):
    """JSON that is nested too deeply for Python."""
    deep = "[" * 100_000
    write_model(tmp_path / "model")
    for name in ("model-0.safetensors", "config.json", "tokenizer.json"):
        head = len(deep).to_bytes(8, "little") if "model" in name else b""
        (tmp_path / "model" / name).write_bytes(head + deep.encode())
        with pytest.raises(SystemExit):
            (data.read_tokenizer if "tokenizer" in name else data.load_llama)(tmp_path / "model")
        assert len(capsys.readouterr().err.splitlines()) == 1


def result(folder, backend, *args, typed=""):
    with mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode()))):
        code, out, err = run_here(folder, backend, *args)
    assert code == 0, err
    return json.loads(out.splitlines()[-1].removeprefix("result ")), out


@pytest.mark.parametrize("backend", BACKENDS)
def test_program(backend, tmp_path):
    """The life of a real model: adapt it to dialogues, resume, merge, chat; the merged model is the adapted one."""
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
        with mock.patch.object(sys, "stdin", None):  # as Python has it when the standard input is closed
            code, _, err = run_here(folder, backend, *bad, prompt)
        assert code == 2 and reason in err and len(err.splitlines()) == 1


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


# ---- data larger than the memory; the functions are gpt's, too -------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """A text with a character that occurs only in its last tenth, and a tokenizer."""
    write_tokenizer(tmp_path, "Digits")
    text = "".join(f"The {i} don't, {i * i % 97}-fold {'~' * (i > 1420)}\n" for i in range(1500))
    (tmp_path / "own.txt").write_text(text)
    return tmp_path / "own.txt"


@pytest.mark.parametrize("name, more", [("gpt", []), ("gpt", ["--tokenizer", "bpe", "--merges", "99"]), ("llama", [])])
def test_large_text(name, more, own, monkeypatch, capsys):
    """Its tokens, in files beside it, equal those of the text read at once; if it changes, they are made again."""
    data, args = load_file(name, "data"), [name, "--data", own, "--block-size", "8", *more]
    small = make_task(*args)
    for key, value in dict(LARGE=1000, PIECE=1 << 22 if more else 777, MEASURED=800).items():
        monkeypatch.setattr(data, key, value)
    large, (folder,) = make_task(*args), own.parent.glob("own.txt.*")
    assert " MB" in capsys.readouterr().err and {file.name for file in folder.iterdir()} == {"train.bin", "val.bin"}
    for part in ("train", "val"):
        ids = getattr(large, part)
        assert isinstance(ids, data.TokenFile) and (ids[np.arange(len(ids))] == getattr(small, part)).all()
    assert (large.config, large.tokens) == (small.config, small.tokens) and " 800 of them measured" in large.about
    whole, (large.args.rank, large.args.world) = large.batch(5), (1, 2)
    for mine, a, b in zip(large.batch(5), whole, small.batch(5)):
        assert (a == b).all() and (mine[1::2] == a[1::2]).all() and not mine[::2].any()
    rows, model = [], SimpleNamespace(**large.config)
    trainer = SimpleNamespace(evaluate=lambda x, y: rows.extend(x) or {"val_loss": 2.0}, config=model)
    assert large.evaluate(trainer, whole=True)["val_loss"] == 2.0 and 50 < len(rows) <= 100
    assert make_task(*args).extra == large.extra and not capsys.readouterr().err  # a second start writes nothing
    own.write_text("X" + own.read_text())
    assert make_task(*args).extra != large.extra and len(list(own.parent.glob("own.txt.*"))) == 2


def test_pieces(own, monkeypatch):
    """They add up to the text, and begin where tokens do, with any tokenizer; and no character is split."""
    monkeypatch.setattr(data, "PIECE", 97)
    text = "".join(f"{'thé' * (i % 3)}  {i}  the, don't 's {TRICKY[i % len(TRICKY)]}\r\n" for i in range(300))
    own.write_text(text, newline="")
    for kind in ("ByteLevel", "Digits", "Split"):
        write_tokenizer(own.parent, kind)
        found, tokenizer = list(data.pieces(own, 0, own.stat().st_size)), data.Tokens(own.parent)
        assert "".join(found) == own.read_text(encoding="utf-8") and len(found) > 100
        assert np.concatenate(list(map(tokenizer.encode, found))).tolist() == tokenizer.encode("".join(found)).tolist()
    own.write_text("\U0001f600" * 50)  # four bytes each
    assert data.cut_at(own) == 180 and "".join(data.pieces(own, 180, 200)) == "\U0001f600" * 5


def test_token_files(own, monkeypatch, capsys):
    """nanoGPT's files can be used directly; other files, or tokens of another model, end with one line."""
    folder, ids = own.parent, np.arange(1000) % 250
    args = ["llama", "--tokenizer", folder, "--block-size", "8", "--data"]
    ids[:900].astype(np.uint16).tofile(folder / "train.bin")
    ids[900:].astype(np.uint16).tofile(folder / "val.bin")
    ids.astype(np.uint16).tofile(folder / "whole.bin")
    for path in (folder, folder / "whole.bin"):
        task = make_task(*args, path)
        assert (task.train[np.arange(900)] == ids[:900]).all() and (task.val[np.arange(100)] == ids[900:]).all()
        assert (np.diff(task.batch(0)[0]) % 250 == 1).all()
    bad = [
        ("odd.bin", b"123", args), ("val.bin", b"", args), ("high.bin", np.full(999, 60000, np.uint16).tobytes(), args),
        ("whole.bin", None, ["llama", "--data"]), ("whole.bin", None, ["gpt", "--tokenizer", "chars", "--data"]),
        ("broken.txt", own.read_bytes() * 9 + b"\xff" * 9, args), ("zero.txt", own.read_bytes() * 9 + b"\0", args),
    ]  # fmt: skip
    for module in (data, load_file("gpt", "data")):
        monkeypatch.setattr(module, "LARGE", 1000)
    for file, content, command in bad:
        if content is not None:
            (folder / file).write_bytes(content)
        with pytest.raises(SystemExit):
            make_task(*command, folder if file == "val.bin" else folder / file).batch(0)
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith("train.py: ") and str(folder) in last
    assert not [file for file in folder.iterdir() if file.is_dir()]


def test_tokens_are_written_once(own, monkeypatch):
    """One of several processes writes, the others wait; if the text's folder is read-only, it writes elsewhere."""
    monkeypatch.setattr(data, "PIECE", 5000)
    monkeypatch.setattr(data.os, "access", lambda *_: False)
    monkeypatch.setenv("DATA_DIR", str(own.parent / "elsewhere"))
    encoded = []
    tokenizer = SimpleNamespace(vocab_size=70000, encode=lambda text: encoded.append(text) or np.arange(len(text)))
    with ThreadPoolExecutor() as pool:
        places = list(pool.map(lambda _: data.tokenize(own, tokenizer, "these", str), range(3)))
    assert "".join(encoded) == own.read_text() and set(places) == set((own.parent / "elsewhere").iterdir())
    assert np.fromfile(places[0] / "val.bin", np.uint32).max() > 1000
