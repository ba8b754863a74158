"""llama/ against closed forms: positions, attention sinks, LoRA, few bits, tokens, files, dialogues, large texts."""

import base64
import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from folders import BACKENDS, copy_alone, load, load_file, make_task, result, run_here
from test_language import array, logits, randomised

data = load_file("llama", "data")
TORCH = load("llama", "torch")


# ---- the model -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("silent", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks(backend, silent):
    """If one layer attends, a rolling cache is the sinks and the window read as one short text; its memory stays."""
    net, trainer = randomised("llama", backend, window=5, sinks=3, head_dim=12)
    weights, still = net.get_weights(trainer.model), f"layers.{silent}.self_attn.o_proj.weight"
    net.set_weights(trainer.model, weights | {still: np.zeros_like(weights[still])})
    idx, t, cache = np.arange(40) * 7 % 29, np.arange(40), net.KVCache(trainer.model, 1, 10**9)
    for now in t:
        seen = idx[(t <= now) & ((t < 3) | (t > now - 5))]
        new, whole = (logits(backend, trainer.model, *x)[0, -1] for x in ((idx[None, [now]], cache), (seen[None],)))
        np.testing.assert_allclose(new, whole, atol=1e-4 * np.abs(whole).max())
    assert cache.size == 8 and {tuple(k.shape) for k in cache.k + cache.v} == {(1, 2, 8, 12)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_window(backend):
    """The rolling cache gives the same as the whole text under the window's mask, far beyond the window."""
    net, trainer = randomised("llama", backend, window=6, sinks=0)
    text, cache = np.random.default_rng(0).integers(0, 29, (2, 40)), net.KVCache(trainer.model, 2, 10**9)
    whole = logits(backend, trainer.model, text)
    for t in range(40):
        new = logits(backend, trainer.model, text[:, t : t + 1], cache)
        np.testing.assert_allclose(new[:, 0], whole[:, t], atol=1e-4 * np.abs(whole).max())
    assert (next(trainer.generate(text, 1, temperature=0)) == whole[:, -1].argmax(-1)).all()


@pytest.mark.parametrize("field, good, bad", [
    ("head_dim", [8, 10, 30], [7, 9]), ("n_head", [4, 8, 16], [3, 10, 32]), ("n_kv_head", [1, 2, 4], [3, 8]),
    ("sinks", [0, 4, 23], [24, 25]),
])  # fmt: skip
def test_shapes(field, good, bad):
    """What fits no Llama is refused by name, and nothing else."""
    config = dict(block_size=24, n_head=4, n_kv_head=1, n_embd=32)
    for value in good + bad:
        for net in (load("llama", backend) for backend in BACKENDS):
            with pytest.raises(ValueError, match=field) if value in bad else nullcontext():
                net.Config(**{**config, field: value})


@pytest.mark.parametrize("backend", BACKENDS)
def test_lora(backend, tmp_path):
    """It starts from the model as it is, trains and saves A and B alone, and merged it is the same model."""
    net, base = randomised("llama", backend)
    lora = dict(lora_rank=3, lora_targets=["qkv_proj", "down_proj"], optimizer="adamw")
    config = net.Config(**asdict(base.config) | lora)
    before, x = net.get_weights(base.model), np.arange(48).reshape(2, 24) % 29
    trainer, again = (net.Trainer(config, seed=seed, device="cpu", weights=before) for seed in (0, 5))
    whole = logits(backend, base.model, x)
    np.testing.assert_allclose(logits(backend, trainer.model, x), whole, atol=1e-5)
    losses = [float(trainer.step(x, (x + 1) % 29, lr=0.02)["loss"]) for _ in range(30)]
    after = net.get_weights(trainer.model)
    assert losses[-1] < 0.7 * losses[0] and all((after[name] == w).all() for name, w in before.items())
    trainer.save(tmp_path / "ckpt.npz", 30)
    with np.load(tmp_path / "ckpt.npz") as f:
        names = {name for name in f.files if name != "meta" and name[:2] not in ("m.", "v.")}
    parts = [f"layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.qkv_proj", "mlp.down_proj")]
    assert names == {f"{part}.lora_{k}" for part in parts for k in "ab"} == net.trained(trainer.model).keys()
    assert again.load(tmp_path / "ckpt.npz") == 30
    said = logits(backend, trainer.model, x)
    np.testing.assert_allclose(logits(backend, again.model, x), said, atol=1e-5)
    trainer.merge()
    np.testing.assert_allclose(logits(backend, trainer.model, x), said, atol=1e-3)
    assert net.get_weights(trainer.model).keys() == before.keys() == net.trained(trainer.model).keys()
    assert np.abs(said - whole).max() > 0.5 and not (trainer.m or trainer.t or trainer.config.lora_rank)


@pytest.mark.parametrize("bits, error", [(8, 0.01), (4, 0.08)])
def test_quantized(bits, error):
    """As close to the matrix, and to the whole model, as the bits allow; the twins nearly agree; and it is smaller."""
    rng, said = np.random.default_rng(0), []
    w, x = rng.normal(size=(64, 96)).astype(np.float32), rng.normal(size=(2, 5, 96)).astype(np.float32)
    for backend in BACKENDS:
        q = load("llama", backend).Quantized(array(backend, w), bits)
        said.append(np.array(q(array(backend, x)).tolist()))
        assert error / 10 < np.linalg.norm(said[-1] - x @ w.T) / np.linalg.norm(x @ w.T) < error
        if bits == 8:
            rows = np.array(q.rows(array(backend, np.array([[3, 60]]))).tolist())
            np.testing.assert_allclose(rows[0], w[[3, 60]], atol=0.03)
        net, trainer = randomised("llama", backend, n_embd=64, n_hidden=128, lora_rank=2, tied=bits == 8)
        whole, size = logits(backend, trainer.model, idx := np.arange(24)[None] % 29), trainer.quantize(32)
        assert size == pytest.approx(4e-6 * sum(p.size for p in net.get_weights(trainer.model).values()), rel=0.01)
        assert trainer.quantize(bits) < size / (2.5 if bits == 8 else 3)
        off = np.linalg.norm(logits(backend, trainer.model, idx) - whole) / np.linalg.norm(whole)
        assert error / 10 < off < 6 * error
    assert np.linalg.norm(said[0] - said[1]) / np.linalg.norm(said[1]) < (0.01 if bits == 8 else 0.005)


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
    """tiktoken's numbers, looked up, are those of byte-level BPE done step by step, on strings that are hard to cut.

    SmolLM2 has no token for some control characters: they are left out.
    """
    tokens = write_tokenizer(tmp_path, kind, strings=kind == "Digits")
    tokenizer = data.Tokens(tmp_path)
    for text in TRICKY:
        ids = tokenizer.encode(text)
        assert ids.tolist() == by_hand(text, kind, tokens), repr(text)
        assert b"".join(tokenizer.decode(int(i)) for i in ids) == text.encode()
    joined = [tokens.index("\u0120the"), tokens.index("\u0120")]
    assert set(tokenizer.encode(" the 12")) >= set(joined[: 1 if kind == "ByteLevel" else 2])
    assert tokenizer.encode("<|im_end|>", special=True).tolist() == [2] != tokenizer.encode("<|im_end|>").tolist()
    t = json.loads((tmp_path / "tokenizer.json").read_text())
    del t["model"]["vocab"][LETTER[4]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(t))
    assert data.Tokens(tmp_path).encode("a\x04b").tolist() == tokenizer.encode("ab").tolist()


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


def write_model(folder):
    """A small random Llama in Hugging Face's format."""
    shape = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=64, rope_theta=5000.0)
    config = TORCH.Config(block_size=512, vocab_size=len(write_tokenizer(folder.parent, "Digits")), **shape)
    weights = TORCH.get_weights(TORCH.Trainer(config, device="cpu").model)
    weights = {name: w * 10 if w.ndim == 2 else w for name, w in weights.items()}
    data.export_llama(folder, config, weights, "bfloat16", folder.parent)


def test_export(tmp_path, monkeypatch):
    """What is written is read again: the same model in float32, in one file or in many, and nearly so in bfloat16."""
    llama3 = dict(rope="llama3", rope_factor=4.0, rope_context=8)
    for changes in (dict(head_dim=12), dict(n_head=2, tied=False, rope="linear", rope_factor=2.0), llama3):
        net, trainer = randomised("llama", "torch", **changes)
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
                assert (logits("torch", there.model, x) == logits("torch", trainer.model, x)).all()
    assert not list(tmp_path.glob("*.part"))


def test_bad_files(tmp_path, capsys):
    """Numbers that are impossible for a Llama, or contradict its weights, and deeply nested JSON: one line says so."""
    write_model(model := tmp_path / "model")
    config, deep = json.loads((model / "config.json").read_text()), "[" * 100_000
    bad = [
        ("num_hidden_layers", -1), ("num_hidden_layers", 10**9), ("num_hidden_layers", "a"), ("num_attention_heads", 0),
        ("num_key_value_heads", -2), ("head_dim", 10**9), ("hidden_size", True), ("vocab_size", 10**9),
        ("intermediate_size", 3.5), ("rms_norm_eps", "small"), ("max_position_embeddings", 0),
    ]  # fmt: skip
    files = [("config.json", json.dumps(config | {key: x}), f"config.json has {key} ") for key, x in bad]
    files += [("config.json", deep, ""), ("tokenizer.json", deep, ""), ("model.safetensors", f"{deep}.", "damaged")]
    read = {"config.json": data.load_llama, "tokenizer.json": data.read_tokenizer}
    read["model.safetensors"] = lambda model: dict(data.read_safetensors(model))
    for name, text, said in files:
        head = len(deep).to_bytes(8, "little") if said == "damaged" else b""
        (model / name).write_bytes(head + text.encode())
        with pytest.raises(SystemExit):
            read[name](model)
        assert said in (err := capsys.readouterr().err) and len(err.splitlines()) == 1, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_program(backend, tmp_path, monkeypatch):
    """The life of a real model: adapt it to dialogues, resume, merge, chat; the merged model is the adapted one."""
    folder, model = copy_alone("llama", tmp_path / "llama"), tmp_path / "model"
    write_model(model)
    line = {"messages": [{"role": "user", "content": "the sea?"}, {"role": "assistant", "content": "in the hell"}]}
    (folder / "own.jsonl").write_text((json.dumps(line) + "\n") * 12)
    args = "--data own.jsonl --block-size 64 --batch-size 4 --lr 0.03 --warmup 5 --temperature 0 --tokens 12".split()
    train = partial(result, folder, backend, *args, run=run_here)
    first = train("--init", model, "--steps", 0)
    tuned = train("--init", model, "--lora", 4, "--steps", 50, "--merge")
    assert tuned["val_loss"] < 0.6 < 2 < first["val_loss"] and " 3,328 of them" in tuned["printed"]
    ended = train("--resume", "--steps", 50, "--bits", 8, "--export-hf", "new")
    assert ended["val_loss"] == pytest.approx(tuned["val_loss"], abs=0.1) and " 8 bits: " in ended["printed"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the sea?\n")))
    said = train("--resume", "--steps", 0, "--out", "out/chat/merged", "--chat", "--system", "")
    assert "> in the hell\n" in said["printed"] and "val_loss" not in said
    assert (folder / said["out"] / "sample.txt").read_text() == "user: the sea?\n\nassistant: in the hell\n\n"
    exported = train("--init", "new", "--steps", 0, "--out", "out/new")
    assert exported["val_loss"] == pytest.approx(tuned["val_loss"], abs=1e-3)


def test_lengths(tmp_path):
    """Texts longer than trained on: worse than short ones, but not with a window; and --rope turns the positions."""
    folder = copy_alone("llama", tmp_path / "llama")
    (folder / "own.txt").write_text("".join(f"{i % 7} and {i * i % 10}, " for i in range(2000)))
    args = "--data own.txt --block-size 16 --n-layer 1 --n-embd 32 --batch-size 16 --tokens 99 --prompt 12".split()
    train = partial(result, folder, "torch", *args, "--lengths", "16", "64", run=run_here)
    plain = train("--steps", 150)
    window = train("--resume", "--steps", 0, "--window", 12, "--sinks", 0)
    linear = train("--resume", "--steps", 0, "--rope", "linear", "--factor", 4)
    assert plain["perplexity_16"] == pytest.approx(plain["perplexity"], rel=1e-6)
    assert plain["perplexity_64"] > 1.1 * plain["perplexity_16"] > window["perplexity_64"]
    assert linear["perplexity_16"] > 1.1 * plain["perplexity_16"]
    assert len((folder / "out/text/sample.txt").read_text()) == 101


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
