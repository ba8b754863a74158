"""The tasks: images by class, images for a text, points whose score is known.

One class per task, all in numpy. To add a task, write one more class and add it to TASKS at the end.
"""

import argparse
import atexit
import functools
import gzip
import hashlib
import json
import math
import os
import sys
import tarfile
import zlib
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

# ---- what every folder has, the same to the letter -------------------------------------------------------------------


def fail(message):
    """End the run on bad input: one line that says what is wrong and how to fix it, exit code 2."""
    print("train.py:", " ".join(str(message).split())[:1000], file=sys.stderr)
    raise SystemExit(2)


def within(span, kind=float):
    """A type for add_argument: a number in the interval `span`, such as "[0, 1)", which --help shows."""
    low, high = map(float, span[1:-1].split(","))

    def number(text):
        x = kind(text)
        if low < x < high or (x == low and span[0] == "[") or (x == high and span[-1] == "]"):
            return x
        raise ValueError

    number.__name__ = f"{kind.__name__} in {span}"
    return number


class Help(argparse.RawDescriptionHelpFormatter):
    """--help with the docstring as it stands, the range of each number, and the defaults."""

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, "__name__", "text")

    def _get_help_string(self, action):
        silent = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        return action.help if silent else f"{action.help} (default: %(default)s)"


def read_meta(path, model):
    """The metadata that Trainer.save wrote: config, step and more. Reads the whole file, so damage is found here."""
    try:
        with np.load(path, allow_pickle=False) as f:
            if f.zip.testzip() or any(part.compress_type for part in f.zip.infolist()):
                raise ValueError("a part is damaged or compressed")
            meta = json.loads(str(f["meta"]))
        most = max(1 << 20, path.stat().st_size)  # no dimension of a model exceeds its file's size in bytes
        for name, value in meta["config"].items():
            if isinstance(value, (int, float)) and not 0 <= value <= (most if isinstance(value, int) else 1e9):
                raise ValueError(f"its {name} is {value}")
        if not (isinstance(meta["step"], int) and meta["step"] >= 0):
            raise ValueError(f"its step is {meta['step']}")
        if meta["model"] == model:
            return meta
        reason = f"it holds a model of {meta['model']}/, not of {model}/"
    except FileNotFoundError:
        fail(f"no checkpoint at {path}: train without --resume first, or say where it is with --out")
    except Exception as error:
        reason = f"damaged: {error!r}"
    fail(f"{path} is not a usable checkpoint ({reason}): start over without --resume, or choose another --out")


def parse(parser, model, fixed, kept, defaults):
    """The arguments and, with --resume, the checkpoint's metadata, else None.

    A flag that is not given takes its value from the checkpoint, else from defaults(). Checkpoints save the flags of
    both lists; a resumed run may not change those in `fixed`, but may change those in `kept`.
    """
    given = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([]))))  # None: not given
    parser.error, parser.formatter_class, saved, known = fail, Help, None, {}
    parser.parse_known_args(namespace=given)
    out = given.out or Path(__file__).resolve().with_name("out") / (given.task or parser.get_default("task"))
    if given.resume:
        saved = read_meta(out / "ckpt.npz", model)
        known = {**saved, **saved["config"], **saved.get("args", {})}
        known = {flag.dest: known[flag.dest] for flag in fixed + kept if flag.dest in known}
    for flag in fixed:
        asked, there = getattr(given, flag.dest), known.get(flag.dest)
        if None not in (asked, there) and asked != there and flag.dest != "data":  # data is compared by content
            fail(f"{flag.option_strings[0]} {asked} contradicts {out / 'ckpt.npz'}, which has {there}: leave it out")
    known |= {"data": given.data} if given.data else {}
    parser.set_defaults(out=out, **known)
    parser.set_defaults(**{**defaults(parser.parse_known_args()[0]), **known})
    parser.add_argument("-h", "--help", action="help", help="show this help and exit")
    args = parser.parse_args()
    args.memory = {flag.dest: getattr(args, flag.dest) for flag in fixed + kept}
    if saved:
        saved["config"] |= {flag.dest: args.memory[flag.dest] for flag in kept if flag.dest in saved["config"]}
    return args, saved


def claim(args):
    """Lock the folder args.out until the run ends; returns a note for the run's first line."""
    if args.rank:
        return ""
    args.out.mkdir(parents=True, exist_ok=True)
    lock, ckpt = args.out / "lock", args.out / "ckpt.npz"
    try:
        if (pid := int(lock.read_text())) != os.getpid():
            os.kill(pid, 0)  # sends no signal, only checks that the process exists
            fail(f"{args.out} is in use by process {pid}: wait until it ends, or choose another --out")
    except (FileNotFoundError, ProcessLookupError):
        pass  # none, or left by a killed run
    except (OverflowError, ValueError):
        fail(f"{lock} is not a lock file of this program: move it away, or choose another --out")
    lock.unlink(missing_ok=True)
    with open(lock, "x") as f:
        f.write(str(os.getpid()))
    atexit.register(lock.unlink, missing_ok=True)
    if args.resume or not args.steps:
        return "" if args.resume or getattr(args, "init", None) else "; nothing is trained: the weights are random"
    return "; the checkpoint there becomes ckpt.old.npz" if ckpt.exists() else ""


def record(out, row, first):
    """Append {figure: number} to OUT/log.jsonl, or start a new log, and plot the log in OUT/curve.png."""
    log, names = out / "log.jsonl", [name for name in row if "step" not in name]
    rows = [] if first or not log.exists() else list(map(json.loads, log.read_text().splitlines()))
    rows = [old for old in rows if old["step"] < row["step"]] + [row]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    image = Image.new("RGB", (1280, 280 * len(names)), (250, 250, 247))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(26)
    draw.text((1260, 14), f"step {row['step']}", (60, 60, 60), font, anchor="ra")
    for i, name in enumerate(names):
        x, y = np.array([(old["step"], old[name]) for old in rows if name in old]).T
        height = (y - y.min()) / (np.ptp(y) or 1)
        draw.text((20, 280 * i + 14), f"{name} {y[0]:.4g} to {y[-1]:.4g}, lowest {y.min():.4g}", (60, 60, 60), font)
        draw.line(list(zip(20 + 1240 * x / row["step"], 280 * i + 260 - 190 * height)), (31, 119, 180), 5)
    image.reduce(2).save(out / "curve.png")


def digest(*arrays):
    """A hash of the training data, so that a checkpoint recognises it whatever the file is called."""
    parts = (a[:: 1 + len(a) // 1_000_000] for a in map(np.ravel, arrays))
    return hashlib.md5(b"".join(part.tobytes() for part in parts)).hexdigest()


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
                    print(f"\r{url}  {f.tell() / 1e6:.1f} of {size / 1e6:.1f} MB", end="\n"[f.tell() < size :],
                          file=sys.stderr)  # fmt: skip
            if hashlib.md5(part.read_bytes()).hexdigest() != md5:
                raise OSError("the file is not the expected one (MD5 differs)")
            return part.replace(path)
        except (OSError, HTTPException) as error:
            part.unlink(missing_ok=True)
            reason = error
    fail(f"{file} could not be downloaded ({reason}): put it at {path}, or set DATA_DIR to the folder that has it")


class Task:
    """What train.py needs from a task. To add your own, write a class like those below and add it to TASKS.

    A task also needs batch(step), the arrays for Trainer.step, from a generator seeded with (seed, step, ...), and
    evaluate(trainer, whole=False), {figure: number} on the held-out data, or on part of it for a log line.
    """

    config, extra, about = {}, {}, ""  # fields of the model's Config; what checkpoints save; one line about the data
    tokens = 0  # per step, where tokens are counted

    def trainer(self, net, config):
        """The Trainer for this task."""
        return net.Trainer(config, seed=self.args.seed, device=self.args.device)

    def report(self, trainer):
        """At the end: more figures, and the names of the files written to args.out."""
        return {}, []


# ---- data ------------------------------------------------------------------------------------------------------------

IDX = {  # two URLs for each dataset, and the MD5 sums of its four files
    "mnist": (
        "http://yann.lecun.com/exdb/mnist https://ossci-datasets.s3.amazonaws.com/mnist",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873 d53e105ee54ea40749a09fcbcd1e9432 "
        "9fb629c4189551a2d022fa330f9573f3 ec29112dd5afa0611ce80d1b7f02629c",
    ),
}


def load_idx(name):
    """A dataset of IDX: images (N, 28, 28) uint8 and labels (N,) of the training set, then of the test set."""
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
    """Synthetic digits: images (n, 28, 28) uint8, labels (n,); stroke, size, rotation, shear and shift are random."""
    rng = np.random.default_rng((seed, 28))
    font, glyphs = ImageFont.load_default(60), {}
    for digit in range(10):
        for stroke in range(4):
            glyphs[digit, stroke] = image = Image.new("L", (84, 84))
            ImageDraw.Draw(image).text((42, 42), str(digit), 255, font, anchor="mm", stroke_width=stroke)
    labels, strokes = rng.integers(0, 10, n), rng.integers(0, 4, n)
    turn, shear, size = rng.normal(0, 0.15, n), rng.normal(0, 0.15, n), rng.uniform(0.8, 1.25, n)
    # the corners (x, y) of the part of the glyph that becomes the image: nw, sw, se, ne
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
    """Synthetic flowers: images (n, size, size, 3) uint8, petals (n,) 3 ... 6, one upwards; the rest is random."""
    rng = np.random.default_rng((seed, 32))
    tints = np.array([(245, 240, 235), (250, 200, 40), (235, 70, 60), (245, 130, 175), (150, 90, 210), (70, 110, 230)])
    petals, tint = rng.integers(3, 7, n), tints[rng.integers(0, 6, n)] + rng.normal(0, 12, (n, 3))
    radius, inner, turn = rng.uniform(0.7, 0.95, n), rng.uniform(0.4, 0.75, n), rng.normal(np.pi / 2, 0.1, n)
    shape, place, light = rng.uniform(0.4, 1.1, n), rng.normal(0, 0.05, (n, 2)), rng.uniform(0.7, 1.15, n)
    axis, images = (np.arange(size) * 2 + 1) / size - 1, np.empty((n, size, size, 3), np.uint8)
    grass = np.array([46, 98, 52]) * (1 - 0.35 * axis[:, None, None]) * np.ones((size, 1))  # lighter at the top
    for i in range(n):
        x, y = axis - place[i, 0], axis[:, None] - place[i, 1]
        r, angle, image = np.hypot(x, y), np.arctan2(y, x) + turn[i], light[i] * grass
        layers = []  # of each: the colour, the brightness and the radius of its edge
        for scale, shift, shade in ((1, 0, 0.85), (inner[i], np.pi, 1.05)):  # a ring of petals, a smaller one in front
            bump = np.abs(np.cos((petals[i] * angle + shift) / 2)) ** shape[i]  # 1 along a petal, 0 between two
            edge = scale * radius[i] * (0.35 + 0.65 * bump)
            layers.append((tint[i], shade * (0.55 + 0.45 * bump * np.minimum(r / edge, 1)), edge))
        layers.append((np.array([225, 165, 40]), 1.15 - 2.7 * r / radius[i], 0.22 * radius[i]))  # the centre
        for colour, brightness, edge in layers:
            cover = ((edge - r) * size / 2 + 0.5).clip(0, 1)[:, :, None]  # edges are soft, a pixel wide
            image += (brightness[:, :, None] * colour - image) * cover
        images[i] = image.clip(0, 255)
    return images, petals


def count_petals(image):
    """How many petals a flower (size, size, 3) uint8 shows: the number of bulges in its outline around its centre."""
    red, green, blue = np.moveaxis(np.float32(image) + 1, -1, 0)
    flower = (3 * np.maximum(red, blue) / green - 1.6).clip(0, 1)  # grass is green, petals are not
    y, x = (axis - (axis * flower).sum() / max(flower.sum(), 1) for axis in np.indices(flower.shape))
    far = (flower * np.hypot(y, x)).ravel()  # pixels further out count for more
    k, turn = np.arange(3, 14), np.arange(360) * np.pi / 180
    waves = np.exp(1j * np.outer(k, np.arctan2(y, x))) @ far  # 3 to 13 waves around the outline
    out = (np.exp(-1j * np.outer(turn, k)) @ waves).real > 0.05 * far.sum()  # a disc has no bulges
    return int((out & ~np.roll(out, 1)).sum())


def load_cifar10():
    """Images (N, 32, 32, 3) uint8 and labels (N,) of the training set, then of the test set; the class names."""
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
    """Open an image file as RGB, upright, on white where it is transparent; ends the run if it can't be read."""
    Image.MAX_IMAGE_PIXELS = 25_000_000  # above twice as many, which would take 1 GB, Pillow raises an error
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":  # grey of more than 8 bits: convert would clip it
            grey = np.nan_to_num(np.asarray(image, np.float32))
            tops = (1, 255, 65535) if image.mode == "F" else (65535,)
            white = next((top for top in tops if top >= grey.max()), grey.max())
            image = Image.fromarray(np.uint8((grey / white).clip(0, 1) * 255 + 0.5))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow raises errors of many kinds for broken files
        fail(f"{path} can't be read as an image ({error}): remove it, or name a PNG or JPEG file")


def read_folder(folder, size):
    """The images of a folder, cropped to squares of `size`, and their numbers as labels; then every tenth, held out."""
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in Image.registered_extensions())
    if len(files) < 2:
        fail(f"--data {folder} is neither one of the datasets in --help nor a folder of 2 or more images")
    images = np.stack([np.asarray(ImageOps.fit(open_image(file), (size, size))) for file in files])
    number, every = np.arange(len(files)), min(10, len(files))
    held = number % every == every - 1
    return images[~held], number[~held], images[held], number[held]


def floats(images):
    return images.astype(np.float32) / 255


def pixels(x):
    return (x * 255).round().clip(0, 255).astype(np.uint8)


def in_parts(function, x, n=1000):
    """function(x) for n rows of x at a time, to save memory."""
    return np.concatenate([function(x[i : i + n]) for i in range(0, len(x), n)])


SIZES, PLACES = ("small", "big"), ("on the left", "on the right", "at the top", "at the bottom", "in the middle")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = dict(red=(220, 50, 47), green=(60, 160, 60), blue=(50, 90, 220), yellow=(240, 200, 40), purple=(150, 70, 180),
               orange=(240, 140, 40), white=(240, 240, 240), black=(30, 30, 30))  # fmt: skip
CAPTIONS = [f"{a} {b} {c} {d}" for a in SIZES for b in COLOURS for c in SHAPES for d in PLACES]  # 480


def draw_shape(caption, rng, size=32):
    """An image of the caption, (size, size, 3) uint8: exact place, size, rotation, hue and background are random."""
    big, colour, shape, place = caption.split(" ", 3)
    r = rng.uniform(0.15, 0.18) if big == "small" else rng.uniform(0.24, 0.27)
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


def cover(image):
    """How far each pixel of (size, size, 3) uint8 is from the background colour, numbers from 0 to 255 sqrt(3)."""
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    return np.linalg.norm(image - np.median(edge, 0), axis=-1)


def outline(away):
    """What a shape looks like wherever it is: its Fourier magnitudes, a unit vector."""
    away = (away / max(np.quantile(away, 0.98), 1)).clip(0.2, 1)  # the background has some noise
    waves = np.abs(np.fft.rfft2(away - 0.2)).ravel()
    return waves / max(np.linalg.norm(waves), 1e-9)


@functools.cache
def outlines(size):
    """Examples of all shapes (960, n), to compare with."""
    rng = np.random.default_rng(0)
    return np.stack([outline(cover(draw_shape(caption, rng, size))) for caption in CAPTIONS * 2])


def read_shape(image):
    """What an image (size, size, 3) uint8 shows: (size, colour, shape, place), to compare with its caption."""
    away = cover(image)
    inside = away > max(away.max() / 2, 25)
    rows, columns = (np.argwhere(inside) + 0.5).T / len(image)
    if len(rows) < 4:
        return None, None, None, None
    y, x = rows.mean() - 0.5, columns.mean() - 0.5
    hue = np.median(image[away > 0.8 * away.max()], 0)
    colour = min(COLOURS, key=lambda name: np.linalg.norm(COLOURS[name] - hue))
    nearest = (outlines(len(image)) @ outline(away)).argmax()
    big, _, shape, _ = CAPTIONS[nearest % len(CAPTIONS)].split(" ", 3)
    if math.hypot(x, y) < 0.12:
        place = "in the middle"
    elif abs(x) > abs(y):
        place = "on the left" if x < 0 else "on the right"
    else:
        place = "at the top" if y < 0 else "at the bottom"
    return big, colour, shape, place


def right(images, captions):
    """The shares of images with the size, the colour, the shape and the place of their captions, and with all four."""
    same = np.array([np.equal(read_shape(x), caption.split(" ", 3)) for x, caption in zip(images, captions)])
    figures = dict(zip(("size", "colour", "shape", "place"), same.mean(0).tolist()))
    return figures | {"accuracy": float(same.all(1).mean())}


# ---- how good the generated images are -------------------------------------------------------------------------------


class Judge:
    """Classifies images (N, H, W, C) uint8: fixed filters cut out of training images, then two trained layers.

    Trained on at most 10,000 images x of the classes y, with a fixed seed, so that it is the same in all runs. If there
    is only one class, nothing is trained, and its features are random sums of the filters' responses.
    """

    def __init__(self, x, y, n=800):
        rng, x, target, self.filters = np.random.default_rng(0), x[:10000], np.eye(int(y.max()) + 1)[y[:10000]], None
        some = self.look(x[:1000]).reshape(-1, 25 * x.shape[3])
        some = some[some.std(1) >= some.std(1).mean()]
        some = some[rng.integers(0, len(some), 32)].T
        some = some - some.mean(0)  # so that flat areas give 0
        self.filters, self.mean, self.std = some / (np.linalg.norm(some, axis=0) + 1e-6), 0.0, 1.0
        h = self.look(x)
        self.mean, self.std = h.mean(0), h.std(0) + 1e-3 * h.std() + np.float32(1e-6)
        h = (h - self.mean) / self.std
        first = rng.standard_normal((h.shape[1], 64), np.float32) / np.float32(h.shape[1] ** 0.5)
        self.w = [first, *(np.zeros(size, np.float32) for size in (64, (64, target.shape[1]), target.shape[1]))]
        m, v = ([0 * w for w in self.w] for _ in range(2))
        for step in range(1, n + 1):  # Adam on the cross-entropy, with half of the inputs dropped
            i = rng.integers(0, len(h), 100)
            x = 2 * h[i] * (rng.random((100, h.shape[1]), np.float32) > 0.5)
            p, z = self.classify(x)
            d = np.float32(p - target[i]) / 100
            dz = d @ self.w[2].T * (z > 0)
            for j, g in enumerate((x.T @ dz, dz.sum(0), z.T @ d, d.sum(0))):
                m[j], v[j] = 0.9 * m[j] + 0.1 * g, 0.99 * v[j] + 0.01 * g * g
                lr = 2e-3 * (1 - step / n) * math.sqrt(1 - 0.99**step) / (1 - 0.9**step)
                self.w[j] -= np.float32(lr) * m[j] / (np.sqrt(v[j]) + np.float32(1e-8))

    def look(self, x):
        """The largest response of each filter in each square of 4x4; before there are filters, all 5x5 windows."""
        (_, H, W, C), k = x.shape, -(-x.shape[1] // 32)  # large images are scaled down
        x = x[:, : H // k * k, : W // k * k].reshape(-1, H // k, k, W // k, k, C).mean((2, 4), np.float32) / 255
        h, w = (x.shape[1] - 4) // 4, (x.shape[2] - 4) // 4
        windows = np.lib.stride_tricks.sliding_window_view(x[:, : 4 * h + 4, : 4 * w + 4], (5, 5), (1, 2))
        if self.filters is None:
            return windows
        seen = in_parts(lambda part: np.abs(part.reshape(-1, len(self.filters)) @ self.filters).reshape(
            -1, h, 4, w, 4, 32).max((2, 4)), windows, 250)  # fmt: skip
        return (seen.reshape(len(x), -1) - self.mean) / self.std

    def classify(self, h):
        """Probabilities (N, classes) and features (N, 64) from the output of look()."""
        z = np.maximum(h @ self.w[0] + self.w[1], 0)
        s = z @ self.w[2] + self.w[3]
        e = np.exp(s - s.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True), z

    def __call__(self, x):
        return self.classify(self.look(x))


def frechet(a, b):
    """The squared Fréchet distance between the normal distributions that fit the rows of a and b (N, n).

    |mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances (Dowson and Landau 1982).
    """
    A, B = np.cov(a, rowvar=False, bias=True), np.cov(b, rowvar=False, bias=True)
    values, vectors = np.linalg.eigh(A)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T  # A B has the eigenvalues of root B root, which is symmetric
    both = np.sqrt(np.linalg.eigvalsh(root @ B @ root).clip(0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(A) + np.trace(B) - 2 * both)


# ---- points: a mixture of normal distributions, whose density and score are known at any noise level -----------------

PARTS = np.array([(0.15, -1.1, 0.9, 0.12), (0.25, 0.9, 1.0, 0.2), (0.2, 0.1, -0.1, 0.1), (0.25, -0.8, -0.9, 0.25),
                  (0.15, 1.1, -0.8, 0.12)])  # share, mean x, mean y, deviation  # fmt: skip
AXIS = (np.arange(120) + 0.5) / 16 - 3.75  # the midpoints of squares in the plane


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
    """p on the grid after `time`, in small steps, when x moves by dx = -x/2 dtau + dW, where tau = -log a:

    dp/dtau = 1/2 (div(x p) + laplacian p). The drift pulls to the centre, the noise spreads.
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
    """The total variation distance of densities on the grid, over blocks of squares: 0 equal, 1 no overlap."""
    p, q = (a.reshape(120 // blocks, blocks, -1, blocks).sum((1, 3)) / 256 for a in (p, q))
    return float(np.abs(p - q).sum() / 2)


# ---- plots -----------------------------------------------------------------------------------------------------------

PAPER = 250


def tile(x, columns, gap=0):
    """Images (N, H, W, C), `columns` in a row, as one sheet (rows (H + gap), columns (W + gap), C) uint8."""
    N, H, W, C = x.shape
    sheet = np.full((-(-N // columns), columns, H + gap, W + gap, C), PAPER if gap else 0, np.uint8)
    sheet.reshape(-1, H + gap, W + gap, C)[:N, :H, :W] = pixels(x)
    return sheet.swapaxes(1, 2).reshape(-1, columns * (W + gap), C)


def draw_rows(parts, columns=12):
    """Rows of images under captions: {caption: images (N, H, W, C)}."""
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
    """Each image (N, H, W, C) with its own caption below."""
    image = Image.new("RGB", (columns * side + 6, -(-len(x) // columns) * side + 6), (PAPER,) * 3)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for i, (picture, caption) in enumerate(zip(pixels(x), captions)):
        left, top = i % columns * side + 6, i // columns * side + 6
        image.paste(Image.fromarray(picture).resize((side - 24, side - 24)), (left + 9, top))
        draw.text((left + side / 2 - 3, top + side - 14), caption, (60, 60, 60), font, anchor="mm")
    return image


# ---- tasks -----------------------------------------------------------------------------------------------------------

T = 1000  # steps from image to noise


def noised(x, y, none, rng, shape=None):
    """x, y, t and noise of a step; a tenth of y is replaced by `none`, which guidance needs, too."""
    t = rng.integers(1, T + 1, len(x))
    noise = rng.standard_normal(shape or x.shape, np.float32)
    told = rng.random((len(y), *[1] * (y.ndim - 1))) > 0.1
    return x, np.where(told, y, np.full_like(y, none)), t, noise


class Pictures(Task):
    """Images of a requested class; for a folder of images, others like them."""

    def __init__(self, args, saved):
        self.args, unit = args, args.fold * 2 ** (len(args.widths) - 1)
        if args.prompt is not None:
            fail("--prompt goes with --task text")
        if args.blind and args.task != "inpaint":
            fail("--blind goes with --task inpaint")
        least = 28 if args.data in ("digits", "mnist") else 8
        if args.size < least or args.size % unit:
            fail(f"--size must be {least} or more and a multiple of {unit}, as --fold and --widths halve it")
        self.x, self.y, self.test, self.test_y = self.load()
        n_class = int(self.y.max()) + 1
        self.n_class = n_class if n_class > 1 else 0
        self.config = dict(image=list(self.x.shape[1:]), n_class=self.n_class, T=T)
        self.extra = dict(digest=digest(self.x))
        self.about = f"{args.data}: {len(self.x):,} images, {len(self.test):,} held out"

    def load(self):
        """Images (N, H, W, C) uint8 and their classes to train on, then held-out ones."""
        args, drawn = self.args, (self.args.count, max(500, self.args.count // 10))
        if args.data in IDX:
            arrays = load_idx(args.data)
        elif args.data == "cifar10":
            if args.size != 32:
                fail("--size of cifar10 is 32: leave it out")
            arrays, _ = load_cifar10()
        elif args.data == "flowers":
            arrays = sum((make_flowers(n, args.size, args.seed + i) for i, n in enumerate(drawn)), ())
            arrays = [a - 3 if i % 2 else a for i, a in enumerate(arrays)]  # 3 ... 6 petals
        elif args.data == "digits":
            arrays = sum((make_digits(n, args.seed + i) for i, n in enumerate(drawn)), ())
        else:
            train, _, test, _ = read_folder(args.data, args.size)
            arrays = train, np.zeros(len(train), int), test, np.zeros(len(test), int)
        x, y, test, test_y = arrays
        side, edge = 28 if x.ndim == 3 else args.size, (args.size - 28) // 2
        sizes = x.shape[1:3] == (side, side) and x.shape[1:] == test.shape[1:] and 0 < len(x) == len(y)
        if not (sizes and 0 < len(test) == len(test_y) and test_y.max() <= y.max() < 10):
            fail(f"the files of --data {args.data} do not fit together: delete them, and they will be downloaded again")
        if x.ndim == 3:
            x, test = (np.pad(a, ((0, 0), (edge, edge), (edge, edge)))[..., None] for a in (x, test))
        return x, np.int64(y), test, np.int64(test_y)

    def batch(self, step):
        rng = np.random.default_rng((self.args.seed, step, 2))
        i = rng.integers(0, len(self.x), self.args.batch_size)
        return noised(floats(self.x[i]) * 2 - 1, self.y[i], self.n_class, rng)

    def evaluate(self, trainer, whole=False):
        rng = np.random.default_rng((self.args.seed, 7))
        arrays = noised(floats(self.test[:200]) * 2 - 1, self.test_y[:200], self.n_class, rng)
        return trainer.evaluate(*arrays)

    def draw(self, trainer, y, rng, **more):
        """Images at `keep` stages of sampling, (keep, N, H, W, C), from about 0 to 1."""
        options = dict(sampler=self.args.sampler, steps=self.args.sample_steps, guidance=self.args.guidance)
        if not self.n_class:
            options["guidance"] = 1.0
        return trainer.sample(y, rng, **options | more) / 2 + 0.5

    def report(self, trainer):
        args, rng, n = self.args, np.random.default_rng((self.args.seed, 8)), max(self.n_class, 1)
        columns = n if n > 6 else 12
        way = self.draw(trainer, np.arange(columns) % n, rng, keep=4)
        done = [round((i + 1) * args.sample_steps / len(way)) for i in range(len(way))]
        parts = {f"after {n} of {args.sample_steps} steps": x for n, x in zip(done, way)}
        figures, x = self.scored(trainer, rng, 300 if self.n_class else 100)
        parts[f"class by class, guidance {args.guidance:g}" if self.n_class else "others"] = x[: columns * 4]
        if self.n_class and args.guidance != 1:
            parts["without guidance"] = self.draw(trainer, np.arange(columns) % n, rng, guidance=1.0)[-1]
        parts["real images"] = floats(self.test[:columns])
        # an upper bound in bits per dimension of an image of known class, from a chain of 50 steps
        figures["bits"] = trainer.bound(floats(self.test[:50]) * 2 - 1, self.test_y[:50], rng)
        draw_rows(parts, columns).save(args.out / "sample.png", optimize=True)
        return figures, ["sample.png"]

    def judged(self, x, y):
        """Figures of images x of the classes y; the judge's features of them, of real ones, and of as many others."""
        judge, (real, real_y) = Judge(self.x, self.y), (self.test, self.test_y) if self.n_class else (self.x, self.y)
        x, real, real_y = pixels(x), real[:2000], real_y[:2000]
        (p, made), (real_p, features) = judge(x), judge(real)
        _, others = judge(self.x[:: max(1, len(self.x) // len(x))][: len(x)])
        figures = {"accuracy": (p.argmax(1) == y).mean(), "judge": (real_p.argmax(1) == real_y).mean()}
        if self.args.data == "flowers":  # 3 to 6 petals: the counted ones, and how good the counter is
            figures["petals"], figures["counter"] = (
                np.mean([count_petals(image) == n + 3 for image, n in zip(*part)]) for part in ((x, y), (real, real_y))
            )
        return figures, made, features, others

    def scored(self, trainer, rng, n):
        """Figures of n images, with the classes in turn; and the images."""
        y = np.arange(n) % max(self.n_class, 1)
        x = in_parts(lambda y: self.draw(trainer, y, rng)[-1], y, 250)
        figures, made, real, others = self.judged(x, y)
        figures["frechet_real"] = frechet(real, others)
        return (figures if self.n_class else {}) | {"frechet": frechet(real, made)}, x


class Inpaint(Pictures):
    """The same network fills holes in images. It is given the class of each, unless --blind."""

    def holes(self, n):
        """Masks (n, size, size, 1): 1 where the image is known; a square of half its height is missing somewhere."""
        size, rng = self.x.shape[1], np.random.default_rng((self.args.seed, 6))
        masks = np.ones((n, size, size, 1), np.float32)
        for mask, (i, j) in zip(masks, rng.integers(size // 8, size - size // 2 - size // 8 + 1, (n, 2))):
            mask[i : i + size // 2, j : j + size // 2] = 0
        return masks

    def report(self, trainer):
        whole, y, rng = floats(self.test[:24]), self.test_y[:24], np.random.default_rng((self.args.seed, 8))
        mask = self.holes(len(whole))
        known = dict(known=whole * 2 - 1, mask=mask)
        told = np.full_like(y, self.n_class) if self.args.blind else y
        x = self.draw(trainer, told, rng, sampler="repaint", **known)[-1]
        parts = {"with a hole": whole * mask + 0.5 * (1 - mask), "filled": x, "originals": whole}
        draw_rows(parts).save(self.args.out / "sample.png", optimize=True)
        figures = self.judged(x, y)[0] if self.n_class else {}
        return figures | {"changed": float((np.abs(x - whole) * mask).max())}, ["sample.png"]  # of what is known


class Text(Task):
    """Images for a text, in the latents of an autoencoder; 64 combinations of words are held out."""

    words = ["", *sorted(set(" ".join(CAPTIONS).split()))]

    def __init__(self, args, saved):
        self.args, unit, asked = args, args.fold * 2 ** (len(args.widths) - 1) * 4, (args.prompt or "").split()
        if args.size < 8 or args.size % unit:
            fail(f"--size must be 8 or more and a multiple of {unit}, as --fold and --widths halve it")
        if args.data != "digits":
            fail("--data goes with --task pictures and inpaint: text makes its own")
        if args.blind:
            fail("--blind goes with --task inpaint")
        if not set(asked) <= set(self.words) or len(asked) > 6:
            fail(f"--prompt must be up to six of these words:{' '.join(self.words)}")
        held = set(np.random.default_rng(5).permutation(len(CAPTIONS))[:64].tolist())
        known, self.new = ([i for i in range(len(CAPTIONS)) if (i in held) == out] for out in (False, True))
        rng, test = np.random.default_rng((args.seed, 1)), np.array(self.new * 8)
        ids = rng.choice(known, args.count)
        self.x, self.test = (
            np.stack([draw_shape(CAPTIONS[i], rng, args.size) for i in part]) for part in (ids, test)
        )
        self.y, self.test_y = (self.encode(CAPTIONS[i] for i in part) for part in (ids, test))
        # the autoencoder: its channels, and the first steps, in which it learns
        there = saved["config"] if saved else dict(latent=16, first=args.steps // 3)
        self.config = dict(image=[args.size, args.size, 3], n_class=0, vocab_size=len(self.words), length=6, T=T)
        self.config |= {name: there[name] for name in ("latent", "first")}
        self.extra = dict(digest=digest(self.x))
        self.about = f"{len(known)} combinations of words, {len(self.new)} held out"

    def encode(self, captions):
        rows = [[self.words.index(word) for word in caption.split()][:6] for caption in captions]
        return np.array([row + [0] * (6 - len(row)) for row in rows])

    def noised(self, x, y, rng):
        side = self.args.size // 4
        return noised(floats(x) * 2 - 1, y, 0, rng, (len(x), side, side, self.config["latent"]))

    def batch(self, step):
        rng = np.random.default_rng((self.args.seed, step, 2))
        i = rng.integers(0, len(self.x), self.args.batch_size)
        return self.noised(self.x[i], self.y[i], rng)

    def evaluate(self, trainer, whole=False):
        arrays = self.noised(self.test[:200], self.test_y[:200], np.random.default_rng((self.args.seed, 7)))
        return trainer.evaluate(*arrays)

    def report(self, trainer):
        args, rng, drawn = self.args, np.random.default_rng((self.args.seed, 8)), [CAPTIONS[i] for i in self.new] * 2
        options = dict(sampler=args.sampler, steps=args.sample_steps, guidance=args.guidance)
        x = trainer.sample(self.encode(drawn), rng, **options)[-1] / 2 + 0.5
        some = sorted(range(64), key=lambda i: drawn[i].split()[2])[::4]  # of all six shapes
        figures, x, shown = right(pixels(x), drawn), x[some], [drawn[i] for i in some]
        figures["judge"] = right(self.test[: len(drawn)], drawn)["accuracy"]
        if args.prompt:
            shown = [args.prompt] * 8
            x = trainer.sample(self.encode(shown), rng, **options)[-1] / 2 + 0.5
        draw_captioned(x, shown).save(args.out / "sample.png", optimize=True)
        return figures, ["sample.png"]


class Toy(Task):
    """Points in the plane, of a mixture whose score is known in closed form."""

    config = dict(image=[1, 1, 2], net="mlp", n_class=0, T=T)
    about = f"{len(PARTS)} normal distributions"

    def __init__(self, args, saved):
        self.args = args
        if args.data != "digits" or args.prompt is not None or args.blind:
            fail("--task toy makes its own points: leave --data, --prompt and --blind out")

    def noised(self, n, *key):
        rng = np.random.default_rng((self.args.seed, *key))
        return noised(draw_points(n, rng)[:, None, None], np.zeros(n, int), 0, rng)

    def batch(self, step):
        return self.noised(self.args.batch_size, step, 2)

    def evaluate(self, trainer, whole=False):
        return trainer.evaluate(*self.noised(2000, 7))

    def report(self, trainer):
        figures, parts = self.look(trainer, np.random.default_rng((self.args.seed, 3)))
        parts = {name: 1 - (x / x.max((1, 2), keepdims=True)) ** 0.5 for name, x in parts.items()}
        draw_rows(parts, 6).save(self.args.out / "sample.png", optimize=True)
        return figures | self.score_error(trainer), ["sample.png"]

    def look(self, trainer, rng, n=3000, columns=5):
        """Figures; and {caption: images (columns + 1, 120, 120, 1)} of densities, with time from left to right."""
        a, levels = trainer.model.a, np.linspace(0, T, columns + 1).round().astype(int)
        true = [on_grid(a[t]) for t in levels]
        flow, points = [true[0]], draw_points(n, rng)
        chain = [histogram(points)]
        for s, t in zip(levels, levels[1:]):
            flow.append(fokker_planck(flow[-1], math.log(a[s] / a[t])))
            for ratio in a[s + 1 : t + 1] / a[s:t]:  # 1 - beta
                points = math.sqrt(ratio) * points + math.sqrt(1 - ratio) * rng.standard_normal((n, 2))
            chain.append(histogram(points))
        rows = {"the density, in closed form": true, "by the Fokker-Planck equation": flow}
        rows["points, noised"] = chain
        figures = {"fokker_planck": max(variation(p, q, 1) for p, q in zip(true, flow))}
        figures |= {"sample": variation(histogram(draw_points(n, rng)), true[0])}  # n true points: the best possible
        for name, sampler in (("SDE", "ddpm"), ("ODE", "heun"), ("Langevin", "langevin")):
            steps = self.args.sample_steps
            path = trainer.sample(np.zeros(n, int), rng, sampler, steps, keep=columns)[:, :, 0, 0]
            start = rng.standard_normal((1, n, 2))
            rows[f"from noise, right to left: {name}"] = [histogram(x) for x in np.concatenate([start, path])[::-1]]
            figures[name] = variation(rows[f"from noise, right to left: {name}"][0], true[0])
        return figures, {name: np.stack(row)[..., None] for name, row in rows.items()}

    def score_error(self, trainer, n=1000):
        """{"score_error"}: the learned score's distance from the true one, as a share, over ten levels of noise."""
        a, rng, errors = trainer.model.a, np.random.default_rng((self.args.seed, 4)), []
        for t in np.linspace(0, T, 11).astype(int)[1:]:
            x = math.sqrt(a[t]) * draw_points(n, rng) + math.sqrt(1 - a[t]) * rng.standard_normal((n, 2))
            eps = trainer.denoise(np.float32(x[:, None, None]), np.zeros(n, int), t)[1][:, 0, 0]
            true = density(x, a[t])[1]
            errors.append(np.square(-eps / math.sqrt(1 - a[t]) - true).sum() / np.square(true).sum())
        return {"score_error": float(np.sqrt(np.mean(errors)))}


TASKS = {"pictures": Pictures, "inpaint": Inpaint, "text": Text, "toy": Toy}
