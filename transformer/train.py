# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "mlx[cpu]==0.32.4", "numpy", "pillow", "tiktoken"]
# ///
"""Train a Transformer:  python train.py [--backend mlx] [--data multi30k] [--prompt TEXT] ...
                     python train.py --task classify [--data mnist]          python train.py --task clip

Tasks: translate (--data: numbers, English to Chinese; multi30k, English to German; or a file of pairs, a tab between),
classify (a ViT; --data: digits, mnist, fashion, cifar10), clip (drawn pictures and what they show).
"""

import argparse
import gzip
import hashlib
import heapq
import importlib
import json
import math
import os
import platform
import re
import signal
import sys
import tarfile
import time
import zlib
from collections import Counter, defaultdict
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAD, BOS, EOS = 0, 1, 2
SETS = {  # how each set of data is learnt by default; a file of pairs as multi30k
    "numbers": dict(steps=580, batch_size=64, lr=0.01, length=40, n_layer=2, width=128, beam=1),
    "multi30k": dict(steps=3600, batch_size=64, lr=0.008, length=64, n_layer=3, width=128, smoothing=0.1, dropout=0.1),
    "digits": dict(steps=400, batch_size=64, lr=0.01, length=1, n_layer=4, width=64, shift=2, flip=False),
    "mnist": dict(steps=2000, batch_size=64, lr=0.01, length=1, n_layer=4, width=64, shift=2, flip=False),
    "fashion": dict(steps=2000, batch_size=64, lr=0.01, length=1, n_layer=4, width=64, shift=2, flip=True),
    "cifar10": dict(steps=2000, batch_size=64, lr=0.01, length=1, n_layer=6, width=128, shift=2, flip=True),
    "shapes": dict(steps=600, batch_size=64, lr=0.005, length=16, n_layer=3, width=96),
}
COMMON = dict(smoothing=0.0, dropout=0.0, patch=4, warmup=0, beam=4)
TASKS = {"translate": "numbers", "classify": "digits", "clip": "shapes"}

# ---- helpers that every folder has, the same to the letter -----------------------------------------------------------


def fail(message):
    """Bad input ends the run: one line that says what and how to mend it, exit code 2."""
    print(f"train.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def load_twin(args):
    """The module model_torch or model_mlx; args.device becomes the device that it will use, args.out is made."""
    try:
        net = importlib.import_module(f"model_{args.backend}")
    except ImportError as error:
        fail(f"{error}: pip install torch, or pip install 'mlx[cpu]', or take the other --backend")
    args.device = args.device or net.devices()[0]
    if args.device not in net.devices():
        fail(f"--device {args.device} is not to be had with {args.backend} here: {', '.join(net.devices())}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {args.out} can't be made a folder ({error.strerror}): name another")
    return net


def read_meta(path, model):
    """What Trainer.save wrote beside the arrays: config, step and more. Reads the whole file, so damage shows here."""
    try:
        with np.load(path, allow_pickle=False) as f:
            meta = json.loads(str({name: f[name] for name in f.files}["meta"]))
            found = meta["model"]
    except FileNotFoundError:
        fail(f"no checkpoint at {path}: train without --resume first, or say where it is with --out")
    except Exception as error:
        fail(f"{path} is no checkpoint or a damaged one ({error}): train anew without --resume, or into another --out")
    if found != model:
        fail(f"{path} holds a model of {found}/, not of {model}/: name another folder with --out")
    return meta


def fit(trainer, batch, evaluate, lr, args, start, **extra):
    """Train from step `start` to args.steps; a log line and a checkpoint every args.log_every steps.

    batch(step) gives one step's arrays, lr(step) its rate, evaluate() the figures on data held out; `extra` is kept in
    the checkpoint. Ctrl-C ends the step at hand, saves and exits with 130. Returns the steps taken in a second.
    """
    ckpt, interrupted = args.out / "ckpt.npz", []
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    pending, busy, speed, shown = [], 0.0, 0.0, time.perf_counter()
    for step in range(start, args.steps):
        pending.append(trainer.step(*batch(step), lr=lr(step)))
        done, waited = step + 1, time.perf_counter() - shown
        if not interrupted and done < args.steps and (done % args.log_every or waited < 0.5):
            continue
        values = [{name: float(value) for name, value in metrics.items()} for metrics in pending]
        busy += time.perf_counter() - shown
        figures = evaluate()
        for at, metrics in enumerate([*values, figures], done - len(values)):
            if not all(map(math.isfinite, metrics.values())):
                fail(f"the loss is no longer finite at step {min(at, step)}: lower --lr; an earlier {ckpt} is kept")
        try:
            trainer.save(ckpt, done, **extra)
        except OSError as error:
            Path(f"{ckpt}.part").unlink(missing_ok=True)
            fail(f"{ckpt} could not be written ({error.strerror}): make room there; an earlier one is kept")
        speed = (done - start) / busy
        line = "  ".join(f"{name} {value:.4f}" for name, value in {**values[-1], **figures}.items())
        left = (args.steps - done) / speed
        print(f"step {done:>6}/{args.steps}  {line}  {speed:.1f} steps/s  {left:.0f} s left", flush=True)
        pending, shown = [], time.perf_counter()
        if interrupted and done < args.steps:
            print(f"stopped: the same command with --resume goes on from step {done}", flush=True)
            raise SystemExit(130)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return speed


def fetch(file, md5, *urls):
    """The path of a public file: $DATA_DIR/file, or data/file beside this script; downloaded once if not there."""
    path = Path(os.environ.get("DATA_DIR") or Path(__file__).resolve().with_name("data")) / file
    if path.exists():
        return path
    part = path.with_name(path.name + ".part")
    for url in urls:
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            with urlopen(url, timeout=20) as answer, open(part, "wb") as f:
                size = int(answer.headers.get("Content-Length") or 0)
                while block := answer.read(1 << 18):
                    f.write(block)
                    print(f"\r{url}  {f.tell() / 1e6:.1f} of {size / 1e6:.1f} MB", end="", file=sys.stderr)
            print(file=sys.stderr)
            if hashlib.md5(part.read_bytes()).hexdigest() != md5:
                raise OSError("the file is not the expected one (MD5 differs)")
            return part.replace(path)
        except (OSError, HTTPException) as error:
            part.unlink(missing_ok=True)
            print(f"{url}: {error}", file=sys.stderr)
    fail(f"{file} could not be downloaded: put it at {path}, or set DATA_DIR to the folder that has it")


# ---- data: sentences -------------------------------------------------------------------------------------------------

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
ONES = (ONES + " eighteen nineteen").split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()


def to_english(n):
    """12300 -> twelve thousand three hundred, for n below a thousand million"""
    words = []
    for unit, name in ((10**6, ["million"]), (1000, ["thousand"]), (1, [])):
        hundreds, rest = divmod(n // unit % 1000, 100)
        words += [ONES[hundreds], "hundred"] if hundreds else []
        words += [TENS[rest // 10]] if rest >= 20 else []
        words += [ONES[rest % 10 if rest >= 20 else rest]] if rest % 10 or 0 < rest < 20 else []
        words += name if hundreds or rest else []
    return " ".join(words) or "zero"


def to_chinese(n):
    """12300 -> 一萬二千三百: in groups of four digits; zeros between other digits are read as one 零"""
    text, gap = "", False
    for place in reversed(range(len(str(n)))):
        digit = n // 10**place % 10
        if digit:
            text += "零" * (gap and text != "") + "零一二三四五六七八九"[digit] + ["", "十", "百", "千"][place % 4]
        gap = not digit
        if place % 4 == 0 and n // 10**place % 10**4:
            text, gap = text + ["", "萬", "億"][place // 4], False
    return text.removeprefix("一") if text.startswith("一十") else text or "零"


class Symbols:
    """Each symbol is a token: the words of a sentence, where they are joined by blanks, or its characters."""

    def __init__(self, symbols, blank):
        self.symbols, self.blank, self.vocab_size = symbols, blank, 3 + len(symbols)

    def encode(self, text):
        parts = text.split() if self.blank else list(text)
        if unknown := [part for part in parts if part not in self.symbols]:
            fail(f"{unknown[0]!r} is no word that was learnt: {' '.join(self.symbols)}")
        return [3 + self.symbols.index(part) for part in parts]

    def decode(self, ids):
        return self.blank.join(self.symbols[i - 3] for i in ids)


WORDS = r" ?\w+| ?[^\w\s]+|\s+"  # what byte pairs are merged within


def learn_bpe(text, n):
    """Byte-pair encoding (Sennrich et al. 2016): n times the commonest pair of neighbours is made one token.

    Returns {token: rank}, bytes and int, the 256 single bytes first: what tiktoken encodes by.
    """
    counts = Counter(re.findall(WORDS, text))
    words = [[bytes([b]) for b in word.encode()] for word in counts]
    counts, ranks = list(counts.values()), {bytes([b]): b for b in range(256)}
    pairs, where = Counter(), defaultdict(set)  # how often a pair occurs, and in which words
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while len(ranks) < 256 + n and heap:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:  # it has become rarer since it was put there: back to its place
            if pairs[pair]:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        (a, b), new = pair, set()
        ranks.setdefault(a + b, len(ranks))
        for i in where[pair]:
            merged = []
            for token in words[i]:
                if token == b and merged and merged[-1] == a:
                    merged[-1] = a + b
                else:
                    merged.append(token)
            for old in zip(words[i], words[i][1:]):
                pairs[old] -= counts[i]
            for now in zip(merged, merged[1:]):
                pairs[now] += counts[i]
                where[now].add(i)
                new.add(now)
            words[i] = merged
        for now in new:
            if a + b in now:
                heapq.heappush(heap, (-pairs[now], now))
    return ranks


class BytePairs:
    """tiktoken with the ranks of learn_bpe."""

    def __init__(self, ranks):
        import tiktoken

        self.encoding = tiktoken.Encoding("pairs", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
        self.vocab_size = 3 + len(ranks)

    def encode(self, text):
        return [3 + i for i in self.encoding.encode_ordinary(text)]

    def decode(self, ids):
        return self.encoding.decode([i - 3 for i in ids], errors="replace")


def load_pairs(data):
    """Pairs of sentences to train on and held out: of multi30k or of a file with a tab between the two of a line."""
    if data == "multi30k":
        place = Path(os.environ.get("DATA_DIR") or Path(__file__).resolve().with_name("data")) / "multi30k"
        files = [[place / f"{part}.{language}" for language in ("en", "de")] for part in ("train", "test_2016_flickr")]
        for file in sum(files, []):
            if not file.exists():
                fail(f"{file} is missing: unpack it there from data/task1/raw of github.com/multi30k/dataset")
        sides = [[file.read_text(encoding="utf-8").splitlines() for file in part] for part in files]
        return [list(zip(*part)) for part in sides]
    try:
        lines = Path(data).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{data} is no text that can be read ({error}): name numbers, multi30k or a file in UTF-8")
    pairs = [pair for line in lines if len(pair := tuple(line.split("\t")[:2])) == 2 and all(pair)]
    if len(pairs) < 100 or len(pairs) < len(lines) // 2:
        fail(f"{data} must have 100 lines or more, each a sentence, a tab and its translation: it has {len(pairs)}")
    return [pair for i, pair in enumerate(pairs) if i % 20], pairs[::20]


def padded(rows):
    """Lists of tokens -> (B, T) int64, filled with PAD."""
    ids = np.full((len(rows), max(map(len, rows))), PAD)
    for row, tokens in zip(ids, rows):
        row[: len(tokens)] = tokens
    return ids


def bleu(answers, references):
    """BLEU (Papineni et al. 2002) of a list of sentences, each with a list of references, in percent, as sacreBLEU's.

    The geometric mean of the shares of n-grams, n = 1 ... 4, that are in a reference too, times a penalty for brevity.
    A share of none of m counts as 1 / (2^k m) for the k-th such n.
    """
    right, total, n_answer, n_reference = np.zeros(4), np.zeros(4), 0, 0
    for answer, others in zip(answers, references):
        answer, *others = (mteval_tokens(text) for text in (answer, *others))
        n_answer += len(answer)
        n_reference += min((abs(len(other) - len(answer)), len(other)) for other in others)[1]
        for n in range(1, 5):
            most = Counter()
            for other in others:
                most |= Counter(zip(*(other[i:] for i in range(n))))
            grams = Counter(zip(*(answer[i:] for i in range(n))))
            right[n - 1] += (grams & most).total()
            total[n - 1] += grams.total()
    if not total.all():
        return 0.0
    none = np.cumsum(right == 0)
    share = np.where(right == 0, 0.5**none, right) / total
    return float(100 * np.exp(np.log(share).mean()) * min(1, math.exp(1 - n_reference / n_answer)))


def mteval_tokens(text):
    """Words and signs, as mteval-v13a splits them."""
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


# ---- data: pictures --------------------------------------------------------------------------------------------------

IDX = {  # the two homes of each set, and the MD5 sums of its four files
    "mnist": (
        "http://yann.lecun.com/exdb/mnist https://ossci-datasets.s3.amazonaws.com/mnist",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873 d53e105ee54ea40749a09fcbcd1e9432 "
        "9fb629c4189551a2d022fa330f9573f3 ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com "
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d 25c81989df183df01b3e8a0aad5dffbe "
        "bef4ecab320f06d8554ea6380940ec79 bb300cfdad3c16e7a12a480ee83cd310",
    ),
}


def load_idx(name):
    """mnist or fashion: images (N, 28, 28) uint8 and labels (N,) of the training part, then of the test part."""
    homes, sums, arrays = *map(str.split, IDX[name]), []
    for stem, md5 in zip(("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"), sums):
        path = fetch(f"{name}/{stem}-ubyte.gz", md5, *(f"{home}/{stem}-ubyte.gz" for home in homes))
        try:
            raw = gzip.decompress(path.read_bytes())
            shape = np.frombuffer(raw, ">i4", raw[3], 4)  # bytes 0, 0, type and rank; then the sizes, big-endian
            arrays.append(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape))
        except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
            fail(f"{path} is damaged ({error}): delete it, and it will be downloaded again")
    return arrays


def make_digits(n, seed):
    """n drawn digits: images (n, 28, 28) uint8, labels (n,); each with its own stroke, size, turn, shear and shift."""
    rng = np.random.default_rng((seed, 28))
    font, glyphs = ImageFont.load_default(60), {}
    for digit in range(10):
        for stroke in range(4):
            glyphs[digit, stroke] = image = Image.new("L", (84, 84))
            ImageDraw.Draw(image).text((42, 42), str(digit), 255, font, anchor="mm", stroke_width=stroke)
    labels, strokes = rng.integers(0, 10, n), rng.integers(0, 4, n)
    turn, shear, size = rng.normal(0, 0.15, n), rng.normal(0, 0.15, n), rng.uniform(0.8, 1.25, n)
    # the corners (x, y) of the square of the glyph that becomes the image: nw, sw, se, ne
    x, y = np.array([-1, -1, 1, 1])[:, None] * 36 / size, np.array([-1, 1, 1, -1])[:, None] * 36 / size
    x = x + shear * y
    x, y = np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y
    corners = np.stack([x, y], -1).transpose(1, 0, 2) + rng.normal(0, 2, (n, 4, 2)) + rng.normal(42, 3, (n, 1, 2))
    images = np.empty((n, 28, 28), np.uint8)
    for i, key in enumerate(zip(labels.tolist(), strokes.tolist())):
        square = glyphs[key].transform((56, 56), Image.Transform.QUAD, corners[i].ravel(), Image.Resampling.BILINEAR)
        images[i] = square.reduce(2)
    noisy = images * rng.uniform(0.6, 1, (n, 1, 1)) + rng.normal(0, 12, images.shape)
    return noisy.clip(0, 255).astype(np.uint8), labels


def load_cifar10():
    """Images (N, 32, 32, 3) uint8 and labels (N,) of the training part, then of the test part; the classes' names."""
    home = "https://www.cs.toronto.edu/~kriz https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10"
    file = "cifar-10-binary.tar.gz"
    path = fetch(file, "c32a1d4ab5d03f1284b67883e8d87530", *(f"{url}/{file}" for url in home.split()))
    try:
        with tarfile.open(path, "r:gz") as tar:
            parts = {Path(m.name).name: tar.extractfile(m).read() for m in tar if m.isfile()}
        train = b"".join(parts[f"data_batch_{i}.bin"] for i in range(1, 6))
        arrays = []
        for raw in (train, parts["test_batch.bin"]):
            rows = np.frombuffer(raw, np.uint8).reshape(-1, 3073)  # the class, then the red, green and blue pixels
            arrays += [rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]]
        return arrays, parts["batches.meta.txt"].decode().split()
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError, zlib.error) as error:
        fail(f"{path} is damaged ({error}): delete it, and it will be downloaded again")


def floats(images):
    return images.astype(np.float32) / 255


def augment(x, shift, flip, rng):
    """Images (B, H, W, C), each moved by up to `shift` pixels, the border repeated, and half of them mirrored."""
    B, H, W, _ = x.shape
    down, right = rng.integers(-shift, shift + 1, (2, B, 1))
    rows, columns = (np.arange(H) + down).clip(0, H - 1), (np.arange(W) + right).clip(0, W - 1)
    if flip:
        columns = np.where(rng.random((B, 1)) < 0.5, columns[:, ::-1], columns)
    return x[np.arange(B)[:, None, None], rows[:, :, None], columns[:, None]]


SIZES, PLACES = ("small", "big"), ("on the left", "on the right", "at the top", "at the bottom", "in the middle")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = dict(red=(220, 50, 47), green=(60, 160, 60), blue=(50, 90, 220), yellow=(240, 200, 40), purple=(150, 70, 180),
               orange=(240, 140, 40), white=(240, 240, 240), black=(30, 30, 30))  # fmt: skip
CAPTIONS = [f"{a} {b} {c} {d}" for a in SIZES for b in COLOURS for c in SHAPES for d in PLACES]  # 480


def draw_shape(caption, rng, size=32):
    """What the caption says, (size, size, 3) uint8, with chance in its place, size, turn, hue and the background."""
    big, colour, shape, place = caption.split(" ", 3)
    r = rng.uniform(0.12, 0.15) if big == "small" else rng.uniform(0.22, 0.26)
    away = dict(zip(PLACES, ((-0.24, 0), (0.24, 0), (0, -0.24), (0, 0.24), (0, 0))))[place]
    x, y = np.array(away) + 0.5 + rng.normal(0, 0.025, 2)
    n, inner = dict(circle=(40, 1), ring=(40, 1), square=(4, 1), triangle=(3, 1), star=(10, 0.45), cross=(0, 1))[shape]
    turn = rng.normal(0, 0.12) + (math.pi / 4 if shape == "square" else -math.pi / 2)
    angle = turn + np.arange(n) * 2 * math.pi / max(n, 1)
    radius = r * np.where(np.arange(n) % 2, inner, 1)
    outline = np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], -1)
    if shape == "cross":
        a = np.array([1, 1, 3, 3, 1, 1, -1, -1, -3, -3, -1, -1]) / 3 * r
        b = np.roll(a, 3)
        t = turn + math.pi / 2
        outline = np.stack([x + a * math.cos(t) - b * math.sin(t), y + a * math.sin(t) + b * math.cos(t)], -1)
    ground = rng.integers(90, 170) + rng.integers(-15, 16, 3)
    image = Image.new("RGB", (2 * size, 2 * size), tuple(ground.tolist()))
    draw = ImageDraw.Draw(image)
    hue = tuple(int(v) for v in np.clip(np.array(COLOURS[colour]) + rng.normal(0, 8, 3), 0, 255))
    draw.polygon([tuple(point) for point in (outline * 2 * size).tolist()], hue)
    if shape == "ring":
        box = [(v - side * r * 0.55) * 2 * size for side in (1, -1) for v in (x, y)]
        draw.ellipse(box, tuple(ground.tolist()))
    noisy = np.asarray(image.reduce(2)) + rng.normal(0, 6, (size, size, 3))
    return noisy.clip(0, 255).astype(np.uint8)


# ---- pictures --------------------------------------------------------------------------------------------------------

PAPER, INK, GREEN = (250, 250, 247), (60, 60, 60), (44, 160, 44)
FIGURES = "0 1 2 3 4 5 6 7 8 9 10 100 1000 10^4 10^8".split()  # Pillow's font has no Chinese
PLAIN = dict(zip("零一二三四五六七八九十百千萬億äöüÄÖÜß", [*FIGURES, *"aouAOU", "ss"]))  # and no umlauts


def draw_attention(p, source, target):
    """How much each token of the target (a row) looks at each of the source (a column): p (T, S), darker is more."""
    source, target = (["".join(PLAIN.get(c, c) for c in word) for word in words] for words in (source, target))
    side, left, top = 34, 110, 110
    image = Image.new("RGB", (left + side * len(source) + 20, top + side * len(target) + 20), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for j, word in enumerate(source):
        label = Image.new("L", (100, 20))
        ImageDraw.Draw(label).text((0, 10), word, 255, font, "lm")
        label = label.rotate(60, expand=True)
        image.paste(INK, (left + j * side + 8, top - label.height - 2), label)
    for i, word in enumerate(target):
        draw.text((left - 8, top + (i + 0.5) * side), word, INK, font, "rm")
        for j in range(len(source)):
            box = (left + j * side, top + i * side, left + (j + 1) * side - 2, top + (i + 1) * side - 2)
            draw.rectangle(box, tuple((np.array([238, 238, 232]) - p[i, j] * np.array([218, 178, 92])).astype(int)))
    return image


def draw_patches(images, p, texts, columns=4):
    """Pictures (N, H, W, C) uint8, and beside each where its class token looks: p (N, h, w)."""
    side = 120
    image = Image.new("RGB", (columns * (2 * side + 24), math.ceil(len(images) / columns) * (side + 34)), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for i, (x, seen) in enumerate(zip(images, p)):
        u, v = i % columns * (2 * side + 24) + 10, i // columns * (side + 34) + 8
        tile = Image.fromarray(x if x.shape[2] == 3 else x.repeat(3, 2)).resize((side, side), Image.Resampling.NEAREST)
        light = Image.fromarray((50 + 205 * seen / seen.max()).astype(np.uint8))
        light = light.resize(tile.size, Image.Resampling.BICUBIC)
        image.paste(tile, (u, v))
        image.paste(Image.composite(tile, Image.new("RGB", tile.size, (30, 20, 60)), light), (u + side + 4, v))
        draw.text((u, v + side + 12), texts[i], INK, font, "lm")
    return image


def draw_matches(images, texts, likeness, rows=8, columns=6):
    """For some captions the pictures that are most like them; a frame marks those that it was written for."""
    image = Image.new("RGB", (250 + columns * 76, rows * 80 + 6), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for row, i in enumerate(range(0, len(texts), max(1, len(texts) // rows))[:rows]):
        draw.text((240, row * 80 + 40), texts[i], INK, font, "rm")
        for column, j in enumerate(np.argsort(-likeness[:, i])[:columns]):
            u, v = 250 + column * 76, row * 80 + 6
            if j % len(texts) == i:
                draw.rectangle((u - 3, v - 3, u + 70, v + 70), GREEN)
            image.paste(Image.fromarray(images[j]).resize((68, 68), Image.Resampling.NEAREST), (u, v))
    return image


# ---- the tasks: each gives its part of Config, choose(rng) for a batch, what is held out, report(trainer), a size ----


def sentences(args, saved):
    """Pairs of sentences: numbers drawn at random, or those of a file."""
    if args.data == "numbers":
        words = [*ONES, *TENS[2:], "hundred", "thousand", "million"]
        sides = [Symbols(words, " "), Symbols(list("零一二三四五六七八九十百千萬億"), "")]

        def numbers(rng, n, held):
            """n pairs; of the numbers from a thousand on every tenth, by its hash, is held out."""
            drawn = []
            while len(drawn) < n:
                i = int(rng.integers(0, 10 ** rng.integers(1, 10)))
                if held == (i >= 1000 and i * 2654435761 % 2**32 % 10 == 0):
                    drawn.append((to_english(i), to_chinese(i)))
            return drawn

        test = numbers(np.random.default_rng((args.seed, 3)), 1000, True)
        size = "numbers below a thousand million"

        def choose(rng):
            return numbers(rng, args.batch_size, False)

    else:
        train, test = load_pairs(args.data)
        ranks = saved["ranks"] if saved else None
        if ranks is None:
            ranks = [token.hex() for token in learn_bpe("\n".join(map("\n".join, train)), args.merges)]
        args.extra = {"ranks": ranks}
        pairs = BytePairs({bytes.fromhex(token): i for i, token in enumerate(ranks)})
        sides = [pairs, pairs]
        train = sorted(train, key=lambda pair: len(pair[0]) + len(pair[1]))
        if args.batch_size > len(train):
            fail(f"--batch-size {args.batch_size} is more than the {len(train)} pairs: make it smaller")

        def choose(rng):  # neighbours in length, so that little is padding
            i = rng.integers(0, len(train) - args.batch_size + 1)
            return train[i : i + args.batch_size]

        size = f"{len(train):,} pairs"

    if args.prompt is not None and not 0 < len(sides[0].encode(args.prompt)) <= args.length:
        fail(f"--prompt must have 1 to {args.length} tokens")

    def arrays(pairs):
        src = padded([sides[0].encode(a)[: args.length] for a, _ in pairs])
        return src, padded([[BOS, *sides[1].encode(b)[: args.length - 2], EOS] for _, b in pairs])

    def report(trainer):
        answers = []
        for i in range(0, len(test), 100):
            src = padded([sides[0].encode(a)[: args.length] for a, _ in test[i : i + 100]])
            answers += [sides[1].decode(ids) for ids in trainer.translate(src, args.beam)]
        right = [answer == b for answer, (_, b) in zip(answers, test)]
        figures = {"exact": sum(right) / len(right)}
        if args.data != "numbers":
            figures = {"bleu": round(bleu(answers, [[b] for _, b in test]), 2)}
        shown = [args.prompt] if args.prompt else [a for a, _ in test[:5]]
        for text in shown:
            (ids,) = trainer.translate(padded([sides[0].encode(text)[: args.length]]), args.beam)
            print(f"{text}\n    -> {sides[1].decode(ids)}")
        src = sides[0].encode(max(shown, key=len))[: args.length]
        (ids,) = trainer.translate(padded([src]), args.beam)
        p = trainer.attention(padded([src]), np.array([[BOS, *ids]]))[0].mean(0)
        names = [[side.decode([i]) for i in row] for side, row in zip(sides, (src, ids))]
        draw_attention(p, names[0], [*names[1], "end"]).save(args.out / "sample.png")
        return figures

    shape = dict(model="seq2seq", src_vocab=sides[0].vocab_size, tgt_vocab=sides[1].vocab_size)
    return shape, lambda rng: arrays(choose(rng)), arrays(test), report, size


def pictures(args, saved):
    """Pictures by class."""
    names = [str(digit) for digit in range(10)]
    if args.data == "digits":
        data = [*make_digits(5000, args.seed), *make_digits(1000, args.seed + 1)]
    elif args.data == "cifar10":
        data, names = load_cifar10()
    elif args.data in IDX:
        data = load_idx(args.data)
        if args.data == "fashion":
            names = "top trousers pullover dress coat sandal shirt trainer bag boot".split()
    else:
        fail(f"--data {args.data}: classify has digits, mnist, fashion and cifar10")
    x_train, x_test = (x if x.ndim == 4 else x[..., None] for x in data[::2])
    y_train, y_test = (y.astype(np.int64) for y in data[1::2])

    def choose(rng):
        i = rng.integers(0, len(x_train), args.batch_size)
        return floats(augment(x_train[i], args.shift, args.flip, rng)), y_train[i]

    def report(trainer):
        x = floats(x_test[:12])
        p, seen = trainer.predict(x), trainer.attention(x)[:, :, 0, 1:].mean(1)
        seen = seen.reshape(12, *(side // trainer.config.patch for side in x_test.shape[1:3]))
        texts = [f"{names[y]} {100 * q[y]:.0f} %" for q, y in zip(p, p.argmax(1))]
        draw_patches(x_test[:12], seen, texts).save(args.out / "sample.png")
        return {}

    shape = dict(model="vit", image=list(x_train.shape[1:]), n_out=len(names))
    return shape, choose, (floats(x_test), y_test), report, f"{len(x_train):,} pictures"


def captions(args, saved):
    """Drawn pictures and what they show; 64 of the 480 combinations are never trained on."""
    if args.data != "shapes":
        fail(f"--data {args.data}: clip has shapes")
    words = sorted(set(" ".join(CAPTIONS).split()))
    tokens, held = Symbols(words, " "), set(np.random.default_rng(5).permutation(len(CAPTIONS))[:64].tolist())
    known = [i for i in range(len(CAPTIONS)) if i not in held]
    new = [CAPTIONS[i] for i in sorted(held)]

    if args.batch_size > len(known):
        fail(f"--batch-size {args.batch_size} is more than the {len(known)} captions: make it smaller")

    def draw(texts, rng):
        return np.stack([draw_shape(text, rng) for text in texts])

    def arrays(texts, rng):
        return floats(draw(texts, rng)), padded([tokens.encode(text) for text in texts])

    def choose(rng):
        return arrays([CAPTIONS[i] for i in rng.choice(known, args.batch_size, replace=False)], rng)

    def report(trainer):
        rng, ids = np.random.default_rng((args.seed, 4)), padded([tokens.encode(text) for text in new])
        images = draw(new * 4, rng)  # four pictures of each
        a, b = trainer.embed(floats(images), ids)
        likeness, y = a @ b.T, np.arange(len(new))
        everything = padded([tokens.encode(text) for text in CAPTIONS])
        among_all = (a @ trainer.embed(floats(images[:1]), everything)[1].T).argmax(1)
        draw_matches(images, new, likeness).save(args.out / "sample.png")
        return {
            "text_of_image": float((likeness.argmax(1) == np.tile(y, 4)).mean()),
            "image_of_text": float((likeness.reshape(4, len(new), -1).argmax(1) == y).mean()),
            "text_among_480": float(np.mean([CAPTIONS[i] == text for i, text in zip(among_all, new * 4)])),
        }

    shape = dict(model="clip", image=[32, 32, 3], src_vocab=tokens.vocab_size, n_out=64)
    return shape, choose, arrays(new, np.random.default_rng((args.seed, 2))), report, f"{len(known)} combinations"


def main():
    began = time.perf_counter()
    apple = (sys.platform, platform.machine()) == ("darwin", "arm64")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--backend", choices=["torch", "mlx"], default="mlx" if apple else "torch")
    parser.add_argument("--task", choices=TASKS, default="translate")
    parser.add_argument("--data", help="translate: numbers, multi30k or a file of pairs; classify: digits, mnist ...")
    parser.add_argument("--n-layer", type=int, help="of each encoder and decoder")
    parser.add_argument("--n-head", type=int, default=4)
    parser.add_argument("--width", type=int)
    parser.add_argument("--norm", choices=["pre", "post"], default="pre")
    parser.add_argument("--positions", choices=["sinusoidal", "learned"], default="sinusoidal")
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--smoothing", type=float, help="the share of 1 that is spread over all tokens or classes")
    parser.add_argument("--patch", type=int, help="height and width of a picture's patch")
    parser.add_argument("--merges", type=int, default=4000, help="byte pairs to learn of a file of pairs")
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--steps", type=int, help="0: only evaluate")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, help="the highest rate")
    parser.add_argument("--warmup", type=int, help="steps in which the rate rises (default: a tenth of them)")
    parser.add_argument("--decay", choices=["linear", "inverse-sqrt"], default="linear", help="how the rate falls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().with_name("out"))
    parser.add_argument("--resume", action="store_true", help="go on from OUT/ckpt.npz, whichever backend wrote it")
    parser.add_argument("--device", help="cuda, mps or cpu; MLX: gpu or cpu (default: the best there is)")
    parser.add_argument("--beam", type=int, help="how many beginnings are kept in the search; 1 is greedy")
    parser.add_argument("--prompt", help="a sentence to translate")
    args = parser.parse_args()
    args.data = args.data or TASKS[args.task]
    for name, value in {**COMMON, **SETS.get(args.data, SETS["multi30k"])}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.log_every, args.extra, args.warmup = max(1, args.steps // 20), {}, args.warmup or max(1, args.steps // 10)
    counts = args.batch_size, args.n_layer, args.n_head, args.beam, args.warmup
    if min(args.steps, args.merges, args.seed) < 0 or min(counts) < 1:
        fail("--steps, --merges, --seed must be 0 or more, --batch-size, --beam, --warmup and --n-... 1 or more")
    if not (0 < args.lr < math.inf and 0 <= args.dropout < 1 and 0 <= args.smoothing < 1):
        fail("--lr must be more than 0, --dropout and --smoothing a share of 1")
    if args.prompt is not None and args.task != "translate":
        fail("--prompt goes with --task translate")
    if args.width < 1 or args.width % (2 * args.n_head):
        fail("--width must be a multiple of twice --n-head")

    ckpt = args.out / "ckpt.npz"
    saved = read_meta(ckpt, "transformer") if args.resume else None
    if saved and (saved["task"], saved["data"]) != (args.task, args.data):
        fail(f"{ckpt} was trained with --task {saved['task']} --data {saved['data']}: repeat them, or change --out")
    net = load_twin(args)
    task = {"translate": sentences, "classify": pictures, "clip": captions}[args.task]
    shape, choose, held_out, report, size = task(args, saved)
    if args.patch < 1 or any(side % args.patch for side in shape.get("image", [])[:2]):
        fail("--patch must divide height and width of the pictures")
    shape |= {"label_smoothing": args.smoothing}
    for name in "length patch n_layer n_head width norm positions dropout optimizer".split():
        shape[name] = getattr(args, name)
    config = net.Config(**(saved["config"] if saved else shape))
    trainer = net.Trainer(config, seed=args.seed, device=args.device)
    start = trainer.load(ckpt) if saved else 0
    params = sum(w.size for w in net.get_weights(trainer.model).values())
    print(f"transformer: {config.model}, {args.backend} on {args.device}, {params:,} parameters; {args.data}: {size} "
          f"to train on, {len(held_out[0]):,} held out; files go to {args.out}", flush=True)

    def batch(step):
        return choose(np.random.default_rng((args.seed, step, 1)))

    def lr(step):
        fall = 1 - step / args.steps if args.decay == "linear" else math.sqrt(args.warmup / max(step + 1, args.warmup))
        return args.lr * min((step + 1) / args.warmup, 1) * fall

    def evaluate(n=200):
        total, n = {}, min(n, len(held_out[0]))
        for i in range(0, n, 100):
            part = [a[i : min(i + 100, n)] for a in held_out]
            for name, value in trainer.evaluate(*part).items():
                total[name] = total.get(name, 0.0) + float(value) * len(part[0]) / n
        return total

    speed = fit(trainer, batch, evaluate, lr, args, start, task=args.task, data=args.data, **args.extra)
    figures = evaluate(len(held_out[0])) | report(trainer)
    files = [str(file) for file in (ckpt, args.out / "sample.png") if file.exists()]
    result = {"backend": args.backend, "device": args.device, "params": params, "steps": args.steps}
    result |= {"seconds": round(time.perf_counter() - began, 2), "steps_per_s": round(speed, 1), **figures}
    print("result " + json.dumps(result | {"files": files}))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head` has read enough; what is left to print has no reader
        os._exit(141)
