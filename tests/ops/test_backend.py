"""The dispatch table."""

import subprocess
import sys

import pytest
import torch

from alloy.errors import RecipeError
from alloy.ops import backend, choices, explain, rms_norm, use_backend
from alloy.ops.linear import linear


def test_every_op_has_a_reference_and_cpu_takes_its_own() -> None:
    """ "torch" is everywhere; the choice is by device type."""
    assert {"ssd_scan", "ssd_step", "causal_conv1d", "attn_prefill", "moe_experts", "rms_norm"} <= set(backend.TABLE)
    assert all("torch" in row for row in backend.TABLE.values())
    rows = {row["op"]: row for row in choices()}
    assert rows["ssd_scan"]["cpu"] == "cpu"
    kernels = backend.missing_triton() is None and "triton" in backend.TABLE["ssd_scan"]
    assert rows["ssd_scan"]["cuda"] == ("triton" if kernels else "torch")


def test_use_backend_overrides_and_nests() -> None:
    """Inside the block only; an op without that backend runs its reference."""
    assert backend.resolve("rms_norm", "cpu") is backend.TABLE["rms_norm"]["cpu"]
    with use_backend("torch"):
        assert backend.resolve("rms_norm", "cpu") is backend.TABLE["rms_norm"]["torch"]
        with use_backend("cpu"):
            assert backend.resolve("rms_norm", "cpu") is backend.TABLE["rms_norm"]["cpu"]
            assert backend.resolve("ssd_replay", "cpu") is backend.TABLE["ssd_replay"]["torch"]
    assert backend.resolve("rms_norm", "cpu") is backend.TABLE["rms_norm"]["cpu"]


def test_a_new_backend_needs_no_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added is used on its device; a place is taken once."""
    monkeypatch.setitem(backend.TABLE, "rms_norm", dict(backend.TABLE["rms_norm"]))
    monkeypatch.setitem(backend._PREFERENCE, "cuda", ("new",))
    backend.add("rms_norm", "new", lambda *_: "from the kernel")
    assert backend.resolve("rms_norm", "cuda")() == "from the kernel"
    assert backend.resolve("rms_norm", "cpu") is backend.TABLE["rms_norm"]["cpu"]
    with use_backend("new"):
        assert rms_norm(torch.ones(3), torch.ones(3), 0.0) == "from the kernel"
    with pytest.raises(ValueError, match='"rms_norm" has a "new" function already'):
        backend.add("rms_norm", "new", print)
    monkeypatch.undo()
    backend._choose.cache_clear()


def test_a_named_function_is_imported_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "module:function" costs nothing before; kernels are passed over where they cannot run."""
    monkeypatch.setitem(backend.TABLE, "rms_norm", {"torch": backend.TABLE["rms_norm"]["torch"]})
    backend.add("rms_norm", "triton", "math:sqrt")
    monkeypatch.setattr(backend, "missing_triton", lambda: "no CUDA device")
    assert backend.resolve("rms_norm", "cuda") is backend.TABLE["rms_norm"]["torch"]
    assert "torch (alloy.ops.norm._rms_norm), no CUDA device; has torch, triton" in explain("rms_norm", "cuda")
    backend._choose.cache_clear()
    monkeypatch.setattr(backend, "missing_triton", lambda: None)
    assert backend.resolve("rms_norm", "cuda")(9) == 3
    monkeypatch.undo()
    backend._choose.cache_clear()


def test_a_compiler_imports_named_functions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first use of a kernel may lie inside a compiled function without graph breaks."""
    monkeypatch.setitem(backend.TABLE, "rms_norm", {"torch": "torch:mul"})
    backend._choose.cache_clear()
    double = torch.compile(lambda x: backend.resolve("rms_norm", "cpu")(x, 2.0), fullgraph=True, backend="eager")
    torch.testing.assert_close(double(torch.ones(3)), torch.full((3,), 2.0))
    monkeypatch.undo()
    backend._choose.cache_clear()


def test_explain_says_what_and_why() -> None:
    """One line for a person."""
    line = explain("ssd_scan", seq=512)
    assert line.startswith("ssd_scan seq=512 on cpu: cpu (alloy.ops.cpu.ssd.ssd_scan), first choice on cpu")
    with use_backend("cpu"):
        assert "use_backend('cpu'), which lacks this op" in explain("ssd_replay")


def test_unknown_names_are_refused() -> None:
    """With the known ones in the message."""
    with pytest.raises(RecipeError, match=r'unknown backend "cuda"\. Known: cpu, torch'), use_backend("cuda"):
        pass
    with pytest.raises(RecipeError, match=r'unknown op "scan"\. Known: .*attn_decode'):
        explain("scan")


def test_ops_import_torch_alone() -> None:
    """No pydantic, no triton, no other level of the package."""
    code = "import sys, alloy.ops, alloy.ops.sampling; print([m for m in sys.modules if m.split('.')[0] in ('pydantic', 'transformers') or m.startswith(('alloy.core', 'alloy.models'))])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_where_their_tensors_are() -> None:
    """The current device is another one."""
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(3, 64, dtype=dtype), torch.randn(64, 64, dtype=dtype)
        there = x.to("cuda:1").requires_grad_(), weight.to("cuda:1").requires_grad_()
        y = rms_norm(linear(*there), there[1][0], 1e-6)
        want = rms_norm(linear(x, weight), weight[0], 1e-6)
        torch.testing.assert_close(y.cpu(), want, atol=2e-2, rtol=2e-2)
        y.square().sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(linear(*there).cpu(), linear(x, weight), atol=2e-1, rtol=2e-2)
        assert torch.cuda.current_device() == 0
