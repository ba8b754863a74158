"""The tasks: classify points in the plane, fit a curve, classify digits; or learn from your own CSV.

One class per task, all in numpy. To add a task, write one more class and add it to TASKS at the end.
"""

import argparse
import atexit
import gzip
import hashlib
import json
import os
import sys
import zlib
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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


def floats(images):
    return images.astype(np.float32) / 255


def make_spiral(n, seed):
    """Points (n, 2) on three spiral arms, each 4/3 turns long, from radius 0.1 to 1; and the arm of each, (n,)."""
    rng = np.random.default_rng((seed, 2))
    t, y = rng.uniform(0, 1, n), rng.integers(0, 3, n)
    radius, angle = 0.1 + 0.9 * t, 2 * np.pi * (y / 3 + 4 / 3 * t)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1) + rng.normal(0, 0.02, (n, 2)), y


def make_moons(n, seed):
    """Points (n, 2) on two interleaving half-circles of radius 1, and the half-circle of each, (n,)."""
    rng = np.random.default_rng((seed, 2))
    angle, y = np.pi * rng.uniform(0, 1, n), rng.integers(0, 2, n)
    x = np.stack([np.cos(angle), np.sin(angle)], 1)
    x[y == 1] = [1, 0.5] - x[y == 1]  # upside down
    return x - [0.5, 0.25] + rng.normal(0, 0.12, x.shape), y


def make_sine(n, seed):
    """x (n, 1) from -6 to 6, and y = sin(x) + noise, (n,)."""
    rng = np.random.default_rng((seed, 2))
    x = 12 * rng.uniform(0, 1, n) - 6
    return x[:, None], np.sin(x) + rng.normal(0, 0.2, n)


def read_csv(path):
    """The numbers of a CSV, (N, columns); a first line that is not all numbers is a header."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            try:
                list(map(float, f.readline().split(",")))
                header = 0
            except ValueError:
                header = 1
            f.seek(0)
            table = np.loadtxt(f, delimiter=",", comments=None, skiprows=header, ndmin=2)
    except (OSError, ValueError) as error:
        fail(f"{path} can't be read as a CSV ({error}): it needs rows of numbers separated by commas, none missing")
    if not (table.size and table.shape[1] <= 10000 and (np.abs(table) < 1e30).all()):
        fail(f"{path} must have at most 10,000 columns of numbers below 1e30, none missing")
    return table


def split(table, path):
    """Split features from the target: x (N, n_in), y (N,) to train on; then those of every fifth row, held out."""
    if table.shape[0] < 10 or table.shape[1] < 2:
        fail(f"{path} must have at least 10 rows and 2 columns: features, and the target in the last")
    x, y, held = table[:, :-1], table[:, -1], np.arange(len(table)) % 5 == 4
    return x[~held], y[~held], x[held], y[held]


def spread(a):
    """The mean and the standard deviation of each column, as lists; that of a constant column counts as 1."""
    mean, deviation = a.mean(0), a.std(0)
    return [mean.tolist(), np.where(deviation > 1e-9 * np.abs(mean), deviation, 1.0).tolist()]


def scaled(a, mean, deviation):
    """The columns of a minus their mean, divided by their standard deviation; float32."""
    return np.float32(((a - np.array(mean, a.dtype)) / np.array(deviation, a.dtype)).clip(-1e6, 1e6))


# ---- plots -----------------------------------------------------------------------------------------------------------

COLOURS = np.array([(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189)] * 2)
PAPER = (250, 250, 247)


def draw_regions(trainer, x, y):
    """The plane, coloured by predicted class, and on it the points x (N, 2), coloured by their class y."""
    low, high = x.min(0) - 0.1, x.max(0) + 0.1
    side, scale = 960, (960 - 1) / (high - low).max()
    grid = np.stack(np.meshgrid(np.arange(0, side, 2), np.arange(side, 0, -2)), -1).reshape(-1, 2) / scale
    p = trainer.predict((grid + (low + high - side / scale) / 2).astype(np.float32))
    if p.shape[1] == 1:
        p = np.concatenate([1 - p, p], 1)
    tint = 255 - 0.45 * (p @ (255.0 - COLOURS[np.arange(p.shape[1]) % 10]))
    image = Image.fromarray(tint.reshape(side // 2, side // 2, 3).astype(np.uint8)).resize((side, side))
    draw = ImageDraw.Draw(image)
    for (u, v), label in zip((x - (low + high - side / scale) / 2) * scale, y.astype(int).ravel()):
        draw.circle((u, side - v), 5, tuple(COLOURS[label % 10].tolist()), "white")
    return image.reduce(2)


def draw_fit(trainer, x, y):
    """The points x (N, 1), y (N, 1), and the network's curve through them."""
    width, height = 1280, 800
    low, high = np.array([x.min(), y.min()]), np.array([x.max(), y.max()])
    edge = 0.03 * (high - low) + 1e-9
    low, high = low - edge, high + edge

    def place(u, v):
        u, v = (u - low[0]) / (high - low)[0] * width, (high[1] - v) / (high - low)[1] * height
        return list(zip(u.ravel(), v.ravel()))

    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.line(place(np.array([low[0], high[0]]), np.zeros(2)), (200, 200, 200), 2)
    for point in place(x, y):
        draw.circle(point, 5, (160, 190, 215))
    line = np.linspace(x.min(), x.max(), 400, dtype=np.float32)[:, None]
    draw.line(place(line, trainer.predict(line)), tuple(COLOURS[3].tolist()), 8, joint="curve")
    return image.reduce(2)


def draw_answers(trainer, x, y, rows=6, columns=12):
    """Images x (N, 784) with the predictions: wrong ones first, in red, with the true class; right ones in green."""
    answers = trainer.predict(x).argmax(1)
    wrong, right = np.flatnonzero(answers != y), np.flatnonzero(answers == y)
    shown = [*wrong[: rows * columns // 2], *right][: rows * columns]
    image, font = Image.new("RGB", (columns * 66 + 6, rows * 84 + 6), PAPER), ImageFont.load_default(15)
    draw = ImageDraw.Draw(image)
    for place, i in enumerate(shown):
        u, v = 6 + place % columns * 66, 6 + place // columns * 84
        image.paste(Image.fromarray(255 - (x[i].reshape(28, 28) * 255).astype(np.uint8)).resize((60, 60)), (u, v))
        text, colour = (f"{answers[i]}", COLOURS[2]) if answers[i] == y[i] else (f"{answers[i]} not {y[i]}", COLOURS[3])
        draw.text((u + 30, v + 70), text, tuple(colour.tolist()), font, anchor="mm")
    return image


# ---- tasks -----------------------------------------------------------------------------------------------------------


class Examples(Task):
    """What the tasks share: features x (N, n_in) and targets y. Each has its own loss and its own plot."""

    batch_size = 256  # rows per step, without --batch-size

    def __init__(self, args, saved):
        self.args = args
        x, y, x_val, y_val = self.load()
        if args.batch_size is None:
            args.batch_size = min(self.batch_size, len(x))
        if args.batch_size > len(x):
            fail(f"--batch-size {args.batch_size} is more than the {len(x)} examples: make it smaller")
        plain = [[0.0], [1.0]]  # synthetic data need no scaling
        self.x_scale = (saved or {}).get("x_scale") or (spread(x) if args.data and args.data not in IDX else plain)
        if len(self.x_scale[0]) not in (1, x.shape[1]):
            fail(f"--data {args.data} has {x.shape[1]} features, the checkpoint {len(self.x_scale[0])}")
        self.x, self.x_val = scaled(x, *self.x_scale), scaled(x_val, *self.x_scale)
        self.y, self.y_val = self.answers(y), self.answers(y_val)
        n_out = 1 if self.y.ndim > 1 else int(max(self.y.max(), self.y_val.max())) + 1
        self.config = dict(n_in=x.shape[1], n_out=n_out, loss=self.loss)
        self.extra = dict(digest=digest(self.x, self.y), x_scale=self.x_scale)
        self.rows = read_csv(args.predict) if args.predict else None
        if args.predict and self.rows.shape[1] != x.shape[1]:
            fail(f"--predict {args.predict} has {self.rows.shape[1]} columns: it needs only the {x.shape[1]} features")
        few = f", each worth {1 / len(x_val):.0%}" if len(x_val) < 100 else ""
        self.about = f"{args.data or args.task}: {len(x):,} to train on, {len(x_val):,} held out{few}"

    def load(self):
        """x and y to train on, then held-out ones: from the user's CSV, or synthetic."""
        if self.args.data in IDX:
            fail(f"--data {self.args.data} is for --task digits, not {self.args.task}")
        if self.args.data:
            return split(read_csv(self.args.data), self.args.data)
        return *self.make(5000, self.args.seed), *self.make(2000, self.args.seed + 1)

    def batch(self, step):
        i = np.random.default_rng((self.args.seed, step, 1)).integers(0, len(self.x), self.args.batch_size)
        return self.x[i], self.y[i]

    def evaluate(self, trainer, whole=False):
        return trainer.evaluate(self.x_val, self.y_val)

    def report(self, trainer):
        files = []
        if self.rows is not None:
            parts = np.array_split(scaled(self.rows, *self.x_scale), len(self.rows) // 10000 + 1)
            answers, file = self.named(np.concatenate(list(map(trainer.predict, parts)))), "predictions.csv"
            columns, header = np.stack([*answers.values()], 1), ",".join(answers)
            np.savetxt(self.args.out / file, columns, "%.9g", ",", header=header, comments="")
            files.append(file)
        if self.x.shape[1] == self.columns:  # a table with more columns can't be plotted
            self.draw(trainer, self.x_val, self.y_val).save(self.args.out / "sample.png")
            files.append("sample.png")
        return {}, files


class Spiral(Examples):
    """Classify: which of three arms, or the class in the last column of a CSV."""

    loss, columns, top = "cross_entropy", 2, 1000  # top: the highest class number
    make, draw = staticmethod(make_spiral), staticmethod(draw_regions)

    def answers(self, y):
        """Class numbers (N,) int64."""
        if (y % 1).any() or y.min() < 0 or y.max() > self.top:
            fail(f"{self.args.data}: the last column must hold class numbers, integers from 0 to {self.top}")
        return y.astype(np.int64)

    def named(self, p):
        """The most likely class and the probability of each, {column: (N,)}, from the network's output."""
        return {"class": p.argmax(1), **{f"p{k}": p[:, k] for k in range(p.shape[1])}}


class Binary(Spiral):
    """Classify as 0 or 1: which of two moons, or the class in the last column of a CSV."""

    loss, top, make = "binary_cross_entropy", 1, staticmethod(make_moons)

    def answers(self, y):
        """0 or 1, (N, 1) float32."""
        return np.float32(super().answers(y))[:, None]

    def named(self, p):
        """The more likely class, and the probability of 1."""
        return {"class": p[:, 0] > 0.5, "p1": p[:, 0]}


class Regression(Examples):
    """Predict a number: a noisy sine, or the last column of a CSV. Scaled for training; figures are in y's units."""

    loss, columns = "mse", 1
    make, draw = staticmethod(make_sine), staticmethod(draw_fit)

    def __init__(self, args, saved):
        self.y_scale = saved.get("y_scale", [[0.0], [1.0]]) if saved else None  # older checkpoints did not scale y
        super().__init__(args, saved)
        self.extra["y_scale"] = self.y_scale

    def answers(self, y):
        """Numbers (N, 1) float32, all scaled like the training set, which comes first."""
        self.y_scale = self.y_scale or spread(y[:, None])
        return scaled(y[:, None], *self.y_scale)

    def evaluate(self, trainer, whole=False):
        error = float(super().evaluate(trainer)["val_loss"])
        figures = {"val_loss": error * self.y_scale[1][0] ** 2}
        return figures | {"r2": 1 - error / max(self.y_val.var(), 1e-12)} if whole else figures

    def named(self, p):
        """The predictions, in the original units."""
        return {"prediction": p[:, 0].astype(np.float64) * self.y_scale[1][0] + self.y_scale[0][0]}


class Digits(Spiral):
    """Classify images: ten digits, or ten kinds of clothing."""

    columns, top, batch_size, draw = 784, 9, 128, staticmethod(draw_answers)

    def load(self):
        data, seed = self.args.data, self.args.seed
        if data and data not in IDX:
            fail(f"--task digits takes mnist or fashion, not {data}: a CSV is for --task spiral, binary or regression")
        arrays = load_idx(data) if data else (*make_digits(20000, seed), *make_digits(2000, seed + 1))
        x, y, x_val, y_val = arrays
        if not (x.ndim == x_val.ndim == 3 and 0 < len(x) == len(y) and 0 < len(x_val) == len(y_val)):
            fail(f"the files of --data {data} do not fit together: delete them, and they will be downloaded again")
        return floats(x).reshape(-1, 784), y, floats(x_val).reshape(-1, 784), y_val


TASKS = {"spiral": Spiral, "binary": Binary, "regression": Regression, "digits": Digits}
