# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "mlx[cpu]==0.32.4", "numpy", "pillow"]
# ///
"""Train the multilayer perceptron:  python train.py [--backend mlx] [--task binary] [--data mnist] [--grad by-hand]

Tasks: spiral (three arms, 3 classes), binary (two moons), regression (a noisy sine), digits (drawn, 28x28).
--data: mnist or fashion (28x28 again), or your own CSV: a header line, numeric features, the target as last column.
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
import time
import zlib
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TASKS = {
    "spiral": dict(loss="cross_entropy", hidden=[64, 64], steps=1000, batch_size=256, lr=0.01),
    "binary": dict(loss="binary_cross_entropy", hidden=[32, 32], steps=1000, batch_size=256, lr=0.01),
    "regression": dict(loss="mse", hidden=[64, 64], activation="tanh", steps=2000, batch_size=256, lr=0.01),
    "digits": dict(loss="cross_entropy", hidden=[512, 256], steps=2500, batch_size=128, lr=0.002),
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


def make_points(task, n, seed):
    """The embedded data of the plane: x (n, 2) and the class y (n,); for regression x (n, 1) and y (n, 1)."""
    rng = np.random.default_rng((seed, 2))
    t = rng.uniform(0, 1, n)
    if task == "regression":  # y = sin(x) and noise
        x = t[:, None] * 12 - 6
        return x, np.sin(x) + rng.normal(0, 0.2, x.shape)
    if task == "binary":  # two half-circles of radius 1, the second one upside down, each in the other's hollow
        y = rng.integers(0, 2, n)
        angle = np.pi * t
        x = np.stack([np.cos(angle), np.sin(angle)], 1)
        x[y == 1] = [1, 0.5] - x[y == 1]
        return x - [0.5, 0.25] + rng.normal(0, 0.12, x.shape), y
    y = rng.integers(0, 3, n)  # spiral: three arms, each four thirds of a turn, from radius 0.1 to 1
    radius, angle = 0.1 + 0.9 * t, 2 * np.pi * (y / 3 + 4 / 3 * t)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1) + rng.normal(0, 0.02, (n, 2)), y


def read_csv(path, loss):
    """A header line, then numeric features and the target as the last column; every fifth line is held out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()[1:]
        table = np.array([[float(cell) for cell in line.split(",")] for line in lines], ndmin=2)
    except (OSError, ValueError) as error:
        fail(f"{path} is no CSV of numbers ({error}): a header, then features and target, none of them missing")
    if table.shape[0] < 10 or table.shape[1] < 2 or not np.isfinite(table).all():
        fail(f"{path} must have a header, 10 lines or more and 2 columns or more, all of them numbers with no gap")
    x, y, held = table[:, :-1], table[:, -1:], np.arange(len(table)) % 5 == 4
    x = (x - x[~held].mean(0)) / (x[~held].std(0) + 1e-8)
    if loss != "mse":
        y = y[:, 0].astype(int)
        if (y != table[:, -1]).any() or y.min() < 0 or (loss == "binary_cross_entropy" and y.max() > 1):
            fail(f"{path}: the last column must hold class numbers from 0 up (0 or 1 for --task binary)")
    return x[~held], y[~held], x[held], y[held]


def load_data(args):
    """x_train, y_train, x_val, y_val: x (N, n_in) float32; y (N,) class numbers, or (N, 1) float32."""
    if args.data in IDX:
        data = load_idx(args.data)
    elif args.data:
        data = read_csv(args.data, args.loss)
    elif args.task == "digits":
        data = (*make_digits(20000, args.seed), *make_digits(2000, args.seed + 1))
    else:
        data = (*make_points(args.task, 5000, args.seed), *make_points(args.task, 2000, args.seed + 1))
    x_train, y_train, x_val, y_val = data
    if x_train.dtype == np.uint8:
        x_train, x_val = (x.reshape(len(x), -1) / 255 for x in (x_train, x_val))
    if args.loss == "cross_entropy":
        y_train, y_val = y_train.astype(np.int64), y_val.astype(np.int64)
    else:
        y_train, y_val = (y.astype(np.float32).reshape(-1, 1) for y in (y_train, y_val))
    return x_train.astype(np.float32), y_train, x_val.astype(np.float32), y_val


# ---- pictures --------------------------------------------------------------------------------------------------------

COLOURS = np.array([(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189)] * 2)
PAPER = (250, 250, 247)


def draw_regions(trainer, x, y):
    """The plane coloured by the class that the network gives each point, and the points x (N, 2) of class y over it."""
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
    """The points x (N, 1), y (N, 1) and the curve that the network drew through them."""
    width, height = 1280, 800
    low, high = np.array([x.min(), y.min()]) * 1.05, np.array([x.max(), y.max()]) * 1.05

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
    """Test digits with the answers: right ones in green; first the wrong ones, in red, with the truth behind them."""
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


# ---- the run ---------------------------------------------------------------------------------------------------------


def main():
    began = time.perf_counter()
    apple = (sys.platform, platform.machine()) == ("darwin", "arm64")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--backend", choices=["torch", "mlx"], default="mlx" if apple else "torch")
    parser.add_argument("--task", choices=TASKS, default="spiral")
    parser.add_argument("--data", help="mnist, fashion or a CSV file (default: embedded)")
    parser.add_argument("--hidden", type=int, nargs="*", help="widths of the hidden layers")
    parser.add_argument("--activation", choices=["relu", "sigmoid", "tanh"], default="relu")
    parser.add_argument("--optimizer", choices=["sgd", "momentum", "adam"], default="adam")
    parser.add_argument("--grad", choices=["autograd", "by-hand"], default="autograd")
    parser.add_argument("--steps", type=int, help="0: only evaluate and draw")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, help="the highest rate; it falls to 0 along a cosine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().with_name("out"))
    parser.add_argument("--resume", action="store_true", help="go on from OUT/ckpt.npz, whichever backend wrote it")
    parser.add_argument("--device", help="cuda, mps or cpu; MLX: gpu or cpu (default: the best there is)")
    asked = parser.parse_known_args()[0]
    parser.set_defaults(**TASKS["digits" if asked.data in IDX else asked.task])
    args = parser.parse_args()
    if min(args.steps, args.seed) < 0 or min([args.batch_size, *args.hidden]) < 1 or not 0 < args.lr < math.inf:
        fail("--steps and --seed must be 0 or more, --batch-size and --hidden 1 or more, --lr more than 0")
    args.log_every = max(1, args.steps // 20)

    ckpt = args.out / "ckpt.npz"
    saved = read_meta(ckpt, "mlp") if args.resume else None
    x_train, y_train, x_val, y_val = load_data(args)
    n_in, n_out = x_train.shape[1], max(y_train.max(), y_val.max()) + 1 if args.loss == "cross_entropy" else 1
    if args.batch_size > len(x_train):
        fail(f"--batch-size {args.batch_size} is more than the {len(x_train)} examples: make it smaller")
    net = load_twin(args)
    config = net.Config(n_in, args.hidden, int(n_out), args.activation, args.loss, args.optimizer, args.grad)
    if saved:
        config = net.Config(**saved["config"] | {"grad": args.grad})  # by hand or autograd, the gradients are the same
        if (config.n_in, config.n_out, config.loss) != (n_in, n_out, args.loss):
            fail(f"{ckpt} was trained on other data: repeat the --task and --data of that run")
    trainer = net.Trainer(config, seed=args.seed, device=args.device)
    start = trainer.load(ckpt) if saved else 0
    params = sum(w.size for w in net.get_weights(trainer.model).values())
    print(f"mlp: {args.backend} on {args.device}, {params:,} parameters; {args.data or args.task}: {len(x_train):,} to "
          f"train on, {len(x_val):,} held out; files go to {args.out}", flush=True)

    def batch(step):
        i = np.random.default_rng((args.seed, step, 1)).integers(0, len(x_train), args.batch_size)
        return x_train[i], y_train[i]

    def lr(step):
        return args.lr * (1 + math.cos(math.pi * step / args.steps)) / 2

    def evaluate():
        return {name: float(value) for name, value in trainer.evaluate(x_val, y_val).items()}

    speed = fit(trainer, batch, evaluate, lr, args, start)
    figures = evaluate()
    files = [ckpt] if ckpt.exists() else []
    pictures = {(784, "cross_entropy"): draw_answers, (1, "mse"): draw_fit}
    pictures |= {(2, loss): draw_regions for loss in ("cross_entropy", "binary_cross_entropy")}
    if picture := pictures.get((n_in, args.loss)):  # a table of more columns has none
        picture(trainer, x_val, y_val).save(args.out / "sample.png")
        files.append(args.out / "sample.png")
    result = {"backend": args.backend, "device": args.device, "params": params, "steps": args.steps}
    result |= {"seconds": round(time.perf_counter() - began, 2), "steps_per_s": round(speed, 1)} | figures
    print("result " + json.dumps(result | {"files": [str(file) for file in files]}))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head` has read enough; what is left to print has no reader
        os._exit(141)
