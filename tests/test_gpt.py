"""gpt/ against GPT-2 as transformers computes it and against the frameworks' own layers; the cache; sampling; Muon."""

import argparse
import io
import json
import os
import re
import shutil
import string
import subprocess
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as mlx_nn
import mlx.optimizers as mlx_optim
import numpy as np
import pytest
import torch
import torch.nn as nn
from folders import (
    BACKENDS,
    FOLDERS,
    batches,
    copy_alone,
    environment,
    load,
    load_file,
    make_task,
    make_trainer,
    run,
    start,
)
from mlx.utils import tree_flatten

GOLDEN = Path(__file__).parent / "golden/gpt2-tiny"
TORCH, MLX = load("gpt", "torch"), load("gpt", "mlx")
DATA = load_file("gpt", "data")


def array(backend, x):
    return torch.from_numpy(np.ascontiguousarray(x)) if backend == "torch" else mx.array(x)


def randomised(backend, **changes):
    """A small GPT with every parameter random, biases and norms too."""
    net, config = load("gpt", backend), dict(block_size=24, vocab_size=29, n_layer=2, n_head=2, n_embd=16)
    model, rng = net.GPT(net.Config(**{**config, **changes})), np.random.default_rng(4)
    weights = {name: w for name, w in sorted(net.get_weights(model).items())}
    net.set_weights(model, {name: rng.normal(0, 0.3, w.shape).astype(np.float32) for name, w in weights.items()})
    return net, model


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend, tmp_path):
    """Weights of the released layout, logits and greedy tokens as transformers 5.23 computes them; and the way back."""
    net = load("gpt", backend)
    meta, weights = DATA.read_model(GOLDEN)
    trainer = net.Trainer(net.Config(**meta["config"]), device="cpu")
    net.set_weights(trainer.model, weights)
    with np.load(GOLDEN / "expected.npz") as expected:
        ids, logits, greedy = expected["ids"].astype(np.int64), expected["logits"], expected["greedy"]
    ours = trainer.model(array(backend, ids))
    ours = ours.detach().numpy() if backend == "torch" else np.array(ours)
    np.testing.assert_allclose(ours, logits, atol=1e-4, rtol=0)
    new = [int(token[0]) for token in trainer.generate(ids[:1, :5], 12, temperature=0)]
    assert [*ids[0, :5], *new] == greedy.tolist()
    meta["config"] = vars(trainer.config)
    DATA.export_gpt2(tmp_path, meta, net.get_weights(trainer.model))
    there, back = dict(DATA.read_safetensors(GOLDEN)), dict(DATA.read_safetensors(tmp_path))
    assert there.keys() == back.keys() and all((back[name] == w).all() for name, w in there.items())
    theirs, own = (json.loads((folder / "config.json").read_text()) for folder in (GOLDEN, tmp_path))
    same = {"model_type", "architectures", "n_positions", "vocab_size", "n_layer", "n_head", "n_embd"}
    assert all(own[name] == theirs[name] for name in same)


def test_shards_and_types(tmp_path):
    """Several files, half precision, mask buffers, a head of its own and names without a prefix: all are read."""
    weights = dict(DATA.read_safetensors(GOLDEN))
    parts = [{}, {"h.0.attn.bias": np.ones((1, 1, 32, 32)), "lm_head.weight": weights["transformer.wte.weight"]}]
    for i, (name, w) in enumerate(weights.items()):
        parts[i % 2][name.removeprefix("transformer.")] = w
    for i, part in enumerate(parts):
        header, data = {}, b""
        for name, w in part.items():
            raw = w.astype("f2").tobytes() if i else (w.view(np.uint32) >> 16).astype("u2").tobytes()
            place = [len(data), len(data) + len(raw)]
            header[name] = {"dtype": ["BF16", "F16"][i], "shape": w.shape, "data_offsets": place}
            data += raw
        header = json.dumps(header).encode()
        (tmp_path / f"model-{i}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    (tmp_path / "config.json").write_bytes((GOLDEN / "config.json").read_bytes())
    whole, halves = DATA.read_model(GOLDEN)[1], DATA.read_model(tmp_path)[1]
    assert whole.keys() == halves.keys()
    for name, w in whole.items():
        np.testing.assert_allclose(halves[name], w, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_beam_search(backend):
    """As wide as there are continuations it finds the likeliest of them; a beam of 1 is greedy."""
    net, model = randomised(backend, vocab_size=5, block_size=8)
    prompt = np.array([[1, 4, 2]])
    every = np.array(list(np.ndindex(5, 5, 5)))  # (125, 3)
    idx = np.concatenate([prompt.repeat(125, 0), every], 1)
    logits = np.array(model(array(backend, idx)).tolist())[:, 2:-1]
    logp = np.take_along_axis(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), every[..., None], -1).sum((1, 2))

    def search(beam):
        return np.array(net.beam_search(model, array(backend, prompt), 3, beam).tolist())

    greedy = net.generate(model, array(backend, prompt), array(backend, np.zeros((3, 1), np.float32)), 0)
    greedy = [token.tolist()[0] for token in greedy]
    assert (search(125) == every[logp.argmax()]).all() and search(1).tolist() == greedy
    found = [logp[(every == search(beam)).all(1).argmax()] for beam in (1, 5, 125)]
    assert found[0] < found[2] and found[1] <= found[2]


def test_bpe():
    """The merges of the paper's algorithm, and a text that comes back; the tokens are worth their place."""
    kind, known = DATA.learn_tokenizer("bpe", DATA.load_text(None), 100)
    ranks = {bytes.fromhex(token): rank for rank, token in enumerate(known)}
    assert kind == "bpe" and len(ranks) == 356 and {b" the", b" is"} < set(ranks) and ranks[b"a"] == ord("a")
    tokenizer, text = DATA.make_tokenizer(kind, known), "The na\u00efve \u4e2d class\n\n  returns 12."
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.decode, ids.tolist())).decode() == text and tokenizer.vocab_size == 356
    assert len(tokenizer.encode(DATA.load_text(None)[:5000])) < 3500


def test_stop_strings():
    """The text ends before the first stop string, also where that is spread over tokens, and nothing else is lost."""
    letters = DATA.Characters("abcdefgh")

    def streamed(text, *stop):
        class Said:
            def generate(self, ids, *_):
                yield from letters.encode(text)[:, None]

        args = argparse.Namespace(beam=1, tokens=9, temperature=1, top_k=None, top_p=1, seed=0, stop=stop)
        return "".join(DATA.stream(Said(), letters, letters.encode("a"), args))

    assert streamed("abcabdh") == "abcabdh" and streamed("abcabdh", "abd") == "abc"
    assert streamed("abcabdh", "h", "bd") == "abca" and streamed("abcab", "abd") == "abcab"
    assert streamed("abc", "a") == "" and streamed("fabcb", "bcd", "cb", "gg") == "fab"


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="GPT-2's tokens may have to be downloaded")
def test_gpt2_tokens():
    tokenizer = DATA.make_tokenizer("gpt2", None)
    assert tokenizer.encode("Hello world").tolist() == [15496, 995] and tokenizer.vocab_size == 50257


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_builtin(backend, bias):
    """The framework's own layers of an encoder, with a causal mask, give the same logits; and not without the mask."""
    net, model = randomised(backend, bias=bias)
    idx = np.random.default_rng(0).integers(0, 29, (3, 24))
    ours, theirs = model(array(backend, idx)), net.BuiltinGPT(model)(array(backend, idx))
    np.testing.assert_allclose(theirs.tolist(), ours.tolist(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal(backend):
    """A token changes the logits from its own position on, and none before."""
    net, model = randomised(backend)
    idx = np.arange(48).reshape(2, 24) % 29
    changed = idx.copy()
    changed[:, 10] += 1
    a, b = (np.array(model(array(backend, i)).tolist()) for i in (idx, changed))
    assert (a[:, :10] == b[:, :10]).all() and (np.abs(a - b).max(-1) > 0)[:, 10:].all()


@pytest.mark.parametrize("chunks", [[24], [1] * 24, [5, 1, 1, 7, 10], [23, 1]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cache(backend, chunks):
    """Prefill, single tokens and chunks on the cache give the logits of the whole context computed at once."""
    net, model = randomised(backend)
    idx = np.random.default_rng(0).integers(0, 29, (3, 24))
    whole = np.array(model(array(backend, idx)).tolist())
    cache, at = net.KVCache(model, 3), 0
    before = [id(kv) for kv in cache.kv]
    for n in chunks:
        at += n
        logits = np.array(model(array(backend, idx[:, at - n : at]), cache).tolist())
        np.testing.assert_allclose(logits[:, 0], whole[:, at - 1], atol=1e-4)
    assert cache.length == 24 and [id(kv) for kv in cache.kv] == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_generate(backend):
    """Greedy on the cache is the argmax of the whole context, step by step; and it goes on past the context."""
    net, model = randomised(backend)
    prompt = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    u = array(backend, np.zeros((60, 2), np.float32))
    tokens = net.generate(model, array(backend, prompt), u, temperature=0)
    tokens = np.array([token.tolist() for token in tokens])  # (60, 2)
    idx = prompt
    for i, token in enumerate(tokens):
        if i < 20:  # positions 5 ... 24 are predicted from all before them
            best = np.array(model(array(backend, idx)).tolist())[:, -1].argmax(-1)
            assert (token == best).all(), f"token {i}"
        idx = np.concatenate([idx, token[:, None]], 1)
    assert idx.shape == (2, 65) and len(np.unique(idx)) > 2
    # the first token past the context: the cache is full, and the later half is read anew
    best = np.array(model(array(backend, idx[:, 13:25])).tolist())[:, -1].argmax(-1)
    assert (tokens[20] == best).all()


def test_sampling_is_the_same():
    """The same uniform numbers pick the same tokens in both frameworks."""
    hot, cold = dict(temperature=1.5, top_k=20, top_p=0.9), dict(temperature=0.7, top_k=5)
    for options in (dict(), hot, cold, dict(top_p=0.8)):
        tokens = []
        for backend in BACKENDS:
            trainer = make_trainer("gpt", 0, backend)
            trainer.model = randomised(backend, block_size=16, vocab_size=31, n_head=2)[1]
            tokens.append(np.stack(list(trainer.generate(np.array([[1, 2, 3]] * 8), 40, seed=5, **options))))
        assert len(np.unique(tokens[0])) > 3
        assert (tokens[0] == tokens[1]).mean() > 0.99 and (tokens[0][:10] == tokens[1][:10]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sample(backend):
    """Evenly spaced u reproduce softmax(logits / temperature), cut to top-k and top-p and scaled to 1."""
    net, n = load("gpt", backend), 20000
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
    np.testing.assert_allclose(shares(top_k=3), kept / kept.sum(), atol=2e-4)
    assert p[[0, 5]].sum() < 0.8 < p[[0, 5, 2]].sum()
    np.testing.assert_allclose(shares(top_p=0.8), kept / kept.sum(), atol=2e-4)


@pytest.mark.parametrize("shape", [(16, 16), (40, 12), (12, 40)])
def test_orthogonalize(shape):
    """All singular values come near 1, the singular vectors stay; both frameworks agree."""
    g = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    a, b = TORCH.orthogonalize(torch.from_numpy(g)).numpy(), np.array(MLX.orthogonalize(mx.array(g)))
    np.testing.assert_allclose(a, b, atol=1e-4)
    U, S, Vt = np.linalg.svd(g, full_matrices=False)
    inner = U.T @ a @ Vt.T  # diagonal: the new singular values
    assert np.abs(inner - np.diag(np.diag(inner))).max() < 1e-3
    assert 0.3 < np.diag(inner)[S / S.max() > 0.05].min() and np.diag(inner).max() < 1.3 and S.max() / S.min() > 1.5


def test_muon():
    """One step written out with a singular value decomposition: the direction is U V^T of the Nesterov momentum."""
    rng = np.random.default_rng(1)
    p, g, m = (rng.normal(size=(30, 20)).astype(np.float32) for _ in range(3))
    new_m = 0.9 * m + 0.1 * g
    U, _, Vt = np.linalg.svd(0.9 * new_m + 0.1 * g, full_matrices=False)
    expected = p * (1 - 0.02 * 0.1) - 0.02 * 0.2 * 30**0.5 * U @ Vt
    a, am = torch.from_numpy(p.copy()), torch.from_numpy(m.copy())
    TORCH.muon(a, torch.from_numpy(g), am, lr=0.02, weight_decay=0.1)
    b, bm = MLX.muon(mx.array(p), mx.array(g), mx.array(m), lr=0.02, weight_decay=0.1)
    for new, moment in ((a.numpy(), am.numpy()), (np.array(b), np.array(bm))):
        np.testing.assert_allclose(moment, new_m, atol=1e-6)
        step, right = (new - p * 0.998).ravel(), (expected - p * 0.998).ravel()
        assert step @ right / np.linalg.norm(step) / np.linalg.norm(right) > 0.97
        assert 0.7 < np.linalg.norm(step) / np.linalg.norm(right) < 1.15


def test_adamw():
    rng = np.random.default_rng(2)
    p, grads = rng.normal(size=(6, 5)).astype(np.float32), rng.normal(size=(10, 6, 5)).astype(np.float32)
    a = nn.Parameter(torch.from_numpy(p.copy()))
    theirs = torch.optim.AdamW([a], 0.05, betas=(0.9, 0.99), weight_decay=0.1)
    b, mlx_theirs = {"p": mx.array(p)}, mlx_optim.AdamW(0.05, [0.9, 0.99], weight_decay=0.1, bias_correction=True)
    ours, m, v = torch.from_numpy(p.copy()), torch.zeros(6, 5), torch.zeros(6, 5)
    mlx_ours, mlx_m, mlx_v = mx.array(p), mx.zeros((6, 5)), mx.zeros((6, 5))
    for t, g in enumerate(grads, 1):
        a.grad = torch.from_numpy(g)
        theirs.step()
        b = mlx_theirs.apply_gradients({"p": mx.array(g)}, b)
        TORCH.adamw(ours, torch.from_numpy(g), m, v, 0.05, t, 0.1)
        mlx_ours, mlx_m, mlx_v = MLX.adamw(mlx_ours, mx.array(g), mlx_m, mlx_v, 0.05, t, 0.1)
    for new, other in ((ours.numpy(), a.detach().numpy()), (np.array(mlx_ours), np.array(b["p"]))):
        assert np.abs(new - p).max() > 0.1
        np.testing.assert_allclose(new, other, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(backend):
    """Drawn anew each step from (seed, step), so that a run repeats; off when evaluating."""
    x, y = np.arange(64).reshape(4, 16) % 31, np.arange(1, 65).reshape(4, 16) % 31

    def losses(dropout, seed=0):
        trainer = make_trainer("gpt", 0, backend, seed=seed, dropout=dropout)
        first = float(trainer.evaluate(x, y)["val_loss"])
        return [first, *(float(trainer.step(x, y, lr=0.0)["loss"]) for _ in range(3))]

    a, b, without = losses(0.5), losses(0.5), losses(0.0)
    assert a == b and len(set(a)) == 4
    assert a[0] == without[0] and len(set(without)) == 1 or np.ptp(without) < 1e-6


def losses(backend, i=0, n=6, **options):
    """The losses of n steps of a small GPT."""
    net, batch = load("gpt", backend), batches("gpt", i, n)
    trainer = net.Trainer(net.Config(**FOLDERS["gpt"].configs[i]), device="cpu", **options)
    return [float(trainer.step(*arrays, lr=0.01)["loss"]) for arrays in batch], trainer


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulate(backend):
    """A batch in three uneven parts gives the losses of the whole; so does one with weights."""
    np.testing.assert_allclose(losses(backend, accumulate=3)[0], losses(backend)[0], rtol=1e-5)
    weights = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    whole, parts = losses(backend)[1], losses(backend, accumulate=4)[1]
    for x, y in batches("gpt", 0, 3):
        a, b = (float(trainer.step(x, y, weights, lr=0.01)["loss"]) for trainer in (whole, parts))
        by_hand = -(whole.log_prob(x, y) * weights).sum()
        assert a == pytest.approx(b, abs=1e-3) and abs(by_hand - a) > 0.01  # it has moved
        assert float(whole.evaluate(x, y, weights)["val_loss"]) == pytest.approx(by_hand, abs=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend):
    """Nearly the same losses, but not the same; weights and moments stay float32."""
    (half, trainer), (whole, _) = losses(backend, dtype="bfloat16"), losses(backend)
    np.testing.assert_allclose(half, whole, rtol=0.01)
    assert max(abs(a - b) for a, b in zip(half, whole)) > 1e-5
    assert all(w.dtype == np.float32 for w in load("gpt", backend).get_weights(trainer.model).values())
    assert all("float32" in str(m.dtype) for m in trainer.m.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend, monkeypatch):
    """The compiled step gives the same losses. Only the first half of torch's compiler: the second takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    if backend == "mlx" and not shutil.which("g++"):
        pytest.skip("on the CPU MLX compiles with g++")
    np.testing.assert_allclose(losses(backend, 2, 3, compile=True)[0], losses(backend, 2, 3)[0], rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes(backend, tmp_path):
    """Two processes share a batch, each computes its half in two parts: the log of one process, and it once."""
    folder = copy_alone("gpt", tmp_path / "gpt")
    args = "--steps 6 --block-size 16 --n-layer 1 --n-embd 32 --tokens 5 --batch-size 9".split()
    code, alone, err = run(folder, backend, *args)
    assert code == 0, err
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    if backend == "mlx":
        launch = [Path(sys.executable).with_name("mlx.launch"), "-n", "2", "--", sys.executable]
    command = [*launch, "train.py", "--backend", backend, "--device", "cpu", *args, "--accumulate", "2"]
    both = subprocess.run(command, cwd=folder, env=environment(backend), capture_output=True, text=True)
    assert both.returncode == 0, both.stderr
    results = [json.loads(out[out.index("result ") + 7 :].splitlines()[0]) for out in (alone, both.stdout)]
    figures = [re.findall(r"step +6/6  loss (.*?)  val_loss (.*?) ", out) for out in (alone, both.stdout)]
    assert len(figures[0]) == len(figures[1]) == 1
    np.testing.assert_allclose(*(np.array(found, float) for found in figures), atol=2e-4)
    assert results[0]["val_loss"] == pytest.approx(results[1]["val_loss"], abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_are_checked(backend):
    trainer = make_trainer("gpt", 0, backend)
    for bad in (31, -1):
        with pytest.raises(ValueError, match="token"):
            trainer.step(np.full((1, 4), bad), np.zeros((1, 4), np.int64), lr=0.1)
        with pytest.raises(ValueError, match="token"):
            next(trainer.generate(np.full((1, 4), bad), 1))


@pytest.mark.parametrize("size, millions", [("gpt2", 124.4), ("gpt2-xl", 1557.6)])
def test_sizes(size, millions):
    with torch.device("meta"):
        model = TORCH.GPT(TORCH.Config(**load_file("gpt", "train").GPT2[size]))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_tokenizer_without_its_files(tmp_path, monkeypatch):
    """tiktoken downloads GPT-2's tokens once; where it cannot, one line says what is needed."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody answers
    code, out, err = run(copy_alone("gpt", tmp_path / "gpt"), "mlx", "--tokenizer", "gpt2", "--steps", "1")
    assert code == 2 and len(err.splitlines()) == 1 and "TIKTOKEN_CACHE_DIR" in err, err


def gradients(backend, net, model, loss):
    """{name: gradient} of loss() with respect to the model's parameters."""
    if backend == "torch":
        model.zero_grad()
        loss().backward()
        return {name: p.grad.numpy() for name, p in model.named_parameters()}
    return {name: np.array(g) for name, g in tree_flatten(mlx_nn.value_and_grad(model, loss)()[1])}


@pytest.mark.parametrize("group", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_estimator(backend, group):
    """The mean over all groups of answers, each as often as it is drawn, is the gradient of E[reward] - beta KL."""
    net, model = randomised(backend, vocab_size=3, block_size=4)
    _, reference = randomised(backend, vocab_size=3, block_size=4)
    net.init_weights(reference, 1)
    answers, rng, beta = np.array(list(np.ndindex(3, 3))), np.random.default_rng(0), 0.3  # all of two tokens
    ids = np.append(np.tile([2, 0], (9, 1)), answers, 1)
    x, y, own = ids[:, :-1], ids[:, 1:], np.tile(np.array([0, 1, 1], np.float32), (9, 1))
    reward = rng.random(9).astype(np.float32)

    def log_prob(model):
        return (net.log_prob(model(array(backend, x)), array(backend, y)) * array(backend, own)).sum(-1)

    ours, theirs = (np.array(log_prob(m).tolist()) for m in (model, reference))
    weights, p = np.zeros(9), np.exp(ours)
    assert p.sum() == pytest.approx(1, abs=1e-5) and np.ptp(p) > 0.1
    for drawn in np.ndindex(*[9] * group):
        i = list(drawn)
        np.add.at(weights, i, p[i].prod() * DATA.advantages(reward[i], (ours - theirs)[i], group, beta))
    weights = array(backend, (own * weights[:, None]).astype(np.float32))

    def objective():
        logp = log_prob(model)
        worth = array(backend, reward) - beta * (logp - array(backend, theirs.astype(np.float32)))
        return -((logp.exp() if backend == "torch" else mx.exp(logp)) * worth).sum()

    expected = gradients(backend, net, model, objective)
    got = gradients(backend, net, model, lambda: net.loss_fn(model(array(backend, x)), array(backend, y), weights))
    for name, g in expected.items():
        np.testing.assert_allclose(got[name], g, atol=1e-5 + 1e-4 * np.abs(g).max())
    assert max(np.abs(g).max() for g in expected.values()) > 0.01


def test_dialogues():
    """Sums that are right, and those held out are never in a dialogue; only what the assistant says is learnt."""
    rng = np.random.default_rng(0)
    dialogues = [DATA.draw_dialogue(rng) for _ in range(500)]
    held_out = [DATA.draw_sum(rng, held_out=True) for _ in range(500)]
    seen = {text for dialogue in dialogues for _, text in dialogue}
    for question, answer, result in held_out:
        a, sign, b = question.removeprefix("What is ").removesuffix("?").split()
        other = f"What is {b} plus {a}?"  # the same sum
        assert int(result) == (int(a) - int(b) if sign == "minus" else int(a) + int(b))
        first, second, end = answer.split("=")
        assert end == result and eval(first) == int(re.match(r"\d+", second)[0]) and eval(second) == int(result)
        assert question not in seen and (sign == "minus" or other not in seen)
    letters = DATA.Characters("".join(sorted(set("assistant user" + string.printable + DATA.END))))
    x, y, weights = make_task("gpt", "--task", "chat", "--block-size", 90, "--batch-size", 4).batch(3)
    assert x.shape == y.shape == weights.shape and x.shape[1] <= 90 and (x[:, 1:] == y[:, :-1]).all()
    assert weights.sum() == pytest.approx(1) and len(np.unique(weights)) == 2
    for row, weight in zip(y, weights):
        text = "".join(letters.decode(i).decode() for i in row)
        learnt = "".join(letters.decode(i).decode() for i in row[weight > 0])
        said = [part.split("\n", 1)[1] for part in text.split(DATA.END) if part.startswith("assistant\n")]
        assert DATA.END.join(said).startswith(learnt.rstrip(DATA.END)) and len(learnt) >= len("".join(said))


def test_answers_are_weighed(tmp_path):
    """Of what is said to a sum only the answer counts, to its END: upwards if the result is right, else downwards."""
    tokenizer = DATA.Characters("".join(sorted({*string.printable, DATA.END})))

    class Scripted:
        def generate(self, prompts, n, temperature, seed, reference):
            asked = b"".join(map(tokenizer.decode, prompts[0])).decode()
            a, word, b = re.search(r"(\d+) (plus|minus) (\d+)", asked).groups()
            result = str(int(a) + int(b) if word == "plus" else int(a) - int(b))
            self.said = [result, f"9+9={result}", f"{result}=x", "no"]
            rows = [tokenizer.encode((text + DATA.END).ljust(n, "z")) for text in self.said]
            yield from np.stack(rows, 1)

        def log_prob(self, x, y, reference=False):
            return np.zeros(x.shape, np.float32)

    config = TORCH.Config(block_size=64, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8)
    TORCH.Trainer(config, device="cpu").save(tmp_path / "ckpt.npz", 1, tokenizer=["chars", tokenizer.alphabet])
    flags = ["--init", tmp_path / "ckpt.npz", "--batch-size", 4, "--group", 4, "--beta", 0.1]
    task = make_task("gpt", "--task", "rl", *flags)
    task.policy = trainer = Scripted()
    x, y, weights = task.batch(3)
    assert (x[:, 1:] == y[:, :-1]).all()
    for row, text, weight in zip(range(4), trainer.said, (1, 1, -1, -1)):
        counts = weights[row] != 0
        assert b"".join(map(tokenizer.decode, y[row][counts])).decode() == text + DATA.END
        np.testing.assert_allclose(weights[row][counts], weight / 6, rtol=1e-6)  # (1 - 1/3) / 4 and (0 - 2/3) / 4


def test_chat_and_reward(tmp_path):
    """Dialogues of the user's own are learnt by heart, answered in the terminal, and then rewarded."""
    folder = copy_alone("gpt", tmp_path / "gpt")
    own = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me,\nmyself."}]
    (folder / "own.jsonl").write_text("".join([json.dumps({"messages": own}) + "\n"] * 10), encoding="utf-8")
    args = "--task chat --block-size 64 --n-layer 1 --n-embd 32 --batch-size 4 --temperature 0".split()
    process = start(folder, "mlx", *args, "--data", "own.jsonl", "--steps", "60", "--chat", stdin=subprocess.PIPE)
    out, err = process.communicate("Who?\nWho?\n")
    assert process.returncode == 0 and out.count("gpt: Me,\nmyself.\n") >= 2, out + err
    assert json.loads(out.splitlines()[-1].removeprefix("result "))["val_loss"] < 0.2
    weights = []
    for more in (["--steps", "1"], ["--beta", "0"], ["--beta", "5"]):
        rl = "--task rl --init out/chat/ckpt.npz --steps 3 --group 2 --out two".split() * (len(weights) > 0)
        code, out, err = run(folder, "mlx", *args, *rl, *more)
        figures = json.loads(out.splitlines()[-1].removeprefix("result "))
        assert code == 0 and {"reward", "reward_before"} <= {*figures} if rl else "accuracy" in figures, err
        with np.load(folder / figures["files"][0]) as f:
            weights.append(f["wte.weight"])
    assert (weights[1] != weights[2]).any()


def test_optimizers_and_shapes_of_the_command_line(tmp_path):
    """The flags that shape the model and its training reach it."""
    folder = copy_alone("gpt", tmp_path / "gpt")
    (folder / "own.txt").write_text("abcdefgh \n" * 400, encoding="utf-8")
    flags = "--data own.txt --steps 3 --n-layer 3 --n-head 2 --n-embd 8 --block-size 6 --dropout 0.1 --optimizer adamw"
    more = "--decay cosine --warmup 2 --prompt ab --tokens 9 --temperature 0 --top-k 3 --top-p 0.9 --lr 0.001"
    code, out, err = run(folder, "mlx", *flags.split(), *more.split())
    assert code == 0, err
    with np.load(folder / "out/text/ckpt.npz") as f:
        meta, names = json.loads(str(f["meta"])), set(f.files)
    shape = dict(block_size=6, vocab_size=10, n_layer=3, n_head=2, n_embd=8, dropout=0.1, optimizer="adamw")
    assert shape.items() <= meta["config"].items() and meta["tokenizer"] == ["chars", "\n abcdefgh"]
    assert "h.2.attn.c_attn.weight" in names and "h.3.attn.c_attn.weight" not in names
    assert len((folder / "out/text/sample.txt").read_text(encoding="utf-8")) == 11
    again = ["--data", "own.txt", "--steps", "0", "--resume", "--tokens", "5"]
    code, out, err = run(folder, "torch", *again, "--prompt", "Ab")
    assert code == 2 and "alphabet lacks 'A'" in err
    process = start(folder, "torch", *again, "--prompt", "-", stdin=subprocess.PIPE)
    out, err = process.communicate("hgf")
    assert process.returncode == 0 and "\nhgf" in out, err
    losses = [json.loads(out.splitlines()[-1].removeprefix("result "))["val_loss"]]
    for init in ("out/text/ckpt.npz", "hf"):  # from a checkpoint to Hugging Face's layout, and from there
        args = ["--data", "own.txt", "--init", init, "--steps", "0", "--out", "two", "--prompt", "ab", "--beam", "2"]
        code, out, err = run(folder, "mlx", *args, "--export-hf", "hf")
        assert code == 0, err
        losses.append(json.loads(out.splitlines()[-1].removeprefix("result "))["val_loss"])
    assert np.ptp(losses) < 1e-5 and len((folder / "two/sample.txt").read_text(encoding="utf-8")) == 6


def test_bpe_travels(tmp_path):
    """The checkpoint has the tokens that were learnt: another text is read with them, and training goes on."""
    folder = copy_alone("gpt", tmp_path / "gpt")
    (folder / "own.txt").write_text("the cat sat on the mat. " * 200, encoding="utf-8")
    (folder / "other.txt").write_text("a rat ate the other cat. " * 200, encoding="utf-8")
    args = "--tokenizer bpe --merges 20 --n-layer 1 --n-embd 32 --block-size 16 --steps 30 --prompt the".split()
    code, out, err = run(folder, "mlx", "--data", "own.txt", *args)
    assert code == 0, err
    more = ["--init", "out/text/ckpt.npz", "--data", "other.txt", "--out", "two", *args]
    for steps, bound in (("0", 2.5), ("60", 1.0)):
        code, out, err = run(folder, "mlx", *more, "--steps", steps)
        loss = json.loads(out.splitlines()[-1].removeprefix("result "))["val_loss"]
        assert code == 0 and (loss > bound) == (steps == "0"), (loss, err)
    with np.load(folder / "out/text/ckpt.npz") as a, np.load(folder / "two/ckpt.npz") as b:
        assert json.loads(str(a["meta"]))["tokenizer"] == json.loads(str(b["meta"]))["tokenizer"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_start(backend):
    """The scales of GPT-2 at first, narrower in what is added to the stream; norms 1 and biases 0."""
    net = load("gpt", backend)
    config = net.Config(block_size=8, vocab_size=31, n_layer=8, n_head=2, n_embd=32)
    weights = net.get_weights(net.Trainer(config, device="cpu").model)
    for name, w in weights.items():
        expected = 0.005 if name.endswith("c_proj.weight") else 0.02 if w.ndim == 2 else 0  # 0.02 / sqrt(2 * 8)
        assert w.std() == pytest.approx(expected, rel=0.15), name
        assert w.ndim == 2 or (w == name.endswith("weight")).all()


def test_what_is_typed(tmp_path, monkeypatch, capsys):
    """What is no text, or too deep, is refused in a line; in a chat, it is asked for again."""
    with pytest.raises(SystemExit):
        make_task("gpt", "--prompt", "a\udcff")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(SystemExit):
        make_task("gpt", "--prompt", "-")
    pair = [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c"}]
    pair, own = [{"role": "system", "content": "Be brief."}, *pair], tmp_path / "own.jsonl"
    for bad in ("[" * 100_000, json.dumps({"messages": [{"role": "user", "content": "\udcff"}]})):
        own.write_text(bad + "\n")
        with pytest.raises(SystemExit):
            DATA.load_messages(own)
    own.write_text((json.dumps({"messages": pair}, ensure_ascii=False) + "\n") * 10, encoding="utf-8")
    assert DATA.load_messages(own)[9][1] == ("user", "a\u2028b")
    assert make_task("gpt", "--task", "chat", "--data", own).prompts[0][0] == "you: a\u2028b\ngpt: "
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 4 and all(line.startswith("train.py: ") for line in err.splitlines()), err

    class Silent:
        def generate(self, ids, *_):
            yield from letters.encode(DATA.END)[:, None]

    letters = DATA.Characters("".join(sorted(set("assistant user\nHi" + DATA.END))))
    monkeypatch.setattr("sys.stdin", io.StringIO("\u4e2d\udcff\nHi\n"))
    args = argparse.Namespace(beam=1, tokens=9, temperature=1, top_k=None, top_p=1, seed=0, stop=[DATA.END])
    DATA.talk(Silent(), letters, argparse.Namespace(**vars(args), block_size=64))
    out, err = capsys.readouterr()
    assert out.count("gpt: ") == 1 and "alphabet lacks" in err
