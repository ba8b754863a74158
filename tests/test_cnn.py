"""cnn/: convolution and pooling by hand against the frameworks' own, style, folders of images, exported files."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import BACKENDS, batches, copy_alone, load, load_file, make_args, make_task, make_trainer, result, run_here
from PIL import Image
from test_parity import array, loss_and_grads, randomise, refusal

SHAPES = [(7, 9, 3, 1, 1), (8, 5, 5, 1, 2), (9, 7, 3, 2, 1), (11, 6, 4, 3, 2), (6, 6, 1, 2, 0), (10, 7, 3, 2, 0)]
EACH = pytest.mark.parametrize("backend", BACKENDS)


# ---- convolution and pooling by hand, and the networks ---------------------------------------------------------------


def test_by_hand():
    """Convolution, pooling and their gradients are those of torch's functions."""
    rng, C, N = np.random.default_rng(1), 3, 4
    for (H, W, k, stride, padding), pooled, backend in itertools.product(SHAPES, (False, True), BACKENDS):
        net, p = load("cnn", backend), min(padding, k // 2) if pooled else padding
        out = [(n + 2 * p - k) // stride + 1 for n in (H, W)]
        shapes = (2, *out, C if pooled else N), (2, H, W, C), (N, C, k, k), (N,)
        g, *leaves = (torch.from_numpy(rng.standard_normal(shape, np.float32)) for shape in shapes)
        dy, x, w, b = (array(backend, a.numpy()) for a in (g, *leaves))
        leaves = [a.requires_grad_() for a in (leaves[:1] if pooled else leaves)]
        inner = leaves[0].permute(0, 3, 1, 2).contiguous()  # else oneDNN 1x1, stride 2, corrupts the heap
        if pooled:
            ours = [net.max_pool2d(x, k, stride, p), net.max_pool2d_backward(dy, x, k, stride, p)]
            y = F.max_pool2d(inner, k, stride, p).permute(0, 2, 3, 1)
        else:
            ours = [net.conv2d(x, w, b, stride, p), *net.conv2d_backward(dy, x, w, stride, p)]
            y = F.conv2d(inner, *leaves[1:], stride, p).permute(0, 2, 3, 1)
        for a, theirs in zip(ours, [y.detach(), *torch.autograd.grad(y, leaves, g)], strict=True):
            assert theirs.abs().max() > 0.1
            np.testing.assert_allclose(np.asarray(a), theirs, rtol=1e-4, atol=1e-4)


def layer(w, name, x):
    """A layer of the weights w once more, from torch's functions, for images (B, C, H, W) or for rows (B, ..., C)."""
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    if x.ndim < 4:
        return F.layer_norm(x, weight.shape, weight, bias) if weight.ndim == 1 else F.linear(x, weight, bias)
    if weight.ndim == 1:
        return F.group_norm(x, math.gcd(8, len(weight)), weight, bias)
    weight = weight if weight.ndim == 4 else weight[..., None, None]  # a matrix for each pixel
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def reference(x, weights):
    """The logits for images (B, H, W, C)."""
    w, x = {name: torch.as_tensor(a) for name, a in weights.items()}, torch.from_numpy(x).permute(0, 3, 1, 2)
    if "fc1.weight" in w:
        for name in ("conv1", "conv2"):
            x = F.max_pool2d(F.relu(layer(w, name, x.contiguous())), 2)
        return layer(w, "fc2", F.relu(layer(w, "fc1", x.flatten(1))))
    x = F.relu(layer(w, "norm", layer(w, "stem", 4 * x.contiguous() - 2)))
    for block in sorted({name.rsplit(".", 2)[0] for name in w if name.startswith("blocks.")}):
        x = F.max_pool2d(x, 2)
        h = F.relu(layer(w, f"{block}.norm1", layer(w, f"{block}.conv1", x)))
        h = layer(w, f"{block}.norm2", layer(w, f"{block}.conv2", h))
        x = F.relu(h + (layer(w, f"{block}.shortcut", x) if f"{block}.shortcut.weight" in w else x))
    return layer(w, "head", x.mean((2, 3)))


@EACH
@pytest.mark.parametrize("i", [0, 1])
def test_networks(i, backend, monkeypatch):
    """The logits are torch's; --impl by-hand gives the same logits and gradients with the functions above."""
    net, (x, y), calls, found = load("cnn", backend), batches("cnn", i, 1)[0], [], []
    for name in ("conv2d", "max_pool2d"):
        own = getattr(net, name)
        monkeypatch.setattr(net, name, lambda *args, own=own, name=name: calls.append(name) or own(*args))
    for impl in ("builtin", "by-hand"):
        assert not calls
        trainer = make_trainer("cnn", i, backend, impl=impl)
        weights = randomise("cnn", backend, trainer)
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


@EACH
def test_style_losses(backend):
    """The loss of an image, from features computed by hand."""
    net, x, pair = load("cnn", backend), photograph(24, 2), (photograph(24, 0), photograph(32, 1))
    painter = stylist(backend, *pair, strength=3.0, tv=5.0)
    net.set_weights(painter.model, {"image": x[None]})
    w = np.asarray(painter.net.w)
    np.testing.assert_allclose((w**2).sum((2, 3, 4)), 1, rtol=1e-5)
    assert w.mean((3, 4)).std() * 7 / w.std() == pytest.approx(0.1, rel=0.1)  # a tenth of a filter's mean is left

    def features(x):
        x, found = torch.from_numpy(x[None] - np.float32(0.5)).permute(0, 3, 1, 2), []
        for scale in torch.from_numpy(w):
            x = F.avg_pool2d(F.pad(x, [1] * 4, "reflect"), 4, 2) if found else x
            found.append(F.relu(F.conv2d(x, scale, padding=3)).flatten(2)[0].T.numpy())
        return found

    def share(a, b):
        return ((a - b) ** 2).sum() / (b**2).sum()

    fs, goals, styles = map(features, (x, *pair))
    grams = [[f.T @ f / len(f) for f in each] for each in (fs, styles)]
    content, style = share(fs[2], goals[2]), np.mean([share(a, b) for a, b in zip(*grams)])
    figures = {name: float(value) for name, value in painter.evaluate().items()}
    assert figures == pytest.approx({"content_loss": content, "style_loss": style}, rel=1e-3)
    tv = (np.diff(x, axis=0) ** 2).mean() + (np.diff(x, axis=1) ** 2).mean()
    assert float(painter.step(lr=0.01)["loss"]) == pytest.approx(content + 3 * style + 5 * tv, rel=1e-3)
    net.set_weights(painter.model, {"image": 3 * x[None] - 1})
    np.testing.assert_allclose(painter.image(), (3 * x - 1).clip(0, 1), atol=1e-6)


def test_style_run(tmp_path):
    """VGG-19's features, from a file in torchvision's layout, are torch's; train.py --task style paints with them."""
    folder, rng, w = copy_alone("cnn", tmp_path / "cnn"), np.random.default_rng(0), {}
    widths = dict(zip((0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28), (4, 4, 6, 6, *[8] * 9)))  # a narrow one
    x, expected = torch.from_numpy(photograph(48, 0)[None]), []
    h = ((x - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])).permute(0, 3, 1, 2)
    for i in range(30):
        if i in widths:
            shape = widths[i], h.shape[1], 3, 3
            w[f"features.{i}.weight"] = torch.tensor(np.float32(rng.normal(0, (2 / 9 / shape[1]) ** 0.5, shape)))
            w[f"features.{i}.bias"] = torch.tensor(np.float32(rng.normal(0, 0.1, widths[i])))
            h = F.conv2d(h, w[f"features.{i}.weight"], w[f"features.{i}.bias"], padding=1)
        else:
            h = F.max_pool2d(h, 2) if i in (4, 9, 18, 27) else F.relu(h)
        if i in (1, 6, 11, 20, 22, 29):  # relu1_1, relu2_1, relu3_1, relu4_1, relu4_2, relu5_1
            expected.append(h.flatten(2)[0].T)
    torch.save(w, folder / "torch.pth")
    mx.save_safetensors(str(folder / "mlx.safetensors"), {name: mx.array(a.numpy()) for name, a in w.items()})
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
    assert Image.open(folder / "out/style/sample.png").size == (3 * 48 + 16, 36) and 0 < losses[1] < losses[0]


# ---- the user's own images, and exported files -----------------------------------------------------------------------


def test_open_image(tmp_path, capfd):
    """Grey of 16 bits and of floats is scaled, not clipped; white shows through; a photograph is turned upright."""
    open_image, rows = load_file("cnn", "data").open_image, np.array([[0, 128, 255], [255, 128, 0]])
    rgba = np.uint8([[(200, 0, 0, 0), (200, 0, 0, 128), (200, 0, 0, 255)]])
    turned, seen = Image.Exif(), [[(255, 255, 255), (227, 127, 127), (200, 0, 0)]]
    turned[0x0112] = 3  # upside down
    for name, image, expected in (
        ("deep.png", np.uint16(rows * 257), rows), ("deep.tif", np.int32(rows * 257), rows),
        ("float.tif", np.float32(rows / 255), rows), ("bytes.tif", np.float32(rows), rows),
        ("grey.png", np.uint8(rows), rows), ("turned.png", np.uint8(rows), rows[::-1, ::-1]),
        ("clear.png", rgba, seen), ("palette.png", Image.fromarray(rgba).quantize(3), seen),
        ("mask.png", Image.fromarray(rgba[..., 3] // 2).convert("LA"), [[0, 64, 127]]),
    ):  # fmt: skip
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image.save(tmp_path / name, **({"exif": turned} if name == "turned.png" else {}))
        expected = np.array(expected) if np.ndim(expected) == 3 else np.array(expected)[..., None].repeat(3, 2)
        opened = open_image(tmp_path / name)
        assert opened.mode == "RGB" and np.abs(np.int64(opened) - expected).max() <= 1, name
    Image.new("L", (10000, 6000)).save(tmp_path / "bomb.png")  # a small file that claims to be a huge image
    assert "bomb.png can't be read as an image" in refusal(capfd, open_image, tmp_path / "bomb.png")


@pytest.mark.parametrize("name", ["mlp", "cnn", "gan", "autoencoder", "diffusion"])
def test_sets_that_do_not_fit(name, monkeypatch, capsys):
    """Public datasets that lack labels or test images, or have a class too many, are refused in one line."""
    x, y, arrays = np.zeros((20, 28, 28), np.uint8), np.arange(20, dtype=np.uint8) % 10, []
    monkeypatch.setattr(load_file(name, "data"), "load_idx", lambda which: arrays)
    cases = [{1: y[:19]}, {3: y[:9]}, {2: x[:0]}, {2: x[:0], 3: y[:0]}, {1: y + 1}, {3: y[:10] + 1}]
    for case in cases + [{0: x[:, 1:]}, {1: x}, {}] * (name == "diffusion"):
        arrays[:] = (case.get(i, part) for i, part in enumerate((x, y, x[:10], y[:10])))
        if case:
            err = refusal(capsys, make_task, name, "--data", "mnist", "--batch-size", 2)
            assert "do not fit together" in err or (name == "mlp" and "class numbers" in err)
        else:
            assert len(make_task(name, "--data", "mnist").test) == 10


def test_mirror_images(monkeypatch):
    """A batch is mirrored where --flip says so: a half of it; and both kinds of accuracy are of held-out images."""
    pixels, labels = np.random.default_rng(0).integers(0, 256, (500, 28, 28)), np.arange(500) % 10
    arrays = (np.uint8(pixels), labels) * 2
    monkeypatch.setattr(load_file("cnn", "data").Classify, "load", lambda self: (arrays, [*"abcdefghij"]))
    assert not make_args("cnn", "--data", "arrows").flip  # your classes may be mirror images
    plain, task = make_task("cnn", "--shift", 0), make_task("cnn", "--shift", 0, "--flip")
    (x, y), (turned, classes) = plain.batch(3), task.batch(3)
    same, mirrored = (x == turned).all((1, 2, 3)), (x[:, :, ::-1] == turned).all((1, 2, 3))
    assert 0.3 < same.mean() < 0.7 and (same != mirrored).all() and (y == classes).all() and x.max() == 1
    few, rest = make_task("cnn", "--validate"), np.arange(500) % 10 > 0
    assert (few.x == task.x[rest]).all() and (few.y == task.y[rest]).all()
    assert (few.x_val == task.x[~rest]).all() and (few.y_val == task.y[~rest]).all()

    def sides(x):  # class 1, surely, if an image is lighter on the right
        p = (x[:, :, 14:].sum((1, 2, 3)) > x[:, :, :14].sum((1, 2, 3))).astype(np.float32) * 0.9 + 0.05
        return np.stack([1 - p, p, *[0 * p] * 8], 1)

    trainer, p = SimpleNamespace(predict=sides), sides(task.x / np.float32(255))
    plain, both = (each.evaluate(trainer, whole=True) for each in (plain, task))
    nll = -np.log(p[np.arange(500), task.y] + 1e-12).mean()
    assert plain == {"val_loss": pytest.approx(nll, rel=1e-5), "accuracy": (p.argmax(1) == task.y).mean()}
    assert both == {**plain, "accuracy_flip": (task.y == 0).mean()}  # p and 1 - p: without a preference


def test_folder_of_images(tmp_path):
    """Two classes of images of many sizes and kinds, two of them broken, are learned and exported by both."""
    folder, rng = copy_alone("cnn", tmp_path / "cnn"), np.random.default_rng(0)
    for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
        (folder / "shapes" / name).mkdir(parents=True)
        for i in range(20):
            image = rng.normal(colour, 30, (*rng.integers(20, 90, 2), 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / "shapes" / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    (folder / "shapes/red/broken.png").write_bytes((folder / "shapes/red/1.png").read_bytes()[:100])
    for place in ("shapes/red", "words/a", "words/b"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / "notes.txt").write_text("no image")
    args = ["--data", "shapes", "--steps", "15", "--channels", "8", "16", "--batch-size", "16"]
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
    kept, function = {"classes.json": ""}, mx.import_function(str(folder / "net.mlxfn"))
    program = torch.export.load(folder / "net.pt2", extra_files=kept).module()
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
    (image,), (logits,) = spec.description.input, spec.description.output
    assert [*image.type.multiArrayType.shape] == [1, *batches("cnn", i, 1)[0][0].shape[1:]] and image.name == "image"
    sizes = image.type.multiArrayType.shapeRange.sizeRanges[:1]
    assert [(size.lowerBound, size.upperBound) for size in sizes] == [(1, 64)] and logits.name == "logits"
    assert json.loads(spec.description.metadata.userDefined["classes"]) == ["a", "b", "c", "d"]
