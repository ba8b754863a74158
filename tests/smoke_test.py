"""Does every folder run, alone and in both frameworks, and learn?  python tests/smoke_test.py [torch|mlx] [FOLDER ...]

Copies each folder to an empty place, runs its train.py there for a few seconds, checks a figure against a bound that an
untrained model fails, and checks the files that it wrote. Needs only the five packages. With --device cuda (mps, gpu
...) it runs there, and on the CPU too: if the figures differ, the arithmetic there can't be trusted.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from folders import BACKENDS, FOLDERS, copy_alone, result
from PIL import Image


def check(name, backend, place, device="cpu"):
    """The short run of one folder, copied alone: raises AssertionError with the reason if it breaks a promise."""
    folder, began = FOLDERS[name], time.perf_counter()
    alone = copy_alone(name, Path(place) / f"{name}_{backend}_{device}")
    ended, (figure, sign, bound) = result(alone, backend, "--device", device, *folder.smoke), folder.learned
    ended["wall"] = time.perf_counter() - began
    assert ended["backend"] == backend and ended["params"] > 0 and ended["seconds"] <= ended["wall"]
    assert (ended[figure] > bound) == (sign == ">"), f"{figure} is {ended[figure]:.3f}, not {sign} {bound}"
    for file in ("ckpt.npz", "log.jsonl", "curve.png", *folder.files):
        path = ended["out"] / file
        assert str(path) in ended["files"] and path.stat().st_size > 0, f"{file} is missing"
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert min(image.size) >= 64 and np.asarray(image.convert("L")).std() > 8, f"{file} is blank"
                assert image.width == 640 or file != "curve.png", f"{file} has another size"
        if path.suffix == ".txt":
            assert len(set(path.read_text(encoding="utf-8"))) > 10, f"{file} says nothing"
    return ended


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", FOLDERS)


def test_smoke(name, tmp_path):
    """The short runs of both frameworks keep their promises, and end with the same figure."""
    a, b = (check(name, backend, tmp_path)[FOLDERS[name].learned[0]] for backend in BACKENDS)
    assert abs(a - b) < 0.01 * abs(b), f"{a} with torch, {b} with MLX"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*BACKENDS, *FOLDERS], default=[], metavar="torch|mlx|FOLDER")
    parser.add_argument("--device", default="cpu")
    args, counts = parser.parse_args(), {"passed": 0, "failed": 0}
    for name in [name for name in args.what if name in FOLDERS] or FOLDERS:
        for backend in [backend for backend in args.what if backend in BACKENDS] or BACKENDS:
            figure = FOLDERS[name].learned[0]
            try:
                with tempfile.TemporaryDirectory() as place:
                    ended, outcome = check(name, backend, place, args.device), "passed"
                    if args.device != "cpu":
                        there, here = ended[figure], check(name, backend, place)[figure]
                        assert abs(there - here) < 0.02 * abs(here), f"{figure} {there:.4f}, on the CPU {here:.4f}"
                text = f"{ended['wall']:6.1f} s  {figure} {ended[figure]:.4f}"
            except (AssertionError, OSError) as error:
                outcome, text = "failed", str(error).strip().replace("\n", " | ")
            counts[outcome] += 1
            print(f"{name:12} {backend:6} {outcome:7} {text}", flush=True)
    print(f"{counts['passed']} passed, {counts['failed']} failed")
    return counts["failed"] > 0


if __name__ == "__main__":
    sys.exit(main())
