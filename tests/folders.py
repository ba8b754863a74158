"""The table of folders that the tests go through, one row of FOLDERS each; and how they load and run a folder."""

import contextlib
import ctypes.util
import importlib.util
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ["torch", "mlx"]


@dataclass
class Folder:
    configs: list  # small Configs, as keyword arguments: one for each path through the model
    batch: callable  # (config, rng) -> the arrays of one Trainer.step
    loss: callable  # (net, model, *arrays of the framework) -> the loss, for gradients
    outputs: callable  # (trainer, *arrays of numpy) -> the model's outputs, as one numpy array
    curve: list  # for each config: for how many steps the losses agree
    lr: float  # a rate at which the small models memorise one batch
    overfit: tuple  # in how many steps, and below which loss
    smoke: list  # train.py's arguments for a short run
    learned: tuple  # (a figure of the result line, "<" or ">", a bound that an untrained model fails)
    files: list  # what the short run leaves in its --out


def points(config, rng):
    x = rng.normal(size=(32, config.n_in)).astype(np.float32)
    if config.loss == "cross_entropy":
        return x, rng.integers(0, config.n_out, 32)
    return x, rng.integers(0, 2, (32, config.n_out)).astype(np.float32)


def tokens(config, rng):
    ids = rng.integers(0, config.vocab_size, (4, config.block_size + 1))
    return ids[:, :-1], ids[:, 1:]


def pictures(config, rng):
    x = rng.random((16, *config.image), np.float32).round()
    noisy = (x + rng.normal(0, 0.3, x.shape)).clip(0, 1).astype(np.float32)
    return noisy if config.model == "ae" else x, x, rng.standard_normal((16, config.latent), np.float32)


def sentences(config, rng):
    """For a Transformer: pairs of sentences with padding, or images with classes or captions."""
    ids = rng.integers(3, config.src_vocab, (8, 7))
    ids[:3, 5:] = 0
    if config.model == "seq2seq":
        tgt = rng.integers(3, config.tgt_vocab, (8, 9))
        tgt[:, 0], tgt[4, 6:], tgt[5, 6:] = 1, 0, [2, 0, 0]
        return ids, tgt
    x = rng.random((8, *config.image), np.float32)
    return (x, rng.integers(0, config.n_out, 8)) if config.model == "vit" else (x, ids)


def said(trainer, *arrays):
    """A Transformer's outputs for a batch: padded translations; probabilities; unit vectors."""
    if trainer.config.model == "vit":
        return trainer.predict(arrays[0])
    if trainer.config.model == "clip":
        return np.concatenate(trainer.embed(*arrays))
    return np.array([ids + [0] * (trainer.config.length - len(ids)) for ids in trainer.translate(arrays[0], beam=3)])


def sequences(config, rng):
    if not config.vocab_size:
        y = rng.integers(0, config.n_out, 8) if config.loss == "cross_entropy" else rng.normal(size=(8, config.n_out))
        return rng.normal(size=(8, 12, config.n_in)).astype(np.float32), y if y.ndim == 1 else y.astype(np.float32)
    ids, keep = rng.integers(0, config.vocab_size, (8, 13)), (rng.random(8) < 0.7).astype(np.float32)
    beside = [rng.normal(size=(8, 12, config.n_in)).astype(np.float32)] if config.n_in else []
    return ids[:, :-1], ids[:, 1:], keep, *beside


def game(config, rng):
    x = rng.random((config.d_steps, 16, *config.image), np.float32) * 2 - 1
    z = rng.standard_normal((config.d_steps + 1, 16, config.latent), np.float32)
    c = np.eye(max(1, config.n_class), config.n_class, dtype=np.float32)
    z = np.concatenate([z, c[rng.integers(0, len(c), z.shape[:2])]], -1)
    return x, z, rng.random((config.d_steps, 16), np.float32)


def both_losses(net, model, x, z, u):
    fake, c = model.generator(z[0]), z[0][:, model.config.latent :]  # twice G's: minimax must not cancel G's effect
    return net.discriminator_loss(model, x[0], fake, c, u[0])[0] + 2 * net.generator_loss(model, z[-1])[0]


def noised(config, rng):
    """For diffusion: images, points or images with texts; times and noise."""
    x = rng.standard_normal((8, *config.image), np.float32).clip(-1, 1)
    y = rng.integers(0, config.n_class + 1, 8)
    if config.vocab_size:
        y = rng.integers(0, config.vocab_size, (8, config.length))
    shape = (8, config.image[0] // 4, config.image[1] // 4, config.latent) if config.latent else x.shape
    return x, y, rng.integers(1, config.T + 1, 8), rng.standard_normal(shape, np.float32)


def denoising_loss(net, model, x, y, t, noise):
    both = net.autoencoder_loss(model, x, y, t, noise) if model.config.latent else 0.0
    return both + net.loss_fn(model, x, y, t, noise)


LANGUAGE = dict(batch=tokens, loss=lambda net, model, x, y: net.loss_fn(model(x), y), lr=0.01, overfit=(60, 0.3),
                outputs=lambda trainer, x, y: np.stack(list(trainer.generate(x[:, :5], 20, temperature=0))),
                files=["sample.txt"])  # fmt: skip
SMALL_LLAMA = dict(block_size=16, vocab_size=31, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48)
FOLDERS = {
    "mlp": Folder(configs=[
        dict(n_in=5, hidden=[32, 16], n_out=3),
        dict(n_in=5, hidden=[32], n_out=1, activation="tanh", loss="binary_cross_entropy", optimizer="momentum"),
        dict(n_in=5, hidden=[32, 16], n_out=2, activation="sigmoid", loss="mse", grad="by-hand"),
        dict(n_in=5, hidden=[64], n_out=3, optimizer="sgd"),
    ], batch=points, outputs=lambda trainer, x, y: trainer.predict(x),
        loss=lambda net, model, x, y: net.loss_fn(model(x), y, model.config.loss),
        lr=0.1, overfit=(150, 0.5), curve=[100, 100, 100, 100],
        smoke=["--steps", "300"], files=["sample.png"], learned=("accuracy", ">", 0.95)),
    "gpt": Folder(configs=[
        dict(block_size=16, vocab_size=31, n_layer=2, n_head=3, n_embd=24, optimizer="adamw"),
        dict(block_size=16, vocab_size=31, n_layer=2, n_head=3, n_embd=24, optimizer="muon"),
        dict(block_size=16, vocab_size=31, n_layer=1, n_head=1, n_embd=24, optimizer="adamw", bias=False),
    ], **LANGUAGE, curve=[100, 20, 100],  # Muon amplifies small differences
        smoke=["--steps", "50", "--block-size", "32", "--n-layer", "2", "--n-embd", "64", "--tokens", "100"],
        learned=("val_loss", "<", 2.9)),
    "autoencoder": Folder(configs=[
        dict(image=[8, 6, 1], latent=5, hidden=[48, 24]),
        dict(image=[4, 6, 3], latent=5, hidden=[40], likelihood="gaussian", std=0.3, beta=2.0),
        dict(image=[8, 4, 3], latent=6, hidden=[16, 24], net="conv"),
        dict(image=[4, 8, 1], latent=6, hidden=[8, 12], net="conv", model="ae"),
        dict(image=[8, 6, 1], latent=5, hidden=[48, 24], model="ae", likelihood="gaussian", std=0.5),
    ], batch=pictures, outputs=lambda trainer, x, y, eps: trainer.reconstruct(x),
        loss=lambda net, model, *arrays: sum(net.loss_fn(model, *arrays)),
        lr=0.02, overfit=(150, 15.0), curve=[100, 100, 50, 50, 100],
        smoke=["--steps", "250", "--batch-size", "64", "--hidden", "128", "--count", "1000", "--lr", "8e-3"],
        files=["sample.png"], learned=("nelbo", "<", 220.0)),  # the mean of all images has 243
    "cnn": Folder(configs=[
        dict(model="lenet", size=14, n_in=1, n_out=4, channels=[4, 6, 16]),
        dict(model="resnet", size=8, n_in=3, n_out=4, channels=[16, 24, 24, 12], label_smoothing=0.1),
    ], batch=lambda c, rng: (rng.random((16, c.size, c.size, c.n_in), np.float32), rng.integers(0, c.n_out, 16)),
        outputs=lambda trainer, x, y: trainer.predict(x),
        loss=lambda net, model, x, y: net.loss_fn(model(x), y, model.config.label_smoothing),
        lr=0.01, overfit=(60, 0.5), curve=[20, 20],  # Muon again
        smoke=["--steps", "60", "--channels", "8", "16", "64", "--batch-size", "64"],
        files=["sample.png", "filters.png"], learned=("accuracy", ">", 0.8)),
    "transformer": Folder(configs=[
        dict(src_vocab=15, tgt_vocab=12, length=12, n_layer=2, n_head=2, width=24, label_smoothing=0.1),
        dict(src_vocab=15, tgt_vocab=12, length=12, n_layer=1, n_head=2, width=24, norm="post", positions="learned",
             optimizer="adamw"),
        dict(model="vit", image=[8, 12, 3], n_out=4, n_layer=2, n_head=3, width=24),
        dict(model="clip", image=[8, 8, 3], src_vocab=15, length=8, n_out=6, n_layer=1, n_head=2, width=16,
             optimizer="adamw"),
    ], batch=sentences, loss=lambda net, model, *arrays: model.loss(*arrays)[0], outputs=said,
        lr=0.01, overfit=(80, 1.2), curve=[20, 50, 20, 50], files=["sample.png"], learned=("accuracy", ">", 0.7),
        smoke=["--steps", "60", "--width", "64", "--n-layer", "1", "--beam", "1"]),
    "rnn": Folder(configs=[
        dict(cell="lstm", vocab_size=11, n_embd=8, n_hidden=24, n_out=11, optimizer="adamw"),
        dict(cell="gru", impl="builtin", vocab_size=11, n_embd=8, n_in=3, n_hidden=24, n_layer=2, n_out=11),
        dict(cell="gru", n_in=3, n_hidden=24, n_out=4, read="last", optimizer="adamw"),
        dict(cell="rnn", impl="builtin", n_in=3, n_hidden=24, n_out=6, read="last", loss="mse", optimizer="adamw"),
    ], batch=sequences, outputs=lambda trainer, x, y, *more: trainer.predict(x, *more[1:]),
        loss=lambda net, model, x, y, *more: net.loss_fn(model(x, None, *more[1:])[0], y, model.config.loss),
        lr=0.02, overfit=(150, 0.5), curve=[100, 20, 100, 100],  # Muon again
        smoke=["--steps", "60", "--n-hidden", "96", "--length", "32", "--tokens", "100"],
        files=["sample.txt"], learned=("val_loss", "<", 2.6)),
    "gan": Folder(configs=[
        dict(image=[8, 8, 1], latent=5, n_class=3, hidden=[8, 12], smoothing=0.1),
        dict(image=[4, 6, 3], latent=5, hidden=[16], loss="wgan-gp", penalty=2.0, d_steps=2),
        dict(image=[4, 6, 1], latent=5, n_class=2, hidden=[24, 16], model="gan", d_lr=2.0, d_steps=2, ema=0.5),
        dict(image=[8, 4, 3], latent=5, hidden=[12, 16], model="gan", loss="minimax"),
    ], batch=game, loss=both_losses, outputs=lambda trainer, x, z, u: trainer.generate(z[0]),
        lr=0.01, overfit=(45, 0.6), curve=[15, 20, 15, 30],  # two players amplify small differences
        smoke="--steps 50 --size 28 --hidden 8 --count 300 --ema 0.9 --lr 3e-3 --batch-size 16".split(),
        files=["sample.png"], learned=("frechet", "<", 3000.0)),  # untrained 7,700, the mean image 4,000, here 2,440
    "llama": Folder(configs=[
        dict(SMALL_LLAMA, optimizer="adamw"),
        dict(SMALL_LLAMA, head_dim=12, n_kv_head=1, tied=False, rope="llama3", rope_factor=4.0, rope_context=8),
        dict(SMALL_LLAMA, n_kv_head=4, window=6, sinks=2, rope="linear", rope_factor=2.0, optimizer="adamw"),
    ], **LANGUAGE, curve=[40, 20, 100],  # then the first turns chaotic: 1e-7 becomes 1e-3, in torch alone too; Muon
        smoke=["--steps", "80", "--block-size", "32", "--n-layer", "2", "--n-embd", "64", "--tokens", "100"],
        learned=("val_loss", "<", 2.75)),
    "diffusion": Folder(configs=[
        dict(image=[8, 8, 1], widths=[16, 24], n_class=3),
        dict(image=[8, 4, 3], fold=1, widths=[16, 16, 24], n_class=0, predict="noise", schedule="linear"),
        dict(image=[16, 16, 3], fold=1, widths=[16, 24], n_class=0, vocab_size=7, length=4, latent=2, first=2),
        dict(image=[1, 1, 2], widths=[32, 32], n_class=0, net="mlp", ema=0.5),
    ], batch=noised, loss=denoising_loss,
        outputs=lambda trainer, x, y, *more: trainer.sample(y, np.random.default_rng(1), "ddpm", 5, guidance=2.0)[-1],
        lr=0.02, overfit=(100, 0.6), curve=[20, 20, 20, 50],  # Muon again
        smoke="--steps 100 --widths 32 --fold 4 --count 300 --batch-size 16 --sample-steps 2 --lr 0.02".split(),
        files=["sample.png"], learned=("val_loss", "<", 0.35)),  # untrained about 0.95, here 0.33
}  # fmt: skip
CASES = [(name, i) for name, folder in FOLDERS.items() for i in range(len(folder.configs))]
SOME = [(name, BACKENDS[i % 2]) for i, name in enumerate(FOLDERS)]  # for what train.py does regardless of the model


def load_file(name, file):
    """The module NAME/FILE.py, under a separate name; train.py finds its own folder's data.py."""
    full = f"{name}_{file}"
    if full not in sys.modules:
        if file == "train":
            sys.modules["data"] = load_file(name, "data")
        spec = importlib.util.spec_from_file_location(full, ROOT / name / f"{file}.py")
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
        sys.modules.pop("data", None)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return sys.modules[full]


def load(name, backend):
    return load_file(name, f"model_{backend}")


def make_args(name, *argv, backend="torch"):
    """All arguments that train.py gets from a command line, as a task needs them."""
    with mock.patch.object(sys, "argv", ["train.py", "--backend", backend, "--device", "cpu", *map(str, argv)]):
        args, _ = load_file(name, "train").read_args()
    args.rank, args.world = 0, 1
    return args


def make_task(name, *argv, saved=None):
    """The task of a command line: its data loaded and split."""
    args = make_args(name, *argv)
    return load_file(name, "data").TASKS[args.task](args, saved)


def make_run(name, *argv, backend="torch"):
    """The task and the Trainer of a command line, as main() builds them, and its learning rate at each step."""
    task, net = make_task(name, *argv), load(name, backend)
    flags = {key: x for key, x in task.args.memory.items() if key in net.Config.__dataclass_fields__ and x is not None}
    trainer = task.trainer(net, net.Config(**flags | task.config))
    return task, trainer, lambda step: load_file(name, "train").rate(step, task.args)


def make_trainer(name, i, backend, seed=0, device="cpu", **changes):
    net = load(name, backend)
    return net.Trainer(net.Config(**{**FOLDERS[name].configs[i], **changes}), seed=seed, device=device)


def batches(name, i, n):
    """n training batches of a case, the same for both backends."""
    folder, config = FOLDERS[name], load(name, "torch").Config(**FOLDERS[name].configs[i])
    return [folder.batch(config, np.random.default_rng((7, step))) for step in range(n)]


def environment(backend):
    """The environment of a process: on Linux, MLX is many times faster with OpenBLAS, if it is installed."""
    env = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    openblas = ctypes.util.find_library("openblas") if sys.platform == "linux" else None
    if backend == "mlx" and openblas:
        env["LD_PRELOAD"] = openblas
    return env


def copy_alone(name, to):
    """Only the folder's own files, as when a user copies it."""
    shutil.copytree(ROOT / name, to, ignore=shutil.ignore_patterns("out", "data", "__pycache__"))
    return Path(to)


def copy_quick(name, to):
    """The same with few digits, and a judge of images that learns for 20 steps: for what does not depend on them."""
    folder = copy_alone(name, to)
    text = (folder / "data.py").read_text(encoding="utf-8").replace("n=800", "n=20")
    text = text.replace("make_digits(5000", "make_digits(500").replace("make_digits(1000", "make_digits(100")
    (folder / "data.py").write_text(text, encoding="utf-8")
    return folder


def start(folder, backend, *args, stdout=subprocess.PIPE, **env):
    """A process of the train.py in `folder`, with its output in pipes, and with more variables of the environment."""
    command = [sys.executable, "train.py", "--backend", backend, "--device", "cpu", *map(str, args)]
    return subprocess.Popen(command, cwd=folder, env=environment(backend) | env, text=True, encoding="utf-8",
                            stdout=stdout, stderr=subprocess.PIPE)  # fmt: skip


def run(folder, backend, *args):
    """Run train.py to the end: exit code, stdout, stderr."""
    process = start(folder, backend, *args)
    out, err = process.communicate()
    return process.returncode, out, err


def run_here(folder, backend, *args, cwd=None):
    """Like run(), but in this process, without starting Python and importing the frameworks: a tenth of the time."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape", write_through=True) for _ in range(2))
    before, handler, code = Path.cwd(), signal.getsignal(signal.SIGINT), 0
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGINT, handler)
        stack.callback(os.chdir, before)
        command = ["train.py", "--backend", backend, "--device", "cpu", *map(str, args)]
        stack.enter_context(mock.patch.object(sys, "argv", command))
        stack.enter_context(mock.patch.object(sys, "path", [str(folder), *sys.path]))
        stack.enter_context(mock.patch.object(os, "_exit", sys.exit))
        for context in (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings()):
            stack.enter_context(context)
        os.chdir(cwd or folder)
        try:
            runpy.run_path(str(folder / "train.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except Exception:
            code = traceback.print_exc() or 1
        for module in ("data", *(f"model_{backend}" for backend in BACKENDS)):
            sys.modules.pop(module, None)
    return code, *(stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err))


def result(folder, backend, *args, run=run):
    """A run that must succeed: its result line, with the folder of its files as `out` and its output as `printed`."""
    code, out, err = run(folder, backend, *args)
    assert code == 0, f"exit code {code}: {err}"
    last = out.splitlines()[-1]
    assert last.startswith("result "), f"the last line is no result: {last}"
    figures = json.loads(last.removeprefix("result "))
    return {**figures, "out": Path(re.search("files go to (.+?)(;|$)", out, re.M)[1]), "printed": out}
