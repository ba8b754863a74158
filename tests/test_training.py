"""What holds for all nine trainers: what decays, what evaluation leaves alone, and that every Config field matters."""

from dataclasses import fields, replace

import numpy as np
import pytest
from folders import BACKENDS, CASES, FOLDERS, batches, load, make_trainer

DECAYING = [(name, i) for name, i in CASES if hasattr(load(name, "torch").Config, "weight_decay")]


def state(trainer, path):
    """All that a checkpoint holds: {name: array}."""
    trainer.save(path, 1)
    with np.load(path) as f:
        return {name: f[name] for name in f.files if name != "meta"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, i", DECAYING)
def test_decay(name, i, backend):
    """A step removes the share lr weight_decay of each matrix and filter, and nothing of biases and norms."""
    batch, after = batches(name, i, 1)[0], []
    for decay in (0.0, 0.5):
        trainer = make_trainer(name, i, backend, weight_decay=decay)
        before = trainer_weights(trainer, name, backend)
        trainer.step(*batch, lr=0.01)
        after.append(trainer_weights(trainer, name, backend))
    moved = [key for key in before if (after[0][key] != before[key]).any()]
    assert len(moved) > 3
    for key in moved:
        share = 0.005 if before[key].ndim > 1 else 0.0
        np.testing.assert_allclose(after[0][key] - after[1][key], share * before[key], atol=2e-6, err_msg=key)


def trainer_weights(trainer, name, backend):
    return {key: w.copy() for key, w in load(name, backend).get_weights(trainer.model).items()}


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
    after = state(trainer, tmp_path / "b.npz")
    assert before.keys() == after.keys() and all((before[key] == after[key]).all() for key in before)


EVALUATE = {name: lambda trainer, *batch: trainer.evaluate(*batch) for name in FOLDERS}
EVALUATE["gan"] = lambda trainer, x, z, u: trainer.evaluate(x[0], z[0])
EVALUATE["rnn"] = lambda trainer, x, y, keep=None, *beside: trainer.evaluate(x, y, *beside)


def measured(name, config, path):
    """What a Config leads to: initial weights, two steps, the weights after them, the outputs."""
    trainer = load(name, "torch").Trainer(config, device="cpu")
    seen = list(state(trainer, path).values())
    for step in range(2):
        batch = FOLDERS[name].batch(config, np.random.default_rng(step))
        seen += [float(x) for x in trainer.step(*batch, lr=1e-2).values()]
        seen += [float(x) for x in EVALUATE[name](trainer, *batch).values()]
    return seen + list(state(trainer, path).values()) + [FOLDERS[name].outputs(trainer, *batch)]


def differ(a, b):
    return len(a) != len(b) or any(np.shape(x) != np.shape(y) or not np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("name", FOLDERS)
def test_config(name, tmp_path):
    """Changing any number of Config changes something that is measured in one of the small models."""
    net = load(name, "torch")
    configs = [net.Config(**config) for config in FOLDERS[name].configs]
    idle = {field.name for field in fields(net.Config) if type(field.default) in (int, float)}
    for config in configs:
        usual = measured(name, config, tmp_path / "a.npz") if idle else []
        for field in sorted(idle):
            value = getattr(config, field)
            for other in (2 * value, value + 1, value - 1, 0.5):
                try:
                    changed = measured(name, replace(config, **{field: type(value)(other)}), tmp_path / "b.npz")
                except Exception:
                    continue  # it must match other fields
                if differ(usual, changed):
                    idle.discard(field)
                    break
    assert not idle, f"nothing notices {idle}"
