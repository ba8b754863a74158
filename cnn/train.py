# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "mlx[cpu]==0.32.4", "numpy", "pillow"]
# ///
"""Train a convolutional network:  python train.py [--backend mlx] [--data cifar10] [--model resnet] [--export net.pt2]
or paint a picture in the manner of another:  python train.py --task style [--content A.jpg --style B.jpg]

--data: mnist, fashion, cifar10, or your own folder with one sub-folder of images a class; the default is drawn digits.
"""

import argparse
import gzip
import hashlib
import importlib
import importlib.util
import json
import math
import os
import platform
import signal
import sys
import tarfile
import time
import zlib
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

MODELS = {  # LeNet: both convolutions and the hidden layer; ResNet: the stem and each block
    "lenet": dict(channels=[16, 32, 128], lr=0.006, smoothing=0.0),
    "resnet": dict(channels=[16, 48, 96, 192], lr=0.02, smoothing=0.1),
}
SETS = {  # shift, flip: how far images are moved while training, and whether half of them are mirrored
    "digits": dict(model="lenet", steps=250, batch_size=128, shift=2, flip=False),
    "mnist": dict(model="lenet", steps=2000, batch_size=128, shift=1, flip=False),
    "fashion": dict(model="lenet", steps=1400, batch_size=128, shift=2, flip=True),
    "cifar10": dict(model="resnet", steps=800, batch_size=128, shift=0, flip=True),
    "folder": dict(model="resnet", steps=500, batch_size=128, shift=3, flip=True),
}
STYLE = dict(model="style", steps=150, shift=0, batch_size=1, channels=[1], lr=0.05, size=256)

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


# ---- data ------------------------------------------------------------------------------------------------------------

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


def open_image(path):
    """An image file as an RGB image, the right way up; raises OSError or ValueError if it is none."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (SyntaxError, Image.DecompressionBombError) as error:  # Pillow's words for some broken files
        raise ValueError(error) from None


def load_folder(folder, size):
    """A sub-folder a class: the middle square of every image at size x size; every fifth one of a class is held out."""
    images, labels, held, names, skipped = [], [], [], [], 0
    for place in sorted(path for path in Path(folder).glob("*") if path.is_dir()):
        before = len(images)
        for path in sorted(path for path in place.rglob("*") if path.is_file() and not path.name.startswith(".")):
            try:
                images.append(np.asarray(ImageOps.fit(open_image(path), (size, size))))
            except (OSError, ValueError):
                skipped += 1
                print(f"skipped, no image that can be read: {path}", file=sys.stderr)
        if new := len(images) - before:
            labels += [len(names)] * new
            held += [i % 5 == 4 for i in range(new)]
            names.append(place.name)
    if skipped:
        print(f"skipped {skipped} files of {folder}", file=sys.stderr)
    if len(names) < 2 or not any(held):
        fail(f"{folder} must be mnist, fashion, cifar10 or a folder with two sub-folders or more of 5 images or more")
    images, labels, held = np.stack(images), np.array(labels), np.array(held)
    return [images[~held], labels[~held], images[held], labels[held]], names


def load_data(args):
    """Images (N, H, W, C) uint8 and classes (N,) int64, to train on and held out; the names of the classes."""
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
        data, names = load_folder(args.data, args.size or 32)
    x_train, y_train, x_val, y_val = data
    x_train, x_val = (x if x.ndim == 4 else x[..., None] for x in (x_train, x_val))
    return x_train, y_train.astype(np.int64), x_val, y_val.astype(np.int64), names


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


def draw_scene(size):
    """The embedded content, (3/4 size, size): hills and a house under a sun, mirrored in a lake."""
    y, x = np.mgrid[: 3 * size // 2, : 2 * size][:, :, :, None] / (2 * size)  # twice as large, to be made smooth
    lake, y = y > 0.48, np.where(y > 0.48, 0.96 - y, y)
    image = np.array([60, 120, 200]) * (1 - 2 * y) + np.array([255, 220, 180]) * 2 * y
    image = np.where((x - 0.7) ** 2 + (y - 0.17) ** 2 < 0.005, [255, 245, 190], image)
    hills = (0.3, 0.1, 8, 0.2, (120, 140, 180)), (0.38, 0.07, 13, 2, (70, 110, 110)), (0.44, 0.03, 19, 4, (40, 80, 60))
    for level, rise, waves, phase, colour in hills:
        u = waves * x + phase
        image = np.where(y > level - rise * (np.sin(u) / 2 + np.abs(np.sin(1.7 * u)) - 0.6), colour, image)
    image = np.where((abs(x - 0.24) < 0.06) & (y > 0.36), [210, 90, 60], image)
    image = np.where((abs(x - 0.24) < (y - 0.27) * 0.85) & (y < 0.36), [110, 50, 50], image)
    image = np.where(lake, 0.6 * image + [10, 25, 40], image)
    return Image.fromarray(image.astype(np.uint8)).reduce(2)


def draw_strokes(size, seed=0):
    """The embedded style, (3/4 size, size): strokes of a brush in rings round some eddies, from gold to deep blue."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[: 3 * size // 2, : 2 * size] / (2 * size)
    eddies = rng.uniform(0, 1, (7, 2)) * [0.75, 1]
    away = np.hypot(y[..., None] - eddies[:, 0], x[..., None] - eddies[:, 1])
    nearest = away.argmin(2)
    r = away.min(2) + 0.004 * np.sin(40 * x) + 0.004 * np.sin(40 * y)
    turn = np.arctan2(y - eddies[nearest, 0], x - eddies[nearest, 1])
    ring = (r * 45).astype(int)
    stroke = (turn * (ring + 1) / 2.5 + 2.4 * ring).astype(int)  # strokes of one length, each ring shifted
    chance = np.sin(stroke * 127.1 + ring * 311.7 + nearest * 74.7) * 43758.5453 % 1  # one number a stroke
    palette = np.array([(255, 235, 150), (245, 200, 70), (150, 190, 200), (80, 140, 200), (40, 80, 160), (20, 40, 100)])
    colour = palette[(14 * r + 2.2 * chance).astype(int).clip(0, 5)]
    edge = np.minimum(r * 45 % 1, 1 - r * 45 % 1)[..., None]  # the paint is thinner at the edge of a stroke
    return Image.fromarray((colour * (0.55 + 0.45 * (edge * 4).clip(0, 1))).astype(np.uint8)).reduce(2)


def load_pair(args):
    """Content and style, (H, W, 3) uint8 each, the longer side `size`."""
    size, pair = args.size, []
    for path, draw in ((args.content, draw_scene), (args.style, draw_strokes)):
        try:
            image = open_image(path) if path else draw(size)
        except (OSError, ValueError) as error:
            fail(f"{path} is no image that can be read ({error}): name a PNG or JPEG file")
        pair.append(np.asarray(ImageOps.contain(image, (size, size))))
        if min(pair[-1].shape[:2]) < 16:
            fail(f"{path or 'the picture'} is too narrow for {size} pixels: name a larger --size")
    return pair


# ---- pictures --------------------------------------------------------------------------------------------------------

PAPER, GREEN, RED, GREY = (250, 250, 247), (44, 160, 44), (214, 39, 40), (80, 80, 80)


def draw_mistakes(p, x, y, names, rows=5, columns=6):
    """The images whose right class was given the least probability; beside them the confusion matrix.

    p (N, K) are the probabilities that the network gave to the images x (N, H, W, C) of the classes y (N,).
    """
    K, answers, worst = len(names), p.argmax(1), np.argsort(p[np.arange(len(y)), y])[: rows * columns]
    image = Image.new("RGB", (columns * 96 + 650, rows * 116 + 10), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for place, i in enumerate(worst):
        u, v, right = 10 + place % columns * 96, 10 + place // columns * 116, answers[i] == y[i]
        tile = Image.fromarray(x[i]) if x.shape[3] == 3 else ImageOps.invert(Image.fromarray(x[i, :, :, 0]))
        image.paste(tile.resize((84, 84), Image.Resampling.NEAREST), (u, v))
        text = f"{names[answers[i]][:9]} {100 * p[i, answers[i]]:.0f} %"
        draw.text((u + 42, v + 91), text, GREEN if right else RED, font, "mm")
        draw.text((u + 42, v + 105), "" if right else f"not {names[y[i]]}"[:13], GREY, font, "mm")
    counts = np.bincount(y * K + answers, minlength=K * K).reshape(K, K)
    side, left, top = 520 / K, columns * 96 + 90, 60
    font = ImageFont.load_default(max(6, min(13, 110 // K)))
    for i, j in np.ndindex(K, K):
        share = (counts[i, j] / max(1, counts[i].sum())) ** 0.5  # the root, so that rare mistakes show
        colour = np.array(PAPER) + share * (np.array(GREEN if i == j else RED) - PAPER)
        u, v = left + j * side, top + i * side
        draw.rectangle((u, v, max(u, u + side - 2), max(v, v + side - 2)), tuple(colour.astype(int).tolist()))
        if counts[i, j] and K <= 20:
            draw.text((u + side / 2, v + side / 2), f"{counts[i, j]}", (20, 20, 20), font, "mm")
    for i, name in enumerate(names):
        draw.text((left - 6, top + (i + 0.5) * side), name[:14], GREY, font, "rm")
        draw.text((left + (i + 0.5) * side, top - 8), name[:9], GREY, font, "mm")
    draw.text((left, 22), "rows: what it is; columns: what it is taken for", GREY, ImageFont.load_default(13), "lm")
    return image


def draw_filters(w, columns=8):
    """The first layer's filters w (n, C, k, k), each scaled to its own largest weight; grey is 0."""
    w = (w / np.abs(w).max((1, 2, 3), keepdims=True) * 127 + 128).astype(np.uint8).transpose(0, 2, 3, 1)
    image = Image.new("RGB", (columns * 60 + 6, math.ceil(len(w) / columns) * 60 + 6), PAPER)
    for i, tile in enumerate(w if w.shape[3] == 3 else w.repeat(3, 3)):
        tile = Image.fromarray(tile).resize((54, 54), Image.Resampling.NEAREST)
        image.paste(tile, (6 + i % columns * 60, 6 + i // columns * 60))
    return image


# ---- the runs --------------------------------------------------------------------------------------------------------


def classify(args, net, saved, ckpt):
    """Train and judge a classifier: the trainer, its parameters, its speed, its figures, its files."""
    x_train, y_train, x_val, y_val, names = args.arrays
    _, size, _, n_in = x_train.shape
    config = net.Config(args.model, size, n_in, len(names), args.channels, args.smoothing)
    if saved:
        config = net.Config(**saved["config"])
        if (config.size, config.n_in, saved.get("names")) != (size, n_in, names):
            fail(f"{ckpt} was trained on other data: repeat the --task and --data of that run")
    if config.model == "resnet" and not size >> len(config.channels) - 1:
        fail(f"--channels: {len(config.channels)} blocks halve {size} pixels to none: name fewer")
    trainer = net.Trainer(config, seed=args.seed, device=args.device)
    start = trainer.load(ckpt) if saved else 0
    params = sum(w.size for w in net.get_weights(trainer.model).values())
    print(f"cnn: {config.model}, {args.backend} on {args.device}, {params:,} parameters; {args.data}: {len(x_train):,} "
          f"to train on, {len(x_val):,} held out; files go to {args.out}", flush=True)

    def batch(step):
        rng = np.random.default_rng((args.seed, step, 1))
        i = rng.integers(0, len(x_train), args.batch_size)
        return floats(augment(x_train[i], args.shift, args.flip, rng)), y_train[i]

    def lr(step):  # up in the first tenth, then down to 0
        return args.lr * min((step + 1) / (0.1 * args.steps), (args.steps - step) / (0.9 * args.steps), 1)

    def evaluate():  # enough for the log; the result is of all of them
        some = slice(0, None, math.ceil(len(x_val) / 500))
        figures = trainer.evaluate(floats(x_val[some]), y_val[some])
        return {name: float(value) for name, value in figures.items()}

    speed = fit(trainer, batch, evaluate, lr, args, start, names=names)
    p = []
    for part in np.array_split(x_val, math.ceil(len(x_val) / 500)):
        x = floats(part)
        p.append(trainer.predict(x))
        if args.flip:  # asked twice, the mirror image too, it errs less
            p[-1] = (p[-1] + trainer.predict(x[:, :, ::-1].copy())) / 2
    p = np.concatenate(p)
    nll, right = -np.log(p[np.arange(len(p)), y_val] + 1e-12), p.argmax(1) == y_val
    draw_mistakes(p, x_val, y_val, names).save(args.out / "sample.png")
    filters = net.get_weights(trainer.model)["conv1.weight" if config.model == "lenet" else "stem.weight"]
    draw_filters(filters).save(args.out / "filters.png")
    figures = {"val_loss": float(nll.mean()), "accuracy": float(right.mean())}
    return trainer, params, speed, figures, ["sample.png", "filters.png"]


def paint(args, net, saved, ckpt):
    """Style transfer: gives the same as classify."""
    content, style = args.arrays
    height, width, _ = content.shape
    config = net.Config(**saved["config"]) if saved else net.Config("style", max(height, width), 3, 0, [], 0.0, 0.0)
    pair = (np.asarray(image, np.float32) / 255 for image in (content, style))
    try:
        trainer = net.Stylist(config, *pair, args.weights, args.strength, args.tv, args.seed, args.device)
    except Exception as error:
        if not args.weights:
            raise
        kind = ".safetensors" if args.backend == "mlx" else ".pth"
        fail(f"{args.weights} is no {kind} file of VGG-19 in torchvision's layout ({str(error).splitlines()[0]})")
    try:
        start = trainer.load(ckpt) if saved else 0
    except ValueError as error:
        fail(f"{ckpt} is of another picture ({error}): repeat --content and --size")
    print(f"cnn: style, {args.backend} on {args.device}, {content.size:,} parameters, a picture of {width} x {height}; "
          f"features of {args.weights or 'random filters'}; files go to {args.out}", flush=True)

    def evaluate():
        return {name: float(value) for name, value in trainer.evaluate().items()}

    speed = fit(trainer, lambda step: (), evaluate, lambda step: args.lr * (1 - step / args.steps), args, start)
    result = Image.fromarray((trainer.image() * 255).round().astype(np.uint8))
    shown = Image.new("RGB", (3 * width + 16, height), PAPER)
    for i, image in enumerate((Image.fromarray(content), Image.fromarray(style), result)):
        shown.paste(ImageOps.fit(image, (width, height)), (i * (width + 8), 0))
    shown.save(args.out / "sample.png")
    result.save(args.out / "style.png")
    return trainer, content.size, speed, evaluate(), ["sample.png", "style.png"]


def main():
    began = time.perf_counter()
    apple = (sys.platform, platform.machine()) == ("darwin", "arm64")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--backend", choices=["torch", "mlx"], default="mlx" if apple else "torch")
    parser.add_argument("--task", choices=["classify", "style"], default="classify")
    parser.add_argument("--data", default="digits", help="digits, mnist, fashion, cifar10 or a folder of folders")
    parser.add_argument("--model", choices=MODELS, help="default: lenet for grey images, else resnet")
    parser.add_argument("--channels", type=int, nargs="+", help="lenet: two convolutions, hidden; resnet: stem, blocks")
    parser.add_argument("--shift", type=int, help="move each image by up to so many pixels (default: 0 to 3)")
    parser.add_argument("--size", type=int, help="folder: of the images (default 32); style: the longer side (256)")
    parser.add_argument("--content", help="style: the picture that says what is to be seen (default: drawn)")
    parser.add_argument("--style", help="style: the picture that says in which manner (default: drawn)")
    parser.add_argument("--weights", help="style: a file of VGG-19 in place of random filters: .pth; MLX: .safetensors")
    parser.add_argument("--strength", type=float, default=100.0, help="style: its weight; the content has 1")
    parser.add_argument("--tv", type=float, default=30.0, help="style: weight of the differences of neighbours")
    parser.add_argument("--steps", type=int, help="0: only evaluate and draw")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, help="the highest rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().with_name("out"))
    parser.add_argument("--resume", action="store_true", help="go on from OUT/ckpt.npz, whichever backend wrote it")
    parser.add_argument("--export", type=Path, help="write the trained network alone: .pt2, .mlpackage; MLX: .mlxfn")
    parser.add_argument("--device", help="cuda, mps or cpu; MLX: gpu or cpu (default: the best there is)")
    args = parser.parse_args()
    defaults = STYLE if args.task == "style" else SETS.get(args.data, SETS["folder"])
    defaults = MODELS.get(args.model or defaults["model"], {}) | defaults
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.log_every = max(1, args.steps // 20)
    if min(args.steps, args.seed) < 0 or min(args.batch_size, *args.channels) < 1 or not 0 < args.lr < math.inf:
        fail("--steps and --seed must be 0 or more, --batch-size and --channels 1 or more, --lr more than 0")
    if min(args.strength, args.tv, args.shift) < 0 or args.size and args.size < 16:
        fail("--strength, --tv and --shift must be 0 or more, --size 16 or more")
    if args.model == "lenet" and len(args.channels) != 3:
        fail("--channels of a lenet are three: both convolutions and the hidden layer")

    ckpt = args.out / "ckpt.npz"
    saved = read_meta(ckpt, "cnn") if args.resume else None
    if saved and (saved["config"]["model"] == "style") != (args.task == "style"):
        fail(f"{ckpt} is of the other --task: repeat the --task of that run, or name another --out")
    net = load_twin(args)
    if args.export:
        package = net.EXPORTS.get(args.export.suffix)
        if not package or args.task == "style":
            fail(f"--export with {args.backend} writes classifiers to {' or '.join(net.EXPORTS)}, not {args.export}")
        if not args.export.parent.is_dir():
            fail(f"--export {args.export}: there is no such folder, make it first")
        if not importlib.util.find_spec(package):
            fail(f"--export {args.export} needs pip install {package}")
    args.arrays = load_data(args) if args.task == "classify" else load_pair(args)
    trainer, params, speed, figures, files = (classify if args.task == "classify" else paint)(args, net, saved, ckpt)
    if args.export:
        trainer.export(args.export)
    files = [file for file in (ckpt, *(args.out / name for name in files), args.export) if file and file.exists()]
    result = {"backend": args.backend, "device": args.device, "params": params, "steps": args.steps}
    result |= {"seconds": round(time.perf_counter() - began, 2), "steps_per_s": round(speed, 1), **figures}
    print("result " + json.dumps(result | {"files": list(map(str, files))}))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head` has read enough; what is left to print has no reader
        os._exit(141)
