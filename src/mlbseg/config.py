"""What a user can set, in one model: YAML in and out, `-o key=value` on the command line.

The model is put together from the sections of those who use them: a method's settings stand in its own file.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    create_model,
)

from mlbseg.data.augment import AUGMENTATIONS, Augment
from mlbseg.errors import UserError, brief, nearest
from mlbseg.methods import METHODS
from mlbseg.settings import FEW, SINGLE, Patches, Section, Steps, Weight

MOST_SETTINGS = 10_000
"""Values in a file of settings, an alias (``*name``) counting as all that it stands for."""
MOST_PARTS = 256
"""Values that are typed with commas between."""
MOST_CHARACTERS = 1_000_000
"""Of a file of settings."""


def _spacing(value: float) -> float:
    if 0 < value < 1e-9:
        raise ValueError("expected 0, which keeps each scan's own, or 1e-09 or more")
    return value


# The numbers are far beyond any use: nothing above them can be computed, or ends.
_Spacing = Annotated[float, Field(ge=0, le=1e4), AfterValidator(_spacing)]
_Side = Annotated[int, Field(ge=1, le=4096)]
_Axis = Annotated[int, Field(ge=0, le=2)]
_Label = Annotated[int, Field(ge=0, lt=2**31)]
_Intensity = Annotated[float, Field(ge=-1e12, le=1e12)]


def _source(value: str) -> str:
    """Return a path that means the same wherever a process of the run is started."""
    if "\0" in value:
        raise ValueError("a null character, which no path has")
    return str(Path(value).absolute())


class PlanSettings(Section):
    """Overrides of the plan; what is left empty is decided from the data (see plan.json for the reasons)."""

    ndim: Literal[2, 3] | None = None
    orientation: str | None = None
    label_values: list[_Label] | None = Field(None, max_length=256)
    class_names: list[str] | None = Field(None, max_length=256)
    spacing: _Spacing | Annotated[list[_Spacing], FEW] | None = None
    patch_size: _Side | Annotated[list[_Side], FEW] | None = None
    normalisation: str | list[str] | None = None
    intensity: dict[str, _Intensity] | list[dict[str, _Intensity]] | None = None
    crop: bool | None = None
    network: str | None = None
    network_channels: Annotated[Annotated[list[_Side], Field(max_length=10)] | None, SINGLE] = None
    network_strides: Annotated[list[Annotated[list[_Side], FEW]] | None, Field(max_length=9)] = None
    network_options: (
        dict[str, Annotated[list[_Side | Annotated[list[_Side], FEW]], Field(max_length=10)]] | None
    ) = None
    batch_size: Patches | None = None
    unlabelled_batch_size: Patches | None = None
    steps: Steps | None = None
    flip_axes: _Axis | Annotated[list[_Axis], FEW] | None = None
    largest_component: _Label | Annotated[list[_Label], Field(max_length=256)] | None = None


class TrainSettings(Section):
    """How training goes."""

    optimiser: Literal["sgd", "adamw"] = Field("sgd", description="optimiser of both stages")
    lr: float | None = Field(
        None,
        gt=0,
        le=1e38,
        description="learning rate of stage 1, and of supervised training; empty: 0.05 with sgd, 0.001 with adamw",
    )
    lr_bootstrap: float | None = Field(
        None, gt=0, le=1e38, description="learning rate of stage 2; empty: 0.05 with sgd, 0.001 with adamw"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd; the first beta of adamw")
    weight_decay: float = Field(5e-4, ge=0, le=1000, description="weight decay")
    clip: float = Field(1.0, gt=0, le=1e38, description="largest L2 norm of the gradient")
    schedule: Literal["poly", "cosine", "paper", "constant"] = Field(
        "poly",
        description="of the learning rate: poly and cosine fall to 0 within a stage, paper is 20 / (epoch + 20)",
    )
    warmup: int | None = Field(
        None,
        ge=0,
        le=1_000_000_000,
        description="steps of each stage over which the learning rate rises from 0; empty: none, or with init a "
        "twentieth of stage 1",
    )
    stage1_share: float | None = Field(
        None, gt=0, lt=1, description="share of the steps that stage 1 takes; empty: 0.75, or with init 0.5"
    )
    init: Annotated[str, AfterValidator(_source)] | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="weights to start from: a run folder (RUN:teacher for its teacher), a file of weights, a "
        "checkpoint of nnU-Net, a MONAI bundle",
    )
    stage2_factor: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="stage 2 takes this many times the steps that are left for it: compares methods at equal time",
    )
    # `-o train.precision=32` is a number to YAML
    precision: Annotated[Literal["auto", "32", "bf16"], BeforeValidator(lambda v: "32" if v == 32 else v)] = (
        Field("auto", description="auto computes in bfloat16 where the device has it")
    )
    loss: str = Field(
        "dice-ce", description="loss of labelled pixels: dice-ce, ce, dice, or one of a package"
    )
    augmentation: str = Field(
        "standard", description="random changes of patches: standard, or those of a package"
    )
    norm: Literal["instance", "group", "batch"] = Field("instance", description="normalisation layers")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability, in the network's layers")
    deep_supervision: bool = Field(
        False,
        description="losses of labelled pixels at coarser resolutions too (networks nnunet and resenc; not where "
        "mlb.chunk takes a loss in parts)",
    )
    checkpoint_every: Steps = Field(200, description="steps between checkpoints")
    validate_every: Steps = Field(200, description="steps between validations, if cases are set apart")
    meta_cases: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="clean cases, the last ones, that only decide the weights of stage 2: nothing learns them",
    )
    workers: int | None = Field(
        None,
        ge=0,
        le=256,
        description="processes that draw batches ahead; empty: none on a CPU, up to 12 for a GPU",
    )
    foreground: float = Field(0.5, ge=0, le=1, description="share of clean patches centred on a structure")
    crf: Weight = Field(
        0.0,
        description="factor of the gated-CRF loss in supervised training and in stage 1, for scribbles: neighbouring "
        "pixels of like intensity are to be predicted alike",
    )

    def rate(self, stage: int) -> float:
        """Return the learning rate of a stage, 1 or 2: the optimiser's usual one where none is set."""
        usual = {"sgd": 0.05, "adamw": 0.001}[self.optimiser]
        chosen = self.lr if stage == 1 else self.lr_bootstrap
        return usual if chosen is None else chosen

    def decided(self) -> dict[str, Any]:
        """Return what the result of training depends on, by name."""
        found = self.model_dump(mode="json", exclude={"workers"})
        return {**found, "lr": self.rate(1), "lr_bootstrap": self.rate(2)}


class Config(Section):
    """Everything that a run was asked for; `config_model` adds a section for each method, of its name."""

    method: str = Field("mlb", description="how to learn from scans without labels")
    seed: int = Field(0, ge=0, lt=2**31, description="random seed")
    plan: PlanSettings = PlanSettings()
    train: TrainSettings = TrainSettings()
    augment: Augment.Settings = Augment.Settings()

    def of(self, name: str) -> Section:
        """Return the settings of a method, such as ``mean-teacher``, or of an augmentation.

        Raises:
            AttributeError: there is no such section.
        """
        if name in AUGMENTATIONS.own:
            return self.augment
        section: Section = getattr(self, section_name(name))
        return section

    def as_record(self) -> dict[str, Any]:
        """Return the settings as nested mappings, for YAML and JSON.

        What other packages bring and this run does not use is left out where it is as it was: the record can then be
        read where those packages are not installed.
        """
        record = self.model_dump(mode="json")
        used = {section_name(self.method), section_name(self.train.augmentation)}
        for name in (METHODS.keys() - METHODS.own.keys()) | (AUGMENTATIONS.keys() - AUGMENTATIONS.own.keys()):
            section = section_name(name)
            if section in record and section not in used and self.of(name) == type(self.of(name))():
                del record[section]
        return record

    def write(self, path: Path) -> None:
        """Write the configuration as YAML."""
        path.write_text(yaml.safe_dump(self.as_record(), sort_keys=False), encoding="utf-8")


def section_name(name: str) -> str:
    """Return the name of the section of a method or an augmentation."""
    return name.replace("-", "_")


@functools.cache
def config_model() -> type[Config]:
    """Return the class of configurations: with the settings of all methods and augmentations that are installed.

    What another package brings and cannot be imported has no section, with a warning, until that package is mended.
    """
    sections: dict[str, Any] = {}
    for registry in (METHODS, AUGMENTATIONS):
        for name in registry:
            if registry is AUGMENTATIONS and name in AUGMENTATIONS.own:
                continue  # the section `augment`
            try:
                settings = registry.find(name).Settings
                if section_name(name) in {*Config.model_fields, *sections}:
                    raise UserError(
                        f"{registry.what} {name!r}: its settings would be in another's section (rename it)"
                    )
            except UserError as error:
                warnings.warn(str(error), stacklevel=2)
                continue
            sections[section_name(name)] = (settings, settings())
    return create_model("Config", __base__=Config, **sections)


PRESETS: dict[str, dict[str, Any]] = {
    # What the public code does, in 2D on 3D scans too. Two things are left to the plan: the length of training (120
    # epochs there) and the spacing (there each image is resized to 144x144).
    "paper": {
        "plan": {"ndim": 2, "patch_size": 144, "network": "nested-unet",
                 "network_channels": [64, 128, 256, 512, 1024], "batch_size": 2, "unlabelled_batch_size": 1,
                 "flip_axes": [0, 1]},
        "train": {"lr": 0.005, "lr_bootstrap": 0.005, "clip": 0.2, "schedule": "paper", "norm": "batch", "loss": "ce",
                  "foreground": 0.0},
        "augment": {"rotate": 10.0, "scale": 0.0, "affine": 1.0, "mirror": [1], "elastic": 0.0, "intensity": 0.0,
                    "gamma": 0.0, "invert": 0.0, "blur": 0.0, "low_resolution": 0.0, "noise": 0.0},
        "mlb": {"mode": "paper", "views": ["zoom-in", "zoom-out", "zoom-out", "flip"],
                "sources": ["initial", "pseudo"], "weighting": "share", "decides": "everywhere", "mix": 0.0,
                "jitter": 0.0, "pseudo_from": "student", "teacher_noise": 0.02, "pseudo_weight": 1.0,
                "pseudo_dice": False, "ple_weight": 1.0, "teacher_weight": 1.0, "padding": "background",
                "ple_detached": True, "teacher_twice": True, "teacher_counts": "epoch"},
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


def load_run_config(path: Path) -> Config:
    """Return the configuration that a run wrote, perhaps with an earlier version.

    What is unknown in the sections of methods that the run does not use has changed nothing, and is passed over.

    Raises:
        UserError: as `load_config`, for anything else.
    """
    data = _read_yaml(path)
    used = section_name(str(data.get("method", Config().method)))
    fields = config_model().model_fields
    for name in {section_name(method) for method in METHODS} - {used}:
        section, settings = data.get(name), fields[name].annotation if name in fields else None
        if isinstance(section, dict) and isinstance(settings, type) and issubclass(settings, Section):
            data[name] = {key: value for key, value in section.items() if key in settings.model_fields}
    try:
        return config_of(data)
    except UserError as error:
        remedy = "the file was edited, or another version of mlbseg made the run: use that one"
        raise UserError(f"{path}: {error} ({remedy})") from None


def config_of(record: Mapping[str, Any]) -> Config:
    """Return the configuration that a record, as nested mappings, says.

    Raises:
        UserError: for an unknown key (naming the nearest), or a bad value.
    """
    try:
        return config_model().model_validate(record)
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
        raise UserError(f"override {brief(item)}: expected key=value, such as train.lr=0.01")
    try:
        value = parse_yaml(text)
        if isinstance(value, str) and "," in value:
            # A shell-friendly list: spacing=1.25,1.25,1.25
            parts = value.split(",")
            if len(parts) > MOST_PARTS:
                raise ValueError(f"{len(parts)} values, expected at most {MOST_PARTS}")
            value = [parse_yaml(part) for part in parts]
    except ValueError as error:
        raise UserError(f"override {brief(item)}: the value is not valid YAML ({error})") from None
    keys = list(_keys())
    if key in keys:
        return key, value
    matches = [k for k in keys if k.rpartition(".")[2] == key]
    if len(matches) == 1:
        return matches[0], value
    if matches:
        raise UserError(f"override key {brief(key)} stands in several sections: say {' or '.join(matches)}")
    raise UserError(f"unknown override key {brief(key)}: {_nearest_key(key)}")


def _keys(model: type[BaseModel] | None = None, prefix: str = "") -> Iterator[str]:
    for name, field in (model or config_model()).model_fields.items():
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


def parse_yaml(text: str) -> Any:
    """Return what a YAML text says, all aliases in it being of bounded size.

    Raises:
        ValueError: It is none, or too much; the message is for users.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{len(text)} characters, expected at most {MOST_CHARACTERS}")
    try:
        loader = yaml.SafeLoader(text)
    except yaml.YAMLError:
        raise ValueError("special characters are not allowed") from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST_SETTINGS:
            raise ValueError(f"more than {MOST_SETTINGS} values")
        value = _constructed(loader, node)
    except yaml.YAMLError as error:
        raise ValueError(str(getattr(error, "problem", None) or "no YAML")[:200]) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no character") from None
    finally:
        loader.dispose()
    return value


def _constructed(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    try:
        return loader.construct_document(node)
    except ValueError:  # what PyYAML lets through: an impossible date, a number of thousands of digits
        raise ValueError("a number or a date that cannot be") from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values in a node, those of an alias each time that it stands there."""
    if id(node) not in known:
        known[id(node)] = MOST_SETTINGS + 1  # of one that holds itself
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif "\\u" in ascii(node.value):
            node.value.encode()  # not half of a surrogate pair
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)  # a pipe, too, which has no size
        data = parse_yaml(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a YAML file (no text in UTF-8)") from None
    except ValueError as error:
        raise UserError(f"{path}: not a YAML file ({error})") from None
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
            yield f"unknown setting {brief(key)}: {_nearest_key(key)}"
        else:
            messages = dict.fromkeys(error["msg"][0].lower() + error["msg"][1:] for error in group)
            yield f"setting {key}: found {brief(group[0]['input'])}, {', or '.join(messages)}"
