"""What can be tested without the devices: no step waits for the host, none uses what MPS lacks, MLX's are compiled."""

import ctypes
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
import torch
from folders import CASES, batches, load, make_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LACKING = {  # missing on Apple's GPUs, of what a network might use (torch 2.13); nor is there float64
    "aten.linalg_lstsq", "aten.linalg_svd", "aten.linalg_eig", "aten.linalg_qr", "aten._linalg_eigh", "aten.histc",
    "aten.grid_sampler_3d", "aten.max_pool3d_with_indices", "aten.avg_pool3d", "aten._ctc_loss", "aten.logcumsumexp",
    "aten.igamma", "aten.lgamma", "aten.digamma", "aten.polygamma", "aten.special_i1", "aten._pdist_forward",
}  # fmt: skip
COMPILED = [  # one or two of each folder that compiles MLX's step on a GPU
    ("mlp", 0), ("mlp", 2), ("cnn", 0), ("cnn", "style"), ("rnn", 0), ("rnn", 1), ("gan", 0), ("gan", 1),
    ("autoencoder", 2), ("transformer", 0), ("transformer", 2), ("diffusion", 2), ("diffusion", 3),
]  # fmt: skip
WAITING = {"aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.unique", "aten._unique2", "aten.equal"}


class AppleGPU(TorchDispatchMode):
    """Refuses what MPS lacks, and what makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).rsplit(".", 1)[0]
        assert name not in LACKING | WAITING, name
        out = func(*args, **kwargs or {})
        kinds = {x.dtype for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        assert not kinds & {torch.float64, torch.complex128}, f"{name} in 64 bits"
        return out


def on_meta(name, i):
    """A Trainer on the device `meta`, which has shapes and no numbers, so that a copy to the host is an error."""
    with mock.patch.object(load(name, "torch"), "init_weights", lambda *_: None):
        return make_trainer(name, i, "torch", device="meta")


@contextmanager
def apple():
    """The rules of an Apple GPU for what runs on `meta`, a device that autocast does not know."""
    with mock.patch("torch.autocast", lambda *_, **__: nullcontext()), AppleGPU():
        yield


@pytest.mark.parametrize("name, i", CASES)
def test_step(name, i):
    trainer = on_meta(name, i)
    for arrays in batches(name, i, 2 if name == "rnn" else 1):  # an RNN carries its state to the second
        with apple():
            metrics = trainer.step(*arrays, lr=1e-3)
        assert all(metric.shape == () and metric.device.type == "meta" for metric in metrics.values())


@pytest.mark.parametrize("careless, reason", [(float, "_local_scalar_dense"), (lambda loss: loss.double(), "64 bits")])
def test_a_fault_is_noticed(careless, reason):
    """The same test fails if a step does wait, or uses 64 bits."""
    net, trainer = load("gpt", "torch"), on_meta("gpt", 0)
    with mock.patch.object(net, "loss_fn", lambda *args, right=net.loss_fn: careless(right(*args))), apple():
        with pytest.raises((RuntimeError, AssertionError), match=reason):
            trainer.step(*batches("gpt", 0, 1)[0], lr=1e-3)


@pytest.fixture
def unfused():
    """What MLX compiles is traced and simplified as ever, but has the usual kernels: g++ would take a second for each.

    Python has no name for this mode, so the C++ function is called under its full name, where that is found.
    """
    library = ctypes.CDLL(str(next(Path(mx.__file__).parent.glob("lib/libmlx.*"))))
    set_compile_mode = getattr(library, "_ZN3mlx4core16set_compile_modeENS0_11CompileModeE", lambda mode: None)
    set_compile_mode(2)
    yield
    set_compile_mode(3)


@pytest.mark.skipif(not shutil.which("g++"), reason="without g++, MLX compiles nothing for a CPU")
@pytest.mark.parametrize("name, i", COMPILED)
def test_compiled(name, i, unfused, tmp_path):
    """On a GPU MLX's step is one function, traced once. Here, on the CPU, it has the numbers of the plain step."""

    def make(device):
        if i == "style":
            net, images = load("cnn", "mlx"), np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
            return net.Stylist(net.Config(model="style"), *images, device=device)
        more = dict(ema=0.9, dropout=0.1 if i == 2 else 0.0) if name == "transformer" else {}
        return make_trainer(name, i, "mlx", device=device, **more)

    def count(f, **state):
        return compile(lambda *args: traces.append(f) or f(*args), **state)

    plain, traces, compile = make("cpu"), [], mx.compile
    with mock.patch.object(mx, "set_default_device"), mock.patch.object(mx, "compile", count):
        trainer, late = make("gpu"), make("gpu")
    steps = [()] * 6 if i == "style" else batches(name, i, 6)
    late.step(*steps[0], lr=0.1)
    for n, arrays in enumerate(steps):
        if n == 4:  # a function that was traced with other weights goes on with those of the file
            trainer.save(tmp_path / "ckpt.npz", n)
            assert late.load(tmp_path / "ckpt.npz") == n
        running = (plain, trainer) if n < 4 else (plain, trainer, late)
        figures = [[*map(float, x.step(*arrays, lr=0.02 / (n + 1)).values())] for x in running]
        assert figures[0] == pytest.approx(figures[1], rel=1e-4, abs=1e-5) and figures[-1] == figures[1]
    assert len(traces) == (4 if name == "diffusion" and trainer.config.first else 2)  # one for each phase
    for x, file in ((plain, "plain.npz"), (late, "late.npz")):
        x.save(tmp_path / file, len(steps))
    with np.load(tmp_path / "plain.npz") as a, np.load(tmp_path / "late.npz") as b:  # weights, moments and averages
        for key in set(a) - {"meta"}:  # a bias with no effect has a gradient of rounding errors, which Adam amplifies
            np.testing.assert_allclose(a[key], b[key], rtol=0, atol=1e-3 * np.abs(a[key]).max() + 1e-4, err_msg=key)
