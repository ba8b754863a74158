"""What holds for every task: held-out data stay out, and the learning rate follows the recipe."""

import functools
import json

import numpy as np
import pytest
from folders import FOLDERS, load_file, make_args, make_task

SEA = "\u6d77"  # a letter that no training part has


def other_end(text):
    """A text whose last tenth, which is held out, is changed."""
    cut = len(text) * 9 // 10
    return text[:cut] + "".join(c if i % 9 else SEA for i, c in enumerate(text[cut:][::-1]))[: len(text) - cut]


def spoil_second(make):
    """A function that makes training data as before when first called, and nonsense for the held-out data."""
    calls = []

    @functools.wraps(make)
    def spoiled(*args, **more):
        calls.append(args)
        arrays = make(*args, **more)
        return arrays if len(calls) == 1 else tuple(a[::-1] // 2 for a in arrays)

    return spoiled


def later_rows(names_and_table):
    names, table = names_and_table
    table = table.copy()
    table[len(table) * 4 // 5 :] = table[len(table) * 4 // 5 :] * 3 + 100
    return names, table


def last_voice(sounds_labels_speakers):
    sounds, labels, speakers = sounds_labels_speakers
    return [s[::-1] ** 2 if who == max(speakers) else s for s, who in zip(sounds, speakers)], labels, speakers


def after(change):
    """The wrapper that puts `change` behind a function."""
    return lambda make: lambda *args, **more: change(make(*args, **more))


def last_tenth(dialogues):
    cut = len(dialogues) * 9 // 10
    return dialogues[:cut] + [[("user", SEA), ("assistant", SEA)]] * (len(dialogues) - cut)


POISONED = [  # folder, command line, the function of data.py that gives the data, how the held-out data are changed
    ("mlp", ["--task", "spiral"], "make_spiral", spoil_second),
    ("mlp", ["--task", "binary"], "make_moons", spoil_second),
    ("mlp", ["--task", "regression"], "make_sine", spoil_second),
    ("mlp", ["--task", "digits"], "make_digits", spoil_second),
    ("cnn", [], "make_digits", spoil_second),
    ("rnn", [], "load_text", after(other_end)),
    ("rnn", ["--task", "series"], "make_weather", after(later_rows)),
    ("rnn", ["--task", "speech"], "make_speech", after(last_voice)),
    ("rnn", ["--task", "speak"], "make_speech", after(last_voice)),
    ("gan", ["--count", "300"], "make_digits", spoil_second),
    ("autoencoder", ["--count", "300"], "make_digits", spoil_second),
    ("autoencoder", ["--task", "denoise", "--count", "300"], "make_digits", spoil_second),
    ("autoencoder", ["--task", "compress", "--count", "300"], "make_digits", spoil_second),
    ("transformer", ["--task", "classify"], "make_digits", spoil_second),
    ("gpt", [], "load_text", after(other_end)),
    ("gpt", ["--tokenizer", "bpe", "--merges", "50"], "load_text", after(other_end)),
    ("gpt", ["--task", "chat", "--data", "talk.jsonl"], "load_messages", after(last_tenth)),
    ("llama", [], "load_text", after(other_end)),
    ("diffusion", ["--count", "300"], "make_digits", spoil_second),
]


@functools.cache
def once(name, source):
    """A function of data.py that computes each answer once, for all tests here."""
    return functools.cache(getattr(load_file(name, "data"), source))


def learned(task):
    """All that a network can learn from: the batches of three steps, and the metadata."""
    batches = [np.asarray(a) for step in range(3) for a in task.batch(step)]
    return json.dumps([task.config, task.extra], default=str), batches


@pytest.mark.parametrize("name, argv, source, poison", POISONED, ids=lambda x: x if isinstance(x, str) else "")
def test_held_out_stays_out(name, argv, source, poison, monkeypatch, tmp_path):
    """Batches, alphabets, vocabularies and means do not depend on the held-out data; the figures on it do."""
    monkeypatch.chdir(tmp_path)
    talk = [{"messages": [{"role": r, "content": f"{r} {i}"} for r in ("user", "assistant")]} for i in range(40)]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, talk)))
    data, make = load_file(name, "data"), once(name, source)
    monkeypatch.setattr(data, source, make)
    usual, batches = learned(make_task(name, *argv))
    monkeypatch.setattr(data, source, poison(make))
    other, poisoned = learned(make_task(name, *argv))
    assert other == usual
    assert all(np.array_equal(a, b) for a, b in zip(batches, poisoned, strict=True))


RATES = {  # the rate over the highest: at step 0, in the middle and at the last of 1,000 steps
    "mlp": (1.0, 0.5, 0.0),
    "cnn": (0.01, 5 / 9, 0.0),
    "rnn": (1 / 30, 0.5, 0.0),
    "gan": (1.0, 1.0, 1.0),
    "autoencoder": (1.0, 0.5, 0.0),
    "transformer": (0.01, 0.5, 0.0),
    "gpt": (1 / 30, 0.5, 0.0),
    "llama": (1 / 30, 0.5, 0.0),
    "diffusion": (0.02, 1.0, 0.0),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_rate(name, tmp_path):
    """The learning rate passed to Trainer.step rises and falls as in the recipe, with a peak of --lr."""
    train, seen = load_file(name, "train"), []

    class Trainer:
        def step(self, lr):
            seen.append(lr)
            return {"loss": 0.0}

        def save(self, path, step, **memory):
            pass

    class Task:
        def batch(self, step):
            return ()

        def evaluate(self, trainer, whole=False):
            return {"val_loss": 0.0}

    args = make_args(name, "--lr", 0.25, "--steps", 1000, "--out", tmp_path)
    train.fit(Trainer(), Task(), args, 0, {})
    assert len(seen) == 1000 and 0.9 * 0.25 < max(seen) <= 0.25
    for at, share in zip((0, 500, 999), RATES[name]):
        assert seen[at] == pytest.approx(0.25 * share, rel=0.1, abs=0.002)
