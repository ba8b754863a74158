"""cnn/: convolution and pooling by hand against the frameworks' own, style, folders of images, exported files."""

import json
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import BACKENDS, batches, copy_alone, load, load_file, make_args, make_task, make_trainer, result, run_here
from PIL import Image
from test_parity import loss_and_grads

SHAPES = [(7, 9, 3, 1, 1), (8, 5, 5, 1, 2), (9, 7, 3, 2, 1), (11, 6, 4, 3, 2), (6, 6, 1, 2, 0), (10, 7, 3, 2, 0)]


def array(backend, x):
    return torch.from_numpy(x) if backend == "torch" else mx.array(x)


def library(backend, function, arrays, dy):
    """What the framework's own function gives, and the gradients of the arrays for a gradient dy of the output."""
    if backend == "mlx":
        (y,), grads = mx.vjp(function, arrays, [dy])
        return [y, *grads]
    leaves = [a.clone().requires_grad_() for a in arrays]
    channels_first = leaves[0].permute(0, 3, 1, 2).contiguous()  # else oneDNN 1x1, stride 2, corrupts the heap
    y = function(channels_first, *leaves[1:]).permute(0, 2, 3, 1)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


# ---- convolution and pooling by hand ---------------------------------------------------------------------------------


@pytest.mark.parametrize("H, W, k, stride, padding", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend, H, W, k, stride, padding):
    """Convolution, pooling and their gradients are those of the library."""
    rng, net, C, N = np.random.default_rng(1), load("cnn", backend), 3, 4
    for pooled, p in ((False, padding), (True, min(padding, k // 2))):
        out = [(n + 2 * p - k) // stride + 1 for n in (H, W)]
        shapes = (2, H, W, C), (N, C, k, k), (N,), (2, *out, C if pooled else N)
        x, w, b, dy = (array(backend, rng.standard_normal(shape, np.float32)) for shape in shapes)
        if pooled:
            ours = [net.max_pool2d(x, k, stride, p), net.max_pool2d_backward(dy, x, k, stride, p)]
            pool = mlx_nn.MaxPool2d(k, stride, p) if backend == "mlx" else lambda x: F.max_pool2d(x, k, stride, p)
            theirs = library(backend, pool, [x], dy)
        else:
            ours = [net.conv2d(x, w, b, stride, p), *net.conv2d_backward(dy, x, w, stride, p)]
            convolve = {"torch": lambda x, w, b: F.conv2d(x, w, b, stride, p),
                        "mlx": lambda x, w, b: mx.conv2d(x, w.transpose(0, 2, 3, 1), stride, p) + b}  # fmt: skip
            theirs = library(backend, convolve[backend], [x, w, b], dy)
        for a, own in zip(ours, theirs):
            assert np.abs(np.asarray(own)).max() > 0.1
            np.testing.assert_allclose(np.asarray(a), np.asarray(own), rtol=1e-4, atol=1e-4)


# ---- networks and their training -------------------------------------------------------------------------------------


def randomised(i, backend, **changes):
    """A small network whose norms and biases are random, too."""
    trainer, net, rng = make_trainer("cnn", i, backend, **changes), load("cnn", backend), np.random.default_rng(4)
    weights = net.get_weights(trainer.model)
    net.set_weights(trainer.model, {name: w + rng.normal(0, 0.1, w.shape).astype("f") for name, w in weights.items()})
    return trainer, net.get_weights(trainer.model)


def reference(x, weights):
    """The logits once more, for images (B, H, W, C), from torch's functions."""
    w, names = {name: torch.as_tensor(a) for name, a in weights.items()}, [name.split(".") for name in weights]

    def conv(x, name):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=w[f"{name}.weight"].shape[-1] // 2)

    def norm(x, name):
        return F.group_norm(x, math.gcd(8, x.shape[1]), w[f"{name}.weight"], w[f"{name}.bias"])

    x = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    if "fc1.weight" in w:
        for name in ("conv1", "conv2"):
            x = F.max_pool2d(F.relu(conv(x, name)), 2)
        return F.linear(F.relu(F.linear(x.flatten(1), w["fc1.weight"], w["fc1.bias"])), w["fc2.weight"], w["fc2.bias"])
    x = F.relu(norm(conv(4 * x - 2, "stem"), "norm"))
    for block in sorted({".".join(name[:2]) for name in names if name[0] == "blocks"}):
        x = F.max_pool2d(x, 2)
        h = norm(conv(F.relu(norm(conv(x, f"{block}.conv1"), f"{block}.norm1")), f"{block}.conv2"), f"{block}.norm2")
        x = F.relu(h + (conv(x, f"{block}.shortcut") if f"{block}.shortcut.weight" in w else x))
    return F.linear(x.mean((2, 3)), w["head.weight"], w["head.bias"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("i", [0, 1])
def test_networks(i, backend, monkeypatch):
    """The logits are torch's; --impl by-hand gives the same logits and gradients with the functions above."""
    net, (x, y), calls, found = load("cnn", backend), batches("cnn", i, 1)[0], [], []
    for name in ("conv2d", "max_pool2d"):
        own = getattr(net, name)
        monkeypatch.setattr(net, name, lambda *args, own=own, name=name: calls.append(name) or own(*args))
    for impl in ("builtin", "by-hand"):
        assert not calls
        trainer, weights = randomised(i, backend, impl=impl)
        found.append({"p": trainer.predict(x), **loss_and_grads("cnn", trainer, backend, (x, y))[1]})
    assert len(calls) == 2 * (4, 12)[i] and {*calls} == {"conv2d", "max_pool2d"}
    for key, a in found[0].items():
        assert np.abs(a).max() > 1e-3
        np.testing.assert_allclose(found[1][key], a, rtol=1e-3, atol=1e-5, err_msg=key)
    logits = reference(x, weights)
    np.testing.assert_allclose(found[0]["p"], logits.softmax(1), rtol=1e-3, atol=1e-5)
    assert found[0]["p"].std() > 0.05 and (trainer.filters() == list(weights.values())[0]).all()
    figures, right = trainer.evaluate(x, y), logits.argmax(1).numpy() == y
    assert 0 < right.mean() < 1 and float(figures["accuracy"]) == pytest.approx(right.mean())
    assert float(figures["val_loss"]) == pytest.approx(F.cross_entropy(logits, torch.from_numpy(y)).item(), rel=1e-4)


@pytest.mark.parametrize("i, backend", [(0, "torch"), (1, "mlx")])
def test_optimizers(i, backend, monkeypatch):
    """Three steps are those of torch.optim: of its Muon for filters, of its AdamW for the rest."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's Muon rounds to 8 bits
    trainer, start = randomised(i, backend, weight_decay=0.2, label_smoothing=0.1)
    params = {name: torch.tensor(w).flatten(1) if w.ndim == 4 else torch.tensor(w) for name, w in start.items()}
    filters = [params[name].requires_grad_() for name, w in start.items() if w.ndim == 4]
    matrices, vectors = ([params[name].requires_grad_() for name, w in start.items() if w.ndim == n] for n in (2, 1))
    groups, lr = [{"params": matrices, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}], 0.02
    rules = [torch.optim.AdamW(groups, lr, betas=(0.9, 0.99)),
             torch.optim.Muon(filters, lr, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")]  # fmt: skip
    for x, y in batches("cnn", i, 3):
        logits = reference(x, {name: p.view(start[name].shape) for name, p in params.items()})
        loss = F.cross_entropy(logits, torch.from_numpy(y), label_smoothing=0.1)
        assert float(trainer.step(x, y, lr=lr)["loss"]) == pytest.approx(loss.item(), rel=1e-3)
        for rule in rules:
            rule.zero_grad()
        loss.backward()
        for rule in rules:
            rule.step()
    for name, w in load("cnn", backend).get_weights(trainer.model).items():
        moved, expected = w - start[name], params[name].detach().numpy().reshape(w.shape) - start[name]
        assert np.linalg.norm(moved - expected) < 0.01 * np.linalg.norm(expected), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, keys", [("cnn", "conv1.weight m.fc1.bias v.conv2.weight"),
                                        ("mlp", "layers.0.weight m.layers.1.bias v.layers.2.weight")])  # fmt: skip
def test_checkpoints(name, keys, backend, tmp_path):
    """load restores what save wrote; it refuses, by name, an array that is missing or has a different shape."""
    net, (trainer, other) = load(name, backend), (make_trainer(name, 0, backend, seed=seed) for seed in (0, 1))
    trainer.save(tmp_path / "a.npz", 1)
    assert other.load(tmp_path / "a.npz") == 1
    weights, loaded = net.get_weights(trainer.model), net.get_weights(other.model)
    assert all((loaded[key] == w).all() for key, w in weights.items())
    with np.load(tmp_path / "a.npz") as f:
        arrays = dict(f)
    cases = [(key, changed) for key in keys.split() for changed in ({}, {key: arrays[key][:1]})]
    for bad, changed in (*cases, ("allow_pickle", {"code": np.array([{}])})):
        np.savez(tmp_path / "b.npz", **{key: a for key, a in arrays.items() if key != bad} | changed)
        with pytest.raises(ValueError, match=bad):
            trainer.load(tmp_path / "b.npz")


@pytest.mark.parametrize("backend", BACKENDS)
def test_starting_weights(backend):
    """N(0, 2/fan_in), norms 1, biases 0; impossible networks are refused."""
    net = load("cnn", backend)
    trainer = net.Trainer(net.Config("resnet", 8, 3, 10, [32, 48, 48, 64]))
    assert trainer.device in net.devices()
    for name, w in net.get_weights(trainer.model).items():
        if w.ndim > 1:
            assert w.std() * (w[0].size / 2) ** 0.5 == pytest.approx(1, abs=0.12) and abs(w.mean()) < w.std() / 5
        else:
            assert (w == ("norm" in name and "weight" in name)).all(), name
    for model, channels in (("resnet", [8] * 5), ("lenet", [8] * 2), ("lenet", [8] * 4)):
        with pytest.raises(ValueError, match="channels"):
            net.Config(model, 8, 3, 10, channels)
    with pytest.raises(ValueError, match="label"):
        trainer.step(np.zeros((2, 8, 8, 3), np.float32), np.array([0, 10]), lr=0.1)


# ---- style transfer --------------------------------------------------------------------------------------------------


def photograph(size, seed):
    """Noise with the spectrum of a photograph: fine parts are fainter than coarse ones."""
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))[..., None] + 1 / size
    noise = np.random.default_rng(seed).standard_normal((size, size, 3))
    image = np.fft.ifft2(np.fft.fft2(noise, axes=(0, 1)) / f**1.2, axes=(0, 1)).real
    return (0.5 + 0.2 * image / image.std()).clip(0, 1).astype(np.float32)


def stylist(backend, content, style, **options):
    net = load("cnn", backend)
    config = net.Config(model="style", size=len(content), n_in=3, n_out=0, channels=[], weight_decay=0.0)
    return net.Stylist(config, content, style, device="cpu", **options)


def test_style():
    """Both paint the same image: it starts as the content, takes on the style, and shows no squares."""
    pair = photograph(64, 0), photograph(64, 1)
    kept, painters, losses = pair[0].copy(), [stylist(backend, *pair) for backend in BACKENDS], []
    for painter in painters:
        before = {name: float(value) for name, value in painter.evaluate().items()}
        assert before["content_loss"] < 1e-6 < 0.1 < before["style_loss"]
        losses.append([float(painter.step(lr=0.05)["loss"]) for _ in range(8)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-2)
    assert np.abs(painters[0].image() - painters[1].image()).max() < 0.02
    last = [float(painters[0].step(lr=0.05)["loss"]) for _ in range(32)][-1]
    assert float(painters[0].evaluate()["style_loss"]) < before["style_loss"] / 4 and last < losses[0][0] / 2
    x = painters[0].image()
    steps = np.abs(np.diff(x, axis=0)).mean((1, 2)) + np.abs(np.diff(x, axis=1)).mean((0, 2))
    assert steps[7::8].mean() / np.delete(steps, np.s_[7::8]).mean() < 1.15  # 0.94; with pools of 2x2, 1.43
    assert (pair[0] == kept).all() and np.abs(x - kept).mean() > 0.05  # the arguments are unchanged


@pytest.mark.parametrize("backend", BACKENDS)
def test_style_losses(backend):
    """The loss of an image, from features computed by hand."""
    net, x, pair = load("cnn", backend), photograph(24, 2), (photograph(24, 0), photograph(32, 1))
    painter = stylist(backend, *pair, strength=3.0, tv=5.0)
    net.set_weights(painter.model, {"image": x[None]})
    w = np.asarray(painter.net.w)
    np.testing.assert_allclose((w**2).sum((2, 3, 4)), 1, rtol=1e-5)
    assert w.mean((3, 4)).std() * 7 / w.std() == pytest.approx(0.1, rel=0.1)  # a tenth of a filter's mean is left

    def features(x):
        x, found = x[None] - np.float32(0.5), []
        for scale in w:
            if found:
                x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], "reflect")
                x = np.asarray(net.patches(array(backend, x), 4, 2, 0)).mean(3)
            f = np.maximum(np.asarray(net.conv2d(array(backend, x), array(backend, scale), 0.0, 1, 3)), 0)
            found.append(f.reshape(-1, 64))
        return found

    def gram(f):
        return f.T @ f / len(f)

    def share(a, b):
        return ((a - b) ** 2).sum() / (b**2).sum()

    fs, goals, styles = map(features, (x, *pair))
    content, style = share(fs[2], goals[2]), np.mean([share(gram(a), gram(b)) for a, b in zip(fs, styles)])
    figures = {name: float(value) for name, value in painter.evaluate().items()}
    assert figures == pytest.approx({"content_loss": content, "style_loss": style}, rel=1e-3)
    tv = (np.diff(x, axis=0) ** 2).mean() + (np.diff(x, axis=1) ** 2).mean()
    assert float(painter.step(lr=0.01)["loss"]) == pytest.approx(content + 3 * style + 5 * tv, rel=1e-3)
    net.set_weights(painter.model, {"image": 3 * x[None] - 1})
    np.testing.assert_allclose(painter.image(), (3 * x - 1).clip(0, 1), atol=1e-6)


def test_style_run(tmp_path):
    """VGG-19's features, from a file in torchvision's layout, are torch's; train.py --task style paints with them."""
    folder, rng, w, n = copy_alone("cnn", tmp_path / "cnn"), np.random.default_rng(0), {}, 3
    for i, width in zip((0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28), (4, 4, 6, 6, *[8] * 9)):  # a narrow one
        w[f"features.{i}.weight"] = rng.normal(0, (2 / 9 / n) ** 0.5, (width, n, 3, 3)).astype(np.float32)
        w[f"features.{i}.bias"] = rng.normal(0, 0.1, width).astype(np.float32)
        n = width
    w = {name: torch.from_numpy(a) for name, a in w.items()}
    torch.save(w, folder / "torch.pth")
    mx.save_safetensors(str(folder / "mlx.safetensors"), {name: mx.array(a.numpy()) for name, a in w.items()})
    x, expected = torch.from_numpy(photograph(48, 0)[None]), []
    h = ((x - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])).permute(0, 3, 1, 2)
    for i in range(30):
        if f"features.{i}.weight" in w:
            h = F.conv2d(h, w[f"features.{i}.weight"], w[f"features.{i}.bias"], padding=1)
        else:
            h = F.max_pool2d(h, 2) if i in (4, 9, 18, 27) else F.relu(h)
        if i in (1, 6, 11, 20, 22, 29):  # relu1_1, relu2_1, relu3_1, relu4_1, relu4_2, relu5_1
            expected.append(h.flatten(2)[0].T)
    ours = load("cnn", "torch").VGG(folder / "torch.pth")(x)
    theirs = load("cnn", "mlx").VGG(str(folder / "mlx.safetensors"))(mx.array(x.numpy()))
    for a, b, c in zip(ours, theirs, expected, strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(np.asarray(b), c, rtol=1e-3, atol=1e-4)
    Image.fromarray((photograph(64, 1) * 255).astype(np.uint8)).save(folder / "B.jpg")
    args, losses = ["--task", "style", "--size", 48, "--style", "B.jpg"], []
    for file, more in (("torch.pth", ["--steps", 6]), ("mlx.safetensors", ["--steps", 12, "--resume"])):
        backend = Path(file).stem
        losses.append(result(folder, backend, *args, *more, run=run_here)["style_loss"])
        result(folder, backend, *args, "--steps", 2, "--weights", file, "--out", "vgg", run=run_here)
    assert Image.open(folder / "out/style/sample.png").size == (3 * 48 + 16, 36)
    assert 0 < losses[1] < losses[0]


# ---- the user's own images, and exported files -----------------------------------------------------------------------


def test_open_image(tmp_path, capfd):
    """Grey of 16 bits and of floats is scaled, not clipped; white shows through; a photograph is turned upright."""
    open_image, rows = load_file("cnn", "data").open_image, np.array([[0, 128, 255], [255, 128, 0]])
    rgba = np.uint8([[(200, 0, 0, 0), (200, 0, 0, 128), (200, 0, 0, 255)]])
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    for name, image, expected in (
        ("deep.png", Image.fromarray(np.uint16(rows * 257)), rows),
        ("deep.tif", Image.fromarray(np.int32(rows * 257)), rows),
        ("float.tif", Image.fromarray(np.float32(rows / 255)), rows),
        ("bytes.tif", Image.fromarray(np.float32(rows)), rows),
        ("grey.png", Image.fromarray(np.uint8(rows)), rows),
        ("turned.png", Image.fromarray(np.uint8(rows)), rows[::-1, ::-1]),
        ("clear.png", Image.fromarray(rgba), [[(255, 255, 255), (227, 127, 127), (200, 0, 0)]]),
        ("palette.png", Image.fromarray(rgba).quantize(3), [[(255, 255, 255), (227, 127, 127), (200, 0, 0)]]),
        ("mask.png", Image.fromarray(rgba[..., 3] // 2).convert("LA"), [[0, 64, 127]]),
    ):
        image.save(tmp_path / name, **({"exif": turned} if name == "turned.png" else {}))
        expected = np.array(expected) if np.ndim(expected) == 3 else np.array(expected)[..., None].repeat(3, 2)
        opened = open_image(tmp_path / name)
        assert opened.mode == "RGB" and np.abs(np.int64(opened) - expected).max() <= 1, name
    Image.new("L", (10000, 6000)).save(tmp_path / "bomb.png")  # a small file that claims to be a huge image
    with pytest.raises(SystemExit):
        open_image(tmp_path / "bomb.png")
    err = capfd.readouterr().err
    assert "bomb.png is no picture that can be read" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["mlp", "cnn", "gan", "autoencoder"])
def test_sets_that_do_not_fit(name, monkeypatch, capsys):
    """Fewer labels than images, an empty test part, an invalid class: one line."""
    for y, n_val in ((np.zeros(5), 4), (np.zeros(6), 0), (np.full(6, 12), 4)):
        arrays = [np.uint8(a) for a in (np.zeros((6, 28, 28)), y, np.zeros((n_val, 28, 28)), np.zeros(n_val))]
        monkeypatch.setattr(load_file(name, "data"), "load_idx", lambda which, arrays=arrays: arrays)
        with pytest.raises(SystemExit):
            make_task(name, "--data", "mnist", "--batch-size", 2)
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and ("fit together" in err or "class numbers" in err)


def test_mirror_images(monkeypatch):
    """A batch is mirrored where --flip says so: a half of it; and both kinds of accuracy are of held-out images."""
    pixels, labels = np.random.default_rng(0).integers(0, 256, (500, 28, 28)), np.arange(500) % 10
    arrays = (np.uint8(pixels), labels) * 2
    monkeypatch.setattr(load_file("cnn", "data").Classify, "load", lambda self: (arrays, [*"abcdefghij"]))
    assert not make_args("cnn", "--data", "arrows").flip  # your classes may be mirror images
    plain, task = make_task("cnn", "--shift", 0), make_task("cnn", "--shift", 0, "--flip")
    (x, y), (turned, classes) = plain.batch(3), task.batch(3)
    same, mirrored = (x == turned).all((1, 2, 3)), (x[:, :, ::-1] == turned).all((1, 2, 3))
    assert 0.3 < same.mean() < 0.7 and (same != mirrored).all() and (y == classes).all()

    class Sides:
        def predict(self, x):  # class 1, surely, if an image is lighter on the right
            p = (x[:, :, 14:].sum((1, 2, 3)) > x[:, :, :14].sum((1, 2, 3))).astype(np.float32) * 0.9 + 0.05
            return np.stack([1 - p, p, *[0 * p] * 8], 1)

    plain = plain.evaluate(Sides(), whole=True)
    p = Sides().predict(task.x / np.float32(255))
    nll = -np.log(p[np.arange(500), task.y] + 1e-12).mean()
    assert plain == {"val_loss": pytest.approx(nll, rel=1e-5), "accuracy": (p.argmax(1) == task.y).mean()}
    both = task.evaluate(Sides(), whole=True)  # p and 1 - p: without a preference
    assert both == {**plain, "accuracy_flip": (task.y == 0).mean()}


def test_folder_of_images(tmp_path):
    """Two classes of images of many sizes and kinds, two of them broken, are learned and exported by both."""
    folder, rng = copy_alone("cnn", tmp_path / "cnn"), np.random.default_rng(0)
    for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
        (folder / "shapes" / name).mkdir(parents=True)
        for i in range(20):
            image = np.array(colour) + rng.normal(0, 30, (*rng.integers(20, 90, 2), 3))
            image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
            image.save(folder / "shapes" / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    (folder / "shapes/red/broken.png").write_bytes((folder / "shapes/red/1.png").read_bytes()[:100])
    for place in ("shapes/red", "words/a", "words/b"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / "notes.txt").write_text("no image")
    args = ["--data", "shapes", "--steps", "30", "--channels", "8", "16", "--batch-size", "16"]
    code, out, err = run_here(folder, "torch", *args, "--export", "net.pt2")
    assert code == 0 and "broken.png" in err and "notes.txt" in err and "skipped 2 files" in err
    assert "32 to train on, 8 held out, each 12% of the accuracy" in out
    assert "net.pt2: pixels (B, 32, 32, 3) from 0 to 1 -> logits (B, 2), any B" in out
    exported = result(folder, "mlx", "--data", "shapes", *"--steps 0 --resume --export net.mlxfn".split(), run=run_here)
    assert exported["accuracy"] == json.loads(out.splitlines()[-1].removeprefix("result "))["accuracy"] > 0.9
    assert "net.mlxfn: pixels (B, 32, 32, 3) from 0 to 1 -> logits (B, 2), B from 1 to 64" in exported["printed"]
    assert json.loads(Path(exported["files"][-1]).read_text()) == ["blue", "red"]
    trainer = load("cnn", "torch").Trainer(load("cnn", "torch").Config("resnet", 32, 3, 2, [8, 16]), device="cpu")
    trainer.load(folder / "out/classify/ckpt.npz")
    kept = {"classes.json": ""}
    program = torch.export.load(folder / "net.pt2", extra_files=kept).module()
    function = mx.import_function(str(folder / "net.mlxfn"))
    assert json.loads(kept["classes.json"]) == ["blue", "red"]
    for B in (1, 5):
        x = np.random.default_rng(B).random((B, 32, 32, 3), np.float32)
        expected = trainer.model(torch.from_numpy(x)).detach().numpy()
        assert expected.shape == (B, 2) and np.abs(expected).max() > 0.1
        np.testing.assert_allclose(program(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(np.asarray(function(mx.array(x))[0]), expected, rtol=1e-3, atol=1e-3)
    code, _, err = run_here(folder, "mlx", "--data", "words", "--steps", "1")
    assert code == 2 and err.splitlines()[-1].startswith("train.py: words must be") and "skipped 2 files" in err


@pytest.mark.parametrize("i", [0, 1])
def test_core_ml(i, tmp_path, capfd):
    """It takes 1 to 64 images, knows the names, and its converter is silent."""
    coremltools = pytest.importorskip("coremltools")
    capfd.readouterr()
    trainer = make_trainer("cnn", i, "torch")
    assert "B from 1 to 64" in trainer.export(tmp_path / "net.mlpackage", ["a", "b", "c", "d"])
    assert capfd.readouterr() == ("", "")
    spec = coremltools.utils.load_spec(str(tmp_path / "net.mlpackage"))
    size, n_in = trainer.config.size, trainer.config.n_in
    (image,), (logits,) = spec.description.input, spec.description.output
    assert list(image.type.multiArrayType.shape) == [1, size, size, n_in] and image.name == "image"
    sizes = image.type.multiArrayType.shapeRange.sizeRanges[:1]
    assert [(size.lowerBound, size.upperBound) for size in sizes] == [(1, 64)] and logits.name == "logits"
    assert json.loads(spec.description.metadata.userDefined["classes"]) == ["a", "b", "c", "d"]
