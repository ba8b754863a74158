"""gpt/ against closed forms: dropout, text, beam search, dialogues, rewards; files, tokens, and what is typed."""

import io
import json
import os
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from folders import BACKENDS, copy_alone, environment, load, load_file, make_task, make_trainer, result, run_here
from test_language import GOLDEN, logits, randomised
from test_parity import refusal

GOLDEN = GOLDEN / "gpt2-tiny"
TORCH, DATA = load("gpt", "torch"), load_file("gpt", "data")
X, Y = np.arange(64).reshape(4, 16) % 31, np.arange(1, 65).reshape(4, 16) % 31  # a batch
SAY = dict(beam=1, tokens=9, temperature=1, top_k=None, top_p=1, seed=0)  # the flags for generating text


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(backend):
    """Drawn anew each step from (seed, step), so that a run repeats; off in all that does not train."""

    def said(dropout):
        trainer = make_trainer("gpt", 0, backend, dropout=dropout)
        asked = [
            lambda: float(trainer.evaluate(X, Y)["val_loss"]), lambda: trainer.log_prob(X, Y),
            lambda: list(trainer.generate(X[:, :4], 9, temperature=0)), lambda: trainer.search(X[:1, :4], 9, beam=3),
        ]  # fmt: skip
        return zip(*[(float(trainer.step(X, Y, lr=0.0)["loss"]), ask()) for ask in asked])

    (a, answers), (b, _), (without, expected) = said(0.5), said(0.5), said(0.0)
    assert a == b and len(set(a)) == 4 and np.ptp(without) < 1e-6
    assert without[0] == pytest.approx(expected[0], abs=1e-5) == pytest.approx(-expected[1].mean(), abs=1e-5)
    for answer, right in zip(answers, expected):
        np.testing.assert_array_equal(answer, right)


@pytest.mark.parametrize("backend, other", [BACKENDS, BACKENDS[::-1]])
def test_reference(backend, other, tmp_path):
    """The second model stays as it was while the first learns, and travels with the checkpoint."""
    trainer, reader = (make_trainer("gpt", 0, which) for which in (backend, other))
    trainer.step(X, Y, lr=0.01)
    trainer.keep_reference()
    before = trainer.log_prob(X, Y)
    trainer.step(X, Y, lr=0.01)
    trainer.save(tmp_path / "ckpt.npz", 2)
    reader.load(tmp_path / "ckpt.npz")
    for which in (trainer, reader):
        np.testing.assert_allclose(which.log_prob(X, Y, reference=True), before, atol=1e-5)
        assert np.abs(which.log_prob(X, Y) - before).max() > 1e-3


@pytest.mark.parametrize("n", [5, 30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_generate(backend, n):
    """Greedy tokens are the argmax after the text, or its last 24; at a full context the later half is read again."""
    _, trainer = randomised("gpt", backend, bias=False)
    idx, start = np.arange(2 * n).reshape(2, n) ** 2 % 29, max(0, n - 24)
    for token in trainer.generate(idx, 60, temperature=0):
        start = start if idx.shape[1] - start <= 24 else idx.shape[1] - 12
        assert (token == logits(backend, trainer.model, idx[:, start:])[:, -1].argmax(-1)).all(), idx.shape
        idx = np.concatenate([idx, token[:, None]], 1)
    assert idx.shape == (2, n + 60) and len(np.unique(idx[:, n:])) > 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_beam_search(backend):
    """With a beam as wide as all continuations it finds the most likely one; a beam of 1 is greedy."""
    _, trainer = randomised("gpt", backend, vocab_size=5, block_size=8, bias=False)
    prompt, every = np.array([[1, 4, 1]]), np.array(list(np.ndindex(5, 5, 5)))  # (125, 3)
    z = logits(backend, trainer.model, np.concatenate([prompt.repeat(125, 0), every], 1))[:, 2:-1]
    logp = np.take_along_axis(z - np.log(np.exp(z).sum(-1, keepdims=True)), every[..., None], -1).sum((1, 2))
    greedy = [int(token[0]) for token in trainer.generate(prompt, 3, temperature=0)]
    found = [trainer.search(prompt, 3, beam).tolist() for beam in (1, 5, 125)]
    assert found[2] == every[logp.argmax()].tolist() and found[0] == greedy
    worth = [logp[(every == tokens).all(1).argmax()] for tokens in found]
    assert worth[0] < worth[2] and worth[1] <= worth[2]


def test_stop_strings():
    """The text ends before the first stop string, even if it is spread over tokens, and nothing else is lost."""
    letters = DATA.Characters("abcdefgh")

    def streamed(text, *stop):
        model = SimpleNamespace(generate=lambda *_: letters.encode(text)[:, None])
        return "".join(DATA.stream(model, letters, letters.encode("a"), SimpleNamespace(**SAY, stop=stop)))

    assert streamed("abcabdh") == "abcabdh" and streamed("abcabdh", "abd") == "abc"
    assert streamed("abcabdh", "h", "bd") == "abca" and streamed("abcab", "abd") == "abcab"
    assert streamed("abc", "a") == "" and streamed("fabcb", "bcd", "cb", "gg") == "fab"


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes(backend, tmp_path):
    """Two processes share a batch, each computes its half in two parts: one process's log, printed once."""
    folder = copy_alone("gpt", tmp_path / "gpt")
    args = "--steps 6 --block-size 16 --n-layer 1 --n-embd 32 --tokens 5 --batch-size 9".split()
    alone = result(folder, backend, *args, "--out", "alone", run=run_here)
    launch = {"torch": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"],
              "mlx": [f"{os.path.dirname(sys.executable)}/mlx.launch", "-n", "2", "--", sys.executable]}  # fmt: skip
    command = [*launch[backend], "train.py", "--backend", backend, "--device", "cpu", *args, "--accumulate", "2"]
    both = subprocess.run(command, cwd=folder, env=environment(backend), capture_output=True, text=True)
    assert both.returncode == 0, both.stderr
    (a,), (b,) = (re.findall("step +6/6  loss (.*?)  val_loss (.*?) ", out) for out in (alone["printed"], both.stdout))
    np.testing.assert_allclose(np.array(a, float), np.array(b, float), atol=2e-4)
    assert float(re.search('"val_loss": (.+?)[,}]', both.stdout)[1]) == pytest.approx(alone["val_loss"], abs=1e-5)


# ---- dialogues and rewards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [2, 3])
def test_estimator(group):
    """The mean over all groups of answers, weighted by their probability, is the gradient of E[reward] - beta KL."""
    model, reference = (randomised("gpt", "torch", scale, vocab_size=3, block_size=4)[1].model for scale in (0.3, 0.1))
    answers, rng, beta = np.array(list(np.ndindex(3, 3))), np.random.default_rng(0), 0.3  # all answers of two tokens
    ids = np.append(np.tile([2, 0], (9, 1)), answers, 1)
    x, y, own = *map(torch.from_numpy, (ids[:, :-1], ids[:, 1:])), np.tile(np.array([0, 1, 1], np.float32), (9, 1))
    reward = rng.random(9).astype(np.float32)
    ours, theirs = ((TORCH.log_prob(m(x), y) * torch.from_numpy(own)).sum(-1) for m in (model, reference))
    log_ratio, p, weights = (ours - theirs).detach().numpy(), ours.detach().exp().numpy(), np.zeros(9)
    assert p.sum() == pytest.approx(1, abs=1e-5) and np.ptp(p) > 0.1
    for drawn in map(list, np.ndindex(*[9] * group)):
        np.add.at(weights, drawn, p[drawn].prod() * DATA.advantages(reward[drawn], log_ratio[drawn], group, beta))
    objective = -(ours.exp() * (torch.from_numpy(reward) - beta * (ours - theirs.detach()))).sum()
    loss = TORCH.loss_fn(model(x), y, torch.from_numpy((own * weights[:, None]).astype(np.float32)))
    expected, got = (torch.autograd.grad(value, list(model.parameters())) for value in (objective, loss))
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, atol=1e-5 + 1e-4 * b.abs().max())
    assert max(b.abs().max() for b in expected) > 0.01


def test_dialogues(monkeypatch):
    """Sums that are right, and those held out are never in a dialogue; only the assistant's words are learned."""
    rng = np.random.default_rng(0)
    dialogues = [DATA.draw_dialogue(rng) for _ in range(500)]
    assert {len(dialogue) // 2 for dialogue in dialogues} == {1, 2, 3}
    seen = {text for dialogue in dialogues for _, text in dialogue}
    new = [DATA.draw_sum(rng, held_out=True) for _ in range(500)]
    assert 0.4 < np.mean(["minus" in question for question, _, _ in new]) < 0.6
    for question, answer, value in new:
        a, sign, b = question.removeprefix("What is ").removesuffix("?").split()
        assert int(value) == (int(a) - int(b) if sign == "minus" else int(a) + int(b))
        first, second, end = answer.split("=")
        assert end == value and eval(first) == int(re.match(r"\d+", second)[0]) and eval(second) == int(value)
        assert question not in seen and (sign == "minus" or f"What is {b} plus {a}?" not in seen)  # the same sum
    monkeypatch.setattr(DATA, "draw_dialogue", lambda rng: dialogues[rng.integers(500)])
    x, y, weights = (task := make_task("gpt", "--task", "chat", "--block-size", 90, "--batch-size", 4)).batch(3)
    assert x.shape == y.shape == weights.shape and x.shape[1] <= 90 and (x[:, 1:] == y[:, :-1]).all()
    assert weights.sum() == pytest.approx(1) and len(np.unique(weights)) == 2
    for row, weight in zip(y, weights):
        text, learnt = (b"".join(map(task.tokenizer.decode, i)).decode() for i in (row, row[weight > 0]))
        said = [part.split("\n", 1)[1] for part in text.split(DATA.END) if part.startswith("assistant\n")]
        assert DATA.END.join(said).startswith(learnt.rstrip(DATA.END)) and len(learnt) >= len("".join(said))
    monkeypatch.setattr(DATA, "share_right", lambda *_: 0.5)
    assert task.evaluate(SimpleNamespace(evaluate=lambda *_: {}), whole=True) == {"accuracy": 0.5}


def test_answers_are_weighed(tmp_path):
    """In a reply to a sum only the answer counts, up to END: it becomes more likely if right, else less."""
    tokenizer = DATA.Characters(DATA.END + "\n" + "".join(map(chr, range(32, 127))))

    class Scripted:
        forms = "{}", "9+9={}", "{}=x", "no"  # of these answers, half are right

        def generate(self, prompts, n, temperature, seed, reference):
            self.said = []
            for row, form in zip(prompts, len(prompts) * self.forms):
                asked = b"".join(map(tokenizer.decode, row)).decode().replace("plus", "+").replace("minus", "-")
                self.said.append(form.format(eval(re.search(r"\d+ [+-] \d+", asked)[0])))
            yield from np.stack([tokenizer.encode((text + DATA.END).ljust(n, "z")) for text in self.said], 1)

        def log_prob(self, x, y, reference=False):
            return np.full(x.shape, -2.7 if reference else -1.0, np.float32)

    config = TORCH.Config(block_size=64, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8)
    TORCH.Trainer(config, device="cpu").save(tmp_path / "ckpt.npz", 1, tokenizer=["chars", tokenizer.alphabet])
    flags = "--batch-size", 4, "--group", 4, "--beta", 0.1
    task = make_task("gpt", "--task", "rl", "--init", tmp_path / "ckpt.npz", *flags)
    task.policy = trainer = Scripted()
    x, y, weights = task.batch(3)
    assert (x[:, 1:] == y[:, :-1]).all()
    worth = np.array([1, 1, 0, 0]) - 0.1 * 1.7 * (1 + np.array(list(map(len, trainer.said))))  # reward - beta log ratio
    for row, text, weight in zip(range(4), trainer.said, (worth - worth.mean()) * 4 / 3 / 4):  # over the other three
        counts = weights[row] != 0
        assert b"".join(map(tokenizer.decode, y[row][counts])).decode() == text + DATA.END
        np.testing.assert_allclose(weights[row][counts], weight, rtol=1e-4)
    assert 0.5 <= DATA.share_right(trainer, tokenizer, 100, 0, 0) < 0.6


def test_chat_and_reward(tmp_path, monkeypatch):
    """The user's own dialogues are memorised, answered in the terminal, and then rewarded."""
    folder = copy_alone("gpt", tmp_path / "gpt")
    own = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me,\nmyself."}]
    (folder / "own.jsonl").write_text("".join([json.dumps({"messages": own}) + "\n"] * 10), encoding="utf-8")
    text = (folder / "data.py").read_text(encoding="utf-8")
    (folder / "data.py").write_text(re.sub(r"\b500\b", "20", text), encoding="utf-8")  # fewer sums to measure
    args = "--task chat --block-size 64 --n-layer 1 --n-embd 32 --batch-size 4 --temperature 0".split()
    train = partial(result, folder, "torch", *args, run=run_here)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Who?\nWho?\n")))
    learnt = train("--data", "own.jsonl", "--steps", 60, "--chat")
    assert learnt["printed"].count("gpt: Me,\nmyself.\n") >= 2 and learnt["val_loss"] < 0.2
    assert {"reward", "reward_before"} <= {*train(*"--task rl --init out/chat/ckpt.npz --steps 2 --group 2".split())}


# ---- files, tokens and what is typed ---------------------------------------------------------------------------------


def test_files(tmp_path):
    """What is exported is the released format; and files, types, masks, a head and names as they may be are read."""
    meta, whole = DATA.read_model(GOLDEN)
    DATA.export_gpt2(tmp_path, meta, whole)
    weights, back = (dict(DATA.read_safetensors(folder)) for folder in (GOLDEN, tmp_path))
    assert weights.keys() == back.keys() and all((back[name] == w).all() for name, w in weights.items())
    theirs, own = (json.loads((folder / "config.json").read_text()) for folder in (GOLDEN, tmp_path))
    same = {"model_type", "architectures", "n_positions", "vocab_size", "n_layer", "n_head", "n_embd"}
    assert all(own[name] == theirs[name] for name in same)
    (tmp_path / "model.safetensors").unlink()
    parts = [{}, {"h.0.attn.bias": np.ones((1, 1, 32, 32)), "lm_head.weight": weights["transformer.wte.weight"]}]
    for i, (name, w) in enumerate(weights.items()):
        parts[i % 2][name.removeprefix("transformer.")] = w
    for i, part in enumerate(parts):
        header, data = {}, b""
        for name, w in part.items():
            raw = w.astype("f2") if i else (w.view(np.uint32) >> 16).astype("u2")
            place = [len(data), len(data := data + raw.tobytes())]
            header[name] = {"dtype": ["BF16", "F16"][i], "shape": w.shape, "data_offsets": place}
        header = json.dumps(header).encode()
        (tmp_path / f"model-{i}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    halves = DATA.read_model(tmp_path)[1]
    assert whole.keys() == halves.keys()
    for name, w in whole.items():
        np.testing.assert_allclose(halves[name], w, rtol=0.01, atol=1e-6)


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="GPT-2's tokens may have to be downloaded")
def test_gpt2_tokens():
    tokenizer = DATA.make_tokenizer("gpt2", None)
    assert tokenizer.encode("Hello world").tolist() == [15496, 995] and tokenizer.vocab_size == 50257


def test_no_tokenizer(tmp_path, monkeypatch, capsys):
    """What is none in the config.json of a GPT-2, and GPT-2's own where it can't be downloaded: one line says so."""
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing listens
    assert "TIKTOKEN_CACHE_DIR" in refusal(capsys, make_task, "gpt", "--tokenizer", "gpt2")
    meta, weights = DATA.read_model(GOLDEN)
    for told in (5, ["chars", None], ["chars", ""], ["bpe", ["00"]], ["bpe", []], ["x", 1]):
        DATA.export_gpt2(tmp_path, meta | {"tokenizer": told}, weights)
        assert "tokenized" in refusal(capsys, make_task, "gpt", "--init", tmp_path), told


def test_bpe_travels(tmp_path):
    """The checkpoint has the learned tokens: another text is read with them, and training continues."""
    folder = copy_alone("gpt", tmp_path / "gpt")
    (folder / "own.txt").write_text("the cat sat on the mat. " * 200, encoding="utf-8")
    (folder / "other.txt").write_text("a rat ate the other cat. " * 200, encoding="utf-8")
    args = "--tokenizer bpe --merges 20 --n-layer 1 --n-embd 32 --block-size 16 --steps 30 --tokens 9".split()
    train = partial(result, folder, "torch", *args, run=run_here)
    train("--data", "own.txt")
    more = ["--init", "out/text/ckpt.npz", "--data", "other.txt", "--out", "two", "--steps"]
    assert train(*more, 0)["val_loss"] > 2.5 and train(*more, 60)["val_loss"] < 1.0
    with np.load(folder / "out/text/ckpt.npz") as a, np.load(folder / "two/ckpt.npz") as b:
        assert json.loads(str(a["meta"]))["tokenizer"] == json.loads(str(b["meta"]))["tokenizer"]


def test_command_line(tmp_path, monkeypatch):
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
    """Input that is closed, not text or nested too deeply is refused in one line; a chat asks again."""
    own, letters = tmp_path / "own.jsonl", DATA.Characters("".join(sorted(set("assistant user\nHi" + DATA.END))))
    for bad in ("[" * 100_000, json.dumps({"messages": [{"role": "user", "content": "\udcff"}]})):
        own.write_text(bad + "\n")
        assert refusal(capsys, DATA.load_messages, own).startswith("train.py: ")
    said = ("system", "Be brief."), ("user", "a\u2028b"), ("assistant", "c")
    line = json.dumps({"messages": [dict(zip(("role", "content"), message)) for message in said]}, ensure_ascii=False)
    own.write_text(f"{line}\n" * 10, encoding="utf-8")
    assert DATA.load_messages(own)[9][1] == ("user", "a\u2028b")
    assert make_task("gpt", "--task", "chat", "--data", own).prompts[0][0] == "you: a\u2028b\ngpt: "
    monkeypatch.setattr("sys.stdin", io.StringIO("\u4e2d\udcff\nHi\n"))
    model = SimpleNamespace(generate=lambda *_: letters.encode(DATA.END)[:, None])
    DATA.talk(model, letters, SimpleNamespace(**SAY, stop=[DATA.END], block_size=64))
    out, err = capsys.readouterr()
    assert out.count("gpt: ") == 1 and "alphabet lacks" in err and err.count("\n") == 1
    monkeypatch.setattr("sys.stdin", None)  # as Python has it when the standard input is closed
    for name in ("gpt", "llama"):
        assert "UTF-8" in refusal(capsys, make_task, name, "--prompt", "a\udcff")
        assert "closed" in refusal(capsys, make_task, name, "--prompt", "-")
