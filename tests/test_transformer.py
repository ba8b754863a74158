"""transformer/ against closed forms: attention, losses, averages, beam search, BLEU, byte pairs, pairs, images."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import BACKENDS, batches, copy_alone, load, load_file, make_task, make_trainer, result, run_here
from test_language import array, randomised
from test_parity import refusal

data = load_file("transformer", "data")


def case(i, backend, **changes):
    """The model's module, a Trainer of the i-th small Config, and a batch."""
    trainer, batch = make_trainer("transformer", i, backend, **changes), batches("transformer", i, 1)[0]
    return load("transformer", backend), trainer, batch


def log_p(trainer, *arrays):
    """log p of every next token, or of every class, in float64, from the trained model."""
    x = np.array(trainer.model(*trainer.arrays(*arrays)).tolist())
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_hand(backend, masked):
    """Outputs and all gradients, against torch's fused attention."""
    rng, net = np.random.default_rng(0), load("transformer", backend)
    arrays = [rng.standard_normal((2, 3, n, 5), np.float32) for n in (4, 6, 6, 4)]
    mask = [np.tril(np.ones((4, 6), bool), 1)] if masked else []
    *qkv, dy = (array(backend, a) for a in arrays)
    y, p = net.attention(*qkv, *(array(backend, a) for a in mask))
    *leaves, grad = (torch.from_numpy(a).requires_grad_() for a in arrays)
    fused = F.scaled_dot_product_attention(*leaves, *map(torch.from_numpy, mask))
    theirs = [fused, *torch.autograd.grad(fused, leaves, grad)]
    for a, b in zip([y, *net.attention_backward(dy, *qkv, p)], theirs, strict=True):
        assert b.abs().max() > 0.1
        np.testing.assert_allclose(a.tolist(), b.tolist(), rtol=1e-4, atol=1e-5)
    assert not masked or p[..., 0, 2:].max() == 0


def test_attention(backend):
    """Of the last decoder layer: with queries of 0, equal for all source tokens, 0 for padding; of a ViT: by hand."""
    net, trainer, (src, tgt) = case(0, backend)
    real = (src != 0)[:, None, None]
    expected = np.broadcast_to(real / real.sum(-1, keepdims=True), (8, 2, 9, 7))
    assert np.abs(trainer.attention(src, tgt) - expected).max() > 0.02
    weights = net.get_weights(trainer.model)
    net.set_weights(trainer.model, weights | {"decoder.blocks.1.cross.q.weight": np.zeros((24, 24), np.float32)})
    np.testing.assert_allclose(trainer.attention(src, tgt), expected, atol=1e-6)
    _, trainer, (x, _) = case(2, backend, n_layer=1)
    w = net.get_weights(trainer.model)
    squares = [x[:, i : i + 4, j : j + 4].reshape(len(x), -1) for i in (0, 4) for j in (0, 4, 8)]
    tokens = [(4 * square - 2) @ w["encoder.embed.weight"].T + w["encoder.embed.bias"] for square in squares]
    tokens = np.stack([np.broadcast_to(w["encoder.token"], tokens[0].shape), *tokens], 1)  # (B, 7, 24)
    tokens = tokens + np.asarray(trainer.model.encoder.positions._table)
    tokens = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-5)
    q, k = (tokens @ w[f"encoder.blocks.0.attn.{a}.weight"].T for a in "qk")
    q, k = (a.reshape(len(x), 7, 3, 8).swapaxes(1, 2) for a in (q, k))
    p = np.exp(q @ k.swapaxes(2, 3) / math.sqrt(8))
    np.testing.assert_allclose(trainer.attention(x), p / p.sum(-1, keepdims=True), rtol=1e-3, atol=1e-5)


def test_sinusoids(backend):
    """The paper's sum: embeddings times sqrt(width), and sin and cos of pos / 10000^(2i / width), alternating."""
    net, trainer, (src, _) = case(0, backend)
    w = net.get_weights(trainer.model)["encoder.embed.weight"]
    x = np.array(trainer.model.encoder.start(*trainer.arrays(src), 4).tolist()) - math.sqrt(24) * w[src]
    waves = [[f(pos / 10000 ** (2 * i / 24)) for i in range(12) for f in (math.sin, math.cos)] for pos in range(4, 11)]
    np.testing.assert_allclose(x, np.broadcast_to(waves, x.shape), atol=1e-5)


@pytest.mark.parametrize("i", [0, 2])
def test_loss(backend, i):
    """By hand: a step spreads the label over all tokens or classes, evaluate does not; and padding does not count."""
    _, trainer, (x, y) = case(i, backend, label_smoothing=0.2)
    logp, right = (log_p(trainer, x, y[:, :-1]), y[:, 1:]) if i == 0 else (log_p(trainer, x), y)
    nll, real = -np.take_along_axis(logp, right[..., None], -1)[..., 0], (right != 0) | (i == 2)
    figures = trainer.evaluate(x, y)
    assert float(figures["val_loss"]) == pytest.approx(nll[real].mean(), rel=1e-5)
    assert float(figures["accuracy"]) == pytest.approx((logp.argmax(-1) == right)[real].mean(), abs=1e-6)
    assert i == 0 or trainer.predict(x) == pytest.approx(np.exp(logp), abs=1e-5)
    smoothed = (0.8 * nll - 0.2 * logp.mean(-1))[real].mean()
    assert float(trainer.step(x, y, lr=0.1)["loss"]) == pytest.approx(smoothed, rel=1e-5)


@pytest.mark.parametrize("scale, used", [(4.0, 4.0), (9.0, math.log(100))])
def test_clip(backend, scale, used):
    """Its loss and accuracy by hand, both ways; padding has no effect; no temperature is below 0.01."""
    net, trainer, (x, ids) = case(3, backend)
    for _ in range(5):
        trainer.step(x, ids, lr=0.01)
    images, texts = trainer.embed(x, ids)
    np.testing.assert_allclose(np.linalg.norm([images, texts], axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(trainer.embed(x, np.pad(ids, ((0, 0), (0, 1))))[1], texts, atol=1e-5)
    net.set_weights(trainer.model, net.get_weights(trainer.model) | {"logit_scale": np.array(scale, np.float32)})
    logits = images.astype(np.float64) @ texts.T * math.exp(used)
    p = [np.exp(a) / np.exp(a).sum(1, keepdims=True) for a in (logits, logits.T)]
    nll, figures = [-np.log(np.diag(a)).mean() for a in p], trainer.evaluate(x, ids)
    assert float(figures["val_loss"]) == pytest.approx(np.mean(nll), rel=1e-3)
    right = np.mean([a.argmax(1) == np.arange(len(a)) for a in p])
    assert float(figures["accuracy"]) == pytest.approx(right, abs=1e-6) and abs(nll[0] - nll[1]) > 0.01 * np.mean(nll)


def test_dropout(backend):
    """If a step drops everything, nothing is left of embeddings and branches; after the step it is all back."""
    net, trainer = randomised("transformer", backend, dropout=1 - 1e-9)
    w, src, tgt = net.get_weights(trainer.model), *np.random.default_rng(0).integers(3, 29, (2, 4, 9))
    z, before = w["decoder.embed.weight"] @ w["decoder.norm.bias"], float(trainer.evaluate(src, tgt)["val_loss"])
    loss = float(trainer.step(src, tgt, lr=0.0)["loss"])
    assert loss == pytest.approx(np.log(np.exp(z).sum()) - z[tgt[:, 1:]].mean(), rel=1e-5)
    assert float(trainer.evaluate(src, tgt)["val_loss"]) == pytest.approx(before) and abs(loss - before) > 0.1


def test_average(backend, tmp_path):
    """The average of the weights by hand; it is used and saved; a run without it may continue with it."""
    (net, trainer, batch), (_, plain, _) = (case(0, backend, ema=ema) for ema in (0.2, 0.0))
    expected = net.get_weights(trainer.model)
    for keep in (1 / 11, 2 / 12, 0.2, 0.2):
        trainer.step(*batch, lr=0.02)
        expected = {name: keep * expected[name] + (1 - keep) * w for name, w in net.get_weights(trainer.model).items()}
    for name, w in net.get_weights(trainer.average).items():
        np.testing.assert_allclose(w, expected[name], rtol=1e-4, atol=1e-6)
    net.set_weights(plain.model, net.get_weights(trainer.average))
    assert trainer.translate(batch[0]) == plain.translate(batch[0])
    for saved in (trainer, plain):
        saved.save(tmp_path / "ckpt.npz", 4)
        again = make_trainer("transformer", 0, backend, ema=0.2)
        assert again.load(tmp_path / "ckpt.npz") == 4
        loss, *others = (float(which.evaluate(*batch)["val_loss"]) for which in (trainer, saved, again))
        assert others == [loss, loss]


def plain_search(trainer, src, beam, alpha, length):
    """Beam search for one sentence (S,), by lists and whole passes without a cache."""
    found = [((1,), 0.0)]
    while going := [one for one in found if one[0][-1] != 2 and len(one[0]) < length]:
        beginnings, more = np.array([tokens for tokens, _ in going]), [one for one in found if one not in going]
        for (tokens, total), p in zip(going, log_p(trainer, src[None].repeat(len(going), 0), beginnings)[:, -1]):
            more += [((*tokens, token), total + p[token]) for token in range(2, len(p))]
        found = sorted(more, key=lambda one: -one[1] / ((4 + len(one[0])) / 6) ** alpha)[:beam]
    return [token for token in found[0][0][1:] if token != 2]


def test_beam_search(backend):
    """All sentences at once with a cache, and one after the other without: the same translations, long and short."""
    net, trainer, (src, tgt) = case(0, backend)
    for row, end in zip(tgt, (2, 3, 4, 5, 6, 7, 8, 4)):
        row[end:] = [2, *[0] * (8 - end)]
    for _ in range(20):
        trainer.step(src, tgt, lr=0.01)
    for beam, alpha in (1, 0.6), (2, 0.0), (3, 1.0), (4, 3.0):
        found = net.translate(trainer.model, *trainer.arrays(src), beam, alpha, length=8)
        assert found == [plain_search(trainer, row, beam, alpha, length=8) for row in src]
        assert len(set(map(len, found))) > 2


# ---- data and tasks --------------------------------------------------------------------------------------------------


def value(text):
    """The number of a Chinese numeral, by arithmetic: 一萬二千三百 is (0+1)*10**4+(0+2*1000+3*100)."""
    signs = [*(f"+{digit}" for digit in range(10)), "*10", "*100", "*1000", ")*10**4+(0", ")*10**8+(0"]
    text = "一" + text if text[0] == "十" else text
    return eval("(0" + "".join(signs["零一二三四五六七八九十百千萬億".index(c)] for c in text) + ")")


def test_numbers():
    """Numerals as they are written, and each way back. No batch has a held-out one, and the test has only those."""
    known = {0: "零", 10: "十", 12: "十二", 110: "一百一十", 105: "一百零五", 12300: "一萬二千三百", 10001: "一萬零一",
             1000100: "一百萬零一百", 1001000: "一百萬一千", 100001000: "一億零一千", 20000000: "二千萬"}  # fmt: skip
    assert {n: data.to_chinese(n) for n in known} == known
    assert data.to_english(12300) == "twelve thousand three hundred" and data.to_english(0) == "zero"
    assert data.to_english(999_021_115).split()[:5] == "nine hundred ninety nine million".split()
    rng = np.random.default_rng(0)
    drawn = [int(rng.integers(0, 10 ** rng.integers(1, 10))) for _ in range(3000)]
    assert all(value(data.to_chinese(n)) == n for n in drawn)
    assert len({data.to_english(n) for n in drawn}) == len(set(drawn))
    task = make_task("transformer")
    tokens = [task.held_out[1], *(task.batch(step)[1] for step in range(20))]
    test, *seen = ([value(task.sides[1].decode([t for t in row if t > 2])) for row in ids] for ids in tokens)
    held_out, seen = (lambda n: n >= 1000 and (n * 2654435761 % 2**32 >> 16) % 10 == 0), sum(seen, [])  # by a hash
    assert not any(map(held_out, seen)) and all(map(held_out, test)) and {n % 10 for n in test} == {*range(10)}
    assert len(test) == 1000 and len(set(seen)) > 800 and sum(n < 1000 for n in seen) > 300
    assert 0.08 < np.mean([held_out(n) for n in range(1000, 100_000)]) < 0.12


def test_captions(tmp_path):
    """Images show what captions say, no two alike; of 480 captions, 416 are in a batch of all, 64 are held out."""
    rng = np.random.default_rng(0)
    for place, axis, low in zip(data.PLACES, (1, 1, 0, 0, 0), (0.2, 0.6, 0.2, 0.6, 0.4)):
        image = data.draw_shape(f"big red circle {place}", rng).astype(float)
        red = image[..., 0] - image[..., 1:].max(-1) > 60
        assert low < np.nonzero(red)[axis].mean() / 32 < low + 0.2 and 0.1 < red.mean() < 0.25
    a, b = (data.draw_shape("small blue star at the top", rng) for _ in range(2))
    assert (a != b).mean() > 0.5 and len(data.CAPTIONS) == len(set(data.CAPTIONS)) == 480
    task = make_task("transformer", "--task", "clip", "--batch-size", 416, "--out", tmp_path)
    parts = [ids.tolist() for _, ids in (task.batch(0), task.held_out)]
    known, new = ({task.words.decode([i for i in row if i]) for row in rows} for rows in parts)
    assert len(known) == 416 and len(new) == 64 and known | new == set(data.CAPTIONS)
    for shift in (0, 1):  # a perfect model; and one that mistakes each new caption for its neighbour
        seen = np.eye(480)[np.roll(np.reshape(task.new * 4, (4, 64)), shift, 1).ravel()]
        figures, files = task.report(mock.Mock(embed=lambda x, ids: (seen[: len(x)], np.eye(480)[: len(ids)])))
        assert figures == dict.fromkeys(["text_of_image", "image_of_text", "text_among_480"], 1.0 - shift)
        assert [(tmp_path / file).exists() for file in files] == [True]


def test_mean_over_tokens(capsys):
    """The validation loss is the mean over all tokens, however it is split into parts; translations come first."""
    task, model = make_task("transformer"), mock.Mock()
    task.held_out = task.held_out[0][:250], task.held_out[1][:250]
    model.evaluate = lambda src, tgt: print("counted") or {"val_loss": tgt[:, 1:][tgt[:, 1:] != 0].mean()}
    model.translate = lambda src, beam: [[3]] * len(src)
    for whole, n in ((True, 250), (False, 200)):
        tokens = task.held_out[1][:n, 1:]
        assert task.evaluate(model, whole)["val_loss"] == pytest.approx(tokens[tokens != 0].mean(), rel=1e-9)
    assert task.translate(model, ["one"] * 250) == ["\u96f6"] * 250
    assert task.pairs.measure([b if i % 4 else "" for i, (_, b) in enumerate(task.test)]) == {"exact": 0.75}
    said = capsys.readouterr().out
    assert said.count("-> \u96f6") == 5 and said.rindex("\u96f6") < said.index("counted")


def test_labels_of_attention():
    """Pillow's font has no umlauts and no Chinese: other letters stand for them, never the box of a missing one."""
    for word, plain in (("Fünf", "Funf"), ("Äöß", "Aoss"), ("億", "10^8")):
        drawn, wanted, box = (np.array(data.draw_attention(np.eye(1), ["a"], [text])) for text in (word, plain, "☃"))
        assert (drawn == wanted).all() and (drawn != box).any()


def test_bleu():
    """The example that sacreBLEU publishes, 48.53; sentences that are the same; and the smoothing by hand."""
    answers = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = [["The dog bit the man.", "The dog had bit the man."],
                  ["It was not unexpected.", "No one was surprised."],
                  ["The man bit him first.", "The man had bitten the dog."]]  # fmt: skip
    assert data.bleu(answers, references) == pytest.approx(48.53, abs=0.005)
    assert data.bleu(answers, [[answer] for answer in answers]) == pytest.approx(100)
    # 3 of 4 words, 1 of 3 pairs, then 0 of 2 and 0 of 1, which count as 1 / (2 2) and 1 / (4 1); 4 words, not 5
    expected = 100 * math.exp(1 - 5 / 4) * (3 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** 0.25
    assert data.bleu(["a b x d"], [["a b c d e"]]) == pytest.approx(expected)
    assert data.bleu(["x y z w"], [["a b c d"]]) == data.bleu(["a b c"], [["a b c"]]) == 0
    assert data.bleu(["A b c d"], [["a b c d"]]) < 60  # capitals count
    assert data.mteval_tokens("&quot;1,000.5-mm, (a&amp;b)... x-y") == [*'" 1,000.5 - mm , ( a & b ) . . . x-y'.split()]


@pytest.mark.parametrize("name", ["transformer", "gpt"])
def test_byte_pairs(name):
    """The merges of a slow, simple algorithm; and text in any alphabet is restored from the tokens."""
    data, text = load_file(name, "data"), "low low low lower lowest newer newer wider \u00fcber \u00fcber aaaa " * 3
    words = [word.encode().decode("latin-1") for word in data.re.findall(data.WORDS, text)]  # a letter for each token
    slow = [bytes([b]) for b in range(256)]
    while len(slow) < 256 + 20:
        counts = data.Counter(pair for word in words for pair in zip(word, word[1:]))
        a, b = min(counts, key=lambda pair: (-counts[pair], *(slow[ord(letter)] for letter in pair)))
        words = [word.replace(a + b, chr(len(slow))) for word in words]
        slow.append(slow[ord(a)] + slow[ord(b)])
    tokens = data.BytePairs(ranks := data.learn_bpe(text, 20))
    assert list(ranks) == slow and list(ranks.values()) == list(range(276))
    if name == "gpt":
        tokens = data.make_tokenizer(*data.learn_tokenizer("bpe", [text, "other"], 20))
    for sentence in (text, "Stra\u00dfe, 12.5 \u4e2d\u6587", " two  blanks\n"):
        ids = tokens.encode(sentence)
        said = b"".join(map(tokens.decode, ids.tolist())).decode() if name == "gpt" else tokens.decode(ids)
        assert said == sentence and max(ids) < tokens.vocab_size
    assert len(tokens.encode("lower newer")) < 6 and tokens.vocab_size == 276 + 3 * (name == "transformer")


def test_pairs(tmp_path):
    """A file of pairs: byte pairs are learned from it and kept in the checkpoint, from torch to MLX."""
    folder = copy_alone("transformer", tmp_path / "transformer")
    german = dict(one="eins", two="zwei", three="drei", five="f\u00fcnf", red="rot", blue="blau", dog="Hund")
    drawn = np.random.default_rng(0).choice(list(german), (300, 4))
    lines = [" ".join(words) + "\t" + " ".join(map(german.get, words)) for words in drawn]
    (folder / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    args = "--data pairs.tsv --width 64 --n-layer 1 --batch-size 16 --merges 60".split()
    more = "--steps 100 --lr 0.01 --decay inverse-sqrt --dropout 0.05 --positions learned".split()
    first = result(folder, "torch", *args, *more, run=run_here)
    again = result(folder, "mlx", *args, "--steps", "0", "--resume", "--prompt", "two dog red one", run=run_here)
    assert "two dog red one\n    -> zwei Hund rot eins\n" in again["printed"]
    assert first["bleu"] > 60 and again["bleu"] == pytest.approx(first["bleu"], abs=0.1)


def test_parts_of_pairs(tmp_path):
    """An epoch has each pair once, except for a remainder, sorted by length; and no two epochs are alike."""
    own, other = tmp_path / "own.tsv", tmp_path / "other.tsv"
    lines = [f"{i}{' one' * (i % 9)}\t{i}{' eins' * (i % 9)}\n" for i in range(300)]
    own.write_text("".join(lines))
    other.write_text("".join([*lines[:40], *lines[:2], "two " * 99 + "\tzwei" + " zwei" * 99]))
    task, epochs = make_task("transformer", "--data", own, "--merges", 60, "--batch-size", 16), []
    n = len(task.pairs.train) // 16
    for steps in range(n), range(n, 2 * n):
        epochs.append([pair for step in steps for pair in task.pairs.batch(step)])
        assert len(set(epochs[-1])) == len(epochs[-1]) == 16 * n and set(epochs[-1]) < set(task.pairs.train)
        for side in zip(*(task.batch(step) for step in steps)):
            assert np.mean(np.concatenate([ids.ravel() for ids in side]) != 0) > 0.85  # by chance 0.6
    assert epochs[0] != epochs[1]
    # with --steps 0 a checkpoint is scored on the part of its own file that it has not seen, of another on all
    for file, n in ((own, 15), (other, 43)):
        again = make_task("transformer", "--data", file, "--merges", 60, "--steps", 0, saved=task.extra)
        assert len(again.test) == len(again.held_out[0]) == n and again.extra["ranks"] == task.extra["ranks"]
    src, tgt = again.held_out  # the last pair is longer than a Transformer may read and say: it is cut
    assert src.shape[1] == tgt.shape[1] == 64 and src[-1].all() and tgt[-1].all() and tgt[-1, -1] == 2


def test_multi30k(tmp_path, monkeypatch, capsys):
    """The files are used complete or not at all."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    (tmp_path / "multi30k").mkdir()
    files = {tmp_path / f"multi30k/{part}.{language}": "\u00fc\n".encode() * n
             for part, n in (("train", 29_000), ("test_2016_flickr", 1000)) for language in ("en", "de")}  # fmt: skip
    for file, text in files.items():
        file.write_bytes(text)
    train, test, whole = data.load_pairs("multi30k", 100)
    assert len(train) == 29_000 and len(test) == 1000 and whole is test
    for file, text in files.items():
        for spoiled, why in (text[3:], "lines, not"), (text.decode().encode("latin-1"), "UTF-8"), (None, "is missing"):
            file.write_bytes(spoiled) if spoiled else file.unlink()
            said = refusal(capsys, data.load_pairs, "multi30k", 100)
            assert why in said and file.name in said
        file.write_bytes(text)


@pytest.mark.parametrize("task, flags, learned", [
    ("classify", "--patch 7 --steps 100 --n-layer 2 --lr 0.03", dict(accuracy=0.4)),  # by chance 0.1
    ("clip", "--patch 8 --steps 60 --n-layer 1 --lr 0.02", dict(text_of_image=0.06, image_of_text=0.06)),  # 1 of 64
])  # fmt: skip
def test_pictures(tmp_path, task, flags, learned):
    folder = copy_alone("transformer", tmp_path / "transformer")
    args = ["--task", task, *flags.split(), "--width", "32", "--batch-size", "32", "--out", task]
    figures = result(folder, "torch", *args, run=run_here)
    assert all(figures[name] > bound for name, bound in learned.items())
    assert (folder / task / "sample.png").stat().st_size > 5000


@pytest.mark.parametrize("name, decay, falls", [
    ("transformer", "inverse-sqrt", (0.5, 0.25, 0.1)),  # one over the square root of the step
    ("gpt", "cosine", (0.5 * math.cos(0.03 * math.pi / 2) ** 2, 0.25, 0.5 * math.sin(0.01 * math.pi / 2) ** 2)),
])  # fmt: skip
def test_rates(name, decay, falls):
    """Up linearly to --lr in --warmup steps, then down as the name of the decay says."""
    args = make_task(name, "--lr", 0.5, "--warmup", 4, "--decay", decay, "--steps", 100).args
    rates = [load_file(name, "train").rate(step, args) for step in (0, 1, 3, 15 if name == "transformer" else 50, 99)]
    assert rates == pytest.approx([0.125, 0.25, *falls], rel=1e-3)
