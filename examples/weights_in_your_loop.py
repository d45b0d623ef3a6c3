"""MLB-Seg's weights in a plain training loop: labels of which a third are wrong, judged pixel by pixel.

    python examples/weights_in_your_loop.py                       # on generated 2D slices, seconds on one CPU core
    python examples/weights_in_your_loop.py --data slices.npz     # yours

A few slices have careful labels; those of the others are partly wrong. The loop asks of every pixel of the others
whether following its label would lower the loss on careful labels, and learns those that would. Careful slices are of
two kinds here: some are learnt, and some only give the direction, because a network says little about labels along the
gradient of what it has fitted (docs/weights.md). Compared are: careful labels alone, all labels believed, and labels
weighed.

The file for --data holds arrays `image` (N, H, W), `careful` and `doubtful` (N, H, W) with whole numbers from 0.
`careful` is -1 where a slice has no careful label; `truth`, if it is there, scores the result.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets import UNet
from torch import Tensor, nn

from mlbseg.core import cross_entropy_map, gradient, pixel_weights, supervised_loss
from mlbseg.data.phantom import phantom
from mlbseg.metrics import dice

CAREFUL, JUDGES = 4, 4  # slices with a careful label: learnt, and kept to judge by
BATCH = 4


def main() -> None:
    """Train three times and print the Dice of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help=".npz file (default: slices of phantoms)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, default=48, help="of the phantoms' slices, pixels")
    arguments = parser.parse_args()
    data = slices(arguments.size) if arguments.data is None else dict(np.load(arguments.data))
    image = torch.from_numpy(data["image"]).float()[:, None]
    image = (image - image.mean((2, 3), keepdim=True)) / image.std((2, 3), keepdim=True)
    careful = torch.from_numpy(data["careful"]).long()
    doubtful = torch.from_numpy(data["doubtful"]).long()
    for name in ("careful labels alone", "all labels believed", "labels weighed"):
        model = train(image, careful, doubtful, name, arguments.steps)
        line = name
        if "truth" in data:
            with torch.inference_mode():
                found = model.eval()(image).argmax(1).numpy()
            rest = (careful < 0).all(-1).all(-1).numpy()  # slices whose careful label nobody has
            line += f": Dice {dice(found[rest] > 0, data['truth'][rest] > 0):.3f} on slices without a careful label"
        print(line)


def train(image: Tensor, careful: Tensor, doubtful: Tensor, how: str, steps: int) -> nn.Module:
    """Return a network trained in one of the three ways.

    Args:
        image: (N, 1, H, W).
        careful: (N, H, W) classes; -1 where there is no careful label.
        doubtful: (N, H, W) classes.
        how: As `main` names them.
        steps: Of the optimiser.
    """
    torch.manual_seed(0)
    classes = int(max(careful.max(), doubtful.max())) + 1
    model = UNet(2, 1, classes, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    labelled = (careful >= 0).flatten(1).any(1).nonzero().flatten()
    learnt, judges = labelled[:CAREFUL], labelled[CAREFUL : CAREFUL + JUDGES]
    if how == "careful labels alone":  # which has no need of judges, so it learns them too
        learnt = labelled
    others = (careful < 0).flatten(1).all(1).nonzero().flatten()
    for _ in range(steps):
        drawn = others[torch.randperm(len(others))[:BATCH]]
        loss = supervised_loss(model(image[learnt]), careful[learnt])
        if how == "all labels believed":
            loss = loss + supervised_loss(model(image[drawn]), doubtful[drawn])
        elif how == "labels weighed":
            v = gradient(supervised_loss(model(image[judges]), careful[judges]), model)

            def cost(logits: Tensor, label: Tensor = doubtful[drawn]) -> Tensor:
                return cross_entropy_map(logits, label)

            weights = pixel_weights(model, image[drawn], {"doubtful": cost}, v, rule="sign").weights[
                "doubtful"
            ]
            loss = loss + (weights * cost(model(image[drawn]))).sum()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model


def slices(size: int) -> Mapping[str, np.ndarray]:
    """Return slices through the organ of 40 phantoms; a third of the doubtful labels lie beside the organ."""
    rng = np.random.default_rng(0)
    images, truths = [], []
    for seed in range(40):
        image, label, _ = phantom(seed, size=(16, size, size))
        plane = int((label == 1).sum((1, 2)).argmax())
        images.append(image[plane])
        truths.append(label[plane] == 1)
    truth = np.stack(truths).astype(np.int64)
    doubtful = truth.copy()
    for i in rng.permutation(40)[:13]:
        doubtful[i] = np.roll(truth[i], (size // 6, size // 8), (0, 1))
    careful = np.full_like(truth, -1)
    careful[: CAREFUL + JUDGES] = truth[: CAREFUL + JUDGES]
    return {"image": np.stack(images), "careful": careful, "doubtful": doubtful, "truth": truth}


if __name__ == "__main__":
    main()
