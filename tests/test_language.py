"""What gpt/ and llama/ share: released models, cache, sampling, bfloat16; with transformer/: layers, starts, steps."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import BACKENDS, CASES, load, load_file, make_trainer
from test_parity import array

GOLDEN = Path(__file__).parent / "golden"
BOTH = pytest.mark.parametrize("name, backend", [(name, backend) for name in ("gpt", "llama") for backend in BACKENDS])
SMALL = {
    "gpt": dict(block_size=24, vocab_size=29, n_layer=2, n_head=2, n_embd=16),
    "llama": dict(block_size=24, vocab_size=29, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=64),
    "transformer": dict(length=24, src_vocab=29, tgt_vocab=29, n_layer=2, n_head=2, width=16),
}
# of FOLDERS' configs, made larger, so that the spread of their numbers is known well
LARGER = {"gpt": dict(n_layer=8, n_embd=48), "llama": dict(n_layer=8, n_embd=64, n_hidden=96, lora_rank=8),
          "transformer": dict(n_layer=2, n_head=2, width=48)}  # fmt: skip


def randomised(name, backend, scale=0.3, **changes):
    """The folder's module and a Trainer whose small model has every parameter random, biases and norms too."""
    net = load(name, backend)
    trainer = net.Trainer(net.Config(**SMALL[name] | changes), device="cpu")
    rng, weights = np.random.default_rng(4), sorted(net.get_weights(trainer.model).items())
    net.set_weights(trainer.model, {key: rng.normal(0, scale, w.shape).astype(np.float32) for key, w in weights})
    return net, trainer


def logits(backend, model, *arrays, **cache):
    return np.array(model(*(array(backend, a) for a in arrays), **cache).tolist())


@pytest.mark.parametrize("name, changes", [
    ("gpt", {}), ("gpt", dict(bias=False)),
    ("transformer", {}), ("transformer", dict(norm="post", positions="learned")),
])  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_builtin(name, changes, backend):
    """The framework's own layers with the same weights give the same logits, also where a source is padded."""
    net, trainer = randomised(name, backend, **changes)
    src, tgt = np.random.default_rng(0).integers(3, 29, (2, 3, 24))
    src[0, 15:] = 0
    ids, kind = ([tgt], net.BuiltinGPT) if name == "gpt" else ([src, tgt], net.BuiltinSeq2Seq)
    ours, theirs = (logits(backend, model, *ids) for model in (trainer.model, kind(trainer.model)))
    assert ours.std() > 0.1
    np.testing.assert_allclose(theirs, ours, atol=1e-4, rtol=1e-4)


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


@pytest.mark.parametrize("name, i", [case for case in CASES if case[0] in LARGER])
@pytest.mark.parametrize("backend", BACKENDS)
def test_start(name, i, backend):
    """Matrices have the spread that init_weights names, less where they add to the stream; norms are 1, biases 0."""
    net, trainer = load(name, backend), make_trainer(name, i, backend, device=None, **LARGER[name])
    weights = net.get_weights(trainer.model)
    assert trainer.device == net.devices()[0]
    for key, w in weights.items():
        if w.ndim == 2:
            small = name != "transformer" or key.endswith(("embed.weight", "positions.weight"))
            std = 0.02 if small and not key.endswith("lora_a") else w.shape[1] ** -0.5
            added = key.endswith(("c_proj.weight", "o_proj.weight", "down_proj.weight", "out.weight", "fc2.weight"))
            std *= 0 if key.endswith("lora_b") else (2 * trainer.config.n_layer) ** -0.5 if added else 1
            assert w.std() == pytest.approx(std, rel=min(0.1, 4 / np.sqrt(2 * w.size))), key
            assert abs(w.mean()) < 0.02, key
        elif key == "logit_scale":
            assert w == pytest.approx(np.log(1 / 0.07))
        else:
            assert (w == key.endswith("weight")).all(), key
            assert name != "transformer" or not any(part in key for part in ("attn", "cross", "_proj")), key
    # every norm by hand, of numbers so close to each other that the 1e-5 added to their variance matters
    norms = [part for part in trainer.model.modules() if type(part).__name__ in ("LayerNorm", "RMSNorm")]
    assert len(norms) == ((12, 12, 5, 10)[i] if name == "transformer" else 17)  # of 2 layers; of 8
    x = 0.003 * np.random.default_rng(i).standard_normal((2, len(norms[0].weight)), np.float32)
    centred = x - (0 if name == "llama" else x.mean(1, keepdims=True))
    expected = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    for norm in norms:
        np.testing.assert_allclose(norm(array(backend, x)).tolist(), expected, rtol=1e-3, atol=1e-4)


@BOTH
def test_cache(name, backend):
    """Prefill, single tokens and chunks with the cache give the logits of the whole text computed at once."""
    (net, trainer), idx = randomised(name, backend), np.random.default_rng(0).integers(0, 29, (3, 24))
    whole = logits(backend, trainer.model, idx)
    for chunks in [24], [1] * 24, [5, 1, 2, 6, 10], [23, 1]:
        cache, at = net.KVCache(trainer.model, 3, *([24] if name == "llama" else [])), 0
        held = cache.k + cache.v if name == "llama" else cache.kv
        before = [*map(id, held)]
        for n in chunks:
            at += n
            new = logits(backend, trainer.model, idx[:, at - n : at], cache=cache)
            np.testing.assert_allclose(new, whole[:, at - 1 : at], atol=1e-4)
        assert cache.length == 24 and [*map(id, held)] == before
    assert sum(a.nbytes for a in held) == 4 * 2 * 2 * 3 * 24 * 16  # k and v, layers, rows, positions, all heads


@pytest.mark.parametrize("options", [dict(), dict(temperature=1.5, top_k=20, top_p=0.9)])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_sampling_is_the_same(name, options):
    """The same uniform numbers pick the same tokens in both frameworks, and the seed others."""
    said, prompt = [], np.array([[1, 2, 3]] * 8)
    for backend, seed in ("torch", 5), ("mlx", 5), ("torch", 6):
        said.append(np.stack(list(randomised(name, backend)[1].generate(prompt, 20, seed=seed, **options))))
    a, b, other = said
    assert len(np.unique(a)) > 3 and (a == b).mean() > 0.99 and (a[:10] == b[:10]).all() and (a != other).any()


@BOTH
def test_sample(name, backend):
    """Evenly spaced u reproduce softmax(logits / temperature), cut to top-k and top-p and scaled to 1."""
    net, n = load(name, backend), 20000
    u = array(backend, ((np.arange(n) + 0.5) / n).astype(np.float32))
    likely = np.array([2.0, -1.0, 1.0, 0.5, -3.0, 1.9], np.float32)

    def shares(logits=likely, temperature=1.0, top_k=6, top_p=1.0):
        tokens = net.sample(array(backend, np.tile(logits, (n, 1))), u, temperature, top_k, top_p)
        return np.bincount(np.array(tokens.tolist()), minlength=len(logits)) / n

    p, sharp = (np.exp(z) / np.exp(z).sum() for z in (likely, likely / 0.5))
    np.testing.assert_allclose(shares(), p, atol=2e-4)
    np.testing.assert_allclose(shares(temperature=0.5), sharp, atol=2e-4)
    assert shares(temperature=0)[0] == 1 and shares(top_k=1)[0] == 1 and shares(top_p=0.01)[0] == 1
    kept = np.where(np.isin(np.arange(6), [0, 5, 2]), p, 0)
    assert p[[0, 5]].sum() < 0.8 < p[[0, 5, 2]].sum()
    for cut in dict(top_k=3), dict(top_p=0.8):
        np.testing.assert_allclose(shares(**cut), kept / kept.sum(), atol=2e-4)
    assert set(shares(np.zeros(2, np.float32), top_p=0.5)) == {0, 1}  # one of two holds half


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


@pytest.mark.parametrize("optimizer, scale, parts", [("muon", 0.6, 3), ("adamw", 0.1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SMALL)
def test_steps(name, backend, optimizer, scale, parts, monkeypatch):
    """Steps are torch.optim's, Muon's for the blocks' matrices; in parts or at once; the gradient is at most 1 long."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's Muon rounds to 8 bits
    options = dict(weight_decay=0.2, optimizer=optimizer) | (dict(tied=False) if name == "llama" else {})
    (net, trainer), (_, other) = (randomised(name, which, scale, **options) for which in (backend, "torch"))
    start, params, trainer.accumulate = net.get_weights(trainer.model), dict(other.model.named_parameters()), parts
    blocks = "h.", "layers.", "encoder.blocks.", "decoder.blocks."
    large = [key for key, p in params.items() if optimizer == "muon" and p.ndim == 2 and key.startswith(blocks)]
    rest = [{"params": p, "weight_decay": 0.2 * (p.ndim > 1)} for key, p in params.items() if key not in large]
    rules = [torch.optim.AdamW(rest, 0.02, betas=(0.9, 0.99))]
    if optimizer == "muon":
        muon = dict(weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")
        rules.append(torch.optim.Muon(map(params.get, large), 0.02, **muon))
    for seed in range(3):
        other.model.zero_grad()
        batch, loss = weighed(name, other.model, seed)
        assert float(trainer.evaluate(*batch)["val_loss"]) == pytest.approx(loss.item(), rel=1e-4)
        assert float(trainer.step(*batch, lr=0.02)["loss"]) == pytest.approx(loss.item(), rel=1e-4)
        loss.backward()
        length = torch.nn.utils.clip_grad_norm_(other.model.parameters(), 1.0)
        assert 1.1 < length if optimizer == "muon" else 0.01 < length < 0.6
        for rule in rules:
            rule.step()
    ours = net.get_weights(trainer.model)
    for key, p in params.items():
        state = next(rule.state[p] for rule in rules if p in rule.state)
        m = state.get("exp_avg", state.get("momentum_buffer")).numpy()
        some = slice(16 if key.endswith("c_attn.bias") else None)  # nothing depends on the bias of the keys
        moved = ours[key] - start[key], p.detach().numpy() - start[key]
        for a, b in moved, (np.array(trainer.m[key].tolist()), m):
            assert np.linalg.norm((a - b)[some]) < 0.002 * np.linalg.norm(b[some]), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, more", [("gpt", {}), ("llama", {}), ("llama", dict(lora_rank=3))])
def test_options(name, backend, more, monkeypatch):
    """bfloat16 changes the loss a little and no type; compiling changes nothing; all learn, or only LoRA's matrices."""
    used, compilers = [], (torch.compile, mx.compile)  # of torch's only the first half: the second takes a minute
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
