# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "mlx[cpu]==0.32.4", "numpy", "pillow"]
# ///
"""Train an autoencoder:  python train.py [--backend mlx] [--task denoise] [--data mnist] [--net conv] [--latent 2] ...

Tasks: vae (a model of the pictures), denoise (the clean picture from a noisy one), compress (pictures to a few bytes).
--data: digits or flowers (drawn), mnist, fashion, cifar10, or your own folder of pictures.
"""

import argparse
import bisect
import gzip
import hashlib
import importlib
import io
import json
import lzma
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
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

TASKS = {
    "vae": dict(model="vae", likelihood="bernoulli", latent=20, steps=3000, lr=4e-3),
    "denoise": dict(model="ae", likelihood="bernoulli", latent=64, steps=1500, lr=2e-3),
    "compress": dict(model="vae", likelihood="gaussian", latent=64, std=0.05, steps=2000, lr=2e-3),
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
    """Pictures to train on (N, H, W, C) uint8, held-out ones float32, and the labels of these."""
    if args.data in IDX:
        train, _, test, labels = load_idx(args.data)
    elif args.data == "cifar10":
        (train, _, test, labels), _ = load_cifar10()
    elif args.data in ("digits", "flowers"):
        make = make_digits if args.data == "digits" else lambda n, seed: make_flowers(n, args.size, seed)
        (train, _), (test, labels) = make(args.count, args.seed), make(args.count // 5, args.seed + 1)
    else:
        train, _, test, labels = read_folder(args.data, args.size)
    return (train, floats(test), labels) if train.ndim == 4 else (train[..., None], floats(test)[..., None], labels)


def floats(images):
    return images.astype(np.float32) / 255


def pixels(x):
    return (x * 255).round().clip(0, 255).astype(np.uint8)


def psnr(x, y):
    """Peak signal-to-noise ratio of whole sets of pictures, in dB: -10 log10 of the mean squared error."""
    return -10 * math.log10(np.square(x - y, dtype=np.float64).mean())


def in_parts(function, x, n=1000):
    """function(x) for n rows of x at a time, so that a large set needs no large memory."""
    return np.concatenate([function(x[i : i + n]) for i in range(0, len(x), n)])


def spoil(x, noise, rng):
    """x with normal noise of that standard deviation, and still a picture: cut off at 0 and 1."""
    return (x + np.float32(noise) * rng.standard_normal(x.shape, np.float32)).clip(0, 1)


def jitter(images, amount, rng):
    """Each picture (N, H, W, C) uint8 turned, stretched and sheared by about that share, and shifted a little."""
    N, H, W, C = images.shape
    matrix, middle = np.eye(2) + rng.normal(0, amount, (N, 2, 2)), np.array([W / 2, H / 2])
    rows = np.dstack([matrix, middle - matrix @ middle + rng.uniform(-0.5, 0.5, (N, 2))]).reshape(N, 6)
    how = Image.Transform.AFFINE, Image.Resampling.BICUBIC
    bent = [Image.fromarray(image.squeeze()).transform((W, H), how[0], row, how[1]) for image, row in zip(images, rows)]
    return np.stack(bent).reshape(images.shape)


def median(x):
    """Pillow's median filter, 3x3, for each of the pictures (N, H, W, C)."""
    answers = [Image.fromarray(image.squeeze()).filter(ImageFilter.MedianFilter(3)) for image in pixels(x)]
    return floats(np.stack(answers)).reshape(x.shape)


# ---- compression -----------------------------------------------------------------------------------------------------


def pack(mu, sigma):
    """Latents (N, latent) as bytes. Each dimension is rounded in steps of its own, sqrt(12) sigma (latent,) wide.

    Rounding to such steps errs by sigma in the root mean square, as far as the noise that the decoder learnt to bear.
    A dimension that says nothing of x has mu near 0 and sigma near 1: all its numbers round to 0, and cost nothing.
    """
    step = (math.sqrt(12) * sigma).astype("<f4")
    codes = np.rint(mu / step).clip(-127, 127).astype(np.int8)
    return step.tobytes() + lzma.compress(codes.T.tobytes())  # by dimension: each has frequencies of its own


def unpack(data, latent):
    """What pack wrote, as the rounded latents (N, latent) float32."""
    codes = np.frombuffer(lzma.decompress(data[4 * latent :]), np.int8)
    return codes.reshape(latent, -1).T * np.frombuffer(data, "<f4", latent)


def rival(form, x, size):
    """The pictures x after JPEG or WebP, at the lowest quality that takes `size` bytes or more; and those bytes.

    All of them go into one file, as one sheet, so that its header counts once and not for each picture.
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


# ---- what a task shows: figures, and pictures under captions ---------------------------------------------------------


def show_vae(trainer, train, test, labels, args):
    """Reconstructions, samples of the prior, walks from one picture to another; with two latents also their map."""
    first = np.unique(labels, return_index=True)[1][:5]  # one of each label
    mu, share = trainer.encode(test[first])[0], np.linspace(0, 1, 12, dtype=np.float32)[:, None]
    walks = np.concatenate([a + share * (b - a) for a, b in zip(mu, mu[1:])])
    prior = np.random.default_rng((args.seed, 3)).standard_normal((48, mu.shape[1]), np.float32)
    parts = {"pictures not trained on": test[:12], "and their reconstructions": trainer.reconstruct(test[:12])}
    parts |= {"drawn from the prior, z ~ N(0, I)": trainer.decode(prior), "walks between two z": trainer.decode(walks)}
    if mu.shape[1] == 2:
        line = np.linspace(-2.2, 2.2, 12, dtype=np.float32)
        plane = np.stack(np.meshgrid(line, -line), -1).reshape(-1, 2)
        parts["map of the plane of z: both numbers from -2.2 to 2.2"] = trainer.decode(plane)
    return {}, parts


def show_denoise(trainer, train, test, labels, args):
    """Every test picture with noise, and without: PSNR before and after, and of the median filter."""
    noisy = spoil(test, args.noise, np.random.default_rng((args.seed, 4)))
    answers = {"psnr_noisy": ("with noise", noisy), "psnr_median": ("after a median filter", median(noisy))}
    answers["psnr"] = "denoised", in_parts(trainer.reconstruct, noisy)
    figures = {name: psnr(y, test) for name, (_, y) in answers.items()}
    parts = {f"{caption}: {figures[name]:.1f} dB": y[:24] for name, (caption, y) in answers.items()}
    return figures, {**parts, "without noise": test[:24]}


def show_compress(trainer, train, test, labels, args):
    """The test set to OUT/test.codes and back; JPEG and WebP get as many bytes or more. The decoder is not counted."""
    file, sigma = args.out / "test.codes", trainer.encode(floats(train[:1000]))[1]
    file.write_bytes(pack(in_parts(lambda x: trainer.encode(x)[0], test), np.sqrt((sigma**2).mean(0))))
    data = file.read_bytes()
    answers = {"": ("latents", in_parts(trainer.decode, unpack(data, sigma.shape[1])), len(data))}
    answers |= {f"_{form.lower()}": (form, *rival(form, test, len(data))) for form in ("JPEG", "WebP")}
    figures, parts = {}, {"pictures not trained on": test[:24]}
    for end, (caption, y, size) in answers.items():
        figures |= {f"bytes{end}": round(size / len(test), 2), f"psnr{end}": psnr(y, test)}
        parts[f"{caption}: {size / len(test):.1f} bytes a picture, {figures[f'psnr{end}']:.1f} dB"] = y[:24]
    return figures, parts


# ---- the run ---------------------------------------------------------------------------------------------------------


def main():
    began = time.perf_counter()
    apple = (sys.platform, platform.machine()) == ("darwin", "arm64")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--backend", choices=["torch", "mlx"], default="mlx" if apple else "torch")
    parser.add_argument("--task", choices=TASKS, default="vae")
    parser.add_argument("--data", default="digits", help="digits, flowers, mnist, fashion, cifar10 or a folder")
    parser.add_argument("--count", type=int, default=10000, help="digits or flowers to draw, and a fifth to hold out")
    parser.add_argument("--size", type=int, default=32, help="height and width of flowers and of a folder's pictures")
    parser.add_argument("--net", choices=["linear", "conv"], default="linear")
    parser.add_argument("--hidden", type=int, nargs="+", help="widths of the layers (default: 512 512; conv: 32 64)")
    parser.add_argument("--latent", type=int, help="numbers that stand for a picture; 2 draws a map")
    parser.add_argument("--likelihood", choices=["bernoulli", "gaussian"], help="of the pixels, given z")
    parser.add_argument("--std", type=float, default=0.1, help="the gaussian's: less makes longer codes")
    parser.add_argument("--beta", type=float, default=1.0, help="weight of the KL: more makes shorter codes")
    parser.add_argument("--noise", type=float, default=0.3, help="standard deviation of what denoise takes away")
    parser.add_argument("--jitter", type=float, default=0.0, help="bend what is learnt from, against overfitting")
    parser.add_argument("--steps", type=int, help="0: only evaluate and draw")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, help="the highest rate; it falls to 0 along a cosine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().with_name("out"))
    parser.add_argument("--resume", action="store_true", help="go on from OUT/ckpt.npz, whichever backend wrote it")
    parser.add_argument("--device", help="cuda, mps or cpu; MLX: gpu or cpu (default: the best there is)")
    parser.set_defaults(**TASKS[parser.parse_known_args()[0].task])
    args = parser.parse_args()
    args.hidden = args.hidden or ([32, 64] if args.net == "conv" else [512, 512])
    for name, least in dict(steps=0, seed=0, batch_size=1, latent=1, beta=0, jitter=0, size=8, count=100).items():
        if not least <= getattr(args, name) < math.inf:
            fail(f"--{name.replace('_', '-')} must be {least} or more")
    if not (0 < args.lr < math.inf and 0 < args.std < math.inf and 0 < args.noise < math.inf and min(args.hidden) > 0):
        fail("--lr, --std, --noise and --hidden must be more than 0")
    args.log_every = max(1, args.steps // 20)

    ckpt = args.out / "ckpt.npz"
    saved = read_meta(ckpt, "autoencoder") if args.resume else None
    if saved and (saved["task"], saved["data"]) != (args.task, args.data):
        fail(f"{ckpt} was trained with --task {saved['task']} --data {saved['data']}: repeat them, or change --out")
    train, test, labels = load_data(args)
    if args.batch_size > len(train):
        fail(f"--batch-size {args.batch_size} is more than the {len(train)} pictures: make it smaller")
    net, image = load_twin(args), list(train.shape[1:])
    config = net.Config(image, args.latent, args.hidden, args.net, args.model, args.likelihood, args.std, args.beta)
    if saved:
        config = net.Config(**saved["config"])
        if config.image != image:
            fail(f"{ckpt} was trained on pictures of another size: repeat --size")
    if config.net == "conv" and any(side % 2 ** len(config.hidden) for side in image[:2]):
        fail(f"--hidden of conv halves {image[0]} x {image[1]} pictures {len(config.hidden)} times: name fewer")
    trainer = net.Trainer(config, seed=args.seed, device=args.device)
    start = trainer.load(ckpt) if saved else 0
    params = sum(w.size for w in net.get_weights(trainer.model).values())
    print(f"autoencoder: {args.backend} on {args.device}, {params:,} parameters; {args.data}: {len(train):,} "
          f"pictures to train on, {len(test):,} held out; files go to {args.out}", flush=True)

    def arrays(y, rng):  # of one step: what goes in, what should come out, eps
        eps = rng.standard_normal((len(y), config.latent), np.float32)
        return spoil(y, args.noise, rng) if args.task == "denoise" else y, y, eps

    def batch(step):
        rng = np.random.default_rng((args.seed, step, 1))
        images = train[rng.integers(0, len(train), args.batch_size)]
        if args.jitter and step < 0.8 * args.steps:  # it blurs a little: the last steps see the pictures as they are
            images = jitter(images, args.jitter, rng)
        return arrays(floats(images), rng)

    def lr(step):
        return args.lr * (1 + math.cos(math.pi * step / args.steps)) / 2

    def evaluate(x):
        rng, parts = np.random.default_rng((args.seed, 2)), np.array_split(x, math.ceil(len(x) / 1000))
        figures = [trainer.evaluate(*arrays(part, rng)) for part in parts]
        sizes = [len(part) / len(x) for part in parts]
        return {name: sum(size * float(f[name]) for size, f in zip(sizes, figures)) for name in figures[0]}

    speed = fit(trainer, batch, lambda: evaluate(test[:1000]), lr, args, start, task=args.task, data=args.data)
    show = {"vae": show_vae, "denoise": show_denoise, "compress": show_compress}[args.task]
    figures, parts = show(trainer, train, test, labels, args)
    draw_rows(parts).save(args.out / "sample.png", optimize=True)
    files = [args.out / name for name in ["ckpt.npz", "sample.png"] + ["test.codes"] * (args.task == "compress")]
    result = {"backend": args.backend, "device": args.device, "params": params, "steps": args.steps}
    result |= {"seconds": round(time.perf_counter() - began, 2), "steps_per_s": round(speed, 1)}
    result |= {**evaluate(test), **figures, "files": [str(file) for file in files if file.exists()]}
    print("result " + json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head` has read enough; what is left to print has no reader
        os._exit(141)
