"""A run that is stopped, killed, moved to the other framework or shared continues as if nothing had happened."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from folders import (
    BACKENDS,
    CASES,
    FOLDERS,
    SOME,
    batches,
    copy_alone,
    environment,
    load,
    make_run,
    make_trainer,
    run,
    start,
)

LONG = {  # the steps of a run of one or two seconds, and its other arguments
    "mlp": (3000, ["--hidden", "32"]),
    "cnn": (500, ["--channels", "2", "4", "16", "--batch-size", "8"]),
    "gpt": (120, ["--block-size", "16", "--n-layer", "1", "--n-embd", "32", "--tokens", "20"]),
    "transformer": (150, ["--task", "classify", "--width", "16", "--n-layer", "1", "--batch-size", "8"]),
    "rnn": (150, ["--n-hidden", "32", "--length", "16", "--tokens", "20"]),
    "autoencoder": (300, ["--hidden", "32", "--count", "500"]),
    "gan": (300, ["--model", "gan", "--hidden", "16", "--count", "500", "--batch-size", "16"]),
    "llama": (120, ["--block-size", "16", "--n-layer", "1", "--n-embd", "32", "--tokens", "20"]),
    "diffusion": (300, "--widths 8 --fold 4 --count 100 --batch-size 8 --sample-steps 2".split()),
}


def arrays_of(path):
    with np.load(path, allow_pickle=False) as f:
        return dict(f)


@pytest.mark.parametrize("second", BACKENDS)
@pytest.mark.parametrize("first", BACKENDS)
@pytest.mark.parametrize("name, i", CASES)
def test_resume(name, i, first, second, tmp_path):
    """Six steps at once, or three, a checkpoint, and three more: the same bits, and nearly so across frameworks."""
    steps, whole = batches(name, i, 6), make_trainer(name, i, first)
    for arrays in steps:
        whole.step(*arrays, lr=1e-3)
    part = make_trainer(name, i, first)
    for arrays in steps[:3]:
        part.step(*arrays, lr=1e-3)
    part.save(tmp_path / "ckpt.npz", 3)
    rest = make_trainer(name, i, second, seed=1)  # other starting weights: all must come from the file
    assert rest.load(tmp_path / "ckpt.npz") == 3
    for arrays in steps[3:]:
        rest.step(*arrays, lr=1e-3)
    a, b = load(name, first).get_weights(whole.model), load(name, second).get_weights(rest.model)
    for key in a:
        if first == second:
            assert (a[key] == b[key]).all(), f"{key} differs"
        else:
            np.testing.assert_allclose(b[key], a[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name, i", CASES)
def test_what_does_not_fit_is_refused(name, i, tmp_path):
    """A checkpoint that lacks a weight or a moment, or has it in another shape, raises, in both frameworks."""
    for backend in BACKENDS:
        trainer, path = make_trainer(name, i, backend), tmp_path / "ckpt.npz"
        trainer.step(*batches(name, i, 1)[0], lr=1e-3)
        trainer.save(path, 1)
        arrays = arrays_of(path)
        weights = [key for key in arrays if key in load(name, backend).get_weights(trainer.model)]
        moments = [key for key in arrays if key[:2] in ("m.", "v.")]
        for key in weights[:1] + moments[:1] + moments[-1:]:
            np.savez(path, **{**arrays, key: arrays[key].reshape(-1)[:1][None, None]})
            with pytest.raises(ValueError, match="shape|axes"):
                trainer.load(path)
            np.savez(path, **{other: a for other, a in arrays.items() if other != key})
            with pytest.raises((KeyError, ValueError), match=key.removeprefix("m.").removeprefix("v.")):
                trainer.load(path)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FOLDERS)
def test_death_in_the_middle_of_a_save(name, backend, tmp_path, monkeypatch):
    """A partial file never replaces a complete one."""

    def die(file, **arrays):
        file.write(b"half")
        raise SystemExit

    trainer, path = make_trainer(name, 0, backend), tmp_path / "ckpt.npz"
    trainer.step(*batches(name, 0, 1)[0], lr=1e-3)
    trainer.save(path, 1)
    before = path.read_bytes()
    monkeypatch.setattr(np, "savez", die)
    with pytest.raises(SystemExit):
        trainer.save(path, 2)
    assert path.read_bytes() == before and make_trainer(name, 0, backend).load(path) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL and no SIGINT to send")
@pytest.mark.parametrize("name, backend", SOME)
def test_interrupted(name, backend, tmp_path):
    """Killed, resumed, stopped with Ctrl-C and resumed again: the same checkpoint, bit for bit, as without."""
    folder, ckpt = copy_alone(name, tmp_path / name), tmp_path / name / "part/ckpt.npz"
    steps, args = LONG[name]

    def reached():
        return json.loads(str(arrays_of(ckpt)["meta"]))["step"] if ckpt.exists() else 0

    def changed():
        return ckpt.stat().st_mtime_ns if ckpt.exists() else 0

    def interrupt(how, *more):
        """Send a signal once a checkpoint is written; False if the training was over before."""
        before, process = changed(), start(folder, backend, "--steps", steps, *args, "--out", "part", *more)
        while changed() == before and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(how)
        out, err = process.communicate()
        if process.returncode == 0 or reached() == steps:  # the signal came after the last step
            return False
        assert process.returncode == (130 if how == signal.SIGINT else -how), err
        assert how != signal.SIGINT or f"goes on from step {reached()}" in out and not err
        return True

    while not (interrupt(signal.SIGKILL) and interrupt(signal.SIGINT, "--resume")):
        shutil.rmtree(folder / "part")  # this machine is too fast for that many steps
        steps *= 4
    for more in (["--out", "part", "--resume"], ["--out", "whole"]):
        code, _, err = run(folder, backend, "--steps", steps, *args, *more)
        assert code == 0, err
    a, b = arrays_of(folder / "whole/ckpt.npz"), arrays_of(ckpt)
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key] == b[key]).all(), f"{key} differs"


# ---- several processes -----------------------------------------------------------------------------------------------


def start_several(n, folder, backend, *args):
    """n processes that share a run over local addresses, started as by torchrun and mlx.launch."""
    found = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [str(s.getsockname()[1]) for s in found]
    for s in found:
        s.close()
    (folder / "hosts").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    env = {**environment(backend), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0], "WORLD_SIZE": str(n)}
    command = [sys.executable, "train.py", "--backend", backend, "--device", "cpu", *map(str, args)]
    return [
        subprocess.Popen(
            command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**env, "RANK": str(i), "LOCAL_RANK": str(i), "MLX_RANK": str(i), "MLX_HOSTFILE": f"{folder}/hosts"},
        )
        for i in range(n)
    ]  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_processes(name, backend, tmp_path):
    """Ctrl-C in one of two stops both after the same step; the result is that of one process; one or three continue."""
    folder, ckpt = copy_alone(name, tmp_path / name), tmp_path / name / "two/ckpt.npz"
    args = "--steps 1000 --block-size 16 --n-layer 1 --n-embd 32 --tokens 5 --batch-size 9 --accumulate 2".split()
    args += "--optimizer adamw --lr 1e-4".split()
    two = start_several(2, folder, backend, *args, "--out", "two")
    while not ckpt.exists() and two[0].poll() is None:
        time.sleep(0.01)
    two[1].send_signal(signal.SIGINT)
    said = [process.communicate(timeout=300) for process in two]
    assert [process.returncode for process in two] == [130, 130] and not (said[0][1] or said[1][1]), said
    step = json.loads(str(arrays_of(ckpt)["meta"]))["step"]
    assert f"goes on from step {step}" in said[0][0] and not said[1][0] and 0 < step < 1000
    task, trainer, rate = make_run(name, *args, backend=backend)
    losses = [float(trainer.step(*task.batch(i), lr=rate(i))["loss"]) for i in range(step)]
    for row in map(json.loads, (ckpt.parent / "log.jsonl").read_text().splitlines()):
        assert row["loss"] == pytest.approx(losses[row["step"] - 1], abs=1e-4)
    assert losses[-1] < losses[0] - 0.01
    shutil.copytree(ckpt.parent, folder / "three")
    for out in (folder / "two", folder / "three"):  # after so many steps, and after three more
        trainer.save(tmp_path / "one.npz", 0)
        for key, a in arrays_of(tmp_path / "one.npz").items():
            if key != "meta":
                atol = 1e-3 * np.abs(a).max()
                np.testing.assert_allclose(arrays_of(out / "ckpt.npz")[key], a, rtol=0, atol=atol, err_msg=key)
        if out.name == "two":
            more = ["--steps", step + 3, "--lr", 0.01]
            three = start_several(3, folder, backend, "--resume", "--out", "three", *more)
            said = [process.communicate(timeout=300) for process in three]
            assert [process.returncode for process in three] == [0] * 3 and said[0][0].count("result ") == 1, said
            assert trainer.load(ckpt) == step
            _, _, rate = make_run(name, *args, *more, backend=backend)
            for i in range(step, step + 3):
                trainer.step(*task.batch(i), lr=rate(i))
