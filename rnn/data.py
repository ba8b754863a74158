"""The tasks: generate text, forecast many variables, recognise and synthesise spoken words, recall a distant number.

One class per task, all in numpy. To add a task, write one more class and add it to TASKS at the end.
"""

import argparse
import atexit
import csv
import hashlib
import json
import math
import os
import pydoc_data.topics
import sys
import time
import wave
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RATE = 8000  # audio samples per second

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


# ---- text ------------------------------------------------------------------------------------------------------------


def load_text(name):
    """Load tinyshakespeare, a text file or, without a name, Python's manual, less rulers and repeated paragraphs."""
    if not name:
        lines = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())).split("\n")
        paragraphs = "\n".join(line for line in lines if not line or set(line) - set("*=-~^")).split("\n\n")
        return "\n\n".join(dict.fromkeys(paragraphs))
    if name == "tinyshakespeare":
        home = "karpathy/char-rnn@master/data/tinyshakespeare/input.txt"
        raw = f"https://raw.githubusercontent.com/{home.replace('@', '/')}"
        name = fetch("tinyshakespeare.txt", "6fb458f1232090904fb40fe944165e91", raw, f"https://cdn.jsdelivr.net/gh/{home}")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{name} can't be read as text ({error}): name a file in UTF-8, or tinyshakespeare")
    if not text or "\0" in text:
        fail(f"{name} is empty or binary: name a text file in UTF-8, or tinyshakespeare")
    return text


class Letters:
    """Each character is a token; its id is its place in the alphabet."""

    def __init__(self, alphabet):
        self.alphabet, self.vocab_size = alphabet, len(alphabet)
        self.codes = np.array([ord(c) for c in alphabet])

    def encode(self, text):
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = np.searchsorted(self.codes, codes).clip(max=self.vocab_size - 1)
        if unknown := set(codes[self.codes[ids] != codes].tolist()):
            fail(f"the model's alphabet lacks {', '.join(repr(chr(c)) for c in sorted(unknown)[:5])}: leave them out")
        return ids.astype(np.int64)

    def decode(self, token):
        return self.alphabet[token]


class Text(Task):
    """Predict each character from all before it. Each row of a batch is a stream that continues from step to step."""

    def __init__(self, args, saved):
        text, self.args, T = load_text(args.data), args, args.length
        train, held = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]  # the last tenth: validation, then test
        alphabet = saved["alphabet"] if saved else "".join(sorted(set(train)))
        self.tokenizer = Letters(alphabet)
        self.train = self.tokenizer.encode(train)
        self.val, self.test = np.array_split(self.tokenizer.encode("".join(c for c in held if c in alphabet)), 2)
        if len(self.train) // args.batch_size <= T or len(self.test) <= T:
            need = 10 * max(2 * T + 2, args.batch_size * (T + 1) // 9 + 1)
            fail(f"{len(text)} characters are too few for --batch-size {args.batch_size} and --length {T}: give {need}")
        if args.prompt is None:
            args.prompt = "The " if set("The ") <= set(alphabet) else alphabet[0]
        if not args.prompt:
            fail("--prompt must not be empty")
        self.prompt = self.tokenizer.encode(args.prompt)[None]
        self.config = dict(vocab_size=len(alphabet), n_out=len(alphabet))
        self.extra = dict(alphabet=alphabet, digest=digest(self.train))
        n = len(self.train), len(self.val) + len(self.test)
        self.about = f"{args.data or 'Python manual'}: {n[0]:,} characters to train on, {n[1]:,} held out"

    def batch(self, step):
        B, T = self.args.batch_size, self.args.length
        stream = len(self.train) // B
        epoch, part = divmod(step, (stream - 1) // T)
        shift = np.random.default_rng((self.args.seed, epoch, 1)).integers(0, len(self.train))
        at = shift + np.arange(B)[:, None] * stream + part * T + np.arange(T + 1)
        x = self.train[at % len(self.train)]  # (B, T + 1)
        return x[:, :-1], x[:, 1:], np.full(B, part > 0, np.float32)

    def evaluate(self, trainer, whole=False):
        figures, rows = {}, min(32 if whole else 16, len(self.test) // (self.args.length + 1))
        for name, ids in [("val_loss", self.val), ("test_loss", self.test)][: 1 + whole]:
            T = len(ids) // rows - 1 if whole else min(512, len(ids) // rows - 1)
            x = ids[np.arange(rows)[:, None] * (len(ids) // rows) + np.arange(T + 1)]
            figures[name] = float(trainer.evaluate(x[:, :-1], x[:, 1:])["val_loss"])
        return figures

    def report(self, trainer):
        args, text, began = self.args, [self.args.prompt], time.perf_counter()
        print(f"\n{args.prompt}", end="", flush=True)
        for token in trainer.generate(self.prompt, args.tokens, args.temperature, args.seed):
            text.append(self.tokenizer.decode(int(token[0])))
            print(text[-1], end="", flush=True)
        print("\n")
        (args.out / "sample.txt").write_text("".join(text), encoding="utf-8")
        return {"written_per_s": round(args.tokens / (time.perf_counter() - began), 1)}, ["sample.txt"]


# ---- series ----------------------------------------------------------------------------------------------------------


def make_weather(seed):
    """Two years of synthetic hourly weather: the names of the variables, and (N, 5).

    The yearly and daily cycles are cosines. The fronts are chaotic: in the model of Lorenz 1984, "Irregularity", a wave
    travels in the westerly wind x, faster where x is stronger, and feeds on it. Its phase z is the trough, with low
    pressure, clouds, wind and moisture; its phase y is the warm air ahead of the trough, and the cold air behind it.
    Clouds halve the daily cycle. The rest is noise that is correlated over some hours.
    """
    rng, N = np.random.default_rng((seed, 5)), 730 * 24
    hour = np.arange(N)

    def noise(memory, size):  # an autoregression: correlated over `memory` hours, of standard deviation `size`
        keep, x = math.exp(-1 / memory), rng.normal(0, size, N)
        for i in range(1, N):
            x[i] = keep * x[i - 1] + math.sqrt(1 - keep**2) * x[i]
        return x

    def flow(x, y, z):  # sums and products are equal on all machines: chaos would amplify any difference
        return 2 - y * y - z * z - x / 4, x * y - 4 * x * z - y + 1, 4 * x * y + x * z - z

    state, states = rng.random(3).tolist(), []
    for _ in range(N):  # one unit of time is five days; the midpoint method
        middle = [s + ds / 240 for s, ds in zip(state, flow(*state))]
        state = [s + ds / 120 for s, ds in zip(state, flow(*middle))]
        states.append(state)
    x, y, z = np.array(states).T
    year, day = -np.cos(2 * np.pi * (hour / 24 - 15) / 365), -np.cos(2 * np.pi * (hour - 3) / 24)
    cloud = 100 / (1 + np.exp(0.6 - 1.5 * z - noise(9, 0.8)))
    temperature = 10 + 9 * year + (4.5 + 1.5 * year) * (1 - cloud / 200) * day + 3 * y + noise(30, 1.2)
    pressure = 1014 - 8 * z + noise(60, 3)
    humidity = (72 - 12 * day * (1 - cloud / 200) + 7 * z - 6 * year + noise(8, 4)).clip(15, 100)
    wind = (1 + 3 * x + 1.5 * z + 0.8 * day + noise(5, 1)).clip(0, None)
    names = "temperature pressure humidity wind cloud".split()
    return names, np.stack([temperature, pressure, humidity, wind, cloud], 1)


GAPS = {"", "na", "nan", "n/a", "null", "none", "?", "-"}
CYCLES = {"year": 10000, "month": 12, "day": 31, "weekday": 7, "hour": 24, "minute": 60}  # calendar columns


def read_column(cells):
    """Parse a column: (N,) numbers and False, or days since 1970 and True if the cells are dates.

    Dates look like 2024-03-31, 2024/03/31 or 2024-03-31T18:00Z. A gap becomes NaN; other text raises a ValueError.
    """
    cells = [cell.strip() for cell in cells]
    try:
        return np.array([math.nan if cell.lower() in GAPS else float(cell) for cell in cells]), False
    except ValueError:
        dates = np.array([cell.replace("/", "-").rstrip("Z") for cell in cells], "datetime64[s]")
        return np.where(np.isnat(dates), math.nan, dates.astype(np.float64) / 86400), True


def read_table(path):
    """Read a CSV with commas, semicolons or tabs: the names of V variables, and (N, V + C).

    The last C columns are the calendar: dates, and columns with a name in CYCLES, as sines and cosines of their cycles.
    A column that is constant in the first four fifths, which are trained on, is left out. A gap is filled with the
    value before it, one at the beginning with the first value.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            first = f.readline()
            f.seek(0)
            rows = [row for row in csv.reader(f, delimiter=max(",;\t", key=first.count)) if row]
    except (OSError, ValueError, csv.Error) as error:
        fail(f"{path} can't be read as a CSV ({error}): name one in UTF-8, with a header")
    try:
        header = [f"v{i}" for i, cell in enumerate(rows[0]) if read_column([cell])]
        print(f"{path} has no header: the columns are called {', '.join(header[:3])} ...")
    except (IndexError, ValueError):  # an empty file, or words in the first line
        header, rows = rows[:1] and rows[0], rows[1:]
    if len(rows) < 5:
        fail(f"{path} has {len(rows)} lines of values: 5 or more are needed")
    names, columns, calendar, waves, left_out, gaps, cut = [], [], [], [], [], 0, len(rows) * 4 // 5
    for i, name in enumerate(header):
        try:
            column, is_date = read_column([row[i] if i < len(row) else "" for row in rows])
        except ValueError:
            column, is_date = np.full(len(rows), math.nan), False
        there = np.abs(column) < 1e30  # larger values are not measurements
        known = column[:cut][there[:cut]]
        if not len(known) or np.ptp(known) == 0:  # no numbers, or a constant
            left_out.append(name)
            continue
        gaps += (~there).sum()
        column = column[np.maximum.accumulate(np.where(there, np.arange(len(column)), there.argmax()))]
        cycle = CYCLES.get(name.strip().lower(), 0)
        if is_date or 0 <= known.min() <= known.max() <= cycle:
            angles = [2 * np.pi * column / n for n in ((365.2425, 7, 1) if is_date else (cycle,))]  # year, week, day
            calendar.append(name)
            waves += [f(angle) for angle in angles for f in (np.sin, np.cos)]
        else:
            names.append(name)
            columns.append(column)
    if not names:
        fail(f"{path} has no column of numbers: it needs a header, then a line for each time")
    print(f"{path}: {', '.join(names)}; calendar: {', '.join(calendar) or 'none'}; "
          f"left out: {', '.join(left_out) or 'none'}; gaps filled forward: {gaps}")  # fmt: skip
    return names, np.stack(columns + waves, 1)


class Series(Task):
    """Forecast the next `horizon` values of all variables from the last `window`. The last fifth is held out."""

    noise = 0.5  # added to training inputs, which have standard deviation 1, so that no window is memorised

    def __init__(self, args, saved):
        names, table = read_table(args.data) if args.data else make_weather(args.seed)
        self.args, self.names, V, W, H = args, names, len(names), args.window, args.horizon
        self.cut, need = len(table) * 4 // 5, 5 * (W + 2 * H)
        if len(table) < need:
            fail(f"{len(table)} lines are too few for --window {W} and --horizon {H}: {need} are needed")
        self.mean, self.std = table[: self.cut].mean(0), table[: self.cut].std(0) + 1e-8
        self.mean[V:], self.std[V:] = 0, 1  # the calendar stays as it is
        self.table = ((table - self.mean) / self.std).astype(np.float32)
        # the seasonal forecast repeats what was one season ago: the lag with the least error in the training part
        past = self.table[: self.cut]
        lags = range(H, max(H, min(400, self.cut // 2)) + 1)
        self.season = min(lags, key=lambda lag: np.square(past[lag:, :V] - past[:-lag, :V]).mean())
        self.starts = np.arange(self.cut, len(table) - H + 1)  # of the forecasts
        # two ridge regressions, (back V + C + 1, horizon V): one that the network improves on, one to compare it with
        some, self.weights = np.linspace(W, self.cut - H, min(self.cut - H - W + 1, 10_000)).astype(int), {}
        for back in (1, min(W, 24)):
            x, y = self.recent(some, back), self.truth(some)
            self.weights[back] = np.linalg.solve(x.T @ x + 100 * np.eye(x.shape[1]), x.T @ y)
        self.config = dict(n_in=V + table.shape[1], n_out=H * V, read="last", loss="mse")
        self.extra = dict(digest=digest(past))
        n = self.cut, len(table) - self.cut
        self.about = f"{args.data or 'synthetic weather'}: {n[0]:,} time steps to train on, {n[1]:,} held out"

    def truth(self, at):
        """The true values of the `horizon` steps that begin at the times `at`: (B, horizon V)."""
        return self.table[at[:, None] + np.arange(self.args.horizon), : len(self.names)].reshape(len(at), -1)

    def recent(self, at, back):
        """The last `back` values of each variable before `at`, the calendar and a one: (B, back V + C + 1)."""
        V = len(self.names)
        x = self.table[at[:, None] + np.arange(-back, 0), :V].reshape(len(at), -1)
        return np.concatenate([x, self.table[at - 1, V:], np.ones((len(at), 1))], 1)

    def linear(self, at, back):
        """The forecast of the regression on the last `back` values: (B, horizon V)."""
        return self.recent(at, back) @ self.weights[back]

    def windows(self, at):
        """Inputs (B, window, 2 V + C) and targets (B, horizon V) of the forecasts made at the times `at`.

        The inputs are the variables minus their last values, which is the same at any level, the values themselves and
        the calendar. The targets are what the regression on the last values alone leaves unexplained.
        """
        x, V = self.table[at[:, None] + np.arange(-self.args.window, 0)], len(self.names)
        y = self.truth(at) - self.linear(at, 1)
        return np.concatenate([x[..., :V] - x[:, -1:, :V], x], -1), y.astype(np.float32)

    def batch(self, step):
        last = self.cut - self.args.horizon + 1
        rng = np.random.default_rng((self.args.seed, step, 1))
        x, y = self.windows(rng.integers(self.args.window, last, self.args.batch_size))
        return x + rng.normal(0, self.noise, x.shape).astype(np.float32), y

    def evaluate(self, trainer, whole=False):
        starts = self.starts if whole else self.starts[:: math.ceil(len(self.starts) / 256)]
        total = 0.0
        for part in np.array_split(starts, math.ceil(len(starts) / 256)):
            total += float(trainer.evaluate(*self.windows(part))["val_loss"]) * len(part)
        return {"val_loss": total / len(starts)}

    def forecasts(self, trainer):
        """{"combined", "network", ...}: (N, horizon, V), and the truth, in the table's units.

        Combined is the mean of the network's and the linear forecast, usually better than each (Bates & Granger 1969).
        """
        H, V, at = self.args.horizon, len(self.names), self.starts
        parts = np.array_split(at, math.ceil(len(at) / 256))
        ours = np.concatenate([trainer.predict(self.windows(part)[0]) + self.linear(part, 1) for part in parts])
        linear = np.concatenate([self.linear(part, min(self.args.window, 24)) for part in parts])
        answers = {"combined": (ours + linear) / 2, "network": ours, "linear": linear}
        answers |= {"persistence": np.tile(self.table[at - 1, :V], H), "seasonal": self.truth(at - self.season)}
        return {name: y.reshape(-1, H, V) for name, y in answers.items()}, self.truth(at).reshape(-1, H, V)

    def report(self, trainer):
        answers, truth = self.forecasts(trainer)
        rmse = {name: np.sqrt(np.square(answer - truth).mean((0, 1))) for name, answer in answers.items()}
        print(f"\nroot mean square error over {self.args.horizon} steps ahead; a season is {self.season} steps")
        print(f"{'':16}" + "".join(f"{name:>13}" for name in rmse))
        for v, name in enumerate(self.names):
            print(f"{name[:16]:16}" + "".join(f"{error[v] * self.std[v]:13.3f}" for error in rmse.values()))
        mean = {name: float(error.mean()) for name, error in rmse.items()}
        print(f"{'mean / std':16}" + "".join(f"{error:13.3f}" for error in mean.values()) + "\n")
        H, panels, answers["truth"] = self.args.horizon, [], truth
        n = min(len(truth) // H, max(1, 240 // H))  # forecasts, end to end
        for v, name in enumerate(self.names[:5]):
            lines = []
            for kind, colour in (("seasonal", SKY), ("combined", RED), ("truth", BLACK)):
                y = answers[kind][: n * H : H, :, v].ravel() * self.std[v] + self.mean[v]
                lines.append((np.arange(n * H), y, colour, kind))
            panels.append((f"{name}, {H} steps ahead", lines, False))
        plot(panels, 150 if len(panels) > 3 else 240).save(self.args.out / "sample.png", optimize=True)
        best = min(mean["persistence"], mean["seasonal"], mean["linear"])
        skill = 1 - mean["combined"] / best if best else math.nan  # nothing is better if the season repeats exactly
        return {"error": mean["combined"], "linear": mean["linear"], "skill": skill}, ["sample.png"]


# ---- speech ----------------------------------------------------------------------------------------------------------

PHONES = {  # three formants in Hz; loudness of the voice and of the noise; the noise's centre in Hz; duration in ms
    "z": (300, 1500, 2500, 0.4, 0.30, 3600, 90), "i": (300, 2250, 3000, 1.0, 0.00, 0, 100),
    "I": (400, 1950, 2550, 1.0, 0.00, 0, 80), "r": (350, 1100, 1600, 0.7, 0.00, 0, 70),
    "o": (500, 900, 2400, 1.0, 0.00, 0, 90), "u": (320, 900, 2250, 1.0, 0.00, 0, 110),
    "w": (300, 650, 2200, 0.7, 0.00, 0, 70), "A": (650, 1200, 2450, 1.0, 0.00, 0, 110),
    "n": (250, 1400, 2300, 0.5, 0.00, 0, 90), "t": (400, 1700, 2600, 0.0, 0.60, 3300, 40),
    "T": (400, 1400, 2500, 0.0, 0.15, 2800, 90), "a": (730, 1150, 2450, 1.0, 0.00, 0, 110),
    "f": (400, 1100, 2400, 0.0, 0.20, 2200, 100), "O": (570, 850, 2400, 1.0, 0.00, 0, 110),
    "v": (300, 1100, 2300, 0.5, 0.10, 2200, 70), "s": (400, 1700, 2600, 0.0, 0.50, 3600, 110),
    "k": (400, 1800, 2400, 0.0, 0.50, 1900, 40), "e": (530, 1850, 2500, 1.0, 0.00, 0, 90),
    "@": (500, 1450, 2450, 0.8, 0.00, 0, 60), ".": (450, 1500, 2500, 0.0, 0.00, 0, 50),
}  # fmt: skip
WORDS = "zIro wAn tu Tri fOr faIv sI.ks sev@n eI.t naIn".split()


def make_utterance(word, pitch, tract, pace, rng):
    """Source and filter: the harmonics of a pitch in Hz, and noise, shaped by formants that glide from phone to phone.

    A harmonic f is as loud as the source, 1/f, times the resonances F^2 / sqrt((F^2 - f^2)^2 + (B f)^2) of three tubes;
    `tract` scales all formants (a short vocal tract has high ones), `pace` the durations.
    """
    phones = np.array([PHONES[phone] for phone in word])
    ends = np.cumsum(phones[:, 6] * pace * rng.uniform(0.8, 1.25, len(phones))) / 1000 * RATE
    middles = (ends + np.concatenate([[0], ends[:-1]])) / 2
    t = np.arange(int(ends[-1]))
    F1, F2, F3, voice, hiss, centre, _ = (np.interp(t[::40], middles, column) for column in phones.T)  # every 5 ms
    formants = np.stack([F1, F2, F3]) * tract * rng.uniform(0.96, 1.04, (3, 1))
    rise = np.minimum(1, np.minimum(t, t[::-1]) / 200)  # no click at either end
    f0 = pitch * (1.12 - 0.25 * t / len(t) + 0.02 * np.sin(2 * np.pi * (5 * t / RATE + rng.random())))
    k = np.arange(1, int(3800 / f0.max()) + 1)[:, None]
    f = k * f0[::40]
    loud = np.prod([F**2 / np.sqrt((F**2 - f**2) ** 2 + (80 * f) ** 2) for F in formants], 0) * voice / k
    loud = np.stack([np.interp(t, t[::40], row) for row in loud])
    sound = (loud * np.sin(k * 2 * np.pi * np.cumsum(f0) / RATE)).sum(0)
    noise, shape = rng.normal(size=len(t)), np.zeros(len(t))
    for low in range(0, len(t), 200):  # 25 ms of noise at a time, filtered by a bell around its centre
        S, mid = np.fft.rfft(noise[low : low + 200]), min((low + 100) // 40, len(centre) - 1)
        bell = np.exp(-(((np.fft.rfftfreq(len(noise[low : low + 200]), 1 / RATE) - centre[mid]) / 900) ** 2))
        shape[low : low + 200] = np.fft.irfft(S * bell, len(noise[low : low + 200]))
    sound = (sound / 1.5 + shape * np.interp(t, t[::40], hiss)) * rise
    return sound / np.abs(sound).max() * rng.uniform(0.5, 0.9) + rng.normal(0, 0.001, len(t))


def make_speech(seed, speakers=8, takes=6):
    """Digits spoken by synthetic voices: sounds, labels "0" ... "9", speakers."""
    rng, sounds = np.random.default_rng((seed, 8)), []
    for _ in range(speakers):
        pitch, tract, pace = rng.uniform(90, 230), rng.uniform(0.9, 1.18), rng.uniform(0.85, 1.2)
        for word in WORDS * takes:
            voice = pitch * rng.uniform(0.93, 1.07), tract, pace * rng.uniform(0.9, 1.1)
            sounds.append(make_utterance(word, *voice, rng))
    return sounds, [*"0123456789"] * takes * speakers, [f"voice{i}" for i in range(speakers) for _ in range(takes * 10)]


def read_wav(path):
    """A WAV file of 8 or 16 bits as (N,) in [-1, 1] at RATE: the mean of its channels, resampled linearly.

    Frequencies above half the new rate are removed first, as they would alias to lower ones.
    """
    try:
        with wave.open(str(path)) as f:
            if not 4000 <= f.getframerate() <= 384_000:
                raise ValueError(f"its rate is {f.getframerate()} Hz")
            raw, (channels, width, rate) = f.readframes(f.getnframes()), f.getparams()[:3]
        x = np.frombuffer(raw, {1: np.uint8, 2: "<i2"}[width]).astype(np.float64)
        x = ((x - 128) / 128 if width == 1 else x / 32768).reshape(-1, channels).mean(1)
        if rate > RATE:
            spectrum = np.fft.rfft(x)
            spectrum[len(spectrum) * RATE // rate :] = 0
            x = np.fft.irfft(spectrum, len(x))
        return np.interp(np.arange(0, len(x) - 1, rate / RATE), np.arange(len(x)), x)
    except (OSError, EOFError, wave.Error, KeyError, ValueError) as error:
        fail(f"{path} can't be read as a WAV file of 8 or 16 bits ({error}): remove it from the folder")


def read_speech(folder):
    """Sounds, labels and speakers of {label}_{speaker}_{take}.wav."""
    files = [file for file in sorted(Path(folder).glob("*.wav")) if file.stem.count("_") == 2]
    labels, speakers = ([file.stem.split("_")[i] for file in files] for i in (0, 1))
    if len(set(labels)) < 2 or len(set(speakers)) < 2:
        fail(f"{folder} must hold files {{label}}_{{speaker}}_{{take}}.wav of at least two labels and two speakers")
    return [read_wav(file) for file in files], labels, speakers


def write_wav(path, x):
    with wave.open(str(path), "wb") as f:
        f.setparams((1, 2, RATE, 0, "NONE", "not compressed"))
        f.writeframes((x * 32767).round().clip(-32768, 32767).astype("<i2").tobytes())


def mu_law(x):
    """Samples in [-1, 1] to 0 ... 255: sign(x) log(1 + 255 |x|) / log 256, so that quiet ones get finer steps."""
    return np.rint((np.sign(x) * np.log1p(255 * np.abs(x)) / math.log(256) + 1) * 127.5).astype(np.int64)


def from_mu_law(code):
    y = code / 127.5 - 1
    return np.sign(y) * np.expm1(np.abs(y) * math.log(256)) / 255


def emphasise(x):
    """x_t - 0.85 x_t-1, scaled to a peak of 1: noise would drown speech's high frequencies, which are weak."""
    x = np.append(x[:1], x[1:] - 0.85 * x[:-1])
    return x / np.abs(x).max(initial=1e-6)


def restore(x):
    """The inverse."""
    x = x.copy()
    for t in range(1, len(x)):
        x[t] += 0.85 * x[t - 1]
    return x / np.abs(x).max(initial=1e-6)


def periodicity(x, n=320):
    """How much a voice repeats itself: 1 for a perfect tone, less the hoarser it is.

    The correlation of 40 ms of x with 40 ms that begin 3 to 14 ms later, a period of the voice; the median where x is
    loud.
    """
    best, power, low, high = [], [], RATE // 320, RATE // 70
    for at in range(0, len(x) - n - high, n // 4):
        now, later = x[at : at + n], np.lib.stride_tricks.sliding_window_view(x[at + low : at + high + n], n)
        best.append((later @ now / np.sqrt((later**2).sum(1) * (now @ now) + 1e-9)).max())
        power.append(now @ now)
    return float(np.median(np.array(best)[np.array(power) > 0.1 * max(power, default=0)]))  # NaN if x is too short


def mel_filters(n_mel, size):
    """Triangles (size // 2 + 1, n_mel) over the bins of a spectrum, evenly spaced in mel = 2595 log10(1 + f / 700)."""
    mel = np.linspace(2595 * math.log10(1 + 60 / 700), 2595 * math.log10(1 + RATE / 2 / 700), n_mel + 2)
    f, bins = 700 * (10 ** (mel / 2595) - 1), np.arange(size // 2 + 1)[:, None] * RATE / size
    return np.minimum((bins - f[:-2]) / (f[1:-1] - f[:-2]), (f[2:] - bins) / (f[2:] - f[1:-1])).clip(0)


def log_mel(x, n_mel, size=160, hop=128):
    """log of the power in mel bands, (frames, n_mel): 20 ms under a Hann window, every 16 ms."""
    x = np.pad(x, (0, max(0, size - len(x))))
    frames = np.lib.stride_tricks.sliding_window_view(x, size)[::hop] * np.hanning(size + 1)[:-1]
    return np.log(np.abs(np.fft.rfft(frames)) ** 2 @ mel_filters(n_mel, size) + 1e-5)


def stretch(frames, n):
    """Resample to n evenly spaced frames: some are dropped or repeated."""
    return frames[np.arange(n) * len(frames) // n]


def load_speech(args, drawn=0):
    """Sounds with a peak of 1; labels as numbers; their names; speakers as numbers, -1 for the one who is held out.

    If the recordings are of digits, `drawn` synthetic voices are added to them.
    """
    sounds, labels, speakers = read_speech(args.data) if args.data else make_speech(args.seed)
    args.held_out = args.held_out or max(speakers)
    if args.held_out not in speakers:
        fail(f"--held-out {args.held_out}: the speakers are {', '.join(sorted(set(speakers)))}")
    names = sorted(set(labels))
    if args.data and drawn and set(names) & set("0123456789"):
        for sound, label, speaker in zip(*make_speech(args.seed, drawn, takes=2)):
            if label in names:
                sounds.append(sound)
                labels.append(label)
                speakers.append(f"drawn {speaker}")
    sounds = [sound / np.abs(sound).max(initial=1e-6) for sound in sounds]
    known = sorted(set(speakers) - {args.held_out})
    who = np.array([known.index(speaker) if speaker in known else -1 for speaker in speakers])
    return sounds, np.array([names.index(label) for label in labels]), names, who


class Speech(Task):
    """Recognise a spoken word from its log-mel frames: one answer, after the last. One speaker is held out.

    The mean over all words of a voice, its timbre and its microphone, is subtracted first. That needs no labels, so the
    held-out voice is treated the same. Recordings of digits are mixed with 24 synthetic voices for training.
    """

    frames, bands = 48, 12

    def __init__(self, args, saved):
        self.args, self.mels = args, []
        sounds, self.y, self.names, self.who = load_speech(args, drawn=24)
        for sound in sounds:
            mel = log_mel(sound, self.bands)
            loud = np.flatnonzero(mel.max(1) > mel.max() - 4)
            mel = mel[loud[0] : loud[-1] + 1]  # from the first loud frame to the last
            self.mels.append(stretch(mel - mel.mean(), max(2, len(mel))))
        for voice in np.unique(self.who):
            own = np.flatnonzero(self.who == voice)
            mean = np.concatenate([self.mels[i] for i in own]).mean(0)
            for i in own:
                self.mels[i] = self.mels[i] - mean
        self.train, self.val = np.flatnonzero(self.who >= 0), np.flatnonzero(self.who < 0)
        self.config = dict(n_in=3 * self.bands, n_out=len(self.names), read="last")
        self.extra = dict(digest=digest(*(self.mels[i] for i in self.train)))
        n = len(self.train), len(self.val)
        self.about = f"{args.data or 'spoken digits'}: {n[0]:,} words to train on, {n[1]:,} of {args.held_out} held out"
        self.about += f", each {1 / n[1]:.0%} of the accuracy" if n[1] < 100 else ""

    def vary(self, i, rng):
        """Word i as another speaker might say it in another room: a few voices have to stand for many.

        Varies the pace, the length of the vocal tract, the microphone, the background noise, and the voice, towards
        another one that says the same word. The last needs the label, so this is for training only.
        """
        pace, tract = rng.uniform(0.6, 1.6), rng.uniform(0.82, 1.22)  # a longer tract moves all formants down
        mel = stretch(self.mels[i], max(2, round(len(self.mels[i]) / pace)))
        at = (np.arange(self.bands) * tract).clip(0, self.bands - 1)
        low = at.astype(int).clip(max=self.bands - 2)
        mel = mel[:, low] * (low + 1 - at) + mel[:, low + 1] * (at - low)
        band = (np.arange(self.bands) + 0.5) / self.bands
        mel = mel + sum(0.4 * rng.normal() / k * np.cos(np.pi * k * band) for k in range(1, 5))  # a microphone's curve
        floor = rng.uniform(5, 11)  # what is quieter drowns in noise
        mel = np.logaddexp(mel, mel.max() - floor)
        alike = np.flatnonzero((self.y == self.y[i]) & (self.who != self.who[i]) & (self.who >= 0))
        if len(alike) and rng.random() < 0.7:  # some way towards another speaker of the word, past them, or away
            other = stretch(self.mels[rng.choice(alike)], len(mel))
            other = np.logaddexp(other, other.max() - floor)
            mel = mel + rng.uniform(-0.5, 1.5) * (other - other.mean(0) - mel + mel.mean(0))
        return mel

    def features(self, number, rng=None):
        """(B, frames, 3 bands), zero-padded at the start: minus each band's mean, minus the mean of all, and slopes."""
        x = np.zeros((len(number), self.frames, 3 * self.bands), np.float32)
        for row, i in zip(x, number):
            mel = self.mels[i]
            mel = np.logaddexp(mel, mel.max() - 7) if rng is None else self.vary(i, rng)  # a range of 30 dB
            parts = [mel - mel.mean(0), mel - mel.mean(), 2 * np.gradient(mel, axis=0)]
            if rng is not None:
                u = rng.random(3)  # drop some, so that none is relied on alone
                parts = [part * (u_i >= min(0.3, u.max())) for part, u_i in zip(parts, u)]
            mel = (np.concatenate(parts, 1) / (mel.std() + 1e-6))[-self.frames :]
            row[self.frames - len(mel) :] = mel
        return x

    def batch(self, step):
        rng = np.random.default_rng((self.args.seed, step, 1))
        number = rng.choice(self.train, self.args.batch_size)
        return self.features(number, rng), self.y[number]

    def evaluate(self, trainer, whole=False):
        some = self.val if whole else self.val[:: math.ceil(len(self.val) / 200)]
        return trainer.evaluate(self.features(some), self.y[some])

    def report(self, trainer):
        answers, K = trainer.predict(self.features(self.val)).argmax(1), len(self.names)
        counts = np.bincount(self.y[self.val] * K + answers, minlength=K * K).reshape(K, K)
        print("\nspoken \\ heard" + "".join(f"{name[:6]:>7}" for name in self.names))
        for name, row in zip(self.names, counts):
            print(f"{name[:14]:14}" + "".join(f"{n or '.':>7}" for n in row))
        print()
        return {}, []


class Speak(Task):
    """Sound, sample by sample: predict the next of 256 mu-law codes from those before, the word, the place, the voice.

    The place in the word is encoded by `places` overlapping bells, so that the network learns how each part of a
    word sounds. Conditioning on the voice keeps the pitch steady. A batch's rows are windows of `length` samples from
    anywhere in a word. Their inputs are noised, their targets are not: so the network learns to clean what it hears,
    which later is its own voice; without, each of its errors would lead to others, and the voice would be hoarse.
    """

    places, samples, noise = 12, 4096, 14  # at most, in codes

    def __init__(self, args, saved):
        self.args = args
        sounds, self.y, self.names, self.who = load_speech(args)
        self.codes = np.full((len(sounds), self.samples + 1), 128)
        for row, sound in zip(self.codes, sounds):
            row[1 : len(sound) + 1] = mu_law(emphasise(sound))[: self.samples]
        self.lengths = np.array([min(len(sound), self.samples) for sound in sounds])
        if args.length > self.lengths.min():
            fail(f"--length {args.length} is more than the shortest utterance, {self.lengths.min()} samples")
        self.train, self.val = np.flatnonzero(self.who >= 0), np.flatnonzero(self.who < 0)
        self.voices = np.unique(self.who[self.train])
        self.config = dict(vocab_size=256, n_in=len(self.names) * self.places + len(self.voices), n_out=256)
        self.extra = dict(digest=digest(self.codes[self.train]))
        n = len(self.train), len(self.val)
        self.about = f"{args.data or 'spoken digits'}: {n[0]:,} words to train on, {n[1]:,} of {args.held_out} held out"

    def beside(self, y, who, lengths, at):
        """The conditioning of the samples numbered `at`, (T,) or (B, T): (B, T, labels places + voices)."""
        place = at / lengths[:, None] * (self.places - 1)  # (B, T)
        bells = (1 - np.abs(place[..., None] - np.arange(self.places))).clip(0)  # 0 after the end
        onehot = np.eye(len(self.names))[y]
        word = (bells[:, :, None] * onehot[:, None, :, None]).reshape(*place.shape, -1)
        voice = np.broadcast_to((who[:, None] == self.voices)[:, None], (*place.shape, len(self.voices)))
        return np.concatenate([word, voice], -1).astype(np.float32)

    def batch(self, step):
        T, B, rng = self.args.length, self.args.batch_size, np.random.default_rng((self.args.seed, step, 1))
        number = rng.choice(self.train, B)
        begin = rng.uniform(-T, self.lengths[number] - T).clip(0).astype(int)  # often the beginning
        at = begin[:, None] + np.arange(T + 1)
        who = np.where(rng.random(B) < 0.1, -1, self.who[number])  # sometimes unknown, like a held-out voice
        codes = self.codes[number[:, None], at]  # (B, T + 1)
        beside = self.beside(self.y[number], who, self.lengths[number], at[:, :-1])
        noise = rng.uniform(0, self.noise, (B, 1)) * rng.normal(size=(B, T))
        x = np.rint(codes[:, :-1] + noise).clip(0, 255).astype(np.int64)
        return x, codes[:, 1:], np.zeros(B, np.float32), beside

    def evaluate(self, trainer, whole=False):
        some, total = self.val if whole else self.val[:: math.ceil(len(self.val) / 20)], 0.0
        n = self.lengths[self.val].min()  # the length of the shortest word, for all
        for part in np.array_split(some, math.ceil(len(some) / 50)):
            beside = self.beside(self.y[part], self.who[part], self.lengths[part], np.arange(n))
            x = self.codes[part, : n + 1]
            total += float(trainer.evaluate(x[:, :-1], x[:, 1:], beside)["val_loss"]) * len(part)
        return {"val_loss": total / len(some)}

    def report(self, trainer):
        y = np.arange(len(self.names))
        lengths = np.array([int(self.lengths[self.y == i].mean()) for i in y])
        n = lengths.max()
        beside = self.beside(y, 0 * y, lengths, np.arange(n))  # in the first voice
        said = trainer.generate(np.full((len(y), 1), 128), n, self.args.temperature, self.args.seed, beside)
        said = np.stack(list(said), 1)
        files, rows = [], []
        for i, name in enumerate(self.names):
            files.append(f"{name}.wav")
            first = np.flatnonzero((self.y == i) & (self.who == 0))[:1]
            codes = [said[i, : lengths[i]], *(self.codes[j, 1 : self.lengths[j]] for j in first)]
            rows.append([restore(from_mu_law(row)) for row in codes])
            write_wav(self.args.out / files[-1], rows[-1][0])
        draw_spectrograms(rows[:10], self.names).save(self.args.out / "sample.png", optimize=True)
        clear, real = (np.nanmean([periodicity(row[i]) for row in rows if len(row) > i]) for i in (0, 1))
        return {"periodicity": clear, "periodicity_real": real}, ["sample.png", *files]


# ---- gradients -------------------------------------------------------------------------------------------------------


class Gradients(Task):
    """Recall a number after a stretch of noise. How far back does the gradient reach?"""

    def __init__(self, args, saved):
        self.args, self.config = args, dict(n_in=1, n_out=1, read="last", loss="mse", radius=1.5)
        self.about = f"recall a number after {args.length - 1} steps; new sequences in each batch, 256 held out"

    def draw(self, n, *key):
        x = np.random.default_rng((self.args.seed, *key)).uniform(-1, 1, (n, self.args.length, 1)).astype(np.float32)
        x[:, 1:] *= 0.1
        return x, x[:, 0]

    def batch(self, step):
        return self.draw(self.args.batch_size, step, 1)

    def evaluate(self, trainer, whole=False):
        return trainer.evaluate(*self.draw(256, 2))

    def report(self, trainer):
        """|dh_T/ds_t| of new networks over T - t; and the same training twice, without and with clipping."""
        args, x, figures, T, lines = self.args, self.draw(1, 3)[0][0], {}, self.args.length, []
        config = replace(trainer.config, impl="by-hand", n_layer=1)
        shown = [back for back in (0, 5, 10, 20, 40, T - 1) if back < T]
        print("\n|dh_T/ds_t|, T - t =" + "".join(f"{back:>10}" for back in shown))
        for cell, colour in (("rnn", RED), ("lstm", BLUE), ("gru", GREEN)):
            for radius in (0.9, 2.0):
                new = type(trainer)(replace(config, cell=cell, radius=radius), args.seed, args.device)
                norms = np.nan_to_num(new.state_gradients(x)[::-1], nan=1e30, posinf=1e30)
                print(f"{cell:5} radius {radius:<9}" + "".join(f"{norms[back]:10.1e}" for back in shown))
                figures[f"{cell}_{radius}"] = float(norms[-1])
                tint = tuple((c + 510) // 3 for c in colour) if radius < 1 else colour
                lines.append((np.arange(T), norms, tint, f"{cell} {radius}"))
        panels = [("|dh_T/ds_t| over the distance T - t", lines, True)]
        curves, n = {"loss": [], "grad_norm": []}, min(args.steps, 150)
        for clip, colour in ((math.inf, RED), (args.clip, BLUE)):
            new = type(trainer)(replace(config, clip=clip), args.seed, args.device)
            steps = [new.step(*self.batch(step), lr=args.lr) for step in range(n)]
            label = f"clipped at {clip:g}" if clip < math.inf else "not clipped"
            for name, curve in curves.items():
                y = np.array([float(metrics[name]) for metrics in steps])
                y = np.where(np.isfinite(y), y, 1e6).clip(1e-3, 1e6)  # exploded values run along the upper edge
                curve.append((np.arange(n), y, colour, label))
            if n:
                loss, norm = (curve[-1][1] for curve in curves.values())
                print(f"{label:14} {n} steps: loss {loss[-10:].mean():.3g}, largest gradient {norm.max():.3g}")
        titles = {"loss": "loss per step", "grad_norm": "gradient norm before clipping, per step"}
        panels += [(titles[name], curve, True) for name, curve in curves.items() if n > 1]
        plot(panels).save(args.out / "sample.png", optimize=True)
        return figures, ["sample.png"]


# ---- plots -----------------------------------------------------------------------------------------------------------

BLACK, GREY, RED, SKY, GREEN = (40, 40, 40), (160, 160, 160), (214, 39, 40), (140, 190, 230), (44, 160, 44)
BLUE, PAPER = (31, 119, 180), (250, 250, 247)


def plot(panels, height=240):
    """Panels one below the other: (title, [(x, y, colour, label or "")], whether y is shown in powers of ten)."""
    scale, width, font = 2, 960, ImageFont.load_default(24)
    image = Image.new("RGB", (scale * width, scale * height * len(panels)), PAPER)
    draw = ImageDraw.Draw(image)
    for i, (title, lines, log) in enumerate(panels):
        left, right, top, bottom = 120, scale * width - 20, scale * height * i + 44, scale * height * (i + 1) - 20
        xs = np.concatenate([line[0] for line in lines])
        shown = [np.log10(np.maximum(line[1], 1e-30)) if log else np.asarray(line[1], float) for line in lines]
        ys = np.concatenate(shown)
        low, high = ys.min(), ys.max() + 1e-9
        step = 10.0 ** math.floor(math.log10(high - low))
        step = max(step * (0.5 if (high - low) / step < 2 else 1 if (high - low) / step < 5 else 2), 1 if log else 0)
        for tick in np.arange(math.ceil(low / step), high / step + 1e-9) * step:
            y = bottom - (tick - low) / (high - low) * (bottom - top)
            draw.line([(left, y), (right, y)], (225, 225, 225), 2)
            draw.text((left - 10, y), f"1e{tick:.0f}" if log else f"{tick:g}", GREY, font, anchor="rm")
        draw.text((left, top - 24), title, BLACK, font, anchor="lm")
        at = right
        for (x, _, colour, label), y in zip(lines, shown):
            u = left + (x - xs.min()) / (xs.max() - xs.min()) * (right - left)
            draw.line(list(zip(u, bottom - (y - low) / (high - low) * (bottom - top))), colour, 3, joint="curve")
            if label:
                draw.text((at, top - 24), label, colour, font, anchor="rm")
                at -= draw.textlength(label, font) + 30
    return image.reduce(scale).quantize(64)  # a small file


def draw_spectrograms(rows, names):
    """Spectrograms in pairs, the network's above the recording: [[sound, sound], ...] under their names."""
    cell_w, cell_h, font = 190, 120, ImageFont.load_default(14)
    image = Image.new("RGB", (5 * cell_w, -(-len(rows) // 5) * (2 * cell_h + 28)), PAPER)
    draw = ImageDraw.Draw(image)
    for i, row in enumerate(rows):
        u, v = i % 5 * cell_w, i // 5 * (2 * cell_h + 28)
        draw.text((u + 6, v + 14), f"{names[i]}: generated, recorded", BLACK, font, anchor="lm")
        for j, sound in enumerate(row):
            frames = np.lib.stride_tricks.sliding_window_view(np.pad(sound, (0, 256)), 256)[::32] * np.hanning(256)
            level = 20 * np.log10(np.abs(np.fft.rfft(frames)) + 1e-3)  # dB
            level = 255 - ((level - level.max() + 60) / 60).clip(0, 1) * 255
            picture = Image.fromarray(level.T[::-1].astype(np.uint8)).resize((cell_w - 8, cell_h - 6))
            image.paste(picture, (u + 4, v + 28 + j * cell_h))
    return image


TASKS = {"text": Text, "series": Series, "speech": Speech, "speak": Speak, "gradients": Gradients}
