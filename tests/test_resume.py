"""A run that is stopped, killed, moved to the other framework or shared continues as if nothing had happened."""

import itertools
import json
import os
import signal
import socket
import time

import numpy as np
import pytest
from adversary import SHORT, arrays_of
from folders import BACKENDS, CASES, SOME, batches, copy_quick, load, make_run, make_trainer, result, run_here, start


@pytest.mark.parametrize("first", BACKENDS)
@pytest.mark.parametrize("name, i", CASES)
def test_resume(name, i, first, tmp_path):
    """Six steps at once, or three, a checkpoint, and three more: the same bits, and nearly so across frameworks."""
    steps, whole = batches(name, i, 6), make_trainer(name, i, first)
    for step, arrays in enumerate(steps):
        if step == 3:
            whole.save(tmp_path / "ckpt.npz", 3)
        whole.step(*arrays, lr=1e-3)
    for second in BACKENDS:
        rest = make_trainer(name, i, second, seed=1)  # other starting weights: all must come from the file
        assert rest.load(tmp_path / "ckpt.npz") == 3
        for arrays in steps[3:]:
            rest.step(*arrays, lr=1e-3)
        a, b = load(name, first).get_weights(whole.model), load(name, second).get_weights(rest.model)
        for key in a:
            tolerance = dict(rtol=0, atol=0) if first == second else dict(rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(b[key], a[key], **tolerance, err_msg=key)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, i", CASES)
def test_files(name, i, backend, tmp_path, monkeypatch):
    """No partial file replaces a complete one; what does not fit, by name, or holds code raises."""
    trainer, path = make_trainer(name, i, backend), tmp_path / "ckpt.npz"
    trainer.step(*batches(name, i, 1)[0], lr=1e-3)
    trainer.save(path, 1)
    with pytest.raises(TypeError), monkeypatch.context() as patch:
        patch.setattr(np, "savez", None)  # what has been opened is not written
        trainer.save(path, 2)
    assert {file.name for file in tmp_path.iterdir()} == {"ckpt.npz", "ckpt.npz.part"}  # fit removes the latter
    assert trainer.load(path) == 1
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
    np.savez(path, **arrays, code=np.array([{}]))
    with pytest.raises(ValueError, match="pickle"):
        trainer.load(path)


@pytest.mark.parametrize("name, backend", SOME)
def test_interrupted(name, backend, tmp_path, monkeypatch):
    """Stopped with Ctrl-C and resumed: the same checkpoint, log and result as without."""
    folder, savez, saved = copy_quick(name, tmp_path / name), np.savez, []

    def stop(*args, **arrays):
        savez(*args, **arrays)
        saved.append(True)
        if len(saved) == 1:  # after the first step
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)  # each step takes long enough to be logged
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", stop)
        code, out, err = run_here(folder, backend, *SHORT[name], "--out", "part")
    assert code == 130 and not err and out.endswith("with --resume continues from step 1\n"), out + err
    ended = []
    for more in (["--out", "part", "--resume"], ["--out", "whole"]):
        figures = result(folder, backend, *SHORT[name], *more, run=run_here)
        log = map(json.loads, (folder / figures["out"] / "log.jsonl").read_text().splitlines())
        rows = [*log, {key: x for key, x in figures.items() if key not in ("seconds", "files", "out", "printed")}]
        ended.append([{key: x for key, x in row.items() if "per_s" not in key} for row in rows])
    assert ended[0] == ended[1]
    np.testing.assert_equal(*(arrays_of(folder / out / "ckpt.npz") for out in ("whole", "part")))


def test_killed(tmp_path):
    """The same with a real process that is killed."""
    folder, ckpt = copy_quick("mlp", tmp_path / "mlp"), tmp_path / "mlp/part/ckpt.npz"
    args = ["--steps", "2000", *SHORT["mlp"][2:], "--batch-size", "16"]
    process = start(folder, "mlx", *args, "--out", "part")
    while not ckpt.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and json.loads(str(arrays_of(ckpt)["meta"]))["step"] < 2000
    for more in (["--out", "part", "--resume"], ["--out", "whole"]):
        result(folder, "mlx", *args, *more)
    np.testing.assert_equal(*(arrays_of(folder / out / "ckpt.npz") for out in ("whole", "part")))


@pytest.mark.parametrize("name, backend, n", [("gpt", "torch", 2), ("gpt", "mlx", 3),
                                              ("llama", "torch", 3), ("llama", "mlx", 2)])  # fmt: skip
def test_processes(name, backend, n, tmp_path):
    """Ctrl-C in one of two stops both after the same step; three take over from one; the result is that of one."""
    folder, ckpt, begun = copy_quick(name, tmp_path / name), tmp_path / name / "out/ckpt.npz", 2 * (n - 2)
    args = "--steps 200 --block-size 16 --n-layer 1 --n-embd 32 --tokens 5 --batch-size 9 --accumulate 2".split()
    args += ["--optimizer", "adamw", "--lr", "1e-3", "--out", folder / "out"]
    task, trainer, rate = make_run(name, *args, backend=backend)

    def train(start, end):
        return [float(trainer.step(*task.batch(i), lr=rate(i))["loss"]) for i in range(start, end)]

    losses = train(0, begun)
    if begun:
        ckpt.parent.mkdir()
        trainer.save(ckpt, begun, **task.extra, args=task.args.memory)
    before = ckpt.stat().st_mtime_ns if begun else 0
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [str(server.getsockname()[1]) for server in servers]
    for server in servers:
        server.close()
    (folder / "hosts").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=ports[0], WORLD_SIZE=str(n), MLX_HOSTFILE=f"{folder}/hosts")
    ranks = [dict.fromkeys(("RANK", "LOCAL_RANK", "MLX_RANK"), str(i)) for i in range(n)]  # as by torchrun, mlx.launch
    several = [start(folder, backend, *args, *["--resume"] * bool(begun), **env, **rank) for rank in ranks]
    while (not ckpt.exists() or ckpt.stat().st_mtime_ns == before) and several[0].poll() is None:
        time.sleep(0.01)
    several[-1].send_signal(signal.SIGINT)
    said = [process.communicate(timeout=300) for process in several]
    assert [process.returncode for process in several] == [130] * n and not any(err for _, err in said), said
    step = json.loads(str((saved := arrays_of(ckpt))["meta"]))["step"]
    assert f"continues from step {step}" in said[0][0] and not any(out for out, _ in said[1:]) and begun < step < 200
    losses += train(begun, step)
    for row in map(json.loads, (ckpt.parent / "log.jsonl").read_text().splitlines()):
        assert row["loss"] == pytest.approx(losses[row["step"] - 1], abs=1e-4)
    assert losses[-1] < losses[0] - 0.01
    trainer.save(tmp_path / "one.npz", 0)
    for key, a in arrays_of(tmp_path / "one.npz").items():
        if key != "meta":
            np.testing.assert_allclose(saved[key], a, rtol=0, atol=1e-3 * np.abs(a).max(), err_msg=key)
    assert trainer.load(ckpt) == step
