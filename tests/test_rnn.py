"""rnn/: by hand against built in, state carried over, gradients through time, and the data of its four tasks."""

import math
import wave

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
import torch
from folders import BACKENDS, copy_alone, load, load_file, make_task, result
from mlx.utils import tree_flatten
from PIL import Image

data = load_file("rnn", "data")
CELLS = ["rnn", "lstm", "gru"]


def array(backend, x):
    return torch.from_numpy(np.ascontiguousarray(x)) if backend == "torch" else mx.array(x)


def randomised(backend, **changes):
    """A small network with every parameter random, both biases too."""
    net, config = load("rnn", backend), dict(n_in=5, n_hidden=7, n_layer=2, n_out=4)
    trainer, rng = net.Trainer(net.Config(**{**config, **changes}), device="cpu"), np.random.default_rng(4)
    weights = sorted(net.get_weights(trainer.model).items())
    net.set_weights(trainer.model, {name: rng.normal(0, 0.4, w.shape).astype(np.float32) for name, w in weights})
    return net, trainer


def outputs_and_grads(backend, impl, cell, x, state):
    """Every answer, the last state, and the gradient for each parameter of a sum of both."""
    model = randomised(backend, impl=impl, cell=cell)[1].model
    x, state = array(backend, x), array(backend, state)

    def total():
        out, last = model(x, state)
        return (out**2).sum() + (last**3).sum(), out, last

    if backend == "torch":
        loss, out, last = total()
        loss.backward()
        grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
        return out.detach().numpy(), last.detach().numpy(), grads
    (_, out, last), grads = mlx_nn.value_and_grad(model, total)()
    return np.array(out), np.array(last), {name: np.array(g) for name, g in tree_flatten(grads)}


@pytest.mark.parametrize("cell", CELLS)
def test_by_hand_is_built_in(cell):
    """The same parameters, answers, states and gradients, by hand and built in, in both frameworks."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 9, 5)).astype(np.float32)
    state = rng.normal(size=(2, 2 if cell == "lstm" else 1, 3, 7)).astype(np.float32)
    first = outputs_and_grads("torch", "by-hand", cell, x, state)
    for backend, impl in (("torch", "builtin"), ("mlx", "by-hand"), ("mlx", "builtin")):
        out, last, grads = outputs_and_grads(backend, impl, cell, x, state)
        np.testing.assert_allclose(out, first[0], atol=1e-5)
        np.testing.assert_allclose(last, first[1], atol=1e-5)
        assert grads.keys() == first[2].keys() and out.shape == (3, 9, 4)
        for name, g in grads.items():
            assert np.abs(first[2][name]).max() > 1e-3, name
            np.testing.assert_allclose(g, first[2][name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("cell", CELLS)
def test_against_a_stack(cell):
    """Two layers here are the two layers of torch's own stacked network."""
    net, trainer = randomised("torch", cell=cell)
    own = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](5, 7, 2, batch_first=True)
    weights = {f"{name[13:-1]}{name[7]}": p for name, p in trainer.model.named_parameters() if "layers" in name}
    own.load_state_dict(weights)
    x = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(trainer.model(x)[0], trainer.model.head(own(x)[0]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks(backend, cell):
    """A sequence in parts, with the state handed on, is the whole; and what Trainer.step carries is that state."""
    net, trainer = randomised(backend, cell=cell)
    x = np.random.default_rng(1).normal(size=(3, 12, 5)).astype(np.float32)
    whole, parts, state = np.array(trainer.model(array(backend, x))[0].tolist()), [], None
    for at, end in ((0, 5), (5, 6), (6, 12)):
        out, state = trainer.model(array(backend, x[:, at:end]), state)
        parts.append(out.tolist())
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)
    y, on = np.zeros((3, 6), np.int64), np.ones(3, np.float32)
    trainer.step(x[:, :6], y, on, lr=0.0)  # the first step begins at zero, whatever keep says
    trainer.step(x[:, 6:], y, on, lr=0.0)
    np.testing.assert_allclose(np.array(trainer.state.tolist()), np.array(state.tolist()), atol=1e-5)
    trainer.step(x[:, :6], y, np.array([1, 0, 0], np.float32), lr=0.0)
    fresh = np.array(trainer.model(array(backend, x[:, :6]))[1].tolist())
    kept = np.abs(np.array(trainer.state.tolist()) - fresh).max((0, 1, 3))
    assert kept[0] > 1e-3 and (kept[1:] < 1e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluate_in_parts(backend):
    """A text longer than one part is scored as if read at once."""
    net, trainer = randomised(backend, vocab_size=6, n_in=0, n_embd=5, n_out=6)
    ids = np.random.default_rng(2).integers(0, 6, (2, 301))
    out = trainer.model(array(backend, ids[:, :-1]))[0]
    expected = net.loss_fn(out, array(backend, ids[:, 1:]), "cross_entropy").item()
    assert float(trainer.evaluate(ids[:, :-1], ids[:, 1:])["val_loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_state_gradients(cell):
    """|dh_T/ds_t| against differences of h_T when the state of time t is moved; the twins agree."""
    x = np.random.default_rng(3).normal(size=(6, 5)).astype(np.float32)
    net, trainer = randomised("torch", cell=cell, n_layer=1)
    norms, model = trainer.state_gradients(x), trainer.model.double()
    a, at, total = model.layers[0].rnn.from_input(torch.from_numpy(x).double()), 2, 0.0
    for s in range(2 if cell == "lstm" else 1):
        for j in range(7):
            ends = []
            for move in (1e-5, -1e-5):
                state = tuple(model.zero_state(1)[0].double())
                for t, a_t in enumerate(a):
                    state = model.layers[0].rnn(a_t, state)
                    if t == at:
                        state[s][0, j] += move
                ends.append(state[0].detach())
            total += float((((ends[0] - ends[1]) / 2e-5) ** 2).sum())
    assert norms[at] == pytest.approx(math.sqrt(total / 7), rel=1e-3) and norms[-1] == pytest.approx(1)
    assert norms.shape == (6,) and norms.max() / norms.min() > 1.5
    np.testing.assert_allclose(randomised("mlx", cell=cell, n_layer=1)[1].state_gradients(x), norms, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exploding_and_clipping(backend):
    """Radius 2 explodes and 0.9 vanishes; a clipped step is as long as the rate, an unclipped one as the gradient."""
    net, x = load("rnn", backend), np.random.default_rng(4).uniform(-0.1, 0.1, (60, 1)).astype(np.float32)
    config = dict(cell="rnn", n_in=1, n_hidden=32, n_out=1, read="last", loss="mse", optimizer="sgd")
    first = {r: net.Trainer(net.Config(**config, radius=r), device="cpu").state_gradients(x)[0] for r in (0.9, 2.0)}
    assert first[0.9] < 0.05 and first[2.0] > 50
    x, y = np.random.default_rng(5).normal(size=(4, 30, 1)).astype(np.float32), np.full((4, 1), 30, np.float32)
    for clip in (0.5, math.inf):
        trainer = net.Trainer(net.Config(**config, radius=2.0, clip=clip), device="cpu")
        before = net.get_weights(trainer.model)
        norm = float(trainer.step(x, y, lr=0.01)["grad_norm"])
        after = net.get_weights(trainer.model)
        moved = math.sqrt(sum(((after[name] - before[name]) ** 2).sum() for name in before))
        assert norm > 5 and moved == pytest.approx(0.01 * min(norm, clip), rel=1e-2)


def test_starting_weights():
    """Each gate's recurrent matrix has the asked spectral radius, or is orthogonal; forget and update begin open."""
    for cell, gates in (("rnn", 1), ("lstm", 4), ("gru", 3)):
        net = load("rnn", "mlx")
        for radius in (0.0, 1.5):
            model = net.Trainer(net.Config(cell=cell, n_in=3, n_hidden=20, radius=radius), device="cpu").model
            weights = net.get_weights(model)
            for gate in np.split(weights["layers.0.rnn.weight_hh_l0"], gates):
                assert np.abs(np.linalg.eigvals(gate)).max() == pytest.approx(radius or 1, rel=1e-4)
            assert radius or np.allclose(gate @ gate.T, np.eye(20), atol=1e-5)
        assert weights["layers.0.rnn.bias_ih_l0"].sum() == (20 if gates > 1 else 0)


def test_writes_the_same():
    """The same uniform numbers pick the same tokens in both frameworks; greedy is the argmax, step by step."""
    beside = np.random.default_rng(6).normal(0, 4, (4, 32, 3)).astype(np.float32)
    prompt = np.array([[1, 2, 3]] * 4)
    for temperature in (0, 0.8):
        tokens = []
        for backend in BACKENDS:
            trainer = randomised(backend, cell="rnn", vocab_size=9, n_embd=5, n_in=3, n_out=9)[1]
            tokens.append(np.stack(list(trainer.generate(prompt, 30, temperature, seed=5, beside=beside)), 1))
        assert (tokens[0] == tokens[1]).all() and len(np.unique(tokens[0])) > 2 and tokens[0].shape == (4, 30)
        if temperature == 0:
            ids = np.concatenate([prompt, tokens[0]], 1)[:, :-1]
            assert (trainer.predict(ids, beside).argmax(-1)[:, 2:] == tokens[0]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_are_checked(backend):
    trainer = randomised(backend, vocab_size=6, n_in=0, n_embd=5, n_out=6)[1]
    good, bad = np.zeros((1, 3), np.int64), np.full((1, 3), 6)
    for x, y in ((bad, good), (good, bad), (good - 1, good)):
        with pytest.raises(ValueError, match="outside 0"):
            trainer.step(x, y, lr=0.1)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_streams():
    """A row of a batch goes on where the same row of the last one ended, and says so."""
    text = make_task("rnn", "--length", 16, "--batch-size", 4)
    (x, y, keep), (x2, _, keep2) = text.batch(0), text.batch(1)
    assert (y[:, :-1] == x[:, 1:]).all() and (y[:, -1] == x2[:, 0]).all() and not keep.any() and keep2.all()
    again = text.batch(len(text.train) // 4 // 16 + 1)
    assert (again[0] != x2).any()


def test_table(tmp_path, capsys):
    """Columns that are no numbers are named and left out; gaps are filled forward, a leading one backward."""
    rows = "".join(f"2020-{i},{'' if i % 10 == 3 else i},{'NA' if i < 2 else i * i},sun,5\n" for i in range(40))
    (tmp_path / "a.csv").write_text("day,a,b,sky,five\n" + rows)
    names, table = data.read_table(tmp_path / "a.csv")
    assert names == ["a", "b"] and table.shape == (40, 2)
    assert table[13, 0] == 12 and table[14, 0] == 14 and table[0, 1] == table[2, 1] == 4
    said = capsys.readouterr().out
    assert "left out: day, sky, five" in said and "filled forward: 6" in said


def test_table_is_judged_by_its_past(tmp_path, capsys):
    """Semicolons and no header; what only the held-out part would show is left out, and fills no gap."""
    rows = [f"{i % 7};{5 if i < 32 else i};{'' if i < 32 else i};{'' if i < 3 else i}" for i in range(40)]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    names, table = data.read_table(tmp_path / "a.csv")
    assert names == ["v0", "v3"] and table[0, 1] == 3 and "no header" in capsys.readouterr().out
    for text, said in (("", "0 lines"), ("a,b\n1,2\n", "1 lines"), ("a\n" + "x\n" * 9, "no column of numbers")):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(SystemExit):
            data.read_table(tmp_path / "a.csv")
        assert said in capsys.readouterr().err


def test_periodic(tmp_path):
    """Where the season recurs exactly, no forecast is better: there is no skill to speak of."""
    (tmp_path / "a.csv").write_text("a\n" + "".join(f"{i % 6}\n" for i in range(300)))
    args = ["--task", "series", "--data", tmp_path / "a.csv", "--window", 12, "--horizon", 6, "--out", tmp_path]
    series = make_task("rnn", *args)

    class Zero:
        def predict(self, x):
            return np.zeros((len(x), 6), np.float32)

    figures = series.report(Zero())[0]
    assert math.isnan(figures["skill"]) and figures["linear"] < 0.05 < 0.5 < figures["error"]


def test_series():
    """No window looks past its time, none of the training part reaches into what is held out; the season is found."""
    series = make_task("rnn", "--task", "series", "--window", 30, "--batch-size", 500)
    assert series.season == 24 and series.cut == 14016 and series.starts.min() == series.cut
    series.table = np.arange(len(series.table), dtype=np.float32)[:, None].repeat(5, 1)
    x, y = series.batch(0)
    assert (x[:, -1, 0] + 1 == y[:, 0]).all() and x.shape == (500, 30, 5) and y.shape == (500, 120)
    assert y.max() < series.cut and x.min() >= 0 and y.max() > series.cut - 200
    x, y = series.windows(series.starts)
    assert y.min() == series.cut and y.max() == len(series.table) - 1

    class Perfect:  # forecasts what will come: both baselines are as wrong as they should be
        def predict(self, x):
            return (x[:, -1:, 0] + 1 + np.repeat(np.arange(24), 5)).astype(np.float32)

    answers, truth = series.forecasts(Perfect())
    assert (answers["network"] == truth).all()
    assert (truth - answers["persistence"] == np.arange(1, 25)[:, None]).all()
    assert (truth - answers["seasonal"] == 24).all()


def test_mu_law():
    x = np.linspace(-1, 1, 4001)
    code = data.mu_law(x)
    assert code.min() == 0 and code.max() == 255 and (np.diff(code) >= 0).all()
    assert (data.mu_law(data.from_mu_law(np.arange(256))) == np.arange(256)).all()
    error = np.abs(data.from_mu_law(code) - x)
    assert error.max() < 0.025 and error[np.abs(x) < 0.01].max() < 5e-4  # quiet samples have finer steps


def test_log_mel():
    """One frame by the sum of the discrete Fourier transform, and the triangles one by one."""
    x = np.random.default_rng(0).normal(size=500)
    mels, n = data.log_mel(x, 24), np.arange(160)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / 160)
    k = np.arange(81)
    power = np.abs(np.exp(-2j * np.pi * np.outer(k, n) / 160) @ (x[128:288] * window)) ** 2
    edges = np.linspace(*(2595 * np.log10(1 + np.array([60, 4000]) / 700)), 26)
    edges = 700 * (10 ** (edges / 2595) - 1)
    for m in (0, 7, 23):
        triangle = np.interp(k * 50, edges[m : m + 3], [0, 1, 0])
        assert mels[1, m] == pytest.approx(np.log(triangle @ power + 1e-5), abs=1e-6)
    assert mels.shape == (3, 24)


def test_wav(tmp_path):
    """What is written is read again; 8 bits, two channels and other rates too."""
    x = 0.7 * np.sin(2 * np.pi * 440 * np.arange(4000) / 8000)
    data.write_wav(tmp_path / "a.wav", x)
    np.testing.assert_allclose(data.read_wav(tmp_path / "a.wav"), x[:-1], atol=1e-4)
    with wave.open(str(tmp_path / "b.wav"), "wb") as f:
        f.setparams((2, 1, 16000, 0, "NONE", ""))
        loud = np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)
        f.writeframes(np.stack([loud * 100 + 128, loud * 40 + 128], 1).round().astype(np.uint8).tobytes())
    np.testing.assert_allclose(data.read_wav(tmp_path / "b.wav"), x[:4000], atol=0.2)
    assert len(data.read_wav(tmp_path / "b.wav")) == 4000


def test_wav_without_aliases(tmp_path, capsys):
    """6 kHz cannot be had at a rate of 8,000: it is gone, not a tone of 2 kHz. A rate that cannot be is refused."""
    t = np.arange(16000) / 16000
    for rate, refused in ((16000, False), (1, True), (0, True)):
        with wave.open(str(tmp_path / "a.wav"), "wb") as f:
            f.setparams((1, 2, rate or 1, 0, "NONE", ""))
            tones = 10000 * (np.sin(2 * np.pi * 6000 * t) + np.sin(2 * np.pi * 440 * t))
            f.writeframes(tones.astype("<i2").tobytes())
        if not rate:
            raw = (tmp_path / "a.wav").read_bytes()
            (tmp_path / "a.wav").write_bytes(raw[:24] + bytes(4) + raw[28:])
        if refused:
            with pytest.raises(SystemExit):
                data.read_wav(tmp_path / "a.wav")
            assert f"its rate is {rate} Hz" in capsys.readouterr().err
        else:
            level = np.abs(np.fft.rfft(data.read_wav(tmp_path / "a.wav")))
            assert level[:1000].max() > 500 and level[1500:].max() < 50


def test_speakers(tmp_path):
    """All recordings of one speaker are held out, and none of another; other files are passed over."""
    for i, (label, speaker) in enumerate([(a, b) for a in ("yes", "no") for b in ("ann", "bob", "cy")] * 2):
        data.write_wav(tmp_path / f"{label}_{speaker}_{i}.wav", np.random.default_rng(i).normal(0, 0.1, 3000))
    (tmp_path / "readme_of_this.txt").write_text("no sound")
    speech = make_task("rnn", "--task", "speech", "--data", tmp_path, "--held-out", "bob", "--batch-size", 64)
    _, _, speakers = data.read_speech(tmp_path)
    assert {speakers[i] for i in speech.val} == {"bob"} and {speakers[i] for i in speech.train} == {"ann", "cy"}
    assert speech.names == ["no", "yes"] and len(speech.val) == 4
    x, y = speech.batch(0)
    assert x.shape == (64, 70, 36) and not x[:, 0].any() and x[:, -1].any() and set(y) == {0, 1}
    for i in speech.val:
        speech.mels[i][:] = np.nan
    assert np.isfinite(speech.batch(1)[0]).all()  # no word to train on is varied with the held-out speaker's


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_tasks(tmp_path):
    """Short runs: the series beat persistence and season, speech is recognised, said, and the gradients are shown."""
    folder = copy_alone("rnn", tmp_path / "rnn")
    series = ["--task", "series", "--steps", "80", "--window", "36", "--n-hidden", "32", "--lr", "0.02"]
    ended = result(folder, "torch", *series)
    assert ended["error"] < 0.8 and 0.5 < ended["linear"] < 0.7 and "persistence" in ended["printed"]
    speech = ["--task", "speech", "--steps", "40", "--lr", "0.01", "--impl", "builtin"]
    assert result(folder, "torch", *speech)["accuracy"] > 0.6
    ended = result(folder, "mlx", "--task", "speak", "--steps", "4", "--n-hidden", "16")
    assert str(ended["out"] / "7.wav") in ended["files"]
    with wave.open(str(ended["out"] / "7.wav")) as f:
        assert f.getframerate() == 8000 and 1000 < f.getnframes() <= 4096
    ended = result(folder, "torch", "--task", "gradients", "--steps", "60", "--n-hidden", "32")
    assert ended["rnn_0.9"] < 0.1 and ended["rnn_2.0"] > 30 * ended["rnn_0.9"] and "not clipped" in ended["printed"]
    with Image.open(ended["out"] / "sample.png") as image:
        assert np.asarray(image.convert("L")).std() > 8
