"""gpt/ against GPT-2 as transformers computes it and against the frameworks' own layers; the cache; sampling; Muon."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as mlx_optim
import numpy as np
import pytest
import torch
import torch.nn as nn
from folders import BACKENDS, copy_alone, load, make_trainer, run

GOLDEN = Path(__file__).parent / "golden/gpt2-tiny"
TORCH, MLX = load("gpt", "torch"), load("gpt", "mlx")


def array(backend, x):
    return torch.from_numpy(np.ascontiguousarray(x)) if backend == "torch" else mx.array(x)


def randomised(backend, **changes):
    """A small GPT with every parameter random, biases and norms too."""
    net, config = load("gpt", backend), dict(block_size=24, vocab_size=29, n_layer=2, n_head=2, n_embd=16)
    model, rng = net.GPT(net.Config(**{**config, **changes})), np.random.default_rng(4)
    weights = {name: w for name, w in sorted(net.get_weights(model).items())}
    net.set_weights(model, {name: rng.normal(0, 0.3, w.shape).astype(np.float32) for name, w in weights.items()})
    return net, model


def read_safetensors(path):
    """Eight bytes of length, a JSON header, the numbers."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(raw[8 + size :][slice(*entry["data_offsets"])], np.float32).reshape(entry["shape"])
        for name, entry in header.items()
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend):
    """Weights of the released layout, logits and greedy tokens as transformers 5.23 computes them."""
    net, c = load("gpt", backend), json.loads((GOLDEN / "config.json").read_text())
    config = net.Config(c["n_positions"], c["vocab_size"], c["n_layer"], c["n_head"], c["n_embd"])
    trainer = net.Trainer(config, device="cpu")
    weights = {}
    for name, w in read_safetensors(GOLDEN / "model.safetensors").items():
        conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))  # these are stored (in, out)
        weights[name.removeprefix("transformer.")] = w.T.copy() if conv1d else w.copy()
    net.set_weights(trainer.model, weights)
    with np.load(GOLDEN / "expected.npz") as expected:
        ids, logits, greedy = expected["ids"].astype(np.int64), expected["logits"], expected["greedy"]
    ours = trainer.model(array(backend, ids))
    ours = ours.detach().numpy() if backend == "torch" else np.array(ours)
    np.testing.assert_allclose(ours, logits, atol=1e-4, rtol=0)
    new = [int(token[0]) for token in trainer.generate(ids[:1, :5], 12, temperature=0)]
    assert [*ids[0, :5], *new] == greedy.tolist()


def test_against_torch_layers():
    """The same weights in torch's own pre-norm TransformerEncoderLayer with a causal mask give the same logits."""
    net, model = randomised("torch")
    idx, w = torch.randint(0, 29, (3, 24), generator=torch.Generator().manual_seed(0)), dict(model.named_parameters())
    x = w["wte.weight"][idx] + w["wpe.weight"]
    for i in range(2):
        layer = nn.TransformerEncoderLayer(16, 2, 64, 0.0, lambda x: nn.functional.gelu(x, approximate="tanh"),
                                           batch_first=True, norm_first=True)  # fmt: skip
        names = {"self_attn.in_proj_": "attn.c_attn.", "self_attn.out_proj.": "attn.c_proj.", "norm1.": "ln_1."}
        names |= {"linear1.": "mlp.c_fc.", "linear2.": "mlp.c_proj.", "norm2.": "ln_2."}
        pairs = [(theirs, f"h.{i}.{ours}") for theirs, ours in names.items()]
        layer.load_state_dict({theirs + kind: w[ours + kind] for theirs, ours in pairs for kind in ("weight", "bias")})
        x = layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(24), is_causal=True)
    expected = nn.functional.layer_norm(x, (16,), w["ln_f.weight"], w["ln_f.bias"]) @ w["wte.weight"].T
    torch.testing.assert_close(model(idx), expected, atol=1e-4, rtol=1e-4)


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
        model = TORCH.GPT(TORCH.Config(**TORCH.GPT2[size]))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_tokenizer_without_its_files(tmp_path, monkeypatch):
    """tiktoken downloads GPT-2's tokens once; where it cannot, one line says what is needed."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody answers
    code, out, err = run(copy_alone("gpt", tmp_path / "gpt"), "mlx", "--tokenizer", "gpt2", "--steps", "1")
    assert code == 2 and len(err.splitlines()) == 1 and "TIKTOKEN_CACHE_DIR" in err, err


def test_optimizers_and_shapes_of_the_command_line(tmp_path):
    """The flags that shape the model and its training reach it."""
    folder = copy_alone("gpt", tmp_path / "gpt")
    (folder / "own.txt").write_text("abcdefgh \n" * 400, encoding="utf-8")
    flags = "--data own.txt --steps 3 --n-layer 3 --n-head 2 --n-embd 8 --block-size 6 --dropout 0.1 --optimizer adamw"
    more = "--decay cosine --warmup 2 --prompt ab --tokens 9 --temperature 0 --top-k 3 --top-p 0.9 --lr 0.001"
    code, out, err = run(folder, "mlx", *flags.split(), *more.split())
    assert code == 0, err
    with np.load(folder / "out/ckpt.npz") as f:
        meta, names = json.loads(str(f["meta"])), set(f.files)
    shape = dict(block_size=6, vocab_size=10, n_layer=3, n_head=2, n_embd=8, dropout=0.1, optimizer="adamw")
    assert shape.items() <= meta["config"].items() and meta["alphabet"] == "\n abcdefgh"
    assert "h.2.attn.c_attn.weight" in names and "h.3.attn.c_attn.weight" not in names
    assert len((folder / "out/sample.txt").read_text(encoding="utf-8")) == 11
    again = ["--data", "own.txt", "--steps", "0", "--resume", "--tokens", "5"]
    code, out, err = run(folder, "torch", *again)
    assert code == 2 and "alphabet" in err  # the default prompt has a capital letter
    code, out, err = run(folder, "torch", *again, "--prompt", "a")
    assert code == 0 and json.loads(out.splitlines()[-1].removeprefix("result "))["steps"] == 0
