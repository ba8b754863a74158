"""The tasks: images like those of a dataset, and a one-dimensional game whose best discriminator is known.

One class per task, all in numpy. To add a task, write one more class and add it to TASKS at the end.
"""

import argparse
import atexit
import gzip
import hashlib
import json
import math
import os
import sys
import zlib
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

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
    """function(x) for n rows of x at a time, to save memory."""
    return np.concatenate([function(x[i : i + n]) for i in range(0, len(x), n)])


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


# ---- the game in one dimension: densities on a grid, so that the best discriminator and all integrals are known ------

GRID = (np.arange(100) + 0.5) / 50 - 1  # the midpoints of 100 bins of [-1, 1]
PARTS = np.array([(0.4, -0.5, 0.12), (0.6, 0.35, 0.18)])  # the data, p: a mixture of normals; weight, mean, std
P = sum(share * np.exp(-((GRID - mean) ** 2) / (2 * std**2)) / std for share, mean, std in PARTS)
P /= P.sum()  # the probability of each bin


def draw_p(rng, shape):
    _, mean, std = np.moveaxis(PARTS[rng.choice(len(PARTS), shape, p=PARTS[:, 0])], -1, 0)
    return np.float32(mean + std * rng.standard_normal(shape))


def look_at_game(trainer, seed):
    """q, the probability of each bin, from 20,000 samples, and D there: (2, 100)."""
    z = np.random.default_rng((seed, 3)).standard_normal((20_000, trainer.config.latent), np.float32)
    q = np.histogram(trainer.generate(z), 100, (-1, 1))[0] / len(z)
    return np.stack([q, trainer.discriminate(GRID.astype(np.float32).reshape(-1, 1, 1, 1))])


def theory(q, d):
    """V for D; for the best D, -log 4 + 2 JSD(p, q); and how far D is from the best, on average over p and q."""
    d = d.astype(np.float64).clip(1e-9, 1 - 1e-9)
    with np.errstate(divide="ignore", invalid="ignore"):
        best = P / (P + q)
        jsd = (np.nansum(P * np.log(2 * best)) + np.nansum(q * np.log(2 * (1 - best)))) / 2
        off = ((P + q) / 2 * np.abs(d - best)).sum()
        return {"value": (P * np.log(d) + q * np.log(1 - d)).sum(), "bound": 2 * jsd - math.log(4), "off": off}


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


def some_of(looks, n):
    """About n of the looks {step: array}, the early ones closer together, the latest one last."""
    steps, last = list(looks), len(looks) - 1
    chosen = sorted({round(last * (i / (n - 1)) ** 2) for i in range(n)})
    return {steps[i]: looks[steps[i]] for i in chosen}


INK = {"p": (31, 119, 180), "q": (255, 127, 14), "D": (20, 20, 20), "D*": (150, 150, 150)}


def draw_lines(draw, box, lines, span, caption):
    """Lines {name: (x, y, colour)} in box = x0, y0, x1, y1 of the image, over span = left, low, right, high."""
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
    """{step: (q, D)}: four of the looks, and over all steps V and its value for the best D."""
    image, steps = Image.new("RGB", (1600, 1440), (PAPER,) * 3), list(looks)
    draw = ImageDraw.Draw(image)
    for i, (step, (q, d)) in enumerate(some_of(looks, 4).items()):
        x, y = 30 + 790 * (i % 2), 60 + 450 * (i // 2)
        lines = {"p": (GRID, P / P.max() * 0.6, INK["p"]), "q": (GRID, q / P.max() * 0.6, INK["q"])}
        seen = P + q > 1e-3  # elsewhere there are too few samples
        lines |= {"p / (p + q)": (GRID[seen], P[seen] / (P + q)[seen], INK["D*"]), "D": (GRID, d, INK["D"])}
        draw_lines(draw, (x, y, x + 750, y + 370), lines, (-1, 0, 1, 1), f"step {step}")
    figures = [theory(*look) for look in looks.values()]
    lines = {"-log 4 + 2 JSD(p, q)": (steps, [f["bound"] for f in figures], INK["D*"])}
    lines |= {"V": (steps, [f["value"] for f in figures], INK["D"])}
    span, box = (0, -1.5, max(steps[-1], 1), -0.9), (110, 960, 1570, 1410)
    draw_lines(draw, box, lines, span, "the value of the game; dashed: -log 4, D = 1/2 everywhere")
    for mark in (-0.9, -1.1, -1.3, -1.5, -math.log(4)):
        v = 1410 + (mark + 1.5) / 0.6 * (960 - 1410)
        if mark == -math.log(4):
            for u in range(110, 1570, 30):
                draw.line([(u, v), (u + 15, v)], INK["D*"], 2)
        else:
            draw.text((100, v), f"{mark:.1f}", (60, 60, 60), ImageFont.load_default(26), anchor="rm")
    return image.reduce(2)


# ---- tasks -----------------------------------------------------------------------------------------------------------


class Game(Task):
    """What the tasks share: the data for a step, and looks, snapshots of the two players, {step: array}."""

    def __init__(self, args):
        self.args, self.looks = args, {}

    def batch(self, step):
        """x (d_steps, B, H, W, C) for D; z (d_steps + 1, B, latent + n_class), the last for G; u (d_steps, B)."""
        rng, (n, B) = np.random.default_rng((self.args.seed, step, 1)), (self.args.d_steps, self.args.batch_size)
        x, c = self.draw(rng, (n + 1, B))
        z = rng.standard_normal((n + 1, B, self.args.latent), np.float32)
        return x[:n], np.concatenate([z, c], -1), rng.random((n, B), np.float32)

    def keep(self, trainer, look, figures, whole):
        """Keep a look at the current state, and write all looks to a file, which a resumed run reads."""
        # looks at later steps come from a run that was killed before it saved, and is now resumed
        self.looks = {step: old for step, old in self.looks.items() if step < trainer.t} | {trainer.t: look}
        if whole or not all(map(math.isfinite, figures.values())):
            return
        file = self.args.out / self.file
        part = Path(f"{file}.part")
        try:
            with open(part, "wb") as f:
                self.write_looks(f)
            part.replace(file)
        except OSError as error:
            fail(f"{file} could not be written ({error.strerror}): make room there; the earlier one is kept")
        finally:
            part.unlink(missing_ok=True)

    def recall(self):
        """Read the looks of the run that is resumed."""
        try:
            self.looks = self.read_looks(self.args.out / self.file)
        except Exception:  # there are none, or they are damaged, or the images have another size
            self.looks = {}


class Pictures(Game):
    """Images like those of a dataset. A look is what G makes of the same twelve latents: a row of OUT/looks.png."""

    file = "looks.png"

    def __init__(self, args, saved):
        super().__init__(args)
        least, halved = 28 if args.data in ("digits", "mnist") else 8, len(args.hidden) if args.model == "dcgan" else 1
        if args.size < least or args.size % 2**halved:
            fail(f"--size must be {least} or more and a multiple of {2**halved}: each of a dcgan's --hidden halves it")
        self.train, y, test, test_y = self.load()
        self.judge, self.won = Judge(self.train, y), False
        real_p, self.real = self.judge(test[:2000])
        if len(test) < 20:  # of a small folder: too few for a Fréchet distance
            self.real = self.judge(self.train[:2000])[1]
        self.right, classes = (real_p.argmax(1) == test_y[:2000]).mean(), real_p.shape[1]
        n_class = saved["config"].get("n_class", 0) if saved else classes if classes > 1 else 0
        one_hot = np.eye(classes, n_class, dtype=np.float32)
        # for evaluation: held-out images, from -1 to 1 as G makes them, and as many z of the same classes
        i = np.arange(1000) % len(test)
        z = np.random.default_rng((args.seed, 2)).standard_normal((1000, args.latent), np.float32)
        self.test, self.y, self.z = floats(test[i]) * 2 - 1, test_y[i], np.hstack([z, one_hot[test_y[i]]])
        self.c = one_hot[y]  # (N, n_class)
        self.config = dict(image=list(self.train.shape[1:]), n_class=n_class)
        self.extra = dict(digest=digest(self.train))
        self.about = f"{args.data}: {len(self.train):,} images to train on, {len(test):,} held out"
        if saved:
            self.recall()

    def load(self):
        """Images (N, H, W, C) uint8 to train on and their classes (N,), then held-out ones."""
        args, edge = self.args, (self.args.size - 28) // 2
        parts = (args.count, args.seed), (args.count // 5, args.seed + 1)  # synthetic ones: how many, of which seed
        if args.data == "flowers":
            x, y, test, test_y = sum((make_flowers(n, args.size, seed) for n, seed in parts), ())
            return x, y - 3, test, test_y - 3  # 3 ... 6 petals
        if args.data == "digits":
            x, y, test, test_y = sum((make_digits(n, seed) for n, seed in parts), ())
            # without the noise: with few latents G can't make noise for each pixel, and D would notice that
            x, test = (centred(pixels((images - 40.0) / 105)) for images in (x, test))
        elif args.data in IDX:
            x, y, test, test_y = load_idx(args.data)
            sizes = x.shape[1:] == test.shape[1:] == (28, 28) and 0 < len(x) == len(y) and 0 < len(test) == len(test_y)
            if not (sizes and test_y.max() <= y.max() < 10):
                fail(f"the files of --data {args.data} do not fit together: delete them, and they are downloaded again")
        else:
            x, y, test, test_y = read_folder(args.data, args.size)
            return x, 0 * y, test, 0 * test_y
        # a black frame: 32 pixels can be halved three times
        x, test = (np.pad(images, ((0, 0), (edge, edge), (edge, edge)))[..., None] for images in (x, test))
        return x, y, test, test_y

    def draw(self, rng, shape):
        """Real images (*shape, H, W, C) and their classes (*shape, n_class), one-hot."""
        i = rng.integers(0, len(self.train), shape)
        return floats(self.train[i]) * 2 - 1, self.c[i]

    def evaluate(self, trainer, whole=False):
        z = self.z if whole else self.z[:500]
        figures = {name: float(x) for name, x in trainer.evaluate(self.test[: len(z)], z).items()}
        if figures["value"] > -0.2 and self.args.loss != "wgan-gp" and not self.won:
            self.won = True
            print("the discriminator has won: D(x) and 1 - D(G(z)) are 0.9 or more; if G stops learning, lower --d-lr "
                  "or try --smoothing 0.1 or --loss wgan-gp")  # fmt: skip
        made = in_parts(trainer.generate, z, 250)
        self.made = pixels(made / 2 + 0.5)
        self.p, features = self.judge(self.made)
        figures["frechet"] = frechet(self.real, features)
        self.keep(trainer, made[:12] / 2 + 0.5, figures, whole)
        return figures

    def write_looks(self, f):
        steps, sheet = PngInfo(), tile(np.concatenate(list(self.looks.values())), 12)
        steps.add_text("steps", json.dumps(list(self.looks)))
        Image.fromarray(sheet.squeeze()).save(f, "PNG", pnginfo=steps)

    def read_looks(self, file):
        H, W, C = self.train.shape[1:]
        with Image.open(file) as image:
            steps, sheet = json.loads(image.info["steps"]), floats(np.asarray(image))
        return dict(zip(steps, sheet.reshape(len(steps), H, 12, W, C).swapaxes(1, 2)))

    def report(self, trainer):
        def make(z):
            return in_parts(trainer.generate, z, 250) / 2 + 0.5

        angle = np.linspace(0, np.pi / 2, 12, dtype=np.float32)[:, None]  # along an arc each z is as likely as the ends
        ends = self.z[12:16].reshape(2, 2, -1)
        walks = np.concatenate([np.cos(angle) * a + np.sin(angle) * b for a, b in ends])
        rows = {f"the same twelve latents, step {step}": x for step, x in some_of(self.looks, 6).items()}
        some = 12 + np.argsort(self.y[12:48], kind="stable")
        rows |= {"other latents": make(self.z[some]), "interpolations between two latents": make(walks)}
        rows["real images"] = self.test[:12] / 2 + 0.5
        draw_rows(rows).save(self.args.out / "sample.png", optimize=True)
        figures, classes = {}, self.p.shape[1]  # of the 1,000 images of the last evaluation
        if classes > 1:
            figures["least_share"] = np.bincount(self.p.argmax(1), minlength=classes).min() / len(self.p)
            figures["sure"] = (self.p.max(1) > 0.9).mean()
            figures["asked"] = (self.p.argmax(1) == self.y).mean()
            figures["judge"] = self.right
            _, others = self.judge(self.train[:: max(1, len(self.train) // 1000)][:1000])
            figures["frechet_real"] = frechet(self.real, others)
        if self.args.data == "flowers":
            figures["petals"] = np.mean([count_petals(x) == n + 3 for x, n in zip(self.made, self.y)])
        return figures, ["sample.png", self.file]


class Toy(Game):
    """Numbers with a known density. A look is q and D on the grid: (2, 100), in OUT/looks.npz."""

    file = "looks.npz"
    config = dict(image=[1, 1, 1])
    about = "two normal distributions"

    def __init__(self, args, saved):
        super().__init__(args)
        if args.model != "gan" or args.loss == "wgan-gp":
            fail("--task toy compares D with p / (p + q): it needs --model gan, and not --loss wgan-gp")
        if args.data != "digits":
            fail("--data goes with --task pictures: toy makes its own")
        if saved:
            self.recall()

    def draw(self, rng, shape):
        """Samples of p as images of one pixel (*shape, 1, 1, 1); there are no classes."""
        return draw_p(rng, shape).reshape(*shape, 1, 1, 1), np.zeros((*shape, 0), np.float32)

    def evaluate(self, trainer, whole=False):
        look = look_at_game(trainer, self.args.seed)
        figures = theory(*look)
        self.keep(trainer, look, figures, whole)
        return figures

    def write_looks(self, f):
        np.savez(f, **{str(step): look for step, look in self.looks.items()})

    def read_looks(self, file):
        with np.load(file, allow_pickle=False) as f:
            return {int(step): look for step, look in f.items()}

    def report(self, trainer):
        draw_game(self.looks).save(self.args.out / "sample.png", optimize=True)
        return {}, ["sample.png", self.file]


TASKS = {"pictures": Pictures, "toy": Toy}
