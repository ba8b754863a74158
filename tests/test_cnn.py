"""cnn/: convolution and pooling by hand against the frameworks' own, style, folders of images, exported files."""

import gzip
import json

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import BACKENDS, batches, copy_alone, load, load_file, make_task, make_trainer, result, run
from PIL import Image, ImageDraw
from test_parity import loss_and_grads

SHAPES = [  # height, width, k, stride, padding
    (7, 9, 3, 1, 1),
    (8, 5, 5, 1, 2),
    (9, 7, 3, 2, 1),
    (11, 6, 4, 3, 2),
    (6, 6, 1, 2, 0),
    (5, 8, 2, 2, 0),
    (10, 7, 3, 2, 0),
]


def array(backend, x):
    return torch.from_numpy(x) if backend == "torch" else mx.array(x)


def case(H, W, k, stride, padding, C=3, N=4):
    """x, w, b and a gradient dy of the output, as numpy."""
    rng = np.random.default_rng(1)
    out = [(n + 2 * padding - k) // stride + 1 for n in (H, W)]
    shapes = (2, H, W, C), (N, C, k, k), (N,), (2, *out, N)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


@pytest.mark.parametrize("H, W, k, stride, padding", SHAPES)
def test_convolution_by_hand(H, W, k, stride, padding):
    x, w, b, dy = case(H, W, k, stride, padding)
    for backend in BACKENDS:
        net, (X, w_, b_, dy_) = load("cnn", backend), (array(backend, a) for a in (x, w, b, dy))
        ours = [net.conv2d(X, w_, b_, stride, padding), *net.conv2d_backward(dy_, X, w_, stride, padding)]
        if backend == "torch":
            leaves = [a.clone().requires_grad_() for a in (X, w_, b_)]
            channels_first = leaves[0].permute(0, 3, 1, 2).contiguous()  # else oneDNN 1x1, stride 2, corrupts the heap
            y = F.conv2d(channels_first, *leaves[1:], stride, padding).permute(0, 2, 3, 1)
            theirs = [y.detach(), *torch.autograd.grad(y, leaves, dy_)]
        else:

            def convolve(x, w, b):
                return mx.conv2d(x, w.transpose(0, 2, 3, 1), stride, padding) + b

            (y,), grads = mx.vjp(convolve, [X, w_, b_], [dy_])
            theirs = [y, *grads]
        for a, b_own in zip(ours, theirs):
            assert np.abs(np.asarray(b_own)).max() > 0.1
            np.testing.assert_allclose(np.asarray(a), np.asarray(b_own), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("H, W, k, stride, padding", [(*s[:4], min(s[4], s[2] // 2)) for s in SHAPES])
def test_pooling_by_hand(H, W, k, stride, padding):
    x, _, _, dy = case(H, W, k, stride, padding, C=4)
    for backend in BACKENDS:
        net, X, dy_ = load("cnn", backend), array(backend, x), array(backend, dy)
        ours = [net.max_pool2d(X, k, stride, padding), net.max_pool2d_backward(dy_, X, k, stride, padding)]
        if backend == "torch":
            leaf = X.clone().requires_grad_()
            y = F.max_pool2d(leaf.permute(0, 3, 1, 2), k, stride, padding).permute(0, 2, 3, 1)
            theirs = [y.detach(), *torch.autograd.grad(y, [leaf], dy_)]
        else:
            (y,), (dx,) = mx.vjp(mlx_nn.MaxPool2d(k, stride, padding), [X], [dy_])
            theirs = [y, dx]
        for a, b in zip(ours, theirs):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_convolution_is_what_the_equation_says(backend):
    """y[b,i,j,n] = b[n] + sum w[n,c,u,v] x[b, s i + u - p, s j + v - p, c], entry by entry."""
    H, W, k, s, p = 6, 5, 3, 2, 1
    x, w, b, dy = case(H, W, k, s, p)
    y = np.asarray(load("cnn", backend).conv2d(*(array(backend, a) for a in (x, w, b)), s, p))
    for (n, i, j, o), value in np.ndenumerate(y):
        total = b[o]
        for u in range(k):
            for v in range(k):
                row, column = s * i + u - p, s * j + v - p
                if 0 <= row < H and 0 <= column < W:
                    total += w[o, :, u, v] @ x[n, row, column]
        assert value == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lenet_by_hand(backend):
    """The logits of a LeNet put together from the functions by hand."""
    trainer, net = make_trainer("cnn", 0, backend), load("cnn", backend)
    x = np.random.default_rng(0).random((3, 14, 14, 1), np.float32)
    w = {name: array(backend, a) for name, a in net.get_weights(trainer.model).items()}
    h = array(backend, x)
    for layer in ("conv1", "conv2"):
        h = net.conv2d(h, w[f"{layer}.weight"], w[f"{layer}.bias"], 1, 2)
        h = np.maximum(np.asarray(net.max_pool2d(h, 2, 2)), 0)
        h = array(backend, h)
    h = np.asarray(h).transpose(0, 3, 1, 2).reshape(3, -1)
    h = np.maximum(h @ np.asarray(w["fc1.weight"]).T + np.asarray(w["fc1.bias"]), 0)
    z = h @ np.asarray(w["fc2.weight"]).T + np.asarray(w["fc2.bias"])
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    np.testing.assert_allclose(trainer.predict(x), p, rtol=1e-4, atol=1e-5)
    assert p.std() > 0.05


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("i", [0, 1])
def test_networks_by_hand(i, backend, monkeypatch):
    """--impl by-hand: the logits and every gradient that the library's convolution and pooling give."""
    net, batch, calls, found = load("cnn", backend), batches("cnn", i, 1)[0], [], []
    for name in ("conv2d", "max_pool2d"):
        own = getattr(net, name)
        monkeypatch.setattr(net, name, lambda *args, own=own, name=name: calls.append(name) or own(*args))
    for impl in ("builtin", "by-hand"):
        assert not calls
        trainer = make_trainer("cnn", i, backend, impl=impl)
        found.append({"p": trainer.predict(batch[0]), **loss_and_grads("cnn", trainer, backend, batch)[1]})
    layers = {0: ["conv2d", "max_pool2d"] * 2, 1: "c p cccp cc".replace(" ", "")}[i]
    assert len(calls) == 2 * len(layers) and {*calls} == {"conv2d", "max_pool2d"}
    for key, a in found[0].items():
        assert np.abs(a).max() > 1e-3
        np.testing.assert_allclose(found[1][key], a, rtol=1e-3, atol=1e-5, err_msg=key)


def test_label_smoothing():
    """A step of a smoothed loss is lower by what confidence costs; what is measured is not smoothed."""
    for backend in BACKENDS:
        net, z = load("cnn", backend), np.array([[5, 0, 0, 0]], np.float32)
        losses = [float(net.loss_fn(array(backend, z), array(backend, np.array([0])), s)) for s in (0.0, 0.2)]
        assert losses[1] - losses[0] == pytest.approx(0.2 * 5 * 3 / 4, rel=1e-4)  # of p = 0.2/4 for each of four
        x, y = batches("cnn", 1, 1)[0]
        figures = []
        for s in (0.0, 0.2):
            trainer = make_trainer("cnn", 1, backend, label_smoothing=s)
            figures.append([float(trainer.evaluate(x, y)["val_loss"]), float(trainer.step(x, y, lr=0.01)["loss"])])
        assert figures[0][0] == figures[1][0] == pytest.approx(figures[0][1], rel=1e-5)
        assert abs(figures[0][1] - figures[1][1]) > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_checkpoints(backend, tmp_path):
    """load refuses, by its name, an array that is missing or has another shape: weights and moments."""
    trainer = make_trainer("cnn", 0, backend)
    trainer.save(tmp_path / "a.npz", 1)
    with np.load(tmp_path / "a.npz") as f:
        arrays = dict(f)
    for name in ("conv1.weight", "m.fc1.bias", "v.conv2.weight"):
        for other in ({}, {name: arrays[name][:1]}):
            np.savez(tmp_path / "b.npz", **{key: a for key, a in arrays.items() if key != name} | other)
            with pytest.raises(ValueError, match=f"^{name} "):
                trainer.load(tmp_path / "b.npz")


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_are_checked(backend):
    with pytest.raises(ValueError, match="label"):
        make_trainer("cnn", 0, backend).step(np.zeros((2, 14, 14, 1), np.float32), np.array([0, 4]), lr=0.1)


# ---- style transfer --------------------------------------------------------------------------------------------------


def pair(size=48):
    rng = np.random.default_rng(3)
    content = np.zeros((size, size, 3), np.float32)
    content[size // 4 : size // 2, size // 4 :] = [0.9, 0.5, 0.2]
    stripes = 0.5 + 0.5 * np.sin(np.arange(size) * 0.9)[:, None, None] * rng.uniform(0.5, 1, (1, 1, 3))
    return content, np.broadcast_to(stripes, content.shape).astype(np.float32).copy()


def stylist(backend, weights=None, **options):
    net = load("cnn", backend)
    config = net.Config(model="style", size=48, n_in=3, n_out=0, channels=[], weight_decay=0.0)
    return net.Stylist(config, *pair(), weights, device="cpu", **options)


def test_style_twins():
    """Both paint the same picture, one with the style's texture."""
    pictures = []
    for backend in BACKENDS:
        painter = stylist(backend)
        before = {name: float(value) for name, value in painter.evaluate().items()}
        assert before["content_loss"] < 1e-6 < 0.1 < before["style_loss"]  # it starts as the content
        losses = [float(painter.step(lr=0.03)["loss"]) for _ in range(30)]
        after = {name: float(value) for name, value in painter.evaluate().items()}
        assert after["style_loss"] < before["style_loss"] / 4 and losses[-1] < losses[0] / 2
        pictures.append(painter.image())
    assert np.abs(pictures[0] - pair()[0]).mean() > 0.02
    assert np.abs(pictures[0] - pictures[1]).max() < 0.02


def photograph(size, seed):
    """Noise with the spectrum of a photograph: fine parts are fainter than coarse ones."""
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))[..., None] + 1 / size
    noise = np.random.default_rng(seed).standard_normal((size, size, 3))
    image = np.fft.ifft2(np.fft.fft2(noise, axes=(0, 1)) / f**1.2, axes=(0, 1)).real
    return (0.5 + 0.2 * image / image.std()).clip(0, 1).astype(np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_style_has_no_squares(backend):
    """Steps at the edges of squares of 8 pixels are no larger than others: 0.94 of them; with pools of 2x2, 1.43."""
    content, style = photograph(64, 0), photograph(64, 1)
    kept, net = content.copy(), load("cnn", backend)
    config = net.Config(model="style", size=64, n_in=3, n_out=0, channels=[], weight_decay=0.0)
    painter = net.Stylist(config, content, style, device="cpu")
    for _ in range(40):
        painter.step(lr=0.05)
    x = painter.image()
    steps = np.abs(np.diff(x, axis=0)).mean((1, 2)) + np.abs(np.diff(x, axis=1)).mean((0, 2))
    assert steps[7::8].mean() / np.delete(steps, np.s_[7::8]).mean() < 1.15
    assert (content == kept).all() and np.abs(x - kept).mean() > 0.05  # what was handed in is left as it was


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A narrow VGG-19 with random weights in torchvision's layout, as .pth and as .safetensors."""
    place, rng, weights, n = tmp_path_factory.mktemp("vgg"), np.random.default_rng(0), {}, 3
    for i, width in zip((0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28), (4, 4, 6, 6, *[8] * 9)):
        weights[f"features.{i}.weight"] = rng.normal(0, (2 / 9 / n) ** 0.5, (width, n, 3, 3)).astype(np.float32)
        weights[f"features.{i}.bias"] = rng.normal(0, 0.1, width).astype(np.float32)
        n = width
    torch.save({name: torch.from_numpy(w) for name, w in weights.items()}, place / "vgg.pth")
    mx.save_safetensors(str(place / "vgg.safetensors"), {name: mx.array(w) for name, w in weights.items()})
    return place, weights


def test_vgg(vgg):
    """Its features against torch.nn.Sequential in torchvision's order, and the twins' against one another."""
    place, weights = vgg
    layers, n = [], 3
    for i in range(30):
        if f"features.{i}.weight" in weights:
            width = len(weights[f"features.{i}.bias"])
            layers.append(torch.nn.Conv2d(n, width, 3, padding=1))
            n = width
        else:
            layers.append(torch.nn.MaxPool2d(2) if i in (4, 9, 18, 27) else torch.nn.ReLU())
    features = torch.nn.Sequential(*layers)
    features.load_state_dict({name.removeprefix("features."): torch.from_numpy(w) for name, w in weights.items()})
    x = torch.from_numpy(pair()[0][None])
    h = ((x - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])).permute(0, 3, 1, 2)
    expected = []
    for i, layer in enumerate(features):
        h = layer(h)
        if i in (1, 6, 11, 20, 22, 29):  # relu1_1, relu2_1, relu3_1, relu4_1, relu4_2, relu5_1
            expected.append(h.flatten(2)[0].T.detach().numpy())
    ours = load("cnn", "torch").VGG(place / "vgg.pth")(x)
    theirs = load("cnn", "mlx").VGG(str(place / "vgg.safetensors"))(mx.array(x.numpy()))
    assert len(ours) == len(theirs) == len(expected) == 6
    for a, b, c in zip(ours, theirs, expected):
        np.testing.assert_allclose(a.numpy(), c, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(np.asarray(b), c, rtol=1e-3, atol=1e-4)


def test_style_run(vgg, tmp_path):
    """train.py --task style: three pictures side by side; the twin goes on with --resume; both kinds of features."""
    folder = copy_alone("cnn", tmp_path / "cnn")
    Image.fromarray((pair(64)[1] * 255).astype(np.uint8)).save(folder / "B.jpg")
    args, losses = ["--task", "style", "--size", "48", "--style", "B.jpg"], []
    for backend, more in (("torch", ["--steps", "6"]), ("mlx", ["--steps", "12", "--resume"])):
        code, out, err = run(folder, backend, *args, *more)
        assert code == 0, err
        losses.append(json.loads(out.splitlines()[-1].removeprefix("result "))["style_loss"])
        kind = {"torch": "vgg.pth", "mlx": "vgg.safetensors"}[backend]
        code, _, err = run(folder, backend, *args, "--steps", "2", "--weights", vgg[0] / kind, "--out", "vgg")
        assert code == 0, err
    assert Image.open(folder / "out/style/sample.png").size == (3 * 48 + 16, 36)
    assert 0 < losses[1] < losses[0]


# ---- the user's own images, and exported files -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """cnn/ copied alone, and shapes/: two classes of images of many sizes and kinds, two of them broken."""
    place, rng = copy_alone("cnn", tmp_path_factory.mktemp("shapes") / "cnn"), np.random.default_rng(0)
    for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
        (place / "shapes" / name).mkdir(parents=True)
        for i in range(20):
            size = rng.integers(20, 90, 2)
            image = np.clip(np.array(colour) + rng.normal(0, 30, (*size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(place / "shapes" / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    (place / "shapes/red/broken.png").write_bytes((place / "shapes/red/1.png").read_bytes()[:100])
    (place / "shapes/red/notes.txt").write_text("no image")
    (place / "words/a").mkdir(parents=True)
    (place / "words/b").mkdir()
    (place / "words/a/notes.txt").write_text("no image")
    return place


def test_open_image(tmp_path):
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


def test_bombs(tmp_path, capfd):
    """A small file that says that it is a huge picture is refused in one line."""
    Image.new("L", (10000, 6000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(SystemExit):
        load_file("cnn", "data").open_image(tmp_path / "bomb.png")
    err = capfd.readouterr().err
    assert "bomb.png is no picture that can be read" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_sets_that_do_not_fit(name, tmp_path, monkeypatch, capsys):
    """Fewer labels than images, a class that is none, an empty test part: one line."""
    (tmp_path / "mnist").mkdir()
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    for y, n_val in ((np.zeros(5), 4), (np.zeros(6), 0), (np.full(6, 12), 4)):
        parts = [np.uint8(a) for a in (np.zeros((6, 28, 28)), y, np.zeros((n_val, 28, 28)), np.zeros(n_val))]
        for a, stem in zip(parts, ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")):
            head = bytes([0, 0, 8, a.ndim]) + np.array(a.shape, ">i4").tobytes()
            (tmp_path / f"mnist/{stem}-ubyte.gz").write_bytes(gzip.compress(head + a.tobytes()))
        with pytest.raises(SystemExit):
            make_task(name, "--data", "mnist", "--batch-size", 2)
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and ("fit together" in err or "class numbers" in err)


def test_arrows(tmp_path):
    """Of the user's own classes one may be the other's mirror image: nothing is mirrored unless --flip says so."""
    folder, rng = copy_alone("cnn", tmp_path / "cnn"), np.random.default_rng(0)
    for name, way in (("left", -1), ("right", 1)):
        (folder / "arrows" / name).mkdir(parents=True)
        for i in range(30):
            image, (u, v) = Image.new("RGB", (32, 32), "white"), rng.integers(12, 20, 2)
            draw = ImageDraw.Draw(image)
            draw.line((u - 8, v, u + 8, v), "black", 2)
            draw.polygon([(u + 10 * way, v), (u + 3 * way, v - 5), (u + 3 * way, v + 5)], "black")
            image.save(folder / "arrows" / name / f"{i}.png")
    args = "--data arrows --steps 60 --channels 8 16 --batch-size 32".split()
    plain = result(folder, "torch", *args)
    assert plain["accuracy"] == 1 and "accuracy_flip" not in plain
    mirrored = result(folder, "torch", *args, "--flip")
    assert mirrored["accuracy_flip"] < 0.8 and "accuracy_flip" not in mirrored["printed"].splitlines()[-2]


def test_mirror_images():
    """A batch is mirrored where --flip says so: a half of it; and both kinds of accuracy are of held-out images."""

    class Sides:
        def predict(self, x):  # class 1, surely, if an image is lighter on the right
            p = (x[:, :, 14:].sum((1, 2, 3)) > x[:, :, :14].sum((1, 2, 3))).astype(np.float32) * 0.9 + 0.05
            return np.stack([1 - p, p, *[0 * p] * 8], 1)

    plain, task = make_task("cnn", "--shift", 0), make_task("cnn", "--shift", 0, "--flip")
    same = (plain.batch(3)[0] == task.batch(3)[0]).all((1, 2, 3))
    assert 0.3 < same.mean() < 0.7
    figures = plain.evaluate(Sides(), whole=True)
    assert figures.keys() == {"val_loss", "accuracy"}
    right = Sides().predict(task.x_val / np.float32(255)).argmax(1) == task.y_val
    assert figures["accuracy"] == right.mean() == task.evaluate(Sides(), whole=True)["accuracy"]
    assert "accuracy_flip" in task.evaluate(Sides(), whole=True)


def test_folder_of_images(folder):
    args = ["--data", "shapes", "--steps", "30", "--channels", "8", "16", "--batch-size", "16"]
    code, out, err = run(folder, "torch", *args, "--export", "net.pt2")
    assert code == 0, err
    assert "broken.png" in err and "notes.txt" in err and "skipped 2 files" in err
    assert "32 to train on, 8 held out" in out
    assert json.loads(out.splitlines()[-1].removeprefix("result "))["accuracy"] > 0.9
    assert "net.pt2: pixels (B, 32, 32, 3) from 0 to 1 -> logits (B, 2), any B" in out
    code, out, err = run(folder, "mlx", *args[:2], "--steps", "0", "--resume", "--export", "net.mlxfn")  # the other one
    assert code == 0, err
    assert json.loads(out.splitlines()[-1].removeprefix("result "))["accuracy"] > 0.9
    assert "net.mlxfn: pixels (B, 32, 32, 3) from 0 to 1 -> logits (B, 2), B = 1, 2, 4" in out
    trainer = load("cnn", "torch").Trainer(load("cnn", "torch").Config("resnet", 32, 3, 2, [8, 16]), device="cpu")
    trainer.load(folder / "out/classify/ckpt.npz")
    kept = {"classes.json": ""}
    program = torch.export.load(folder / "net.pt2", extra_files=kept).module()
    function = mx.import_function(str(folder / "net.mlxfn"))
    assert json.loads(kept["classes.json"]) == ["blue", "red"]
    for B in (1, 4):
        x = np.random.default_rng(B).random((B, 32, 32, 3), np.float32)
        expected = trainer.model(torch.from_numpy(x)).detach().numpy()
        assert expected.shape == (B, 2) and np.abs(expected).max() > 0.1
        np.testing.assert_allclose(program(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(np.asarray(function(mx.array(x))[0]), expected, rtol=1e-3, atol=1e-3)
    code, _, err = run(folder, "mlx", "--data", "words", "--steps", "1")
    assert code == 2 and err.splitlines()[-1].startswith("train.py: words must be") and "skipped 1 files" in err


@pytest.mark.parametrize("i", [0, 1])
def test_core_ml(i, tmp_path):
    coremltools = pytest.importorskip("coremltools")
    trainer = make_trainer("cnn", i, "torch")
    most = {"lenet": 64, "resnet": 1}[trainer.config.model]
    assert f"1 to {most};" in trainer.export(tmp_path / "net.mlpackage", ["a", "b", "c", "d"])
    spec = coremltools.utils.load_spec(str(tmp_path / "net.mlpackage"))
    size, n_in = trainer.config.size, trainer.config.n_in
    (image,), (logits,) = spec.description.input, spec.description.output
    assert list(image.type.multiArrayType.shape) == [1, size, size, n_in] and image.name == "image"
    sizes = image.type.multiArrayType.shapeRange.sizeRanges[:1]
    assert [(size.lowerBound, size.upperBound) for size in sizes] == [(1, 64)] * (most > 1) and logits.name == "logits"
    assert json.loads(spec.description.metadata.userDefined["classes"]) == ["a", "b", "c", "d"]
