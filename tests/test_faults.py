"""Bad input: one line that says what is wrong and how to fix it, exit code 2, no traceback, nothing lost."""

import functools
import gzip
import json
import resource
import signal
import sys

import numpy as np
import pytest
from adversary import SHORT
from folders import FOLDERS, SOME, copy_alone, run, run_here, start

# ---- what is refused -------------------------------------------------------------------------------------------------

FLAGS = [  # arguments that every folder refuses, and a word of the reason
    (["--steps", "-1"], "--steps"),
    (["--steps", "many"], "invalid int"),
    (["--batch-size", "0"], "--batch-size"),
    (["--lr", "0"], "--lr"),
    (["--lr", "nan"], "--lr"),
    (["--seed", "-1"], "--seed"),
    (["--device", "tpu"], "--device tpu"),
    (["--nonsense"], "--nonsense"),
    (["--resume", "--out", "nowhere"], "no checkpoint"),
    (["--out", "train.py"], "--out"),
]
OWN = {  # arguments that one folder refuses; FILES are written beforehand
    "mlp": [
        (["--task", "cubic"], "invalid choice"),
        (["--data", "missing.csv"], "missing.csv"),
        (["--data", "empty"], "empty"),
        (["--data", "gap.csv"], "no gap"),
        (["--data", "latin1.txt"], "latin1.txt"),
        (["--data", "half.csv"], "class numbers"),
        (["--hidden", "0"], "--hidden"),
        (["--batch-size", "6000"], "more than the"),
        (["--data", "mnist"], "train-images"),
    ],
    "cnn": [
        (["--data", "missing"], "missing"),
        (["--data", "empty"], "sub-folders"),
        (["--data", "mnist"], "train-images"),
        (["--data", "cifar10"], "cifar-10-binary"),
        (["--channels", "0", "1", "1"], "--channels"),
        (["--channels", "8", "8"], "three"),
        (["--size", "8"], "--size"),
        (["--shift", "-1"], "--shift"),
        (["--task", "style", "--tv", "-1"], "--tv"),
        (["--export", "net.onnx"], "--export"),
        (["--export", "net.pt2"], ".mlxfn"),
        (["--export", "nowhere/net.mlxfn"], "no such folder"),
        (["--model", "resnet", "--channels", *"444444"], "channels"),
        (["--task", "style", "--content", "binary"], "binary"),
        (["--task", "style", "--style", "missing.jpg"], "missing.jpg"),
        (["--task", "style", "--size", "32", "--weights", "binary"], "VGG-19"),
        (["--task", "style", "--resume", "--out", "out/classify"], "--task style contradicts"),
    ],
    "gpt": [
        (["--data", "missing.txt"], "missing.txt"),
        (["--data", "empty"], "empty"),
        (["--data", "latin1.txt"], "UTF-8"),
        (["--data", "binary"], "binary"),
        (["--data", "short.txt"], "too few"),
        (["--prompt", "\u4e2d"], "alphabet"),
        (["--prompt", ""], "--prompt"),
        (["--prompt", "x" * 200], "--prompt"),
        (["--n-embd", "30"], "--n-embd"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--top-k", "0"], "--top-k"),
        (["--beam", "0"], "--beam"),
        (["--stop", ""], "--stop"),
        (["--merges", "-1"], "--merges"),
        (["--init", "missing.npz"], "missing.npz"),
        (["--init", "binary"], "no checkpoint"),
        (["--init", "few"], "config.json"),
        (["--init", "no-weights"], "*.safetensors"),
        (["--init", "bad-weights"], "damaged"),
        (["--init", "half-weights", "--data", "the.txt"], "lacks"),
        (["--export-hf", "train.py"], "--export-hf"),
        (["--accumulate", "9"], "--batch-size"),
        (["--warmup", "0"], "--warmup"),
        (["--chat"], "--task chat"),
        (["--task", "chat", "--data", "short.txt"], "messages"),
        (["--task", "chat", "--data", "silent.jsonl"], "messages"),
        (["--task", "rl"], "--init"),
        (["--task", "rl", "--init", "out/text/ckpt.npz"], "context of 56"),
        (["--task", "rl", "--init", "out/text/ckpt.npz", "--group", "3"], "--group"),
    ],
    "transformer": [
        (["--task", "translate", "--data", "missing.tsv"], "missing.tsv"),
        (["--task", "translate", "--data", "empty"], "100 lines"),
        (["--task", "translate", "--data", "latin1.txt"], "UTF-8"),
        (["--task", "translate", "--data", "binary"], "100 lines"),
        (["--task", "translate", "--data", "multi30k"], "multi30k"),
        (["--task", "translate", "--prompt", "twelve apples"], "'apples'"),
        (["--task", "translate", "--prompt", "one " * 50], "--prompt"),
        (["--task", "translate", "--resume", "--out", "out/classify"], "--task translate contradicts"),
        (["--task", "clip", "--data", "digits"], "clip has"),
        (["--task", "clip", "--batch-size", "1000"], "--batch-size"),
        (["--data", "numbers"], "classify has"),
        (["--prompt", "twelve"], "--task translate"),
        (["--data", "mnist"], "train-images"),
        (["--data", "cifar10"], "classify has"),
        (["--width", "30"], "width"),
        (["--patch", "5"], "patch"),
        (["--patch", "0"], "--patch"),
        (["--dropout", "1"], "--dropout"),
        (["--smoothing", "nan"], "--smoothing"),
        (["--warmup", "-1"], "--warmup"),
        (["--beam", "0"], "--beam"),
        (["--merges", "-1"], "--merges"),
    ],
    "rnn": [
        (["--data", "missing.txt"], "missing.txt"),
        (["--data", "latin1.txt"], "UTF-8"),
        (["--data", "short.txt"], "too few"),
        (["--prompt", "\u4e2d"], "alphabet"),
        (["--prompt", ""], "--prompt"),
        (["--temperature", "-1"], "--temperature"),
        (["--n-hidden", "0"], "--n-"),
        (["--clip", "0"], "--clip"),
        (["--task", "series", "--data", "missing.csv"], "missing.csv"),
        (["--task", "series", "--data", "words.csv"], "no column of numbers"),
        (["--task", "series", "--data", "lines.csv"], "are needed"),
        (["--task", "speech", "--data", "empty"], "two speakers"),
        (["--task", "speech", "--data", "voices"], "no WAV"),
        (["--length", "0"], "--length"),
        (["--task", "speech", "--held-out", "nobody"], "the speakers are"),
        (["--resume", "--task", "gradients", "--out", "out/text"], "--task gradients contradicts"),
    ],
    "autoencoder": [
        (["--task", "dream"], "invalid choice"),
        (["--data", "missing"], "folder of 2 "),
        (["--data", "few"], "folder of 2 "),
        (["--data", "broken"], "is no picture"),
        (["--hidden", "0"], "--hidden"),
        (["--net", "conv", "--hidden", "8", "8", "8"], "28 x 28"),
        (["--latent", "0"], "--latent"),
        (["--beta", "-1"], "--beta"),
        (["--std", "0"], "--std"),
        (["--noise", "nan"], "--noise"),
        (["--size", "2"], "--size"),
        (["--count", "0"], "--count"),
        (["--resume", "--task", "denoise", "--out", "out/vae"], "--task denoise contradicts"),
        (["--data", "mnist"], "train-images"),
    ],
    "gan": [
        (["--data", "missing"], "folder of 2 "),
        (["--data", "broken"], "is no picture"),
        (["--hidden", "0"], "--hidden"),
        (["--model", "dcgan", "--size", "28", "--hidden", "8", "8", "8"], "--size"),
        (["--d-steps", "0"], "--d-steps"),
        (["--d-lr", "nan"], "--d-lr"),
        (["--smoothing", "1"], "--smoothing"),
        (["--ema", "1"], "--ema"),
        (["--penalty", "-1"], "--penalty"),
        (["--size", "2"], "--size"),
        (["--task", "toy", "--loss", "wgan-gp"], "--task toy"),
        (["--task", "toy", "--data", "mnist"], "--data"),
        (["--resume", "--task", "toy", "--out", "out/pictures"], "--task toy contradicts"),
        (["--data", "mnist"], "train-images"),
    ],
    "llama": [
        (["--data", "missing.txt"], "missing.txt"),
        (["--data", "latin1.txt"], "UTF-8"),
        (["--data", "short.txt"], "too few"),
        (["--prompt", "\u4e2d"], "alphabet"),
        (["--prompt", ""], "--prompt"),
        (["--n-embd", "30"], "n_embd"),
        (["--n-kv-head", "3"], "n_kv_head"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-k", "0"], "--top-k"),
        (["--sinks", "16"], "sinks"),
        (["--factor", "0"], "--factor"),
        (["--accumulate", "9"], "--accumulate"),
        (["--block-size", "0"], "--block-size"),
        (["--lora", "2"], "--init"),
        (["--chat"], "--init"),
        (["--init", "missing"], "missing"),
        (["--init", "mistral"], "mistral"),
        (["--init", "yarn"], "type yarn"),
        (["--init", "hollow"], "safetensors"),
        (["--init", "damaged"], "damaged"),
        (["--tokenizer", "missing"], "tokenizer.json"),
        (["--tokenizer", "pieces"], "SentencePiece"),
        (["--data", "dialogues.jsonl"], "--init"),
        (["--task", "text", "--data", "dialogues.jsonl"], "--task chat"),
    ],
    "diffusion": [
        (["--task", "dream"], "invalid choice"),
        (["--data", "missing"], "folder of 2 "),
        (["--data", "broken"], "is no picture"),
        (["--data", "mnist"], "train-images"),
        (["--data", "cifar10"], "cifar-10-binary.tar.gz"),
        (["--widths", "0"], "--widths"),
        (["--widths", "9", "8", "--fold", "1"], "even"),
        (["--fold", "-1"], "--fold"),
        (["--size", "30"], "--size"),
        (["--data", "cifar10", "--size", "40"], "--size of cifar10"),
        (["--size", "8"], "--size"),
        (["--widths", "8", "8", "8", "8"], "multiple of 32"),
        (["--count", "0"], "--count"),
        (["--ema", "1"], "--ema"),
        (["--guidance", "nan"], "--guidance"),
        (["--sample-steps", "1"], "--sample-steps"),
        (["--prompt", "big blue star"], "--prompt"),
        (["--blind"], "--task inpaint"),
        (["--task", "toy", "--data", "mnist"], "--data"),
        (["--task", "text", "--prompt", "big pink star"], "--prompt"),
        (["--resume", "--task", "toy", "--out", "out/pictures"], "--task toy contradicts"),
    ],
}

# ---- the files of those arguments ------------------------------------------------------------------------------------

LLAMA = dict(model_type="llama", hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64,
             max_position_embeddings=64, vocab_size=101, rms_norm_eps=1e-5)  # fmt: skip
FILES = {
    "empty": b"",
    "binary": bytes(range(128)) * 40,
    "latin1.txt": "h\u00e9l\u00e0s, \u00e7a ne va pas\n".encode("latin-1") * 100,
    "short.txt": b"too short to learn from",
    "gap.csv": b"a,b,c\n" + b"1,2,0\n" * 10 + b"1,nan,0\n",
    "half.csv": b"a,b,c\n" + b"1,2,0.5\n" * 20,
    "lines.csv": b"a,b\n1,4\n2,5\n3,7\n",
    "words.csv": b"a,b\nx,y\n" * 100,
    **{f"voices/{name}_0.wav": b"RIFF\0\0\0\0WAVE and then nothing" for name in ("0_ann", "1_bob")},
    "the.txt": b"The he T" * 100,
    "silent.jsonl": b'{"messages": []}\n' * 20,
    "few/one.png": b"",
    "mistral/config.json": json.dumps({**LLAMA, "model_type": "mistral"}).encode(),
    "yarn/config.json": json.dumps({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 4.0}}).encode(),
    **{f"{name}/config.json": json.dumps(LLAMA).encode() for name in ("hollow", "damaged")},
    "damaged/model.safetensors": b"\xff" * 100,
    "pieces/tokenizer.model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x0c",
    "dialogues.jsonl": b'{"messages": [{"role": "user", "content": "hi"}]}\n' * 3,
    **{f"{kind}-weights/config.json": json.dumps(dict(n_positions=16, vocab_size=4, n_layer=1, n_head=4, n_embd=32,
                                                      tokenizer=["chars", " The"])).encode()
       for kind in ("no", "bad", "half")},
    "bad-weights/model.safetensors": b"\x10" * 1000,
    "half-weights/model.safetensors": b"\2\0\0\0\0\0\0\0{}",
    **{f"broken/{i}.png": b"\x89PNG\r\n\x1a\n and then nothing" for i in range(20)},
    "data/cifar-10-binary.tar.gz": gzip.compress(b"no archive" * 100),
    "data/mnist/train-images-idx3-ubyte.gz": gzip.compress(b"\0\0\x08\x03" + b"\0" * 5000)[:60],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A function of a folder's name: the folder copied alone, with a checkpoint in out/ and the bad files beside it."""

    @functools.cache
    def place(name):
        folder = copy_alone(name, tmp_path_factory.mktemp(name) / name)
        for file, content in FILES.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        code, _, err = run(folder, "mlx", *SHORT[name])
        assert code == 0, err
        return folder

    return place


def ckpt_of(folder):
    """The checkpoint of the run that places() made."""
    return next(folder.glob("out/*/ckpt.npz"))


def refused(folder, backend, *args):
    """Run train.py with bad input: exit code 2, one line, which is returned, and the checkpoint is left as it was."""
    before = ckpt_of(folder).read_bytes()
    code, out, err = run_here(folder, backend, *args)
    assert code == 2, f"exit code {code}\n{out}\n{err}"
    assert len(err.splitlines()) == 1 and err.startswith("train.py: "), err
    assert "result" not in out and ckpt_of(folder).read_bytes() == before
    assert not list(folder.glob("**/*.part"))
    return err


# ---- flags, files, checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_flags(name, places, monkeypatch):
    monkeypatch.delenv("DATA_DIR", raising=False)
    for i, (args, reason) in enumerate(FLAGS + OWN[name]):
        assert reason in refused(places(name), "mlx", *SHORT[name][2:], "--out", f"run{i}", *args), args
    assert "--device" in refused(places(name), "torch", *SHORT[name], "--device", "tpu")


@pytest.mark.parametrize("name", FOLDERS)
def test_checkpoints(name, places):
    """Damaged, foreign or dangerous files instead of a checkpoint."""
    folder = places(name)
    good = ckpt_of(folder).read_bytes()
    with np.load(ckpt_of(folder)) as f:
        arrays = dict(f)
    (folder / "bad").mkdir()
    bad = folder / "bad/ckpt.npz"

    def attempt(word):
        assert word in refused(folder, "mlx", *SHORT[name], "--resume", "--out", "bad")

    bad.write_bytes(good[: len(good) // 2])
    attempt("damaged")
    bad.write_bytes(b"")
    attempt("damaged")
    middle = len(good) // 2
    bad.write_bytes(good[:middle] + bytes(b ^ 255 for b in good[middle : middle + 64]) + good[middle + 64 :])
    attempt("damaged")
    np.savez(bad, meta=np.array([{"a pickled": "object"}], dtype=object))
    attempt("pickle")
    np.savez(bad, **{**arrays, "meta": str(arrays["meta"]).replace(f'"model": "{name}"', '"model": "other"')})
    attempt("other/")


# ---- what goes wrong on the way --------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on file sizes to set")
@pytest.mark.parametrize("name, backend", SOME)
def test_full_disk(name, backend, places):
    """A checkpoint that does not fit on the disk: the old one is kept, and no part of the new one is left."""
    folder = places(name)
    before = ckpt_of(folder).read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    process = start(folder, backend, *SHORT[name], preexec_fn=limit)
    _, err = process.communicate()
    assert process.returncode == 2 and len(err.splitlines()) == 1 and "could not be written" in err, err
    assert ckpt_of(folder).read_bytes() == before and not list(folder.glob("**/*.part"))


@pytest.mark.parametrize("name", ["rnn", "gpt", "llama"])
def test_other_alphabet(name, places):
    """A text without the letters of the usual prompt: the generated text begins with a letter that it has."""
    (places(name) / "sea.txt").write_text("\u5927\u6d77\n" * 1000, encoding="utf-8")
    code, _, err = run(places(name), "mlx", *SHORT[name], "--data", "sea.txt", "--out", "sea")
    assert code == 0, err


@pytest.mark.parametrize("name", FOLDERS)
def test_closed_pipe(name, places):
    """A reader that goes away, as `| head -1` does, ends the run without a traceback."""
    process = start(places(name), "mlx", *SHORT[name])
    process.stdout.close()
    assert process.wait() == 141 and not process.stderr.read()


@pytest.mark.parametrize("name, backend", SOME)
def test_not_finite(name, backend, places):
    """A rate that makes the loss explode stops the run, names the step, and keeps the old checkpoint."""
    folder = places(name)
    err = refused(folder, backend, *SHORT[name][2:], "--steps", "200", "--lr", "1e30")
    assert "finite" in err and "step" in err and str(ckpt_of(folder)) in err
