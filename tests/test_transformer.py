"""transformer/: attention by hand, nn.Transformer with the same weights, beam search, BLEU, byte pairs, drawn data."""

import itertools
import json
import math

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import BACKENDS, batches, copy_alone, load, load_file, make_trainer, run

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


def test_numbers():
    """Numerals as they are written, and each way back."""
    known = {0: "零", 10: "十", 12: "十二", 110: "一百一十", 105: "一百零五", 12300: "一萬二千三百", 10001: "一萬零一",
             1000100: "一百萬零一百", 1001000: "一百萬一千", 100001000: "一億零一千", 20000000: "二千萬"}  # fmt: skip
    assert {n: data.to_chinese(n) for n in known} == known
    assert data.to_english(12300) == "twelve thousand three hundred" and data.to_english(0) == "zero"
    assert data.to_english(999_021_115).split()[:5] == "nine hundred ninety nine million".split()

    def value(text):
        total, group, digit = 0, 0, 0
        for c in ("一" + text if text[0] == "十" else text):
            if c in "十百千":
                group, digit = group + digit * 10 ** ("十百千".index(c) + 1), 0
            elif c in "萬億":
                total, group, digit = total + (group + digit) * 10 ** (4 if c == "萬" else 8), 0, 0
            else:
                digit = "零一二三四五六七八九".index(c)
        return total + group + digit

    rng = np.random.default_rng(0)
    drawn = [int(rng.integers(0, 10 ** rng.integers(1, 10))) for _ in range(3000)]
    assert all(value(data.to_chinese(n)) == n for n in drawn)
    assert len({data.to_english(n) for n in drawn}) == len(set(drawn))


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
