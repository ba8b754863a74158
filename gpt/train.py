# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "mlx[cpu]==0.32.4", "numpy", "tiktoken"]
# ///
"""Train a GPT and let it write:  python train.py [--backend mlx] [--data tinyshakespeare] [--tokenizer gpt2] ...

--data: tinyshakespeare or your own text file; the default is the prose of Python's own manual, which every Python has.
Once trained, --steps 0 --resume --prompt "The class" only writes.
"""

import argparse
import codecs
import hashlib
import importlib
import json
import math
import os
import platform
import pydoc_data.topics
import signal
import sys
import time
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np

# ---- helpers that every folder has, the same to the letter -----------------------------------------------------------


def fail(message):
    """Bad input ends the run: one line that says what and how to mend it, exit code 2."""
    print(f"train.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def load_twin(args):
    """The module model_torch or model_mlx; args.device becomes the device that it will use, args.out is made."""
    try:
        net = importlib.import_module(f"model_{args.backend}")
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: pip install torch, or pip install 'mlx[cpu]', or the other --backend")
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
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for url in urls:
        try:
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


def load_text(name):
    """The text of a public set, of a file, or, for no name, of Python's manual: no rulers, and each paragraph once."""
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
        fail(f"{name} is no text that can be read ({error}): name a file in UTF-8, or tinyshakespeare")
    if not text or "\0" in text:
        fail(f"{name} is empty or binary: name a text file in UTF-8, or tinyshakespeare")
    return text


class Characters:
    """A character is a token; its number is its place in the alphabet."""

    def __init__(self, alphabet):
        self.alphabet, self.vocab_size = alphabet, len(alphabet)
        self.codes = np.array([ord(c) for c in alphabet])

    def encode(self, text):
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = np.searchsorted(self.codes, codes).clip(max=self.vocab_size - 1)
        if unknown := set(codes[self.codes[ids] != codes].tolist()):
            fail(f"the model's alphabet lacks {', '.join(repr(chr(c)) for c in sorted(unknown)[:5])}: leave it out")
        return ids.astype(np.int64)

    def decode(self, token):
        return self.alphabet[token].encode()


class GPT2Tokens:
    """The 50,257 byte-pair tokens of GPT-2."""

    def __init__(self):
        try:
            import tiktoken

            self.encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:
            need = "tiktoken, and once the net for its two files, or TIKTOKEN_CACHE_DIR set to where they are"
            fail(f"--tokenizer gpt2 needs {need} ({type(error).__name__})")
        self.vocab_size, self.decode = self.encoding.n_vocab, self.encoding.decode_single_token_bytes

    def encode(self, text):
        return np.array(self.encoding.encode_ordinary(text), np.int64)


# ---- the run ---------------------------------------------------------------------------------------------------------


def write(trainer, tokenizer, args, file):
    """Print the prompt and what follows it, token by token, and keep it in a file; returns tokens a second."""
    ids, utf8 = tokenizer.encode(args.prompt), codecs.getincrementaldecoder("utf-8")("replace")
    print(f"\n{args.prompt}", end="", flush=True)
    text, began = [args.prompt], time.perf_counter()
    for token in trainer.generate(ids[None], args.tokens, args.temperature, args.top_k, args.top_p, args.seed):
        text.append(utf8.decode(tokenizer.decode(int(token[0]))))
        print(text[-1], end="", flush=True)
    print("\n")
    file.write_text("".join(text), encoding="utf-8")
    return args.tokens / (time.perf_counter() - began)


def main():
    began = time.perf_counter()
    apple = (sys.platform, platform.machine()) == ("darwin", "arm64")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--backend", choices=["torch", "mlx"], default="mlx" if apple else "torch")
    parser.add_argument("--data", help="tinyshakespeare or a text file (default: Python's manual)")
    parser.add_argument("--tokenizer", choices=["chars", "gpt2"], default="chars")
    parser.add_argument("--size", choices=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"], help="in place of --n-...")
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--n-head", type=int, default=4)
    parser.add_argument("--n-embd", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=128, help="the context in tokens")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--steps", type=int, default=600, help="0: only evaluate and write")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, help="the highest rate (default: muon 0.01, adamw 0.004)")
    parser.add_argument("--warmup", type=int, default=30, help="steps in which the rate rises")
    parser.add_argument("--decay", choices=["linear", "cosine"], default="linear", help="how the rate falls to 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().with_name("out"))
    parser.add_argument("--resume", action="store_true", help="go on from OUT/ckpt.npz, whichever backend wrote it")
    parser.add_argument("--device", help="cuda, mps or cpu; MLX: gpu or cpu (default: the best there is)")
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--tokens", type=int, default=500, help="how many to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, help="only from the K likeliest")
    parser.add_argument("--top-p", type=float, default=1.0, help="only from the likeliest that hold the share P")
    args = parser.parse_args()
    args.lr = {"muon": 0.01, "adamw": 0.004}[args.optimizer] if args.lr is None else args.lr
    args.log_every = max(1, args.steps // 20)
    if min(args.steps, args.tokens) < 0 or min(args.batch_size, args.n_layer, args.n_head, args.block_size) < 1:
        fail("--steps and --tokens must be 0 or more, --batch-size, --n-layer, --n-head and --block-size 1 or more")
    if not (0 < args.lr < math.inf and 0 <= args.temperature and 0 < args.top_p <= 1 and 0 <= args.dropout < 1):
        fail("--lr must be more than 0, --temperature 0 or more, --top-p and --dropout a share of 1")
    if args.n_embd < 1 or args.n_embd % args.n_head or args.top_k == 0:
        fail("--n-embd must be a multiple of --n-head, --top-k 1 or more")

    ckpt, text = args.out / "ckpt.npz", load_text(args.data)
    saved = read_meta(ckpt, "gpt") if args.resume else None
    alphabet = saved["alphabet"] if saved else "".join(sorted(set(text))) if args.tokenizer == "chars" else None
    tokenizer = Characters(alphabet) if alphabet else GPT2Tokens()
    net, ids, T = load_twin(args), tokenizer.encode(text), saved["config"]["block_size"] if saved else args.block_size
    train, val = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]  # the last tenth is held out
    if len(val) <= T:
        fail(f"{len(ids)} tokens are too few for a context of {T}: lower --block-size or have {10 * T + 10}")
    if not 0 < (n := len(tokenizer.encode(args.prompt))) <= T:
        fail(f"--prompt must have 1 to {T} tokens, the context of the model: it has {n}")
    if saved:
        config = net.Config(**saved["config"])
    else:
        shape = net.GPT2[args.size] if args.size else dict(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
        config = net.Config(T, tokenizer.vocab_size, dropout=args.dropout, optimizer=args.optimizer, **shape)
    trainer = net.Trainer(config, seed=args.seed, device=args.device)
    start = trainer.load(ckpt) if saved else 0
    params = sum(w.size for w in net.get_weights(trainer.model).values())
    print(f"gpt: {args.backend} on {args.device}, {params:,} parameters; {args.data or 'manual of Python'}: "
          f"{len(train):,} tokens to train on, {len(val):,} held out; files go to {args.out}", flush=True)

    def batch(step):
        at = np.random.default_rng((args.seed, step, 1)).integers(0, len(train) - T, args.batch_size)
        x = train[at[:, None] + np.arange(T + 1)]  # (B, T + 1)
        return x[:, :-1], x[:, 1:]

    def lr(step):
        left = 1 - step / args.steps
        fall = left if args.decay == "linear" else (1 - math.cos(math.pi * left)) / 2
        return args.lr * min((step + 1) / args.warmup, 1.0) * fall

    def evaluate(windows):  # starts of windows of T + 1 tokens
        total = 0.0
        for at in np.array_split(windows, math.ceil(len(windows) / 32)):
            x = val[at[:, None] + np.arange(T + 1)]
            total += float(trainer.evaluate(x[:, :-1], x[:, 1:])["val_loss"]) * len(at)
        return {"val_loss": total / len(windows)}

    windows = np.arange(0, len(val) - T, T)
    some = windows[:: math.ceil(len(windows) / 64)]  # enough for the log; the result is of all of them
    speed = fit(trainer, batch, lambda: evaluate(some), lr, args, start, alphabet=alphabet)
    figures = evaluate(windows)
    written = write(trainer, tokenizer, args, args.out / "sample.txt")
    files = [str(file) for file in (ckpt, args.out / "sample.txt") if file.exists()]
    result = {"backend": args.backend, "device": args.device, "params": params, "steps": args.steps}
    result |= {"seconds": round(time.perf_counter() - began, 2), "tokens_per_s": round(speed * args.batch_size * T)}
    result |= {"written_per_s": round(written, 1), **figures, "files": files}
    print("result " + json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
