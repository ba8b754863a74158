"""Do the twins learn the same?  python tests/curves.py [FOLDER ...]

Trains the small setting of each folder in both frameworks and plots both loss curves on top of each other, a panel per
folder, in tests/curves.png; each panel names the largest difference at any step.
"""

import json
import subprocess
import sys

from folders import BACKENDS, FOLDERS, ROOT, environment, make_run
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, STYLE = 620, 360, {"torch": ((31, 119, 180), 9), "mlx": ((255, 214, 90), 3)}  # torch below, MLX on top


def train(name, backend):
    """The losses of the first 100 steps of the folder's small setting: as JSON, the last line of stdout."""
    task, trainer, rate = make_run(name, *FOLDERS[name].smoke, backend=backend)
    steps = [trainer.step(*task.batch(step), lr=rate(step)) for step in range(min(100, task.args.steps))]
    print(json.dumps([float(next(iter(metrics.values()))) for metrics in steps]))


def main():
    names = sys.argv[1:] or list(FOLDERS)
    image = Image.new("RGB", (3 * WIDTH, -(-len(names) // 3) * HEIGHT + 60), "white")
    draw, font, small = ImageDraw.Draw(image), ImageFont.load_default(30), ImageFont.load_default(22)
    for i, name in enumerate(names):
        curves = {}
        for backend in BACKENDS:
            command = [sys.executable, __file__, "--train", name, backend]
            run = subprocess.run(command, env=environment(backend), capture_output=True, text=True, check=True)
            curves[backend] = json.loads(run.stdout.splitlines()[-1])
        left, top, values = i % 3 * WIDTH + 30, i // 3 * HEIGHT, curves["torch"] + curves["mlx"]
        difference = f"largest difference {max(abs(a - b) for a, b in zip(*curves.values())):.1e}"
        draw.text((left, top + 40), name, "black", font, anchor="lm")
        draw.text((left + WIDTH - 60, top + 40), difference, (110, 110, 110), small, anchor="rm")
        for backend, (colour, width) in STYLE.items():
            y = [top + 80 + 250 * (max(values) - loss) / (max(values) - min(values)) for loss in curves[backend]]
            x = [left + (WIDTH - 60) * step / (len(y) - 1) for step in range(len(y))]
            draw.line(list(zip(x, y)), colour, width, joint="curve")
        print(f"{name:12} loss {curves['torch'][0]:.4f} to {curves['torch'][-1]:.4f}, {difference}", flush=True)
    for x, backend, title in ((30, "torch", "PyTorch"), (190, "mlx", "MLX")):
        draw.line([(x, image.height - 30), (x + 40, image.height - 30)], *STYLE[backend])
        draw.text((x + 50, image.height - 30), title, "black", small, anchor="lm")
    image.reduce(2).quantize(32).save(ROOT / "tests/curves.png", optimize=True)


if __name__ == "__main__":
    train(*sys.argv[2:]) if sys.argv[1:2] == ["--train"] else main()
