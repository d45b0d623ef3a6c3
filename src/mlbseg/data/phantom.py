"""The embedded demo data: anatomy-like 3D scans that are generated, so nothing has to be downloaded.

A trunk with fat, muscle, spine and aorta holds the two structures to segment, on one side of the body:

1. an *organ*, bean-shaped, of varying shape, size, pose and place, sometimes with a lesion;
2. a *vessel*, a tube some three voxels wide that winds along the organ's surface.

What makes it hard is what makes real scans hard. The other side holds a smaller organ with its own vessel, as
bright as the ones asked for; the aorta looks like the vessel; bowel loops look like pieces of organ. Contrast
differs from scan to scan, in strength and in sign, and there are a bias field, partial volume, Rician noise.
A network must learn where things lie and not only how they look, which few labels do not teach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from scipy.spatial.transform import Rotation

from mlbseg.data.readers import write_image, write_label
from mlbseg.staging import staged
from mlbseg.types import Geometry

Field = npt.NDArray[np.float64]
Distance = Callable[[Field], Field]  # positions (3, ...) mm -> signed distance (...) mm, negative inside

CLASS_NAMES = {1: "organ", 2: "vessel"}
FIELD_OF_VIEW = 84.0  # mm along each axis, so `size` sets the resolution and not what is seen
SMALLEST = 16  # voxels along an axis; below, the vessel falls between the voxels


def phantom(
    seed: int, *, size: tuple[int, int, int] = (40, 48, 48)
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], tuple[float, float, float]]:
    """Draw one scan. Equal seeds give equal arrays, bit for bit.

    Args:
        seed: Decides everything about the scan: anatomy, pose and scanner.
        size: Voxels (z, y, x), at least 16 each. The field of view is about 84 mm whatever the size.

    Returns:
        Image (*S) in arbitrary units, label (*S) with 0 background, 1 organ, 2 vessel, spacing (z, y, x) mm.

    Raises:
        ValueError: If `size` is not three axes of at least 16 voxels.
    """
    if len(size) != 3 or min(size) < SMALLEST:
        raise ValueError(f"size is {size}, expected three axes of at least {SMALLEST} voxels")
    rng = np.random.default_rng(seed)
    spacing = FIELD_OF_VIEW / np.asarray(size) * rng.uniform(0.94, 1.06)
    position = _body_coordinates(rng, size, spacing)
    tissues, label = _anatomy(rng, position, voxel=float(spacing.mean()))
    image = _acquire(rng, tissues, spacing)
    z, y, x = (float(v) for v in spacing)
    return image, label, (z, y, x)


def write_phantoms(out: Path, *, count: int, seed: int, size: tuple[int, int, int] = (40, 48, 48)) -> None:
    """Write `count` scans as `images/phantom_000.nii.gz`, ... and their labels under `labels/`.

    Args:
        out: A folder that is empty or does not exist yet.
        count: Number of scans; scan i is `phantom` of a seed derived from (`seed`, i).
        seed: Seed of the whole set.
        size: Voxels (z, y, x) of each scan.

    Raises:
        UserError: If `out` is not an empty folder, or nothing can be written there.
    """
    seeds = np.random.SeedSequence(seed).generate_state(count)
    with staged(out, remedy="name a new or empty folder") as folder:
        for part in ("images", "labels"):
            (folder / part).mkdir()
        for i, one in enumerate(seeds):
            image, label, spacing = phantom(int(one), size=size)
            geometry = Geometry.identity(size[::-1], spacing[::-1])
            name = f"phantom_{i:03d}.nii.gz"
            write_image(folder / "images" / name, image, geometry)
            write_label(folder / "labels" / name, label, geometry)


@dataclass
class _Tissues:
    """The noise-free scan under construction, and the grey value of each kind of tissue in this scan."""

    image: Field
    muscle: float
    fat: float
    bone: float
    parenchyma: float
    blood: float

    def paint(self, occupancy: Field, value: float | Field) -> None:
        """Lay a structure over what is there; partly filled voxels get the mixture (partial volume)."""
        self.image += occupancy * (value - self.image)


def _body_coordinates(rng: np.random.Generator, size: tuple[int, int, int], spacing: Field) -> Field:
    """Return each voxel's place in the body, (3, *S) mm: pose (turn, shift, scale) and smooth deformation."""
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(size, spacing, strict=True)]
    scanner = np.stack(np.meshgrid(*axes, indexing="ij"))
    # Rotation acts on (z, y, x); the subject turns mostly about the long axis, z.
    turn = Rotation.from_rotvec(np.deg2rad(rng.normal(0, (7, 4, 4)))).as_matrix()
    shift = rng.uniform(-3, 3, 3).reshape(3, 1, 1, 1)
    body = np.einsum("ij,j...->i...", turn, scanner - shift) / rng.uniform(0.92, 1.08)
    for axis in range(3):
        body[axis] += 1.6 * _smooth_noise(rng, size, 12 / spacing)
    return body


def _smooth_noise(rng: np.random.Generator, size: tuple[int, ...], sigma: Field) -> Field:
    """Return a Gaussian random field (*S), standard deviation 1, correlation length `sigma` voxels."""
    noise: Field = gaussian_filter(rng.standard_normal(size), sigma, mode="reflect", truncate=3)
    noise -= noise.mean()
    return noise / noise.std()


def _anatomy(
    rng: np.random.Generator, position: Field, voxel: float
) -> tuple[_Tissues, npt.NDArray[np.uint8]]:
    """Place the structures; return the noise-free scan and the label (*S)."""
    tissues = _contrast(rng, position.shape[1:])

    def filled(distance: Field) -> Field:
        return np.clip(0.5 - distance / voxel, 0, 1)

    def texture(value: float, strength: float = 0.03) -> Field:
        spread = np.full(3, 5 / voxel)
        return value * (1 + strength * _smooth_noise(rng, position.shape[1:], spread))

    z, y, x = position
    half_y, half_x = rng.uniform(30, 34), rng.uniform(34, 39)
    body = _ellipsoid(np.stack([z * 0, y, x]), np.zeros(3), np.array([1, half_y, half_x]))
    tissues.paint(filled(body), tissues.fat)
    tissues.paint(filled(body + rng.uniform(3, 6)), texture(tissues.muscle, 0.06))
    spine = np.hypot(y - half_y + 11, x) - rng.uniform(5.5, 7.5)
    tissues.paint(filled(spine), texture(tissues.bone))
    # A large, faint organ on the far side only: the landmark that tells left from right.
    liver = _ellipsoid(
        position, np.array([16, 0, 20]) + rng.normal(0, 2, 3), rng.uniform((18, 13, 13), (24, 18, 17))
    )
    tissues.paint(filled(liver), texture((tissues.muscle + tissues.parenchyma) / 2))
    for _ in range(rng.integers(2, 5)):  # bowel loops
        centre = np.array([rng.uniform(-40, 5), rng.uniform(-24, -14), rng.uniform(-22, 22)])
        tissues.paint(
            filled(_ellipsoid(position, centre, rng.uniform(3.5, 7, 3))), texture(tissues.parenchyma)
        )
    aorta = np.hypot(y - half_y + 24 + rng.normal(0, 1.5), x - rng.normal(4, 2)) - rng.uniform(2.8, 4.2)
    tissues.paint(filled(aorta), tissues.blood)

    label = np.zeros(position.shape[1:], np.uint8)
    for side in (1, -1):  # the far side first: the same kind of structures, but not the ones asked for
        centre = np.array([-3, -1, side * 16]) + rng.normal(0, (4, 2.5, 2))
        organ = _organ(rng, centre, scale=1.0 if side < 0 else 0.7)
        vessel = filled(_vessel(rng, position, organ, centre))
        inside = organ(position)
        tissues.paint(filled(inside), texture(tissues.parenchyma))
        if rng.random() < 0.3:
            lesion = _ellipsoid(position, centre + rng.normal(0, 4, 3), rng.uniform(2.5, 5, 3))
            # Within the organ: the lesion is part of it, and its label.
            tissues.paint(filled(np.maximum(lesion, inside + 1)), tissues.muscle * rng.uniform(0.5, 1.5))
        tissues.paint(vessel, tissues.blood)
        if side < 0:
            label[filled(inside) > 0.5] = 1
            label[vessel > 0.5] = 2
    return tissues, label


def _contrast(rng: np.random.Generator, size: tuple[int, ...]) -> _Tissues:
    """Draw the grey values: the organ mostly brighter than muscle, at times darker; the blood beyond both."""
    muscle = rng.uniform(0.4, 0.55)
    parenchyma = muscle + (1 if rng.random() < 0.88 else -1) * rng.uniform(0.18, 0.36)
    if rng.random() < 0.88:
        blood = max(muscle, parenchyma) + rng.uniform(0.25, 0.45)
    else:  # flow void
        blood = max(0.02, min(muscle, parenchyma) - rng.uniform(0.2, 0.35))
    return _Tissues(
        image=np.zeros(size),
        muscle=muscle,
        fat=rng.uniform(0.6, 1.1),
        bone=rng.uniform(0.15, 0.9),
        parenchyma=parenchyma,
        blood=blood,
    )


def _ellipsoid(position: Field, centre: Field, radii: Field) -> Field:
    """Return the signed distance to an ellipsoid, to first order (Quilez' bound: k0 (k0 - 1) / k1)."""
    column = (3,) + (1,) * (position.ndim - 1)
    scaled = (position - centre.reshape(column)) / radii.reshape(column)
    k0 = np.sqrt((scaled**2).sum(0))
    k1 = np.sqrt(((scaled / radii.reshape(column)) ** 2).sum(0))
    return k0 * (k0 - 1) / np.maximum(k1, 1e-6)


def _organ(rng: np.random.Generator, centre: Field, scale: float) -> Distance:
    """Return a bean: a smooth union of three ellipsoids on a bent axis, turned at random."""
    turn = Rotation.from_rotvec(np.deg2rad(rng.normal(0, (25, 15, 15)))).as_matrix()
    length, bend = scale * rng.uniform(8, 13), scale * rng.uniform(-4, 4)
    middles = np.array([[-length, 0, bend], [0, rng.normal(0, 2), -bend], [length, 0, bend]])
    radii = scale * rng.uniform((9, 8, 8), (13, 12, 12), (3, 3))

    def distance(position: Field) -> Field:
        column = (3,) + (1,) * (position.ndim - 1)
        local = np.einsum("ij,j...->i...", turn, position - centre.reshape(column))
        parts = [_ellipsoid(local, middle, r) for middle, r in zip(middles, radii, strict=True)]
        return -2 * np.logaddexp.reduce([-part / 2 for part in parts])  # smooth minimum over 2 mm

    return distance


def _vessel(rng: np.random.Generator, position: Field, organ: Distance, centre: Field) -> Field:
    """Return the signed distance (*S) to a tube that winds along the organ's surface, from below to above."""
    radius = rng.uniform(2.6, 3.3)
    along = np.linspace(-80, 80, 161)
    # On the organ's +x side (the near organ's inner, the far organ's outer one), from where it wanders round it.
    angle = (
        rng.normal(0, 0.35)
        + rng.normal(0, 0.01) * along
        + rng.uniform(0.1, 0.4) * np.sin(along / rng.uniform(7, 14) + rng.uniform(0, 2 * np.pi))
    )
    reach = np.linspace(0, 30, 61)
    rays = np.stack(
        [
            np.broadcast_to(along[:, None], (along.size, reach.size)),
            np.sin(angle)[:, None] * reach,
            np.cos(angle)[:, None] * reach,
        ]
    ) + centre.reshape(3, 1, 1)
    within = organ(rays) < 0.8 * radius
    # Where each ray leaves the organ, smoothed: above and below it the vessel comes in towards the axis.
    surface = np.where(within, reach, 0).max(1)
    surface = gaussian_filter1d(np.maximum(surface, 4), 3)
    course = np.stack([np.sin(angle), np.cos(angle)]) * surface + centre[1:, None]
    slope = np.gradient(course, along, axis=1)
    z, y, x = position
    level = z - centre[0]
    steepness = np.sqrt(1 + np.interp(level, along, (slope**2).sum(0)))
    across = np.hypot(y - np.interp(level, along, course[0]), x - np.interp(level, along, course[1]))
    extent = rng.uniform(24, 32)
    return np.maximum(across / steepness - radius, np.abs(level) - extent)


def _acquire(rng: np.random.Generator, tissues: _Tissues, spacing: Field) -> npt.NDArray[np.float32]:
    """Return what the scanner makes of it: blur, bias field, Rician noise, arbitrary units."""
    blur = rng.uniform(0.5, 0.8) * np.array([1.5, 1, 1])  # mm; slices are thicker than pixels
    image = gaussian_filter(tissues.image, blur / spacing)
    image *= np.exp(rng.uniform(0.08, 0.2) * _smooth_noise(rng, image.shape, 30 / spacing))
    noise = rng.uniform(0.015, 0.04) * rng.standard_normal((2, *image.shape))
    return (rng.uniform(200, 1500) * np.hypot(image + noise[0], noise[1])).astype(np.float32)
