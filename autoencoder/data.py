"""The tasks: a generative model of images, denoising, compression to a few bytes.

One class per task, all in numpy. To add a task, write one more class and add it to TASKS at the end.
"""

import argparse
import atexit
import bisect
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import sys
import zlib
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

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


def floats(images):
    return images.astype(np.float32) / 255


def pixels(x):
    return (x * 255).round().clip(0, 255).astype(np.uint8)


def psnr(x, y):
    """Peak signal-to-noise ratio over whole sets of images, in dB: -10 log10 of the mean squared error."""
    return -10 * math.log10(max(np.square(x - y, dtype=np.float64).mean(), 1e-12))  # 120 for equal ones


def in_parts(function, x, n=1000):
    """function(x) for n rows of x at a time, to save memory."""
    return np.concatenate([function(x[i : i + n]) for i in range(0, len(x), n)])


def spoil(x, noise, rng):
    """x plus normal noise of this standard deviation, clipped to [0, 1]."""
    return (x + np.float32(noise) * rng.standard_normal(x.shape, np.float32)).clip(0, 1)


def jitter(images, amount, rng):
    """Each image (N, H, W, C) uint8 rotated, stretched and sheared by about this amount, and shifted a little."""
    N, H, W, C = images.shape
    matrix, middle = np.eye(2) + rng.normal(0, amount, (N, 2, 2)), np.array([W / 2, H / 2])
    rows = np.dstack([matrix, middle - matrix @ middle + rng.uniform(-0.5, 0.5, (N, 2))]).reshape(N, 6)
    how = Image.Transform.AFFINE, Image.Resampling.BICUBIC
    bent = [Image.fromarray(image.squeeze()).transform((W, H), how[0], row, how[1]) for image, row in zip(images, rows)]
    return np.stack(bent).reshape(images.shape)


def median(x):
    """Pillow's median filter, 3x3, for each of the images (N, H, W, C)."""
    answers = [Image.fromarray(image.squeeze()).filter(ImageFilter.MedianFilter(3)) for image in pixels(x)]
    return floats(np.stack(answers)).reshape(x.shape)


# ---- compression -----------------------------------------------------------------------------------------------------


def pack(mu, sigma):
    """Latents (N, latent) as bytes. Each dimension is rounded in its own steps, sqrt(12) sigma (latent,) wide.

    The rounding error then has a root mean square of sigma, like the noise that the decoder was trained with.
    A dimension that says nothing about x has mu near 0 and sigma near 1: all its numbers round to 0 and cost nothing.
    """
    step = (math.sqrt(12) * sigma).astype("<f4")
    codes = np.rint(mu / step).clip(-127, 127).astype(np.int8)
    return step.tobytes() + lzma.compress(codes.T.tobytes())  # by dimension: each has its own frequencies


def unpack(data, latent):
    """What pack wrote, as the rounded latents (N, latent) float32."""
    codes = np.frombuffer(lzma.decompress(data[4 * latent :]), np.int8)
    return codes.reshape(latent, -1).T * np.frombuffer(data, "<f4", latent)


def rival(form, x, size):
    """The images x after JPEG or WebP, at the lowest quality that takes `size` bytes or more; and how many it takes.

    They all go into one file, as one sheet, so that there is one header and not one per image.
    """
    N, H, W, C = x.shape
    columns = math.isqrt(N - 1) + 1
    sheet = Image.fromarray(tile(x, columns).squeeze())

    def encode(quality):
        sheet.save(file := io.BytesIO(), form, quality=quality, optimize=True)
        return file

    best = encode(min(100, bisect.bisect_left(range(101), size, lo=1, key=lambda quality: encode(quality).tell())))
    answer = np.asarray(Image.open(best).convert(sheet.mode)).reshape(-1, H, columns, W, C).swapaxes(1, 2)
    return floats(answer.reshape(-1, H, W, C)[:N]), best.tell()


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


# ---- tasks -----------------------------------------------------------------------------------------------------------


class Pictures(Task):
    """What the tasks share: the images, each of which should come out unchanged."""

    model = "vae"

    def __init__(self, args, saved):
        self.args = args
        self.train, self.test, self.labels = self.load()
        H, W, C = self.train.shape[1:]
        if args.net == "conv" and (H % 2 ** len(args.hidden) or W % 2 ** len(args.hidden)):
            fail(f"--hidden of conv halves {H} x {W} images {len(args.hidden)} times: use fewer")
        self.config = dict(image=[H, W, C], model=self.model)
        self.extra = dict(digest=digest(self.train))
        self.about = f"{args.data}: {len(self.train):,} images to train on, {len(self.test):,} held out"

    def load(self):
        """Images to train on (N, H, W, C) uint8, held-out ones float32, and the labels of the latter."""
        args, parts = self.args, ((self.args.count, self.args.seed), (self.args.count // 5, self.args.seed + 1))
        if args.data == "digits":
            (train, _), (test, labels) = (make_digits(n, seed) for n, seed in parts)
        elif args.data == "flowers":
            (train, _), (test, labels) = (make_flowers(n, args.size, seed) for n, seed in parts)
        elif args.data in IDX:
            train, y, test, labels = load_idx(args.data)
            sizes = train.shape[1:] == test.shape[1:] == (28, 28) and len(train) == len(y) and len(test) == len(labels)
            if not (sizes and len(y) and len(labels) and max(y.max(), labels.max()) < 10):
                fail(f"the files of --data {args.data} do not fit together: delete them, and they are downloaded again")
        else:
            train, _, test, labels = read_folder(args.data, args.size)
        channels = train.shape[3:] or (1,)
        return train.reshape(*train.shape[:3], *channels), floats(test).reshape(*test.shape[:3], *channels), labels

    def given(self, y, rng):
        """The input for the target y."""
        return y

    def arrays(self, y, rng):
        """x and y (B, H, W, C), eps (B, latent)."""
        eps = rng.standard_normal((len(y), self.args.latent), np.float32)
        return self.given(y, rng), y, eps

    def batch(self, step):
        args, rng = self.args, np.random.default_rng((self.args.seed, step, 1))
        images = self.train[rng.integers(0, len(self.train), args.batch_size)]
        if args.jitter and step < 0.8 * args.steps:  # it blurs a little: the last steps see the original images
            images = jitter(images, args.jitter, rng)
        return self.arrays(floats(images), rng)

    def evaluate(self, trainer, whole=False):
        x, rng = self.test if whole else self.test[:1000], np.random.default_rng((self.args.seed, 2))
        parts = np.array_split(x, math.ceil(len(x) / 1000))
        rows = [(len(part) / len(x), trainer.evaluate(*self.arrays(part, rng))) for part in parts]
        return {name: sum(share * float(figures[name]) for share, figures in rows) for name in rows[0][1]}

    def report(self, trainer):
        figures, parts = self.show(trainer)
        draw_rows(parts).save(self.args.out / "sample.png", optimize=True)
        return figures, ["sample.png"]


class Generate(Pictures):
    """A generative model of the images."""

    def show(self, trainer):
        """Reconstructions, samples, interpolations; with two latents, a map of them, too.

        The KL pulls the pictures' z towards N(0, I), but only slowly where the pixels weigh much more. So samples come
        from a normal distribution fitted to these z (Ghosh et al. 2020), which becomes N(0, I) in the end.
        """
        test, n = self.test, self.args.latent
        first = np.unique(self.labels, return_index=True)[1][:5]  # one of each label; or else training pictures
        ends = np.concatenate([test[first], floats(self.train[:5])])[:5]
        mu, share = trainer.encode(ends)[0], np.linspace(0, 1, 12, dtype=np.float32)[:, None]
        walks = np.concatenate([a + share * (b - a) for a, b in zip(mu, mu[1:])])
        seen, sigma = trainer.encode(floats(self.train[:2000]))
        cov = np.cov(seen.T, bias=True) + np.diag((sigma**2).mean(0))
        z = np.random.default_rng((self.args.seed, 3)).multivariate_normal(seen.mean(0), cov, 48, method="cholesky")
        parts = {"held-out images": test[:12], "and their reconstructions": trainer.reconstruct(test[:12])}
        parts["samples: latents from a normal distribution fitted to the images'"] = trainer.decode(np.float32(z))
        parts["interpolations between two latents"] = trainer.decode(walks)
        if n == 2:
            line = np.linspace(-2.2, 2.2, 12, dtype=np.float32)
            plane = np.stack(np.meshgrid(line, -line), -1).reshape(-1, 2)
            parts["map of the plane of latents: both numbers from -2.2 to 2.2"] = trainer.decode(plane)
        if self.args.data != "flowers":
            return {}, parts
        x = pixels(trainer.reconstruct(test[:1000]))
        return {"petals": np.mean([count_petals(image) == n for image, n in zip(x, self.labels)])}, parts


class Denoise(Pictures):
    """The clean image from a noisy one."""

    model = "ae"

    def given(self, y, rng):
        return spoil(y, self.args.noise, rng)

    def show(self, trainer):
        """Denoise all held-out images: PSNR before and after, and of the median filter."""
        test, noisy = self.test, spoil(self.test, self.args.noise, np.random.default_rng((self.args.seed, 4)))
        answers = {"psnr_noisy": ("with noise", noisy), "psnr_median": ("after a median filter", median(noisy))}
        answers["psnr"] = "denoised", in_parts(trainer.reconstruct, noisy)
        figures = {name: psnr(y, test) for name, (_, y) in answers.items()}
        parts = {f"{caption}: {figures[name]:.1f} dB": y[:24] for name, (caption, y) in answers.items()}
        return figures, parts | {"without noise": test[:24]}


class Compress(Pictures):
    """Images to a few bytes: all held-out ones to OUT/test.codes and back. The decoder's bytes are not counted."""

    def show(self, trainer):
        """Bytes per image and PSNR; JPEG and WebP get as many bytes or more."""
        test, file = self.test, self.args.out / "test.codes"
        sigma = trainer.encode(floats(self.train[:1000]))[1]
        file.write_bytes(pack(in_parts(lambda x: trainer.encode(x)[0], test), np.sqrt((sigma**2).mean(0))))
        data = file.read_bytes()
        answers = {"": ("latents", in_parts(trainer.decode, unpack(data, self.args.latent)), len(data))}
        answers |= {f"_{form.lower()}": (form, *rival(form, test, len(data))) for form in ("JPEG", "WebP")}
        figures, parts = {}, {"held-out images": test[:24]}
        for end, (caption, y, size) in answers.items():
            figures |= {f"bytes{end}": round(size / len(test), 2), f"psnr{end}": psnr(y, test)}
            parts[f"{caption}: {size / len(test):.1f} bytes per image, {figures[f'psnr{end}']:.1f} dB"] = y[:24]
        return figures, parts

    def report(self, trainer):
        figures, files = super().report(trainer)
        return figures, [*files, "test.codes"]


TASKS = {"vae": Generate, "denoise": Denoise, "compress": Compress}
