"""The tasks: classify images; or paint one in the style of another.

One class per task, all in numpy. To add a task, write one more class and add it to TASKS at the end.
"""

import argparse
import atexit
import gzip
import hashlib
import importlib.util
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


# ---- images with classes ---------------------------------------------------------------------------------------------

IDX = {  # two URLs for each dataset, and the MD5 sums of its four files
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


def load_folder(folder, size):
    """One sub-folder per class: the middle square of each image at size x size; every fifth of a class is held out."""
    images, labels, held, names, skipped = [], [], [], [], 0
    for place in sorted(path for path in Path(folder).glob("*") if path.is_dir()):
        before = len(images)
        for path in sorted(path for path in place.rglob("*") if path.is_file() and not path.name.startswith(".")):
            try:
                images.append(np.asarray(ImageOps.fit(open_image(path), (size, size))))
            except SystemExit:  # open_image has said why; go on with the others
                skipped += 1
        if new := len(images) - before:
            labels += [len(names)] * new
            held += [i % 5 == 4 for i in range(new)]
            names.append(place.name)
    if skipped:
        print(f"skipped {skipped} files in {folder}", file=sys.stderr)
    if len(names) < 2 or not any(held):
        fail(f"{folder} must be mnist, fashion, cifar10 or a folder with 2 or more sub-folders of 5 or more images")
    images, labels, held = np.stack(images), np.array(labels), np.array(held)
    return [images[~held], labels[~held], images[held], labels[held]], names


def floats(images):
    return images.astype(np.float32) / 255


def augment(x, shift, flip, rng):
    """Images (B, H, W, C), each shifted by up to `shift` pixels, the border repeated; with `flip`, half mirrored."""
    B, H, W, _ = x.shape
    down, right = rng.integers(-shift, shift + 1, (2, B, 1))
    rows, columns = (np.arange(H) + down).clip(0, H - 1), (np.arange(W) + right).clip(0, W - 1)
    if flip:
        columns = np.where(rng.random((B, 1)) < 0.5, columns[:, ::-1], columns)
    return x[np.arange(B)[:, None, None], rows[:, :, None], columns[:, None]]


# ---- images to paint from --------------------------------------------------------------------------------------------


def draw_scene(size):
    """The built-in content image, (3/4 size, size): hills and a house under a sun, mirrored in a lake."""
    y, x = np.mgrid[: 3 * size // 2, : 2 * size][:, :, :, None] / (2 * size)  # twice as large, to smooth it at the end
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
    """The built-in style image, (3/4 size, size): brush strokes in rings around eddies, from gold to deep blue."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[: 3 * size // 2, : 2 * size] / (2 * size)
    eddies = rng.uniform(0, 1, (7, 2)) * [0.75, 1]
    away = np.hypot(y[..., None] - eddies[:, 0], x[..., None] - eddies[:, 1])
    nearest = away.argmin(2)
    r = away.min(2) + 0.004 * np.sin(40 * x) + 0.004 * np.sin(40 * y)
    turn = np.arctan2(y - eddies[nearest, 0], x - eddies[nearest, 1])
    ring = (r * 45).astype(int)
    stroke = (turn * (ring + 1) / 2.5 + 2.4 * ring).astype(int)  # strokes of equal length, each ring shifted
    chance = np.sin(stroke * 127.1 + ring * 311.7 + nearest * 74.7) * 43758.5453 % 1  # one number per stroke
    palette = np.array([(255, 235, 150), (245, 200, 70), (150, 190, 200), (80, 140, 200), (40, 80, 160), (20, 40, 100)])
    colour = palette[(14 * r + 2.2 * chance).astype(int).clip(0, 5)]
    edge = np.minimum(r * 45 % 1, 1 - r * 45 % 1)[..., None]  # the paint is thinner at the edge of a stroke
    return Image.fromarray((colour * (0.55 + 0.45 * (edge * 4).clip(0, 1))).astype(np.uint8)).reduce(2)


def load_picture(path, draw, size):
    """An image file, or draw(size) if there is none: (H, W, 3) uint8, the longer side `size`."""
    image = open_image(path) if path else draw(size)
    pixels = np.asarray(ImageOps.contain(image, (size, size)))
    if min(pixels.shape[:2]) < 16:
        fail(f"{path or 'the image'} is too narrow for {size} pixels: choose a larger --size")
    return pixels


# ---- plots -----------------------------------------------------------------------------------------------------------

PAPER, GREEN, RED, GREY = (250, 250, 247), (44, 160, 44), (214, 39, 40), (80, 80, 80)


def draw_mistakes(p, x, y, names, rows=5, columns=6):
    """The images whose right class got the lowest probability, and the confusion matrix.

    p (N, K) are the network's probabilities for the images x (N, H, W, C) of the classes y (N,).
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
    draw.text((left, 22), "rows: true class; columns: predicted class", GREY, ImageFont.load_default(13), "lm")
    return image


def draw_filters(w, columns=8):
    """The first layer's filters w (n, C, k, k), each scaled to its own largest weight; grey is 0."""
    w = (w / np.abs(w).max((1, 2, 3), keepdims=True) * 127 + 128).astype(np.uint8).transpose(0, 2, 3, 1)
    image = Image.new("RGB", (columns * 60 + 6, math.ceil(len(w) / columns) * 60 + 6), PAPER)
    for i, tile in enumerate(w if w.shape[3] == 3 else w.repeat(3, 3)):
        tile = Image.fromarray(tile).resize((54, 54), Image.Resampling.NEAREST)
        image.paste(tile, (6 + i % columns * 60, 6 + i // columns * 60))
    return image


def draw_triptych(content, style, result):
    """Three images side by side, all as large as the last."""
    width, height = result.size
    image = Image.new("RGB", (3 * width + 16, height), PAPER)
    for i, part in enumerate((content, style, result)):
        image.paste(ImageOps.fit(part, (width, height)), (i * (width + 8), 0))
    return image


# ---- tasks -----------------------------------------------------------------------------------------------------------

FASHION = "top trousers pullover dress coat sandal shirt trainer bag boot".split()


class Classify(Task):
    """Classify images: digits, a public dataset, or a folder with a sub-folder for each class."""

    def __init__(self, args, saved):
        self.args = args
        (x, y, x_val, y_val), self.names = self.load()
        sizes = x.ndim == x_val.ndim > 2 and 0 < len(x) == len(y) and 0 < len(x_val) == len(y_val)
        if not (sizes and max(y.max(), y_val.max()) < len(self.names)):
            fail(f"the files of --data {args.data} do not fit together: delete them, and they will be downloaded again")
        if args.validate:  # to choose flags without a look at the test set
            held = np.arange(len(x)) % 10 == 0
            x, y, x_val, y_val = x[~held], y[~held], x[held], y[held]
        self.x, self.x_val = (images if images.ndim == 4 else images[..., None] for images in (x, x_val))
        self.y, self.y_val = np.int64(y), np.int64(y_val)
        _, size, _, n_in = self.x.shape
        if args.size not in (None, size):
            fail(f"--size of {args.data} is {size}: leave it out")
        self.config = dict(size=size, n_in=n_in, n_out=len(self.names))
        self.extra = dict(names=self.names, digest=digest(self.x, self.y))
        few = f", each {1 / len(x_val):.0%} of the accuracy" if len(x_val) < 100 else ""
        self.about = f"{args.model} on {args.data}: {len(x):,} to train on, {len(x_val):,} held out{few}"

    def load(self):
        """Images (N, H, W) or (N, H, W, C) uint8 and classes (N,), then held-out ones; the names of the classes."""
        name, names, seed = self.args.data, [str(digit) for digit in range(10)], self.args.seed
        if name == "digits":
            return (*make_digits(5000, seed), *make_digits(1000, seed + 1)), names
        if name in IDX:
            return load_idx(name), FASHION if name == "fashion" else names
        return load_cifar10() if name == "cifar10" else load_folder(name, self.args.size)

    def trainer(self, net, config):
        if path := self.args.export:
            if path.suffix not in net.EXPORTS:
                fail(f"--export with {self.args.backend} writes {' or '.join(net.EXPORTS)}, not {path}")
            if not path.parent.is_dir():
                fail(f"--export {path}: there is no such folder, create it first")
            if not importlib.util.find_spec(package := net.EXPORTS[path.suffix]):
                fail(f"--export {path} needs pip install {package}")
        return super().trainer(net, config)

    def batch(self, step):
        rng = np.random.default_rng((self.args.seed, step, 1))
        i = rng.integers(0, len(self.x), self.args.batch_size)
        return floats(augment(self.x[i], self.args.shift, self.args.flip, rng)), self.y[i]

    def evaluate(self, trainer, whole=False):
        if not whole:
            some = slice(None, None, math.ceil(len(self.x_val) / 500))
            return trainer.evaluate(floats(self.x_val[some]), self.y_val[some])
        self.p = self.predict(trainer, self.x_val)  # (N, n_out), for report
        nll = -np.log(self.p[np.arange(len(self.p)), self.y_val] + 1e-12)
        figures = {"val_loss": nll.mean(), "accuracy": (self.p.argmax(1) == self.y_val).mean()}
        if self.args.flip:  # the mean with the mirror image is more accurate
            both = self.p + self.predict(trainer, self.x_val[:, :, ::-1])
            figures["accuracy_flip"] = (both.argmax(1) == self.y_val).mean()
        return figures

    def predict(self, trainer, images):
        """The probabilities of the classes (N, n_out) for images (N, H, W, C) uint8."""
        parts = np.array_split(images, math.ceil(len(images) / 500))
        return np.concatenate([trainer.predict(floats(part)) for part in parts])

    def report(self, trainer):
        args, files = self.args, ["sample.png", "filters.png"]
        draw_mistakes(self.p, self.x_val, self.y_val, self.names).save(args.out / "sample.png")
        draw_filters(trainer.filters()).save(args.out / "filters.png")
        if args.export:
            print(f"{args.export}: {trainer.export(args.export, self.names)}")
            files += [args.export.resolve(), Path(f"{args.export.resolve()}.json")]  # the latter for .mlxfn
        return {}, files


class Style(Task):
    """Style transfer: an image with the content of one and the style of another, found by optimizing its pixels."""

    def __init__(self, args, saved):
        if args.export:
            fail("--export writes classifiers: leave it out of --task style")
        self.args = args
        self.content = load_picture(args.content, draw_scene, args.size)
        self.style = load_picture(args.style, draw_strokes, args.size)
        height, width, _ = self.content.shape
        self.config = dict(model="style", size=max(height, width), n_in=3, n_out=0, channels=[])
        self.config |= dict(label_smoothing=0.0, weight_decay=0.0)
        self.extra = dict(digest=digest(self.content, self.style))
        self.about = f"an image of {width} x {height}, features from {args.weights or 'random filters'}"

    def trainer(self, net, config):
        args, pair = self.args, (floats(self.content), floats(self.style))
        try:
            return net.Stylist(config, *pair, args.weights, args.strength, args.tv, args.seed, args.device)
        except Exception as error:
            if not args.weights:
                raise
            kind, reason = ".safetensors" if args.backend == "mlx" else ".pth", str(error).partition(". ")[0]
            fail(f"{args.weights} is not a {kind} file of VGG-19 in torchvision's layout ({reason})")

    def batch(self, step):
        return ()  # every step uses the same two images

    def evaluate(self, trainer, whole=False):
        return trainer.evaluate()

    def report(self, trainer):
        result = Image.fromarray((trainer.image() * 255).round().astype(np.uint8))
        result.save(self.args.out / "style.png")
        triptych = draw_triptych(Image.fromarray(self.content), Image.fromarray(self.style), result)
        triptych.save(self.args.out / "sample.png")
        return {}, ["sample.png", "style.png"]


TASKS = {"classify": Classify, "style": Style}
