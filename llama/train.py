# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "mlx[cpu]==0.32.4", "numpy", "pillow", "tiktoken"]
# ///
"""Train a Llama, or load the weights of a released one, and let it write or chat:

    python train.py                                                       from scratch, on Python's manual
    python train.py --init DIR --chat                                     chat with a model from Hugging Face
    python train.py --init DIR --prompt "Once upon a time" --bits 8       write, in 8 bits, and compare with float32
    python train.py --init DIR --data own.jsonl --lora 8 --steps 100      fine-tune; --export-hf NEW exports it

Tasks: text (continue it), chat (answer; only the assistant's tokens count).
--data: tinyshakespeare, a text of any size (above 16 MB its tokens are kept in files beside it), the folder of
nanoGPT's train.bin and val.bin; dialogues, {"messages": [{"role": "user", "content": "..."}, ...]} in each line.
Two processes: torchrun --nproc-per-node 2 train.py --optimizer adamw; mlx.launch -n 2 -- python train.py --backend mlx
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
    from data import SHAPE, SIZES, TASKS, claim, fail, parse, record, within
except ImportError as error:
    sys.exit(print(f"train.py: {error}: pip install numpy pillow", file=sys.stderr) or 2)

MODEL = "llama"
DEFAULTS = {  # of the flags, with --init and without
    "real": dict(steps=0, optimizer="adamw", temperature=0.2),
    "new": dict(steps=600, optimizer="muon", temperature=0.8, rope="default", rope_factor=1.0),
}
RATES = {"real": 3e-5, "lora": 5e-4, "muon": 0.01, "adamw": 0.004}  # the default of --lr
MATRICES = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def defaults(asked):
    """The values of flags that are not given."""
    if asked.init:  # the shape of the model is in its folder
        return DEFAULTS["real"] | dict(lr=RATES["lora" if asked.lora_rank else "real"])
    size = asked.size or "tiny"
    shape = {name: SIZES[size][name] for name in SHAPE}
    if asked.n_embd:
        shape["n_hidden"] = 3 * asked.n_embd
    return DEFAULTS["new"] | shape | dict(size=size, lr=RATES[asked.optimizer or "muon"])


def read_args():
    """Parse the command line: the arguments and, with --resume, the checkpoint's metadata, else None."""
    apple = (sys.platform, platform.machine()) == ("darwin", "arm64")
    usual = "chat" if any(word.endswith(".jsonl") for word in sys.argv) else "text"
    folder = dict(type=os.path.realpath, metavar="folder")  # absolute, so that a checkpoint finds it
    parser = argparse.ArgumentParser(description=__doc__, add_help=False, allow_abbrev=False)
    add = parser.add_argument_group("saved in the checkpoint; fixed when resuming").add_argument
    fixed = [
        add("--task", choices=TASKS, default=usual, help="what to train: chat if --data is a .jsonl"),
        add("--data", help="tinyshakespeare, a text, tokens (.bin) or dialogues.jsonl (default: Python's manual)"),
        add("--init", **folder, help="start from a Llama in Hugging Face's format"),
        add("--tokenizer", **folder, help="its tokenizer (default: --init's, or characters)"),
        add("--size", choices=SIZES, help="of a new model; the next five change parts of it"),
        add("--n-layer", type=within("[1, 1000]", int), help="number of blocks"),
        add("--n-head", type=within("[1, 65536]", int), help="heads: --n-embd is a multiple of twice this"),
        add("--n-kv-head", type=within("[1, 65536]", int), help="heads of keys and values: a divisor of --n-head"),
        add("--n-embd", type=within("[1, 65536]", int), help="width of the token embeddings"),
        add("--n-hidden", type=within("[1, 1048576]", int), help="width inside the MLP"),
        add("--optimizer", choices=["muon", "adamw"], help="muon: for the blocks' matrices, adamw for the rest"),
        add("--lora", type=within("[0, 65536]", int), default=0, dest="lora_rank", help="rank of the adapters"),
        add("--lora-targets", nargs="+", choices=MATRICES, default=MATRICES, help="the matrices to adapt"),
    ]
    add = parser.add_argument_group("saved too; may change when resuming").add_argument
    kept = [
        add("--block-size", type=within("[1, inf)", int), dest="length",
            help="length of training windows in tokens (default: the context, 128; with --init at most 256)"),
        add("--window", type=within("[0, inf)", int), default=0, help="how many tokens each sees, with itself; 0: all"),
        add("--sinks", type=within("[0, inf)", int), default=4, help="first tokens, which are always seen"),
        add("--rope", choices=["default", "linear", "llama3"], help="how to stretch the positions"),
        add("--factor", type=within("[1, inf)"), dest="rope_factor", help="texts may be longer by this factor"),
        add("--steps", type=within("[0, inf)", int), help="0: only evaluate and generate"),
        add("--batch-size", type=within("[1, 65536]", int), default=8, help="rows per step"),
        add("--accumulate", type=within("[1, 65536]", int), default=1, help="compute a batch in this many parts"),
        add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation"),
        add("--lr", type=within("(0, inf)"), help="peak learning rate; decays to 0 linearly"),
        add("--warmup", type=within("[1, inf)", int), default=30, help="warm-up steps"),
        add("--seed", type=within("[0, 4294967295]", int), default=0, help="for weights, batches and samples"),
    ]  # fmt: skip
    add = parser.add_argument_group("for this run only").add_argument
    add("--backend", choices=["torch", "mlx"], default="mlx" if apple else "torch", help="the framework")
    add("--device", help="cuda, mps or cpu; MLX: gpu or cpu (default: the best available)")
    add("--out", type=Path, help="the output folder")
    add("--resume", action="store_true", help="continue from OUT/ckpt.npz, whichever backend wrote it")
    add("--compile", action="store_true", help="compile the model first; MLX on a GPU always does")
    add("--merge", action="store_true", help="merge the adapters into the weights, in OUT/merged/ckpt.npz")
    add("--export-hf", type=Path, metavar="DIR", help="at the end, save the weights there in Hugging Face's format")
    add("--export-dtype", choices=["float32", "bfloat16"], default="float32", help="of these weights")
    add("--bits", type=int, choices=[32, 8, 4], default=32, help="generate with weights of this many bits")
    add("--lengths", type=within("[1, inf)", int), nargs="+", help="evaluate texts of this many tokens, too")
    add("--chat", action="store_true", help="chat in the terminal, until Ctrl-D")
    add("--system", help="the system message of a chat")
    add("--prompt", help="the text to continue; - reads the standard input")
    add("--tokens", type=within("[0, inf)", int), default=500, help="how many tokens to generate")
    add("--temperature", type=within("[0, inf)"), help="0: always the most likely token")
    add("--top-k", type=within("[1, inf)", int), help="sample from the K most likely")
    add("--top-p", type=within("(0, 1]"), default=1.0, help="sample from the most likely with total probability P")
    return parse(parser, MODEL, fixed, kept, defaults)


def rate(step, args):
    """The learning rate: --warmup steps of linear warm-up, then linear decay to 0."""
    return args.lr * min((step + 1) / args.warmup, 1.0) * (1 - step / args.steps)


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
