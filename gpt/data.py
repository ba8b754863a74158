"""The tasks: continue a text, answer in dialogues, learn sums by reinforcement.

One class per task, all in numpy. To add a task, write one more class and add it to TASKS at the end.
"""

import argparse
import atexit
import codecs
import hashlib
import heapq
import io
import json
import math
import os
import pydoc_data.topics
import re
import shutil
import signal
import string
import sys
import time
from collections import Counter, defaultdict
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LARGE = 1 << 24  # bytes; the tokens of a larger text are kept in files
PIECE = 1 << 22  # bytes that are read at once
MEASURED = 1 << 20  # the most held-out tokens to evaluate
END = "\3"  # ASCII's end of a text: it comes after each message of a dialogue
WORDS = r" ?\w+| ?[^\w\s]+|\s+"  # byte pairs are merged within such words
CONV1D = "c_attn.weight", "c_proj.weight", "c_fc.weight"  # GPT-2's files hold these as (in, out)
OPPOSITES = "hot cold, big small, old new, up down, left right, day night, good bad, fast slow, open shut, dry wet"
TALK = [("Hello!", "Hello! Ask me something."), ("How are you?", "I am fine, thank you."), ("Who are you?", "A GPT."),
        ("What can you do?", "Sums, opposites and spelling."), ("Thank you.", "You are welcome.")]  # fmt: skip

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


# ---- text and tokens -------------------------------------------------------------------------------------------------


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


class Characters:
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
        return self.alphabet[token].encode()


def learn_bpe(text, n):
    """Byte-pair encoding (Sennrich et al. 2016): n times, the most frequent pair of adjacent tokens is merged.

    Returns {token: rank}, bytes and int, the 256 single bytes first, as tiktoken needs it.
    """
    counts = Counter(re.findall(WORDS, text))
    words = [[bytes([b]) for b in word.encode()] for word in counts]
    counts, ranks = list(counts.values()), {bytes([b]): b for b in range(256)}
    pairs, where = Counter(), defaultdict(set)  # how often a pair occurs, and in which words
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while len(ranks) < 256 + n and heap:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:  # now rarer than when it was pushed: push it again
            if pairs[pair]:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        (a, b), new = pair, set()
        ranks.setdefault(a + b, len(ranks))
        for i in where[pair]:
            merged = []
            for token in words[i]:
                if token == b and merged and merged[-1] == a:
                    merged[-1] = a + b
                else:
                    merged.append(token)
            for old in zip(words[i], words[i][1:]):
                pairs[old] -= counts[i]
            for now in zip(merged, merged[1:]):
                pairs[now] += counts[i]
                where[now].add(i)
                new.add(now)
            words[i] = merged
        for now in new:
            if a + b in now:
                heapq.heappush(heap, (-pairs[now], now))
    return ranks


class BytePairs:
    """tiktoken with the tokens of GPT-2, or with the ranks that learn_bpe found."""

    def __init__(self, ranks=None):
        try:
            import tiktoken

            own = dict(pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
            self.encoding = tiktoken.Encoding("pairs", **own) if ranks else tiktoken.get_encoding("gpt2")
        except Exception as error:
            files = "" if ranks else ", and GPT-2's two files, downloaded once or found in TIKTOKEN_CACHE_DIR"
            fail(f"--tokenizer bpe and gpt2 need tiktoken (pip install tiktoken){files} ({type(error).__name__})")
        self.vocab_size, self.decode = self.encoding.n_vocab, self.encoding.decode_single_token_bytes

    def encode(self, text):
        return np.array(self.encoding.encode_ordinary(text), np.int64)


def learn_tokenizer(kind, texts, merges):
    """What a checkpoint saves of a tokenizer: [its kind, its alphabet or tokens]; bpe reads only the first text."""
    if kind == "chars":
        return [kind, "".join(sorted(set().union(*map(set, texts))))]
    return [kind, [token.hex() for token in learn_bpe(next(iter(texts)), merges)] if kind == "bpe" else None]


def make_tokenizer(kind, known):
    """The tokenizer that learn_tokenizer describes; TypeError or ValueError if the description is invalid."""
    if kind == "chars" and isinstance(known, str) and known.encode():
        return Characters(known)
    ranks = {bytes.fromhex(token): rank for rank, token in enumerate(known)} if kind == "bpe" else None
    if kind not in ("bpe", "gpt2") or ranks is not None and {bytes([b]) for b in range(256)} - ranks.keys():
        raise ValueError
    return BytePairs(ranks)


def spell(tokenizer, token):
    """The bytes of a token: none if the tokenizer, which may have fewer than the model, lacks it."""
    return tokenizer.decode(int(token)) if token < tokenizer.vocab_size else b""


# ---- data larger than memory: tokens in files ------------------------------------------------------------------------


def on_disk(name):
    """The path of data that is read in parts (a large text, a .bin of tokens, a folder with train.bin), or None."""
    tokens = str(name).endswith(".bin") or os.path.exists(f"{name}/train.bin")
    return Path(name) if tokens or os.path.isfile(str(name)) and os.path.getsize(name) > LARGE else None


def cut_at(path):
    """How many bytes of a text to train on: nine tenths, up to the end of a character."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        f.seek(size * 9 // 10)
        return size * 9 // 10 + next((i for i, byte in enumerate(f.read(4)) if byte >> 6 != 2), 0)


def pieces(path, start, end):
    """Yield bytes start to end of a text in pieces, cut before a space between words, where any tokenizer splits."""
    utf8, text = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), True), ""
    with open(path, "rb") as f:
        f.seek(start)
        while start < end:
            block, start = f.read(min(PIECE, end - start)), start + PIECE
            try:
                text += utf8.decode(block, start >= end)
            except UnicodeDecodeError as error:
                fail(f"{path} can't be read as text ({error}): name a file in UTF-8")
            if "\0" in text:
                fail(f"{path} is binary: name a text file in UTF-8, or tokens in a .bin")
            found = re.match(r".*\S(?= [^\W\d_])", text, re.S) if start < end else None
            cut = found.end() if found else len(text)
            yield text[:cut]
            text = text[cut:]


def write_tokens(folder, path, tokenizer, readable):
    """Write the tokens of a text to train.bin and val.bin in a new folder; held-out text passes through readable()."""
    folder.mkdir()
    cut, size = cut_at(path), os.path.getsize(path)
    for file, start, end in ("train.bin", 0, cut), ("val.bin", cut, size):
        with open(folder / file, "wb") as f:
            for i, text in enumerate(pieces(path, start, end)):
                f.write(tokenizer.encode(readable(text) if start else text).astype(width(tokenizer)))
                done = min(start + (i + 1) * PIECE, end)
                print(f"{folder}  {done / 1e6:.1f} of {size / 1e6:.1f} MB", end="\n\r"[done < size], file=sys.stderr)


def tokenize(path, tokenizer, known, readable):
    """The folder with the tokens of a large text, written on first use: beside it or, failing that, in $DATA_DIR.

    Its name changes with the size and date of the text, and with `known`, what the tokenizer was made from.
    """
    import fcntl

    there = f"{known} {path.stat().st_size} {path.stat().st_mtime_ns}".encode("utf-8", "surrogatepass")
    home = Path(os.environ.get("DATA_DIR") or Path(__file__).resolve().with_name("data"))
    home = path.parent if os.access(path.parent, os.W_OK) else home
    folder = home / f"{path.name}.{hashlib.md5(there).hexdigest()[:12]}"
    part, lock = (folder.with_name(folder.name + end) for end in (".part", ".lock"))
    if folder.exists():
        return folder
    try:
        home.mkdir(parents=True, exist_ok=True)
        with open(lock, "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # one process writes, the others wait until it ends or dies
            try:
                shutil.rmtree(part, ignore_errors=True)
                if not folder.exists():
                    write_tokens(part, path, tokenizer, readable)
                    part.replace(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
                lock.unlink(missing_ok=True)
    except OSError as error:
        fail(f"{folder} could not be written for the tokens of {path} ({error.strerror or error}): make room there")
    return folder


def width(tokenizer):
    """The dtype of tokens in a file: uint16, as in nanoGPT, or uint32 if there are more than 65,536 different ones."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32)


class TokenFile:
    """The tokens in a file, or tenths a to b of them, read on access: file[places], like an array."""

    def __init__(self, file, tokenizer, a=0, b=10):
        self.file, self.tokenizer, self.dtype = file, tokenizer, width(tokenizer)
        size = os.path.getsize(file) if os.path.isfile(file) else 0
        n, rest = divmod(size, self.dtype.itemsize)
        if rest or not n:
            fail(f"{file} must hold tokens in {self.dtype.itemsize} bytes each: it has {size} bytes")
        self.span = slice(n * a // 10, n * b // 10)

    def __len__(self):
        return self.span.stop - self.span.start

    def __getitem__(self, places):
        """int64, of the shape of `places`. In parts: a memmap holds up to 1 MB of memory per place until closed."""
        parts = np.array_split(places, math.ceil(len(places) / 64))
        parts = [np.memmap(self.file, self.dtype, "r")[self.span][part] for part in parts]
        ids = np.array(np.concatenate(parts), np.int64)
        if ids.max() >= (n := self.tokenizer.vocab_size):
            fail(f"{self.file} has a token {ids.max()}, the tokenizer only {n}: use the one it was written with")
        return ids

    def excerpt(self):
        """A thousand tokens spread over the file, (1000,)."""
        return self[np.linspace(0, len(self) - 1, 1000).astype(int)]


def open_tokens(path, tokenizer, known, readable):
    """Training and held-out tokens, as two TokenFiles: of a large text, or of tokens that are in files already."""
    if path.suffix == ".bin":
        return TokenFile(path, tokenizer, 0, 9), TokenFile(path, tokenizer, 9, 10)
    folder = path if path.is_dir() else tokenize(path, tokenizer, known, readable)
    return TokenFile(folder / "train.bin", tokenizer), TokenFile(folder / "val.bin", tokenizer)


# ---- weights from elsewhere ------------------------------------------------------------------------------------------


def read_safetensors(folder):
    """Yield the name and the float32 array of each tensor in the folder's *.safetensors.

    Such a file has the length of a JSON header in eight bytes, then the header, then the numbers.
    """
    types = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # only buffers have other types
    if not (files := sorted(Path(folder).glob("*.safetensors"))):
        fail(f"{folder} has no *.safetensors: name a folder in Hugging Face's format")
    for file in files:
        try:
            raw = np.memmap(file, np.uint8, "r")
            start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
            header = json.loads(raw[8:start].tobytes())
            for name, entry in header.items():
                if entry.get("dtype") in types:
                    w = raw[start:][slice(*entry["data_offsets"])].view(types[entry["dtype"]]).reshape(entry["shape"])
                    bits = entry["dtype"] == "BF16"  # the upper half of a float32
                    yield name, (w.astype(np.uint32) << 16).view(np.float32) if bits else w.astype(np.float32)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            fail(f"{file} is damaged ({error}): download it again")


def load_gpt2(folder):
    """Load a GPT-2 in Hugging Face's format: metadata like read_meta's, and the weights, named as in this folder."""
    try:
        c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = {name: c[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        meta = {"config": {"block_size": c["n_positions"], **config}, "tokenizer": c.get("tokenizer", ["gpt2", None])}
        if not all(isinstance(n, int) and 0 < n < 2**31 for n in meta["config"].values()):
            raise ValueError("a size is not an integer, or far too large")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{folder} has no config.json of a GPT-2 ({error!r}): name a ckpt.npz, or GPT-2 in Hugging Face's format")
    weights = {}
    for name, w in read_safetensors(folder):
        name = name.removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):  # masks; the head is the embedding
            weights[name] = w.T.copy() if name.endswith(CONV1D) else w
    c, there = meta["config"], sum(w.size for w in weights.values())
    if there < c["n_embd"] * (12 * c["n_layer"] * c["n_embd"] + c["vocab_size"] + c["block_size"]):
        fail(f"{folder} lacks weights: {there:,} numbers are too few for its config.json; download it again")
    return meta, weights


def read_model(path):
    """The same from a checkpoint or from such a folder."""
    if not path.exists():
        fail(f"--init {path} does not exist: name a ckpt.npz, or a folder with a GPT-2 in Hugging Face's format")
    if path.is_dir():
        return load_gpt2(path)
    meta = read_meta(path, "gpt")
    with np.load(path, allow_pickle=False) as f:
        return meta, {name: f[name] for name in f.files if not name.startswith(("m.", "v.", "ref.", "meta"))}


def export_gpt2(folder, meta, weights):
    """The inverse: write what transformers loads with GPT2LMHeadModel.from_pretrained(folder).

    Both files are written under other names first, and replace existing ones when they are complete.
    """
    header, arrays, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, w in weights.items():
        arrays.append(w.T.copy() if name.endswith(CONV1D) else w)
        place = [end, end := end + w.nbytes]
        header[f"transformer.{name}"] = {"dtype": "F32", "shape": arrays[-1].shape, "data_offsets": place}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    c = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": meta["config"]["block_size"]}
    c |= {name: meta["config"][name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    c |= {"bos_token_id": None, "eos_token_id": None, "tokenizer": meta["tokenizer"]}
    content = {"model.safetensors": [len(header).to_bytes(8, "little"), header, *arrays]}
    content["config.json"] = [json.dumps(c, indent=1).encode()]
    try:
        for name, parts in content.items():
            with open(folder / f"{name}.part", "wb") as f:
                f.writelines(parts)
        for name in content:
            os.replace(folder / f"{name}.part", folder / name)
    except OSError as error:
        for name in content:
            (folder / f"{name}.part").unlink(missing_ok=True)
        fail(f"--export-hf {folder} could not be written ({error.strerror}): make room there; what was there is kept")


# ---- dialogues and sums ----------------------------------------------------------------------------------------------


def load_messages(path):
    """Read dialogues, one JSON object per line: {"messages": [{"role": "user", "content": "..."}, ...]}."""
    try:
        lines = filter(str.strip, Path(path).read_text(encoding="utf-8").split("\n"))
        dialogues = [[(m["role"], m["content"]) for m in json.loads(line)["messages"]] for line in lines]
        texts = [text for dialogue in dialogues for message in dialogue for text in message]
        if not all(isinstance(text, str) and text == text.encode(errors="ignore").decode() for text in texts):
            raise ValueError("a role or a content is not text")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        fail(f'{path} must have lines like {{"messages": [{{"role": "user", "content": "..."}}]}} ({error!r})')
    if not dialogues:
        fail(f"{path} has no dialogue in it")
    return dialogues


def draw_sum(rng, held_out=False):
    """A sum or difference of numbers below fifty: question, answer, result; a tenth of them is held out.

    The answer shows the steps, tens before ones, 17+20=37+5=42: each step is easier to learn than the whole.
    """
    while True:
        a, b, minus = map(int, rng.integers(0, (50, 50, 2)))
        low, high = sorted((a, b))
        if held_out == (((200 * high + 2 * low + minus) * 2654435761 % 2**32 >> 16) % 10 == 0):  # by a hash
            break
    a, b, word, sign, way = (high, low, "minus", "-", -1) if minus else (a, b, "plus", "+", 1)
    tens, ones = b // 10 * 10, b % 10
    answer = f"{a}{sign}{tens}={a + way * tens}{sign}{ones}={a + way * b}"
    return f"What is {a} {word} {b}?", answer, str(a + way * b)


def draw_dialogue(rng):
    """One to three questions with answers: half of them sums, the rest opposites, spelling and small talk."""
    pairs = [pair.split() for pair in OPPOSITES.split(", ")]
    messages = []
    for kind in rng.integers(0, 6, rng.integers(1, 4)):
        word, other = rng.permutation(pairs[rng.integers(len(pairs))])
        kinds = [(f"What is the opposite of {word}?", str(other)), (f"Spell {word}.", "-".join(word))]
        kinds += [TALK[rng.integers(len(TALK))], *[draw_sum(rng)[:2]] * 3]
        messages += zip(("user", "assistant"), kinds[kind])
    return messages


def render(tokenizer, dialogue, answer=False):
    """Tokens (n,) of the messages [(role, content), ...], and whether each is the assistant's to say, (n,) of 0 and 1.

    A message is its role, a newline, its content and END. With `answer`, the assistant is about to speak.
    """
    parts = []
    for role, content in dialogue:
        own = int(role == "assistant")
        parts += [(f"{role}\n", 0), (content, own), (END, own)]
    parts += [("assistant\n", 0)] * answer
    ids = [tokenizer.encode(text) for text, _ in parts]
    return np.concatenate(ids), np.repeat([own for _, own in parts], list(map(len, ids)))


def reply(trainer, tokenizer, prompts, temperature, seed, reference=False):
    """Answer prompts of one length (B, T): tokens (B, n), and which of them are the answer, END included."""
    end, said, done = tokenizer.encode(END)[0], [], False
    for token in trainer.generate(prompts, 20, temperature, seed=seed, reference=reference):
        said, done = [*said, token], done | (token == end)
        if done.all():
            break
    said = np.stack(said, 1)
    ends = said == end
    return said, ends.cumsum(1) - ends == 0


def grade(tokenizer, said, own, results):
    """1 for each answer (a row of what reply gave) whose end, after the last =, is the right result; 0 for others."""
    texts = [b"".join(spell(tokenizer, i) for i in row[mine]) for row, mine in zip(said, own)]
    ends = [text.split(b"=")[-1].decode("utf-8", "replace") for text in texts]
    return np.array([end == result + END for end, result in zip(ends, results)], np.float32)


def share_right(trainer, tokenizer, n, temperature, seed, reference=False):
    """The share of n held-out sums that are answered correctly."""
    rng, right = np.random.default_rng((seed, 4)), 0.0
    asked = [draw_sum(rng, held_out=True) for _ in range(n)]
    prompts = [render(tokenizer, [("user", question)], answer=True)[0] for question, *_ in asked]
    for length in sorted(set(map(len, prompts))):  # those of one length are answered at once
        some = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        said, own = reply(trainer, tokenizer, np.stack([prompts[i] for i in some]), temperature, seed, reference)
        right += grade(tokenizer, said, own, [asked[i][-1] for i in some]).sum()
    return float(right / n)


def advantages(reward, log_ratio, group, beta):
    """The advantage of each answer over its group: r - beta log p/ref, minus the mean of the others'."""
    worth = (reward - beta * log_ratio).reshape(-1, group)
    others = (worth.sum(1, keepdims=True) - worth) / (group - 1)
    return (worth - others).reshape(-1) / len(reward)


# ---- generated text --------------------------------------------------------------------------------------------------


def stream(trainer, tokenizer, ids, args):
    """Yield, token by token, the text that follows ids; it ends before the first of the strings args.stop.

    Text that may be the beginning of such a string is held back.
    """
    if args.beam > 1:
        n = min(args.tokens, trainer.config.block_size - len(ids))
        tokens = trainer.search(ids[None], n, args.beam)[:, None]
    else:
        tokens = trainer.generate(ids[None], args.tokens, args.temperature, args.top_k, args.top_p, args.seed)
    utf8, text, shown = codecs.getincrementaldecoder("utf-8")("replace"), "", 0
    held = max(map(len, args.stop), default=1) - 1
    for token in tokens:
        text += utf8.decode(spell(tokenizer, token[0]))
        ends = [text.index(stop) for stop in args.stop if stop in text]
        end = min(ends, default=max(shown, len(text) - held))
        yield text[shown:end]
        if ends:
            return
        shown = end
    yield text[shown:]


def say(trainer, tokenizer, ids, args):
    """Print what follows ids, token by token, and return it."""
    said = ""
    for piece in stream(trainer, tokenizer, ids, args):
        print(piece, end="", flush=True)
        said += piece
    print()
    return said


def talk(trainer, tokenizer, args):
    """Answer what is typed, until the input ends; the beginning of a long dialogue is forgotten."""
    dialogue = []
    while True:
        try:
            asked = input("\nyou: ")
            tokenizer.encode(asked)
        except EOFError:
            return print()
        except SystemExit:  # the alphabet lacks a character, as fail has said
            continue
        dialogue.append(("user", asked))
        while len(ids := render(tokenizer, dialogue, answer=True)[0]) > args.block_size // 2 and dialogue[1:]:
            del dialogue[:2]
        print("gpt: ", end="")
        dialogue.append(("assistant", say(trainer, tokenizer, ids, args)))


# ---- tasks -----------------------------------------------------------------------------------------------------------


def together(step, agree):
    """Trainer.step for several processes: Ctrl-C reaches them at different steps, but stops all after the same one."""
    asked, handlers = [], []

    def shared(*arrays, lr):
        if not handlers:  # fit's, which is set after the Trainer is made
            handlers.append(signal.signal(signal.SIGINT, lambda *_: asked.append(True)))
        if agree(bool(asked)):
            signal.signal(signal.SIGINT, handlers[0])
            signal.raise_signal(signal.SIGINT)
        return step(*arrays, lr=lr)

    return shared


class Writing(Task):
    """What all tasks share: the model they start from, its tokenizer, and the text generated at the end."""

    def begin(self, args, saved, texts=("",)):
        """Load the model to start from and its tokenizer, or learn a tokenizer from the training texts."""
        if args.batch_size < (least := args.accumulate * args.world):
            fail(f"--batch-size must be {least} or more: a row for each process and part")
        args.stop = args.stop or []
        if "" in args.stop:
            fail("--stop must not be empty")
        if args.export_hf:
            try:
                args.export_hf.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                fail(f"--export-hf {args.export_hf} can't be created ({error.strerror}): name another folder")
            if {file.name for file in args.export_hf.glob("*.safetensors")} - {"model.safetensors"}:
                fail(f"--export-hf {args.export_hf} holds another model: name an empty folder")
        if args.chat or args.prompt == "-":
            if args.world > 1:
                fail("--chat and --prompt - are for one process: leave them for a later run")
            if sys.stdin is None:
                fail("--chat and --prompt - read the standard input, which is closed: leave them out")
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        args.prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
        if any("\ud800" <= c <= "\udfff" for c in args.prompt or ""):
            fail("--prompt has characters that are not text: type it in UTF-8")
        self.args, self.weights, meta = args, None, saved
        if args.init and not saved:
            meta, self.weights = read_model(Path(args.init))
        if meta:
            self.take_shape(meta["config"])
        if args.n_embd % args.n_head:
            fail("--n-embd must be a multiple of --n-head")
        source = args.out / "ckpt.npz" if saved else args.init
        told = meta.get("tokenizer") if meta else learn_tokenizer(args.kind or "chars", texts, args.merges)
        try:
            kind, known = told
            self.tokenizer, self.extra = make_tokenizer(kind, known), {"tokenizer": [kind, known]}
        except (TypeError, ValueError):
            fail(f"{source} does not say how its text was tokenized: train a new one")
        if args.kind not in (None, kind):
            fail(f"--tokenizer {args.kind} contradicts {source}, which has {kind}: leave it out")
        args.memory |= {"kind": kind}
        self.config = {"vocab_size": self.tokenizer.vocab_size, **self.config}
        if self.tokenizer.vocab_size > self.config["vocab_size"]:
            n = self.config["vocab_size"], self.tokenizer.vocab_size
            fail(f"{source} knows {n[0]} tokens, its tokenizer has {n[1]}: use another")

    def take_shape(self, config):
        """Take the shape of the model to start from, not that of the flags; a shorter context is allowed."""
        args = self.args
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            asked, there = getattr(args, name), config[name]
            if asked not in (None, there) and (name != "block_size" or asked > there):
                fail(f"--{name.replace('_', '-')} {asked} contradicts {args.init}, which has {there}: leave it out")
            setattr(args, name, asked or there)
            args.memory[name] = asked or there
        self.config = {name: x for name, x in config.items() if name not in ("dropout", "optimizer")}

    def readable(self, text):
        """Held-out text without the characters that are not in the alphabet of the training text."""
        known = set(getattr(self.tokenizer, "alphabet", text))
        return "".join(c for c in text if c in known)

    def check(self, ids):
        if not 0 < len(ids) <= self.args.block_size:
            fail(f"--prompt must have 1 to {self.args.block_size} tokens, the context: it has {len(ids)}")
        return ids

    def trainer(self, net, config):
        args, self.net = self.args, net
        trainer = net.Trainer(config, args.seed, args.device, args.accumulate, args.dtype, args.compile)
        if self.weights is not None:
            try:
                net.set_weights(trainer.model, self.weights)
            except (KeyError, ValueError) as error:
                fail(f"{args.init} lacks a weight that the model needs ({error}): download it again")
            self.weights = None  # they may be large
        if args.world > 1:
            trainer.step = together(trainer.step, net.agree)
        return trainer

    def report(self, trainer):
        """One of several processes writes, and the others wait until it is done."""
        ended = ({}, []) if self.args.rank else self.write(trainer)
        if self.args.world > 1:
            self.net.agree(False)
        return ended

    def write(self, trainer):
        """Continue each of self.prompts, [(the text to show, its tokens)]; chat; export."""
        args, sample, began, files = self.args, [], time.perf_counter(), ["sample.txt"]
        for shown, ids in self.prompts:
            print(f"\n{shown}", end="", flush=True)
            sample.append((shown, say(trainer, self.tokenizer, ids, args)))
        written = sum(len(self.tokenizer.encode(said)) for _, said in sample) / (time.perf_counter() - began)
        (args.out / "sample.txt").write_text("\n".join(shown + said for shown, said in sample), encoding="utf-8")
        if args.chat:
            talk(trainer, self.tokenizer, args)
        if args.export_hf:
            meta = {"config": vars(trainer.config), **self.extra}
            export_gpt2(args.export_hf, meta, self.net.get_weights(trainer.model))
            files.append(args.export_hf.resolve())
        return {"written_per_s": round(written, 1)}, files


class Text(Writing):
    """Continue a text: train on random windows of it. The last tenth is held out: validation first, then test."""

    def __init__(self, args, saved):
        if args.chat:
            fail("--chat is for --task chat or rl: train one of these first")
        if path := on_disk(args.data):
            head = self.begin_large(args, saved, path)
            known = json.dumps(self.extra["tokenizer"])
            self.train, self.val = open_tokens(path, self.tokenizer, known, self.readable)
            self.extra["digest"] = digest(self.train.excerpt())
        else:
            text = load_text(args.data)
            head, val = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
            self.begin(args, saved, [head])
            self.train, self.val = self.tokenizer.encode(head), self.tokenizer.encode(self.readable(val))
            self.extra["digest"] = digest(self.train)
        T, n = args.block_size, (len(self.train), len(self.val))
        if min(n) <= T:
            fail(f"{sum(n)} tokens are too few for a context of {T}: lower --block-size or provide {10 * T + 10}")
        prompt = ("The " if "The " in head else head[0]) if args.prompt is None else args.prompt
        self.prompts = [(prompt, self.check(self.tokenizer.encode(prompt)))]
        self.tokens, measured = args.batch_size * T, f", {MEASURED:,} of them measured" * (n[1] > MEASURED)
        self.about = f"{args.data or 'Python manual'}: {n[0]:,} tokens to train on, {n[1]:,} held out{measured}"

    def begin_large(self, args, saved, path):
        """The same for data on disk; returns its beginning, for the default prompt."""
        text = path.is_file() and path.suffix != ".bin"
        if not text and not (saved or args.init):
            if args.kind not in (None, "gpt2"):
                fail(f"{path} holds tokens, GPT-2's unless --init says otherwise: leave --tokenizer {args.kind} out")
            args.kind = "gpt2"
        self.begin(args, saved, pieces(path, 0, cut_at(path)) if text else ())
        return next(pieces(path, 0, PIECE)) if text else "The "

    def windows(self, ids, at):
        x = ids[at[:, None] + np.arange(self.args.block_size + 1)]  # (B, T + 1)
        return x[:, :-1], x[:, 1:]

    def batch(self, step):
        args, rng, T = self.args, np.random.default_rng((self.args.seed, step, 1)), self.args.block_size
        at, x, y = rng.integers(0, len(self.train) - T, args.batch_size), *np.zeros((2, args.batch_size, T), np.int64)
        own = slice(args.rank, None, args.world)  # the rows of other processes are not read
        x[own], y[own] = self.windows(self.train, at[own])
        return x, y

    def measure(self, trainer, starts):
        """The mean loss of the held-out windows that begin at `starts`."""
        total, rows = 0.0, max(1, min(32, 2**26 // self.args.block_size // self.tokenizer.vocab_size))  # to save memory
        for at in np.array_split(starts, math.ceil(len(starts) / rows)):
            total += float(trainer.evaluate(*self.windows(self.val, at))["val_loss"]) * len(at)
        return total / len(starts)

    def evaluate(self, trainer, whole=False):
        T = self.args.block_size
        starts, most = np.arange(0, len(self.val) - T, T), max(64, MEASURED // T) if whole else 128
        val, test = np.array_split(starts[:: math.ceil(len(starts) / most)], 2)  # 64 of each are enough for the log
        figures = {"val_loss": self.measure(trainer, val)}
        return figures | {"test_loss": self.measure(trainer, test)} if whole and len(test) else figures


class Chat(Writing):
    """Answer questions: only the assistant's tokens count. The last tenth of the dialogues is held out."""

    def __init__(self, args, saved):
        rng = np.random.default_rng(6)
        dialogues = load_messages(args.data) if args.data else [draw_dialogue(rng) for _ in range(20000)]
        self.train, val = dialogues[: len(dialogues) * 9 // 10], dialogues[len(dialogues) * 9 // 10 :]
        if not (self.train and all(dialogues)):
            fail(f"{args.data} must have two dialogues or more, and messages in each")
        text = "".join(role + "\n" + content + END for dialogue in self.train for role, content in dialogue)
        self.begin(args, saved, [text + string.printable])  # so that anything can be asked
        self.val = [[tuple(map(self.readable, message)) for message in dialogue] for dialogue in val]
        self.ask([dict(reversed(dialogue)).get("user", dialogue[0][1]) for dialogue in self.val[:6]])
        self.extra["digest"] = digest(self.tokenizer.encode(text))
        n = len(self.train), len(self.val)
        self.about = f"{args.data or 'synthetic'}: {n[0]:,} dialogues to train on, {n[1]:,} held out"

    def ask(self, questions):
        """The questions to answer at the end: --prompt, or those of the questions that fit into the context."""
        args, self.prompts = self.args, []
        args.stop = [*args.stop, END]
        for question in [args.prompt] if args.prompt else questions:
            ids = render(self.tokenizer, [("user", question)], answer=True)[0]
            if args.prompt or len(ids) <= args.block_size:
                self.prompts.append((f"you: {question}\ngpt: ", self.check(ids)))

    def rows(self, dialogues, rng, n):
        """x, y and weights (n, T): one dialogue per row, cut to the context; only the assistant's tokens count."""
        drawn = [np.stack(render(self.tokenizer, dialogues[i])) for i in rng.integers(0, len(dialogues), n)]
        T = min(self.args.block_size, max(dialogue.shape[1] for dialogue in drawn) - 1)
        ids, own = both = np.zeros((2, n, T + 1), np.int64)
        for row, dialogue in enumerate(drawn):
            both[:, row, : dialogue.shape[1]] = dialogue[:, : T + 1]
        return ids[:, :-1], ids[:, 1:], (own[:, 1:] / max(own[:, 1:].sum(), 1)).astype(np.float32)

    def batch(self, step):
        return self.rows(self.train, np.random.default_rng((self.args.seed, step, 1)), self.args.batch_size)

    def evaluate(self, trainer, whole=False):
        figures = trainer.evaluate(*self.rows(self.val, np.random.default_rng(3), 64))
        if whole and not self.args.data:
            figures["accuracy"] = share_right(trainer, self.tokenizer, 500, 0, self.args.seed)
        return figures


class Reward(Chat):
    """Reinforcement learning: GRPO, group-relative policy optimization (Shao et al. 2024).

    Each question is answered `group` times; answer y earns r(y), here 1 if it is right, else 0. r has no gradient, and
    needs none. With y sampled from the model p, and ref the initial model, the objective to maximise is
        J = E[r(y)] - beta KL(p || ref) = E[r(y) - beta log p(y)/ref(y)]
    As grad p = p grad log p, and E[grad log p(y)] = grad sum_y p(y) = grad 1 = 0,
        grad J = E[(r(y) - beta log p(y)/ref(y) - b) grad log p(y)]     for any b that does not depend on y
    and the variance is small if b is near the terms before it, so b is their mean over the group's other answers.
    So the loss is a weighted sum of -log p of the tokens, and that is all that Trainer.step has to know.

    The paper's b is the mean of all answers, and its KL a term of the loss. It also divides by the group's standard
    deviation and the answer's length, which would bias this estimate (Liu et al. 2025), and clips p / p_old, which here
    is 1: each answer is used for one step.
    """

    def __init__(self, args, saved):
        if args.data or not (args.init or saved):
            fail("--task rl starts from a model that answers sums: --init CKPT of --task chat; it takes no --data")
        if args.batch_size % args.group:
            fail("--batch-size must be a multiple of --group")
        self.begin(args, saved)
        if (context := self.config["block_size"]) < 56:
            fail(f"--task rl needs a context of 56 or more for sums and answers, this model's is {context}")
        if saved and not self.is_kept(args.out / "ckpt.npz"):
            if not args.init:
                fail(f"{args.out / 'ckpt.npz'} lacks the model it started from: name it with --init, or start over")
            self.weights = read_model(Path(args.init))[1]
        rng = np.random.default_rng((args.seed, 5))
        self.ask([draw_sum(rng, held_out=True)[0] for _ in range(6)])
        self.about = f"{args.batch_size} answers per step, {args.group} per question"

    def is_kept(self, ckpt):
        """Whether a checkpoint holds the reference; those of earlier versions do not."""
        with np.load(ckpt, allow_pickle=False) as f:
            return "ref.wte.weight" in f.files

    def trainer(self, net, config):
        self.policy = super().trainer(net, config)  # batch() lets it answer
        self.policy.keep_reference()
        return self.policy

    def batch(self, step):
        args, tokenizer, asked, rng = self.args, self.tokenizer, [], np.random.default_rng((self.args.seed, step, 1))
        while len(asked) < args.batch_size // args.group:
            question, _, result = draw_sum(rng)
            prompt = render(tokenizer, [("user", question)], answer=True)[0]
            if not asked or len(prompt) == len(asked[0][0]):  # all of one length
                asked.append((prompt, result))
        prompts, results = (np.repeat(side, args.group, 0) for side in zip(*asked))
        said, own = reply(self.policy, tokenizer, prompts, 1.0, args.seed + 1_000_003 * (step + 1))
        ids, own = np.append(prompts, said, 1), np.append(np.zeros_like(prompts), own, 1)[:, 1:]
        x, y = ids[:, :-1], ids[:, 1:]
        log_ratio = ((self.policy.log_prob(x, y) - self.policy.log_prob(x, y, reference=True)) * own).sum(1)
        worth = advantages(grade(tokenizer, y, own == 1, results), log_ratio, args.group, args.beta)
        return x, y, (own * worth[:, None]).astype(np.float32)

    def evaluate(self, trainer, whole=False):
        n, seed = 500 if whole else 100, self.args.seed
        figures = {"reward": share_right(trainer, self.tokenizer, n, 1.0, seed)}
        if whole:
            figures["reward_before"] = share_right(trainer, self.tokenizer, n, 1.0, seed, reference=True)
        return figures


TASKS = {"text": Text, "chat": Chat, "rl": Reward}
