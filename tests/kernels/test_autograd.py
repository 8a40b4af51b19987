"""What autograd may ask of an op besides one gradient of every input."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from tim_kernels import use_path
from tim_kernels.bench.cases import cases
from tim_kernels.bench.measure import check
from tim_kernels.gated_residual import jvp_kernel as gated_jvp
from tim_kernels.gated_residual import kernel as gated
from tim_kernels.modulated_layer_norm import jvp_kernel as norm_jvp
from tim_kernels.modulated_layer_norm import kernel as norm
from tim_kernels.on_device import on_own_device
from tim_kernels.qk_norm_rope import jvp_kernel as heads_jvp
from tim_kernels.qk_norm_rope import kernel as heads
from tim_kernels.qk_norm_rope import qk_norm_rope, qkv_norm_rope
from tim_kernels.swiglu import jvp_kernel as swiglu_jvp
from tim_kernels.swiglu import kernel as swiglu
from tim_kernels.transition_loss import kernel as loss
from tim_kernels.varlen_attention import jvp_kernel as attention_jvp

LENGTHS = (2, 1)
ONE_OF_EACH = list(
    {
        case.op: case
        for case in reversed(cases(width=8, hidden=8, channels=4, head_dim=4))
        if case.backward_bytes_per_token is not None and case.op != "varlen_attention"
    }.values()
)


def _graph(case, device):
    inputs = case.inputs(LENGTHS, device)
    with use_path("triton"):
        outputs = case.ours(inputs, case.plan(LENGTHS, device))
    return [x for x in inputs.values() if x.requires_grad], outputs


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.op)
def test_a_second_derivative_is_refused_and_not_left_out(case, device):
    """A penalty on a gradient would be without effect, silently."""
    leaves, outputs = _graph(case, device)
    total = torch.stack([y.float().square().sum() for y in outputs]).sum()
    gradient, *_ = torch.autograd.grad(total, leaves, create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.op)
def test_a_graph_that_is_kept_gives_the_same_gradients_again_and_each_alone(case, device):
    leaves, outputs = _graph(case, device)
    # Expanded: every stride is 0.
    cotangents = [torch.ones((), dtype=y.dtype, device=device).expand(y.shape) for y in outputs]
    first = torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)
    for i, leaf in enumerate(leaves):
        (alone,) = torch.autograd.grad(outputs, leaf, cotangents, retain_graph=True)
        assert torch.equal(alone, first[i])
        if i == 1:
            break


def test_heads_that_fill_no_group_want_an_eps_above_zero(device):
    """Six heads by four: two are not there, and have no variance."""
    with pytest.raises(ValueError, match="eps: expected above 0, received 0"):
        qk_norm_rope(torch.ones(1, 6, 4), torch.ones(4), None, None, eps=0.0)
    with pytest.raises(ValueError, match="eps: expected above 0, received 0"):
        qkv_norm_rope(torch.ones(1, 72), 6, (torch.ones(4), None), (torch.ones(4), None), None, eps=0)


LAUNCHES = [
    *(module.launch_forward for module in (gated, norm, heads, swiglu, loss)),
    *(module.launch_jvp for module in (gated_jvp, norm_jvp, heads_jvp, swiglu_jvp, attention_jvp)),
]


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda f: f.__module__)
def test_every_launch_outside_of_autograd_enters_the_device_of_its_tensors(launch):
    assert launch.__wrapped__.__name__ == launch.__name__ and launch.__code__ is _wrapper_code()


def _wrapper_code():
    return on_own_device(lambda x: x).__code__


@pytest.mark.parametrize(("index", "entered"), [(0, []), (1, [torch.device("cuda:1")])])
def test_triton_launches_on_the_device_of_the_tensors(index, entered, monkeypatch):
    current = []

    @contextmanager
    def device(chosen):
        current.append(chosen)
        yield
        current.append("left")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    seen = on_own_device(lambda x, y: list(current))
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
    assert seen(x, y=2) == entered and current == [*entered, *["left"] * len(entered)]


@pytest.mark.multi_gpu
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.op)
def test_tensors_need_not_be_on_the_current_device(case):
    assert torch.cuda.current_device() == 0
    with use_path("triton"):
        assert check(case, case.ours, (300, 1), torch.device("cuda", 1)) < 2**-7
