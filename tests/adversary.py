"""Does the command line keep all its promises?  python tests/adversary.py [FOLDER ...]

Gives each folder edited checkpoints, files of the wrong kind, full disks, signals: each must end with one line and
exit code 2, and lose nothing. Most flags and files that are refused are in test_faults.py.
"""

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from folders import FOLDERS, copy_quick, result, run_here, start

SHORT = {name: flags.split() for name, flags in {  # runs of about a second
    "mlp": "--steps 20 --hidden 8", "cnn": "--steps 4 --channels 2 4 16 --batch-size 16",
    "gpt": "--steps 4 --block-size 16 --n-layer 1 --n-embd 32 --tokens 5",
    "transformer": "--steps 4 --task classify --width 16 --n-layer 1 --batch-size 8",
    "rnn": "--steps 4 --n-hidden 16 --length 8 --tokens 5", "autoencoder": "--steps 10 --hidden 8 --count 200",
    "gan": "--steps 10 --model gan --hidden 8 --count 200",
    "llama": "--steps 4 --block-size 16 --n-layer 1 --n-embd 32 --tokens 5",
    "diffusion": "--steps 4 --widths 8 --fold 4 --count 100 --batch-size 8 --sample-steps 2",
}.items()}  # fmt: skip


def arrays_of(path):
    """All that a checkpoint holds, by name."""
    with np.load(path, allow_pickle=False) as f:
        return dict(f)


def edits(arrays):
    """{what was done: the arrays of the edited checkpoint}, each of which --resume must refuse."""
    meta = json.loads(str(arrays["meta"]))

    def edited(**changes):
        return json.dumps({**meta, **changes})

    config, weights = meta["config"], [name for name in arrays if name != "meta" and not name.startswith(("m.", "v."))]
    sizes = [name for name, value in config.items() if type(value) is int and value > 0][:3]
    without = {key: json.dumps({name: x for name, x in meta.items() if name != key}) for key in ("config", "step")}
    metas = {
        "no JSON": "{", "a list": "[1]", "deep": "[" * 100_000 + "]" * 100_000,
        "config a list": edited(config=[1]), "step a word": edited(step="a"),
        "step -1": edited(step=-1), "no config": without["config"], "no step": without["step"],
        "unknown field": edited(config={**config, "n_wings": 2}), "step NaN": edited(step=float("nan")),
        **{f"{name} {bad}": edited(config={**config, name: bad}) for name in sizes for bad in (-1, 10**9, "a")},
    }  # fmt: skip
    found = {what: {**arrays, "meta": text} for what, text in metas.items()}
    for key in ("meta", weights[0]):
        found[f"no {key}"] = {name: a for name, a in arrays.items() if name != key}
    found["other shape"] = {**arrays, weights[0]: np.zeros((3, 2, 1), np.float32)}
    return {**found, "NaN": {**arrays, **{name: arrays[name] * np.float32(np.nan) for name in weights}}}


class Folder:
    """A folder copied alone to `place`, with the checkpoint of a short run; cases() lists what it must withstand."""

    def __init__(self, name, place, files=()):
        self.name, self.path = name, copy_quick(name, Path(place) / name)
        for file, content in files:
            (self.path / file).parent.mkdir(parents=True, exist_ok=True)
            (self.path / file).write_bytes(content)
        result(self.path, "mlx", *SHORT[name], run=run_here)
        self.ckpt = next(self.path.glob("out/*/ckpt.npz"))
        self.before, self.arrays = self.ckpt.read_bytes(), arrays_of(self.ckpt)

    def refused(self, *args, backend="mlx", reason="", **options):
        """One line that names the reason, which is returned, exit code 2, and the checkpoint unchanged."""
        if options:
            process = start(self.path, backend, *args, **options)
            (out, err), code = process.communicate(), process.returncode
        else:
            code, out, err = run_here(self.path, backend, *args)
        assert code == 2, f"exit code {code}: {err[-300:]}"
        assert err.startswith("train.py: ") and len(err.splitlines()) == 1 and len(err) < 1200, err[:500]
        assert reason in err, f"{reason!r} is not in: {err}"
        assert "result {" not in (out or "") and not list(self.path.glob("**/*.part"))
        assert self.ckpt.read_bytes() == self.before, "the checkpoint is another"
        return err

    def copy(self, name):
        """A separate folder OUT with the checkpoint of the short run."""
        (self.path / name).mkdir()
        (self.path / name / "ckpt.npz").write_bytes(self.before)
        return name

    def cases(self):
        """(what is tried, a function that raises AssertionError where the promise is broken)."""
        more, short = ["--resume", "--steps", "30"], SHORT[self.name][2:]
        for i, (what, arrays) in enumerate(edits(self.arrays).items()):
            yield what, functools.partial(self.edited, f"edited{i}", arrays, what, more)
        for i, (flag, value, reason) in enumerate((
            ("--seed", 2**63, "--seed"), ("--batch-size", 10**9, "--batch-size"), ("--lr", "inf", "--lr"),
            ("--data", "x" * 5000, "x"), ("--data", "\udcff\udcfe", ""), ("--step", "3", "--step"),
            ("--out", "y" * 5000, ""),
        )):  # fmt: skip
            args = [*short, "--steps", "2", "--out", f"run{i}", flag, value]
            yield f"{flag} {str(value)[:20]!a}", functools.partial(self.refused, *args, reason=reason)
        for name in [name for name in vars(Folder) if name.startswith("case_")]:
            yield name[5:].replace("_", " "), getattr(self, name)

    def edited(self, out, arrays, what, more):
        reason = "finite" if what == "NaN" else what.split()[0] if what.split()[-1] in ("-1", "1000000000") else ""
        np.savez(self.path / self.copy(out) / "ckpt.npz", **arrays)
        self.refused(*more, "--out", out, reason=reason)

    def case_compressed(self):
        np.savez_compressed(self.path / self.copy("small") / "ckpt.npz", **self.arrays, more=np.zeros(10**7))
        self.refused("--resume", "--steps", "30", "--out", "small", reason="compressed")

    def case_locks(self):
        """A folder that another process is using; the user's own file with the name of the lock, which is kept."""
        for out, text, reason in (("busy", str(os.getppid()), "in use"), ("mine", "my bicycle", "not a lock")):
            lock = self.path / self.copy(out) / "lock"
            lock.write_text(text)
            self.refused(*SHORT[self.name], "--out", out, reason=reason)
            assert lock.read_text() == text

    def case_killed_run(self):
        """The lock of a dead run does not block a new one."""
        (self.path / self.copy("dead") / "lock").write_text("4999999")
        result(self.path, "mlx", "--resume", "--steps", "0", "--out", "dead")
        assert not (self.path / "dead/lock").exists()

    def case_wrong_kinds(self):
        """A folder where a file should be written."""
        for file in ("ckpt.npz", "log.jsonl", "curve.png", FOLDERS[self.name].files[0]):
            (self.path / f"kinds_{file}" / file).mkdir(parents=True)
            self.refused(*SHORT[self.name], "--out", f"kinds_{file}")

    def case_full_disk_later(self):
        """A disk that is full once the checkpoint has been written: the plots and texts after it do not fit."""
        for file in ("curve.png", FOLDERS[self.name].files[0]):
            (self.path / f"full_{file}").mkdir()
            (self.path / f"full_{file}" / file).symlink_to("/dev/full")
            self.refused(*SHORT[self.name], "--out", f"full_{file}", reason="make room")
            assert (self.path / f"full_{file}/ckpt.npz").stat().st_size == len(self.before)

    def case_full_stdout(self):
        with open("/dev/full", "w") as full:
            self.refused("--resume", "--steps", "0", "--out", self.copy("full"), stdout=full)

    def case_ascii_terminal(self):
        process = start(self.path, "mlx", "--resume", "--steps", 0, "--out", self.copy("tty"), PYTHONIOENCODING="ascii")
        err = process.communicate()[1]
        assert process.returncode == 0 and not err, err

    def case_no_pillow(self):
        (self.path / "without/PIL").mkdir(parents=True)
        (self.path / "without/PIL/__init__.py").write_text("raise ImportError('No module named PIL')")
        self.refused(*SHORT[self.name], "--out", "pillow", PYTHONPATH="without", reason="pip install")

    def case_old_is_kept(self):
        """A new run says what happens to the old checkpoint, and keeps it beside its own."""
        ended = result(self.path, "mlx", *SHORT[self.name], "--seed", "5", "--out", self.copy("old"), run=run_here)
        assert "becomes ckpt.old.npz" in ended["printed"].splitlines()[0]
        assert (self.path / "old/ckpt.old.npz").read_bytes() == self.before != (self.path / "old/ckpt.npz").read_bytes()

    def case_untrained(self):
        ended = result(self.path, "mlx", *SHORT[self.name][2:], "--steps", "0", "--out", "untrained", run=run_here)
        assert "weights are random" in ended["printed"].splitlines()[0]

    def interrupt(self, process, wait):
        """Ctrl-C after so many seconds: no traceback; returns the exit code."""
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:  # MLX was compiling: system() ignores Ctrl-C until g++ has ended
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert process.returncode in (0, 130, -signal.SIGINT) and not err, f"after {wait} s: {err[-300:]}"
        return process.returncode

    def case_interrupted_early(self):
        """While importing libraries, loading data or making the first step."""
        for i, wait in enumerate((0, 0.2, 1)):
            process = start(self.path, "mlx", *SHORT[self.name][2:], "--steps", "100000", "--out", f"e{i}")
            while process.poll() is None and "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():
                time.sleep(0.01)
            assert self.interrupt(process, wait) != 0

    def case_interrupted_late(self):
        """In the last step, or in the evaluation and sampling after it: nothing is lost."""
        for i, wait in enumerate((0, 0.02, 0.1)):
            process = start(self.path, "mlx", *SHORT[self.name], "--out", f"late{i}")
            while process.stdout.readline().startswith(f"{self.name}: "):  # the line of the last step comes next
                pass
            self.interrupt(process, wait)
            assert (self.path / f"late{i}/ckpt.npz").stat().st_size == len(self.before)


def attack(name):
    """How many cases of a folder there are, and those that failed: [(what, the reason), ...]."""
    n, failures = 0, []
    with tempfile.TemporaryDirectory() as place:
        for n, (what, case) in enumerate(Folder(name, place).cases(), 1):
            try:
                case()
            except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
                failures.append((what, str(error).strip().replace("\n", " | ") or repr(error)))
    return n, failures


def main():
    passed, failed, names = 0, 0, sys.argv[1:] or list(FOLDERS)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for name, (n, failures) in zip(names, pool.map(attack, names)):
            for what, reason in failures:
                print(f"{name}: {what}: {reason}", flush=True)
            passed, failed = passed + n - len(failures), failed + len(failures)
            print(f"{name:12} {n - len(failures)} of {n}", flush=True)
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
