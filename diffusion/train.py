# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "mlx[cpu]==0.32.4", "numpy", "pillow"]
# ///
"""Train a diffusion model:  python train.py [--backend mlx] [--task toy] [--data mnist] [--sampler ddpm] ...

Tasks: pictures (of the class asked for); inpaint (the same net makes pictures with a hole whole); text (pictures of a
text, in the latents of an autoencoder); toy (points, whose score is known in closed form).
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
    "pictures": dict(steps=1100, batch_size=32, lr=0.01, widths=[32, 64], guidance=2.0, sample_steps=50),
    "inpaint": dict(steps=1100, batch_size=32, lr=0.01, widths=[32, 64], guidance=1.0, sample_steps=50),
    "text": dict(steps=2000, batch_size=32, lr=0.01, widths=[64, 128], guidance=2.0, sample_steps=30),
    "toy": dict(steps=2000, batch_size=256, lr=0.01, widths=[128, 128, 128], guidance=1.0, sample_steps=50),
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
    """Pictures (N, H, W, C) uint8 and classes to train on, then held-out ones; how many classes, 0 for none."""
    drawn = args.count, max(500, args.count // 10)
    if args.data in IDX:
        arrays = load_idx(args.data)
    elif args.data == "cifar10":
        arrays, _ = load_cifar10()
    elif args.data == "flowers":
        arrays = sum((make_flowers(n, args.size, args.seed + i) for i, n in enumerate(drawn)), ())
        arrays = [a - 4 if i % 2 else a for i, a in enumerate(arrays)]  # 4 ... 9 petals
    elif args.data == "digits":
        arrays = sum((make_digits(n, args.seed + i) for i, n in enumerate(drawn)), ())
    else:
        train, _, test, _ = read_folder(args.data, args.size)
        arrays = train, np.zeros(len(train), int), test, np.zeros(len(test), int)
    x, y, test, test_y = arrays
    if x.ndim == 3:
        edge = (args.size - 28) // 2
        x, test = (np.pad(a, ((0, 0), (edge, edge), (edge, edge)))[..., None] for a in (x, test))
    n_class = int(y.max()) + 1
    return x, np.int64(y), test, np.int64(test_y), n_class if n_class > 1 else 0


def floats(images):
    return images.astype(np.float32) / 255


def pixels(x):
    return (x * 255).round().clip(0, 255).astype(np.uint8)


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


def read_shape(image):
    """What a picture (size, size, 3) uint8 shows: (size, colour, place); the check on what was asked for."""
    image = image.astype(float)
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    away = np.linalg.norm(image - np.median(edge, 0), axis=-1)  # from the ground's colour
    inside = away > max(away.max() / 2, 25)
    rows, columns = (np.argwhere(inside) + 0.5).T / len(image)
    if len(rows) < 4:
        return None, None, None
    y, x = rows.mean() - 0.5, columns.mean() - 0.5
    radius = np.quantile(np.hypot(rows - rows.mean(), columns - columns.mean()), 0.97)
    hue = np.median(image[away > 0.8 * away.max()], 0)
    colour = min(COLOURS, key=lambda name: np.linalg.norm(COLOURS[name] - hue))
    if math.hypot(x, y) < 0.12:
        place = "in the middle"
    elif abs(x) > abs(y):
        place = "on the left" if x < 0 else "on the right"
    else:
        place = "at the top" if y < 0 else "at the bottom"
    return SIZES[int(radius > 0.185)], colour, place


def right(images, captions):
    """The shares of pictures whose size, colour and place are what the captions say, and of those with all three."""
    asked = [caption.split(" ", 3) for caption in captions]
    same = np.array([[a == b for a, b in zip(read_shape(x), (w[0], w[1], w[3]))] for x, w in zip(images, asked)])
    return dict(zip(("size", "colour", "place"), same.mean(0).tolist())) | {"accuracy": float(same.all(1).mean())}


# ---- points: a mixture of normal distributions, whose density and score are known however much noise is added --------

PARTS = np.array([(0.15, -1.1, 0.9, 0.12), (0.25, 0.9, 1.0, 0.2), (0.2, 0.1, -0.1, 0.1), (0.25, -0.8, -0.9, 0.25),
                  (0.15, 1.1, -0.8, 0.12)])  # share, mean x, mean y, deviation  # fmt: skip
AXIS = (np.arange(120) + 0.5) / 16 - 3.75  # the middles of squares in the plane


def draw_points(n, rng):
    _, x, y, std = PARTS[rng.choice(len(PARTS), n, p=PARTS[:, 0])].T
    return np.float32(np.stack([x, y], -1) + std[:, None] * rng.standard_normal((n, 2)))


def density(x, a):
    """p_t and its score at x (..., 2): of sqrt(a) x_0 + sqrt(1 - a) eps, which is a mixture too."""
    var = a * PARTS[:, 3] ** 2 + 1 - a
    away = math.sqrt(a) * PARTS[:, 1:3] - x[..., None, :]  # (..., parts, 2)
    p = PARTS[:, 0] * np.exp(-(away**2).sum(-1) / (2 * var)) / (2 * np.pi * var)
    return p.sum(-1), (p[..., None] * away / var[:, None]).sum(-2) / p.sum(-1)[..., None]


def on_grid(a):
    return density(np.stack(np.meshgrid(AXIS, AXIS, indexing="ij"), -1), a)[0]


def fokker_planck(p, time):
    """p on the grid, a `time` later, by small steps, as x moves by dx = -x/2 dtau + dW; where tau = -log a:

    dp/dtau = 1/2 (div(x p) + laplacian p). The drift draws to the middle, the noise spreads.
    """
    n = math.ceil(time / 0.0015)
    for _ in range(n):
        q, x = np.pad(p, 1), np.pad(AXIS, 1)
        u, v = x[:, None] * q, x * q
        drift = (u[2:, 1:-1] - u[:-2, 1:-1] + v[1:-1, 2:] - v[1:-1, :-2]) * 8  # the squares are 1/16 wide
        spread = (q[2:, 1:-1] + q[:-2, 1:-1] + q[1:-1, 2:] + q[1:-1, :-2] - 4 * p) * 256
        p = p + time / n / 2 * (drift + spread)
    return p


def histogram(points):
    """The density of points (N, 2) on the grid."""
    return np.histogram2d(*points.T, 120, [(-3.75, 3.75)] * 2)[0] / len(points) * 256


def variation(p, q, blocks=6):
    """The total variation between densities on the grid, in blocks of squares: 0 the same, 1 they never meet."""
    p, q = (a.reshape(120 // blocks, blocks, -1, blocks).sum((1, 3)) / 256 for a in (p, q))
    return float(np.abs(p - q).sum() / 2)


def look_at_points(trainer, args, n=3000, columns=5):
    """Figures; and {caption: pictures (columns + 1, 120, 120, 1)} of densities, with time from left to right."""
    a, T, rng = trainer.model.a, trainer.config.T, np.random.default_rng((args.seed, 3))
    levels = np.linspace(0, T, columns + 1).round().astype(int)
    true = [on_grid(a[t]) for t in levels]
    flow, points = [true[0]], draw_points(n, rng)
    chain = [histogram(points)]
    for s, t in zip(levels, levels[1:]):
        flow.append(fokker_planck(flow[-1], math.log(a[s] / a[t])))
        for ratio in a[s + 1 : t + 1] / a[s:t]:  # 1 - beta
            points = math.sqrt(ratio) * points + math.sqrt(1 - ratio) * rng.standard_normal((n, 2))
        chain.append(histogram(points))
    rows = {"the density, in closed form": true, "by the equation of Fokker and Planck": flow, "points, noised": chain}
    figures = {"fokker_planck": max(variation(p, q, 1) for p, q in zip(true, flow))}
    figures |= {"sample": variation(histogram(draw_points(n, rng)), true[0])}  # n true points: no sampler gets closer
    y = np.zeros(n, int)
    for name, sampler in (("SDE", "ddpm"), ("ODE", "heun"), ("Langevin", "langevin")):
        path = trainer.sample(y, rng, sampler, args.sample_steps, keep=columns)[:, :, 0, 0]
        start = rng.standard_normal((1, n, 2))
        rows[f"from noise, right to left: {name}"] = [histogram(x) for x in np.concatenate([start, path])[::-1]]
        figures[name] = variation(rows[f"from noise, right to left: {name}"][0], true[0])
    return figures | score_error(trainer, args), {name: np.stack(row)[..., None] for name, row in rows.items()}


def score_error(trainer, args, n=1000):
    """{"score_error"}: how far the learned score is from the true one, as a share of it, over ten levels of noise."""
    a, rng, errors = trainer.model.a, np.random.default_rng((args.seed, 4)), []
    for t in np.linspace(0, trainer.config.T, 11).astype(int)[1:]:
        x = math.sqrt(a[t]) * draw_points(n, rng) + math.sqrt(1 - a[t]) * rng.standard_normal((n, 2))
        eps = trainer.denoise(np.float32(x[:, None, None]), np.zeros(n, int), t)[1][:, 0, 0]
        true = density(x, a[t])[1]
        errors.append(np.square(-eps / math.sqrt(1 - a[t]) - true).sum() / np.square(true).sum())
    return {"score_error": float(np.sqrt(np.mean(errors)))}


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


def draw_captioned(x, captions, columns=4, side=188):
    """Each picture (N, H, W, C) with its own caption below."""
    image = Image.new("RGB", (columns * side + 6, -(-len(x) // columns) * side + 6), (PAPER,) * 3)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for i, (picture, caption) in enumerate(zip(pixels(x), captions)):
        left, top = i % columns * side + 6, i // columns * side + 6
        image.paste(Image.fromarray(picture).resize((side - 24, side - 24)), (left + 9, top))
        draw.text((left + side / 2 - 3, top + side - 14), caption, (60, 60, 60), font, anchor="mm")
    return image


# ---- the run ---------------------------------------------------------------------------------------------------------


def holes(n, size, seed):
    """Masks (n, size, size, 1): 1 where the picture is known; a square of half its height is missing somewhere."""
    masks, rng = np.ones((n, size, size, 1), np.float32), np.random.default_rng((seed, 6))
    for mask, (i, j) in zip(masks, rng.integers(size // 8, size - size // 2 - size // 8 + 1, (n, 2))):
        mask[i : i + size // 2, j : j + size // 2] = 0
    return masks


def main():
    began = time.perf_counter()
    apple = (sys.platform, platform.machine()) == ("darwin", "arm64")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--backend", choices=["torch", "mlx"], default="mlx" if apple else "torch")
    parser.add_argument("--task", choices=TASKS, default="pictures")
    parser.add_argument("--data", default="digits", help="digits, flowers, mnist, fashion, cifar10 or a folder")
    parser.add_argument("--count", type=int, default=10000, help="digits, flowers or shapes to draw")
    parser.add_argument("--size", type=int, help="height and width: 28 or more of digits, mnist and fashion")
    parser.add_argument("--widths", type=int, nargs="+", help="channels of each level of the U-Net")
    parser.add_argument("--fold", type=int, help="squares of this side become channels")
    parser.add_argument("--predict", choices=["v", "noise"], default="v")
    parser.add_argument("--schedule", choices=["cosine", "linear"], default="cosine", help="how the noise grows with t")
    parser.add_argument("--ema", type=float, default=0.99, help="how slowly the average of the weights moves")
    parser.add_argument("--sampler", choices=["ddim", "ddpm", "heun", "langevin"], default="ddim", help="of pictures")
    parser.add_argument("--sample-steps", type=int, help="from noise to a picture")
    parser.add_argument("--guidance", type=float, help="1: none; more: more as the class or the text says")
    parser.add_argument("--prompt", help="for --task text: what to draw, big blue star on the right")
    parser.add_argument("--steps", type=int, help="0: only evaluate and draw")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, help="highest rate, after 50 steps; falls to 0 in the second half")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().with_name("out"))
    parser.add_argument("--resume", action="store_true", help="go on from OUT/ckpt.npz, whichever backend wrote it")
    parser.add_argument("--device", help="cuda, mps or cpu; MLX: gpu or cpu (default: the best there is)")
    parser.set_defaults(**TASKS[parser.parse_known_args()[0].task])
    args = parser.parse_args()
    toy, text = args.task == "toy", args.task == "text"
    if min(args.steps, args.seed) < 0 or not (0 < args.lr < math.inf and 0 <= args.ema < 1 and 0 <= args.guidance < 99):
        fail("--steps and --seed must be 0 or more, --lr more than 0, --ema from 0 to less than 1, --guidance to 99")
    if min(args.batch_size, *args.widths, args.fold or 1) < 1 or args.widths[0] % 2 or args.count < 100:
        fail("--batch-size, --widths and --fold must be 1 or more, the first of --widths even, --count 100 or more")
    if not 2 <= args.sample_steps <= 1000:
        fail("--sample-steps must be from 2 to 1000")
    least = 28 if args.data in ("digits", "mnist", "fashion") and not text else 8
    args.size = args.size if args.size is not None else 28 if least == 28 else 32
    args.fold = args.fold or (1 if text or toy else 2)
    unit = args.fold * 2 ** (len(args.widths) - 1) * (4 if text else 1)
    if not toy and (args.size < least or args.size % unit):
        fail(f"--size must be {least} or more and a multiple of {unit}, for --fold and --widths halve it")
    if args.data == "cifar10" and args.size != 32:
        fail("--size of cifar10 is 32: leave it out")
    if (toy or text) and args.data != "digits":
        fail(f"--data goes with --task pictures and inpaint: {args.task} draws its own")
    words = ["", *sorted(set(" ".join(CAPTIONS).split()))]
    asked = (args.prompt or "").split()
    if args.prompt is not None and (not text or not set(asked) <= set(words) or len(asked) > 6):
        fail(f"--prompt goes with --task text and must be up to six of these words:{' '.join(words)}")
    args.log_every = max(1, args.steps // 20)

    ckpt = args.out / "ckpt.npz"
    saved = read_meta(ckpt, "diffusion") if args.resume else None
    kind = {name: getattr(args, name) for name in ("fold", "widths", "predict", "schedule", "ema")}
    if toy:
        kind |= dict(image=[1, 1, 2], net="mlp", n_class=0)
        about = f"{len(PARTS)} normal distributions"
    elif text:
        held = set(np.random.default_rng(5).permutation(len(CAPTIONS))[:64].tolist())
        known, new = ([i for i in range(len(CAPTIONS)) if (i in held) == out] for out in (False, True))
        kind |= dict(image=[args.size, args.size, 3], n_class=0, vocab_size=len(words), length=6)
        kind |= dict(latent=4, first=args.steps // 5)
        rng = np.random.default_rng((args.seed, 1))
        ids, test_y = rng.choice(known, args.count), np.array(new * 8)
        train, test = (np.stack([draw_shape(CAPTIONS[i], rng, args.size) for i in part]) for part in (ids, test_y))
        about = f"{len(known)} combinations of words, {len(new)} held out"
    else:
        train, labels, test, test_y, n_class = load_data(args)
        kind |= dict(image=list(train.shape[1:]), n_class=n_class)
        about = f"{args.data}: {len(train):,} pictures, {len(test):,} held out"
        if args.batch_size > len(train):
            fail(f"--batch-size {args.batch_size} is more than the {len(train)} pictures: make it smaller")
    net = load_twin(args)
    config = net.Config(**kind)
    if saved:
        config = net.Config(**saved["config"])
        same = [config.image, config.n_class, config.vocab_size] == [kind["image"], kind["n_class"], len(words) * text]
        if not same or saved["data"] != args.data:
            fail(f"{ckpt} was trained on other pictures or for another task: repeat --task, --data and --size")
    trainer = net.Trainer(config, seed=args.seed, device=args.device)
    start = trainer.load(ckpt) if saved else 0
    params = sum(w.size for w in net.get_weights(trainer.model).values())
    print(f"diffusion: {args.backend} on {args.device}, {params:,} parameters; {about}; "
          f"files go to {args.out}", flush=True)

    def encode(captions):
        rows = [[words.index(word) for word in caption.split()][: config.length] for caption in captions]
        return np.array([row + [0] * (config.length - len(row)) for row in rows])

    def arrays(x, y, rng):
        """What a step takes, for x pictures uint8 or points; a tenth of y is not told, so that guidance has both."""
        t, (H, W, C), n = rng.integers(1, config.T + 1, len(x)), config.image, config.latent
        noise = rng.standard_normal((len(x), H // 4, W // 4, n) if n else (len(x), H, W, C), np.float32)
        none = np.full_like(y, 0 if text else config.n_class)
        told = rng.random((len(y), *[1] * (y.ndim - 1))) > 0.1
        return x if toy else floats(x) * 2 - 1, np.where(told, y, none), t, noise

    def batch(step):
        rng = np.random.default_rng((args.seed, step, 2))
        if toy:
            x, y = draw_points(args.batch_size, rng)[:, None, None], np.zeros(args.batch_size, int)
        else:
            i = rng.integers(0, len(train), args.batch_size)
            x, y = train[i], encode(CAPTIONS[j] for j in ids[i]) if text else labels[i]
        return arrays(x, y, rng)

    if toy:
        rng = np.random.default_rng((args.seed, 7))
        look = arrays(draw_points(2000, rng)[:, None, None], np.zeros(2000, int), rng)
    else:
        y = encode(CAPTIONS[i] for i in test_y[:200]) if text else test_y[:200]
        look = arrays(test[:200], y, np.random.default_rng((args.seed, 7)))

    def evaluate():
        return {name: float(v) for name, v in trainer.evaluate(*look).items()}

    def lr(step):
        return args.lr * min(1, (step + 1) / 50, 2 * (1 - step / args.steps))

    speed = fit(trainer, batch, evaluate, lr, args, start, data=args.data)
    figures, rng = evaluate(), np.random.default_rng((args.seed, 8))
    guidance = args.guidance if config.n_class or config.vocab_size else 1.0

    def draw(y, **more):
        """Pictures on the way from noise, (keep, N, H, W, C), those of pixels from about 0 to 1."""
        return trainer.sample(y, rng, **dict(sampler=args.sampler, steps=args.sample_steps) | more) / 2 + 0.5

    if toy:
        more, parts = look_at_points(trainer, args)
        figures |= more
        parts = {name: 1 - (x / x.max((1, 2), keepdims=True)) ** 0.5 for name, x in parts.items()}
        picture = draw_rows(parts, 6)
    elif text:
        drawn = [CAPTIONS[i] for i in new] * 2
        x = draw(encode(drawn), guidance=guidance)[-1]
        figures |= right(pixels(x), drawn)
        x, shown = x[::8], drawn[::8]
        if args.prompt:
            x, shown = draw(encode([args.prompt] * 8), guidance=guidance)[-1], [args.prompt] * 8
        picture = draw_captioned(x, shown)
    elif args.task == "inpaint":
        whole = floats(test[:24])
        mask = holes(len(whole), whole.shape[1], args.seed)
        x = draw(test_y[:24], sampler="repaint", guidance=guidance, known=whole * 2 - 1, mask=mask)[-1]
        figures |= {"changed": float((np.abs(x - whole) * mask).max())}  # of what is known
        parts = {"with a hole": whole * mask + 0.5 * (1 - mask), "made whole": x, "as they were": whole}
        picture = draw_rows(parts)
    else:
        n = max(config.n_class, 1)
        columns = n if n > 6 else 12
        y = np.arange(columns * 4) % n
        way = draw(y[:columns], guidance=guidance, keep=4)
        done = [round((i + 1) * args.sample_steps / len(way)) for i in range(len(way))]
        parts = {f"after {n} of {args.sample_steps} steps": x for n, x in zip(done, way)}
        name = f"class by class, guidance {guidance:g}" if config.n_class else "others"
        parts[name] = draw(y, guidance=guidance)[-1]
        if guidance != 1:
            parts["without guidance"] = draw(y[:columns])[-1]
        parts["real pictures"] = floats(test[:columns])
        figures["bits"] = trainer.bound(floats(test[:50]) * 2 - 1, test_y[:50], rng)
        picture = draw_rows(parts, columns)
    picture.save(args.out / "sample.png", optimize=True)
    result = {"backend": args.backend, "device": args.device, "params": params, "steps": args.steps}
    result |= {"seconds": round(time.perf_counter() - began, 2), "steps_per_s": round(speed, 1)}
    files = [str(args.out / name) for name in ("ckpt.npz", "sample.png") if (args.out / name).exists()]
    print("result " + json.dumps(result | figures | {"files": files}))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head` has read enough; what is left to print has no reader
        os._exit(141)
