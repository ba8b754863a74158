# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "mlx[cpu]==0.32.4", "numpy", "tiktoken"]
# ///
"""Train a Llama, or take the weights of a real one, and let it write or chat:

    python train.py                                                       from scratch, on the manual of Python
    python train.py --init DIR --chat                                     a model from Hugging Face, talking
    python train.py --init DIR --prompt "Once upon a time" --bits 8       writing, in 8 bits, beside float32
    python train.py --init DIR --data own.jsonl --lora 8 --steps 100      fine-tuned

--data: tinyshakespeare, a text file or dialogues, {"messages": [{"role": "user", "content": "..."}, ...]} in each line.
Two processes: torchrun --nproc-per-node 2 train.py --optimizer adamw; mlx.launch -n 2 -- python train.py --backend mlx
"""

import argparse
import base64
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
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"{file} is damaged ({error}): fetch it again")


def load_llama(folder):
    """The arguments of Config and the weights {name: array} that a folder holds; all but a Llama is refused."""
    try:
        c = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        rope = {**c, **(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        size = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        usual = c["model_type"] == "llama" and c.get("hidden_act", "silu") == "silu"
        usual = usual and not c.get("attention_bias") and not c.get("mlp_bias")
        if not usual or size * c["num_attention_heads"] != c["hidden_size"]:
            fail(f"{folder} holds a {c['model_type']} with parts that Llama has not: name a folder with a Llama")
        if kind not in ("default", "linear", "llama3"):
            fail(f"{folder} has rotary positions of type {kind}: default, linear and llama3 are known here")
        config = dict(
            block_size=c["max_position_embeddings"], vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"],
            n_head=c["num_attention_heads"], n_kv_head=c.get("num_key_value_heads") or c["num_attention_heads"],
            n_embd=c["hidden_size"], n_hidden=c["intermediate_size"], tied=c.get("tie_word_embeddings", False),
            norm_eps=c["rms_norm_eps"], rope_theta=rope.get("rope_theta", 10000.0), rope=kind,
            rope_factor=rope.get("factor", 1.0), rope_low=rope.get("low_freq_factor", 1.0),
            rope_high=rope.get("high_freq_factor", 4.0),
            rope_context=rope.get("original_max_position_embeddings") or c["max_position_embeddings"],
        )  # fmt: skip
        w = {name.removeprefix("model."): w for name, w in read_safetensors(folder)}
        joined = {"self_attn.qkv_proj": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
                  "mlp.gate_up_proj": "mlp.gate_proj mlp.up_proj"}  # fmt: skip
        for i in range(config["n_layer"]):
            for whole, parts in joined.items():
                parts = [w.pop(f"layers.{i}.{part}.weight") for part in parts.split()]
                w[f"layers.{i}.{whole}.weight"] = np.concatenate(parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{folder} is no whole model in the layout of Hugging Face ({error!r}): fetch it again")
    return config, w


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


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # how a text is cut into words
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")  # fmt: skip
TEMPLATES = {  # of a dialogue, by a token that tells them: its start, and what is before and after each message
    "<|im_start|>": ("", "<|im_start|>{}\n", "<|im_end|>\n"),  # ChatML
    "<|eot_id|>": ("<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),  # Llama 3
}


def read_tokenizer(folder):
    """Of a folder's tokenizer: tokens as bytes in the order they were learned, those with a meaning, ids, pattern."""
    if (file := Path(folder) / "tokenizer.model").exists() and not (Path(folder) / "tokenizer.json").exists():
        try:
            ranked = [base64.b64decode(line.split()[0], validate=True) for line in file.read_bytes().splitlines()]
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
        return [bytes(byte[c] for c in token) for token in ranked], list(special), np.array(ids), pattern
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
        self.bpe = tiktoken.Encoding(str(folder), pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special)
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


def load_messages(path):
    """The dialogues of a file in which each line is JSON: {"messages": [{"role": "user", "content": "..."}, ...]}."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        dialogues = [[(m["role"], m["content"]) for m in json.loads(line)["messages"]] for line in lines if line]
        if not all(isinstance(text, str) for dialogue in dialogues for message in dialogue for text in message):
            raise ValueError("a role or a content is no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f'{path} must have lines like {{"messages": [{{"role": "user", "content": "..."}}]}} ({error!r})')
    if not dialogues:
        fail(f"{path} has no dialogue in it")
    return dialogues


def load_data(args, tokenizer, T):
    """What to learn: all ids and targets, and where in them windows of T + 1 begin, to train on and held out."""
    if str(args.data).endswith(".jsonl"):
        if not isinstance(tokenizer, Tokens):
            fail("dialogues need a model that knows their form: name its folder with --init")
        dialogues = [tokenizer.dialogue(messages) for messages in load_messages(args.data)]
        ids, targets = (np.full((len(dialogues), T + 1), fill) for fill in (0, -1))  # a row each, cut or filled up
        for i, (tokens, own) in enumerate(dialogues):
            ids[i, : len(tokens)] = tokens[: T + 1]
            targets[i, : len(tokens)] = np.where(own, tokens, -1)[: T + 1]
        keep = (targets[:, 1:] >= 0).any(1)
        starts, n = np.flatnonzero(keep) * (T + 1), max(1, keep.sum() // 10)  # the last tenth is held out
        if len(starts) < 2:
            fail(f"{args.data} has {len(starts)} dialogues with an answer in the first {T} tokens: two are needed")
        return ids.ravel(), targets.ravel(), starts[:-n], starts[-n:]
    ids = tokenizer.encode(load_text(args.data))
    n = len(ids) * 9 // 10
    if len(ids) - n <= T:
        fail(f"{len(ids)} tokens are too few for a context of {T}: lower --block-size or have {10 * T + 10}")
    return ids, ids, np.arange(n - T), np.arange(n, len(ids) - T, T)


# ---- the run ---------------------------------------------------------------------------------------------------------


def speak(trainer, tokenizer, ids, args):
    """Print what comes after the tokens `ids`, as it comes, up to args.tokens; returns it and the tokens a second."""
    utf8, text, n, began = codecs.getincrementaldecoder("utf-8")("replace"), [], 0, time.perf_counter()
    for token in trainer.generate(ids[None], args.tokens, args.temperature, args.top_k, args.top_p, args.seed):
        n += 1
        if int(token[0]) in getattr(tokenizer, "ends", ()):
            break
        text.append(utf8.decode(tokenizer.decode(int(token[0]))))
        print(text[-1], end="", flush=True)
    print("\n", flush=True)
    return "".join(text), n / (time.perf_counter() - began)


def chat(trainer, tokenizer, args):
    """Answer what is typed, line by line, until the input ends; returns the dialogue and the tokens a second."""
    messages, speed = [("system", args.system)] if args.system else [], 0.0
    while True:
        try:
            messages.append(("user", input("> ")))
        except EOFError:
            print()
            return "".join(f"{role}: {text}\n\n" for role, text in messages), speed
        text, speed = speak(trainer, tokenizer, tokenizer.dialogue(messages)[0], args)
        messages.append(("assistant", text))


def main():
    began = time.perf_counter()
    apple = (sys.platform, platform.machine()) == ("darwin", "arm64")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--backend", choices=["torch", "mlx"], default="mlx" if apple else "torch")
    parser.add_argument("--init", help="start from the Llama in this folder (config.json, *.safetensors, tokenizer)")
    parser.add_argument("--data", help="tinyshakespeare, a text file, dialogues.jsonl (default: Python's manual)")
    parser.add_argument("--tokenizer", help="characters, or the folder of a tokenizer (default: --init's)")
    parser.add_argument("--size", choices=["tiny", "135M", "1B", "7B", "8B"], default="tiny")
    parser.add_argument("--n-layer", type=int, help="in place of the size's, and so are the next three")
    parser.add_argument("--n-head", type=int)
    parser.add_argument("--n-kv-head", type=int, help="heads of keys and values: a divisor of --n-head")
    parser.add_argument("--n-embd", type=int)
    parser.add_argument("--block-size", type=int, help="how many tokens it learns from at once (default: 128)")
    parser.add_argument("--window", type=int, help="how many tokens a token sees, itself included (default: all)")
    parser.add_argument("--sinks", type=int, help="the first tokens, seen beyond the window (default: 4)")
    parser.add_argument("--rope", choices=["default", "linear", "llama3"], help="how to stretch positions")
    parser.add_argument("--factor", type=float, help="by how much: texts may be so many times as long")
    parser.add_argument("--lengths", type=int, nargs="+", default=[], help="print the perplexity of texts this long")
    parser.add_argument("--optimizer", choices=["muon", "adamw"], help="(default: muon, of --init adamw)")
    parser.add_argument("--lora", type=int, default=0, help="the rank of adapters, trained in place of the weights")
    parser.add_argument("--lora-targets", nargs="+", choices=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
    parser.add_argument("--merge", action="store_true", help="add the adapters to the weights, in OUT/merged/ckpt.npz")
    parser.add_argument("--steps", type=int, help="0: only evaluate and write (default: 600, of --init 0)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1, help="the parts that a batch is taken in")
    parser.add_argument("--lr", type=float, help="(default: muon 0.01, adamw 0.004, --init 3e-5, --lora 5e-4)")
    parser.add_argument("--warmup", type=int, default=30, help="steps in which the rate rises")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().with_name("out"))
    parser.add_argument("--resume", action="store_true", help="go on from OUT/ckpt.npz, whichever backend wrote it")
    parser.add_argument("--device", help="cuda, mps or cpu; MLX: gpu or cpu (default: the best there is)")
    parser.add_argument("--bits", type=int, choices=[32, 8, 4], default=32, help="write with weights of so many bits")
    parser.add_argument("--chat", action="store_true", help="answer what is typed, until Ctrl-D")
    parser.add_argument("--system", default="", help="what a chat begins with: who answers, and how")
    parser.add_argument("--prompt", help="what to go on with")
    parser.add_argument("--tokens", type=int, default=500, help="how many to write")
    parser.add_argument("--temperature", type=float, help="0: always the likeliest token (default: 0.8, of --init 0.2)")
    parser.add_argument("--top-k", type=int, help="only from the K likeliest")
    parser.add_argument("--top-p", type=float, default=1.0, help="only from the likeliest that hold the share P")
    args = parser.parse_args()
    ckpt = args.out / "ckpt.npz"
    saved = read_meta(ckpt, "llama") if args.resume else {}
    source = args.init or saved.get("init")
    args.optimizer = args.optimizer or ("adamw" if source else "muon")
    if args.lr is None:
        args.lr = 5e-4 if args.lora else 3e-5 if source else {"muon": 0.01, "adamw": 0.004}[args.optimizer]
    args.steps = (0 if source else 600) if args.steps is None else args.steps
    args.temperature = (0.2 if source else 0.8) if args.temperature is None else args.temperature
    args.log_every = max(1, args.steps // 20)
    least = args.batch_size, args.warmup, 1 if args.block_size is None else args.block_size
    if min(args.steps, args.tokens, args.lora, args.seed) < 0 or min(least) < 1:
        fail("--steps, --tokens, --lora, --seed must be 0 or more, --batch-size, --warmup, --block-size 1 or more")
    if not (0 < args.lr < math.inf and 0 <= args.temperature and 0 < args.top_p <= 1) or args.top_k == 0:
        fail("--lr must be more than 0, --temperature 0 or more, --top-p a share of 1, --top-k 1 or more")
    if args.lora and not source:
        fail("--lora adapts a model that is there: name its folder with --init")

    net = load_twin(args)
    rank, size = net.join()
    if rank:  # one of several processes speaks and saves
        sys.stdout = open(os.devnull, "w")
    if not args.batch_size >= args.accumulate * size > 0:
        fail(f"--accumulate must be 1 to {args.batch_size // size}: a row of the batch for each process and part")
    if size > 1 and args.backend == "torch" and args.optimizer == "muon":
        fail("torchrun takes the matrices apart that muon needs whole: add --optimizer adamw")
    base, weights = load_llama(source) if source else ({}, None)
    if saved:
        config = saved["config"]
    elif source:
        config = dict(base, lora_rank=args.lora, optimizer=args.optimizer)
    else:
        shape = dict(n_layer=args.n_layer, n_head=args.n_head, n_kv_head=args.n_kv_head, n_embd=args.n_embd)
        shape["n_hidden"] = args.n_embd and 3 * args.n_embd
        shape = net.LLAMA[args.size] | {name: value for name, value in shape.items() if value is not None}
        config = dict(shape, block_size=args.block_size or 128, optimizer=args.optimizer)
    turned = dict(window=args.window, sinks=args.sinks, rope=args.rope, rope_factor=args.factor)
    turned |= dict(lora_targets=args.lora_targets, accumulate=args.accumulate)
    config |= {name: value for name, value in turned.items() if value is not None}

    folder = args.tokenizer or source or saved.get("tokenizer")
    alphabet = None if folder else saved["alphabet"] if saved else "".join(sorted(set(load_text(args.data))))
    tokenizer = Tokens(folder) if folder else Characters(alphabet)
    if args.prompt is None:
        args.prompt = "The " if folder or set("The ") <= set(alphabet) else alphabet[0]
    if args.chat:
        if not folder:
            fail("--chat needs a model that has learned to: name its folder with --init")
        tokenizer.dialogue([("user", "")])
    config.setdefault("vocab_size", tokenizer.vocab_size)
    if tokenizer.vocab_size > config["vocab_size"]:
        fail(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config['vocab_size']}: name its own")
    n, n_kv, C = config["n_head"], config["n_kv_head"], config["n_embd"]
    if min(n, n_kv, C, config["n_layer"], config["block_size"]) < 1 or C % (2 * n) or n % n_kv:
        fail("--n-embd must be a multiple of twice --n-head, --n-head of --n-kv-head, and all 1 or more")
    config = net.Config(**config)
    if min(config.window, config.sinks) < 0 or config.sinks >= config.reach or not config.rope_factor >= 1:
        fail("--window must be 0 or more, --sinks less than the context, --factor 1 or more")
    if args.bits < 32 and (args.backend == "torch" and args.device != "cpu" or (C | config.n_hidden) % 32):
        fail("--bits 8 and 4 need --device cpu with torch, and widths that are multiples of 32")
    T = args.block_size or (min(256, config.block_size) if source else config.block_size)
    measured = args.steps or args.lengths or not args.chat and (not source or args.data or args.bits < 32)
    ids, targets, train, val = load_data(args, tokenizer, T) if measured else [()] * 4
    if args.lengths and not 1 <= min(args.lengths) <= max(args.lengths) < len(ids) - val[0]:
        fail(f"--lengths must be 1 to {len(ids) - val[0] - 1}, the tokens of the text held out")
    prompt = np.array([*getattr(tokenizer, "start", []), *tokenizer.encode(args.prompt)], np.int64)
    if not len(prompt):
        fail("--prompt is empty: give it a word")
    try:
        trainer = net.Trainer(config, seed=args.seed, device=args.device, weights=weights)
        start = trainer.load(ckpt) if saved else 0
    except (KeyError, ValueError) as error:
        fail(f"the weights do not fit the model ({error}): fetch or train them again")
    del weights
    sizes = {name: w.size for name, w in net.get_weights(trainer.model).items()}
    params, learning = sum(sizes.values()), sum(sizes[name] for name in net.trained(trainer.model))
    data = args.data or "manual of Python"
    about = f"{data}: {len(ids):,} tokens, {len(ids) - val[0]:,} held out; " if measured else ""
    print(f"llama: {args.backend} on {args.device}, {params:,} parameters, {learning:,} of them to train; {about}"
          f"files go to {args.out}", flush=True)  # fmt: skip

    def batch(step):
        at = train[np.random.default_rng((args.seed, step, 1)).integers(0, len(train), args.batch_size)]
        window = at[:, None] + np.arange(T + 1)  # (B, T + 1)
        return ids[window[:, :-1]], targets[window[:, 1:]]

    def lr(step):
        return args.lr * min((step + 1) / args.warmup, 1.0) * (1 - step / args.steps)

    def evaluate(starts, length=T):
        total, n, rows = 0.0, 0, max(1, min(32, 2**26 // length // config.vocab_size))  # no more logits than fit
        for at in np.array_split(starts, math.ceil(len(starts) / rows)):
            window = at[:, None] + np.arange(length + 1)
            y = targets[window[:, 1:]]
            total += float(trainer.evaluate(ids[window[:, :-1]], y)["val_loss"]) * (y >= 0).sum()
            n += (y >= 0).sum()
        return {"val_loss": total / n}

    some = val[:: math.ceil(len(val) / 64) or 1]  # 64 are enough for the log; the result is of all of them
    places = {"tokenizer": folder, "init": source}
    memory = {"alphabet": alphabet} | {name: place and str(Path(place).resolve()) for name, place in places.items()}
    speed = fit(trainer, batch, lambda: evaluate(some), lr, args, start, **memory)
    files, result = [ckpt], {}
    if args.merge:
        (args.out / "merged").mkdir(exist_ok=True)
        files.append(args.out / "merged/ckpt.npz")
        trainer.merge()
        trainer.save(files[-1], 0, **memory)
    for bits in dict.fromkeys([32, args.bits]):
        megabytes = trainer.quantize(bits)
        if measured:
            result |= evaluate(val)
            result["perplexity"] = math.exp(result["val_loss"])
            print(f"{bits:2} bits: {megabytes:.1f} MB, perplexity {result['perplexity']:.4f}", flush=True)
    for length in args.lengths:
        starts = np.arange(val[0], len(ids) - length, length)
        result[f"perplexity_{length}"] = math.exp(evaluate(starts, length)["val_loss"])
        print(f"texts of {length} tokens: perplexity {result[f'perplexity_{length}']:.4f}", flush=True)
    print(end="" if args.chat else f"\n{args.prompt}", flush=True)
    text, written = chat(trainer, tokenizer, args) if args.chat else speak(trainer, tokenizer, prompt, args)
    files.append(args.out / "sample.txt")
    files[-1].write_text(text if args.chat else args.prompt + text, encoding="utf-8")
    files = [str(file) for file in files if file.exists()]
    about = {"backend": args.backend, "device": args.device, "params": params, "steps": args.steps}
    about |= {"seconds": round(time.perf_counter() - began, 2), "tokens_per_s": round(speed * args.batch_size * T)}
    print("result " + json.dumps({**about, "written_per_s": round(written, 1), **result, "files": files}))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head` has read enough; what is left to print has no reader
        os._exit(141)
