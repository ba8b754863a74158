"""What holds for every task: held-out data stay out, each flag has an effect, and the rate follows the recipe."""

import functools
import json
from unittest import mock

import numpy as np
import pytest
from adversary import SHORT
from folders import FOLDERS, load_file, make_args, make_run, make_task
from test_parity import refusal

SEA = "\u6d77"  # a letter that no training part has


def changed(found):
    """What a function of data.py gives, with another held-out part, or all of it nonsense if it is arrays."""
    if isinstance(found[0], np.ndarray):
        return tuple(a[::-1] // 2 for a in found)
    cut = len(found) * 9 // 10
    if isinstance(found, str):
        return found[:cut] + "".join(c if i % 9 else SEA for i, c in enumerate(found[cut:][::-1]))
    if isinstance(found, list):
        return found[:cut] + [[("user", SEA), ("assistant", SEA)]] * (len(found) - cut)
    if len(found) == 2:
        names, table, cut = *found, len(found[1]) * 4 // 5
        return names, np.concatenate([table[:cut], table[cut:] * 3 + 100])
    sounds, labels, speakers = found
    return [s[::-1] ** 2 if who == max(speakers) else s for s, who in zip(sounds, speakers)], labels, speakers


HELD_OUT = [  # folder, command line, the function of data.py that gives the data
    *(("mlp", f"--task {name.lower()}", f"{name}.make") for name in ("Spiral", "Binary", "Regression")),
    *(("autoencoder", f"--task {name}", "make_digits") for name in ("vae", "denoise", "compress")),
    *((name, "", "make_digits") for name in ("cnn", "gan", "transformer", "diffusion")),
    *((name, "", "load_text") for name in ("rnn", "gpt", "llama")), ("mlp", "--task digits", "make_digits"),
    ("gpt", "--tokenizer bpe --merges 50", "load_text"), ("gpt", "--task chat --data talk.jsonl", "load_messages"),
    ("rnn", "--task series", "make_weather"), ("rnn", "--task speech", "make_speech"),
    ("rnn", "--task speak --impl builtin", "make_speech"),
]  # fmt: skip


@functools.cache
def once(name, source):
    """A function of data.py that computes each answer once, and few digits; and where it stands."""
    *places, last = source.split(".")
    place = functools.reduce(getattr, places, load_file(name, "data"))
    make = getattr(place, last)
    few = (lambda n, seed: make(min(n, 300), seed)) if source == "make_digits" else make
    return functools.cache(few), place, last


@pytest.fixture
def quick_judge(monkeypatch):
    """The judge of gan and diffusion learns for five steps."""
    for data in (load_file(name, "data") for name in ("gan", "diffusion")):
        monkeypatch.setattr(data, "Judge", functools.partial(data.Judge, n=5))


@pytest.mark.parametrize("name, argv, source", HELD_OUT)
def test_held_out_stays_out(name, argv, source, monkeypatch, tmp_path, quick_judge):
    """Batches, alphabets, vocabularies and means do not depend on the held-out data; the figures do."""
    monkeypatch.chdir(tmp_path)
    talk = [{"messages": [{"role": r, "content": f"{r} {i}"} for r in ("user", "assistant")]} for i in range(40)]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, talk)))
    (make, *place), calls, seen = once(name, source), [], []

    def poisoned(*args, **more):
        calls.append(found := make(*args, **more))
        return found if isinstance(found[0], np.ndarray) and len(calls) == 1 else changed(found)  # training comes first

    for function in (make, poisoned):
        monkeypatch.setattr(*place, staticmethod(function))
        task, trainer, _ = make_run(name, *SHORT[name], *argv.split(), "--out", tmp_path)
        batches = [np.asarray(a).tolist() for step in range(3) for a in task.batch(step)]
        figures = {key: float(x) for key, x in task.evaluate(trainer).items()}
        seen.append((json.dumps([task.config, task.extra], default=str), batches, figures))
    assert seen[0][:2] == seen[1][:2] and seen[0][2] != seen[1][2]


@pytest.mark.parametrize("name", ["rnn", "gpt", "llama"])
def test_halves(name, tmp_path, capsys):
    """Of the held-out tenth of a text the first half is for validation, also in log lines; the second is the test."""
    trainer = mock.Mock(evaluate=lambda x, y: {"val_loss": float(y.mean())}, config=mock.Mock(vocab_size=2))
    short = ["--length" if name == "rnn" else "--block-size", 8, "--batch-size", 1]
    for n, flags in (5000, []), (9, short), (8, short), (4, short):  # 8: one window, one of its eight targets is a b
        (tmp_path / "own.txt").write_text("ab" * 9 * n + "a" * n + "b" * n)
        argv = name, "--data", tmp_path / "own.txt", *flags
        if n == 4 or (n, name) == (8, "rnn"):
            assert " are too few for " in refusal(capsys, make_task, *argv)
            continue
        task = make_task(*argv)
        figures, test = task.evaluate(trainer, whole=True), None if n == 8 else pytest.approx(1, abs=0.01)
        assert task.evaluate(trainer) == {"val_loss": figures["val_loss"]} == {"val_loss": (n == 8) / 8}
        assert figures.get("test_loss") == test


TURNED = {  # flags, with --seed 1, that no other test changes; those before the |, if any, are in both runs
    "mlp": ["--activation tanh", "--optimizer sgd", "--lr 0.5"], "gan": ["--latent 5"], "gpt": [],
    "cnn": ["--model resnet", "--lr 0.5", "--task style --size 24 | --strength 1"],
    "rnn": ["--cell gru", "--n-layer 2", "--n-embd 9", "--optimizer adamw", "--batch-size 5", "--weight-decay 9",
            "--task series | --horizon 6"],
    "autoencoder": ["--likelihood gaussian", "--jitter 0.1"], "llama": ["--window 4", "--optimizer adamw"],
    "transformer": ["--norm post", "--n-head 2", "--optimizer adamw"],
    "diffusion": ["--predict noise", "--schedule linear", "--ema 0"],
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_effect(name, monkeypatch, tmp_path, quick_judge):
    """None is without effect on two steps of training and the figures after them."""

    @functools.cache
    def figures(flags):
        task, trainer, rate = make_run(name, *SHORT[name], *flags.split(), "--out", tmp_path)
        seen = [float(x) for i in range(2) for x in trainer.step(*task.batch(i), lr=rate(i)).values()]
        return seen + [float(x) for x in task.evaluate(trainer).values()]

    for source in ("make_digits", "make_weather"):
        if hasattr(load_file(name, "data"), source):
            make, *place = once(name, source)
            monkeypatch.setattr(*place, make)
    for turned in ["--seed 1", *TURNED[name]]:
        both, _, more = turned.rpartition("|")
        assert figures(both) != figures(f"{both} {more}"), turned


RATES = {  # the rate over the highest: at step 0, in the middle and at the last of 1,000 steps
    **dict.fromkeys(["mlp", "autoencoder"], (1.0, 0.5, 0.0)),
    **dict.fromkeys(["rnn", "gpt", "llama"], (1 / 30, 0.5, 0.0)),
    "cnn": (0.01, 5 / 9, 0.0), "gan": (1.0, 1.0, 1.0), "transformer": (0.01, 0.5, 0.0), "diffusion": (0.02, 1.0, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_rate(name, tmp_path):
    """The learning rate passed to Trainer.step rises and falls as in the recipe, with a peak of --lr."""
    seen, trainer = [], mock.Mock(step=lambda lr: seen.append(lr) or {"loss": 0.0})
    task = mock.Mock(batch=lambda step: (), evaluate=lambda trainer: {"val_loss": 0.0})
    args = make_args(name, "--lr", 0.25, "--steps", 1000, "--out", tmp_path)
    load_file(name, "train").fit(trainer, task, args, 0, {})
    assert len(seen) == 1000 and 0.9 * 0.25 < max(seen) <= 0.25
    for at, share in zip((0, 500, 999), RATES[name]):
        assert seen[at] == pytest.approx(0.25 * share, rel=0.1, abs=0.002)
