# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "mlx[cpu]==0.32.4", "numpy", "tiktoken"]
# ///
"""Train a GPT and let it write:  python train.py [--backend mlx] [--data tinyshakespeare] [--tokenizer bpe] ...

--task text goes on with a text: tinyshakespeare, your own file, or Python's manual, which every Python has;
--task chat answers: sums, opposites and small talk, or what your own dialogues teach;
--task rl --init out/ckpt.npz makes such a model better at sums by trial and reward.
--init goes on from other weights: a ckpt.npz, or GPT-2 as Hugging Face stores it; --export-hf writes that layout.
Once trained, --steps 0 --resume --prompt "The class" only writes, and --chat talks. Several processes share each batch:
torchrun --nproc-per-node 2 train.py, or mlx.launch -n 2 -- python train.py --backend mlx.
"""

import argparse
import codecs
import hashlib
import heapq
import importlib
import json
import math
import os
import platform
import pydoc_data.topics
import re
import signal
import string
import sys
import time
from collections import Counter, defaultdict
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


WORDS = r" ?\w+| ?[^\w\s]+|\s+"  # what byte pairs are merged within


def learn_bpe(text, n):
    """Byte-pair encoding (Sennrich et al. 2016): n times the commonest pair of neighbours is made one token.

    Returns {token: rank}, bytes and int, the 256 single bytes first: what tiktoken encodes by.
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
        if -count != pairs[pair]:  # it has become rarer since it was put there: back to its place
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
            need = "tiktoken, and once the net for its two files, or TIKTOKEN_CACHE_DIR set to where they are"
            fail(f"these tokens need {need} ({type(error).__name__})")
        self.vocab_size, self.decode = self.encoding.n_vocab, self.encoding.decode_single_token_bytes

    def encode(self, text):
        return np.array(self.encoding.encode_ordinary(text), np.int64)


def learn_tokenizer(kind, text, merges):
    """What there is to know of a tokeniser, as the checkpoint keeps it: (kind, its alphabet or its tokens)."""
    if kind == "chars":
        return kind, "".join(sorted(set(text)))
    train = text[: len(text) * 9 // 10]  # the rest is held out
    return kind, [token.hex() for token in learn_bpe(train, merges)] if kind == "bpe" else None


def make_tokenizer(kind, known):
    if kind == "chars":
        return Characters(known)
    return BytePairs({bytes.fromhex(token): rank for rank, token in enumerate(known)} if kind == "bpe" else None)


# ---- weights from elsewhere ------------------------------------------------------------------------------------------


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


CONV1D = "c_attn.weight", "c_proj.weight", "c_fc.weight"  # GPT-2's files hold these as (in, out)


def load_gpt2(folder):
    """Of a GPT-2 as Hugging Face stores it: what read_meta would say, and the weights by the names of this folder."""
    try:
        c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = {name: c[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        meta = {"config": {"block_size": c["n_positions"], **config}, "tokenizer": c.get("tokenizer", ["gpt2", None])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{folder} has no config.json of a GPT-2 ({error!r}): name a ckpt.npz, or GPT-2 as Hugging Face stores it")
    weights = {}
    for name, w in read_safetensors(folder):
        name = name.removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):  # masks; the head is the embedding
            weights[name] = w.T.copy() if name.endswith(CONV1D) else w
    return meta, weights


def read_model(path):
    """The same of a checkpoint or of such a folder."""
    if path.is_dir():
        return load_gpt2(path)
    meta = read_meta(path, "gpt")
    with np.load(path, allow_pickle=False) as f:
        return meta, dict(f)


def export_gpt2(folder, meta, weights):
    """The way back: what transformers opens with GPT2LMHeadModel.from_pretrained(folder)."""
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
    (folder / "config.json").write_text(json.dumps(c, indent=1), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"".join([len(header).to_bytes(8, "little"), header, *arrays]))


# ---- dialogues -------------------------------------------------------------------------------------------------------

END = "\3"  # ASCII's end of a text: it comes after each message
OPPOSITES = "hot cold, big small, old new, up down, left right, day night, good bad, fast slow, open shut, dry wet"
TALK = [("Hello!", "Hello! Ask me something."), ("How are you?", "I am fine, thank you."), ("Who are you?", "A GPT."),
        ("What can you do?", "Sums, opposites and spelling."), ("Thank you.", "You are welcome.")]  # fmt: skip


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


def draw_sum(rng, held_out=False):
    """A sum or difference of numbers below fifty: question, answer, result; a tenth of all is held out.

    The answer is worked out aloud, tens before ones, 17+20=37+5=42: each step is easier to learn than the whole.
    """
    while True:
        a, b, minus = map(int, rng.integers(0, (50, 50, 2)))
        low, high = sorted((a, b))
        if held_out == ((200 * high + 2 * low + minus) * 2654435761 % 2**32 % 10 == 0):
            break
    a, b, word, sign, way = (high, low, "minus", "-", -1) if minus else (a, b, "plus", "+", 1)
    tens, ones = b // 10 * 10, b % 10
    answer = f"{a}{sign}{tens}={a + way * tens}{sign}{ones}={a + way * b}"
    return f"What is {a} {word} {b}?", answer, str(a + way * b)


def draw_dialogue(rng):
    """One to three questions with answers: half of them sums; opposites, spelling and small talk."""
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

    A message is its role, a line's end, its content and END. With `answer` the assistant is about to speak.
    """
    parts = []
    for role, content in dialogue:
        own = int(role == "assistant")
        parts += [(f"{role}\n", 0), (content, own), (END, own)]
    parts += [("assistant\n", 0)] * answer
    ids = [tokenizer.encode(text) for text, _ in parts]
    return np.concatenate(ids), np.repeat([own for _, own in parts], list(map(len, ids)))


def reply(trainer, tokenizer, prompts, temperature, seed):
    """What is said to prompts of one length (B, T): tokens (B, n), and which of them are the answer, END included."""
    end, said, done = tokenizer.encode(END)[0], [], False
    for token in trainer.generate(prompts, 20, temperature, seed=seed):
        said, done = [*said, token], done | (token == end)
        if done.all():
            break
    said = np.stack(said, 1)
    ends = said == end
    return said, ends.cumsum(1) - ends == 0


def grade(tokenizer, said, own, results):
    """1 for each answer (a row of what reply gave) whose end, behind the last =, is the right result; 0 for others."""
    texts = [b"".join(tokenizer.decode(int(i)) for i in row[mine]) for row, mine in zip(said, own)]
    ends = [text.split(b"=")[-1].decode("utf-8", "replace") for text in texts]
    return np.array([end == result + END for end, result in zip(ends, results)], np.float32)


def share_right(trainer, tokenizer, n, temperature, seed):
    """The share of n sums, which were not trained on, that are answered rightly."""
    rng, right = np.random.default_rng((seed, 4)), 0.0
    asked = [draw_sum(rng, held_out=True) for _ in range(n)]
    prompts = [render(tokenizer, [("user", question)], answer=True)[0] for question, *_ in asked]
    for length in sorted(set(map(len, prompts))):  # those of one length are answered at once
        some = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        said, own = reply(trainer, tokenizer, np.stack([prompts[i] for i in some]), temperature, seed)
        right += grade(tokenizer, said, own, [asked[i][-1] for i in some]).sum()
    return float(right / n)


# ---- tasks: the arrays of a step, the figures on data held out, and what to write at the end -------------------------


class Text:
    """The task of going on with a text: windows of it, drawn at random; the last tenth of it is held out."""

    def __init__(self, trainer, tokenizer, args, corpus):
        self.trainer, self.tokenizer, self.args, ids = trainer, tokenizer, args, tokenizer.encode(corpus)
        self.train, self.val = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
        if len(self.val) <= (T := args.block_size):
            fail(f"{len(ids)} tokens are too few for a context of {T}: lower --block-size or have {10 * T + 10}")
        self.start = "The " if "The " in corpus else corpus[0]
        self.about = f"{args.data or 'manual of Python'}, {len(self.train):,} tokens, and {len(self.val):,} held out"

    def windows(self, ids, at):
        x = ids[at[:, None] + np.arange(self.args.block_size + 1)]  # (B, T + 1)
        return x[:, :-1], x[:, 1:]

    def batch(self, step):
        rng, T = np.random.default_rng((self.args.seed, step, 1)), self.args.block_size
        return self.windows(self.train, rng.integers(0, len(self.train) - T, self.args.batch_size))

    def evaluate(self, whole=False):
        starts, total = np.arange(0, len(self.val) - self.args.block_size, self.args.block_size), 0.0
        starts = starts[:: 1 if whole else math.ceil(len(starts) / 64)]  # 64 are enough for the log
        rows = max(1, min(32, 2**26 // self.args.block_size // self.tokenizer.vocab_size))  # no more logits than fit
        for at in np.array_split(starts, math.ceil(len(starts) / rows)):
            total += float(self.trainer.evaluate(*self.windows(self.val, at))["val_loss"]) * len(at)
        return {"val_loss": total / len(starts)}

    def prompts(self):
        prompt = self.start if self.args.prompt is None else self.args.prompt
        return [(prompt, self.tokenizer.encode(prompt))]


class Chat:
    """The task of answering: the loss is of the assistant's tokens only."""

    def __init__(self, trainer, tokenizer, args, corpus):
        self.trainer, self.tokenizer, self.args = trainer, tokenizer, args
        self.train, self.val = corpus[: len(corpus) * 9 // 10], corpus[len(corpus) * 9 // 10 :]
        if not (self.train and all(corpus)):
            fail(f"{args.data} must have two dialogues or more, and messages in each")
        self.questions = [dialogue[0][1] for dialogue in self.val[:6]]
        self.about = f"{args.data or 'generated'}, {len(self.train):,} dialogues, and {len(self.val):,} held out"

    def rows(self, dialogues, rng, n):
        """x, y and weights (n, T): a dialogue a row, cut at the context; what the assistant need not say weighs 0."""
        drawn = [np.stack(render(self.tokenizer, dialogues[i])) for i in rng.integers(0, len(dialogues), n)]
        T = min(self.args.block_size, max(dialogue.shape[1] for dialogue in drawn) - 1)
        ids, own = both = np.zeros((2, n, T + 1), np.int64)
        for row, dialogue in enumerate(drawn):
            both[:, row, : dialogue.shape[1]] = dialogue[:, : T + 1]
        return ids[:, :-1], ids[:, 1:], (own[:, 1:] / max(own[:, 1:].sum(), 1)).astype(np.float32)

    def batch(self, step):
        return self.rows(self.train, np.random.default_rng((self.args.seed, step, 1)), self.args.batch_size)

    def evaluate(self, whole=False):
        figures = self.trainer.evaluate(*self.rows(self.val, np.random.default_rng(3), 64))
        if whole and not self.args.data:
            figures["accuracy"] = share_right(self.trainer, self.tokenizer, 500, 0, self.args.seed)
        return {name: float(value) for name, value in figures.items()}

    def prompts(self):
        for question in [self.args.prompt] if self.args.prompt else self.questions:
            yield f"you: {question}\ngpt: ", render(self.tokenizer, [("user", question)], answer=True)[0]


def advantages(reward, log_ratio, group, beta):
    """What each of a group's answers is worth beside the others': r - beta log p/ref, less the mean of the others'."""
    worth = (reward - beta * log_ratio).reshape(-1, group)
    others = (worth.sum(1, keepdims=True) - worth) / (group - 1)
    return (worth - others).reshape(-1) / len(reward)


class Reward(Chat):
    """The task of earning a reward: GRPO, group-relative policy optimization (Shao et al. 2024).

    Each question is answered `group` times; answer y earns r(y), here 1 if it is right, else 0. Nothing can be derived
    through r, nor need be. With y drawn from the model p, and ref the model as it was at first, to be raised is
        J = E[r(y)] - beta KL(p || ref) = E[r(y) - beta log p(y)/ref(y)]
    As grad p = p grad log p, and E[grad log p(y)] = grad sum_y p(y) = grad 1 = 0,
        grad J = E[(r(y) - beta log p(y)/ref(y) - b) grad log p(y)]     for any b that does not depend on y
    and the noise is small if b is near to what is in the bracket before it: the mean of the group's other answers.
    The loss is so a sum of -log p of the tokens with weights, and that is all that Trainer.step has to know.

    The paper also divides by the group's standard deviation and by the answer's length, which would bias this estimate
    (Liu et al. 2025), and clips p / p_old, which here is 1: each answer is used for one step.
    """

    def __init__(self, trainer, tokenizer, args, reference):
        self.trainer, self.tokenizer, self.args, self.reference = trainer, tokenizer, args, reference
        rng = np.random.default_rng((args.seed, 5))
        self.questions = [draw_sum(rng, held_out=True)[0] for _ in range(6)]
        self.about = f"{args.batch_size} answers a step, {args.group} to a question"

    def batch(self, step):
        args, tokenizer, asked, rng = self.args, self.tokenizer, [], np.random.default_rng((self.args.seed, step, 1))
        while len(asked) < args.batch_size // args.group:
            question, _, result = draw_sum(rng)
            prompt = render(tokenizer, [("user", question)], answer=True)[0]
            if not asked or len(prompt) == len(asked[0][0]):  # all of one length
                asked.append((prompt, result))
        prompts, results = (np.repeat(side, args.group, 0) for side in zip(*asked))
        said, own = reply(self.trainer, tokenizer, prompts, 1.0, args.seed + 1_000_003 * (step + 1))
        ids, own = np.append(prompts, said, 1), np.append(np.zeros_like(prompts), own, 1)[:, 1:]
        x, y = ids[:, :-1], ids[:, 1:]
        log_ratio = ((self.trainer.log_prob(x, y) - self.reference.log_prob(x, y)) * own).sum(1)
        worth = advantages(grade(tokenizer, ids[:, 1:], own == 1, results), log_ratio, args.group, args.beta)
        return x, y, (own * worth[:, None]).astype(np.float32)

    def evaluate(self, whole=False):
        n, (tokenizer, seed) = 500 if whole else 100, (self.tokenizer, self.args.seed)
        figures = {"reward": share_right(self.trainer, tokenizer, n, 1.0, seed)}
        return {**figures, "reward_before": share_right(self.reference, tokenizer, n, 1.0, seed)} if whole else figures


# ---- the run ---------------------------------------------------------------------------------------------------------


def stream(trainer, tokenizer, ids, args):
    """Yield for each token what is new of the text that follows ids; it ends before the first of the strings args.stop.

    What may be the beginning of such a string is held back.
    """
    if args.beam > 1:
        n = min(args.tokens, trainer.config.block_size - len(ids))
        tokens = trainer.search(ids[None], n, args.beam)[:, None]
    else:
        tokens = trainer.generate(ids[None], args.tokens, args.temperature, args.top_k, args.top_p, args.seed)
    utf8, text, shown = codecs.getincrementaldecoder("utf-8")("replace"), "", 0
    held = max(map(len, args.stop), default=1) - 1
    for token in tokens:
        text += utf8.decode(tokenizer.decode(int(token[0])))
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
    """Answer what is typed, until the input ends; of a long dialogue the beginning is forgotten."""
    dialogue = []
    while True:
        try:
            dialogue.append(("user", input("\nyou: ")))
        except EOFError:
            return print()
        while len(ids := render(tokenizer, dialogue, answer=True)[0]) > args.block_size // 2 and dialogue[1:]:
            del dialogue[:2]
        print("gpt: ", end="")
        dialogue.append(("assistant", say(trainer, tokenizer, ids, args)))


TASKS = {  # what differs in the defaults
    "text": dict(steps=600, batch_size=8, optimizer="muon", lr={"muon": 0.01, "adamw": 0.004}),
    "chat": dict(steps=1500, batch_size=24, optimizer="muon", lr={"muon": 0.01, "adamw": 0.004}),
    "rl": dict(steps=240, batch_size=256, optimizer="adamw", lr={"muon": 0.0003, "adamw": 0.0003}),
}


def read_args():
    """The command line, checked as far as it can be without data."""
    apple = (sys.platform, platform.machine()) == ("darwin", "arm64")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--backend", choices=["torch", "mlx"], default="mlx" if apple else "torch")
    parser.add_argument("--task", choices=list(TASKS), default="text")
    parser.add_argument("--data", help="tinyshakespeare, a text, for chat a .jsonl (default: Python's manual, or sums)")
    parser.add_argument("--tokenizer", choices=["chars", "bpe", "gpt2"], default="chars", help="bpe: learnt here")
    parser.add_argument("--merges", type=int, default=1000, help="of --tokenizer bpe")
    parser.add_argument("--init", type=Path, help="start from the weights of a ckpt.npz or of a GPT-2's folder")
    parser.add_argument("--size", choices=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"], help="in place of --n-...")
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--n-head", type=int, default=4)
    parser.add_argument("--n-embd", type=int, default=128)
    parser.add_argument("--block-size", type=int, help="the context in tokens (default: 128, or the model's)")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--optimizer", choices=["muon", "adamw"], help="default: muon, and adamw for rl")
    parser.add_argument("--steps", type=int, help="0: only evaluate and write")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, help="the highest rate")
    parser.add_argument("--warmup", type=int, default=30, help="steps in which the rate rises")
    parser.add_argument("--decay", choices=["linear", "cosine"], default="linear", help="how the rate falls to 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().with_name("out"))
    parser.add_argument("--resume", action="store_true", help="go on from OUT/ckpt.npz, whichever backend wrote it")
    parser.add_argument("--accumulate", type=int, default=1, help="compute a batch in so many parts, to save memory")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of what is computed")
    parser.add_argument("--compile", action="store_true", help="let the framework compile the model first")
    parser.add_argument("--export-hf", type=Path, metavar="DIR", help="at the end, write the weights for Hugging Face")
    parser.add_argument("--device", help="cuda, mps or cpu; MLX: gpu or cpu (default: the best there is)")
    parser.add_argument("--group", type=int, default=8, help="rl: answers to a question")
    parser.add_argument("--beta", type=float, default=0.02, help="rl: what it costs to become another model")
    parser.add_argument("--chat", action="store_true", help="chat, rl: at the end, talk in the terminal")
    parser.add_argument("--prompt", help="what to go on with or to answer; - reads it from the standard input")
    parser.add_argument("--tokens", type=int, default=500, help="how many to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, help="only from the K likeliest")
    parser.add_argument("--top-p", type=float, default=1.0, help="only from the likeliest that hold the share P")
    parser.add_argument("--beam", type=int, default=1, help="search so wide for the likeliest text within the context")
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="write up to here")
    args = parser.parse_args()
    for name, value in TASKS[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value[args.optimizer] if name == "lr" else value)
    args.log_every = max(1, args.steps // 20)
    counts = args.batch_size, args.accumulate, args.n_layer, args.n_head, args.n_embd, args.beam, args.warmup
    if min(args.steps, args.tokens, args.merges, args.seed) < 0 or min(*counts, args.block_size or 1) < 1:
        fail("--steps, --tokens, --merges, --seed must be 0 or more, --batch-size, --beam, --warmup and the like 1")
    if args.block_size == 0 or args.init and not args.init.exists():
        fail(f"--block-size must be 1 or more, --init a ckpt.npz or a GPT-2's folder that is there, not {args.init}")
    if not (0 < args.lr < math.inf and 0 <= args.temperature and 0 < args.top_p <= 1 and 0 <= args.dropout < 1):
        fail("--lr must be more than 0, --temperature 0 or more, --top-p and --dropout a share of 1")
    if args.n_embd % args.n_head or args.top_k == 0 or "" in args.stop:
        fail("--n-embd must be a multiple of --n-head, --top-k 1 or more, --stop a text")
    if args.beta < 0 or args.group < 2 or (args.task == "rl" and args.batch_size % args.group):
        fail("--beta must be 0 or more, --group 2 or more, and --batch-size a multiple of it")
    if args.task == "rl" and (not args.init or args.data):
        fail("--task rl starts from a model that answers sums: --init CKPT of --task chat; it takes no --data")
    if args.chat and args.task == "text":
        fail("--chat is for --task chat or rl: train one of these first")
    args.prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    args.stop += [END] * (args.task != "text")
    return args


def main():
    began, args = time.perf_counter(), read_args()
    net, ckpt = load_twin(args), args.out / "ckpt.npz"
    rank, size = net.join()
    if rank:  # one of several processes speaks and saves
        sys.stdout = open(os.devnull, "w")
    if args.batch_size < args.accumulate * size:
        fail(f"--batch-size must be {args.accumulate * size} or more: a row for each process and part")
    if args.task == "chat":
        rng = np.random.default_rng(6)
        given = load_messages(args.data) if args.data else [draw_dialogue(rng) for _ in range(20000)]
        text = "".join(role + "\n" + content + END for dialogue in given for role, content in dialogue)
        text += string.printable  # so that all can be asked
    elif args.task == "text":
        given = text = load_text(args.data)
    try:
        (args.export_hf or args.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--export-hf {args.export_hf} can't be made a folder ({error.strerror}): name another")
    if args.resume or args.init:
        meta, weights = read_model(ckpt if args.resume else args.init)
    else:
        shape = net.GPT2[args.size] if args.size else dict(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
        meta = {"tokenizer": learn_tokenizer(args.tokenizer, text, args.merges)}
        meta["config"], weights = {"block_size": args.block_size or 128, **shape}, {}
    tokenizer = make_tokenizer(*meta["tokenizer"])
    if not args.resume:
        meta["config"] |= {"dropout": args.dropout, "optimizer": args.optimizer}
    config = net.Config(**{"vocab_size": tokenizer.vocab_size, **meta["config"]})
    args.block_size = T = min(args.block_size or config.block_size, config.block_size)
    if tokenizer.vocab_size > config.vocab_size:
        fail(f"{args.init} knows {config.vocab_size} tokens, its tokenizer has {tokenizer.vocab_size}: take another")
    trainer = net.Trainer(config, args.seed, args.device, args.accumulate, args.dtype, args.compile)
    start = trainer.load(ckpt) if args.resume else 0
    if weights and not args.resume:
        try:
            net.set_weights(trainer.model, weights)
        except (KeyError, ValueError) as error:
            fail(f"{args.init} lacks a weight that its config asks for ({error}): fetch it again")
    if args.task == "rl":
        if config.block_size < 56:
            fail(f"--task rl needs a context of 56 or more for sums and answers, this model's is {config.block_size}")
        given = net.Trainer(config, device=args.device)  # the model as it was at first
        net.set_weights(given.model, read_model(args.init)[1])
    task = {"text": Text, "chat": Chat, "rl": Reward}[args.task](trainer, tokenizer, args, given)
    prompts = list(task.prompts())
    if not all(0 < (n := len(ids)) <= T for _, ids in prompts):
        fail(f"--prompt must have 1 to {T} tokens, the context of the model: it has {n}")
    params = sum(w.size for w in net.get_weights(trainer.model).values())
    about = f"{params:,} parameters; {task.about}; files go to {args.out}"
    print(f"gpt: {args.backend} on {args.device}, {about}", flush=True)

    def lr(step):
        left = 1 - step / args.steps
        fall = left if args.decay == "linear" else (1 - math.cos(math.pi * left)) / 2
        return args.lr * min((step + 1) / args.warmup, 1.0) * fall

    speed = fit(trainer, task.batch, task.evaluate, lr, args, start, tokenizer=meta["tokenizer"])
    if rank:
        return
    figures, sample, trained = task.evaluate(whole=True), [], time.perf_counter()
    for shown, ids in prompts:
        print(f"\n{shown}", end="", flush=True)
        sample.append((shown, say(trainer, tokenizer, ids, args)))
    written = sum(len(tokenizer.encode(said)) for _, said in sample) / (time.perf_counter() - trained)
    (args.out / "sample.txt").write_text("\n".join(shown + said for shown, said in sample), encoding="utf-8")
    if args.chat:
        talk(trainer, tokenizer, args)
    if args.export_hf:
        export_gpt2(args.export_hf, {**meta, "config": vars(config)}, net.get_weights(trainer.model))
    files = [str(file) for file in (ckpt, args.out / "sample.txt", args.export_hf) if file and file.exists()]
    result = {"backend": args.backend, "device": args.device, "params": params, "steps": args.steps}
    result |= {"seconds": round(time.perf_counter() - began, 2), "steps_per_s": round(speed, 2)}
    if args.task == "text":  # the rows of the others are of many lengths
        result["tokens_per_s"] = round(speed * args.batch_size * T)
    result |= {"written_per_s": round(written, 1), **figures, "files": files}
    print("result " + json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head` has read enough; what is left to print has no reader
        os._exit(141)
