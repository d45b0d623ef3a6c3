"""The mean teacher: its schedule, what it copies, and that no gradient reaches it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mlbseg.core.teacher import decay_at, make_teacher, prediction, update_teacher


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)).double()


def test_the_decay_rises_to_its_ceiling_and_stays() -> None:
    assert [decay_at(step, 0.8) for step in range(7)] == pytest.approx(
        [0, 1 / 2, 2 / 3, 3 / 4, 4 / 5, 0.8, 0.8]
    )
    # By the global step: long after an epoch's start the teacher still is an average.
    assert decay_at(100_000, 0.99) == 0.99


def test_at_step_0_the_teacher_becomes_the_student() -> None:
    student = network()
    teacher = make_teacher(network())
    update_teacher(teacher, student, 0, 0.99)
    for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_while_the_decay_rises_the_teacher_is_the_plain_mean_of_all_students() -> None:
    teacher = make_teacher(network())
    students = [network() for _ in range(6)]
    for step, student in enumerate(students):
        update_teacher(teacher, student, step, 0.99)
    for index, mine in enumerate(teacher.parameters()):
        mean = torch.stack([list(s.parameters())[index].detach() for s in students]).mean(0)
        torch.testing.assert_close(mine.detach(), mean, rtol=1e-12, atol=1e-14)


def test_an_update_is_the_weighted_mean_and_leaves_the_student_alone() -> None:
    student, teacher = network(), make_teacher(network())
    before = [p.clone() for p in teacher.parameters()]
    own = [p.detach().clone() for p in student.parameters()]
    update_teacher(teacher, student, 1000, 0.9)
    for old, new, theirs in zip(before, teacher.parameters(), own, strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * theirs, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(a, b) for a, b in zip(own, student.parameters(), strict=True))


def test_buffers_are_copied_not_averaged() -> None:
    student, teacher = network(), make_teacher(network())
    student.train()(torch.randn(4, 1, 8, 8, dtype=torch.float64))
    update_teacher(teacher, student, 1000, 0.99)
    buffers = dict(student.named_buffers())
    assert int(buffers["1.num_batches_tracked"]) == 1
    for name, mine in teacher.named_buffers():
        assert torch.equal(mine, buffers[name])


def test_a_teacher_is_a_copy_that_no_gradient_reaches() -> None:
    student = network()
    teacher = make_teacher(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    own = {p.data_ptr() for p in student.parameters()}
    assert not own & {p.data_ptr() for p in teacher.parameters()}
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(teacher(x), student(x))
    (teacher(x) * student(x)).sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    update_teacher(teacher, student, 3, 0.99)
    assert not any(p.requires_grad or p.grad_fn for p in teacher.parameters())


def test_a_network_that_is_only_asked_stays_as_it_is() -> None:
    asked = network().train()
    before = copy.deepcopy(asked.state_dict())
    image = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    found = prediction(asked, image)
    assert not found.requires_grad
    assert all(torch.equal(before[name], value) for name, value in asked.state_dict().items())
    assert torch.equal(found, asked(image))  # with the statistics of the batch, as in train mode
    assert not torch.equal(before["1.running_mean"], asked.state_dict()["1.running_mean"])
    with torch.autocast("cpu", torch.bfloat16):
        assert prediction(asked.float(), image.float()).dtype == torch.float32
