"""What is said of every setting."""

from __future__ import annotations

from conftest import Command
from mlbseg.reference import describe_settings


def test_every_setting_has_values_and_a_meaning() -> None:
    sections = {section.name: section for section in describe_settings()}
    assert {"", "plan", "train", "augment", "mlb"} <= sections.keys()
    for section in sections.values():
        for setting in section.settings:
            assert setting.values, setting.key
            assert setting.meaning, setting.key
    (spacing,) = (setting for setting in sections["plan"].settings if setting.key == "plan.spacing")
    assert spacing.default == ""
    assert spacing.meaning.startswith(
        "mm along each of `scan_ndim` axes; 0 keeps each scan's own along that axis."
    )


def test_config_prints_what_is_asked_for(command: Command) -> None:
    every = command("config", "--json").json["settings"]
    assert every["train.momentum"]["default"] == "0.9"
    assert set(command("config", "mlb.mix", "bcp", "--json").json["settings"]) == {
        key for key in every if key.startswith("bcp.") or key == "mlb.mix"
    }
    wrong = command("config", "trian")
    assert (wrong.code, wrong.out) == (2, "")
    assert "trian: no section and no setting, did you mean 'train'" in wrong.err
