# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "mlx[cpu]==0.32.4", "numpy", "pillow"]
# ///
"""Train a GAN:  python train.py [--backend mlx] [--task toy] [--data mnist] [--model gan] [--loss wgan-gp] ...

Tasks: pictures; toy (one dimension, where the densities are known, and with them the best discriminator).
--data: digits or flowers (drawn), mnist, fashion, cifar10, or your own folder of pictures.
"""

import argparse
import gzip
import hashlib
import importlib
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

TASKS = {
    "pictures": dict(model="dcgan", latent=64, steps=2400, batch_size=32, lr=2e-3, d_lr=0.5, smoothing=0.1, ema=0.995),
    "toy": dict(model="gan", latent=4, steps=1500, batch_size=256, lr=5e-4, d_lr=3.0, smoothing=0.0, ema=0.0),
}

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


def make_flowers(n, size, seed):
    """n drawn flowers: images (n, size, size, 3) uint8, petals (n,) 4 ... 9; each with its colour, shape and place."""
    rng = np.random.default_rng((seed, 32))
    tints = np.array([(245, 240, 235), (250, 200, 40), (235, 70, 60), (245, 130, 175), (150, 90, 210), (70, 110, 230)])
    petals, tint = rng.integers(4, 10, n), tints[rng.integers(0, 6, n)] + rng.normal(0, 12, (n, 3))
    radius, inner, turn = rng.uniform(0.55, 0.95, n), rng.uniform(0.4, 0.75, n), rng.uniform(0, 2 * np.pi, n)
    shape, place, light = rng.uniform(0.4, 1.1, n), rng.normal(0, 0.08, (n, 2)), rng.uniform(0.7, 1.15, n)
    axis, images = (np.arange(size) * 2 + 1) / size - 1, np.empty((n, size, size, 3), np.uint8)
    grass = np.array([46, 98, 52]) * (1 - 0.35 * axis[:, None, None]) * np.ones((size, 1))  # lighter above
    for i in range(n):
        x, y = axis - place[i, 0], axis[:, None] - place[i, 1]
        r, angle, image = np.hypot(x, y), np.arctan2(y, x) + turn[i], light[i] * grass
        layers = []  # each with its colour, its brightness and its edge, a radius
        for scale, shift, shade in ((1, 0, 0.85), (inner[i], np.pi, 1.05)):  # a wreath, and a smaller one before it
            bump = np.abs(np.cos((petals[i] * angle + shift) / 2)) ** shape[i]  # 1 along a petal, 0 between two
            edge = scale * radius[i] * (0.35 + 0.65 * bump)
            layers.append((tint[i], shade * (0.55 + 0.45 * bump * np.minimum(r / edge, 1)), edge))
        layers.append((np.array([225, 165, 40]), 1.15 - 2.7 * r / radius[i], 0.22 * radius[i]))  # the heart
        for colour, brightness, edge in layers:
            cover = ((edge - r) * size / 2 + 0.5).clip(0, 1)[:, :, None]  # edges are soft, a pixel wide
            image += (brightness[:, :, None] * colour - image) * cover
        images[i] = image.clip(0, 255)
    return images, petals


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


def read_folder(folder, size):
    """The pictures of a folder, cut to squares of `size`: all but every tenth, numbers for labels; then the others."""
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in Image.registered_extensions())
    if len(files) < 20:
        fail(f"--data {folder} must be digits, flowers, mnist, fashion, cifar10 or a folder of 20 pictures or more")
    images = np.empty((len(files), size, size, 3), np.uint8)
    for i, file in enumerate(files):
        try:
            with Image.open(file) as image:
                images[i] = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            fail(f"{file} is no picture that can be read ({error}): take it out of the folder")
    number, held = np.arange(len(files)), np.arange(len(files)) % 10 == 9
    return images[~held], number[~held], images[held], number[held]


def load_data(args):
    """Pictures to train on (N, H, W, C) uint8, and held-out ones."""
    drawn = args.count, args.count // 5
    if args.data in IDX:
        train, _, test, _ = load_idx(args.data)
    elif args.data == "cifar10":
        (train, _, test, _), _ = load_cifar10()
    elif args.data == "flowers":
        (train, _), (test, _) = (make_flowers(n, args.size, args.seed + i) for i, n in enumerate(drawn))
    elif args.data == "digits":
        # without their grain: a G that draws from few numbers can't make each pixel's noise, and D would look at that
        train, test = (centred(pixels((make_digits(n, args.seed + i)[0] - 40.0) / 105)) for i, n in enumerate(drawn))
    else:
        train, _, test, _ = read_folder(args.data, args.size)
    if train.ndim == 3:
        edge = (args.size - 28) // 2  # a black frame: 32 pixels can be halved three times
        train, test = (np.pad(x, ((0, 0), (edge, edge), (edge, edge)))[..., None] for x in (train, test))
    return train, test


def centred(images):
    """Each image (N, H, W) moved so that its centre of mass is in the middle, as it is in MNIST."""
    H, W = images.shape[1:]
    mass = images / images.sum((1, 2), keepdims=True)
    down = np.rint((mass.sum(2) * np.arange(H)).sum(1) - (H - 1) / 2).astype(int)
    right = np.rint((mass.sum(1) * np.arange(W)).sum(1) - (W - 1) / 2).astype(int)
    rows, columns = (np.arange(H) + down[:, None]) % H, (np.arange(W) + right[:, None]) % W
    return images[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None]]


def floats(images):
    return images.astype(np.float32) / 255


def pixels(x):
    return (x * 255).round().clip(0, 255).astype(np.uint8)


def in_parts(function, x, n=1000):
    """function(x) for n rows of x at a time, so that a large set needs no large memory."""
    return np.concatenate([function(x[i : i + n]) for i in range(0, len(x), n)])


def frechet(a, b):
    """The squared distance of Frechet between the normal distributions that fit the rows of a and b (N, n).

    |mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances (Dowson and Landau 1982).
    """
    if not np.isfinite(b).all():
        return math.nan
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(A)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T  # A B has the eigenvalues of root B root, which is symmetric
    both = np.sqrt(np.linalg.eigvalsh(root @ B @ root).clip(0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(A) + np.trace(B) - 2 * both)


def features(x, n=64):
    """Pictures (N, H, W, C) -> (N, n): random sums of the pixels, which keep distances, on the average."""
    x = x.reshape(len(x), -1)
    return x @ (np.random.default_rng(5).standard_normal((x.shape[1], n)) / math.sqrt(n))


# ---- the game in one dimension: densities on a grid, so that the best discriminator and all integrals are known ------

GRID = (np.arange(100) + 0.5) / 50 - 1  # the middles of 100 parts of [-1, 1]
PARTS = np.array([(0.4, -0.5, 0.12), (0.6, 0.35, 0.18)])  # the data, p: normal distributions; share, mean, deviation
P = sum(share * np.exp(-((GRID - mean) ** 2) / (2 * std**2)) / std for share, mean, std in PARTS)
P /= P.sum()  # the probability of each part


def draw_p(rng, shape):
    _, mean, std = np.moveaxis(PARTS[rng.choice(len(PARTS), shape, p=PARTS[:, 0])], -1, 0)
    return np.float32(mean + std * rng.standard_normal(shape))


def look_at_game(trainer, seed):
    """q, the probability of each part of the grid by 20,000 samples, and D there: (2, 100)."""
    z = np.random.default_rng((seed, 3)).standard_normal((20_000, trainer.config.latent), np.float32)
    q = np.histogram(trainer.generate(z), 100, (-1, 1))[0] / len(z)
    return np.stack([q, trainer.discriminate(GRID.astype(np.float32).reshape(-1, 1, 1, 1))])


def theory(q, d):
    """V at D, what it would be at the best D, -log 4 + 2 JSD(p, q); and how far D is from it where pictures are."""
    d = d.astype(np.float64).clip(1e-9, 1 - 1e-9)
    with np.errstate(divide="ignore", invalid="ignore"):
        best = P / (P + q)
        jsd = (np.nansum(P * np.log(2 * best)) + np.nansum(q * np.log(2 * (1 - best)))) / 2
        off = ((P + q) / 2 * np.abs(d - best)).sum()
        return {"value": (P * np.log(d) + q * np.log(1 - d)).sum(), "bound": 2 * jsd - math.log(4), "off": off}


# ---- pictures --------------------------------------------------------------------------------------------------------

PAPER = 250


def tile(x, columns, gap=0):
    """Pictures (N, H, W, C) in rows of `columns` as one sheet (rows (H + gap), columns (W + gap), C) uint8."""
    N, H, W, C = x.shape
    sheet = np.full((-(-N // columns), columns, H + gap, W + gap, C), PAPER if gap else 0, np.uint8)
    sheet.reshape(-1, H + gap, W + gap, C)[:N, :H, :W] = pixels(x)
    return sheet.swapaxes(1, 2).reshape(-1, columns * (W + gap), C)


def draw_rows(parts, columns=12):
    """Pictures in rows under captions: {caption: pictures (N, H, W, C)}."""
    scale = max(1, round(60 / next(iter(parts.values())).shape[1]))
    sheets = [tile(x.repeat(scale, 1).repeat(scale, 2), columns, gap=2) for x in parts.values()]
    image = Image.new("RGB", (sheets[0].shape[1] + 10, sum(len(sheet) + 28 for sheet in sheets) + 6), (PAPER,) * 3)
    draw, font, y = ImageDraw.Draw(image), ImageFont.load_default(15), 0
    for caption, sheet in zip(parts, sheets):
        draw.text((6, y + 14), caption, (60, 60, 60), font, anchor="lm")
        image.paste(Image.fromarray(sheet.squeeze()), (6, y + 28))
        y += len(sheet) + 28
    return image.convert("L") if sheet.shape[2] == 1 else image


INK = {"p": (31, 119, 180), "q": (255, 127, 14), "D": (20, 20, 20), "D*": (150, 150, 150)}


def draw_lines(draw, box, lines, span, caption):
    """Lines {name: (x, y, colour)} in box = x0, y0, x1, y1 of the picture, over span = left, low, right, high."""
    x0, y0, x1, y1 = box
    left, low, right, high = span
    draw.rectangle(box, outline=(200, 200, 200), width=2)
    draw.text((x0 + 8, y0 - 26), caption, (60, 60, 60), ImageFont.load_default(28), anchor="lm")
    at = x1
    for name, (x, y, colour) in reversed(lines.items()):
        u = x0 + (np.array(x) - left) / (right - left) * (x1 - x0)
        v = y1 - (np.array(y) - low) / (high - low) * (y1 - y0)
        draw.line(list(zip(u.tolist(), v.clip(y0, y1).tolist())), colour, 5)
        at -= draw.textlength(name, ImageFont.load_default(28)) + 24
        draw.text((at, y0 - 26), name, colour, ImageFont.load_default(28), anchor="lm")


def draw_game(looks):
    """{step: (q, D)}: four of the looks, and all along the steps what V is and what it would be at the best D."""
    image = Image.new("RGB", (1600, 1440), (PAPER,) * 3)
    draw, steps = ImageDraw.Draw(image), np.array(list(looks))
    for i, step in enumerate(steps[np.linspace(0, len(steps) - 1, 4).round().astype(int)]):
        x, y, (q, d) = 30 + 790 * (i % 2), 60 + 450 * (i // 2), looks[step]
        lines = {"p": (GRID, P / P.max() * 0.6, INK["p"]), "q": (GRID, q / P.max() * 0.6, INK["q"])}
        seen = P + q > 1e-3  # beyond, the few samples say little of q
        lines |= {"p / (p + q)": (GRID[seen], P[seen] / (P + q)[seen], INK["D*"]), "D": (GRID, d, INK["D"])}
        draw_lines(draw, (x, y, x + 750, y + 370), lines, (-1, 0, 1, 1), f"step {step}")
    figures = [theory(*look) for look in looks.values()]
    lines = {"-log 4 + 2 JSD(p, q)": (steps, [f["bound"] for f in figures], INK["D*"])}
    lines |= {"V": (steps, [f["value"] for f in figures], INK["D"])}
    span = (0, -1.5, max(steps[-1], 1), -0.9)
    draw_lines(draw, (30, 960, 1570, 1410), lines, span, "the value of the game, from -1.5 to -0.9")
    return image.reduce(2)


# ---- the run ---------------------------------------------------------------------------------------------------------


def keep(file, array):
    try:
        np.save(file, array)
    except OSError as error:
        file.unlink(missing_ok=True)
        fail(f"{file} could not be written ({error.strerror}): make room there")


def main():
    began = time.perf_counter()
    apple = (sys.platform, platform.machine()) == ("darwin", "arm64")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--backend", choices=["torch", "mlx"], default="mlx" if apple else "torch")
    parser.add_argument("--task", choices=TASKS, default="pictures")
    parser.add_argument("--data", default="digits", help="digits, flowers, mnist, fashion, cifar10 or a folder")
    parser.add_argument("--count", type=int, default=10000, help="digits or flowers to draw, and a fifth to hold out")
    parser.add_argument("--size", type=int, default=32, help="height and width: 28 or more of digits, mnist, fashion")
    parser.add_argument("--model", choices=["gan", "dcgan"], help="linear layers, or convolutions")
    parser.add_argument("--hidden", type=int, nargs="+", help="widths of D's layers (default: 16 32 ...; gan: 256 256)")
    parser.add_argument("--latent", type=int, help="numbers that stand for a picture")
    parser.add_argument("--loss", choices=["non-saturating", "minimax", "wgan-gp"], default="non-saturating")
    parser.add_argument("--smoothing", type=float, help="D's target for real pictures is 1 less this")
    parser.add_argument("--penalty", type=float, default=10.0, help="weight of the gradient penalty of wgan-gp")
    parser.add_argument("--d-lr", type=float, help="D's rate over G's")
    parser.add_argument("--d-steps", type=int, help="updates of D for one of G (default: 1; 5 for wgan-gp and toy)")
    parser.add_argument("--ema", type=float, help="how slowly the average of G moves; 0: it is G")
    parser.add_argument("--steps", type=int, help="0: only evaluate and draw")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, help="G's rate; constant, for a game has no valley to come to rest in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().with_name("out"))
    parser.add_argument("--resume", action="store_true", help="go on from OUT/ckpt.npz, whichever backend wrote it")
    parser.add_argument("--device", help="cuda, mps or cpu; MLX: gpu or cpu (default: the best there is)")
    parser.set_defaults(**TASKS[parser.parse_known_args()[0].task])
    args = parser.parse_args()
    toy = args.task == "toy"
    args.d_steps = args.d_steps if args.d_steps is not None else 5 if toy or args.loss == "wgan-gp" else 1
    if min(args.steps, args.seed) < 0 or not 0 < args.lr < math.inf or not 0 < args.d_lr < math.inf:
        fail("--steps and --seed must be 0 or more, --lr and --d-lr more than 0")
    if min(args.batch_size, args.latent, args.d_steps, *(args.hidden or [1])) < 1:
        fail("--batch-size, --latent, --d-steps and --hidden must be 1 or more")
    if not (0 <= args.smoothing < 1 and 0 <= args.ema < 1 and 0 <= args.penalty < math.inf):
        fail("--smoothing and --ema must be from 0 to less than 1, --penalty 0 or more")
    least = 28 if args.data in ("digits", "mnist", "fashion") else 8
    if args.size < least or args.size % 2 or args.count < 100:
        fail(f"--size must be even and {least} or more, --count 100 or more")
    if toy and (args.model == "dcgan" or args.loss == "wgan-gp"):
        fail("--task toy compares D with p / (p + q): it goes with --model gan, and not with --loss wgan-gp")
    if toy and args.data != "digits":
        fail("--data goes with --task pictures: toy draws its own")
    args.log_every = max(1, args.steps // 20)

    ckpt, looks = args.out / "ckpt.npz", args.out / "looks"
    saved = read_meta(ckpt, "gan") if args.resume else None
    if saved and (saved["task"], saved["data"]) != (args.task, args.data):
        fail(f"{ckpt} was trained with --task {saved['task']} --data {saved['data']}: repeat them, or change --out")
    train, test = (None, None) if toy else load_data(args)
    image = [1, 1, 1] if toy else list(train.shape[1:])
    if not toy and args.batch_size > len(train):
        fail(f"--batch-size {args.batch_size} is more than the {len(train)} pictures: make it smaller")
    if not args.hidden:
        # down to 4 pixels of 32: where a convolution sees only strokes, G draws strokes, and no digits
        widths = [16, 32, 64, 128][: max(1, math.ceil(math.log2(image[0] / 7)))]
        args.hidden = widths if args.model == "dcgan" else [64, 64] if toy else [256, 256]
    net = load_twin(args)
    names = "latent hidden model loss smoothing penalty d_lr d_steps ema".split()
    config = net.Config(image, *(getattr(args, name) for name in names))
    if saved:
        config = net.Config(**saved["config"])
        if config.image != image:
            fail(f"{ckpt} was trained on pictures of another size: repeat --size")
    if config.model == "dcgan" and any(side % 2 ** len(config.hidden) for side in image[:2]):
        fail(f"--hidden of dcgan halves {image[0]} x {image[1]} pictures {len(config.hidden)} times: name fewer")
    trainer = net.Trainer(config, seed=args.seed, device=args.device)
    start = trainer.load(ckpt) if saved else 0
    params = sum(w.size for w in net.get_weights(trainer.model).values())
    data = "two normal distributions" if toy else f"{args.data}: {len(train):,} pictures, {len(test):,} held out"
    print(f"gan: {args.backend} on {args.device}, {params:,} parameters; {data}; files go to {args.out}", flush=True)
    looks.mkdir(exist_ok=True)
    for old in [] if saved else looks.glob("*.npy"):
        old.unlink()

    def pictures(z):
        return (in_parts(trainer.generate, z, 250) + 1) / 2

    latents = np.random.default_rng((args.seed, 2)).standard_normal((1000, config.latent), np.float32)
    held = None if toy else floats(test) * 2 - 1
    real, won = None if toy else features(held), []

    def look(step):
        array = look_at_game(trainer, args.seed) if toy else pixels(np.nan_to_num(pictures(latents[:12])))
        keep(looks / f"{step:08}.npy", array)

    n = 20 if toy else 6
    marks = {round(args.steps * (i / n) ** 2) for i in range(n)}  # more often at first

    def batch(step):
        if step in marks:
            look(step)
        rng, shape = np.random.default_rng((args.seed, step, 1)), (config.d_steps, args.batch_size)
        x = draw_p(rng, shape).reshape(*shape, 1, 1, 1) if toy else train[rng.integers(0, len(train), shape)]
        z = rng.standard_normal((shape[0] + 1, shape[1], config.latent), np.float32)
        return x if toy else floats(x) * 2 - 1, z, rng.random(shape, np.float32)

    def evaluate(n=500):
        if toy:
            return theory(*look_at_game(trainer, args.seed))
        figures = {name: float(v) for name, v in trainer.evaluate(held[:n], latents[:n]).items()}
        if config.loss != "wgan-gp" and figures["value"] > -0.2 and not won:
            won.append(True)
            print("the discriminator has won: D(x) and 1 - D(G(z)) are 0.9 and more; if G learns no more, lower --d-lr "
                  "or try --smoothing 0.1 or --loss wgan-gp")  # fmt: skip
        return figures | {"frechet": frechet(real, features(in_parts(trainer.generate, latents[:n], 250)))}

    speed = fit(trainer, batch, evaluate, lambda step: args.lr, args, start, task=args.task, data=args.data)
    look(args.steps)
    rows = {int(file.stem): np.load(file) for file in sorted(looks.glob("*.npy")) if int(file.stem) <= args.steps}
    if toy:
        draw_game(rows).save(args.out / "sample.png", optimize=True)
    else:
        angle = np.linspace(0, np.pi / 2, 12, dtype=np.float32)[:, None]  # on the arc each z is as likely as its ends
        walks = np.concatenate([np.cos(angle) * a + np.sin(angle) * b for a, b in latents[12:16].reshape(2, 2, -1)])
        parts = {f"the same twelve z, step {step}": floats(row) for step, row in rows.items()}
        parts |= {"other z": pictures(latents[20:44]), "walks between two z": pictures(walks)}
        draw_rows(parts | {"real pictures": floats(test[:12])}).save(args.out / "sample.png", optimize=True)
    result = {"backend": args.backend, "device": args.device, "params": params, "steps": args.steps}
    result |= {"seconds": round(time.perf_counter() - began, 2), "steps_per_s": round(speed, 1)}
    files = [str(args.out / name) for name in ("ckpt.npz", "sample.png") if (args.out / name).exists()]
    print("result " + json.dumps(result | evaluate(len(latents)) | {"files": files}))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head` has read enough; what is left to print has no reader
        os._exit(141)
