"""What a user can set, in one model: YAML in and out, `-o key=value` on the command line.

Only `cli` and the floor below it (training, inference) read this object; everything further down takes plain
keyword arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mlbseg.errors import UserError, nearest

# PyYAML lets the ValueError of an impossible date through, and Python's limit on nesting.
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)


_SINGLE = BeforeValidator(lambda v: [v] if isinstance(v, str) or type(v) is int else v)
"""Lets one name or number stand for the list of it: `-o mlb.views=flip`."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class PlanSettings(_Section):
    """Overrides of the plan; what is left empty is decided from the data (see plan.json for the reasons)."""

    ndim: Literal[2, 3] | None = None
    orientation: str | None = None
    label_values: list[int] | None = None
    class_names: list[str] | None = None
    spacing: float | list[float] | None = None
    patch_size: int | list[int] | None = None
    normalisation: str | list[str] | None = None
    intensity: dict[str, float] | list[dict[str, float]] | None = None
    crop: bool | None = None
    network: str | None = None
    network_channels: Annotated[list[int] | None, _SINGLE] = None
    network_strides: list[list[int]] | None = None
    batch_size: int | None = Field(None, ge=1)
    unlabelled_batch_size: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    flip_axes: int | list[int] | None = None


class TrainSettings(_Section):
    """How training goes."""

    lr: float = Field(0.05, gt=0, description="learning rate of stage 1 (and of supervised training)")
    lr_bootstrap: float = Field(0.05, gt=0, description="learning rate of stage 2")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(5e-4, ge=0, description="of SGD")
    clip: float = Field(1.0, gt=0, description="largest L2 norm of the gradient")
    schedule: Literal["poly", "paper", "constant"] = Field(
        "poly", description="of the learning rate: poly falls to 0 within a stage, paper is 20 / (epoch + 20)"
    )
    stage1_share: float = Field(0.75, gt=0, lt=1, description="share of the steps that stage 1 takes")
    # `-o train.precision=32` is a number to YAML
    precision: Annotated[Literal["auto", "32", "bf16"], BeforeValidator(lambda v: "32" if v == 32 else v)] = (
        Field("auto", description="auto computes in bfloat16 where the device has it")
    )
    norm: Literal["instance", "group", "batch"] = Field("instance", description="normalisation layers")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability, in the network's layers")
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints")
    validate_every: int = Field(200, ge=1, description="steps between validations, if cases are set apart")
    meta_cases: int = Field(
        0,
        ge=0,
        description="clean cases, the last ones, that only decide the weights of stage 2: nothing learns them",
    )
    workers: int | None = Field(
        None, ge=0, description="processes that draw batches ahead; empty: none on a CPU, up to 12 for a GPU"
    )
    foreground: float = Field(0.5, ge=0, le=1, description="share of clean patches centred on a structure")


class AugmentSettings(_Section):
    """Random changes of the training patches; each probability is per patch."""

    rotate: float = Field(15.0, ge=0, le=180, description="largest rotation, degrees")
    scale: float = Field(0.15, ge=0, lt=1, description="largest change of size")
    affine: float = Field(0.5, description="probability of rotation and scaling", ge=0, le=1)
    elastic: float = Field(0.0, ge=0, le=1, description="probability of an elastic deformation")
    intensity: float = Field(
        0.5, ge=0, le=1, description="probability of a change of brightness and contrast"
    )
    gamma: float = Field(0.3, ge=0, le=1, description="probability of a change of gamma")
    noise: float = Field(0.2, ge=0, le=1, description="probability of Gaussian noise")


class MLBSettings(_Section):
    """The bootstrap stage; see `mlbseg.methods.mlb.MLB`."""

    mode: Literal["joint", "paper"] = "joint"
    views: Annotated[list[Literal["zoom-in", "zoom-out", "flip"]], _SINGLE] = ["zoom-out"]
    clean_views: bool = False
    sources: Annotated[list[Literal["initial", "pseudo"]] | None, Field(min_length=1), _SINGLE] = None
    weighting: Literal["share", "residual", "sign", "softmax", "sigmoid", "uniform", "confidence"] = "sign"
    decides: Literal["everywhere", "disputes"] = "disputes"
    per_source: bool = False
    per_image: bool = False
    direction: Literal["clean", "random"] = "clean"
    scope: Literal["all", "decoder", "head"] = "all"
    every: int = Field(1, ge=1)
    mix: float = Field(2 / 3, ge=0, lt=1)
    jitter: float = Field(0.3, ge=0, lt=1)
    pseudo_from: Literal["student", "teacher"] = "teacher"
    relabel: int = Field(0, ge=0)
    teacher_decay: float = Field(0.99, ge=0, lt=1)
    teacher_noise: float = Field(0.1, ge=0)
    pseudo_weight: float = Field(1.0, ge=0)
    pseudo_dice: bool = True
    ple_weight: float = Field(0.0, ge=0)
    teacher_weight: float = Field(0.0, ge=0)
    chunk: int | None = Field(None, ge=1)

    def weighed(self, *, noisy: bool) -> tuple[str, ...]:
        """Return the sources; unless they are named, initial labels are those that noisy cases came with."""
        if self.sources is not None:
            return tuple(dict.fromkeys(self.sources))
        return ("initial", "pseudo") if noisy else ("pseudo",)

    @property
    def freezes_labels(self) -> bool:
        """Whether what stage 1 predicts of unlabelled cases is learnt from."""
        return self.sources is not None and "initial" in self.sources


class EntropySettings(_Section):
    """See `mlbseg.methods.entropy.Entropy`."""

    entropy_weight: float = Field(0.1, ge=0)
    ramp: float = Field(0.4, gt=0, le=1)


class ICTSettings(_Section):
    """See `mlbseg.methods.ict.ICT`."""

    teacher_decay: float = Field(0.99, ge=0, lt=1)
    alpha: float = Field(0.2, gt=0)
    consistency_weight: float = Field(10.0, ge=0)
    ramp: float = Field(0.4, gt=0, le=1)


class MeanTeacherSettings(_Section):
    """See `mlbseg.methods.mean_teacher.MeanTeacher`."""

    teacher_decay: float = Field(0.99, ge=0, lt=1)
    noise: float = Field(0.1, ge=0)
    consistency_weight: float = Field(10.0, ge=0)
    ramp: float = Field(0.4, gt=0, le=1)


class PseudoLabelSettings(_Section):
    """See `mlbseg.methods.pseudo_label.PseudoLabel`."""

    rounds: int = Field(0, ge=0)
    threshold: float = Field(0.8, ge=0, le=1)
    strength: float = Field(0.0, ge=0, lt=1)
    pseudo_weight: float = Field(1.0, ge=0)
    ramp: float = Field(0.4, gt=0, le=1)


class UAMTSettings(_Section):
    """See `mlbseg.methods.ua_mt.UAMT`."""

    teacher_decay: float = Field(0.99, ge=0, lt=1)
    noise: float = Field(0.1, ge=0)
    passes: int = Field(8, ge=1)
    threshold: float = Field(0.75, ge=0, le=1)
    consistency_weight: float = Field(10.0, ge=0)
    ramp: float = Field(0.4, gt=0, le=1)


class BCPSettings(_Section):
    """See `mlbseg.methods.bcp.BCP`."""

    teacher_decay: float = Field(0.99, ge=0, lt=1)
    box: float = Field(2 / 3, gt=0, lt=1)
    pseudo_weight: float = Field(0.5, ge=0)
    largest: bool = True


class CCTSettings(_Section):
    """See `mlbseg.methods.cct.CCT`."""

    consistency_weight: float = Field(30.0, ge=0)
    ramp: float = Field(0.1, gt=0, le=1)


class CPSSettings(_Section):
    """See `mlbseg.methods.cps.CPS`."""

    redrawn: Literal["decoder", "head", "all"] = "decoder"
    pseudo_weight: float = Field(1.5, ge=0)
    ramp: float = Field(0.4, gt=0, le=1)


class FixMatchSettings(_Section):
    """See `mlbseg.methods.fixmatch.FixMatch`."""

    threshold: float = Field(0.95, ge=0, le=1)
    strength: float = Field(0.6, ge=0, lt=1)
    pseudo_weight: float = Field(1.0, ge=0)


class UniMatchSettings(_Section):
    """See `mlbseg.methods.unimatch.UniMatch`."""

    threshold: float = Field(0.95, ge=0, le=1)
    strength: float = Field(0.6, ge=0, lt=1)
    mix: float = Field(0.5, ge=0, le=1)
    drop: float = Field(0.5, ge=0, lt=1)
    pseudo_weight: float = Field(1.0, ge=0)


class Config(_Section):
    """Everything that a run was asked for."""

    method: str = Field("mlb", description="how to learn from scans without labels")
    seed: int = Field(0, ge=0, lt=2**31, description="of everything random")
    plan: PlanSettings = PlanSettings()
    train: TrainSettings = TrainSettings()
    augment: AugmentSettings = AugmentSettings()
    mlb: MLBSettings = MLBSettings()
    # A section for each method, named like it with underscores; a test holds them to the methods' own arguments.
    bcp: BCPSettings = BCPSettings()
    cct: CCTSettings = CCTSettings()
    cps: CPSSettings = CPSSettings()
    entropy: EntropySettings = EntropySettings()
    fixmatch: FixMatchSettings = FixMatchSettings()
    ict: ICTSettings = ICTSettings()
    mean_teacher: MeanTeacherSettings = MeanTeacherSettings()
    pseudo_label: PseudoLabelSettings = PseudoLabelSettings()
    ua_mt: UAMTSettings = UAMTSettings()
    unimatch: UniMatchSettings = UniMatchSettings()

    def write(self, path: Path) -> None:
        """Write the configuration as YAML."""
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


PRESETS: dict[str, dict[str, Any]] = {
    # The public code's settings, in 2D on 3D scans too; the network is the paper's UNet++. Two things are left to
    # the plan: the length of training (120 epochs there) and the spacing (there each image is resized to 144x144).
    "paper": {
        "plan": {"ndim": 2, "patch_size": 144, "network": "unet++",
                 "network_channels": [64, 128, 256, 512, 1024], "batch_size": 2, "unlabelled_batch_size": 1,
                 "flip_axes": [0, 1]},
        "train": {"lr": 0.005, "lr_bootstrap": 0.005, "clip": 0.2, "schedule": "paper", "norm": "batch"},
        "augment": {"rotate": 10.0, "scale": 0.0, "intensity": 0.0, "gamma": 0.0, "noise": 0.0},
        "mlb": {"mode": "paper", "views": ["zoom-in", "zoom-out", "zoom-out", "flip"],
                "sources": ["initial", "pseudo"], "weighting": "share", "decides": "everywhere", "mix": 0.0,
                "jitter": 0.0, "pseudo_from": "student", "teacher_noise": 0.02, "pseudo_weight": 1.0,
                "pseudo_dice": False, "ple_weight": 1.0, "teacher_weight": 1.0},
    },
}  # fmt: skip


def load_config(
    path: Path | None = None, *, preset: str | None = None, overrides: Sequence[str] = (), **values: Any
) -> Config:
    """Return the configuration: defaults, then the preset, the file, the overrides, and `values`.

    Args:
        path: A YAML file, such as the `config.yaml` of an earlier run.
        preset: A name in `PRESETS`.
        overrides: ``key=value`` strings; the value is read as YAML, the key is dotted (``train.lr``) or, where
            only one section has it, bare (``lr``).
        values: Top-level fields that are not None, such as ``method`` and ``seed``.

    Raises:
        UserError: for an unknown key (naming the nearest), a bad value, or a file that is not such YAML.
    """
    data: dict[str, Any] = {}
    if preset is not None:
        if preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}: {nearest(preset, PRESETS)}")
        _merge(data, PRESETS[preset])
    if path is not None:
        _merge(data, _read_yaml(path))
    for item in overrides:
        key, value = parse_override(item)
        _merge(data, _nested(key, value))
    _merge(data, {k: v for k, v in values.items() if v is not None})
    return config_of(data)


def config_of(record: Mapping[str, Any]) -> Config:
    """Return the configuration that a record, as nested mappings, says.

    Raises:
        UserError: for an unknown key (naming the nearest), or a bad value.
    """
    try:
        return Config.model_validate(record)
    except ValidationError as error:
        raise UserError("\n".join(_explain(error.errors()))) from None


def parse_override(item: str) -> tuple[str, Any]:
    """Return the full key and the value of a ``key=value`` string.

    Raises:
        UserError: if there is no ``=``, the key is unknown or stands in several sections, or the value is not YAML.
    """
    key, separator, text = item.partition("=")
    key = key.strip()
    if not separator:
        raise UserError(f"override {item!r}: expected key=value, such as train.lr=0.01")
    try:
        value = yaml.safe_load(text)
        if isinstance(value, str) and "," in value:
            # A shell-friendly list: spacing=1.25,1.25,1.25
            value = [yaml.safe_load(part) for part in value.split(",")]
    except _NOT_YAML:
        raise UserError(f"override {item!r}: the value is not valid YAML") from None
    keys = list(_keys())
    if key in keys:
        return key, value
    matches = [k for k in keys if k.rpartition(".")[2] == key]
    if len(matches) == 1:
        return matches[0], value
    if matches:
        raise UserError(f"override key {key!r} stands in several sections: say {' or '.join(matches)}")
    raise UserError(f"unknown override key {key!r}: {_nearest_key(key)}")


def _keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _nearest_key(key: str) -> str:
    """Say which key is meant: one of the same section, if there is such a section."""
    keys = list(_keys())
    section = key.rpartition(".")[0]
    own = [k for k in keys if section and k.rpartition(".")[0] == section]
    return f"{nearest(key, own or keys)} (docs/reference/settings.md has all)"


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except _NOT_YAML:
        raise UserError(f"{path}: not a YAML file") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: found {type(data).__name__}, expected a mapping of settings")
    return data


def _explain(errors: Sequence[Any]) -> Iterator[str]:
    """Yield a line per setting; a value that fits none of several types has an error for each of them."""
    by_key: dict[str, list[Any]] = {}
    for error in errors:
        # Below a key pydantic names the type that it tried, or the place in a list.
        key = ".".join(str(part) for part in error["loc"])
        known = next((k for k in _keys() if key.startswith(f"{k}.")), key)
        by_key.setdefault(known, []).append(error)
    for key, group in by_key.items():
        if group[0]["type"] == "extra_forbidden":
            yield f"unknown setting {key!r}: {_nearest_key(key)}"
        else:
            messages = dict.fromkeys(error["msg"][0].lower() + error["msg"][1:] for error in group)
            yield f"setting {key}: found {group[0]['input']!r}, {', or '.join(messages)}"
