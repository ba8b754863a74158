"""What holds for all trainers: how they start and learn, what they refuse, what evaluation leaves, what matters."""

import functools
import itertools
import math
import re
import wave
from contextlib import suppress
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from adversary import arrays_of
from folders import BACKENDS, CASES, FOLDERS, batches, load, load_file, make_run, make_trainer
from PIL import Image
from test_parity import loss_and_grads


def state(trainer, path):
    """All arrays of a checkpoint, by name."""
    trainer.save(path, 1)
    return {name: a for name, a in arrays_of(path).items() if name != "meta"}


STARTS = {  # the deviation of what starts at random: matrices, filters, and a DCGAN's norms
    "autoencoder": lambda config, key, w: (2 / w[0].size) ** 0.5 / (10 if "encoder.out" in key else 1),
    "cnn": lambda config, key, w: (2 / w[0].size) ** 0.5,
    "diffusion": lambda config, key, w: 1 if re.search("label|word|place", key) else (
        w[0].size ** -0.5 * (0.1 if re.search("conv2|out|fc2", key) else 1)),
    "gan": lambda config, key, w: 0.02 if config.model == "dcgan" else (2 / w.shape[1]) ** 0.5,
    "mlp": lambda config, key, w: (2 / (w.shape[1] if config.activation == "relu" else sum(w.shape))) ** 0.5,
}  # fmt: skip
TEXTS = dict(image=[32, 32, 3], fold=1, widths=[64, 128], n_class=0, vocab_size=26, length=6, latent=4)


@pytest.mark.parametrize("name, config, n", [
    *((name, config, None) for name in STARTS for config in FOLDERS[name].configs),
    ("autoencoder", {}, 1360696), ("gan", {}, 233282), ("diffusion", {}, 264516), ("diffusion", TEXTS, 1407924),
])  # fmt: skip
def test_starting_weights(name, config, n):
    """Normal, drawn in the order of the names, on the best device; norms start as 1, or around it, and biases as 0."""
    for net in (load(name, backend) for backend in BACKENDS):
        trainer, rng = net.Trainer(net.Config(**config)), np.random.default_rng(0)
        weights = sorted(net.get_weights(trainer.model).items())
        assert trainer.device in net.devices()
        assert n in (None, sum(w.size for key, w in weights if "running" not in key))
        for key, w in weights:
            start = float(key.endswith("running_var") or (w.ndim == 1 and key.endswith("weight")))
            if w.ndim > 1 or (key.endswith("weight") and name == "gan"):
                drawn = rng.normal(size=w.shape) if name == "mlp" else rng.standard_normal(w.shape, np.float32)
                assert np.abs((w - start) / STARTS[name](trainer.config, key, w) - drawn).max() < 1e-4, key
            else:
                assert (w == start).all(), key


OPTIMIZED = [  # folder, number, framework, what is different from FOLDERS, for which parameters Muon is
    ("cnn", 0, "torch", {}, lambda name, p: p.ndim == 4),
    ("cnn", 1, "mlx", {}, lambda name, p: p.ndim == 4),
    *(("transformer", 2, name, {}, lambda name, p: p.ndim == 2 and "blocks." in name) for name in BACKENDS),
    *(("transformer", 3, name, {}, lambda *_: False) for name in BACKENDS),
    ("rnn", 0, "mlx", dict(optimizer="muon", clip=0.1), lambda name, p: "rnn.weight" in name),  # tall matrices
    ("rnn", 1, "torch", dict(cell="rnn", n_embd=40, clip=0.1), lambda name, p: "rnn.weight" in name),  # wide and square
    *(("rnn", 3, name, dict(optimizer="sgd", clip=clip), lambda *_: False) for name in BACKENDS for clip in (0.1, 1e9)),
]


@pytest.mark.parametrize("name, i, backend, changes, by_muon", OPTIMIZED)
def test_optimizers(name, i, backend, changes, by_muon, monkeypatch):
    """Three steps are those of torch.optim: of its Muon, of its AdamW for the rest; or of SGD. Vectors do not decay."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's Muon rounds to 8 bits
    changes = {"weight_decay": 0.2, **changes}
    trainer, other = make_trainer(name, i, backend, **changes), make_trainer(name, i, "torch", **changes)
    params, start = dict(other.model.named_parameters()), load(name, backend).get_weights(trainer.model)
    flat = {key: torch.nn.Parameter(p.data.flatten(min(1, p.ndim - 1))) for key, p in params.items()}  # the same memory
    large = [key for key, p in params.items() if by_muon(key, p)]
    rest = [{"params": flat[key], "weight_decay": 0.2 * (p.ndim > 1)} for key, p in params.items() if key not in large]
    rules = [torch.optim.AdamW(rest, 0.02, betas=(0.9, 0.99))]
    if large:
        muon = dict(lr=0.02, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")
        rules += [torch.optim.Muon(map(flat.get, large), **muon)]
    if changes.get("optimizer") == "sgd":
        rules = [torch.optim.SGD(flat.values(), 0.02)]
    limit = 1.0 if name == "transformer" else changes.get("clip", math.inf)
    for batch in batches(name, i, 3):
        other.model.zero_grad()
        if len(batch) > 2:
            batch[2][:] = 0  # each row begins
        loss, _ = loss_and_grads(name, other, "torch", batch)
        norm = torch.nn.utils.clip_grad_norm_(params.values(), limit).item()
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, i, betas, changes", [
    ("autoencoder", 0, (0.9, 0.99), {}), ("gan", 0, (0.5, 0.999), {"d_lr": 3.0}), ("gan", 1, (0, 0.9), {"d_steps": 1}),
])  # fmt: skip
def test_first_update(name, i, betas, changes, backend, tmp_path):
    """Adam's moves each weight by its rate, D's d_lr times as far; the moments of the gradient have these betas."""
    before = state(trainer := make_trainer(name, i, backend, **changes), tmp_path / "a.npz")
    trainer.step(*FOLDERS[name].batch(trainer.config, np.random.default_rng(0)), lr=1e-3)
    after = state(trainer, tmp_path / "b.npz")
    idle = {"generator.inp.bias", "discriminator.out.bias"}  # before a norm; in a critic's difference
    for key in {name[2:] for name in before if name.startswith("m.")} - idle:
        rate = 1e-3 * changes.get("d_lr", 1) if key.startswith("discriminator") else 1e-3
        assert np.abs(after[key] - before[key]).max() == pytest.approx(rate, rel=0.01), key
        gradient, square = after[f"m.{key}"] / (1 - betas[0]), after[f"v.{key}"] / (1 - betas[1])
        np.testing.assert_allclose(gradient**2, square, rtol=1e-3, atol=1e-12, err_msg=key)


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


SPEECH = functools.cache(load_file("rnn", "data").make_speech)
LEARNED = [  # folder, a short run, what it must reach: of figures at the start and in the end, and sizes of files
    ("rnn", "--task series --steps 100 --window 36 --impl builtin --n-hidden 32 --lr 0.02",
     "0.35 < linear < 0.5 and error < 0.975 * linear"),
    ("rnn", "--task speech --steps 40 --impl builtin --n-hidden 32 --lr 0.02", "accuracy > 0.6"),
    ("rnn", "--task speak --steps 16 --length 64 --n-hidden 32 --lr 0.3",
     "val_loss < 5.3 and periodicity < 0.5 and 0.9 < periodicity_real < 1"),  # at first 5.55, log 256
    ("rnn", "--task gradients --steps 40 --n-hidden 32 --lr 0.02",
     "rnn_0_9 < 0.1 and rnn_2_0 > 30 * rnn_0_9 and 'not clipped' in printed"),
    ("autoencoder", "--task denoise --steps 400 --batch-size 64 --hidden 384 --count 2000 --lr 5e-3",
     "13 < psnr_noisy < 13.3 and 17.5 < psnr_median < 17.9 and psnr > psnr_median + 0.5"),
    ("autoencoder", "--task compress --std 0.15 --steps 400 --batch-size 64 --hidden 384 --count 2000 --lr 5e-3",
     "bytes < 0.9 * min(bytes_jpeg, bytes_webp) and psnr > psnr_jpeg + 0.3 and abs(test_codes - 400 * bytes) <= 4"),
    ("diffusion", "--task toy --sample-steps 20 --batch-size 128 --widths 64 64 --steps 500 --lr 0.02",
     "score_error < 0.25 and max(SDE, ODE, Langevin) < 0.4 and size[0] > 700"),  # untrained 0.5 and 0.7
    ("diffusion", "--count 1000 --steps 110 --widths 64 --fold 7 --lr 0.02 --guidance 4 --sample-steps 10",
     "accuracy > 0.35 and 1 < frechet_real < frechet / 2"),  # of the digits asked for; untrained 0.1
    ("gan", "--hidden 8 32 --size 28 --count 1000 --ema 0.98 --steps 120 --d-steps 1",
     "1 < frechet_real < 99 < frechet < 800 and least_share > .03 and asked > 0.7 and judge > 0.97 and 0.5 < sure < 1"),
    # q comes near p, and D stays at p / (p + q), better than the constant's -log 4
    ("gan", "--task toy --steps 400 --lr 5e-4 --d-steps 2", "bound - 0.02 < value < bound < -1.28 and off < 0.05 and "
     "first_bound > -1.15 and first_off > 0.2 and first_value < first_bound - 0.2 and size == (800, 720)"),
]  # fmt: skip


@pytest.mark.parametrize("name, argv, reached", LEARNED)
def test_learned(name, argv, reached, monkeypatch, tmp_path, capsys):
    """Forecasts beat regression, gradients vanish and explode, JPEG needs more bytes; and the image is not empty."""
    rnn, diffusion = load_file("rnn", "data"), load_file("diffusion", "data")
    monkeypatch.setattr(rnn, "make_speech", SPEECH)
    monkeypatch.setattr(rnn.Speak, "samples", 1500)
    monkeypatch.setattr(diffusion, "fokker_planck", lambda p, time: p)  # it is slow
    monkeypatch.setattr(diffusion, "Judge", functools.partial(diffusion.Judge, n=300))
    task, trainer, rate = make_run(name, *argv.split(), "--out", tmp_path)
    known = {f"first_{key}": x for key, x in task.evaluate(trainer).items()}
    for step in range(task.args.steps):
        trainer.step(*task.batch(step), lr=rate(step))
    known |= task.evaluate(trainer, whole=True)
    figures, files = task.report(trainer)
    known |= figures | {file: (tmp_path / file).stat().st_size for file in files} | {"printed": capsys.readouterr().out}
    if "sample.png" in files:
        with Image.open(tmp_path / "sample.png") as image:
            assert np.asarray(image.convert("L")).std() > 10
            known["size"] = image.size
    if "7.wav" in files:
        with wave.open(str(tmp_path / "7.wav")) as f:
            assert f.getframerate() == 8000 and 1000 < f.getnframes() <= 1500
    assert eval(reached, {re.sub(r"\W", "_", key): x for key, x in known.items()}), known
