"""The tasks: continue a text, or chat; and the tokenizers and weights of released models.

One class per task, all in numpy. To add a task, write one more class and add it to TASKS at the end.
"""

import argparse
import atexit
import base64
import codecs
import hashlib
import io
import json
import math
import os
import pydoc_data.topics
import re
import shutil
import signal
import sys
import time
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZES = {  # of models, by their number of parameters
    "tiny": dict(n_layer=4, n_head=4, n_kv_head=2, n_embd=128, n_hidden=384),  # 0.8 million
    "135M": dict(n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_hidden=1536),  # SmolLM2's
    "1B": dict(n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, n_hidden=8192, rope_theta=5e5),  # Llama 3.2's
    "7B": dict(n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, n_hidden=11008, tied=False),  # Llama 2's
    "8B": dict(n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, n_hidden=14336, tied=False, rope_theta=5e5),  # 3's
}
WHOLE = {  # fields of Config, and their names in Hugging Face's config.json: integers, then other numbers
    "block_size": "max_position_embeddings", "vocab_size": "vocab_size", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "head_dim": "head_dim",
    "n_embd": "hidden_size", "n_hidden": "intermediate_size", "rope_context": "original_max_position_embeddings",
}  # fmt: skip
REAL = {"norm_eps": "rms_norm_eps", "rope_theta": "rope_theta", "rope_factor": "factor",
        "rope_low": "low_freq_factor", "rope_high": "high_freq_factor"}  # fmt: skip
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # here one matrix
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
             "merges.txt", "chat_template.jinja")  # fmt: skip
SHARD = 2 * 10**9  # the most bytes in a file of weights
LARGE = 1 << 24  # bytes; the tokens of a larger text are kept in files
PIECE = 1 << 22  # bytes that are read at once
MEASURED = 1 << 20  # the most held-out tokens to evaluate
SHAPE = "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden"  # each also has its own flag
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # how text is split into words
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")  # fmt: skip
TEMPLATES = {  # chat templates, by a token that identifies them: the start, and what is before and after each message
    "<|im_start|>": ("", "<|im_start|>{}\n", "<|im_end|>\n"),  # ChatML
    "<|eot_id|>": ("<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),  # Llama 3
}

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


# ---- models in Hugging Face's format ---------------------------------------------------------------------------------


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


def load_llama(folder):
    """Load the arguments of Config and the weights {name: array} from a folder; anything but a Llama is refused."""
    try:
        c = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        rope = {**c, **(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        usual = c["model_type"] == "llama" and c.get("hidden_act", "silu") == "silu"
        if not usual or c.get("attention_bias") or c.get("mlp_bias"):
            fail(f"{folder} holds a {c['model_type']} with parts that Llama does not have: name a folder with a Llama")
        if kind not in ("default", "linear", "llama3"):
            fail(f"{folder} has rotary positions of type {kind}: only default, linear and llama3 are supported")
        c = {"num_key_value_heads": c["num_attention_heads"], "head_dim": 0, "rope_theta": 10000.0, "factor": 1.0,
             "low_freq_factor": 1.0, "high_freq_factor": 4.0, "tie_word_embeddings": False,
             "original_max_position_embeddings": c["max_position_embeddings"],
             **{name: x for name, x in rope.items() if x is not None}}  # fmt: skip
        config = {name: c[theirs] for name, theirs in (WHOLE | REAL).items()}
        for name, x in config.items():
            known = isinstance(x, int if name in WHOLE else (int, float)) and not isinstance(x, bool)
            if not known or not (0 < x < 2**31 or (name, x) == ("head_dim", 0)):
                fail(f"{folder}/config.json has {(WHOLE | REAL)[name]} {x!r}, not that of a Llama: download it again")
        w = {name.removeprefix("model."): w for name, w in read_safetensors(folder)}
        size = max(1, config["head_dim"] or config["n_embd"] // config["n_head"])
        found = {
            "n_layer": sum(name.endswith("input_layernorm.weight") for name in w),
            "vocab_size": len(w["embed_tokens.weight"]), "n_embd": len(w["norm.weight"]),
            "head_dim": config["head_dim"] and len(w["layers.0.self_attn.q_proj.weight"]) / config["n_head"],
            "n_head": len(w["layers.0.self_attn.q_proj.weight"]) / size,
            "n_kv_head": len(w["layers.0.self_attn.k_proj.weight"]) / size,
            "n_hidden": len(w["layers.0.mlp.gate_proj.weight"]),
        }  # fmt: skip
        for name, n in found.items():
            if n != config[name]:
                fail(f"{folder}/config.json has {WHOLE[name]} {config[name]}, its weights {n:g}: download it again")
        for i in range(config["n_layer"]):
            for whole, parts in PARTS.items():
                at = f"layers.{i}.{'self_attn' if whole == 'qkv_proj' else 'mlp'}"
                w[f"{at}.{whole}.weight"] = np.concatenate([w.pop(f"{at}.{part}.weight") for part in parts])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{folder} is not a complete model in Hugging Face's format ({error!r}): download it again")
    return config | {"tied": bool(c["tie_word_embeddings"]), "rope": kind}, w


def write_safetensors(file, weights, dtype):
    """Write {name: float32 array} for read_safetensors; dtype: float32, or bfloat16, rounded to the nearest."""
    header, size, end = {"__metadata__": {"format": "pt"}}, {"float32": 4, "bfloat16": 2}[dtype], 0
    for name, w in weights.items():
        place = [end, end := end + w.size * size]
        header[name] = {"dtype": {4: "F32", 2: "BF16"}[size], "shape": w.shape, "data_offsets": place}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with open(file, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for w in weights.values():
            w = np.ascontiguousarray(w)
            if size == 2:  # the upper half of a float32, rounded to the nearest, ties to even
                bits = w.view(np.uint32)
                w = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
            f.write(w)


def export_llama(folder, config, weights, dtype="float32", tokenizer=None, ends=()):
    """The inverse: write what transformers loads with AutoModelForCausalLM.from_pretrained(folder).

    tokenizer: the folder whose tokenizer is copied; ends: the tokens that end a text. Everything is written to
    folder.part first, and moved into place when it is complete.
    """
    size = config.n_head * config.head_size, config.n_kv_head * config.head_size
    cuts = {"qkv_proj": [size[0], sum(size)], "gate_up_proj": [config.n_hidden]}
    shards, most = [{}], SHARD // {"float32": 4, "bfloat16": 2}[dtype]
    for name, w in weights.items():
        whole = name.split(".")[-2]
        for part, piece in zip(PARTS.get(whole, [whole]), np.split(w, cuts.get(whole, []))):
            if shards[-1] and sum(w.size for w in shards[-1].values()) + piece.size > most:
                shards.append({})
            shards[-1]["model." * (whole != "lm_head") + name.replace(whole, part)] = piece
    c = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "torch_dtype": dtype,
         "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": config.tied, "bos_token_id": None,
         "eos_token_id": sorted(ends) or None, "pad_token_id": None}  # fmt: skip
    c |= {theirs: getattr(config, name) for name, theirs in (WHOLE | REAL).items() if not theirs.endswith("factor")}
    scaling = {theirs: getattr(config, name) for name, theirs in REAL.items() if theirs.endswith("factor")}
    scaling |= {"rope_type": config.rope, "original_max_position_embeddings": c.pop("original_max_position_embeddings")}
    c |= {"head_dim": config.head_size, "rope_scaling": None if config.rope == "default" else scaling}
    part = folder.with_name(folder.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        for file, shard in zip(files if shards[1:] else ["model.safetensors"], shards):
            write_safetensors(part / file, shard, dtype)
        if shards[1:]:
            index = {"metadata": {"total_size": sum(w.size for w in weights.values()) * SHARD // most}}
            index["weight_map"] = {name: file for file, shard in zip(files, shards) for name in shard}
            (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        (part / "config.json").write_text(json.dumps(c, indent=1))
        for name in TOKENIZER if tokenizer else ():
            if (Path(tokenizer) / name).exists():
                shutil.copyfile(Path(tokenizer) / name, part / name)
        if folder.exists():
            folder.rmdir()  # it is empty
        os.replace(part, folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        fail(f"--export-hf {folder} could not be written ({error.strerror or error}): make room, or name another")


# ---- texts, dialogues and their tokens -------------------------------------------------------------------------------


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


def read_tokenizer(folder):
    """Read a folder's tokenizer: tokens as bytes in the order they were learned, special tokens, ids, pattern."""
    if (file := Path(folder) / "tokenizer.model").exists() and not (Path(folder) / "tokenizer.json").exists():
        try:
            ranked = [base64.b64decode(line.split()[0], validate=True) for line in file.read_bytes().splitlines()]
            if len(set(ranked)) < len(ranked) or {bytes([b]) for b in range(256)} - {*ranked}:
                raise ValueError("each byte must be a token, and no token may occur twice")
        except (ValueError, IndexError):
            fail(f"{file} is not Llama 3's, perhaps SentencePiece as in Llama 2: only byte-level BPE is supported")
        names = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
        special = [f"<|{names.get(i, f'reserved_{i}')}|>" for i in range(256)]
        return ranked, special, np.arange(len(ranked) + 256), LLAMA3
    file = Path(folder) / "tokenizer.json"
    try:
        t = json.loads(file.read_text(encoding="utf-8"))
        vocab, merges, pattern = t["model"]["vocab"], t["model"]["merges"], GPT2
        steps = t["pre_tokenizer"].get("pretokenizers", [t["pre_tokenizer"]])
        kinds = [step["type"] for step in steps]
        if t["normalizer"] or kinds not in (["ByteLevel"], ["Digits", "ByteLevel"], ["Split", "ByteLevel"]):
            fail(f"{file} is not byte-level BPE as in SmolLM2 and Llama 3, the only kind that is supported")
        if kinds[0] == "Digits":  # each digit by itself; spaces before it are split as at the end of a text
            pattern = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
        if kinds[0] == "Split":
            pattern = steps[0]["pattern"]["Regex"]
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these bytes stand for themselves in the file,
        hidden = [byte for byte in range(256) if byte not in shown]  # the others for the characters from 256 on
        byte = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}
        learned = ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
        ranked, special = list(dict.fromkeys([*byte, *learned])), {x["content"]: x["id"] for x in t["added_tokens"]}
        ids = [vocab.get(token, -1) for token in ranked] + list(special.values())  # a byte may be missing
        if not all(isinstance(i, int) and -1 <= i < 2 * len(ids) + 1000 for i in ids):
            raise ValueError("the number of a token is not an integer, or far too large")
        return [bytes(byte[c] for c in token) for token in ranked], list(special), np.array(ids), pattern
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{file} can't be read ({error!r}): a model's folder must have it, or Llama 3's tokenizer.model")


class Tokens:
    """The tokenizer of a released model: tiktoken merges, and `ids` maps its numbers to the model's."""

    def __init__(self, folder):
        try:
            import tiktoken
        except ModuleNotFoundError:
            fail(f"the tokenizer in {folder} needs tiktoken: pip install tiktoken")
        ranked, special, self.ids, pattern = read_tokenizer(folder)
        self.special = {token: len(ranked) + i for i, token in enumerate(special)}
        ranks = {token: i for i, token in enumerate(ranked)}
        try:
            names = dict(mergeable_ranks=ranks, special_tokens=self.special)
            self.bpe = tiktoken.Encoding(str(folder), pat_str=pattern, **names)
        except (ValueError, TypeError) as error:
            fail(f"{folder} has a tokenizer that tiktoken does not accept ({error}): download it again")
        self.bytes = dict(zip(self.ids.tolist(), [*ranked, *(token.encode() for token in special)]))
        self.vocab_size = int(self.ids.max()) + 1
        ends = {"<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>"} & self.special.keys()
        self.ends = {int(self.ids[self.special[token]]) for token in ends}
        self.start = self.encode("<|begin_of_text|>", special=True) if "<|begin_of_text|>" in self.special else ()

    def encode(self, text, special=False):
        """Names like <|im_end|> are special tokens only if `special`, else plain text."""
        ids = self.bpe.encode(text, allowed_special="all" if special else set(), disallowed_special=())
        ids = self.ids[np.array(ids, np.int64)]
        return ids[ids >= 0]

    def decode(self, token):
        return self.bytes.get(token, b"")

    def dialogue(self, messages):
        """The tokens of [(role, text)] in the chat template, open if it is the model's turn; which are the model's."""
        form = next((form for key, form in TEMPLATES.items() if key in self.special), None)
        if not form:
            fail("this model's tokens are neither ChatML's nor Llama 3's, so it can't chat: give it a --prompt")
        start, before, after = form
        parts = [(start, True, False)]
        for role, text in messages:
            own = role == "assistant"
            parts += [(before.format(role), True, False), (text.strip(), False, own), (after, True, own)]
        if messages[-1][0] != "assistant":
            parts.append((before.format("assistant"), True, False))
        ids = [self.encode(text, special) for text, special, _ in parts]
        return np.concatenate(ids), np.concatenate([np.full(len(i), own) for i, (_, _, own) in zip(ids, parts)])


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


class Text(Task):
    """Continue a text: train on random windows of it. The last tenth is held out: validation first, then test.

    `train` and `val` are rows of tokens; `starts` and `test` say where in `val` the windows of T + 1 of each begin.
    """

    def __init__(self, args, saved):
        self.args, self.weights, self.folder = args, None, args.tokenizer or args.init
        self.refuse()
        self.config = self.start_from(saved["config"] if saved else None)
        context = (saved["config"] if saved else self.config).get("block_size", 128)
        self.T = args.length or (min(256, context) if args.init else context)
        if not (args.init or saved):
            self.config["block_size"] = self.T
        if self.folder:
            self.tokenizer = Tokens(self.folder)
        else:
            self.tokenizer = Characters(saved["alphabet"] if saved else self.alphabet())
            self.extra = {"alphabet": self.tokenizer.alphabet}
        self.config.setdefault("vocab_size", self.tokenizer.vocab_size)
        if self.tokenizer.vocab_size > self.config["vocab_size"]:
            n = self.tokenizer.vocab_size, self.config["vocab_size"]
            fail(f"the tokenizer has {n[0]} tokens, the model {n[1]}: name the model's own with --tokenizer")
        args.memory |= {name: self.config[name] for name in args.memory.keys() & self.config.keys()}  # of --init
        self.tokens, self.starts, self.test, self.lengths = args.batch_size * self.T, [], [], args.lengths or []
        if args.steps or self.lengths or not args.chat and (not args.init or args.data or args.bits < 32):
            self.load()  # else nothing is trained or evaluated
        self.prompt = self.read_prompt()

    def refuse(self):
        """End the run if the flags fit no model and no data."""
        args, parts = self.args, self.args.accumulate * self.args.world
        if args.batch_size < parts:
            fail(f"--batch-size must be {parts} or more: a row for each process and each part of --accumulate")
        if args.world > 1 and args.backend == "torch" and args.optimizer == "muon":
            fail("torchrun splits the matrices that muon needs whole: add --optimizer adamw")
        if args.lora_rank and not args.init:
            fail("--lora adapts an existing model: name its folder with --init")
        if args.chat and not self.folder:
            fail("--chat needs a model that can chat: name its folder with --init")
        if args.world > 1 and (args.chat or args.prompt == "-" or args.bits < 32 and args.backend == "torch"):
            fail("--chat, --prompt - and, with torch, --bits 8 and 4 are for one process: leave them for a later run")
        if args.export_hf and args.window:
            fail("--export-hf writes a format without --window: leave one of them out")
        if args.export_hf and args.export_hf.exists() and (args.export_hf.is_file() or os.listdir(args.export_hf)):
            fail(f"--export-hf {args.export_hf} exists already: name a new folder")
        if args.chat or args.prompt == "-":
            if sys.stdin is None:
                fail("--chat and --prompt - read the standard input, which is closed: leave them out")
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        args.prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
        for flag, text in ("--prompt", args.prompt), ("--system", args.system):
            if any("\ud800" <= c <= "\udfff" for c in text or ""):
                fail(f"{flag} has characters that are not text: type it in UTF-8")

    def start_from(self, saved):
        """The shape of the model: from --init, whose weights are read, or from --size, or `saved`."""
        args = self.args
        if saved:
            saved.pop("accumulate", None)  # was once a field of Config
        if not args.init:
            return {} if saved else {name: x for name, x in SIZES[args.size].items() if name not in args.memory}
        config, self.weights = load_llama(args.init)
        for name in ("size", *SHAPE):
            asked, there = args.memory[name], config.get(name, "its own")
            if asked not in (None, there):
                flag = "--" + name.replace("_", "-")
                fail(f"{flag} {asked} contradicts --init {args.init}, which has {there}: leave one of them out")
        return config | {name: args.memory[name] for name in ("rope", "rope_factor") if args.memory[name] is not None}

    def alphabet(self):
        """The characters of the training part."""
        if path := on_disk(self.args.data):
            if path.is_dir() or path.suffix == ".bin":
                fail(f"{path} holds tokens: name the folder of their --tokenizer, or of a model with --init")
            return "".join(sorted(set().union(*map(set, pieces(path, 0, cut_at(path))))))
        text = load_text(self.args.data)
        return "".join(sorted(set(text[: len(text) * 9 // 10])))

    def readable(self, text):
        """Held-out text without the characters that are not in the alphabet of the training text."""
        known = set(getattr(self.tokenizer, "alphabet", text))
        return "".join(c for c in text if c in known)

    def load(self):
        """Read the data and split it."""
        if str(self.args.data).endswith(".jsonl"):
            fail(f"{self.args.data} holds dialogues: add --task chat")
        encode, T = self.tokenizer.encode, self.T
        if path := on_disk(self.args.data):
            files = sorted(Path(self.folder).glob("tokenizer*")) if self.folder else []
            known = [self.extra, *(file.read_bytes() for file in files)]
            self.train, self.val = open_tokens(path, self.tokenizer, known, self.readable)
        else:
            text = load_text(self.args.data)
            if self.folder:
                ids = encode(text)
                self.train, self.val = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
            else:
                n = len(text) * 9 // 10
                self.train, self.val = encode(text[:n]), encode(self.readable(text[n:]))
        n = len(self.train), len(self.val)
        if n[1] <= T:
            fail(f"{sum(n)} tokens are too few for a context of {T}: lower --block-size or provide {10 * T + 10}")
        self.starts, self.test = self.halves(T)
        self.extra = self.extra | {"digest": digest(self.train.excerpt() if path else self.train)}
        measured = f", {MEASURED:,} of them measured" * (n[1] > MEASURED)
        self.about = f"{self.args.data or 'Python manual'}: {n[0]:,} tokens to train on, {n[1]:,} held out{measured}"
        if max(self.lengths, default=0) >= n[1]:
            fail(f"--lengths must be 1 to {n[1] - 1}, the tokens of the held-out text")

    def halves(self, T):
        """Where windows of T + 1 held-out tokens begin: those for validation, those for the test."""
        return np.array_split(np.arange(0, len(self.val) - T, T), 2)

    def read_prompt(self):
        """The tokens of --prompt, (n,)."""
        args, tokenizer = self.args, self.tokenizer
        if args.chat:
            tokenizer.dialogue([("user", "")])  # refuses tokenizers without a chat template
        if args.prompt is None:
            args.prompt = "The " if self.folder or set("The ") <= set(tokenizer.alphabet) else tokenizer.alphabet[0]
        prompt = np.array([*getattr(tokenizer, "start", []), *tokenizer.encode(args.prompt)], np.int64)
        if not len(prompt):
            fail("--prompt is empty: give it a word")
        return prompt

    def trainer(self, net, config):
        args, weights, self.weights, self.net = self.args, self.weights, None, net  # the weights may be large
        elsewhere = args.backend == "torch" and args.device != "cpu"
        widths = config.n_embd, config.n_hidden, config.n_head * config.head_size
        if args.bits < 32 and (elsewhere or any(n % 32 for n in widths)):
            fail("--bits 8 and 4 need --device cpu with torch, and widths that are multiples of 32")
        try:
            how = args.accumulate, args.dtype, args.compile
            trainer = net.Trainer(config, args.seed, args.device, weights, *how)
        except (KeyError, ValueError) as error:
            fail(f"the weights in {args.init} do not fit the model ({error}): download them again")
        if args.world > 1:
            trainer.step = together(trainer.step, net.agree)
        learning = sum(math.prod(w.shape) for w in net.trained(trainer.model).values())
        self.about = "; ".join(filter(None, [f"{learning:,} of them to train" * (config.lora_rank > 0), self.about]))
        return trainer

    def windows(self, ids, at, T):
        """x and y (B, T), y shifted by one: windows of `ids` that begin at `at` (B,)."""
        x = ids[at[:, None] + np.arange(T + 1)]
        return x[:, :-1], x[:, 1:]

    def batch(self, step):
        args, rng, T = self.args, np.random.default_rng((self.args.seed, step, 1)), self.T
        at, x, y = rng.integers(0, len(self.train) - T, args.batch_size), *np.zeros((2, args.batch_size, T), np.int64)
        own = slice(args.rank, None, args.world)  # the rows of other processes are not read
        x[own], y[own] = self.windows(self.train, at[own], T)
        return x, y

    def held_out(self, at, T):
        return self.windows(self.val, at, T)

    def measure(self, trainer, starts, T):
        """{"val_loss", "perplexity"} of the windows of T tokens that begin at `starts`."""
        total, n, rows = 0.0, 0, max(1, min(32, 2**26 // T // trainer.config.vocab_size))  # to save memory
        starts = starts[:: math.ceil(len(starts) / max(32, MEASURED // T // 2))]
        for at in np.array_split(starts, math.ceil(len(starts) / rows)):
            x, y = self.held_out(at, T)
            total += float(trainer.evaluate(x, y)["val_loss"]) * (y >= 0).sum()
            n += (y >= 0).sum()
        return {"val_loss": total / n, "perplexity": math.exp(min(total / n, 700))}  # more overflows a float

    def evaluate(self, trainer, whole=False):
        starts = self.starts
        if not len(starts):
            return {}
        if not whole:  # 64 are enough for the log
            return {"val_loss": self.measure(trainer, starts[:: math.ceil(len(starts) / 64)], self.T)["val_loss"]}
        self.figures = self.measure(trainer, starts, self.T)
        if len(self.test):
            self.figures["test_loss"] = self.measure(trainer, self.test, self.T)["val_loss"]
        return self.figures

    def report(self, trainer):
        args, figures, files = self.args, {}, []
        if args.merge:
            files.append("merged/ckpt.npz")
            (args.out / "merged").mkdir(exist_ok=True)
            trainer.merge()
            new = {name: x for name, x in args.memory.items() if name not in ("lora_rank", "steps", "lr")}
            trainer.save(args.out / files[0], 0, **self.extra, args=new)
        if args.export_hf:
            trainer.merge()
            weights, ends = self.net.get_weights(trainer.model), getattr(self.tokenizer, "ends", ())
            if not args.rank:
                export_llama(args.export_hf, trainer.config, weights, args.export_dtype, self.folder, ends)
            files.append(args.export_hf.resolve())
        for bits in dict.fromkeys([32, args.bits]):
            megabytes = trainer.quantize(bits)
            if len(self.starts):
                figures = self.figures if bits == 32 else self.evaluate(trainer, whole=True)
                print(f"{bits:2} bits: {megabytes:.1f} MB, perplexity {figures['perplexity']:.4f}", flush=True)
        for length in self.lengths:
            starts, _ = self.halves(length)
            figures = figures | {f"perplexity_{length}": self.measure(trainer, starts, length)["perplexity"]}
            print(f"texts of {length} tokens: perplexity {figures[f'perplexity_{length}']:.4f}", flush=True)
        text, speed = self.chat(trainer) if args.chat else self.go_on(trainer)
        (args.out / "sample.txt").write_text(text, encoding="utf-8")
        if args.world > 1:
            self.net.agree(False)  # no process ends before the others are done
        return {**figures, "written_per_s": round(speed, 1)}, [*files, "sample.txt"]

    def speak(self, trainer, ids):
        """Print the continuation of the tokens `ids` as it is generated; returns it and the tokens per second."""
        args, utf8, text, n = self.args, codecs.getincrementaldecoder("utf-8")("replace"), [], 0
        began = time.perf_counter()
        for token in trainer.generate(ids[None], args.tokens, args.temperature, args.top_k, args.top_p, args.seed):
            n += 1
            if int(token[0]) in getattr(self.tokenizer, "ends", ()):
                break
            text.append(utf8.decode(self.tokenizer.decode(int(token[0]))))
            print(text[-1], end="", flush=True)
        print("\n", flush=True)
        return "".join(text), n / (time.perf_counter() - began)

    def go_on(self, trainer):
        """Continue the prompt; returns both and the tokens per second."""
        print(f"\n{self.args.prompt}", end="", flush=True)
        text, speed = self.speak(trainer, self.prompt)
        return self.args.prompt + text, speed

    def chat(self, trainer):
        """Answer what is typed, line by line, until the input ends; returns the dialogue and the tokens per second."""
        messages, speed = [("system", self.args.system)] if self.args.system else [], 0.0
        while True:
            try:
                messages.append(("user", input("> ")))
            except EOFError:
                print()
                return "".join(f"{role}: {text}\n\n" for role, text in messages), speed
            text, speed = self.speak(trainer, self.tokenizer.dialogue(messages)[0])
            messages.append(("assistant", text))


class Chat(Text):
    """Answer: one dialogue per row, of which only the assistant's tokens count. The last tenth is held out."""

    def load(self):
        data, T = self.args.data, self.T
        if not self.folder:
            fail("dialogues need a model with a chat template: name its folder with --init")
        if not data or self.lengths:
            fail("--task chat trains on dialogues: name a .jsonl with --data, and leave --lengths to texts")
        if not all(messages := load_messages(data)):
            fail(f"{data} has a dialogue without messages: leave it out")
        dialogues = [(ids, own) for ids, own in map(self.tokenizer.dialogue, messages) if own.any()]
        n = len(dialogues) - max(1, len(dialogues) // 10)
        ids, targets = (np.full((len(dialogues), T + 1), fill) for fill in (0, -1))  # one row each, cut or padded
        for i, (tokens, own) in enumerate(dialogues):
            ids[i, : len(tokens)] = tokens[: T + 1]
            targets[i, : len(tokens)] = np.where(own, tokens, -1)[: T + 1]
        starts = np.flatnonzero((targets[:, 1:] >= 0).any(1))  # rows with something to learn
        self.train, self.starts = starts[starts < n], starts[starts >= n]  # rows
        if not (len(self.train) and len(self.starts)):
            fail(f"{data} has {len(starts)} dialogues with an answer in the first {T} tokens: two are needed")
        self.ids, self.targets = ids, targets
        self.extra = {"digest": digest(*(tokens for tokens, _ in dialogues[:n]))}
        self.about = f"{data}: {len(self.train):,} dialogues to train on, {len(self.starts):,} held out"

    def batch(self, step):
        rng = np.random.default_rng((self.args.seed, step, 1))
        return self.held_out(self.train[rng.integers(0, len(self.train), self.args.batch_size)], self.T)

    def held_out(self, at, T):
        return self.ids[at, :-1], self.targets[at, 1:]


TASKS = {"text": Text, "chat": Chat}
