"""Bad input: one line that says what is wrong and how to fix it, exit code 2, no traceback, nothing lost."""

import functools
import gzip
import json
import shlex
import signal

import numpy as np
import pytest
from adversary import SHORT, Folder
from folders import FOLDERS, result, run_here, start

# ---- what is refused: arguments and, after the |, words of the reason; else these are the first flag -----------------

FLAGS = ["--steps -1", "--steps many | invalid int", "--batch-size 0", "--lr 0", "--lr nan", "--seed -1", "--nonsense",
         "--device tpu | --device tpu", "--resume --out nowhere | no checkpoint", "--out train.py"]  # fmt: skip
TEXT = ["--data missing.txt | missing.txt", "--data latin1.txt | UTF-8", "--data short.txt | too few", "--prompt ''",
        "--prompt \u4e2d | alphabet", "--temperature -1"]  # fmt: skip
PICTURES = ["--data missing | folder of 2 ", "--data broken | can't be read as an image", "--data mnist | train-images"]
OWN = {  # by one folder; FILES are written beforehand
    "mlp": ["--task cubic | invalid choice", "--data missing.csv | missing.csv", "--data empty | empty",
            "--data latin1.txt | latin1.txt", "--hidden 0", "--batch-size 6000 | more than the",
            "--data mnist | train-images"],
    "cnn": ["--data missing | missing", "--data empty | sub-folders", "--data mnist | train-images",
            "--channels 0 1 1", "--data cifar10 | cifar-10-binary", "--channels 8 8 | three",
            "--channels 8 8 8 8 | three", "--size 8", "--shift -1", "--export net.onnx", "--export net.pt2 | .mlxfn",
            "--task style --tv -1 | --tv", "--export nowhere/net.mlxfn | no such folder",
            "--model resnet --channels 4 4 4 4 4 4 | channels", "--task style --style missing.jpg | missing.jpg",
            "--task style --size 32 --weights binary | VGG-19", "--task style --content binary | binary"],
    "gpt": [*TEXT, "--data empty | empty", "--data binary | binary", f"--prompt {'x' * 200}", "--n-embd 30",
            "--top-p 0", "--top-k 0", "--beam 0", "--stop ''", "--merges -1", "--init missing.npz | missing.npz",
            "--warmup 0", "--init binary | not a usable checkpoint", "--init few | config.json",
            "--init no-weights | *.safetensors", "--init bad-weights | damaged",
            "--init half-weights --data the.txt | lacks", "--export-hf train.py", "--accumulate 9 | --batch-size",
            "--chat | --task chat", "--task chat --data short.txt | messages",
            "--task chat --data silent.jsonl | messages", "--task rl | --init",
            "--task rl --init out/text/ckpt.npz | context of 56",
            "--task rl --init out/text/ckpt.npz --group 3 | --group"],
    "transformer": ["--task translate --data missing.tsv | missing.tsv", "--task translate --data empty | 100 lines",
                    "--task translate --data latin1.txt | UTF-8", "--task translate --data binary | 100 lines",
                    "--task translate --data multi30k | multi30k",
                    "--task translate --prompt 'twelve apples' | 'apples'",
                    f"--task translate --prompt '{'one ' * 50}' | --prompt", "--task clip --data digits | clip takes",
                    "--task clip --batch-size 1000 | --batch-size", "--data numbers | classify takes",
                    "--prompt twelve | translate", "--data mnist | train-images", "--data cifar10 | classify takes",
                    "--width 30 | width", "--patch 5 | patch", "--patch 0", "--dropout 1", "--smoothing nan",
                    "--warmup -1", "--beam 0", "--merges -1"],
    "rnn": [*TEXT, "--n-hidden 0", "--clip 0", "--length 0", "--task series --data missing.csv | missing.csv",
            "--task series --data words.csv | no column of numbers", "--task series --data lines.csv | are needed",
            "--task series --data empty | 0 lines", "--task speech --data empty | two speakers",
            "--task speech --data voices | as a WAV", "--task speech --held-out nobody | the speakers are"],
    "autoencoder": [*PICTURES, "--task dream | invalid choice", "--data few | folder of 2 ", "--hidden 0",
                    "--latent 0", "--net conv --hidden 8 8 8 | 28 x 28", "--beta -1", "--std 0", "--noise nan",
                    "--size 2", "--count 0"],
    "gan": [*PICTURES, "--hidden 0", "--model dcgan --size 28 --hidden 8 8 8 | --size", "--d-steps 0", "--d-lr nan",
            "--smoothing 1", "--ema 1", "--penalty -1", "--size 2", "--task toy --loss wgan-gp",
            "--task toy --data mnist | --data"],
    "llama": [*TEXT, "--n-embd 30 | n_embd", "--n-kv-head 3 | n_kv_head", "--top-k 0", "--sinks 16 | sinks",
              "--factor 0", "--accumulate 9", "--block-size 0", "--lora 2 | --init", "--chat | --init",
              "--init missing | missing", "--init mistral | mistral", "--init yarn | type yarn",
              "--init hollow | safetensors", "--init damaged | damaged", "--tokenizer missing | tokenizer.json",
              "--tokenizer pieces | SentencePiece", "--data dialogues.jsonl | --init",
              "--task text --data dialogues.jsonl | --task chat"],
    "diffusion": [*PICTURES, "--task dream | invalid choice", "--data cifar10 | cifar-10-binary.tar.gz", "--widths 0",
                  "--widths 9 8 --fold 1 | even", "--size 30", "--data cifar10 --size 40 | --size of cifar10",
                  "--fold -1", "--widths 8 8 8 8 | multiple of 32", "--size 8", "--count 0", "--ema 1",
                  "--guidance nan", "--sample-steps 1", "--prompt 'big blue star'", "--blind | --task inpaint",
                  "--task toy --data mnist | --data", "--task text --prompt 'big pink star' | --prompt"],
}  # fmt: skip

CONTRADICTIONS = {  # of a run's own checkpoint, with --resume
    "mlp": ["--task binary", "--hidden 32", "--activation tanh", "--optimizer sgd", "--data other.csv"],
    "cnn": ["--task style", "--validate", "--model resnet", "--channels 4 4 16", "--size 20"],
    "gpt": ["--n-layer 3", "--n-embd 64", "--n-head 2", "--tokenizer bpe", "--task chat", "--data other.txt"],
    "transformer": ["--task clip", "--width 32", "--n-layer 2", "--norm post", "--positions learned", "--patch 7"],
    "rnn": ["--task series", "--cell gru", "--n-hidden 32", "--n-embd 9", "--n-layer 2", "--data other.txt"],
    "autoencoder": ["--task denoise", "--hidden 16", "--latent 3", "--net conv", "--count 300", "--data flowers"],
    "gan": ["--task toy", "--model dcgan", "--hidden 9", "--loss minimax", "--latent 3", "--count 300"],
    "llama": ["--n-layer 3", "--n-embd 64", "--n-kv-head 4", "--size 135M", "--data other.txt"],
    "diffusion": ["--task toy", "--widths 8 16", "--predict noise", "--schedule linear", "--count 200", "--size 32"],
}
LLAMA = dict(model_type="llama", hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64,
             max_position_embeddings=64, vocab_size=101, rms_norm_eps=1e-5)  # fmt: skip
GPT = dict(n_positions=16, vocab_size=4, n_layer=1, n_head=4, n_embd=32, tokenizer=["chars", " The"])
FILES = {  # those of the arguments
    "empty": b"", "few/one.png": b"", "binary": bytes(range(128)) * 40, "short.txt": b"too short to learn from",
    "sea.txt": "\u5927\u6d77\n".encode() * 1000, "half-weights/model.safetensors": b"\2\0\0\0\0\0\0\0{}",
    "latin1.txt": "h\u00e9l\u00e0s, \u00e7a ne va pas\n".encode("latin-1") * 100,
    "other.txt": b"The other text is not the same one.\n" * 300, "the.txt": b"The he T" * 100,
    "other.csv": b"a,b,c\n" + b"1.5,2,0\n3,-1,1\n" * 100, "silent.jsonl": b'{"messages": []}\n' * 20,
    "lines.csv": b"a,b\n1,4\n2,5\n3,7\n", "words.csv": b"a,b\nx,y\n" * 100,
    **{f"voices/{name}_0.wav": b"RIFF\0\0\0\0WAVE and then nothing" for name in ("0_ann", "1_bob")},
    "dialogues.jsonl": b'{"messages": [{"role": "user", "content": "hi"}]}\n' * 3,
    "mistral/config.json": json.dumps({**LLAMA, "model_type": "mistral"}).encode(),
    "yarn/config.json": json.dumps({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 4.0}}).encode(),
    **{f"{name}/config.json": json.dumps(LLAMA).encode() for name in ("hollow", "damaged")},
    **{f"{kind}-weights/config.json": json.dumps(GPT).encode() for kind in ("no", "bad", "half")},
    "damaged/model.safetensors": b"\xff" * 100, "bad-weights/model.safetensors": b"\x10" * 1000,
    "pieces/tokenizer.model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x0c",
    **{f"broken/{i}.png": b"\x89PNG\r\n\x1a\n and then nothing" for i in range(20)},
    "data/cifar-10-binary.tar.gz": gzip.compress(b"no archive" * 100),
    "data/mnist/train-images-idx3-ubyte.gz": gzip.compress(b"\0\0\x08\x03" + b"\0" * 5000)[:60],
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A function of a folder's name: the folder copied alone, with a checkpoint in out/ and the bad files beside it."""
    return functools.cache(lambda name: Folder(name, tmp_path_factory.mktemp(name), FILES.items()))


@pytest.mark.parametrize("name", FOLDERS)
def test_flags(name, places, monkeypatch):
    monkeypatch.delenv("DATA_DIR", raising=False)
    folder, small = places(name), SHORT[name][2:]
    for i, case in enumerate(FLAGS + OWN[name]):
        text, _, reason = case.partition(" | ")
        args = shlex.split(text)
        folder.refused(*small, "--out", f"run{i}", *args, reason=reason or args[0])
    for flags in map(str.split, CONTRADICTIONS[name]):
        reason = "other data" if flags[-1].startswith("other.") else flags[0]
        folder.refused("--resume", "--out", folder.ckpt.parent, *flags, reason=reason)
    folder.refused(*small, "--device", "tpu", backend="torch", reason="--device")


def test_checkpoints(places):
    """Damaged, foreign or dangerous files instead of a checkpoint; read_meta is the same in all folders."""
    good, bad = (folder := places("mlp")).before, folder.path / "bad/ckpt.npz"
    half, rest = good[: len(good) // 2], good[len(good) // 2 :]
    bad.parent.mkdir()
    for content in (half, b"", half + bytes(b ^ 255 for b in rest[:64]) + rest[64:]):
        bad.write_bytes(content)
        folder.refused(*SHORT["mlp"], "--resume", "--out", "bad", reason="damaged")
    meta = str(folder.arrays["meta"]).replace('"model": "mlp"', '"model": "other"')
    for meta, reason in ((np.array([{"a pickled": "object"}], dtype=object), "pickle"), (meta, "other/")):
        np.savez(bad, meta=meta)
        folder.refused(*SHORT["mlp"], "--resume", "--out", "bad", reason=reason)


# ---- what goes wrong on the way --------------------------------------------------------------------------------------

TWO = pytest.mark.parametrize("name, backend", [("mlp", "torch"), ("gpt", "mlx")])  # fit and main are the same in all


@TWO
def test_full_disk(name, backend, places):
    """A checkpoint that does not fit on the disk: the old one is kept, and no part of the new one is left."""
    resource = pytest.importorskip("resource")
    folder, usual = places(name), resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, usual[1]))
    try:
        for out in ([], ["--out", "full"]):  # the copy of the old one does not fit; the new one does not
            folder.refused(*SHORT[name], *out, backend=backend, reason="could not be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("name", ["rnn", "gpt", "llama"])
def test_other_alphabet(name, places):
    """A text without the letters of the usual prompt: the generated text begins with a letter that it has."""
    result(places(name).path, "mlx", *SHORT[name], "--data", "sea.txt", "--out", "sea", run=run_here)


def test_closed_pipe(places):
    """A reader that goes away, as `| head -1` does, ends the run without a traceback."""
    process = start(places("gpt").path, "mlx", *SHORT["gpt"], "--out", "pipe")
    process.stdout.close()
    assert process.wait() == 141 and not process.stderr.read()


@TWO
def test_not_finite(name, backend, places):
    """A rate that makes the loss explode stops the run, names the step, and keeps the old checkpoint."""
    folder, args = places(name), [*SHORT[name][2:], "--steps", "200", "--lr", "1e30"]
    err = folder.refused(*args, backend=backend, reason=str(folder.ckpt))
    assert "finite" in err and "step" in err
