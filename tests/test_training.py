"""What holds for all trainers: how they start, what decays, what they refuse, what evaluation leaves, what matters."""

import itertools
import math
from contextlib import suppress
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from adversary import arrays_of
from folders import BACKENDS, CASES, FOLDERS, batches, load, make_trainer
from test_parity import loss_and_grads


def state(trainer, path):
    """All arrays of a checkpoint, by name."""
    trainer.save(path, 1)
    return {name: a for name, a in arrays_of(path).items() if name != "meta"}


STARTS = [  # folder, Config, n for each matrix or filter, which starts as N(0, 1 / n)
    ("cnn", dict(model="resnet", size=8, n_in=3, n_out=10, channels=[32, 48, 48, 64]), lambda w: w[0].size / 2),
    ("mlp", dict(n_in=50, hidden=[90], n_out=40, activation="relu"), lambda w: w.shape[1] / 2),
    ("mlp", dict(n_in=50, hidden=[90], n_out=40, activation="tanh"), lambda w: sum(w.shape) / 2),
    ("mlp", dict(n_in=50, hidden=[90], n_out=40, activation="sigmoid"), lambda w: sum(w.shape) / 2),
]


@pytest.mark.parametrize("name, config, n", STARTS)
def test_starting_weights(name, config, n):
    """On the best device; norms start as 1, biases as 0."""
    for net in (load(name, backend) for backend in BACKENDS):
        trainer = net.Trainer(net.Config(**config))
        assert trainer.device in net.devices()
        for key, w in net.get_weights(trainer.model).items():
            if w.ndim == 1:
                assert (w == ("norm" in key and "weight" in key)).all(), key
            else:
                assert w.std() * n(w) ** 0.5 == pytest.approx(1, abs=3 / w.size**0.5), key
                assert abs(w.mean()) < 5 * w.std() / w.size**0.5, key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, i", [case for case in CASES if hasattr(load(case[0], "torch").Config, "weight_decay")])
def test_decay(name, i, backend):
    """A step removes the share lr weight_decay of each matrix and filter, and nothing of biases and norms."""
    batch, after, get_weights = batches(name, i, 1)[0], [], load(name, backend).get_weights
    for decay in (0.0, 0.5):
        trainer = make_trainer(name, i, backend, weight_decay=decay)
        before = {key: w.copy() for key, w in get_weights(trainer.model).items()}
        trainer.step(*batch, lr=0.01)
        after.append({key: w.copy() for key, w in get_weights(trainer.model).items()})
    moved = [key for key in before if (after[0][key] != before[key]).any()]
    assert len(moved) > 3
    for key in moved:
        share = 0.005 if before[key].ndim > 1 else 0.0
        np.testing.assert_allclose(after[0][key] - after[1][key], share * before[key], atol=2e-6, err_msg=key)


OPTIMIZED = [  # folder, number, framework, what is different from FOLDERS, for which parameters Muon is
    ("cnn", 0, "torch", {}, lambda name, p: p.ndim == 4),
    ("cnn", 1, "mlx", {}, lambda name, p: p.ndim == 4),
    ("rnn", 0, "mlx", dict(optimizer="muon", clip=0.1), lambda name, p: "rnn.weight" in name),  # tall matrices
    ("rnn", 1, "torch", dict(cell="rnn", n_embd=40, clip=0.1), lambda name, p: "rnn.weight" in name),  # wide and square
    *(("rnn", 3, name, dict(optimizer="sgd", clip=clip), lambda *_: False) for name in BACKENDS for clip in (0.1, 1e9)),
]


@pytest.mark.parametrize("name, i, backend, changes, by_muon", OPTIMIZED)
def test_optimizers(name, i, backend, changes, by_muon, monkeypatch):
    """Three steps are those of torch.optim: of its Muon for filters and cells, of its AdamW for the rest; or of SGD."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's Muon rounds to 8 bits
    changes = {"weight_decay": 0.2, **changes}
    trainer, other = make_trainer(name, i, backend, **changes), make_trainer(name, i, "torch", **changes)
    params, start = dict(other.model.named_parameters()), load(name, backend).get_weights(trainer.model)
    flat = {key: torch.nn.Parameter(p.data.flatten(min(1, p.ndim - 1))) for key, p in params.items()}  # the same memory
    large = [key for key, p in params.items() if by_muon(key, p)]
    rest = [{"params": flat[key], "weight_decay": 0.2 * (p.ndim > 1)} for key, p in params.items() if key not in large]
    if changes.get("optimizer") == "sgd":
        rules = [torch.optim.SGD(flat.values(), 0.02)]
    else:
        muon = dict(lr=0.02, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")
        rules = [torch.optim.Muon(map(flat.get, large), **muon), torch.optim.AdamW(rest, 0.02, betas=(0.9, 0.99))]
    for batch in batches(name, i, 3):
        other.model.zero_grad()
        if len(batch) > 2:
            batch[2][:] = 0  # each row begins
        loss, _ = loss_and_grads(name, other, "torch", batch)
        norm = torch.nn.utils.clip_grad_norm_(params.values(), changes.get("clip", math.inf)).item()
        expected = {"loss": loss, "grad_norm": norm} if name == "rnn" else {"loss": loss}
        figures = {key: float(value) for key, value in trainer.step(*batch, lr=0.02).items()}
        assert figures == pytest.approx(expected, rel=1e-3) and norm > 0.1
        for key, p in params.items():
            flat[key].grad = p.grad.view(flat[key].shape)
        for rule in rules:
            rule.step()
    for key, w in load(name, backend).get_weights(trainer.model).items():
        moved, expected = w - start[key], params[key].detach().numpy() - start[key]
        assert np.linalg.norm(moved - expected) < (0.005 if name == "rnn" else 0.01) * np.linalg.norm(expected), key


IDS = {  # the place of each array of tokens or classes in a batch: how many of them Config has
    **dict.fromkeys(["mlp", "cnn", "vit"], {1: "n_out"}),
    **dict.fromkeys(["gpt", "llama"], {0: "vocab_size", 1: "vocab_size"}),
    "rnn": {0: "vocab_size", 1: "n_out"}, "seq2seq": {0: "src_vocab", 1: "tgt_vocab"}, "clip": {1: "src_vocab"},
    "diffusion": {1: "n_class"},
}  # fmt: skip


@pytest.mark.parametrize("name, i", CASES)
def test_ids(name, i):
    """A token or a class that the model does not have raises: MLX would silently read past the end of an array."""
    for backend in BACKENDS:
        trainer, batch = make_trainer(name, i, backend), batches(name, i, 1)[0]
        places = IDS.get(name) or IDS.get(getattr(trainer.config, "model", ""), {})
        for at, field in places.items():
            n = getattr(trainer.config, field)
            if field == "n_class":  # with a class for none
                n = trainer.config.vocab_size or n + 1
            least = -1 if (name, at) == ("llama", 1) else 0  # -1 where a token does not count
            for bad in (least - 1, n) if batch[at].dtype == np.int64 else ():
                wrong = batch[at].copy()
                wrong.flat[-1] = bad
                with pytest.raises(ValueError, match="outside"):
                    trainer.step(*batch[:at], wrong, *batch[at + 1 :], lr=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, i", CASES)
def test_evaluate(name, i, backend, tmp_path):
    """Evaluation is repeatable, even if training uses dropout, and leaves weights and moments unchanged."""
    idle = {"dropout": 0.5} if hasattr(load(name, backend).Config, "dropout") else {}
    trainer, batch = make_trainer(name, i, backend, **idle), batches(name, i, 1)[0]
    trainer.step(*batch, lr=1e-3)
    before = state(trainer, tmp_path / "a.npz")
    first, second = ({key: float(x) for key, x in EVALUATE[name](trainer, *batch).items()} for _ in range(2))
    assert first == second and all(np.isfinite(list(first.values())))
    np.testing.assert_equal(state(trainer, tmp_path / "b.npz"), before)


EVALUATE = dict.fromkeys(FOLDERS, lambda trainer, *batch: trainer.evaluate(*batch))
EVALUATE["gan"] = lambda trainer, x, z, u: trainer.evaluate(x[0], z[0])
EVALUATE["rnn"] = lambda trainer, x, y, keep=None, *beside: trainer.evaluate(x, y, *beside)


def measured(name, config, path):
    """What a Config leads to, one after the other: initial weights, a step, the weights after it, the outputs."""
    trainer = load(name, "torch").Trainer(config, device="cpu")
    batch = FOLDERS[name].batch(config, np.random.default_rng(0))
    yield from state(trainer, path).values()
    yield from trainer.step(*batch, lr=1e-2).values()
    yield from EVALUATE[name](trainer, *batch).values()
    yield from state(trainer, path).values()
    yield FOLDERS[name].outputs(trainer, *batch)


@pytest.mark.parametrize("name", FOLDERS)
def test_config(name, tmp_path):
    """Changing any number of Config changes something that is measured in one of the small models."""
    net = load(name, "torch")
    configs = [net.Config(**config) for config in FOLDERS[name].configs]
    idle = {field.name for field in fields(net.Config) if type(field.default) in (int, float)}
    for config in configs:
        usual = list(measured(name, config, tmp_path / "a.npz")) if idle else []
        for field in sorted(idle):
            value = getattr(config, field)
            for other in (2 * value, value + 1, value - 1, 0.5):
                with suppress(Exception):  # it must match other fields
                    changed = measured(name, replace(config, **{field: type(value)(other)}), tmp_path / "b.npz")
                    if not all(itertools.starmap(np.array_equal, itertools.zip_longest(usual, changed))):
                        idle.discard(field)
                        break
    assert not idle, f"nothing notices {idle}"
