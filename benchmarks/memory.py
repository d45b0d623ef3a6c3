"""Peak memory of training a few steps and of predicting one large scan.

Each task runs in a fresh process; what the imports alone hold is subtracted and shown beside it.

    python benchmarks/memory.py                       # phantoms, made for the purpose
    python benchmarks/memory.py --run runs/a          # the data and the plan of a finished run
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Nothing heavy is imported up here: on Linux a new process starts with its parent's peak as its own.

GIB = 2**30
SPACING = (0.5, 0.5, 1.0)  # mm, x, y, z
PLAN_SETTINGS = (
    "ndim", "spacing", "patch_size", "normalisation", "crop", "network", "network_channels", "batch_size",
    "unlabelled_batch_size", "flip_axes",
)  # fmt: skip


def peak() -> int:
    """Return this process's peak resident memory so far, bytes (Linux counts in KiB, macOS in bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def make_phantoms(out: str, count: int) -> None:
    """Write phantoms to train on."""
    from mlbseg.data.phantom import write_phantoms

    write_phantoms(Path(out), count=count, seed=0)


def make_scan(out: str, size: list[int]) -> None:
    """Write a scan of `size` (x, y, z) voxels: a bright body with a noisy inside, as 16-bit integers."""
    import numpy as np
    import SimpleITK as sitk  # noqa: N813 - as its documentation does

    rng = np.random.default_rng(0)
    array = np.zeros(size[::-1], np.int16)
    y, x = np.ogrid[-1 : 1 : size[1] * 1j, -1 : 1 : size[0] * 1j]
    body = np.square(x) + np.square(y) < 0.8
    for section in array:
        section[body] = 200 + rng.integers(-16, 17, int(body.sum()), dtype=np.int16)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING)
    sitk.WriteImage(image, out, useCompression=True)


def train(data: str, out: str, cache: str, **settings: Any) -> int:
    """Train, and return the memory that the imports hold, bytes."""
    from mlbseg.training import train as run

    before = peak()
    run(data, out, cache=cache, device="cpu", **settings)
    return before


def predict(run: str, scan: str, out: str) -> int:
    """Predict one scan, and return the memory that the imports hold, bytes."""
    from mlbseg.inference import predict as run_predict

    before = peak()
    result = run_predict(run, scan, out, device="cpu")
    if result.faults:
        raise SystemExit(str(result.faults[0]))
    return before


TASKS: dict[str, Callable[..., int | None]] = {
    f.__name__: f for f in (make_phantoms, make_scan, train, predict)
}


def in_fresh_process(task: str, **arguments: Any) -> dict[str, int]:
    """Run one of `TASKS` by itself; return its peak and what its imports hold, bytes."""
    command = [sys.executable, __file__, "--task", task, "--arguments", json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{task} failed (its message stands above)")
    figures: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return figures


def source_of(run: Path) -> tuple[str, dict[str, Any]]:
    """Return a run's data folder, and the settings that train on it by the same plan and split."""
    plan, split, data = (json.loads((run / f"{n}.json").read_text()) for n in ("plan", "split", "data"))
    overrides = [f"plan.{name}={json.dumps(plan[name])}" for name in PLAN_SETTINGS]
    settings = {"overrides": overrides, "labelled": split["clean"], "test": split["test"]}
    return data["root"], {**settings, "labels": plan["label_values"][1:], "skip_bad": bool(data["skipped"])}


def row(title: str, figures: dict[str, int], ratio: str) -> str:
    """Return one line of the table."""
    total, imports = figures["peak"] / GIB, figures["imports"] / GIB
    return f"{title:<34}{total:>9.2f}{imports:>10.2f}{total - imports:>9.2f}   {ratio}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="finished run folder whose data and plan to use")
    parser.add_argument("--steps", type=int, default=5, help="training steps (default: 5)")
    parser.add_argument(
        "--size", type=int, nargs=3, default=[512, 512, 300], help="of the scan to predict, x y z voxels"
    )
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--arguments", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.task:
        imports = TASKS[asked.task](**asked.arguments)
        print(json.dumps({"peak": peak(), "imports": imports or 0}))
        return

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if asked.run:
            data, settings = source_of(asked.run)
        else:
            data, settings = str(work / "phantoms"), {"labelled": 3}
            in_fresh_process("make_phantoms", out=data, count=8)
        print(f"{'peak resident memory, GiB':<34}{'total':>9}{'imports':>10}{'net':>9}")
        overrides = [*settings.pop("overrides", []), f"plan.steps={asked.steps}"]
        nets = {}
        for method in ("supervised", "mlb"):
            figures = in_fresh_process(
                "train", data=data, out=str(work / method), cache=str(work / "cache"), method=method,
                overrides=overrides, **settings,
            )  # fmt: skip
            nets[method] = figures["peak"] - figures["imports"]
            ratio = f"{nets[method] / nets['supervised']:.2f} × supervised's net"
            print(row(f"train {method}, {asked.steps} steps", figures, ratio), flush=True)

        in_fresh_process("make_scan", out=str(work / "scan.nii.gz"), size=asked.size)
        run = asked.run or work / "mlb"
        figures = in_fresh_process(
            "predict", run=str(run), scan=str(work / "scan.nii.gz"), out=str(work / "masks")
        )
        x, y, z = asked.size
        as_float32 = 4 * x * y * z
        net = (figures["peak"] - figures["imports"]) / as_float32
        ratio = f"{net:.2f} × the scan as float32 ({as_float32 / GIB:.2f} GiB)"
        print(row(f"predict {x}×{y}×{z}", figures, ratio))
        plan = json.loads((run / "plan.json").read_text())
        print(
            f"the plan: {plan['network']} {plan['network_channels']}, patch {plan['patch_size']}, batches of "
            f"{plan['batch_size']} + {plan['unlabelled_batch_size']}, spacing {plan['spacing']} mm, "
            f"{len(plan['label_values'])} classes"
        )


if __name__ == "__main__":
    main()
