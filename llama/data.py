"""What there is to learn: a text, or dialogues; the tokens of real models and the weights that they start from.

One class a task, all in numpy. A new task is one more class, named in TASKS at the end.
"""

import argparse
import atexit
import base64
import codecs
import hashlib
import json
import math
import os
import pydoc_data.topics
import shutil
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
WHOLE = {  # what Config and the config.json of Hugging Face both have, by the names there: whole numbers, and others
    "block_size": "max_position_embeddings", "vocab_size": "vocab_size", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "head_dim": "head_dim",
    "n_embd": "hidden_size", "n_hidden": "intermediate_size", "rope_context": "original_max_position_embeddings",
}  # fmt: skip
REAL = {"norm_eps": "rms_norm_eps", "rope_theta": "rope_theta", "rope_factor": "factor",
        "rope_low": "low_freq_factor", "rope_high": "high_freq_factor"}  # fmt: skip
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # here one matrix
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
             "merges.txt", "chat_template.jinja")  # fmt: skip
SHARD = 2 * 10**9  # bytes of a file of weights, at most
SHAPE = "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden"  # each has a flag of its own, too
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # how a text is cut into words
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")  # fmt: skip
TEMPLATES = {  # of a dialogue, by a token that tells them: its start, and what is before and after each message
    "<|im_start|>": ("", "<|im_start|>{}\n", "<|im_end|>\n"),  # ChatML
    "<|eot_id|>": ("<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),  # Llama 3
}

# ---- what every folder has, the same to the letter -------------------------------------------------------------------


def fail(message):
    """Bad input ends the run: one line that says what and how to mend it, exit code 2."""
    print("train.py:", " ".join(str(message).split())[:1000], file=sys.stderr)
    raise SystemExit(2)


def within(span, kind=float):
    """A type for add_argument: a number inside the interval `span`, such as "[0, 1)"; --help shows it."""
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
    """What Trainer.save wrote beside the arrays: config, step and more. Reads the whole file, so damage shows here."""
    try:
        with np.load(path, allow_pickle=False) as f:
            if f.zip.testzip() or any(part.compress_type for part in f.zip.infolist()):
                raise ValueError("a part is damaged or compressed")
            meta = json.loads(str(f["meta"]))
        most = max(1 << 20, path.stat().st_size)  # no size of a model is more than the bytes of its weights
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
    fail(f"{path} is no checkpoint to go on from ({reason}): train anew without --resume, or name another --out")


def parse(parser, model, fixed, kept, defaults):
    """The arguments; and with --resume what the checkpoint remembers, else None.

    A flag that is not given is as in the checkpoint, or as defaults() says. A resumed run may not change those of
    `fixed`; it may change those of `kept`, which a checkpoint remembers, too.
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
        if None not in (asked, there) and asked != there and flag.dest != "data":  # those are compared by their content
            fail(f"{flag.option_strings[0]} {asked} contradicts {out / 'ckpt.npz'}, which has {there}: leave it out")
    known |= {"data": given.data} if given.data else {}
    parser.set_defaults(out=out, **known)
    parser.set_defaults(**{**defaults(parser.parse_known_args()[0]), **known})
    parser.add_argument("-h", "--help", action="help", help="show this and end")
    args = parser.parse_args()
    args.memory = {flag.dest: getattr(args, flag.dest) for flag in fixed + kept}
    if saved:
        saved["config"] |= {flag.dest: args.memory[flag.dest] for flag in kept if flag.dest in saved["config"]}
    return args, saved


def claim(args):
    """Make the folder args.out this run's own until it ends; returns what its first line has to say of that."""
    if args.rank:
        return ""
    args.out.mkdir(parents=True, exist_ok=True)
    lock, ckpt = args.out / "lock", args.out / "ckpt.npz"
    try:
        if (pid := int(lock.read_text())) != os.getpid():
            os.kill(pid, 0)  # no signal: it asks whether there is such a process
            fail(f"{args.out} is in use by process {pid}: wait for its end, or name another --out")
    except (FileNotFoundError, ProcessLookupError, ValueError):
        lock.unlink(missing_ok=True)  # of a run that was killed
    with open(lock, "x") as f:
        f.write(str(os.getpid()))
    atexit.register(lock.unlink, missing_ok=True)
    if args.resume or not args.steps:
        return "" if args.resume or getattr(args, "init", None) else "; nothing is trained: the weights are random"
    return "; the checkpoint there becomes ckpt.old.npz" if ckpt.exists() else ""


def record(out, row, first):
    """Append {figure: number} to OUT/log.jsonl, or begin it anew, and draw what is in it as OUT/curve.png."""
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
        draw.text((20, 280 * i + 14), f"{name} {y[0]:.4g} to {y[-1]:.4g}, least {y.min():.4g}", (60, 60, 60), font)
        draw.line(list(zip(20 + 1240 * x / row["step"], 280 * i + 260 - 190 * height)), (31, 119, 180), 5)
    image.reduce(2).save(out / "curve.png")


def digest(*arrays):
    """A hash of what is learned from: by it a checkpoint knows its data, whatever their file is called."""
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
    """What train.py asks of a task. To add your own, write a class like those below and name it in TASKS.

    Beside what stands here: batch(step), the arrays of Trainer.step, drawn from (seed, step); and
    evaluate(trainer, whole=False), {figure: number} on data held out, for a log line of a part of them.
    """

    config, extra, about = {}, {}, ""  # its part of the model's Config; what a checkpoint must know of it; a line
    tokens = 0  # of a step, where tokens are counted

    def trainer(self, net, config):
        """The Trainer that learns it."""
        return net.Trainer(config, seed=self.args.seed, device=self.args.device)

    def report(self, trainer):
        """At the end: more figures, and the names of the files that it wrote to args.out."""
        return {}, []


# ---- a model in the layout of Hugging Face ---------------------------------------------------------------------------


def read_safetensors(folder):
    """Yield the name and the float32 array of each tensor in the folder's *.safetensors.

    Such a file is eight bytes of length, a JSON header of that length, and the numbers.
    """
    types = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # of other types are only buffers
    if not (files := sorted(Path(folder).glob("*.safetensors"))):
        fail(f"{folder} has no *.safetensors: name a folder in the layout of Hugging Face")
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
            fail(f"{file} is damaged ({error}): fetch it again")


def load_llama(folder):
    """The arguments of Config and the weights {name: array} that a folder holds; all but a Llama is refused."""
    try:
        c = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        rope = {**c, **(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        usual = c["model_type"] == "llama" and c.get("hidden_act", "silu") == "silu"
        if not usual or c.get("attention_bias") or c.get("mlp_bias"):
            fail(f"{folder} holds a {c['model_type']} with parts that Llama has not: name a folder with a Llama")
        if kind not in ("default", "linear", "llama3"):
            fail(f"{folder} has rotary positions of type {kind}: default, linear and llama3 are known here")
        c = {"num_key_value_heads": c["num_attention_heads"], "head_dim": 0, "rope_theta": 10000.0, "factor": 1.0,
             "low_freq_factor": 1.0, "high_freq_factor": 4.0, "tie_word_embeddings": False,
             "original_max_position_embeddings": c["max_position_embeddings"],
             **{name: x for name, x in rope.items() if x is not None}}  # fmt: skip
        config = {name: c[theirs] for name, theirs in (WHOLE | REAL).items()}
        for name, x in config.items():
            known = isinstance(x, int if name in WHOLE else (int, float)) and not isinstance(x, bool)
            if not known or not (0 < x < 2**31 or (name, x) == ("head_dim", 0)):
                fail(f"{folder}/config.json has {(WHOLE | REAL)[name]} {x!r}, which no Llama can have: fetch it again")
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
                fail(f"{folder}/config.json has {WHOLE[name]} {config[name]}, its weights have {n:g}: fetch it again")
        for i in range(config["n_layer"]):
            for whole, parts in PARTS.items():
                at = f"layers.{i}.{'self_attn' if whole == 'qkv_proj' else 'mlp'}"
                w[f"{at}.{whole}.weight"] = np.concatenate([w.pop(f"{at}.{part}.weight") for part in parts])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{folder} is no whole model in the layout of Hugging Face ({error!r}): fetch it again")
    return config | {"tied": bool(c["tie_word_embeddings"]), "rope": kind}, w


def write_safetensors(file, weights, dtype):
    """What read_safetensors reads, of {name: float32 array}; dtype: float32, or bfloat16, to the nearest."""
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
            if size == 2:  # the upper half of a float32; what is cut off is rounded, a tie to the even number
                bits = w.view(np.uint32)
                w = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
            f.write(w)


def export_llama(folder, config, weights, dtype="float32", tokenizer=None, ends=()):
    """The way back: what transformers opens with AutoModelForCausalLM.from_pretrained(folder).

    tokenizer: the folder whose tokenizer is copied; ends: the tokens that end a text. All is written beside, in
    folder.part, and takes its place when it is whole.
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
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = np.searchsorted(self.codes, codes).clip(max=self.vocab_size - 1)
        if unknown := set(codes[self.codes[ids] != codes].tolist()):
            fail(f"the model's alphabet lacks {', '.join(repr(chr(c)) for c in sorted(unknown)[:5])}: leave it out")
        return ids.astype(np.int64)

    def decode(self, token):
        return self.alphabet[token].encode()


def load_messages(path):
    """The dialogues of a file in which each line is JSON: {"messages": [{"role": "user", "content": "..."}, ...]}."""
    try:
        lines = filter(str.strip, Path(path).read_text(encoding="utf-8").split("\n"))
        dialogues = [[(m["role"], m["content"]) for m in json.loads(line)["messages"]] for line in lines]
        texts = [text for dialogue in dialogues for message in dialogue for text in message]
        if not all(isinstance(text, str) and text == text.encode(errors="ignore").decode() for text in texts):
            raise ValueError("a role or a content is no text")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        fail(f'{path} must have lines like {{"messages": [{{"role": "user", "content": "..."}}]}} ({error!r})')
    if not dialogues:
        fail(f"{path} has no dialogue in it")
    return dialogues


def read_tokenizer(folder):
    """Of a folder's tokenizer: tokens as bytes in the order they were learned, those with a meaning, ids, pattern."""
    if (file := Path(folder) / "tokenizer.model").exists() and not (Path(folder) / "tokenizer.json").exists():
        try:
            ranked = [base64.b64decode(line.split()[0], validate=True) for line in file.read_bytes().splitlines()]
            if len(set(ranked)) < len(ranked) or {bytes([b]) for b in range(256)} - {*ranked}:
                raise ValueError("each byte must be a token, and no token be there twice")
        except (ValueError, IndexError):
            fail(f"{file} is not Llama 3's, perhaps SentencePiece's as Llama 2 has: only byte-level BPE is read here")
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
            fail(f"{file} is not of the kind that is read here, byte-level BPE as SmolLM2 and Llama 3 have it")
        if kinds[0] == "Digits":  # each by itself, and for the spaces before it the text ends
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
            raise ValueError("the number of a token is no whole number, or far too large")
        return [bytes(byte[c] for c in token) for token in ranked], list(special), np.array(ids), pattern
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{file} can't be read ({error!r}): a model's folder must have it, or Llama 3's tokenizer.model")


class Tokens:
    """The tokens of a real model: tiktoken merges, and its numbers are looked up in `ids`, the model's."""

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
            fail(f"{folder} has a tokenizer that tiktoken does not take ({error}): fetch it again")
        self.bytes = dict(zip(self.ids.tolist(), [*ranked, *(token.encode() for token in special)]))
        self.vocab_size = int(self.ids.max()) + 1
        ends = {"<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>"} & self.special.keys()
        self.ends = {int(self.ids[self.special[token]]) for token in ends}
        self.start = self.encode("<|begin_of_text|>", special=True) if "<|begin_of_text|>" in self.special else ()

    def encode(self, text, special=False):
        """Only if `special` are names like <|im_end|> more than text."""
        ids = self.bpe.encode(text, allowed_special="all" if special else set(), disallowed_special=())
        ids = self.ids[np.array(ids, np.int64)]
        return ids[ids >= 0]

    def decode(self, token):
        return self.bytes.get(token, b"")

    def dialogue(self, messages):
        """The tokens of [(role, text)] in the model's form, open if it is its turn, and which of them are its own."""
        form = next((form for key, form in TEMPLATES.items() if key in self.special), None)
        if not form:
            fail("this model's tokens are neither ChatML's nor Llama 3's, so that it can't chat: give it a --prompt")
        start, before, after = form
        parts = [(start, True, False)]
        for role, text in messages:
            own = role == "assistant"
            parts += [(before.format(role), True, False), (text.strip(), False, own), (after, True, own)]
        if messages[-1][0] != "assistant":
            parts.append((before.format("assistant"), True, False))
        ids = [self.encode(text, special) for text, special, _ in parts]
        return np.concatenate(ids), np.concatenate([np.full(len(i), own) for i, (_, _, own) in zip(ids, parts)])


# ---- tasks -----------------------------------------------------------------------------------------------------------


class Text(Task):
    """To go on with a text: windows of it, drawn at random. The last tenth of the text is held out.

    A text is one row of numbers, `ids`, and so are the `targets`, in which -1 does not count; `train` and `val` say
    where in them windows of T + 1 begin.
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
        self.tokens, self.val, self.lengths = args.batch_size * self.T, [], args.lengths or []
        if args.steps or self.lengths or not args.chat and (not args.init or args.data or args.bits < 32):
            self.load()  # else nothing is learned or measured
        self.prompt = self.read_prompt()

    def refuse(self):
        """What fits no model and no data."""
        args, parts = self.args, self.args.accumulate * self.args.world
        if args.batch_size < parts:
            fail(f"--batch-size must be {parts} or more: a row for each process and each part of --accumulate")
        if args.world > 1 and args.backend == "torch" and args.optimizer == "muon":
            fail("torchrun takes the matrices apart that muon needs whole: add --optimizer adamw")
        if args.lora_rank and not args.init:
            fail("--lora adapts a model that is there: name its folder with --init")
        if args.chat and not self.folder:
            fail("--chat needs a model that has learned to: name its folder with --init")
        if args.world > 1 and (args.chat or args.prompt == "-" or args.bits < 32 and args.backend == "torch"):
            fail("--chat, --prompt - and, with torch, --bits 8 and 4 are for one process: leave them to a later run")
        if args.export_hf and args.window:
            fail("--export-hf writes a layout that knows no --window: leave one of them out")
        if args.export_hf and args.export_hf.exists() and (args.export_hf.is_file() or os.listdir(args.export_hf)):
            fail(f"--export-hf {args.export_hf} is there already: name a new folder")
        if args.chat or args.prompt == "-":
            if sys.stdin is None:
                fail("the standard input is closed, from which --chat and --prompt - read: leave them out")
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        args.prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
        for flag, text in ("--prompt", args.prompt), ("--system", args.system):
            if any("\ud800" <= c <= "\udfff" for c in text or ""):
                fail(f"{flag} has characters that are no text: type it in UTF-8")

    def start_from(self, saved):
        """The shape of the model: that of --init, whose weights are read, or that of --size, or `saved`."""
        args = self.args
        if saved:
            saved.pop("accumulate", None)  # was a part of Config once
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
        """The characters of the part to train on."""
        text = load_text(self.args.data)
        return "".join(sorted(set(text[: len(text) * 9 // 10])))

    def load(self):
        """Read what there is to learn, and split it."""
        if str(self.args.data).endswith(".jsonl"):
            fail(f"{self.args.data} holds dialogues: add --task chat")
        text, T = load_text(self.args.data), self.T
        if self.folder:
            ids = self.tokenizer.encode(text)
            train, val = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
        else:
            n, alphabet = len(text) * 9 // 10, self.tokenizer.alphabet
            train = self.tokenizer.encode(text[:n])
            val = self.tokenizer.encode("".join(c for c in text[n:] if c in alphabet))
        n = len(train), len(val)
        if n[1] <= T:
            fail(f"{sum(n)} tokens are too few for a context of {T}: lower --block-size or have {10 * T + 10}")
        self.ids = self.targets = np.concatenate([train, val])
        self.train, self.val = np.arange(n[0] - T), np.arange(n[0], sum(n) - T, T)
        self.extra = self.extra | {"digest": digest(train)}
        self.about = f"{self.args.data or 'manual of Python'}: {n[0]:,} tokens to train on, {n[1]:,} held out"
        if max(self.lengths, default=0) >= n[1]:
            fail(f"--lengths must be 1 to {n[1] - 1}, the tokens of the text held out")

    def read_prompt(self):
        """The tokens of --prompt, (n,)."""
        args, tokenizer = self.args, self.tokenizer
        if args.chat:
            tokenizer.dialogue([("user", "")])  # refuses tokens that know no dialogues
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
            fail(f"the weights in {args.init} do not fit the model ({error}): fetch them again")
        learning = sum(math.prod(w.shape) for w in net.trained(trainer.model).values())
        self.about = "; ".join(filter(None, [f"{learning:,} of them to train", self.about]))
        return trainer

    def windows(self, at, T):
        """x and y (B, T), y moved on by one: windows of the text that begin at `at` (B,)."""
        window = at[:, None] + np.arange(T + 1)
        return self.ids[window[:, :-1]], self.targets[window[:, 1:]]

    def batch(self, step):
        rng = np.random.default_rng((self.args.seed, step, 1))
        return self.windows(self.train[rng.integers(0, len(self.train), self.args.batch_size)], self.T)

    def measure(self, trainer, starts, T):
        """{"val_loss", "perplexity"} of the windows of T tokens that begin at `starts`."""
        total, n, rows = 0.0, 0, max(1, min(32, 2**26 // T // trainer.config.vocab_size))  # no more logits than fit
        for at in np.array_split(starts, math.ceil(len(starts) / rows)):
            x, y = self.windows(at, T)
            total += float(trainer.evaluate(x, y)["val_loss"]) * (y >= 0).sum()
            n += (y >= 0).sum()
        return {"val_loss": total / n, "perplexity": math.exp(min(total / n, 700))}  # more is beyond a float

    def evaluate(self, trainer, whole=False):
        if not len(self.val):
            return {}
        if not whole:  # 64 are enough for the log
            return {"val_loss": self.measure(trainer, self.val[:: math.ceil(len(self.val) / 64)], self.T)["val_loss"]}
        self.figures = self.measure(trainer, self.val, self.T)
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
            if len(self.val):
                figures = self.figures if bits == 32 else self.measure(trainer, self.val, self.T)
                print(f"{bits:2} bits: {megabytes:.1f} MB, perplexity {figures['perplexity']:.4f}", flush=True)
        for length in self.lengths:
            starts = np.arange(self.val[0], len(self.ids) - length, length)
            figures = figures | {f"perplexity_{length}": self.measure(trainer, starts, length)["perplexity"]}
            print(f"texts of {length} tokens: perplexity {figures[f'perplexity_{length}']:.4f}", flush=True)
        text, speed = self.chat(trainer) if args.chat else self.go_on(trainer)
        (args.out / "sample.txt").write_text(text, encoding="utf-8")
        return {**figures, "written_per_s": round(speed, 1)}, [*files, "sample.txt"]

    def speak(self, trainer, ids):
        """Print what comes after the tokens `ids`, as it comes; returns it and the tokens a second."""
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
        """Write on from the prompt; returns both and the tokens a second."""
        print(f"\n{self.args.prompt}", end="", flush=True)
        text, speed = self.speak(trainer, self.prompt)
        return self.args.prompt + text, speed

    def chat(self, trainer):
        """Answer what is typed, line by line, until the input ends; returns the dialogue and the tokens a second."""
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
    """To answer: dialogues, a row each, of which only the assistant's tokens count. The last tenth is held out."""

    def load(self):
        data, T = self.args.data, self.T
        if not self.folder:
            fail("dialogues need a model that knows their form: name its folder with --init")
        if not data or self.lengths:
            fail("--task chat learns from dialogues: name a .jsonl with --data, and leave --lengths to texts")
        if not all(messages := load_messages(data)):
            fail(f"{data} has a dialogue without messages: leave it out")
        dialogues = [(ids, own) for ids, own in map(self.tokenizer.dialogue, messages) if own.any()]
        n = len(dialogues) - max(1, len(dialogues) // 10)
        ids, targets = (np.full((len(dialogues), T + 1), fill) for fill in (0, -1))  # a row each, cut or filled up
        for i, (tokens, own) in enumerate(dialogues):
            ids[i, : len(tokens)] = tokens[: T + 1]
            targets[i, : len(tokens)] = np.where(own, tokens, -1)[: T + 1]
        starts = np.flatnonzero((targets[:, 1:] >= 0).any(1))  # where there is something to learn
        self.train, self.val = starts[starts < n] * (T + 1), starts[starts >= n] * (T + 1)
        if not (len(self.train) and len(self.val)):
            fail(f"{data} has {len(starts)} dialogues with an answer in the first {T} tokens: two are needed")
        self.ids, self.targets = ids.ravel(), targets.ravel()
        self.extra = {"digest": digest(*(tokens for tokens, _ in dialogues[:n]))}
        self.about = f"{data}: {len(self.train):,} dialogues to train on, {len(self.val):,} held out"


TASKS = {"text": Text, "chat": Chat}
