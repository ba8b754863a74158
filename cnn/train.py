# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "mlx[cpu]==0.32.4", "numpy", "pillow"]
# ///
"""Train a convolutional network:  python train.py [--backend mlx] [--data cifar10] [--model resnet] [--export net.pt2]
or paint an image in the style of another:  python train.py --task style [--content A.jpg] [--style B.jpg] ..."""

import argparse
import importlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save, Ctrl-C ends the program at once
try:
    from data import TASKS, claim, fail, parse, record, within
except ImportError as error:
    sys.exit(print(f"train.py: {error}: pip install numpy pillow", file=sys.stderr) or 2)

MODEL = "cnn"
LENET = dict(model="lenet", channels=[16, 32, 128], lr=0.006, label_smoothing=0.0)
RESNET = dict(model="resnet", channels=[16, 48, 96, 192], lr=0.02, label_smoothing=0.1)
MODELS = {"lenet": LENET, "resnet": RESNET}
# the values of flags that are not given, for each --data
SETS = {"digits": dict(LENET, steps=250, shift=2), "cifar10": dict(RESNET, steps=800, shift=0, flip=True),
        "mnist": dict(LENET, steps=2000, shift=1), "fashion": dict(LENET, steps=1400, shift=2, flip=True)}  # fmt: skip
FOLDER, STYLE = dict(RESNET, steps=500, shift=3, size=32), dict(steps=150, lr=0.05, warmup=0.0, size=256)


def defaults(asked):
    """The values of flags that are not given."""
    return STYLE if asked.task == "style" else SETS.get(asked.data, FOLDER) | MODELS.get(asked.model, {})


def read_args():
    """Parse the command line: the arguments and, with --resume, the checkpoint's metadata, else None."""
    apple = (sys.platform, platform.machine()) == ("darwin", "arm64")
    parser = argparse.ArgumentParser(description=__doc__, add_help=False, allow_abbrev=False)
    add = parser.add_argument_group("saved in the checkpoint; fixed when resuming").add_argument
    fixed = [
        add("--task", choices=TASKS, default="classify", help="classify images, or paint one"),
        add("--data", default="digits", help="mnist, fashion, cifar10, or a folder with a sub-folder for each class"),
        add("--validate", action="store_true", help="hold out a tenth of the training images, not the test set"),
        add("--size", type=within("[16, 4096]", int), help="of a folder's images; style: the longer side"),
        add("--model", choices=MODELS, help="the network"),
        add("--channels", type=within("[1, 65536]", int), nargs="+", help="lenet: 3 layers; resnet: stem, blocks"),
        add("--smoothing", dest="label_smoothing", type=within("[0, 1)"), help="label smoothing"),
        add("--content", help="style: the content image (default: built-in)"),
        add("--style", help="style: the style image (default: built-in)"),
    ]
    add = parser.add_argument_group("saved too; may change when resuming").add_argument
    kept = [
        add("--shift", type=within("[0, 4096]", int), help="shift training images by up to this many pixels"),
        add("--flip", action=argparse.BooleanOptionalAction, default=False, help="mirror half of them at random"),
        add("--impl", choices=["builtin", "by-hand"], default="builtin", help="which convolution and pooling"),
        add("--weights", help="style: VGG-19 instead of random filters: .pth; MLX: .safetensors"),
        add("--strength", type=within("[0, inf)"), default=100.0, help="style: weight of the style; content: 1"),
        add("--tv", type=within("[0, inf)"), default=30.0, help="style: weight of the total variation"),
        add("--steps", type=within("[0, inf)", int), help="0: only evaluate and plot"),
        add("--batch-size", type=within("[1, 65536]", int), default=128, help="images per step"),
        add("--lr", type=within("(0, inf)"), help="peak learning rate"),
        add("--warmup", type=within("[0, 1)"), default=0.1, help="share of the steps used for warm-up"),
        add("--seed", type=within("[0, 4294967295]", int), default=0, help="for weights, data and batches"),
    ]
    add = parser.add_argument_group("for this run only").add_argument
    add("--backend", choices=["torch", "mlx"], default="mlx" if apple else "torch", help="the framework")
    add("--device", help="cuda, mps or cpu; MLX: gpu or cpu (default: the best available)")
    add("--out", type=Path, help="the output folder")
    add("--resume", action="store_true", help="continue from OUT/ckpt.npz, whichever backend wrote it")
    add("--export", type=Path, help="export the trained network: .pt2, .mlpackage; MLX: .mlxfn")
    return parse(parser, MODEL, fixed, kept, defaults)


def rate(step, args):
    """The learning rate: linear warm-up over the share --warmup of the steps, then linear decay to 0."""
    return args.lr * min(1, (step + 1) / max(1, args.warmup * args.steps), (1 - step / args.steps) / (1 - args.warmup))


# ---- the same to the letter in every folder --------------------------------------------------------------------------


def load_twin(args):
    """Import model_torch or model_mlx; sets args.device, and args.rank and args.world of this process."""
    try:
        net = importlib.import_module(f"model_{args.backend}")
    except ImportError as error:
        fail(f"{error}: pip install torch, or pip install 'mlx[cpu]', or use the other --backend")
    args.device = args.device or net.devices()[0]
    if args.device not in net.devices():
        fail(f"--device {args.device} is not available with {args.backend} here: use {', '.join(net.devices())}")
    args.rank, args.world = net.join() if hasattr(net, "join") else (0, 1)
    if args.rank:  # only the first process prints and saves
        sys.stdout = open(os.devnull, "w")
    return net


def fit(trainer, task, args, start, memory):
    """Train from step `start` to args.steps; about twenty times, evaluate, save and print a line.

    Ctrl-C finishes the current step, saves and exits with 130; a second Ctrl-C exits at once. Returns steps per second.
    """
    ckpt, interrupted, every = args.out / "ckpt.npz", [], max(1, args.steps // 20)

    def interrupt(*_):
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(True)

    signal.signal(signal.SIGINT, interrupt)
    pending, busy, speed, shown = [], 0.0, 0.0, time.perf_counter()
    for step in range(start, args.steps):
        pending.append(trainer.step(*task.batch(step), lr=rate(step, args)))
        done, waited = step + 1, time.perf_counter() - shown
        if not interrupted and done < args.steps and (done % every or waited < 0.5):
            continue
        values = [{name: float(x) for name, x in metrics.items()} for metrics in pending]
        busy += time.perf_counter() - shown
        values.append({name: float(x) for name, x in task.evaluate(trainer).items()})
        for at, metrics in enumerate(values, done - len(pending)):
            if not all(map(math.isfinite, metrics.values())):
                why = "lower --lr" if at > start else "lower --lr, or look for NaN in the data and the weights"
                fail(f"the loss is not finite at step {min(at, step)}: {why}{f'; {ckpt} is kept' * ckpt.exists()}")
        first = not speed and not args.resume
        try:
            if first and not args.rank and ckpt.exists():
                shutil.copy2(ckpt, args.out / "ckpt.old.npz")
            trainer.save(ckpt, done, **memory)
        except OSError as error:
            Path(f"{ckpt}.part").unlink(missing_ok=True)
            fail(f"{ckpt} could not be written ({error.strerror or error}): make room there, or choose another --out")
        speed, left = (done - start) / busy, (args.steps - done) * busy / (done - start)
        figures = {**values[-2], **values[-1]}
        line = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        print(f"step {done:>6}/{args.steps}  {line}  {speed:.1f} steps/s  {left:.0f} s left", flush=True)
        if not args.rank:
            record(args.out, {"step": done, **figures, "steps_per_s": round(speed, 2)}, first)
        pending, shown = [], time.perf_counter()
        if interrupted:
            print(f"stopped: the same command with --resume continues from step {done}", flush=True)
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return speed


def main():
    """Set up the task, the model and the checkpoint; train; report; print the result as the last line."""
    began, (args, saved) = time.perf_counter(), read_args()
    net, ckpt = load_twin(args), args.out / "ckpt.npz"
    fields, there = net.Config.__dataclass_fields__, saved["config"] if saved else {}
    for name, value in there.items():
        if name in fields and isinstance(value, str) != isinstance(fields[name].default, str):
            fail(f"{ckpt} is damaged ({name} is {value!r}): start over without --resume, or choose another --out")
    note, task = claim(args), TASKS[args.task](args, saved)
    for name, value in (task.config | (task.extra if args.steps else {})).items():
        if saved and {**saved, **there}.get(name, value) != value:
            fail(f"{ckpt} was trained on other data (its {name} differs): use the same --data and --seed")
    config = {name: x for name, x in args.memory.items() if name in fields and x is not None} | task.config
    try:
        trainer = task.trainer(net, net.Config(**config | there))
        start = trainer.load(ckpt) if saved else 0
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if not (saved or isinstance(error, ValueError)):
            raise
        fail(f"{ckpt} does not fit the model ({error!r}): start over without --resume" if saved else error)
    params = sum(w.size for w in net.get_weights(trainer.model).values())
    print(f"{MODEL}: {args.backend} on {args.device}, {params:,} parameters; {task.about}; files go to {args.out}"
          f"{note}", flush=True)  # fmt: skip
    speed = fit(trainer, task, args, start, {**task.extra, "args": args.memory})
    figures = task.evaluate(trainer, whole=True)
    more, files = task.report(trainer)
    files = [args.out / name for name in ("ckpt.npz", "log.jsonl", "curve.png", *files)]
    result = {"backend": args.backend, "device": args.device, "params": params, "steps": args.steps}
    result |= {"seconds": round(time.perf_counter() - began, 2), "steps_per_s": round(speed, 2)}
    result |= {"tokens_per_s": round(speed * task.tokens)} if task.tokens else {}
    result |= {name: float(x) if math.isfinite(x) else None for name, x in {**figures, **more}.items()}
    print("result " + json.dumps(result | {"files": [str(file) for file in files if file.exists()]}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # fit reports numbers that are not finite
    sys.stdout.reconfigure(errors="replace")  # the terminal may lack some characters
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # as after `| head`: nobody reads the rest
        os._exit(141)
    except (OSError, MemoryError, RuntimeError) as error:  # a full disk, no permission to write, too little memory
        if isinstance(error, RuntimeError) and "alloc" not in str(error):
            raise
        print(f"train.py: {str(error)[:500] or 'no memory'}: make room, or change --out, --batch-size", file=sys.stderr)
        os._exit(2)
