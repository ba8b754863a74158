"""Does the command line keep all its promises?  python tests/adversary.py [FOLDER ...]

Gives each folder what a user, a full disk or another program might: damaged and edited checkpoints, flags that
contradict them, files of the wrong kind, signals. Each must end with one line and exit code 2, and lose nothing.
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
from folders import FOLDERS, copy_alone, environment, run, run_here

SHORT = {  # runs of about a second
    "mlp": ["--steps", "20", "--hidden", "8"],
    "cnn": ["--steps", "4", "--channels", "2", "4", "16", "--batch-size", "16"],
    "gpt": ["--steps", "4", "--block-size", "16", "--n-layer", "1", "--n-embd", "32", "--tokens", "5"],
    "transformer": ["--steps", "4", "--task", "classify", "--width", "16", "--n-layer", "1", "--batch-size", "8"],
    "rnn": ["--steps", "4", "--n-hidden", "16", "--length", "8", "--tokens", "5"],
    "autoencoder": ["--steps", "10", "--hidden", "8", "--count", "200"],
    "gan": ["--steps", "10", "--model", "gan", "--hidden", "8", "--count", "200"],
    "llama": ["--steps", "4", "--block-size", "16", "--n-layer", "1", "--n-embd", "32", "--tokens", "5"],
    "diffusion": "--steps 4 --widths 8 --fold 4 --count 100 --batch-size 8 --sample-steps 2".split(),
}
CONTRADICTIONS = {  # flags that a resumed SHORT run refuses by name
    "mlp": ["--task binary", "--hidden 32", "--activation tanh", "--optimizer sgd", "--data other.csv"],
    "cnn": ["--task style", "--model resnet", "--channels 4 4 16", "--size 20"],
    "gpt": ["--n-layer 3", "--n-embd 64", "--n-head 2", "--tokenizer bpe", "--task chat", "--data other.txt"],
    "transformer": ["--task clip", "--width 32", "--n-layer 2", "--norm post", "--positions learned", "--patch 7"],
    "rnn": ["--task series", "--cell gru", "--n-hidden 32", "--n-embd 9", "--n-layer 2", "--data other.txt"],
    "autoencoder": ["--task denoise", "--hidden 16", "--latent 3", "--net conv", "--count 300", "--data flowers"],
    "gan": ["--task toy", "--model dcgan", "--hidden 9", "--loss minimax", "--latent 3", "--count 300"],
    "llama": ["--n-layer 3", "--n-embd 64", "--n-kv-head 4", "--size 135M", "--data other.txt"],
    "diffusion": ["--task toy", "--widths 8 16", "--predict noise", "--schedule linear", "--count 200", "--size 32"],
}
OTHER = {"other.txt": "The other text is not the same one.\n" * 300, "other.csv": "a,b,c\n" + "1.5,2,0\n3,-1,1\n" * 100}


def edited(meta, **changes):
    return json.dumps({**meta, **changes})


def edits(arrays):
    """{what was done: the arrays of the edited checkpoint}, each of which --resume must refuse."""
    meta = json.loads(str(arrays["meta"]))
    config, weights = meta["config"], [name for name in arrays if name != "meta" and not name.startswith(("m.", "v."))]
    moment = next((name for name in arrays if name.startswith("m.")), weights[0])
    sizes = [name for name, value in config.items() if type(value) is int and value > 0][:3]
    metas = {
        "no JSON": "{", "a list": "[1]", "deep": "[" * 100_000 + "]" * 100_000,
        "config a list": edited(meta, config=[1]), "step a word": edited(meta, step="a"),
        "step -1": edited(meta, step=-1),
        "unknown field": edited(meta, config={**config, "n_wings": 2}), "step NaN": edited(meta, step=float("nan")),
        "no config": json.dumps({key: x for key, x in meta.items() if key != "config"}),
        "no step": json.dumps({key: x for key, x in meta.items() if key != "step"}),
        **{f"{name} {bad}": edited(meta, config={**config, name: bad}) for name in sizes for bad in (-1, 10**9, "a")},
    }  # fmt: skip
    found = {what: {**arrays, "meta": text} for what, text in metas.items()}
    found["no meta"] = {name: a for name, a in arrays.items() if name != "meta"}
    found["no array"] = {name: a for name, a in arrays.items() if name != weights[0]}
    found["other shape"] = {**arrays, weights[0]: np.zeros((3, 2, 1), np.float32)}
    found["moment of other shape"] = {**arrays, moment: np.zeros((3, 2, 1), np.float32)}
    found["NaN"] = {**arrays, **{name: arrays[name] * np.float32(np.nan) for name in weights}}
    return found


class Folder:
    """A folder copied alone to `place`, with the checkpoint of a short run; cases() lists what it must withstand."""

    def __init__(self, name, place):
        self.name, self.path = name, copy_alone(name, Path(place) / name)
        for file, text in OTHER.items():
            (self.path / file).write_text(text, encoding="utf-8")
        code, _, err = run(self.path, "mlx", *SHORT[name])
        assert code == 0, err
        self.ckpt = next(self.path.glob("out/*/ckpt.npz"))
        self.before = self.ckpt.read_bytes()
        with np.load(self.ckpt) as f:
            self.arrays = dict(f)

    def refused(self, *args, reason="", **options):
        """One line that names the reason, exit code 2, and the checkpoint unchanged."""
        if options:
            command = [sys.executable, "train.py", "--backend", "mlx", "--device", "cpu", *map(str, args)]
            env = {**environment("mlx"), **options.pop("env", {})}
            process = subprocess.run(command, cwd=self.path, env=env, stderr=subprocess.PIPE, text=True, **options)
            code, err = process.returncode, process.stderr
        else:
            code, _, err = run_here(self.path, "mlx", *args)
        assert code == 2, f"exit code {code}: {err[-300:]}"
        assert err.startswith("train.py: ") and len(err.splitlines()) == 1 and len(err) < 1200, err[:500]
        assert reason in err, f"{reason!r} is not in: {err}"
        assert self.ckpt.read_bytes() == self.before, "the checkpoint is another"

    def copy(self, name, arrays=None):
        """A separate folder OUT with this checkpoint, or with that of the short run."""
        (self.path / name).mkdir()
        if arrays is None:
            (self.path / name / "ckpt.npz").write_bytes(self.before)
        else:
            np.savez(self.path / name / "ckpt.npz", **arrays)
        return name

    def cases(self):
        """(what is tried, a function that raises AssertionError where the promise is broken)."""
        more, short = ["--resume", "--steps", "30"], SHORT[self.name][2:]
        for i, (what, arrays) in enumerate(edits(self.arrays).items()):
            yield what, functools.partial(self.edited, f"edited{i}", arrays, what, more)
        for i, flags in enumerate(CONTRADICTIONS[self.name]):
            yield f"--resume {flags}", functools.partial(self.contradicted, f"against{i}", [*more, *flags.split()])
        out = iter(f"run{i}" for i in range(99))
        for flags, reason in (
            (["--seed", 2**63], "--seed"), (["--batch-size", 10**9], "--batch-size"), (["--lr", "inf"], "--lr"),
            (["--data", "x" * 5000], "x"), (["--data", "\udcff\udcfe"], ""), (["--step", "3"], "--step"),
        ):  # fmt: skip
            yield f"{flags[0]} {str(flags[1])[:20]!a}", functools.partial(
                self.refused, *short, "--steps", "2", "--out", next(out), *flags, reason=reason)  # fmt: skip
        yield "--out of 5,000 letters", functools.partial(self.refused, *short, "--out", "y" * 5000)
        for case in (
            self.compressed, self.two_runs, self.killed_run, self.foreign_lock, self.wrong_kinds, self.full_disk_later,
            self.full_stdout, self.ascii_terminal, self.no_pillow, self.old_is_kept, self.untrained,
            self.interrupted_early, self.interrupted_late,
        ):  # fmt: skip
            yield case.__name__.replace("_", " "), case

    def edited(self, out, arrays, what, more):
        reason = "finite" if what == "NaN" else what.split()[0] if what.split()[-1] in ("-1", "1000000000") else ""
        self.refused(*more, "--out", self.copy(out, arrays), reason=reason)

    def contradicted(self, out, flags):
        reason = "other data" if "--data" in flags and "other" in flags[-1] else flags[3]
        self.refused("--out", self.copy(out), *flags, reason=reason)

    def compressed(self):
        (self.path / "small").mkdir()
        np.savez_compressed(self.path / "small/ckpt.npz", **self.arrays, more=np.zeros(10**7))
        self.refused("--resume", "--steps", "30", "--out", "small", reason="compressed")

    def two_runs(self):
        """A folder that another process is using."""
        (self.path / self.copy("busy") / "lock").write_text(str(os.getppid()))
        self.refused(*SHORT[self.name], "--out", "busy", reason="in use")

    def killed_run(self):
        """The lock of a dead run does not block a new one."""
        (self.path / self.copy("dead") / "lock").write_text("4999999")
        code, _, err = run(self.path, "mlx", "--resume", "--steps", "0", "--out", "dead")
        assert code == 0 and not (self.path / "dead/lock").exists(), err

    def wrong_kinds(self):
        """A folder where a file should be written."""
        for file in ("ckpt.npz", "log.jsonl", "curve.png", FOLDERS[self.name].files[0]):
            (self.path / f"kinds_{file}" / file).mkdir(parents=True)
            self.refused(*SHORT[self.name], "--out", f"kinds_{file}")

    def foreign_lock(self):
        """The user's own file with the name of the lock."""
        lock = self.path / self.copy("mine") / "lock"
        lock.write_text("my bicycle")
        self.refused(*SHORT[self.name], "--out", "mine", reason="no lock")
        assert lock.read_text() == "my bicycle"

    def full_disk_later(self):
        """A disk that is full once the checkpoint has been written: the plots and texts after it do not fit."""
        for file in ("curve.png", FOLDERS[self.name].files[0]):
            (self.path / f"full_{file}").mkdir()
            (self.path / f"full_{file}" / file).symlink_to("/dev/full")
            self.refused(*SHORT[self.name], "--out", f"full_{file}", reason="make room")
            assert (self.path / f"full_{file}/ckpt.npz").stat().st_size == len(self.before)

    def full_stdout(self):
        with open("/dev/full", "w") as full:
            self.refused("--resume", "--steps", "0", "--out", self.copy("full"), stdout=full)

    def ascii_terminal(self):
        command = [sys.executable, *"train.py --backend mlx --resume --steps 0 --out".split(), self.copy("ascii")]
        env = environment("mlx") | {"PYTHONIOENCODING": "ascii"}
        process = subprocess.run(command, cwd=self.path, env=env, capture_output=True)
        assert process.returncode == 0 and not process.stderr, process.stderr

    def no_pillow(self):
        (self.path / "without/PIL").mkdir(parents=True)
        (self.path / "without/PIL/__init__.py").write_text("raise ImportError('No module named PIL')")
        self.refused(*SHORT[self.name], "--out", "pillow", env={"PYTHONPATH": "without"}, reason="pip install")

    def old_is_kept(self):
        """A new run says what happens to the old checkpoint, and keeps it beside its own."""
        code, out, err = run(self.path, "mlx", *SHORT[self.name], "--seed", "5", "--out", self.copy("old"))
        assert code == 0 and "becomes ckpt.old.npz" in out.splitlines()[0], out + err
        assert (self.path / "old/ckpt.old.npz").read_bytes() == self.before != (self.path / "old/ckpt.npz").read_bytes()

    def untrained(self):
        code, out, err = run(self.path, "mlx", *SHORT[self.name][2:], "--steps", "0", "--out", "untrained")
        assert code == 0 and "weights are random" in out.splitlines()[0], out + err

    def interrupted_early(self):
        """Ctrl-C while importing libraries, loading data or making the first step: no traceback."""
        command = [sys.executable, "train.py", "--backend", "mlx", *SHORT[self.name][2:], "--steps", "100000"]
        for i, wait in enumerate((0, 0.2, 1)):
            pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            process = subprocess.Popen([*command, "--out", f"e{i}"], cwd=self.path, env=environment("mlx"), **pipes)
            while process.poll() is None and "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():
                time.sleep(0.01)
            time.sleep(wait)
            process.send_signal(signal.SIGINT)
            try:
                _, err = process.communicate(timeout=10)
            except subprocess.TimeoutExpired:  # MLX was compiling: system() ignores Ctrl-C until g++ has ended
                process.send_signal(signal.SIGINT)
                _, err = process.communicate(timeout=60)
            assert process.returncode in (130, -signal.SIGINT) and not err, f"after {wait} s: {err[-300:]}"

    def interrupted_late(self):
        """Ctrl-C in the last step, or in the evaluation and sampling after it: no traceback, nothing lost."""
        command = [sys.executable, "-u", "train.py", "--backend", "mlx", *SHORT[self.name]]
        for i, wait in enumerate((0, 0.02, 0.1)):
            pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            process = subprocess.Popen([*command, "--out", f"late{i}"], cwd=self.path, env=environment("mlx"), **pipes)
            while process.stdout.readline().startswith(f"{self.name}: "):  # the line of the last step comes next
                pass
            time.sleep(wait)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
            assert process.returncode in (0, 130, -signal.SIGINT) and not err, f"after {wait} s: {err[-300:]}"
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
