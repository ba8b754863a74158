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
    result,
    run,
    run_here,
)
from mlx.utils import tree_flatten

GOLDEN = Path(__file__).parent / "golden/gpt2-tiny"
TORCH, MLX = load("gpt", "torch"), load("gpt", "mlx")
DATA = load_file("gpt", "data")


def array(backend, x):
    return torch.from_numpy(np.ascontiguousarray(x)) if backend == "torch" else mx.array(x)


def randomised(backend, scale=0.3, **changes):
    """A small GPT with every parameter random, biases and norms too."""
    net, config = load("gpt", backend), dict(block_size=24, vocab_size=29, n_layer=2, n_head=2, n_embd=16)
    model, rng = net.GPT(net.Config(**{**config, **changes})), np.random.default_rng(4)
    weights = {name: w for name, w in sorted(net.get_weights(model).items())}
    net.set_weights(model, {name: rng.normal(0, scale, w.shape).astype(np.float32) for name, w in weights.items()})
    return net, model


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend, tmp_path):
    """Weights in the released format, logits and greedy tokens as transformers 5.23 computes them; and the export."""
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


@pytest.mark.parametrize("bias, scale", [(True, 0.3), (False, 0.003)])  # in the smaller the eps of the norms counts
@pytest.mark.parametrize("backend", BACKENDS)
def test_builtin(backend, bias, scale):
    """The framework's own layers of an encoder, with a causal mask, give the same logits; and not without the mask."""
    net, model = randomised(backend, scale, bias=bias)
    idx = np.random.default_rng(0).integers(0, 29, (3, 24))
    ours, theirs = (np.array(m(array(backend, idx)).tolist()) for m in (model, net.BuiltinGPT(model)))
    np.testing.assert_allclose(theirs, ours, atol=1e-4 * min(1, ours.std()), rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_start(backend):
    """The initial scales of GPT-2, smaller where weights add to the stream; norms 1 and biases 0."""
    net = load("gpt", backend)
    config = net.Config(block_size=8, vocab_size=31, n_layer=8, n_head=2, n_embd=32)
    weights = net.get_weights(net.Trainer(config).model)
    for name, w in weights.items():
        expected = 0.005 if name.endswith("c_proj.weight") else 0.02 if w.ndim == 2 else 0  # 0.02 / sqrt(2 * 8)
        assert w.std() == pytest.approx(expected, rel=0.15), name
        assert w.ndim == 2 or (w == name.endswith("weight")).all()


@pytest.mark.parametrize("size, millions", [("gpt2", 124.4), ("gpt2-xl", 1557.6)])
def test_sizes(size, millions):
    with torch.device("meta"):
        model = TORCH.GPT(TORCH.Config(**load_file("gpt", "train").GPT2[size]))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cache(backend):
    """Prefill, single tokens and chunks with the cache give the logits of the whole context computed at once."""
    net, model = randomised(backend)
    idx = np.random.default_rng(0).integers(0, 29, (3, 24))
    whole = np.array(model(array(backend, idx)).tolist())
    cache, at = net.KVCache(model, 3), 0
    before = [id(kv) for kv in cache.kv]
    for n in (5, 1, 1, 7, 10):
        at += n
        logits = np.array(model(array(backend, idx[:, at - n : at]), cache).tolist())
        np.testing.assert_allclose(logits[:, 0], whole[:, at - 1], atol=1e-4)
    assert cache.length == 24 and [id(kv) for kv in cache.kv] == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_refused(backend, tmp_path):
    """Tokens that are none, which MLX would take; and a checkpoint with objects, which may run anything."""
    trainer = make_trainer("gpt", 0, backend)
    for bad in (31, -1):
        with pytest.raises(ValueError, match="token"):
            trainer.step(np.full((1, 4), bad), np.zeros((1, 4), np.int64), lr=0.1)
        with pytest.raises(ValueError, match="token"):
            next(trainer.generate(np.full((1, 4), bad), 1))
    np.savez(tmp_path / "ckpt.npz", meta=np.array([{}], object))
    with pytest.raises(ValueError, match="pickle"):
        trainer.load(tmp_path / "ckpt.npz")


# ---- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_generate(backend):
    """Greedy decoding with the cache is the argmax of the whole context, step by step; and it continues beyond it."""
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
    # the first token past the context: the cache is full, and the later half is read again
    best = np.array(model(array(backend, idx[:, 13:25])).tolist())[:, -1].argmax(-1)
    assert (tokens[20] == best).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_beam_search(backend):
    """With a beam as wide as all continuations it finds the most likely one; a beam of 1 is greedy."""
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


@pytest.mark.parametrize("options", [dict(), dict(temperature=1.5, top_k=20, top_p=0.9)])
def test_sampling_is_the_same(options):
    """The same uniform numbers pick the same tokens in both frameworks."""
    tokens = []
    for backend in BACKENDS:
        trainer = make_trainer("gpt", 0, backend)
        trainer.model = randomised(backend, block_size=16, vocab_size=31)[1]
        tokens.append(np.stack(list(trainer.generate(np.array([[1, 2, 3]] * 8), 40, seed=5, **options))))
    assert len(np.unique(tokens[0])) > 3
    assert (tokens[0] == tokens[1]).mean() > 0.99 and (tokens[0][:10] == tokens[1][:10]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gpt", "llama"])
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
    np.testing.assert_allclose(shares(top_k=3), kept / kept.sum(), atol=2e-4)
    assert p[[0, 5]].sum() < 0.8 < p[[0, 5, 2]].sum()
    np.testing.assert_allclose(shares(top_p=0.8), kept / kept.sum(), atol=2e-4)
    even = net.sample(array(backend, np.zeros((n, 2), np.float32)), array(backend, u), 1.0, 2, 0.5)
    assert len(np.unique(even.tolist())) == 1  # one of two holds half


def test_stop_strings():
    """The text ends before the first stop string, even if it is spread over tokens, and nothing else is lost."""
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


# ---- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16), (40, 12), (12, 40)])
def test_muon(shape):
    """One step written out: the Nesterov momentum keeps its singular vectors, and its singular values come near 1."""
    rng, s = np.random.default_rng(1), np.geomspace(1, 0.02, min(shape))
    p = rng.normal(size=shape).astype(np.float32)
    U, _, Vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    g = ((U * s) @ Vt).astype(np.float32)
    a, am = torch.from_numpy(p.copy()), torch.from_numpy(g / 2)
    TORCH.muon(a, torch.from_numpy(g), am, lr=0.02, weight_decay=0.1)
    b, bm = MLX.muon(mx.array(p), mx.array(g), mx.array(g / 2), lr=0.02, weight_decay=0.1)
    s = s / (s**2).sum() ** 0.5
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    for new, moment in ((a.numpy(), am.numpy()), (np.array(b), np.array(bm))):
        np.testing.assert_allclose(moment, 0.9 * g / 2 + 0.1 * g, atol=1e-6)
        inner = U.T @ (p * 0.998 - new) @ Vt.T / (0.02 * 0.2 * max(shape) ** 0.5)  # diagonal: the new singular values
        np.testing.assert_allclose(inner, np.diag(s), atol=2e-3)
    assert 0.3 < s.min() and s.max() < 1.3


def test_adamw():
    """Ten steps are those of torch's own AdamW."""
    rng = np.random.default_rng(2)
    p, grads = rng.normal(size=(6, 5)).astype(np.float32), rng.normal(size=(10, 6, 5)).astype(np.float32)
    theirs = nn.Parameter(torch.from_numpy(p.copy()))
    optimizer = torch.optim.AdamW([theirs], 0.05, betas=(0.9, 0.99), weight_decay=0.1)
    a, *moments = torch.from_numpy(p.copy()), torch.zeros(6, 5), torch.zeros(6, 5)
    b, *state = mx.array(p), mx.zeros((6, 5)), mx.zeros((6, 5))
    for t, g in enumerate(grads, 1):
        theirs.grad = torch.from_numpy(g)
        optimizer.step()
        TORCH.adamw(a, torch.from_numpy(g), *moments, 0.05, t, 0.1)
        b, *state = MLX.adamw(b, mx.array(g), *state, 0.05, t, 0.1)
    for new in (a.numpy(), np.array(b)):
        assert np.abs(new - p).max() > 0.1
        np.testing.assert_allclose(new, theirs.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_step(backend, optimizer):
    """The first step of every parameter: AdamW moves all entries by the rate, Muon the blocks' matrices by U V^T."""
    trainer, (x, y) = make_trainer("gpt", 0, backend, optimizer=optimizer), batches("gpt", 0, 1)[0]
    net = load("gpt", backend)
    before = net.get_weights(trainer.model)
    loss = float(trainer.step(x, y, np.ones(y.shape, np.float32), lr=0.01)["loss"])
    assert loss == pytest.approx(y.size * np.log(31), rel=0.05)
    grads, norm = {name: np.array(m.tolist()) / 0.1 for name, m in trainer.m.items()}, 0.0
    for name, new in net.get_weights(trainer.model).items():
        p, g = before[name], grads[name]
        norm += (g**2).sum()
        moved = p * (1 - 0.01 * 0.1 * (p.ndim == 2)) - new  # only matrices decay
        if optimizer == "muon" and p.ndim == 2 and name.startswith("h."):
            U, S, Vt = np.linalg.svd(g, full_matrices=False)
            assert 0.6 < (U.T @ moved @ Vt.T)[0, 0] / (0.01 * 0.2 * max(p.shape) ** 0.5) < 1.3, name
        else:
            large = np.abs(g) > 1e-4
            np.testing.assert_allclose(moved[large], 0.01 * np.sign(g[large]), atol=5e-6, err_msg=name)
    assert norm == pytest.approx(1, abs=1e-4)  # it was clipped


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(backend):
    """Drawn anew each step from (seed, step), so that a run repeats; off in all that does not train."""
    x, y = np.arange(64).reshape(4, 16) % 31, np.arange(1, 65).reshape(4, 16) % 31

    def said(dropout):
        trainer, losses, answers = make_trainer("gpt", 0, backend, dropout=dropout), [], []
        for ask in (
            lambda: float(trainer.evaluate(x, y)["val_loss"]),
            lambda: trainer.log_prob(x, y),
            lambda: np.stack(list(trainer.generate(x[:, :4], 9, temperature=0))),
            lambda: trainer.search(x[:1, :4], 9, beam=3),
        ):
            losses.append(float(trainer.step(x, y, lr=0.0)["loss"]))
            answers.append(ask())
        return losses, answers

    (a, answers), (b, _), (without, expected) = said(0.5), said(0.5), said(0.0)
    assert a == b and len(set(a)) == 4 and np.ptp(without) < 1e-6
    assert without[0] == pytest.approx(expected[0], abs=1e-5) == pytest.approx(-expected[1].mean(), abs=1e-5)
    for answer, right in zip(answers, expected):
        np.testing.assert_array_equal(answer, right)


@pytest.mark.parametrize("backend, other", [BACKENDS, BACKENDS[::-1]])
def test_reference(backend, other, tmp_path):
    """The second model stays as it was while the first learns, and travels with the checkpoint."""
    trainer, reader, (x, y) = make_trainer("gpt", 0, backend), make_trainer("gpt", 0, other), batches("gpt", 0, 1)[0]
    trainer.step(x, y, lr=0.01)
    trainer.keep_reference()
    before = trainer.log_prob(x, y)
    trainer.step(x, y, lr=0.01)
    trainer.save(tmp_path / "ckpt.npz", 2)
    reader.load(tmp_path / "ckpt.npz")
    for which in (trainer, reader):
        np.testing.assert_allclose(which.log_prob(x, y, reference=True), before, atol=1e-5)
        assert np.abs(which.log_prob(x, y) - before).max() > 1e-3


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
    """Two processes share a batch, each computes its half in two parts: one process's log, printed once."""
    folder = copy_alone("gpt", tmp_path / "gpt")
    args = "--steps 6 --block-size 16 --n-layer 1 --n-embd 32 --tokens 5 --batch-size 9".split()
    alone = result(folder, backend, *args, "--out", "alone", run=run_here)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    if backend == "mlx":
        launch = [Path(sys.executable).with_name("mlx.launch"), "-n", "2", "--", sys.executable]
    command = [*launch, "train.py", "--backend", backend, "--device", "cpu", *args, "--accumulate", "2"]
    both = subprocess.run(command, cwd=folder, env=environment(backend), capture_output=True, text=True)
    assert both.returncode == 0, both.stderr
    val_loss = float(re.search('"val_loss": (.+?)[,}]', both.stdout)[1])
    figures = [re.findall(r"step +6/6  loss (.*?)  val_loss (.*?) ", out) for out in (alone["printed"], both.stdout)]
    assert len(figures[0]) == len(figures[1]) == 1
    np.testing.assert_allclose(*(np.array(found, float) for found in figures), atol=2e-4)
    assert alone["val_loss"] == pytest.approx(val_loss, abs=1e-5)


# ---- dialogues and rewards -------------------------------------------------------------------------------------------


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
    """The mean over all groups of answers, weighted by their probability, is the gradient of E[reward] - beta KL."""
    net, model = randomised(backend, vocab_size=3, block_size=4)
    _, reference = randomised(backend, vocab_size=3, block_size=4)
    net.init_weights(reference, 1)
    answers, rng, beta = np.array(list(np.ndindex(3, 3))), np.random.default_rng(0), 0.3  # all answers of two tokens
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
    """Sums that are right, and those held out are never in a dialogue; only the assistant's words are learned."""
    rng = np.random.default_rng(0)
    dialogues = [DATA.draw_dialogue(rng) for _ in range(500)]
    held_out = [DATA.draw_sum(rng, held_out=True) for _ in range(500)]
    seen = {text for dialogue in dialogues for _, text in dialogue}
    for question, answer, value in held_out:
        a, sign, b = question.removeprefix("What is ").removesuffix("?").split()
        other = f"What is {b} plus {a}?"  # the same sum
        assert int(value) == (int(a) - int(b) if sign == "minus" else int(a) + int(b))
        first, second, end = answer.split("=")
        assert end == value and eval(first) == int(re.match(r"\d+", second)[0]) and eval(second) == int(value)
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
    """In a reply to a sum only the answer counts, up to END: it becomes more likely if right, else less."""
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


def test_chat_and_reward(tmp_path, monkeypatch):
    """The user's own dialogues are memorised, answered in the terminal, and then rewarded."""
    folder = copy_alone("gpt", tmp_path / "gpt")
    own = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me,\nmyself."}]
    (folder / "own.jsonl").write_text("".join([json.dumps({"messages": own}) + "\n"] * 10), encoding="utf-8")
    args = "--task chat --block-size 64 --n-layer 1 --n-embd 32 --batch-size 4 --temperature 0".split()
    train = partial(result, folder, "torch", *args, run=run_here)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Who?\nWho?\n")))
    learnt = train("--data", "own.jsonl", "--steps", 60, "--chat")
    assert learnt["printed"].count("gpt: Me,\nmyself.\n") >= 2 and learnt["val_loss"] < 0.2
    assert "accuracy" in train("--steps", 1)
    weights = []
    for beta in (0, 5):
        figures = train(*"--task rl --init out/chat/ckpt.npz --steps 3 --group 2 --out two --beta".split(), beta)
        assert {"reward", "reward_before"} <= {*figures}
        with np.load(folder / "two/ckpt.npz") as f:
            weights.append(f["wte.weight"])
    assert (weights[0] != weights[1]).any()


# ---- files, tokens and what is typed ---------------------------------------------------------------------------------


def test_shards_and_types(tmp_path):
    """Several files, half precision, mask buffers, a separate head and names without a prefix: all are read."""
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


def test_bpe():
    """The merges of the paper's algorithm, and text that is restored; the tokens are worth their place."""
    kind, known = DATA.learn_tokenizer("bpe", [DATA.load_text(None)], 100)
    ranks = {bytes.fromhex(token): rank for rank, token in enumerate(known)}
    assert kind == "bpe" and len(ranks) == 356 and {b" the", b" is"} < set(ranks) and ranks[b"a"] == ord("a")
    tokenizer, text = DATA.make_tokenizer(kind, known), "The na\u00efve \u4e2d class\n\n  returns 12."
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.decode, ids.tolist())).decode() == text and tokenizer.vocab_size == 356
    assert len(tokenizer.encode(DATA.load_text(None)[:5000])) < 3500


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="GPT-2's tokens may have to be downloaded")
def test_gpt2_tokens():
    tokenizer = DATA.make_tokenizer("gpt2", None)
    assert tokenizer.encode("Hello world").tolist() == [15496, 995] and tokenizer.vocab_size == 50257


@pytest.mark.parametrize("told", [5, ["chars", None], ["chars", ""], ["bpe", ["00"]], ["bpe", []], ["x", 1]])
def test_tokenizer_entry(told, tmp_path, capsys):
    """What is no tokenizer in the config.json of a GPT-2 ends in one line."""
    shutil.copytree(GOLDEN, tmp_path / "model")
    config = {**json.loads((GOLDEN / "config.json").read_text()), "tokenizer": told}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        make_task("gpt", "--init", tmp_path / "model", "--out", tmp_path)
    assert "tokenized" in (err := capsys.readouterr().err) and len(err.splitlines()) == 1


def test_tokenizer_without_its_files(tmp_path, monkeypatch):
    """tiktoken downloads GPT-2's tokens once; where it cannot, one line says what is needed."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing listens
    code, out, err = run(copy_alone("gpt", tmp_path / "gpt"), "mlx", "--tokenizer", "gpt2", "--steps", "1")
    assert code == 2 and len(err.splitlines()) == 1 and "TIKTOKEN_CACHE_DIR" in err, err


def test_bpe_travels(tmp_path):
    """The checkpoint has the learned tokens: another text is read with them, and training continues."""
    folder = copy_alone("gpt", tmp_path / "gpt")
    (folder / "own.txt").write_text("the cat sat on the mat. " * 200, encoding="utf-8")
    (folder / "other.txt").write_text("a rat ate the other cat. " * 200, encoding="utf-8")
    args = "--tokenizer bpe --merges 20 --n-layer 1 --n-embd 32 --block-size 16 --steps 30 --prompt the".split()
    train = partial(result, folder, "torch", *args, run=run_here)
    train("--data", "own.txt")
    more = ["--init", "out/text/ckpt.npz", "--data", "other.txt", "--out", "two", "--steps"]
    assert train(*more, 0)["val_loss"] > 2.5 and train(*more, 60)["val_loss"] < 1.0
    with np.load(folder / "out/text/ckpt.npz") as a, np.load(folder / "two/ckpt.npz") as b:
        assert json.loads(str(a["meta"]))["tokenizer"] == json.loads(str(b["meta"]))["tokenizer"]


def test_optimizers_and_shapes_of_the_command_line(tmp_path, monkeypatch):
    """The flags that shape the model and its training reach it."""
    folder, own = copy_alone("gpt", tmp_path / "gpt"), ("--data", "own.txt")
    (folder / "own.txt").write_text("abcdefgh \n" * 400, encoding="utf-8")
    flags = "--steps 3 --n-layer 3 --n-head 2 --n-embd 8 --block-size 6 --dropout 0.1 --optimizer adamw --lr 0.001"
    more = "--decay cosine --warmup 2 --prompt ab --tokens 9 --temperature 0 --top-k 3 --top-p 0.9"
    result(folder, "mlx", *own, *flags.split(), *more.split(), run=run_here)
    with np.load(folder / "out/text/ckpt.npz") as f:
        meta, names = json.loads(str(f["meta"])), set(f.files)
    shape = dict(block_size=6, vocab_size=10, n_layer=3, n_head=2, n_embd=8, dropout=0.1, optimizer="adamw")
    assert shape.items() <= meta["config"].items() and meta["tokenizer"] == ["chars", "\n abcdefgh"]
    assert "h.2.attn.c_attn.weight" in names and "h.3.attn.c_attn.weight" not in names
    assert len((folder / "out/text/sample.txt").read_text(encoding="utf-8")) == 11
    again = [*own, "--steps", 0, "--resume", "--tokens", 5, "--prompt"]
    code, out, err = run_here(folder, "torch", *again, "Ab")
    assert code == 2 and "alphabet lacks 'A'" in err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hgf")))
    figures = [result(folder, "torch", *again, "-", run=run_here)]
    assert "\nhgf" in figures[0]["printed"]
    for init in ("out/text/ckpt.npz", "hf"):  # from a checkpoint to Hugging Face's format, and from there
        args = ["--init", init, "--steps", 0, "--out", "two", "--prompt", "ab", "--beam", 2, "--export-hf", "hf"]
        figures.append(result(folder, "mlx", *own, *args, run=run_here))
    assert np.ptp([run["val_loss"] for run in figures]) < 1e-5
    assert len((folder / "two/sample.txt").read_text(encoding="utf-8")) == 6


def test_what_is_typed(tmp_path, monkeypatch, capsys):
    """Input that is not text, or nested too deeply, is refused in one line; a chat asks again."""
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
