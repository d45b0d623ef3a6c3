"""How fast pages and reviews are in a real browser: opening, a change of slice, drawing, saving; and how large.

``python benchmarks/pages.py page SCANS`` makes a page of up to 40 labelled cases of a folder;
``python benchmarks/pages.py review`` reviews a made scan of 512×512×300. Both print what was measured. They need
Chromium and playwright. Without a graphics card the browser draws on the processor: the times are upper bounds.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlbseg.apps.report.packing import Subject
from mlbseg.apps.report.page import Section, render_page
from mlbseg.apps.report.viewer import SCRIPTS, Gallery
from mlbseg.data.cases import find_cases
from mlbseg.data.known import label_on
from mlbseg.data.readers import read_scan, write_image, write_label
from mlbseg.types import Geometry

ARGUMENTS = [
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
]
SLICES = """async () => {
  const { viewer } = document.querySelector(".viewer");
  viewer.view("axial");
  const times = [];
  for (let z = 0; z < 20; z++) {
    const began = performance.now();
    viewer.goto([0, 0, z]);
    viewer.nv.gl.readPixels(0, 0, 1, 1, viewer.nv.gl.RGBA, viewer.nv.gl.UNSIGNED_BYTE, new Uint8Array(4));
    times.push(performance.now() - began);
  }
  times.sort((a, b) => a - b);
  return [times[10], times[19]];
}"""
STROKE = """async () => {
  const { viewer, review } = document.querySelector(".viewer");
  const { nv } = viewer;
  viewer.view("axial");
  const times = [];
  const [nx, ny, nz] = viewer.head.size;
  for (let k = 0; k < 20; k++) {
    const began = performance.now();
    nv.drawPenAxCorSag = 0;
    nv.drawPenLine([10 + k, 10, nz >> 1], [10 + k, 30, nz >> 1], 1);
    nv.refreshDrawing();
    nv.gl.readPixels(0, 0, 1, 1, nv.gl.RGBA, nv.gl.UNSIGNED_BYTE, new Uint8Array(4));
    times.push(performance.now() - began);
  }
  nv.drawPenAxCorSag = -1;
  const began = performance.now();
  review.remember();
  times.sort((a, b) => a - b);
  return [times[10], times[19], performance.now() - began];
}"""


def browse(address: str) -> tuple[Any, Any, tuple[float, float]]:
    """Open a page; return the playwright, the page, and the seconds until its text and until a case was there."""
    from playwright.sync_api import sync_playwright

    playwright = sync_playwright().start()
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.on("console", lambda message: print("the browser says:", message.text))
    page.on("pageerror", lambda error: print("the browser says:", error))
    began = time.perf_counter()
    page.goto(address, wait_until="domcontentloaded")
    there = time.perf_counter() - began
    page.wait_for_selector(".viewer[data-ready]", timeout=300_000)
    return playwright, page, (there, time.perf_counter() - began)


def measure_page(scans: Path) -> None:
    """Make a page of labelled cases, their labels shifted as predictions, and open it."""
    dataset = find_cases(scans)
    cases = [case for case in dataset.cases if case.label is not None][:40]
    looked = Gallery(dataset.class_names)

    def subjects() -> Any:
        for case in cases:
            scan = read_scan(case.images)
            label = np.maximum(label_on(case, scan.geometry), 0)
            masks = {"label": label, "prediction": np.roll(label, 2, axis=-1)}
            yield Subject(case.id, "", scan.array[0], scan.geometry, masks)

    began = time.perf_counter()
    looked.fill(subjects(), len(cases))
    made = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(
            render_page(scans.name, [Section("Cases", looked.html(), looked.note, SCRIPTS)]), encoding="utf-8"
        )
        size = path.stat().st_size
        playwright, page, opened = browse(path.as_uri())
        usual, worst = page.evaluate(SLICES)
        playwright.stop()
    print(
        f"{scans.name}: {len(looked.names)} of {len(cases)} cases on a page of {size / 1e6:.1f} MB, "
        f"made in {made:.1f} s; text after {opened[0]:.2f} s, the first case after {opened[1]:.2f} s; "
        f"a slice takes {usual:.0f} ms (median), {worst:.0f} ms (most)"
    )


def measure_review() -> None:
    """Review a made scan of 512×512×300."""
    import uvicorn

    from mlbseg.apps.review.desk import Desk
    from mlbseg.apps.review.listing import list_cases
    from mlbseg.apps.review.server import application

    size = (300, 512, 512)
    geometry = Geometry.identity(size[::-1], (0.8, 0.8, 1.5))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("images", "labels"):
            (root / name).mkdir()
        rng = np.random.default_rng(0)
        z, y, x = np.ogrid[:300, :512, :512]
        label = (((z - 150) / 80) ** 2 + ((y - 256) / 100) ** 2 + ((x - 200) / 120) ** 2 < 1).astype(np.uint8)
        image = (rng.normal(0, 20, size) + 100 * label).astype(np.float32)
        write_image(root / "images" / "a.nii.gz", np.rint(image).astype(np.float32), geometry)
        write_label(root / "labels" / "a.nii.gz", label, geometry)
        del image, label
        token = "measured"  # noqa: S105 - of a server that lives for a minute
        desk = Desk(list_cases(root, "names"), who="benchmark", device="cpu")
        server = uvicorn.Server(
            uvicorn.Config(application(desk, token), port=0, log_level="error", lifespan="off")
        )
        threading.Thread(target=server.run, daemon=True).start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        playwright, page, opened = browse(f"http://127.0.0.1:{port}/{token}/")
        size_of = len(desk.packed(0, 5))
        usual, worst = page.evaluate(SLICES)
        pen, most, noted = page.evaluate(STROKE)
        began = time.perf_counter()
        page.evaluate("() => document.querySelector('.viewer').review.open(0, 6)")
        part = time.perf_counter() - began
        page.evaluate(STROKE)
        began = time.perf_counter()
        page.evaluate("() => document.querySelector('.viewer').review.save()")
        saved = time.perf_counter() - began
        playwright.stop()
        server.should_exit = True
    print(
        f"512×512×300: opens in {opened[1]:.1f} s, the next part in {part:.1f} s ({size_of / 1e6:.1f} MB); "
        f"a slice takes {usual:.0f} ms (most {worst:.0f}), a move of the pen {pen:.0f} ms (most {most:.0f}), "
        f"the end of a stroke {noted:.0f} ms; "
        f"a save {saved:.1f} s"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=["page", "review"])
    parser.add_argument("scans", nargs="*", type=Path)
    asked = parser.parse_args(arguments)
    for scans in asked.scans:
        measure_page(scans)
    if asked.what == "review":
        measure_review()


if __name__ == "__main__":
    main()
