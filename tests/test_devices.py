"""What can be tested without the devices: no step waits for the host, and none uses what MPS lacks."""

from contextlib import contextmanager, nullcontext
from unittest import mock

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
