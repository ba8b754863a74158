"""rnn/: by hand against built in, state carried over, gradients through time, and the data of its tasks."""

import functools
import itertools
import math
import wave
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from folders import BACKENDS, load, load_file, make_task
from test_parity import array, randomise, refusal
from torch.autograd.functional import jacobian

data = load_file("rnn", "data")
CELLS = ["rnn", "lstm", "gru"]
EACH = pytest.mark.parametrize("backend", BACKENDS)


def randomised(backend, **changes):
    """A small network with every parameter random, both biases too."""
    net, config = load("rnn", backend), dict(n_in=5, n_hidden=7, n_layer=2, n_out=4)
    trainer = net.Trainer(net.Config(**config | changes), device="cpu")
    randomise("rnn", backend, trainer, 0.4)
    return trainer


@pytest.mark.parametrize("cell", CELLS)
def test_against_a_stack(cell):
    """Answers and states of two layers, by hand and built in, are those of torch's own stacked network."""
    sizes = (3, 9, 5), (2, 2 if cell == "lstm" else 1, 3, 7)
    x, state = (np.random.default_rng(0).standard_normal(size, np.float32) for size in sizes)
    model = randomised("torch", cell=cell).model
    own = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](5, 7, 2, batch_first=True)
    own.load_state_dict({f"{name[13:-1]}{name[7]}": p for name, p in model.named_parameters() if "layers" in name})
    h, c = torch.from_numpy(state[:, 0]), torch.from_numpy(state[:, -1])
    every_h, last = own(torch.from_numpy(x), (h, c) if cell == "lstm" else h)
    last = torch.stack(last, 1) if cell == "lstm" else last[:, None]
    for backend, impl in itertools.product(BACKENDS, ("by-hand", "builtin")):
        out, end = randomised(backend, impl=impl, cell=cell).model(array(backend, x), array(backend, state))
        np.testing.assert_allclose(out.tolist(), model.head(every_h).tolist(), atol=1e-5)
        np.testing.assert_allclose(end.tolist(), last.tolist(), atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
@EACH
def test_carried_state(backend, cell):
    """What Trainer.step carries is the state after the sequence so far, of the rows that continue."""
    trainer, x = randomised(backend, cell=cell), np.random.default_rng(1).normal(size=(3, 12, 5)).astype(np.float32)
    whole, fresh = (np.array(trainer.model(array(backend, part))[1].tolist()) for part in (x, x[:, :6]))
    y, on = np.zeros((3, 6), np.int64), np.ones(3, np.float32)
    for at, end in ((0, 5), (5, 6), (6, 12)):
        trainer.step(x[:, at:end], y[:, : end - at], on, lr=0.0)  # the first begins at zero, whatever keep says
    np.testing.assert_allclose(np.array(trainer.state.tolist()), whole, atol=1e-5)
    trainer.step(x[:, :6], y, np.array([1, 0, 0], np.float32), lr=0.0)
    kept = np.abs(np.array(trainer.state.tolist()) - fresh).max((0, 1, 3))
    assert kept[0] > 1e-3 and (kept[1:] < 1e-5).all()
    trainer.step(x[:2, :6], y[:2], on[:2], lr=0.0)  # a batch of another size starts from 0
    np.testing.assert_allclose(np.array(trainer.state.tolist()), fresh[:, :, :2], atol=1e-5)
    trainer.step(x[:, :6], y, lr=0.0)
    assert trainer.state is None


@pytest.mark.parametrize("cell", CELLS)
def test_state_gradients(cell):
    """|dh_T/ds_t| is the norm of the Jacobian from the state of each time to the last h; the twins agree."""
    x = np.random.default_rng(3).normal(size=(6, 5)).astype(np.float32)
    model, expected = randomised("torch", cell=cell, n_layer=1).model, []
    rnn, state = model.layers[0].rnn, tuple(model.zero_state(1)[0])
    a = rnn.from_input(torch.from_numpy(x))
    for t in range(6):
        state = rnn(a[t], state)
        parts = jacobian(lambda *s: functools.reduce(lambda s, a_t: rnn(a_t, s), a[t + 1 :], s)[0], state)
        expected.append(math.sqrt(sum((part**2).sum() for part in parts) / 7))
    assert expected[-1] == pytest.approx(1) and max(expected) / min(expected) > 1.5
    for backend in BACKENDS:
        norms = randomised(backend, cell=cell, n_layer=1).state_gradients(x)
        np.testing.assert_allclose(norms, expected, rtol=1e-4)


def test_starting_weights():
    """Orthogonal, or of the asked radius, gate by gate; forget and update open; embeddings normal, the rest uniform."""
    net = load("rnn", "mlx")
    for (cell, gates), radius in itertools.product((("rnn", 1), ("lstm", 4), ("gru", 3)), (0.0, 1.5)):
        config = net.Config(cell=cell, vocab_size=300, n_in=3, n_hidden=20, n_out=300, radius=radius)
        weights = net.get_weights(net.Trainer(config).model)
        for gate in np.split(weights["layers.0.rnn.weight_hh_l0"], gates):
            assert np.abs(np.linalg.eigvals(gate)).max() == pytest.approx(radius or 1, rel=1e-4)
            assert radius or np.allclose(gate @ gate.T, np.eye(20), atol=1e-5)
            assert np.unique(gate).size == 400  # random, and not a multiple of one
        opened = np.arange(20 * gates) // 20 == (1 if gates > 1 else -1)
        assert (weights["layers.0.rnn.bias_ih_l0"] == opened).all()
        assert not weights["layers.0.rnn.bias_hh_l0"].any() and not weights["head.bias"].any()
        drawn = weights["embed.weight"]
        assert drawn.std() == pytest.approx(1, rel=0.02) and abs(drawn.mean()) < 0.02 and np.abs(drawn).max() > 3
        for name, n in (("head.weight", 20), ("layers.0.rnn.weight_ih_l0", 67)):
            assert weights[name].std() == pytest.approx((3 * n) ** -0.5, rel=0.05)
            assert np.abs(weights[name]).max() == pytest.approx(n**-0.5, rel=0.05)


def test_writes():
    """Greedy is the argmax, step by step; else a token is where u falls in the probabilities at the temperature."""
    beside = np.random.default_rng(6).normal(0, 4, (4, 32, 3)).astype(np.float32)
    prompt, u = np.array([[1, 2, 3]] * 4), np.random.default_rng((5, 2)).random((30, 4), np.float32)
    for temperature, backend in itertools.product((0, 0.5, 2.0), BACKENDS):
        trainer = randomised(backend, cell="rnn", vocab_size=9, n_embd=5, n_in=3, n_out=9)
        tokens = np.stack(list(trainer.generate(prompt, 30, temperature, seed=5, beside=beside)), 1)
        logits = trainer.predict(np.concatenate([prompt, tokens], 1)[:, :-1], beside)[:, 2:]  # (4, 30, 9)
        cdf = np.exp(logits / (temperature or 1)).cumsum(-1)
        drawn = (cdf / cdf[..., -1:] < u.T[..., None]).sum(-1)
        assert (tokens == (drawn if temperature else logits.argmax(-1))).all()
        assert tokens.shape == (4, 30) and len(np.unique(tokens)) > 2


@EACH
def test_evaluate_in_parts(backend):
    """A text longer than one part is scored as if read at once; one answer per row has an accuracy, too."""
    trainer = randomised(backend, vocab_size=6, n_in=0, n_embd=5, n_out=6)
    ids = np.random.default_rng(2).integers(0, 6, (2, 301))
    out = trainer.predict(ids[:, :-1])
    nats = np.log(np.exp(out).sum(-1)) - np.take_along_axis(out, ids[:, 1:, None], -1)[..., 0]
    assert float(trainer.evaluate(ids[:, :-1], ids[:, 1:])["val_loss"]) == pytest.approx(nats.mean(), rel=1e-5)
    x, trainer = np.random.default_rng(2).normal(size=(9, 6, 5)).astype(np.float32), randomised(backend, read="last")
    figures, y = trainer.evaluate(x, np.arange(9) % 4), trainer.predict(x).argmax(1)
    assert float(figures["accuracy"]) == pytest.approx((y == np.arange(9) % 4).mean()) and 0 < figures["accuracy"] < 1


def test_streams():
    """A row of a batch continues where the same row of the last one ended, and says so."""
    text = make_task("rnn", "--length", 16, "--batch-size", 4)
    (x, y, keep), (x2, _, keep2) = text.batch(0), text.batch(1)
    assert (y[:, :-1] == x[:, 1:]).all() and (y[:, -1] == x2[:, 0]).all() and not keep.any() and keep2.all()
    assert (text.batch(len(text.train) // 4 // 16 + 1)[0] != x2).any()


def test_table(tmp_path, capsys):
    """What is no number, or shows only in the held-out part, is left out; gaps take the value before, not one after."""
    cells = [(i, "" if i % 10 == 3 else i, max(i, 32), i if i > 31 else "", 3 * i if i > 2 else "") for i in range(40)]
    rows = [";".join(map(str, row)) + f";on {row[0]};sun" for row in cells]
    (tmp_path / "a.csv").write_text("\n".join(["a;b;c;d;e;day;sky", *rows]))
    names, table = data.read_table(tmp_path / "a.csv")
    assert names == ["a", "b", "e"] and table.shape == (40, 3)
    assert table[13, 1] == 12 and table[14, 1] == 14 and table[0, 2] == table[3, 2] == 9
    said = capsys.readouterr().out
    assert "left out: c, d, day, sky" in said and "filled forward: 7" in said
    (tmp_path / "a.csv").write_text("\n".join(f"{i % 7},{i}" for i in range(9)))
    assert data.read_table(tmp_path / "a.csv")[0] == ["v0", "v1"] and "no header" in capsys.readouterr().out


def test_calendar(tmp_path):
    """A date is its place in the year, the week and the day, an hour its place in the day: seen, and not forecast."""
    hours = [(1 + i // 24, i % 24) for i in range(24 * 30)]
    rows = "".join(f"2024/01/{d:02}T{h:02}:00Z,{h},{d * h % 7},{40 + h}\n" for d, h in hours)
    (tmp_path / "a.csv").write_text("when,Hour,load,day\n" + rows)  # the last is no day of a month
    series = make_task("rnn", "--task", "series", "--data", tmp_path / "a.csv", "--window", 12)
    assert series.names == ["load", "day"] and series.config == dict(n_in=12, n_out=48, read="last", loss="mse")
    t, waves = np.arange(720) / 24 + 19723, series.table[:, 2:]  # days since 1970
    for i, angle in enumerate((t / 365.2425, t / 7, t, t)):
        expected = np.exp(2j * np.pi * angle)
        np.testing.assert_allclose(waves[:, 2 * i] * 1j + waves[:, 2 * i + 1], expected, atol=1e-6)
    assert (series.windows(np.array([300]))[0][0, :, 4:] == waves[288:300]).all()


def test_series(tmp_path):
    """No window looks past its time, none of the training part reaches into what is held out; the season is found.

    If the season repeats exactly, no forecast is better: there is no skill.
    """
    series = make_task("rnn", "--task", "series", "--window", 30, "--batch-size", 500)
    assert series.season == 24 and series.cut == 14016 and series.starts.min() == series.cut
    x, y = series.windows(series.starts[:9])
    np.testing.assert_allclose(y + series.linear(series.starts[:9], 1), series.truth(series.starts[:9]), atol=1e-6)
    past = series.batch(0)[1]
    assert np.square(past).mean() < 0.7 and abs(past.mean()) < 0.05  # of variances: what regression leaves
    series.table = np.arange(len(series.table), dtype=np.float32)[:, None].repeat(5, 1)
    series.weights[1][:], series.noise = 0, 0
    x, y = series.batch(0)
    assert (x[:, -1, 5] + 1 == y[:, 0]).all() and x.shape == (500, 30, 10) and y.shape == (500, 120)
    assert (x[..., :5] == np.arange(-29, 1)[:, None]).all()
    assert y.max() < series.cut and x[..., 5:].min() >= 0 and y.max() > series.cut - 200
    x, y = series.windows(series.starts)
    assert y.min() == series.cut and y.max() == len(series.table) - 1
    perfect = SimpleNamespace(predict=lambda x: (x[:, -1:, 5] + 1 + np.repeat(np.arange(24), 5)).astype(np.float32))
    answers, truth = series.forecasts(perfect)  # both baselines are as wrong as they should be
    assert (answers["network"] == truth).all()
    np.testing.assert_allclose(answers["combined"], (truth + answers["linear"]) / 2, rtol=1e-6)
    assert (truth - answers["persistence"] == np.arange(1, 25)[:, None]).all()
    assert (truth - answers["seasonal"] == 24).all()
    (tmp_path / "a.csv").write_text("a\n" + "".join(f"{i % 6}\n" for i in range(300)))
    argv = "--task", "series", "--data", tmp_path / "a.csv", "--window", 12, "--horizon", 6, "--out", tmp_path
    series = make_task("rnn", *argv)
    figures = series.report(SimpleNamespace(predict=lambda x: np.ones((len(x), 6), np.float32)))[0]
    assert series.season == 6 and math.isnan(figures["skill"]) and figures["linear"] < 0.2 < 0.4 < figures["error"]


def test_log_mel():
    """One frame by the sum of the discrete Fourier transform, and the triangles one by one."""
    x, n, k = np.random.default_rng(0).normal(size=500), np.arange(160), np.arange(81)
    mels, window = data.log_mel(x, 24), 0.5 - 0.5 * np.cos(2 * np.pi * n / 160)
    power = np.abs(np.exp(-2j * np.pi * np.outer(k, n) / 160) @ (x[128:288] * window)) ** 2
    edges = 700 * (10 ** (np.linspace(*(2595 * np.log10(1 + np.array([60, 4000]) / 700)), 26) / 2595) - 1)
    for m in (0, 7, 23):
        triangle = np.interp(k * 50, edges[m : m + 3], [0, 1, 0])
        assert mels[1, m] == pytest.approx(np.log(triangle @ power + 1e-5), abs=1e-6)
    assert mels.shape == (3, 24)


def test_wav(tmp_path, capsys):
    """Codes are finer for quiet samples. What is written is read again; 16 kHz too, without 6 kHz coming back as 2."""
    x = np.linspace(-1, 1, 4001)
    code, codes, sharp = data.mu_law(x), np.arange(256), data.emphasise(x)
    assert code[0] == 0 and code[-1] == 255 and (np.diff(code) >= 0).all() and abs(sharp[-1] - 0.15) < 1e-3
    assert (data.mu_law(data.from_mu_law(codes)) == codes).all() and np.allclose(data.restore(sharp), x)
    error = np.abs(data.from_mu_law(code) - x)
    assert error.max() < 0.025 and error[np.abs(x) < 0.01].max() < 5e-4
    t, path = np.arange(16000) / 16000, tmp_path / "a.wav"
    tone, high = 0.4 * np.sin(2 * np.pi * 440 * t), 0.4 * np.sin(2 * np.pi * 6000 * t)
    data.write_wav(path, tone[::2])
    np.testing.assert_allclose(data.read_wav(path), tone[:-2:2], atol=1e-4)
    with wave.open(str(path), "wb") as f:
        f.setparams((2, 1, 16000, 0, "NONE", ""))
        both = np.stack([tone * 1.4 + high, tone * 0.6 + high], 1)
        f.writeframes((both * 127 + 128).round().astype(np.uint8).tobytes())
    np.testing.assert_allclose(data.read_wav(path)[200:-200], tone[400:-400:2], atol=0.02)
    raw = path.read_bytes()
    for rate in (0, 1):
        path.write_bytes(raw[:24] + bytes([rate, 0, 0, 0]) + raw[28:])
        assert f"its rate is {rate} Hz" in refusal(capsys, data.read_wav, path)


def test_speakers(tmp_path, monkeypatch):
    """All recordings of one speaker are held out, none of another; synthetic voices join digits; inputs have noise."""
    for i, (label, speaker) in enumerate([(a, b) for a in "40" for b in ("ann", "bob", "cy")] * 2):
        data.write_wav(tmp_path / f"{label}_{speaker}_{i}.wav", np.random.default_rng(i).normal(0, 0.1, 3000))
    (tmp_path / "readme_of_this.txt").write_text("no sound")
    monkeypatch.setattr(data, "make_speech", lambda seed, voices, takes: ([np.ones(3000)] * 3, [*"014"], ["bob"] * 3))
    (*_, speakers), more = data.read_speech(tmp_path), ["--data", tmp_path, "--held-out", "bob", "--batch-size", 64]
    speech, speak = (make_task("rnn", "--task", task, *more) for task in ("speech", "speak"))
    assert {speakers[i] for i in speech.val} == {"bob"} and {speakers[i] for i in speech.train[:8]} == {"ann", "cy"}
    assert speech.names == ["0", "4"] and len(speech.val) == 4 and len(speech.train) == 8 + 2
    (x, y), (noised, codes, *_) = speech.batch(0), speak.batch(0)
    assert x.shape == (64, 48, 36) and not x[:, 0].any() and x.any((1, 2)).all() and set(y) == {0, 1}
    assert 5 < (noised[:, 1:] - codes[:, :-1]).std() < 11 and codes[3].tobytes() in speak.codes.tobytes()
    assert np.corrcoef(codes[:, 1:].ravel(), codes[:, :-1].ravel())[0, 1] < -0.3  # white noise, emphasised
    speech.mels = [mel * np.nan if i in speech.val else mel for i, mel in enumerate(speech.mels)]
    assert np.isfinite(speech.batch(1)[0]).all()  # no word to train on is varied with the held-out speaker's
