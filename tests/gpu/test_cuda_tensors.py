"""CUDA tensors on a machine without a GPU: what is refused and why, and what a trace makes of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn as fa
import fastattn.torch  # the operators are there from here on
import places
from fastattn import dispatch, ops, tensors
from fastattn.backends import triton
from fastattn.integrations import torch_sdpa
from fastattn.problem import AttentionProblem
from processes import output_of

CUDA = torch.device("cuda", 0)


@pytest.fixture
def fakes() -> Iterator[None]:
    """Tensors of any device, without memory."""
    with FakeTensorMode():
        yield


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """What the machine and the environment have is asked once in a process."""

    def forget() -> None:
        for answer in (triton._missing_package, triton._missing_capability, triton.interprets):
            answer.cache_clear()

    forget()
    yield
    forget()


def arrays(device: str, *, dim: int = 16, value_dim: int = 24, dtype: Any = torch.float32) -> list[Tensor]:
    shapes = (2, 4, 5, dim), (2, 2, 7, dim), (2, 2, 7, value_dim)
    return [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]


def described(*arrays: Tensor, **options: Any) -> AttentionProblem:
    """The problem of tensors of a GPU, of which there are no values."""
    with pytest.MonkeyPatch.context() as patch:
        library = tensors.descriptions(torch, CUDA)
        patch.setattr("fastattn.problem.library_of", lambda *_, **__: library)
        return AttentionProblem.from_arguments(*arrays, **options)


def refusal(*arrays: Tensor, backend: str | None = None) -> str:
    with pytest.raises(NotImplementedError) as caught:
        dispatch.choose(described(*arrays), dispatch.candidates(backend))
    return str(caught.value)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine whose GPU is an H100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(triton, "_missing_package", lambda: "")
    return monkeypatch


class TestRefusals:
    """Nothing falls back in silence."""

    def test_no_gpu(self, fakes: None) -> None:
        text = refusal(*arrays("cuda"))
        assert "cpu: the tensors are on device 'cuda:0', expected 'cpu'" in text
        assert "torch finds no GPU that it can use" in text

    def test_no_triton(self, fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "triton", None)
        text = refusal(*arrays("cuda"))
        assert re.search(r"triton: triton is not there .*: pip install 'fastattn\[triton\]'", text)
        assert "math: runs only as backend='math'" in text

    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    def test_backends_of_the_cpu(self, backend: str, fakes: None) -> None:
        text = refusal(*arrays("cuda"), backend=backend)
        assert f"{backend}: the tensors are on device 'cuda:0', expected 'cpu'" in text

    def test_what_no_kernel_computes(self, fakes: None, hopper: pytest.MonkeyPatch) -> None:
        assert (
            dispatch.choose(described(*arrays("cuda", dim=256, value_dim=256)), dispatch.AUTOMATIC).name
            == "triton"
        )
        text = refusal(*arrays("cuda", dim=257, value_dim=300, dtype=torch.float64))
        assert "triton: no kernel computes float64 on a GPU: see backend='math'" in text
        assert (
            "head dimension 257 is more than 256: see backend='math', or the kernels for tensors on the CPU"
            in text
        )
        assert "value's head dimension 300 is more than 256" in text

    @pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
    def test_capability(self, capability: tuple[int, int], fakes: None, hopper: pytest.MonkeyPatch) -> None:
        hopper.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        problem = described(*arrays("cuda"))
        reasons = triton.TritonBackend().supports(problem)
        expected = (
            [] if capability >= (8, 0) else ["NVIDIA H100 has compute capability 7.5, expected 8.0 or more"]
        )
        assert reasons == expected

    def test_numpy_and_the_cpu(self) -> None:
        query, key, value = (x.zero_() for x in arrays("cpu"))
        with pytest.raises(
            NotImplementedError, match="triton: NumPy arrays are not on a GPU: pass CUDA tensors"
        ):
            fa.attention(query.numpy(), key.numpy(), value.numpy(), backend="triton")
        if not triton.interprets():
            with pytest.raises(
                NotImplementedError, match="triton: the tensors are on the CPU: pass CUDA tensors"
            ):
                fa.attention(query, key, value, backend="triton")


class TestOneDevice:
    @pytest.mark.parametrize("name", ["key", "value", "mask", "bias"])
    def test_operands_have_to_be_on_it(self, name: str, fakes: None) -> None:
        call = dict(zip(("query", "key", "value"), arrays("cuda"), strict=True))
        call |= {
            "mask": torch.ones(5, 7, dtype=torch.bool, device="cuda"),
            "bias": torch.ones(5, 7, device="cuda"),
        }
        for elsewhere in ("cpu", "cuda:1"):
            moved = torch.empty_like(call[name], device=elsewhere)
            with pytest.raises(RuntimeError, match=f"{name} is on device '{elsewhere}', expected 'cuda:0'"):
                fa.attention(**(call | {name: moved}))

    @pytest.mark.parametrize("name", ["kv_lengths", "query_offset", "alibi_slopes", "sinks"])
    def test_short_arguments(self, name: str) -> None:
        """On the device they stay there; on the CPU, as lists or tensors, they are checked; nowhere else."""
        library = tensors.on_device(torch, torch.device("cpu"))
        size = 2 if name in ("kv_lengths", "query_offset") else 4
        query, key, value = arrays("cpu")

        def problem(argument: Any) -> AttentionProblem:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fastattn.problem.library_of", lambda *_, **__: library)
                return AttentionProblem.from_arguments(query, key, value, **{name: argument})

        kept = torch.ones(size, dtype=torch.int64)
        assert getattr(problem(kept), name) is kept
        assert getattr(problem([1] * size), name).tolist() in ([1] * size, [[1] * size] * 2)
        with pytest.raises(RuntimeError, match=f"{name} is on device 'meta', expected 'cpu'"):
            problem(kept.to("meta"))
        with pytest.raises(TypeError, match=f"{name} must be a torch tensor like the first argument"):
            problem(kept.numpy())
        with pytest.raises(ValueError, match=rf"{name} must have shape .*, got \({size + 1},\)"):
            problem(torch.ones(size + 1, dtype=torch.int64))
        with pytest.raises(TypeError, match=f"{name} must hold .*, got bool"):
            problem(kept.bool())

    def test_other_kinds_of_devices(self, fakes: None) -> None:
        with pytest.raises(RuntimeError, match="out_a is on device 'xpu:0', expected 'cpu' or 'cuda'"):
            fa.merge_states(*[torch.empty(2, 3, 4, 5, device="xpu:0")] * 4)


class TestTraces:
    def test_fakes_are_results_of_the_device(self, fakes: None) -> None:
        query, key, value = arrays("cuda", dtype=torch.bfloat16)
        options: dict[str, Any] = {
            "kv_lengths": torch.ones(2, dtype=torch.int64, device="cuda"),
            "alibi_slopes": torch.ones(4, device="cuda"),
            "sinks": [0.0] * 4,
            "bias": torch.ones(4, 1, 7, device="cuda"),
            "mask": torch.ones(5, 7, dtype=torch.bool, device="cuda"),
            "dropout_p": 0.1,
        }
        out, lse, weights = fa.attention(query, key, value, **options, return_lse=True, return_weights=True)
        assert {x.device for x in (out, lse, weights)} == {CUDA}
        assert (out.shape, lse.shape, weights.shape) == ((2, 4, 5, 24), (2, 4, 5), (2, 4, 5, 7))
        assert (out.dtype, lse.dtype, weights.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
        grads = ops.backward(out, query, key, value, out, lse, wanted=("query", "key", "value"))
        assert [grad.shape for grad in grads[:3]] == [query.shape, key.shape, value.shape]

    def test_compiled_for_a_gpu(self, fakes: None) -> None:
        """Fullgraph, a drawn seed and a list among the arguments; torch's function, patched, as well."""
        query, key, value = arrays("cuda", value_dim=16)

        def model(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return fa.attention(query, key, value, dropout_p=0.5, kv_lengths=[3, 7], causal=True)

        for function in (
            model,
            lambda q, k, v: torch_sdpa.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        ):
            out = torch.compile(function, fullgraph=True, backend="aot_eager")(query, key, value)
            assert out.shape == (2, 4, 5, 16) and out.device == CUDA

    def test_exported_for_a_gpu(self) -> None:
        class Model(torch.nn.Module):
            def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                return fa.attention(query, key, value, causal=True)

        with FakeTensorMode(allow_non_fake_inputs=True):
            program = torch.export.export(Model(), tuple(arrays("cuda")))
        (node,) = [node for node in program.graph.nodes if node.target is torch.ops.fastattn.forward.default]
        assert node.meta["val"][0].device == CUDA

    def test_the_backward_on_meta_tensors(self) -> None:
        """Shapes alone, there and back, of every argument that has a gradient."""
        leaves = [x.requires_grad_() for x in arrays("meta")]
        shapes = {"bias": (4, 1, 7), "alibi_slopes": (2, 4), "sinks": (4,)}
        more = {name: torch.empty(shape, device="meta", requires_grad=True) for name, shape in shapes.items()}
        out, lse, weights = fa.attention(*leaves, **more, return_lse=True, return_weights=True, dropout_p=0.5)
        assert out.is_meta and out.shape == (2, 4, 5, 24)
        (out.sum() + lse.sum() + weights.sum()).backward()
        for leaf in (*leaves, *more.values()):
            assert leaf.grad is not None and leaf.grad.shape == leaf.shape and leaf.grad.dtype == leaf.dtype

    def test_the_backward_in_a_traced_graph(self) -> None:
        def step(query: Tensor, key: Tensor, value: Tensor) -> Any:
            out = fa.attention(query, key, value, causal=True)
            return torch.autograd.grad(out.sum(), (query, key, value))

        graph = make_fx(step)(*(x.requires_grad_() for x in arrays("meta")))
        targets = [node.target for node in graph.graph.nodes]
        assert (
            torch.ops.fastattn.forward.default in targets and torch.ops.fastattn.backward.default in targets
        )


class TestTorchsAttention:
    """What `scaled_dot_product_attention` leaves to torch."""

    @pytest.mark.parametrize(
        "dim, dtype, reached",
        [(256, torch.float32, True), (257, torch.float32, False), (16, torch.float64, False)],
    )
    def test_sizes(
        self, dim: int, dtype: Any, reached: bool, fakes: None, hopper: pytest.MonkeyPatch
    ) -> None:
        assert torch_sdpa._is_reached(*arrays("cuda", dim=dim, value_dim=16, dtype=dtype)) is reached

    def test_everything_without_kernels(self, fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not torch_sdpa._is_reached(*arrays("cuda"))
        called = []
        monkeypatch.setattr(torch_sdpa, "_torch_sdpa", lambda *arguments, **more: called.append(arguments))
        torch_sdpa.scaled_dot_product_attention(*arrays("cuda"), enable_gqa=True)
        assert len(called) == 1


def test_graph_capture_takes_no_values_from_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from fastattn.gpu import call

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"sinks must be a tensor on 'cuda:0' where a CUDA graph is captured"
    ):
        call.moved("sinks", torch.ones(4).numpy(), torch.float32, CUDA)
    kept = torch.ones(4)
    assert call.moved("sinks", kept, torch.float32, CUDA).data_ptr() == kept.data_ptr()


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_merged_by_operations_of_torch(
    layout: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    shape = (2, 3, 5, 8) if layout == "bhsd" else (2, 5, 3, 8)
    outs, lses = torch.randn(2, *shape).to(dtype), torch.randn(2, 2, 3, 5)
    lses[0, 0, 0, 0] = lses[1, 0, 0, 0] = lses[1, 1, 1, 1] = -torch.inf
    outs[1, 1, 1, 1] = torch.nan  # of a row without keys, and not read, in either layout
    states = outs[0], lses[0], outs[1], lses[1]
    expected = fa.merge_states(*states, layout=layout)
    places.on_device(monkeypatch)
    found = fa.merge_states(*states, layout=layout)
    for one, other in zip(found, expected, strict=True):
        assert one.is_contiguous() and one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 if dtype is torch.float32 else 0.02)


def test_zeros_where_nothing_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of a backward is made by the library of the device, which Python does not write to."""
    library = tensors.on_device(torch, torch.device("cpu"))
    with places.unread(monkeypatch):
        view = library.zeros((2, 3), "float64", torch.empty(1))
    assert view.array.dtype == torch.float64 and not view.array.any() and view.strides == (3, 1)


class TestConfiguration:
    def test_no_gpu(self, capsys: pytest.CaptureFixture[str]) -> None:
        fa.show_config()
        assert "GPU          none: torch finds no GPU that it can use" in capsys.readouterr().out

    def test_each_gpu(self, hopper: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        fa.show_config()
        assert re.search(
            r"^GPU 0 +NVIDIA H100, compute capability 9.0$", capsys.readouterr().out, re.MULTILINE
        )
        hopper.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
        triton._missing_capability.cache_clear()
        fa.show_config()
        assert (
            "GPU 0        NVIDIA H100, compute capability 6.1; NVIDIA H100 has comp"
            in capsys.readouterr().out
        )

    def test_torch_that_is_not_loaded(self) -> None:
        assert "GPU          not looked for: torch is not loaded" in output_of(
            "import fastattn; fastattn.show_config()"
        )


CPU_PATHS = """
    import sys
    {setup}
    import numpy as np, fastattn as fa
    query = np.ones((1, 2, 5, 8), np.float32)
    assert fa.attention(query, query, query).shape == query.shape
    assert "torch" not in sys.modules
    import torch
    tensor = torch.from_numpy(query).requires_grad_()
    fa.attention(tensor, tensor, tensor, causal=True, dropout_p=0.5).sum().backward()
    compiled = torch.compile(fa.attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tensor, tensor, tensor), fa.attention(tensor, tensor, tensor))
    print(fa.explain(tensor, tensor, tensor).backend, "fastattn.gpu.forward" in sys.modules)
"""


@pytest.mark.parametrize(
    "setup, variables",
    [
        ("", {}),
        ("sys.modules['triton'] = None", {"CUDA_VISIBLE_DEVICES": ""}),
        ("", {"TRITON_INTERPRET": "1"}),
    ],
    ids=["as it is", "no triton, no CUDA", "interpreter"],
)
def test_paths_of_the_cpu_need_nothing_of_a_gpu(setup: str, variables: dict[str, str]) -> None:
    assert output_of(CPU_PATHS.format(setup=setup), timeout=120, **variables) == "cpu False"


def test_the_names_of_the_package_need_no_triton() -> None:
    absent = "import sys; sys.modules['triton'] = sys.modules['torch'] = None"
    assert output_of(f"{absent}; import fastattn.gpu, fastattn.backends.triton; print('there')") == "there"
