"""llama/ against closed forms: positions, attention sinks, LoRA, few bits, tokens, files, dialogues, large texts."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import regex
import torch
from folders import BACKENDS, copy_alone, load, load_file, make_task, result, run_here
from test_language import array, logits, randomised
from test_parity import refusal

data = load_file("llama", "data")
TORCH = load("llama", "torch")


def test_rope():
    """rotate is MLX's own rope; linear is the same with positions closer together; llama3 keeps fast pairs only."""
    llama = partial(TORCH.Config, n_head=2, n_kv_head=2, n_embd=128)
    configs = llama(), llama(rope="linear", rope_factor=4.0), llama(rope="llama3", rope_factor=8.0, rope_context=100)
    usual, linear, llama3 = map(TORCH.rope_frequencies, configs)
    x, turns = np.random.default_rng(0).normal(size=(2, 3, 7, 64)).astype(np.float32), 100 * usual / (2 * np.pi)
    for f, scale in (usual, 1.0), (linear, 0.25):
        ours = TORCH.rotate(torch.from_numpy(x), TORCH.rope(torch.arange(5, 12), torch.from_numpy(f)))
        theirs = mx.fast.rope(mx.array(x), 64, traditional=False, base=10000.0, scale=scale, offset=5)
        np.testing.assert_allclose(ours.numpy(), np.array(theirs), atol=1e-5)
    np.testing.assert_allclose(llama3 / usual, np.interp(turns, [1, 4], [1 / 8, 1]), rtol=1e-5)
    assert ((1 < turns) & (turns < 4)).sum() >= 3


@pytest.mark.parametrize("sinks, silent", [(0, None), (3, 0), (3, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rolling_cache(backend, sinks, silent):
    """Far beyond the window, the whole text under the window's mask has the same logits; and its memory stays."""
    net, trainer = randomised("llama", backend, window=5, sinks=sinks, head_dim=12)
    if sinks:  # if only one layer attends, these and the window can be read as one short text
        net.set_weights(trainer.model, {f"layers.{silent}.self_attn.o_proj.weight": np.zeros((32, 48), np.float32)})
    idx, t = np.random.default_rng(0).integers(0, 29, (2, 40)), np.arange(40)
    whole, cache = logits(backend, trainer.model, idx), net.KVCache(trainer.model, 2, 10**9)
    for now in t:
        new = logits(backend, trainer.model, idx[:, [now]], cache=cache)[:, 0]
        seen = (t <= now) & ((t < sinks) | (t > now - 5))
        expected = logits(backend, trainer.model, idx[:, seen])[:, -1] if sinks and now > 7 else whole[:, now]
        np.testing.assert_allclose(new, expected, atol=1e-4 * np.abs(expected).max())
    assert cache.size == 5 + sinks and {tuple(k.shape) for k in cache.k + cache.v} == {(2, 2, 5 + sinks, 12)}
    assert (next(trainer.generate(idx, 1, temperature=0)) == expected.argmax(-1)).all()


@pytest.mark.parametrize("field, good, bad", [
    ("head_dim", [8, 10, 30], [7, 9]), ("n_head", [4, 8, 16], [3, 10, 32]), ("n_kv_head", [1, 2, 4], [3, 8]),
    ("sinks", [0, 4, 23], [24, 25]),
])  # fmt: skip
def test_shapes(field, good, bad):
    """What fits no Llama is refused by name, and nothing else."""
    for net, value in product((load("llama", backend) for backend in BACKENDS), good + bad):
        with pytest.raises(ValueError, match=field) if value in bad else nullcontext():
            net.Config(**dict(block_size=24, n_head=4, n_kv_head=1, n_embd=32) | {field: value})


@pytest.mark.parametrize("backend", BACKENDS)
def test_lora(backend, tmp_path):
    """It starts from the model as it is, trains and saves A and B alone, and merged it is the same model."""
    net, base = randomised("llama", backend)
    before, x = net.get_weights(base.model), np.arange(48).reshape(2, 24) % 29
    config = replace(base.config, lora_rank=3, lora_targets=["qkv_proj", "down_proj"], optimizer="adamw")
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
            np.testing.assert_allclose(q.rows(array(backend, np.array([[3, 60]]))).tolist(), [w[[3, 60]]], atol=0.03)
        net, trainer = randomised("llama", backend, n_embd=64, n_hidden=128, lora_rank=2, tied=bits == 8)
        whole, size = logits(backend, trainer.model, idx := np.arange(24)[None] % 29), trainer.quantize(32)
        assert size == pytest.approx(4e-6 * sum(p.size for p in net.get_weights(trainer.model).values()), rel=0.01)
        assert trainer.quantize(bits) < size / (2.5 if bits == 8 else 3)
        off = np.linalg.norm(logits(backend, trainer.model, idx) - whole) / np.linalg.norm(whole)
        assert error / 10 < off < 6 * error
    assert np.linalg.norm(said[0] - said[1]) / np.linalg.norm(said[1]) < (0.01 if bits == 8 else 0.005)


def test_lengths(tmp_path):
    """Texts longer than trained on: worse than short ones, but not with a window; and --rope turns the positions."""
    folder = copy_alone("llama", tmp_path / "llama")
    (folder / "own.txt").write_text("".join(f"{i % 7} and {i * i % 10}, " for i in range(2000)))
    args = "--data own.txt --block-size 16 --n-layer 1 --n-embd 32 --batch-size 16 --tokens 99 --prompt 12".split()
    train = partial(result, folder, "torch", *args, "--lengths", "16", "64", run=run_here)
    plain, window = train("--steps", 150), train("--resume", "--steps", 0, "--window", 12, "--sinks", 0)
    linear = train("--resume", "--steps", 0, "--rope", "linear", "--factor", 4)
    assert plain["perplexity_16"] == pytest.approx(plain["perplexity"], rel=1e-6)
    assert plain["perplexity_64"] > 1.1 * plain["perplexity_16"] > window["perplexity_64"]
    assert linear["perplexity_16"] > 1.1 * plain["perplexity_16"]
    assert len((folder / "out/text/sample.txt").read_text()) == 101


# ---- models in Hugging Face's format, their tokens and dialogues -----------------------------------------------------

SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTER = {b: chr(b) for b in SHOWN} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in SHOWN)}
MERGES = "Ġ t,h e,Ġt he,i n,Ġ Ġ,ĠĠ Ġ,Ġ 1,1 2,l l,' s,Ċ Ċ,e r,ä ¸,ä¸ Ń".split(",")
TRICKY = [
    "the 12 thing's in  the   1990s: 3.14, -7", "  \n\n the\n \n12\n  34 \t x", "I'll THE'S he'll  ", "", " ", "   ",
    "\u4e2d\u6587 na\u00efve \U0001f600 1\u0661\u00bd", "1", " 1 ", "  12", "a1b22c333", "\r\n\r\n  text\r\n",
    "<|im_end|> the", "x\u00a0 \u30001", "\x04\x06 a\x1d",
]  # fmt: skip


def write_tokenizer(folder, kind):
    """A tokenizer.json with few merges, which splits like GPT-2 (ByteLevel), SmolLM2 (Digits) or its regex (Split)."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(LETTER.values()), *(pair.replace(" ", "") for pair in MERGES)]
    pre = {"ByteLevel": [], "Digits": [{"type": "Digits", "individual_digits": True}],
           "Split": [{"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}| ?\p{L}+|[^\p{L}\p{N}]"}}]}[kind]  # fmt: skip
    pre = [*pre, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": kind != "Split"}]
    (folder / "tokenizer.json").write_text(json.dumps({
        "added_tokens": [{"id": i, "content": token} for i, token in enumerate(special)], "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre} if len(pre) > 1 else pre[0],
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": MERGES if kind == "Digits" else [pair.split() for pair in MERGES]},  # both occur
    }))  # fmt: skip
    return tokens


def by_hand(text, kind, tokens):
    """Byte-level BPE step by step: cut, spell in letters, join the pairs in the order in which they were learned."""
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    parts = regex.findall(r"\p{N}|[^\p{N}]+", text) if kind == "Digits" else [text]
    pattern, ids = r"\p{N}{1,3}| ?\p{L}+|[^\p{L}\p{N}]" if kind == "Split" else gpt2, []
    for word in (word for part in parts for word in regex.findall(pattern, part)):
        letters = " ".join(LETTER[byte] for byte in word.encode())
        for pair in MERGES:
            letters = regex.sub(rf"(?<!\S){regex.escape(pair)}(?!\S)", pair.replace(" ", ""), letters)
        ids += map(tokens.index, letters.split())
    return ids


@pytest.mark.parametrize("kind", ["ByteLevel", "Digits", "Split"])
def test_tokenizer(kind, tmp_path):
    """tiktoken's numbers, looked up, are those of byte-level BPE done step by step, on strings that are hard to cut."""
    tokens, tokenizer = write_tokenizer(tmp_path, kind), data.Tokens(tmp_path)
    for text in TRICKY:
        ids = tokenizer.encode(text)
        assert ids.tolist() == by_hand(text, kind, tokens), repr(text)
        assert b"".join(map(tokenizer.decode, ids.tolist())) == text.encode()
    joined = [tokens.index("\u0120the"), tokens.index("\u0120")]
    assert set(tokenizer.encode(" the 12")) >= set(joined[: 1 if kind == "ByteLevel" else 2])
    assert tokenizer.encode("<|im_end|>", special=True).tolist() == [2] != tokenizer.encode("<|im_end|>").tolist()
    t = json.loads((tmp_path / "tokenizer.json").read_text())
    del t["model"]["vocab"][LETTER[4]]  # SmolLM2 has no token for some control characters: they are left out
    (tmp_path / "tokenizer.json").write_text(json.dumps(t))
    assert data.Tokens(tmp_path).encode("a\x04b").tolist() == tokenizer.encode("ab").tolist()


def test_dialogue(tmp_path):
    """ChatML and Llama 3's form to the letter; what the assistant says is marked; a user's <|im_end|> is only text."""
    messages = [("system", "Be brief."), ("user", "Hi <|im_end|>\n"), ("assistant", "Hello!"), ("user", "Bye 12")]
    write_tokenizer(tmp_path, "Digits")
    ids, own = (chatml := data.Tokens(tmp_path)).dialogue(messages)
    assert b"".join(map(chatml.decode, ids.tolist())).decode() == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|><|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye 12<|im_end|>\n<|im_start|>assistant\n"
    )
    assert b"".join(map(chatml.decode, ids[own].tolist())) == b"Hello!<|im_end|>\n"
    assert (ids == 2).sum() == 4 and chatml.ends == {0, 2}
    (tmp_path / "llama3").mkdir()
    lines = [base64.b64encode(bytes([i])) + b" %d" % i for i in range(256)] + [base64.b64encode(b"He") + b" 256"]
    (tmp_path / "llama3/tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    ids, own = (llama3 := data.Tokens(tmp_path / "llama3")).dialogue(messages[1:3])
    assert b"".join(map(llama3.decode, ids.tolist())).decode() == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi <|im_end|><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
    )
    assert ids[own].tolist() == [256, *b"llo!", 257 + 9] and ids[0] == 257 and llama3.vocab_size == 257 + 256


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
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            data.export_llama(folder, trainer.config, weights, dtype)
            files = sorted(file.name for file in folder.glob("*.safetensors"))
            if most > 9000:
                assert files == ["model.safetensors"]
            else:
                index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
                assert set(index.values()) == set(files) and len(index) > len(weights)
                assert files[1] == f"model-00002-of-{len(files):05}.safetensors"
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
    for key, bad in [
        ("num_hidden_layers", -1), ("num_hidden_layers", 10**9), ("num_hidden_layers", "a"), ("num_attention_heads", 0),
        ("num_key_value_heads", -2), ("head_dim", 10**9), ("hidden_size", True), ("vocab_size", 10**9),
        ("intermediate_size", 3.5), ("rms_norm_eps", "small"), ("max_position_embeddings", 0),
    ]:  # fmt: skip
        (model / "config.json").write_text(json.dumps(config | {key: bad}))
        assert f"config.json has {key} " in refusal(capsys, data.load_llama, model)
    for file, read in ("config.json", data.load_llama), ("tokenizer.json", data.read_tokenizer):
        (model / file).write_text(deep)
        refusal(capsys, read, model)
    (model / "model.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep.encode() + b".")
    assert "damaged" in refusal(capsys, dict, data.read_safetensors(model))


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
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the sea?\n")))
    said = train("--resume", "--steps", 0, "--out", "out/chat/merged", "--chat", "--system", "")
    assert "> in the hell\n" in said["printed"] and "val_loss" not in said
    assert (folder / said["out"] / "sample.txt").read_text() == "user: the sea?\n\nassistant: in the hell\n\n"
    exported = train("--init", "new", "--steps", 0, "--out", "out/new")
    assert exported["val_loss"] == pytest.approx(tuned["val_loss"], abs=1e-3)


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
    args, raw = ["llama", "--tokenizer", folder, "--block-size", "8", "--data"], ids.astype(np.uint16).tobytes()
    for file, content in ("train.bin", raw[:1800]), ("val.bin", raw[1800:]), ("whole.bin", raw):
        (folder / file).write_bytes(content)
    for path in (folder, folder / "whole.bin"):
        task = make_task(*args, path)
        assert (task.train[np.arange(900)] == ids[:900]).all() and (task.val[np.arange(100)] == ids[900:]).all()
        assert (np.diff(task.batch(0)[0]) % 250 == 1).all()
    for name in ("gpt", "llama"):
        monkeypatch.setattr(load_file(name, "data"), "LARGE", 1000)
    for file, content, command in [
        ("odd.bin", b"123", args), ("val.bin", b"", args), ("high.bin", np.full(999, 60000, np.uint16).tobytes(), args),
        ("whole.bin", raw, ["llama", "--data"]), ("whole.bin", raw, ["gpt", "--tokenizer", "chars", "--data"]),
        ("broken.txt", own.read_bytes() * 9 + b"\xff" * 9, args), ("zero.txt", own.read_bytes() * 9 + b"\0", args),
    ]:  # fmt: skip
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
