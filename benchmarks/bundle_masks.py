"""How many voxels an exported MONAI bundle labels otherwise than `mlbseg predict` in 32 bits.

python benchmarks/bundle_masks.py RUN SCANS      # SCANS: a folder of NIfTI files
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mlbseg import predict
from mlbseg.apps.export import export
from mlbseg.data.readers import read_label


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict with both and print the difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="finished run")
    parser.add_argument("scans", type=Path, help="folder of NIfTI files")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export(asked.run, folder / "bundle", "bundle")
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
        command += ["--dataset_dir", str(asked.scans.resolve()), "--output_dir", str(folder / "masks")]
        subprocess.run(command, cwd=folder / "bundle", check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - our own words
        ours = predict(asked.run, asked.scans, folder / "ours", precision="32", device="cpu").masks
        differing = voxels = structure = 0
        for name, path in ours.items():
            expected, found = (read_label(p)[0] for p in (path, folder / "masks" / f"{name}.nii.gz"))
            differing += int((expected != found).sum())
            voxels += expected.size
            structure += int((expected > 0).sum())
    print(f"{differing} of {voxels} voxels differ ({structure} are no background), {len(ours)} scans")


if __name__ == "__main__":
    main()
