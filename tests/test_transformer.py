"""transformer/: attention by hand, nn.Transformer with the same weights, beam search, BLEU, byte pairs, drawn data."""

import itertools
import json
import math

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import BACKENDS, FOLDERS, batches, copy_alone, load, load_file, make_args, make_task, make_trainer, run

data = load_file("transformer", "data")


def array(backend, x):
    return torch.from_numpy(x) if backend == "torch" else mx.array(x)


# ---- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_by_hand(backend, masked):
    """Outputs and all gradients, against the fused attention of each framework."""
    rng, net = np.random.default_rng(0), load("transformer", backend)
    q, k, v, dy = (rng.standard_normal((2, 3, n, 5), np.float32) for n in (4, 6, 6, 4))
    mask = np.tril(np.ones((4, 6), bool), 1) if masked else None
    Q, K, V, dY = (array(backend, a) for a in (q, k, v, dy))
    M = array(backend, mask) if masked else None
    y, p = net.attention(Q, K, V, M)
    ours = [y, *net.attention_backward(dY, Q, K, V, p)]
    if backend == "torch":
        leaves = [a.clone().requires_grad_() for a in (Q, K, V)]
        fused = F.scaled_dot_product_attention(*leaves, attn_mask=M)
        theirs = [fused.detach(), *torch.autograd.grad(fused, leaves, dY)]
    else:
        (fused,), grads = mx.vjp(
            lambda *a: mx.fast.scaled_dot_product_attention(*a, scale=5**-0.5, mask=M), [Q, K, V], [dY]
        )
        theirs = [fused, *grads]
    for a, b in zip(ours, theirs):
        assert np.abs(np.asarray(b)).max() > 0.1
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)
    assert not masked or np.asarray(p)[..., 0, 2:].max() == 0


@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_builtin(backend, i):
    """nn.Transformer with the same weights gives the same logits: pre- and post-norm, with padding."""
    trainer, (src, tgt) = make_trainer("transformer", i, backend), batches("transformer", i, 1)[0]
    for _ in range(3):  # away from biases of 0 and norms of 1
        trainer.step(src, tgt, lr=0.05)
    trainer.model.eval()
    builtin = load("transformer", backend).BuiltinSeq2Seq(trainer.model)
    builtin.eval()
    a, b = (model(*trainer.arrays(src, tgt)) for model in (trainer.model, builtin))
    a, b = (x.detach().numpy() if backend == "torch" else np.asarray(x) for x in (a, b))
    real = (tgt != 0)[:, :, None]
    assert a.std() > 0.1
    np.testing.assert_allclose(a * real, b * real, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_seen(backend):
    """More padding changes nothing, and no token sees a later one; both of which the right tokens do see."""
    trainer, (src, tgt) = make_trainer("transformer", 0, backend), batches("transformer", 0, 1)[0]

    def logits(src, tgt):
        x = trainer.model(*trainer.arrays(src, tgt))
        return x.detach().numpy() if backend == "torch" else np.array(x)

    trainer.model.eval()
    before = logits(src, tgt)
    wider = np.pad(src, ((0, 0), (0, 3)))
    np.testing.assert_allclose(logits(wider, tgt), before, rtol=1e-4, atol=1e-5)
    other = tgt.copy()
    other[:, 5] = 3 + (other[:, 5] - 2) % 9
    after = logits(src, other)
    np.testing.assert_allclose(after[:, :5], before[:, :5], rtol=1e-4, atol=1e-5)
    assert np.abs(after[:, 5:] - before[:, 5:]).max(1).min() > 1e-4
    src[0, 0] = 3 + (src[0, 0] - 2) % 12
    assert np.abs(logits(src, tgt) - before)[0].min(0).max() > 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_sinusoids(backend):
    """The paper's: sin and cos of pos / 10000^(2i / width), one after the other."""
    net = load("transformer", backend)
    table = np.asarray(net.Positions(net.Config(width=12), 30)._table)
    for pos, i in itertools.product(range(30), range(6)):
        angle = pos / 10000 ** (2 * i / 12)
        assert table[pos, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[pos, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss(backend):
    """Label smoothing spreads over all tokens, padding does not count; evaluate has no smoothing."""
    trainer, (src, tgt) = make_trainer("transformer", 0, backend), batches("transformer", 0, 1)[0]
    trainer.model.eval()
    x = trainer.model(*trainer.arrays(src, tgt[:, :-1]))
    x = (x.detach().numpy() if backend == "torch" else np.array(x)).astype(np.float64)
    logp = x - np.log(np.exp(x).sum(-1, keepdims=True))
    y, real = tgt[:, 1:], tgt[:, 1:] != 0
    nll = -np.take_along_axis(logp, y[..., None], -1)[..., 0]
    smooth = 0.9 * nll - 0.1 * logp.mean(-1)
    figures = trainer.evaluate(src, tgt)
    assert float(figures["val_loss"]) == pytest.approx(nll[real].mean(), rel=1e-5)
    assert float(figures["accuracy"]) == pytest.approx((x.argmax(-1) == y)[real].mean(), abs=1e-6)
    assert float(trainer.step(src, tgt, lr=0.1)["loss"]) == pytest.approx(smooth[real].mean(), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_of_vit(backend):
    """Label smoothing by hand in a step, none in evaluate; predict gives the probabilities of the same logits."""
    trainer, (x, y) = make_trainer("transformer", 2, backend, label_smoothing=0.2), batches("transformer", 2, 1)[0]
    logp = np.log(trainer.predict(x).astype(np.float64))
    np.testing.assert_allclose(np.exp(logp).sum(1), 1, atol=1e-5)
    nll, figures = -logp[np.arange(len(y)), y], trainer.evaluate(x, y)
    assert float(figures["val_loss"]) == pytest.approx(nll.mean(), rel=1e-4)
    assert float(figures["accuracy"]) == pytest.approx((logp.argmax(1) == y).mean())
    assert float(trainer.step(x, y, lr=0.1)["loss"]) == pytest.approx((0.8 * nll - 0.2 * logp.mean(1)).mean(), rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip(backend):
    """Its loss and accuracy by hand, both ways; padding says nothing; no temperature is below 0.01."""
    trainer, (x, ids) = make_trainer("transformer", 3, backend), batches("transformer", 3, 1)[0]
    for _ in range(5):
        trainer.step(x, ids, lr=0.01)
    images, texts = trainer.embed(x, ids)
    for vectors in (images, texts):
        np.testing.assert_allclose((vectors**2).sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(trainer.embed(x, np.pad(ids, ((0, 0), (0, 1))))[1], texts, atol=1e-5)
    net = load("transformer", backend)
    for scale, used in ((4.0, 4.0), (9.0, math.log(100))):
        net.set_weights(trainer.model, net.get_weights(trainer.model) | {"logit_scale": np.array(scale, np.float32)})
        logits = images.astype(np.float64) @ texts.T * math.exp(used)
        p = [np.exp(a) / np.exp(a).sum(1, keepdims=True) for a in (logits, logits.T)]
        nll = [-np.log(np.diag(a)).mean() for a in p]
        right = [(a.argmax(1) == np.arange(len(a))).mean() for a in p]
        figures = trainer.evaluate(x, ids)
        assert float(figures["val_loss"]) == pytest.approx(np.mean(nll), rel=1e-3)
        assert float(figures["accuracy"]) == pytest.approx(np.mean(right), abs=1e-6)
        assert abs(nll[0] - nll[1]) > 0.01 * np.mean(nll)


@pytest.mark.parametrize("backend", BACKENDS)
def test_patches(backend):
    """What the first layer of a ViT looks at, by hand: squares of the picture as tokens, after the class token."""
    trainer, (x, _) = make_trainer("transformer", 2, backend, n_layer=1), batches("transformer", 2, 1)[0]
    w = load("transformer", backend).get_weights(trainer.model)
    squares = [x[:, i : i + 4, j : j + 4].reshape(len(x), -1) for i in (0, 4) for j in (0, 4, 8)]
    tokens = [(4 * square - 2) @ w["encoder.embed.weight"].T + w["encoder.embed.bias"] for square in squares]
    tokens = np.stack([np.broadcast_to(w["encoder.token"], tokens[0].shape), *tokens], 1)  # (B, 7, 24)
    tokens = tokens + np.asarray(trainer.model.encoder.positions._table)
    tokens = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-5)
    q, k = (tokens @ w[f"encoder.blocks.0.attn.{a}.weight"].T for a in "qk")
    q, k = (a.reshape(len(x), 7, 3, 8).swapaxes(1, 2) for a in (q, k))
    p = np.exp(q @ k.swapaxes(2, 3) / math.sqrt(8))
    np.testing.assert_allclose(trainer.attention(x), p / p.sum(-1, keepdims=True), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(backend):
    """Where a step drops all, nothing is left of the embeddings and of what each branch adds; after it all is there."""
    net, rng = load("transformer", backend), np.random.default_rng(0)
    config = net.Config(**{**FOLDERS["transformer"].configs[0], "dropout": 1 - 1e-9})
    x = array(backend, rng.standard_normal((2, 5, 24), np.float32))
    encoder, decoder, positions = net.EncoderBlock(config), net.DecoderBlock(config), net.Positions(config, 9)
    memory = decoder.cross.keys_values(x)
    calls = [
        (encoder, lambda: encoder(x, None)),
        (decoder, lambda: decoder(x, None, memory, None, None, 0)),
        (positions, lambda: x + positions(x)),
    ]
    for part, call in calls:
        part.train()
        y = call()
        assert (np.asarray(y.detach() if backend == "torch" else y) == np.asarray(x)).all()
        part.eval()
        y = call()
        assert np.abs(np.asarray(y.detach() if backend == "torch" else y) - np.asarray(x)).mean() > 0.1


@pytest.mark.parametrize("i", [0, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mode(backend, i):
    """What a Trainer says is not drawn by dropout, before a step and after it."""
    trainer, batch = make_trainer("transformer", i, backend, dropout=0.5), batches("transformer", i, 1)[0]
    for _ in range(2):
        for ask in (trainer.evaluate, lambda *batch: {"": FOLDERS["transformer"].outputs(trainer, *batch)}):
            a, b = (np.concatenate([np.ravel(np.asarray(x)) for x in ask(*batch).values()]) for _ in range(2))
            assert (a == b).all()
        if i < 3:
            asked = (batch[0], batch[1][:, :-1]) if i == 0 else batch[:1]
            assert (trainer.attention(*asked) == trainer.attention(*asked)).all()
        trainer.step(*batch, lr=1e-3)


@pytest.mark.parametrize("i", [1, 2, 3])
def test_start(i):
    """The starting weights have the spread that init_weights names, to 10 percent."""
    trainer = make_trainer("transformer", i, "torch", width=48, n_layer=2, n_head=2)
    for name, w in load("transformer", "torch").get_weights(trainer.model).items():
        if name == "logit_scale":
            assert w == pytest.approx(math.log(1 / 0.07))
        elif w.ndim < 2:
            assert (w == ("norm" in name and "weight" in name)).all(), name
        else:
            adds = name.endswith(("out.weight", "fc2.weight"))
            table = name.endswith("positions.weight") or name.endswith("embed.weight")
            std = 0.02 if table else 1 / math.sqrt(w.shape[1] * (4 if adds else 1))
            assert w.std() == pytest.approx(std, rel=4 / math.sqrt(2 * w.size)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_average(backend, tmp_path):
    """The average of the weights by hand; it is what is asked and saved; a run without it may go on with it."""
    net, batch = load("transformer", backend), batches("transformer", 0, 1)[0]
    trainer, plain = (make_trainer("transformer", 0, backend, ema=ema) for ema in (0.2, 0.0))
    expected = net.get_weights(trainer.model)
    for keep in (1 / 11, 2 / 12, 0.2, 0.2):
        trainer.step(*batch, lr=0.02)
        expected = {name: keep * expected[name] + (1 - keep) * w for name, w in net.get_weights(trainer.model).items()}
    for name, w in net.get_weights(trainer.average).items():
        np.testing.assert_allclose(w, expected[name], rtol=1e-4, atol=1e-6)
    net.set_weights(plain.model, net.get_weights(trainer.average))
    figures = trainer.evaluate(*batch)
    assert float(figures["val_loss"]) == float(plain.evaluate(*batch)["val_loss"])
    assert trainer.translate(batch[0]) == plain.translate(batch[0])
    trainer.save(tmp_path / "a.npz", 4)
    plain.save(tmp_path / "b.npz", 4)
    for file in ("a.npz", "b.npz"):
        again = make_trainer("transformer", 0, backend, ema=0.2)
        assert again.load(tmp_path / file) == 4
        assert float(again.evaluate(*batch)["val_loss"]) == float(figures["val_loss"])
    assert float(trainer.evaluate(*batch)["val_loss"]) != float(trainer.step(*batch, lr=0.1)["loss"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_load(backend, tmp_path):
    """An array that is missing or of another shape is named; one too many, as old checkpoints have, is passed over."""
    trainer, path = make_trainer("transformer", 0, backend, ema=0.5), tmp_path / "a.npz"
    trainer.save(path, 1)
    with np.load(path) as f:
        arrays = dict(f)
    assert "v.encoder.blocks.0.ff.fc1.weight" not in arrays  # Muon has no second moment
    for kind in ("", "m.", "v.", "average."):
        name = kind + "encoder.norm.bias"
        others = {key: a for key, a in arrays.items() if key != name}
        for spoiled in (others | {name: np.zeros(3, np.float32)}, others):
            np.savez(path, **spoiled)
            if kind != "average." or name in spoiled:
                with pytest.raises(ValueError, match=name.removeprefix("average.")):
                    trainer.load(path)
    np.savez(path, **arrays, **{"v.encoder.blocks.0.ff.fc1.weight": np.zeros(3)})
    assert trainer.load(path) == 1


# ---- beam search -----------------------------------------------------------------------------------------------------


def learnt(backend, steps=40, **changes):
    trainer, (src, tgt) = make_trainer("transformer", 0, backend, **changes), batches("transformer", 0, 1)[0]
    tgt = np.minimum(tgt, trainer.config.tgt_vocab - 1)
    for _ in range(steps):
        trainer.step(src, tgt, lr=0.01)
    trainer.model.eval()
    return trainer, src


def log_p(trainer, backend, src, tgt):
    x = trainer.model(*trainer.arrays(src, tgt))
    x = x.detach().numpy() if backend == "torch" else np.array(x)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy(backend):
    """A beam of 1, on the cache, takes the likeliest token each time, as a whole pass without a cache names it."""
    trainer, src = learnt(backend)
    tokens = np.full((len(src), 1), 1)
    for _ in range(trainer.config.length - 1):
        tokens = np.concatenate([tokens, 2 + log_p(trainer, backend, src, tokens)[:, -1:, 2:].argmax(-1)], 1)
    expected = [row[1:].tolist() for row in tokens]
    expected = [row[: row.index(2)] if 2 in row else row for row in expected]
    assert trainer.translate(src, beam=1) == expected
    assert len({len(row) for row in expected}) > 1


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_beam_search(backend, alpha):
    """With a beam wide enough to keep all, the best of all sentences of up to 3 tokens is found."""
    trainer, src = learnt(backend, steps=10, tgt_vocab=6)
    best = []
    for row in src:
        worth = {}
        for sentence in (s for n in range(4) for s in itertools.product(range(3, 6), repeat=n)):
            whole = [1, *sentence, 2][:4]  # at the full length the end is not said
            logp = log_p(trainer, backend, row[None], np.array([whole[:-1]]))[0]
            total = sum(logp[t, token] for t, token in enumerate(whole[1:]))
            worth[sentence] = total / ((4 + len(whole)) / 6) ** alpha
        best.append(list(max(worth, key=worth.get)))
    translate = load("transformer", backend).translate
    assert translate(trainer.model, *trainer.arrays(src), beam=100, alpha=alpha, length=4) == best
    assert len(set(map(tuple, best))) > 1


# ---- data ------------------------------------------------------------------------------------------------------------


def value(text):
    """The number of a Chinese numeral."""
    total, group, digit = 0, 0, 0
    for c in ("一" + text if text[0] == "十" else text):
        if c in "十百千":
            group, digit = group + digit * 10 ** ("十百千".index(c) + 1), 0
        elif c in "萬億":
            total, group, digit = total + (group + digit) * 10 ** (4 if c == "萬" else 8), 0, 0
        else:
            digit = "零一二三四五六七八九".index(c)
    return total + group + digit


def test_numbers():
    """Numerals as they are written, and each way back."""
    known = {0: "零", 10: "十", 12: "十二", 110: "一百一十", 105: "一百零五", 12300: "一萬二千三百", 10001: "一萬零一",
             1000100: "一百萬零一百", 1001000: "一百萬一千", 100001000: "一億零一千", 20000000: "二千萬"}  # fmt: skip
    assert {n: data.to_chinese(n) for n in known} == known
    assert data.to_english(12300) == "twelve thousand three hundred" and data.to_english(0) == "zero"
    assert data.to_english(999_021_115).split()[:5] == "nine hundred ninety nine million".split()

    rng = np.random.default_rng(0)
    drawn = [int(rng.integers(0, 10 ** rng.integers(1, 10))) for _ in range(3000)]
    assert all(value(data.to_chinese(n)) == n for n in drawn)
    assert len({data.to_english(n) for n in drawn}) == len(set(drawn))


def test_numbers_held_out():
    """No batch has a number that is held out, and the test has no other: from 1,000 on every tenth, by its hash."""
    task = make_task("transformer")

    def numbers(ids):
        return [value(task.sides[1].decode([t for t in row if t > 2])) for row in ids.tolist()]

    def held_out(n):
        return n >= 1000 and n * 2654435761 % 2**32 % 10 == 0

    seen = [n for step in range(20) for n in numbers(task.batch(step)[1])]
    assert not any(map(held_out, seen)) and all(map(held_out, numbers(task.held_out[1])))
    assert len(task.test) == 1000 and len(set(seen)) > 800 and sum(n < 1000 for n in seen) > 300
    assert 0.08 < np.mean([held_out(n) for n in range(1000, 100_000)]) < 0.12


def test_captions_held_out():
    """A batch as large as the training part has 416 of the 480 captions, each once; the test has the other 64."""
    task = make_task("transformer", "--task", "clip", "--batch-size", 416)
    parts = [ids.tolist() for _, ids in (task.batch(0), task.held_out)]
    known, new = ({task.words.decode([i for i in row if i]) for row in rows} for rows in parts)
    assert len(known) == 416 and len(new) == 64 and known | new == set(data.CAPTIONS)


@pytest.mark.parametrize("shift", [0, 1])
def test_clip_report(shift, tmp_path):
    """The figures of a model that knows all, and of one that takes each new caption for its neighbour."""
    task = make_task("transformer", "--task", "clip", "--out", tmp_path)

    class Model:
        @staticmethod
        def embed(x, ids):
            assert len(x) == 256 and len(ids) == 480
            return np.eye(480)[np.roll(np.reshape(task.new * 4, (4, 64)), shift, 1).ravel()], np.eye(480)

    figures, files = task.report(Model)
    assert figures == dict.fromkeys(["text_of_image", "image_of_text", "text_among_480"], 1.0 - shift)
    assert [(tmp_path / file).exists() for file in files] == [True]


def test_mean_over_tokens(capsys):
    """The validation loss is the mean over all tokens, in how many parts it may be counted."""
    task = make_task("transformer")
    task.held_out = task.held_out[0][:250], task.held_out[1][:250]

    class Model:
        @staticmethod
        def evaluate(src, tgt):
            return {"val_loss": tgt[:, 1:][tgt[:, 1:] != 0].mean()}

        @staticmethod
        def translate(src, beam):
            return [[3]] * len(src)

    for whole, n in ((True, 250), (False, 200)):
        tokens = task.held_out[1][:n, 1:]
        expected = tokens[tokens != 0].mean()
        assert task.evaluate(Model, whole)["val_loss"] == pytest.approx(expected, rel=1e-9)
    assert capsys.readouterr().out.count("-> \u96f6") == 5


def test_labels_of_attention():
    """Pillow's font has no umlauts and no Chinese: other letters stand for them, never the box of a missing one."""
    p = np.full((1, 1), 0.5)
    for word, plain in (("Fünf", "Funf"), ("Äöß", "Aoss"), ("億", "10^8")):
        drawn, wanted, box = (np.array(data.draw_attention(p, ["a"], [text])) for text in (word, plain, "\u2603"))
        assert (drawn == wanted).all() and (drawn != box).any()


def test_bleu():
    """The example that sacreBLEU publishes, 48.53; sentences that are the same; and the smoothing by hand."""
    answers = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ]
    assert data.bleu(answers, references) == pytest.approx(48.53, abs=0.005)
    assert data.bleu(answers, [[answer] for answer in answers]) == pytest.approx(100)
    # 3 of 4 words, 1 of 3 pairs, then 0 of 2 and 0 of 1, which count as 1 / (2 2) and 1 / (4 1); 4 words, not 5
    expected = 100 * math.exp(1 - 5 / 4) * (3 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** 0.25
    assert data.bleu(["a b x d"], [["a b c d e"]]) == pytest.approx(expected)
    assert data.bleu(["x y z w"], [["a b c d"]]) == data.bleu(["a b c"], [["a b c"]]) == 0
    assert data.bleu(["A b c d"], [["a b c d"]]) < 60  # capitals count
    assert data.mteval_tokens("&quot;1,000.5-mm, (a&amp;b)... x-y") == [*'" 1,000.5 - mm , ( a & b ) . . . x-y'.split()]


def test_byte_pairs():
    """The merges of a slow and plain way to the same; and text comes back from the tokens, of any alphabet."""
    text = "low low low lower lowest newer newer wider wide \u00fcber \u00fcber aaaa aaa " * 3
    words = [[bytes([b]) for b in word.encode()] for word in data.re.findall(data.WORDS, text)]
    slow = [bytes([b]) for b in range(256)]
    while len(slow) < 256 + 20:
        counts = data.Counter(pair for word in words for pair in zip(word, word[1:]))
        a, b = min(counts, key=lambda pair: (-counts[pair], pair))
        slow.append(a + b)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if word[i : i + 2] == [a, b]:
                    word[i : i + 2] = [a + b]
                i += 1
    ranks = data.learn_bpe(text, 20)
    assert list(ranks) == slow and list(ranks.values()) == list(range(276))
    tokens = data.BytePairs(ranks)
    for sentence in (text, "Stra\u00dfe, 12.5 \u4e2d\u6587", " two  blanks\n"):
        assert tokens.decode(tokens.encode(sentence)) == sentence
    assert len(tokens.encode("lower newer")) < 6


def test_shapes():
    """The pictures show what the captions say, and no two draws are the same."""
    rng, means = np.random.default_rng(0), {}
    for place in data.PLACES:
        image = data.draw_shape(f"big red circle {place}", rng).astype(float)
        red = image[..., 0] - image[..., 1:].max(-1) > 60
        rows, columns = np.nonzero(red)
        means[place] = rows.mean() / 32, columns.mean() / 32
        assert 0.1 < red.mean() < 0.25
    assert means["on the left"][1] < 0.35 and means["on the right"][1] > 0.6
    assert means["at the top"][0] < 0.35 and means["at the bottom"][0] > 0.6
    assert len(data.CAPTIONS) == len(set(data.CAPTIONS)) == 480
    a, b = (data.draw_shape("small blue star at the top", rng) for _ in range(2))
    assert (a != b).mean() > 0.5


# ---- tasks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = copy_alone("transformer", tmp_path_factory.mktemp("pairs") / "transformer")
    rng = np.random.default_rng(0)
    german = "eins zwei drei vier f\u00fcnf sechs rot blau Hund Katze"
    pairs = dict(zip("one two three four five six red blue dog cat".split(), german.split()))
    lines = []
    for _ in range(300):
        words = rng.choice(list(pairs), 5)
        lines.append(" ".join(words) + "\t" + " ".join(pairs[word] for word in words))
    (place / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    return place


def test_pairs(folder):
    """A file of pairs: byte pairs are learnt of it and travel in the checkpoint, from torch to MLX."""
    args = ["--data", "pairs.tsv", "--width", "64", "--n-layer", "1", "--batch-size", "32", "--merges", "60"]
    more = ["--steps", "150", "--lr", "0.01", "--decay", "inverse-sqrt", "--dropout", "0.05", "--positions", "learned"]
    code, out, err = run(folder, "torch", *args, *more)
    assert code == 0, err
    results = [json.loads(out.splitlines()[-1].removeprefix("result "))]
    code, out, err = run(folder, "mlx", *args, "--steps", "0", "--resume", "--prompt", "two dog red one six")
    assert code == 0, err
    assert "two dog red one six\n    -> zwei Hund rot eins sechs\n" in out
    results.append(json.loads(out.splitlines()[-1].removeprefix("result ")))
    assert results[0]["bleu"] > 60 and results[1]["bleu"] == pytest.approx(results[0]["bleu"], abs=0.1)


def test_other_pairs(folder):
    """With --steps 0 a checkpoint is scored on the part of its own file that it has not seen, of another on all."""
    own, other = folder / "pairs.tsv", folder / "other.tsv"
    lines = own.read_text(encoding="utf-8").splitlines()
    other.write_text("\n".join(lines[:40] + lines[:3]), encoding="utf-8")
    args = ["transformer", "--merges", 30, "--data"]
    saved = make_task(*args, own).extra
    for file, n in ((own, 15), (other, 43)):
        task = make_task(*args, file, "--steps", 0, saved=saved)
        assert len(task.test) == len(task.held_out[0]) == n and task.extra["ranks"] == saved["ranks"]


@pytest.mark.parametrize("fault", [None, "half", "unequal", "latin-1", "missing"])
def test_multi30k(fault, tmp_path, monkeypatch, capsys):
    """The files are taken whole or not at all."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    (tmp_path / "multi30k").mkdir()
    for part, n in (("train", 29_000), ("test_2016_flickr", 1000)):
        for language in ("en", "de"):
            n = n // 2 if fault == "half" or (fault, language, part) == ("unequal", "de", "train") else n
            lines = [f"\u00fc {part} {i}\n" for i in range(n)]
            if (fault, language) != ("missing", "de"):
                text = "".join(lines).encode("latin-1" if (fault, language) == ("latin-1", "de") else "utf-8")
                (tmp_path / "multi30k" / f"{part}.{language}").write_bytes(text)
    if fault is None:
        train, test, whole = data.load_pairs("multi30k", 100)
        assert len(train) == 29_000 and len(test) == 1000 and whole is test
        return
    with pytest.raises(SystemExit):
        data.load_pairs("multi30k", 100)
    said, short = capsys.readouterr().err, "has 14500 lines, not 29000"
    why = {"half": short, "unequal": f"train.de {short}", "latin-1": "UTF-8", "missing": "train.de is missing"}
    assert said.count("\n") == 1 and why[fault] in said


@pytest.mark.parametrize("task", ["classify", "clip"])
def test_pictures(folder, task):
    args = ["--task", task, "--steps", "100", "--width", "32", "--n-layer", "2", "--lr", "0.02", "--out", task]
    code, out, err = run(folder, "mlx", *args, "--batch-size", "32")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1].removeprefix("result "))
    if task == "classify":
        assert result["accuracy"] > 0.4  # by chance 0.1
    else:
        assert result["text_of_image"] > 0.06 and result["image_of_text"] > 0.06  # by chance 1 of 64
    assert (folder / task / "sample.png").stat().st_size > 5000


def test_inverse_sqrt():
    """The paper's rate: up linearly to --lr in --warmup steps, then down as one over the square root of the step."""
    args = make_args("transformer", "--lr", 0.5, "--warmup", 4, "--decay", "inverse-sqrt", "--steps", 100)
    rates = [load_file("transformer", "train").rate(step, args) for step in (0, 1, 3, 15, 99)]
    assert rates == pytest.approx([0.125, 0.25, 0.5, 0.25, 0.1])
