"""What gpt/ and llama/ both do: released models, the cache, sampling, bfloat16; and, with transformer/, their steps."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import BACKENDS, load, load_file, make_task, make_trainer
from test_parity import array

GOLDEN = Path(__file__).parent / "golden"
BOTH = pytest.mark.parametrize("name, backend", [(name, backend) for name in ("gpt", "llama") for backend in BACKENDS])
SMALL = {
    "gpt": dict(block_size=24, vocab_size=29, n_layer=2, n_head=2, n_embd=16),
    "llama": dict(block_size=24, vocab_size=29, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=64),
    "transformer": dict(length=24, src_vocab=29, tgt_vocab=29, n_layer=2, n_head=2, width=16),
}


def randomised(name, backend, scale=0.3, **changes):
    """The folder's module and a Trainer whose small model has every parameter random, biases and norms too."""
    net = load(name, backend)
    trainer = net.Trainer(net.Config(**SMALL[name] | changes), device="cpu")
    rng, weights = np.random.default_rng(4), sorted(net.get_weights(trainer.model).items())
    net.set_weights(trainer.model, {key: rng.normal(0, scale, w.shape).astype(np.float32) for key, w in weights})
    return net, trainer


def logits(backend, model, idx, *cache):
    return np.array(model(array(backend, idx), *cache).tolist())


# ---- the models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, golden", [("gpt", "gpt2-tiny"), ("llama", "llama-tiny"), ("llama", "llama3-tiny")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(name, golden, backend):
    """A model from disk: logits and greedy tokens as transformers 5.23 computes them, llama3's positions too."""
    net, data = load(name, backend), load_file(name, "data")
    config, weights = (data.read_model if name == "gpt" else data.load_llama)(GOLDEN / golden)
    trainer = net.Trainer(net.Config(**config.get("config", config)), device="cpu")
    net.set_weights(trainer.model, weights)
    with np.load(GOLDEN / golden / "expected.npz") as expected:
        ids, theirs, greedy = expected["ids"].astype(np.int64), expected["logits"], expected["greedy"]
    np.testing.assert_allclose(logits(backend, trainer.model, ids), theirs, atol=1e-4, rtol=0)
    new = [int(token[0]) for token in trainer.generate(ids[:1, :5], 12, temperature=0)]
    assert [*ids[0, :5], *new] == greedy.tolist()


@pytest.mark.parametrize("name, size, vocab, millions", [
    ("gpt", "gpt2", 50257, 124.4), ("gpt", "gpt2-xl", 50257, 1557.6), ("llama", "135M", 49152, 134.5),
    ("llama", "1B", 128256, 1235.8), ("llama", "7B", 32000, 6738.4), ("llama", "8B", 128256, 8030.3),
])  # fmt: skip
def test_sizes(name, size, vocab, millions):
    """The released sizes, to which LoRA of rank 8 adds less than 2 %."""
    net, sizes = load(name, "torch"), load_file("gpt", "train").GPT2 | load_file("llama", "data").SIZES
    kind, more = (net.GPT, {}) if name == "gpt" else (net.Llama, dict(lora_rank=8))
    with torch.device("meta"):
        model = kind(net.Config(vocab_size=vocab, **sizes[size], **more))
    counts = {key: p.numel() for key, p in model.named_parameters()}
    added = sum(n for key, n in counts.items() if "lora" in key)
    assert (sum(counts.values()) - added) / 1e6 == pytest.approx(millions, abs=0.05)
    assert added < 0.02e6 * millions and (added > 0) == (name == "llama")


@BOTH
def test_start(name, backend):
    """GPT-2's initial scales, smaller where weights add to the stream; norms 1, biases 0; LoRA's A small, its B 0."""
    net, more = load(name, backend), dict(n_kv_head=2, n_hidden=96, lora_rank=8, tied=False)
    shape = dict(block_size=8, vocab_size=99, n_layer=8, n_head=4, n_embd=64, **(more if name == "llama" else {}))
    trainer = net.Trainer(net.Config(**shape))
    assert trainer.device == net.devices()[0]
    for key, w in net.get_weights(trainer.model).items():
        kind = key.split(".")[-1]
        std = {"lora_a": w.shape[-1] ** -0.5, "lora_b": 0.0}.get(kind, 0.02 * (w.ndim == 2))
        std *= 0.25 if key.endswith(("c_proj.weight", "o_proj.weight", "down_proj.weight")) else 1  # 1 / sqrt(2 * 8)
        assert w.std() == pytest.approx(std, rel=0.1), key
        assert abs(w.mean() - (w.ndim == 1 and kind == "weight")) < 0.02, key


@pytest.mark.parametrize("name, counts", [("gpt", (5, 5, 3)), ("llama", (5, 5, 5)), ("transformer", (12, 7, 5, 6))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_norms(name, backend, counts):
    """Every norm by hand, of numbers so close to each other that the 1e-5 added to their variance matters."""
    for i, n in enumerate(counts):
        trainer = make_trainer(name, i, backend)
        norms = [part for part in trainer.model.modules() if type(part).__name__ in ("LayerNorm", "RMSNorm")]
        width = trainer.config.width if name == "transformer" else trainer.config.n_embd
        x = 0.003 * np.random.default_rng(i).standard_normal((2, width), np.float32)
        centred = x - (0 if name == "llama" else x.mean(1, keepdims=True))
        expected = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        assert len(norms) == n
        for norm in norms:
            np.testing.assert_allclose(norm(array(backend, x)).tolist(), expected, rtol=1e-3, atol=1e-4)


@BOTH
def test_cache(name, backend):
    """Prefill, single tokens and chunks with the cache give the logits of the whole text computed at once."""
    net, trainer = randomised(name, backend)
    idx = np.random.default_rng(0).integers(0, 29, (3, 24))
    whole = logits(backend, trainer.model, idx)
    for chunks in [24], [1] * 24, [5, 1, 2, 6, 10], [23, 1]:
        cache, at = net.KVCache(trainer.model, 3, *([24] if name == "llama" else [])), 0
        held = cache.k + cache.v if name == "llama" else cache.kv
        before = [*map(id, held)]
        for n in chunks:
            at += n
            new = logits(backend, trainer.model, idx[:, at - n : at], cache)
            np.testing.assert_allclose(new, whole[:, at - 1 : at], atol=1e-4)
        assert cache.length == 24 and [*map(id, held)] == before
    assert sum(a.nbytes for a in held) == 4 * 2 * 2 * 3 * 24 * 16  # k and v, layers, rows, positions, all heads


# ---- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(), dict(temperature=1.5, top_k=20, top_p=0.9)])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_sampling_is_the_same(name, options):
    """The same uniform numbers pick the same tokens in both frameworks, and the seed others."""
    trainers = [randomised(name, backend)[1] for backend in (*BACKENDS, "torch")]
    prompt = np.array([[1, 2, 3]] * 8)
    a, b, other = (
        np.stack(list(trainer.generate(prompt, 20, seed=seed, **options))) for trainer, seed in zip(trainers, (5, 5, 6))
    )
    assert len(np.unique(a)) > 3 and (a == b).mean() > 0.99 and (a[:10] == b[:10]).all() and (a != other).any()


@BOTH
def test_sample(name, backend):
    """Evenly spaced u reproduce softmax(logits / temperature), cut to top-k and top-p and scaled to 1."""
    net, n = load(name, backend), 20000
    logits = np.array([2.0, -1.0, 1.0, 0.5, -3.0, 1.9], np.float32)
    u = ((np.arange(n) + 0.5) / n).astype(np.float32)

    def shares(temperature=1.0, top_k=6, top_p=1.0):
        rows = array(backend, np.tile(logits, (n, 1)))
        tokens = net.sample(rows, array(backend, u), temperature, top_k, top_p)
        return np.bincount(np.array(tokens.tolist()), minlength=6) / n

    def softmax(z):
        return np.exp(z) / np.exp(z).sum()

    p = softmax(logits)
    np.testing.assert_allclose(shares(), p, atol=2e-4)
    np.testing.assert_allclose(shares(temperature=0.5), softmax(logits / 0.5), atol=2e-4)
    assert shares(temperature=0)[0] == 1 and shares(top_k=1)[0] == 1 and shares(top_p=0.01)[0] == 1
    kept = np.where(np.isin(np.arange(6), [0, 5, 2]), p, 0)
    assert p[[0, 5]].sum() < 0.8 < p[[0, 5, 2]].sum()
    for cut in dict(top_k=3), dict(top_p=0.8):
        np.testing.assert_allclose(shares(**cut), kept / kept.sum(), atol=2e-4)
    even = net.sample(array(backend, np.zeros((n, 2), np.float32)), array(backend, u), 1.0, 2, 0.5)
    assert len(np.unique(even.tolist())) == 1  # one of two holds half


# ---- steps -----------------------------------------------------------------------------------------------------------


def weighed(name, model, seed):
    """A batch for Trainer.step of which not all tokens count, and its loss, by a model in torch."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(3 if name == "transformer" else 0, 29, (2, 4, 24))
    counts = np.arange(24) < 3 + np.arange(4)[:, None] * 6
    if name == "transformer":
        return (x * counts, y * counts), model.loss(*map(torch.from_numpy, (x * counts, y * counts)))[0]
    weights = (counts / counts.sum() * (1 if name == "llama" else rng.normal(1, 1, x.shape))).astype(np.float32)
    nll = F.cross_entropy(model(torch.from_numpy(x)).mT, torch.from_numpy(y), reduction="none")
    batch = (x, np.where(counts, y, -1)) if name == "llama" else (x, y, weights)
    return batch, (nll * torch.from_numpy(weights)).sum()


@pytest.mark.parametrize("optimizer, scale, parts", [("muon", 3.0, 3), ("adamw", 0.1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SMALL)
def test_steps(name, backend, optimizer, scale, parts, monkeypatch):
    """Steps are those of torch.optim, Muon of the blocks' matrices, on a weighted sum, in parts or at once.

    A gradient longer than 1 is made 1 long.
    """
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's Muon rounds to 8 bits
    options = dict(weight_decay=0.2, optimizer=optimizer) | (dict(tied=False) if name == "llama" else {})
    (net, trainer), (twin, other) = (randomised(name, which, **options) for which in (backend, "torch"))
    start, model, trainer.accumulate = net.get_weights(trainer.model), other.model, parts
    start = {key: scale * w if key in ("ln_f.weight", "norm.weight", "decoder.norm.weight") else w
             for key, w in start.items()}  # fmt: skip
    net.set_weights(trainer.model, start)
    twin.set_weights(model, start)
    kinds = {"vectors": [], "matrices": [], "muon": []}
    for key, p in model.named_parameters():
        in_block = optimizer == "muon" and any(part in key for part in ("h.", "layers.", "blocks."))
        kinds["vectors" if p.ndim == 1 else "muon" if in_block else "matrices"].append(p)
    groups = [dict(params=kinds["vectors"], weight_decay=0.0), dict(params=kinds["matrices"], weight_decay=0.2)]
    rules = [torch.optim.AdamW(groups, 0.02, betas=(0.9, 0.99))]
    if optimizer == "muon":
        muon = dict(lr=0.02, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")
        rules.append(torch.optim.Muon(kinds["muon"], **muon))
    for seed in range(3):
        model.zero_grad()
        batch, loss = weighed(name, model, seed)
        assert float(trainer.evaluate(*batch)["val_loss"]) == pytest.approx(loss.item(), rel=1e-4)
        assert float(trainer.step(*batch, lr=0.02)["loss"]) == pytest.approx(loss.item(), rel=1e-4)
        loss.backward()
        length = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert 1.1 < length if scale > 1 else 0.01 < length < 0.6
        for rule in rules:
            rule.step()
    ours, theirs = net.get_weights(trainer.model), twin.get_weights(model)
    for key, p in model.named_parameters():
        state = next(rule.state[p] for rule in rules if p in rule.state)
        m = state.get("exp_avg", state.get("momentum_buffer")).numpy()
        some = slice(16 if key.endswith("c_attn.bias") else None)  # nothing depends on the bias of the keys
        for a, b in (ours[key] - start[key], theirs[key] - start[key]), (np.array(trainer.m[key].tolist()), m):
            assert np.linalg.norm((a - b)[some]) < 0.002 * np.linalg.norm(b[some]), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, more", [("gpt", {}), ("llama", {}), ("llama", dict(lora_rank=3))])
def test_options(name, backend, more, monkeypatch):
    """bfloat16 changes the loss a little, and no type; compiling changes nothing; all learn, or LoRA's matrices alone.

    Of torch's compiler only the first half is used: the second takes a minute.
    """
    used, compilers = [], (torch.compile, mx.compile)
    monkeypatch.setattr(torch, "compile", lambda f: used.append(f) or compilers[0](f, backend="aot_eager"))
    monkeypatch.setattr(mx, "compile", lambda f, **more: used.append(f) or compilers[1](f, **more))
    x, losses, net = np.arange(48).reshape(2, 24) % 29, [], load(name, backend)
    can = not more and (backend == "torch" or shutil.which("g++"))  # which MLX compiles with on the CPU
    for options in ({}, dict(dtype="bfloat16"), dict(compile=True))[: 3 if can else 2]:
        base = randomised(name, backend, 0.1, n_layer=1, **more)[1]
        trainer, before = net.Trainer(base.config, device="cpu", **options), net.get_weights(base.model)
        net.set_weights(trainer.model, before)
        losses.append([float(trainer.step(x, (x + 1) % 29, lr=1e-3)["loss"]) for _ in range(3)])
        assert len(used) == ("compile" in options)
        after, learn = net.get_weights(trainer.model), getattr(net, "trained", net.get_weights)(trainer.model).keys()
        assert all("float32" in str(a.dtype) for a in (*after.values(), *trainer.m.values()))
        assert {key for key in after if (after[key] != before[key]).any()} == learn == trainer.m.keys()
    assert losses[0] != losses[1]
    for other, rtol in zip(losses[1:], (0.02, 1e-5)):
        np.testing.assert_allclose(other, losses[0], rtol=rtol)


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_prompts_that_are_none(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)  # as Python has it when the standard input is closed
    for prompt, reason in ("a\udcff", "UTF-8"), ("-", "closed"):
        with pytest.raises(SystemExit):
            make_task(name, "--prompt", prompt)
        assert reason in (err := capsys.readouterr().err) and len(err.splitlines()) == 1
