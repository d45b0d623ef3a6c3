"""nnU-Net's planner beside ours."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data.test_plan import facts, plan_for
from mlbseg.apps import nnunet_plan as room
from mlbseg.apps.nnunet_plan import nnunet_plan
from mlbseg.errors import UserError

INSTALLED = "nnU-Net is installed by `make setup` only: see the Makefile"


@pytest.mark.slow
def test_thick_slices_are_planned_in_2d_and_3d(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nnunetv2", reason=INSTALLED)
    monkeypatch.delenv("PYTHONPATH")  # nnU-Net needs libraries that tests hide
    data = facts(size=(12, 200, 220), spacing=(10.0, 1.5, 1.5))
    found = nnunet_plan(data, plan_for(data))
    assert found.cases == 4  # the labelled ones alone
    flat, deep = found.configurations
    assert (flat.name, flat.spacing) == ("2d", (1.5, 1.5))
    assert (deep.name, deep.spacing) == ("3d_fullres", (10.0, 1.5, 1.5))
    for each in found.configurations:
        assert len(each.network_strides) == len(each.network_channels) - 1
        assert each.normalisation == ("ZScoreNormalization",)
    assert deep.network_strides[0] == (1, 2, 2)


def test_images_are_one_slice_to_it() -> None:
    told = room._fingerprint(facts(2, size=(300, 400), spacing=(1.0, 2.0), unlabelled=0).cases)
    assert (told["spacings"][0], told["shapes_after_crop"][0]) == ([999.0, 1.0, 2.0], [1, 300, 400])


def test_without_nnunet_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="nnunetv2 is not installed"):
        nnunet_plan(facts(), plan_for(facts()))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('the planner broke')", "nnU-Net's planner: 'the planner broke'"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
    ],
)
def test_a_planner_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, code: str, message: str) -> None:
    monkeypatch.setattr(room, "find_spec", lambda name: object())
    monkeypatch.setattr(room, "_PLAN", code)
    monkeypatch.setattr(room, "_PATIENCE", 1 if "sleep" in code else 60)
    with pytest.raises(UserError, match=message):
        nnunet_plan(facts(), plan_for(facts()))


def test_ct_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    data = facts()
    plan = replace(plan_for(data), normalisation=("ct",))
    assert room._dataset(data.cases, plan)["channel_names"] == {"0": "CT"}
