# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "mlx[cpu]==0.32.4", "numpy", "pillow", "tiktoken"]
# ///
"""Train a GPT and let it write:  python train.py [--backend mlx] [--data tinyshakespeare] [--tokenizer bpe] ...

--task text goes on with a text: tinyshakespeare, your own file, or Python's manual, which every Python has;
--task chat answers: sums, opposites and small talk, or what your own dialogues teach;
--task rl --init out/chat/ckpt.npz makes such a model better at sums by trial and reward.
--init goes on from other weights: a ckpt.npz, or GPT-2 as Hugging Face stores it; --export-hf writes that layout.
Once trained, --steps 0 --resume --prompt "The class" only writes, and --chat talks. Several processes share each batch:
torchrun --nproc-per-node 2 train.py, or mlx.launch -n 2 -- python train.py --backend mlx.
"""

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

MODEL = "gpt"
DEFAULTS = {  # of the flags, task by task
    "text": dict(steps=600, batch_size=8, optimizer="muon"),
    "chat": dict(steps=1500, batch_size=24, optimizer="muon"),
    "rl": dict(steps=240, batch_size=256, optimizer="adamw", lr=0.0003),
}
RATES = {"muon": 0.01, "adamw": 0.004}
SHAPE = dict(n_layer=4, n_head=4, n_embd=128, block_size=128)
GPT2 = {  # the released sizes
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124 million parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1,558
}


def defaults(asked):
    """What the flags are that are not given; --init and --size say the shape, the former in the task."""
    flags = DEFAULTS[asked.task]
    size = GPT2.get(asked.size, {})
    for name, there in size.items():
        if (value := getattr(asked, name)) not in (None, there):
            fail(f"--size {asked.size} has {name} {there}, not {value}: leave out --size or the other")
    shape = {} if asked.init else SHAPE | size
    return {"lr": RATES[asked.optimizer or flags["optimizer"]], **flags, **shape}


def read_args():
    """The command line; and with --resume what the checkpoint remembers, else None."""
    apple = (sys.platform, platform.machine()) == ("darwin", "arm64")
    parser = argparse.ArgumentParser(description=__doc__, add_help=False, allow_abbrev=False)
    add = parser.add_argument_group("kept in the checkpoint; --resume refuses others").add_argument
    fixed = [
        add("--task", choices=TASKS, default="text", help="what there is to learn"),
        add("--data", help="tinyshakespeare or a text; chat: a .jsonl of messages (without: Python's manual, or sums)"),
        add("--init", help="start from the weights of a ckpt.npz or of a GPT-2's folder"),
        add("--tokenizer", dest="kind", choices=["chars", "bpe", "gpt2"], help="bpe: learned here (without: chars)"),
        add("--merges", type=within("[0, inf)", int), default=1000, help="of --tokenizer bpe"),
        add("--size", choices=GPT2, help="in place of the next three"),
        add("--n-layer", type=within("[1, 1000]", int), help="blocks, one above the other"),
        add("--n-head", type=within("[1, 1000]", int), help="ways to attend at once: a divisor of --n-embd"),
        add("--n-embd", type=within("[1, 65536]", int), help="width of the stream that the blocks add to"),
        add("--block-size", type=within("[1, inf)", int), help="the context in tokens; of --init no more than it has"),
        add("--optimizer", choices=["muon", "adamw"], help="muon: of the blocks' matrices, adamw of the rest"),
    ]
    add = parser.add_argument_group("kept too; --resume takes others").add_argument
    kept = [
        add("--dropout", type=within("[0, 1)"), default=0.0, help="of the embeddings and of what each branch adds"),
        add("--group", type=within("[2, inf)", int), default=8, help="rl: answers to a question"),
        add("--beta", type=within("[0, inf)"), default=0.02, help="rl: what it costs to become another model"),
        add("--steps", type=within("[0, inf)", int), help="0: only evaluate and write"),
        add("--batch-size", type=within("[1, 65536]", int), help="rows of a step"),
        add("--accumulate", type=within("[1, inf)", int), default=1, help="parts to compute a batch in: less memory"),
        add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of what is computed"),
        add("--lr", type=within("(0, inf)"), help="the highest rate"),
        add("--warmup", type=within("[1, inf)", int), default=30, help="steps in which the rate rises"),
        add("--decay", choices=["linear", "cosine"], default="linear", help="how the rate falls to 0"),
        add("--seed", type=within("[0, 4294967295]", int), default=0, help="of weights, batches, samples"),
    ]
    add = parser.add_argument_group("of this run alone").add_argument
    add("--backend", choices=["torch", "mlx"], default="mlx" if apple else "torch", help="the framework")
    add("--device", help="cuda, mps or cpu; MLX: gpu or cpu (without: the best there is)")
    add("--out", type=Path, help="the folder for what the run writes")
    add("--resume", action="store_true", help="go on from OUT/ckpt.npz, whichever backend wrote it")
    add("--compile", action="store_true", help="let the framework compile the model first")
    add("--export-hf", type=Path, metavar="DIR", help="at the end, write the weights there for Hugging Face")
    add("--chat", action="store_true", help="chat, rl: at the end, talk in the terminal")
    add("--prompt", help="what to go on with or to answer; - reads it from the standard input")
    add("--tokens", type=within("[0, inf)", int), default=500, help="how many to write")
    add("--temperature", type=within("[0, inf)"), default=0.8, help="0: always the likeliest token")
    add("--top-k", type=within("[1, inf)", int), help="only from the K likeliest")
    add("--top-p", type=within("(0, 1]"), default=1.0, help="only from the likeliest that hold the share P")
    add("--beam", type=within("[1, inf)", int), default=1, help="width of a search for the likeliest text")
    add("--stop", nargs="+", metavar="TEXT", help="write up to here")
    return parse(parser, MODEL, fixed, kept, defaults)


def rate(step, args):
    """The learning rate: up in --warmup steps, then down to 0 by --decay."""
    left = 1 - step / args.steps
    fall = left if args.decay == "linear" else (1 - math.cos(math.pi * left)) / 2
    return args.lr * min((step + 1) / args.warmup, 1.0) * fall


# ---- the same to the letter in every folder --------------------------------------------------------------------------


def load_twin(args):
    """The module model_torch or model_mlx; args.device becomes the device that it uses, args.rank this process's."""
    try:
        net = importlib.import_module(f"model_{args.backend}")
    except ImportError as error:
        fail(f"{error}: pip install torch, or pip install 'mlx[cpu]', or take the other --backend")
    args.device = args.device or net.devices()[0]
    if args.device not in net.devices():
        fail(f"--device {args.device} is not to be had with {args.backend} here: {', '.join(net.devices())}")
    args.rank, args.world = net.join() if hasattr(net, "join") else (0, 1)
    if args.rank:  # one of several processes speaks and saves
        sys.stdout = open(os.devnull, "w")
    return net


def fit(trainer, task, args, start, memory):
    """Train from step `start` to args.steps; twenty times on the way evaluate, save and print a line.

    Ctrl-C ends the step at hand, saves and exits with 130; a second one does not wait. Returns the steps a second.
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
            if first and ckpt.exists():
                shutil.copy2(ckpt, args.out / "ckpt.old.npz")
            trainer.save(ckpt, done, **memory)
        except OSError as error:
            Path(f"{ckpt}.part").unlink(missing_ok=True)
            fail(f"{ckpt} could not be written ({error.strerror or error}): make room there, or name another --out")
        speed, left = (done - start) / busy, (args.steps - done) * busy / (done - start)
        figures = {**values[-2], **values[-1]}
        line = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        print(f"step {done:>6}/{args.steps}  {line}  {speed:.1f} steps/s  {left:.0f} s left", flush=True)
        if not args.rank:
            record(args.out, {"step": done, **figures, "steps_per_s": round(speed, 2)}, first)
        pending, shown = [], time.perf_counter()
        if interrupted:
            print(f"stopped: the same command with --resume goes on from step {done}", flush=True)
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return speed


def main():
    """Arguments, task, model, checkpoint; train; report, and the result as the last line."""
    began, (args, saved) = time.perf_counter(), read_args()
    net, ckpt = load_twin(args), args.out / "ckpt.npz"
    fields, there = net.Config.__dataclass_fields__, saved["config"] if saved else {}
    for name, value in there.items():
        if name in fields and isinstance(value, str) != isinstance(fields[name].default, str):
            fail(f"{ckpt} is damaged, its {name} is {value!r}: train anew without --resume, or name another --out")
    note, task = claim(args), TASKS[args.task](args, saved)
    for name, value in (task.config | (task.extra if args.steps else {})).items():
        if saved and {**saved, **there}.get(name, value) != value:
            fail(f"{ckpt} was trained on other data: its {name} is another; repeat the --data of that run")
    config = {name: x for name, x in args.memory.items() if name in fields and x is not None} | task.config
    try:
        trainer = task.trainer(net, net.Config(**config | there))
        start = trainer.load(ckpt) if saved else 0
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if not (saved or isinstance(error, ValueError)):
            raise
        fail(f"{ckpt} does not fit the model ({error!r}): train anew without --resume" if saved else error)
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
    warnings.simplefilter("ignore")  # numbers that are not finite are spoken of in fit
    sys.stdout.reconfigure(errors="replace")  # a terminal may know fewer letters
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head` has read enough; what is left to print has no reader
        os._exit(141)
    except (OSError, MemoryError) as error:  # a full disk, a folder that may not be written to, too little memory
        print(f"train.py: {str(error)[:500] or 'too little memory'}: make room, or change --out", file=sys.stderr)
        os._exit(2)
