"""How fast do the default runs train here?  python tests/speed.py [FOLDER ...]

Prints a row per folder: tokens or samples per second in the training step, in both frameworks; in brackets its
operations per second as a share of those in products of 1024x1024 matrices in the same framework.
"""

import contextlib
import importlib
import io
import json
import runpy
import statistics
import subprocess
import sys
import tempfile
import timeit

from folders import BACKENDS, FOLDERS, ROOT, environment

WARM, TIMED = 5, 20  # steps
TOKENS = {"rnn", "gpt", "llama"}  # the others have samples: images, points, pairs of sentences


def median(function, n):
    """The median time of n calls, in seconds."""
    return statistics.median(timeit.repeat(function, number=1, repeat=n))


def measure(name, backend, out):
    """The default run of a folder until its first steps are timed: {seconds, samples, flop, peak} as JSON on stdout."""
    sys.path.insert(0, str(ROOT / name))
    net = importlib.import_module(f"model_{backend}")

    def timed(trainer, *arrays, **more):
        def once():  # reading a figure waits until it is computed
            return [float(value) for value in step(trainer, *arrays, **more).values()]

        median(once, WARM)
        size = arrays[-1].size if name == "gan" else arrays[0].size if name in TOKENS else len(arrays[0])
        figures = {"seconds": median(once, TIMED), "samples": size, "peak": peak(backend)}
        figures |= {"flop": operations(once)} if backend == "torch" else {}
        print(json.dumps(figures), file=sys.__stdout__, flush=True)
        raise SystemExit(0)

    step, net.Trainer.step = net.Trainer.step, timed
    sys.argv = ["train.py", "--backend", backend, "--device", "cpu", "--out", out]
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
        runpy.run_path(str(ROOT / name / "train.py"), run_name="__main__")


def operations(function):
    """The floating-point operations of a call, with attention in its plain form, which the counter knows."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak(backend, n=1024):
    """Floating-point operations per second in products of two n x n matrices."""
    library = importlib.import_module({"torch": "torch", "mlx": "mlx.core"}[backend])
    a = library.ones((n, n))
    return 2 * n**3 / median(lambda: a @ a if backend == "torch" else library.eval(a @ a), 20)


def main():
    print(f"{'':12} {'':10} {'torch':>18} {'MLX':>18}")
    for name in sys.argv[1:] or FOLDERS:
        row, flop = "", None
        for backend in BACKENDS:
            with tempfile.TemporaryDirectory() as out:
                command = [sys.executable, __file__, "--measure", name, backend, out]
                run = subprocess.run(command, env=environment(backend), capture_output=True, text=True)
            if run.returncode:
                sys.exit(f"{name} in {backend}: {run.stderr}")
            figures = json.loads(run.stdout)
            flop = figures.get("flop", flop)  # the twins do the same sums
            share = flop / figures["seconds"] / figures["peak"]
            row += f" {figures['samples'] / figures['seconds']:>10,.0f} ({share:4.0%})"
        print(f"{name:12} {'tokens/s' if name in TOKENS else 'samples/s':10}{row}", flush=True)


if __name__ == "__main__":
    measure(*sys.argv[2:]) if sys.argv[1:2] == ["--measure"] else main()
