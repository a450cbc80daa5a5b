"""The head and the loss in one against autograd's, which is not in the project's hands."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_model import tiny_model

from gpt2_chinese.training.loss import HEAD_ROWS, HeadLoss, WindowLoss, hidden_states

ROWS = 2 * HEAD_ROWS + 5  # the last rows are not a whole chunk


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, 16, generator=generator)
    head = torch.randn(50, 16, generator=generator)
    targets = torch.randint(50, (ROWS,), generator=generator)
    return hidden.requires_grad_(), head.requires_grad_(), targets


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_its_loss_and_gradients_are_autograd_s(dtype, tolerance):
    (hidden, head, targets), (their_hidden, their_head, _) = tensors(), tensors()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = HeadLoss.apply(hidden, head, targets)
        expected = F.cross_entropy(F.linear(their_hidden, their_head).float(), targets, reduction="sum")
    assert loss.dtype == torch.float32
    (loss * 0.5).backward()
    (expected * 0.5).backward()
    torch.testing.assert_close(loss, expected, rtol=min(tolerance, 1e-3), atol=0)
    for mine, theirs in ((hidden.grad, their_hidden.grad), (head.grad, their_head.grad)):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def test_with_teachers_the_gradient_is_that_of_the_mixed_loss_and_the_value_that_of_the_text():
    (hidden, head, targets), (their_hidden, their_head, _) = tensors(), tensors()
    generator = torch.Generator().manual_seed(1)
    taught = [torch.randn(ROWS, 8, generator=generator), torch.randn(50, 8, generator=generator)]
    taught += [torch.randn(ROWS, 24, generator=generator), torch.randn(50, 24, generator=generator)]
    loss = HeadLoss.apply(hidden, head, targets, 0.6, None, None, None, *taught)
    loss.backward()

    mean = (torch.softmax(taught[0] @ taught[1].T, 1) + torch.softmax(taught[2] @ taught[3].T, 1)) / 2
    logits = F.linear(their_hidden, their_head)
    of_text = F.cross_entropy(logits, targets, reduction="sum")
    (0.4 * of_text + 0.6 * F.cross_entropy(logits, mean, reduction="sum")).backward()
    torch.testing.assert_close(loss, of_text.detach(), rtol=1e-5, atol=0)
    for mine, theirs in ((hidden.grad, their_hidden.grad), (head.grad, their_head.grad)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_without_teachers_their_share_changes_nothing():
    model, input_ids = tiny_model(), torch.randint(5, 200, (3, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for share in (0.0, 0.6):
        model.zero_grad()
        WindowLoss(model, teacher_share=share)(input_ids).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_the_loss_of_a_gpu_with_teachers_is_that_of_a_cpu():
    student, teacher, other = tiny_model(), tiny_model().requires_grad_(False), tiny_model().requires_grad_(False)
    teacher.transformer.wte.weight.mul_(1.5)
    other.transformer.h[1].mlp.c_proj.weight.mul_(-2)
    input_ids = torch.randint(5, 200, (3, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for compute in ("forward", "_loss"):
        window_loss = WindowLoss(student, teachers=[teacher, other], teacher_share=0.5)
        student.zero_grad()
        loss = getattr(window_loss, compute)(input_ids)
        loss.backward()
        gradients.append([loss.detach(), *(parameter.grad.clone() for parameter in student.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any("teacher" in name for name, _ in window_loss.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_of_no_probability_has_a_loss_all_the_same(dtype):
    hidden, head = torch.ones(1, 2), torch.tensor([[100.0, 100.0], [-100.0, -100.0], [0.0, 0.0]])
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = HeadLoss.apply(hidden, head.requires_grad_(), torch.tensor([1]))
    loss.backward()
    assert loss.item() == 400
    assert hidden.grad.tolist() == [[200, 200]]  # the likeliest row of the head less the target's


def test_hidden_states_of_lower_precision_get_gradients_of_theirs():
    hidden, head, targets = tensors()
    lower = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        HeadLoss.apply(lower, head, targets).backward()
    assert lower.grad.dtype == torch.bfloat16 and head.grad.dtype == torch.float32


def test_a_loss_that_is_no_number_is_not_hidden():
    hidden, head, targets = tensors()
    with torch.no_grad():
        hidden[3, 2] = torch.nan
    loss = HeadLoss.apply(hidden, head, targets)
    loss.backward()
    assert loss.isnan() and head.grad.isnan().any()


def test_a_second_pass_over_one_loss_is_an_error_not_a_wrong_gradient():
    loss = HeadLoss.apply(*tensors())
    (loss * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss * 2).backward()


@pytest.mark.parametrize("recompute", [False, True])
def test_documents_of_a_window_are_read_as_if_each_had_its_own(recompute):
    model = tiny_model()
    window_loss = WindowLoss(model, recompute=recompute)
    input_ids = torch.randint(5, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.stack(
        [torch.cat([torch.arange(5), torch.arange(11)]), torch.cat([torch.arange(9), torch.arange(7)])]
    )
    whole = hidden_states(model, input_ids, positions)
    for window, border in enumerate((5, 9)):
        first, second = input_ids[window : window + 1].split([border, 16 - border], 1)
        apart = torch.cat([hidden_states(model, each, None) for each in (first, second)], 1)
        torch.testing.assert_close(whole[window : window + 1], apart)
    logits = model.lm_head(whole)[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, input_ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(window_loss(input_ids, positions), expected)
    assert not torch.allclose(window_loss(input_ids), expected)
