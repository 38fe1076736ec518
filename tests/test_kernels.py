"""Laws of every kernel: a new file in morph/kernels is tested by existing."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from morph import registry
from morph.errors import KernelUnavailable, UnknownName
from morph.kernels import _checks
from morph.testing import assert_close, error_ratio, exactly, poison_empty

EXAMPLES = [
    (name, example)
    for name in registry.names("kernels")
    for example in registry.load("kernels", name).EXAMPLES
]
SIZES = {
    "G4": {"H": 4, "G": 4, "K": 8, "V": 8},
    "G2-K8-V5": {"H": 6, "G": 2, "K": 8, "V": 5},
}
# Around the blocks and chunks of 64 that both kernels work in, and two of them with a rest
LENGTHS = (1, 63, 64, 65, 150)

each_example = pytest.mark.parametrize(
    ("name", "example"), EXAMPLES, ids=[f"{n}-{e}" for n, e in EXAMPLES]
)
each_size = pytest.mark.parametrize("sizes", list(SIZES.values()), ids=list(SIZES))


class Kernel:
    """A kernel module with one of its example settings."""

    def __init__(self, name: str, example: str) -> None:
        self.module = registry.load("kernels", name)
        self.options = self.module.EXAMPLES[example]

    def inputs(
        self, T: int, B: int = 2, dtype: torch.dtype = torch.float64, **sizes: int
    ) -> dict[str, Any]:
        sizes = sizes or SIZES["G2-K8-V5"]
        generator = torch.Generator().manual_seed(1)
        return self.module.example(
            B=B, T=T, dtype=dtype, generator=generator, **sizes, **self.options
        )


def cast(inputs: dict[str, Any], dtype: torch.dtype, gradients: bool = False) -> dict[str, Any]:
    """Floating tensors as leaves of `dtype`; gates stay in float32 at least."""

    def one(name: str, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        gate = name in ("g", "beta") and dtype in (torch.bfloat16, torch.float16)
        x = x.detach().to(torch.float32 if gate else dtype).clone()
        return x.requires_grad_(gradients)

    return {name: one(name, x) for name, x in inputs.items()}


def tensors(state: Any) -> list[torch.Tensor]:
    """The tensors of a final state: itself, or the tensors in a tuple."""
    if isinstance(state, torch.Tensor):
        return [state]
    return [x for x in state if isinstance(x, torch.Tensor)]


def leaves(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        n: x for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()
    }


def part(inputs: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The tokens start:stop of the inputs; padding covers everything up to stop."""
    total = inputs["q"].shape[1]

    def one(name: str, x: Any) -> Any:
        if name == "padding":
            return x[:, :stop]
        timed = isinstance(x, torch.Tensor) and x.ndim > 2 and x.shape[1] == total
        return x[:, start:stop] if timed else x

    return {name: one(name, x) for name, x in inputs.items()}


def gradients(
    run: Any, inputs: dict[str, Any], do: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    inputs = cast(inputs, dtype, gradients=True)
    o, _ = run(**inputs)
    found = torch.autograd.grad(o, list(leaves(inputs).values()), do.to(o.dtype))
    return dict(zip(leaves(inputs), found))


def ragged(B: int, T: int) -> torch.Tensor:
    """Padding on the left of row 0, on the right of row 1, and over all of row 2."""
    real = torch.ones(B, T, dtype=torch.bool)
    real[0, : T // 3] = False
    real[1, T - T // 4 :] = False
    real[2] = False
    return real


@each_example
@each_size
@pytest.mark.parametrize("T", LENGTHS, ids=[f"T{t}" for t in LENGTHS])
def test_forward_and_gradients_match_the_float64_reference(
    name: str, example: str, sizes: dict[str, int], T: int
) -> None:
    kernel = Kernel(name, example)
    inputs = kernel.inputs(T, **sizes)
    expected, state = kernel.module.reference(**inputs, output_final_state=True)
    got, got_state = kernel.module.forward(**cast(inputs, torch.float32), output_final_state=True)
    assert_close("o", expected, got)
    for one, other in zip(tensors(state), tensors(got_state), strict=True):
        assert_close("state", one, other)
    do = torch.randn(expected.shape, dtype=torch.float64)
    expected_grads = gradients(kernel.module.reference, inputs, do, torch.float64)
    for leaf, grad in gradients(kernel.module.forward, inputs, do, torch.float32).items():
        if expected_grads[leaf].abs().max() < 1e-12:  # such as dq where one key takes all weight
            assert grad.abs().max() < 1e-5, leaf
        else:
            assert_close(f"d{leaf}", expected_grads[leaf], grad)


@each_example
def test_calls_too_large_for_one_step_match_the_reference(name: str, example: str) -> None:
    """So many heads and tokens that a kernel splits them to stay in the cache of a CPU."""
    kernel = Kernel(name, example)
    inputs = kernel.inputs(300, B=3, H=8, G=4, K=32, V=16)
    expected, _ = kernel.module.reference(**inputs)
    assert_close("o", expected, kernel.module.forward(**cast(inputs, torch.float32))[0])
    do = torch.randn(expected.shape, dtype=torch.float64)
    expected_grads = gradients(kernel.module.reference, inputs, do, torch.float64)
    for leaf, grad in gradients(kernel.module.forward, inputs, do, torch.float32).items():
        assert_close(f"d{leaf}", expected_grads[leaf], grad)


@each_example
@pytest.mark.parametrize("T", (9, 70))
def test_padding_is_finite_and_matches_the_reference(name: str, example: str, T: int) -> None:
    kernel = Kernel(name, example)
    inputs = {**kernel.inputs(T, B=3), "padding": ragged(3, T)}
    expected, _ = kernel.module.reference(**inputs)
    got, _ = kernel.module.forward(**cast(inputs, torch.float32))
    assert_close("o", expected, got)
    assert not got[2].any(), "rows of padding are zeros"
    do = torch.randn(expected.shape, dtype=torch.float64)
    expected_grads = gradients(kernel.module.reference, inputs, do, torch.float64)
    for leaf, grad in gradients(kernel.module.forward, inputs, do, torch.float32).items():
        assert_close(f"d{leaf}", expected_grads[leaf], grad)


@each_example
@pytest.mark.parametrize("side", ("left", "right"))
def test_a_padded_row_is_the_row_alone(name: str, example: str, side: str) -> None:
    kernel = Kernel(name, example)
    T, short = 80, 71
    inputs = kernel.inputs(T)
    real = torch.ones(2, T, dtype=torch.bool)
    own = slice(T - short, T) if side == "left" else slice(0, short)
    real[0] = False
    real[0, own] = True
    both, _ = kernel.module.forward(**inputs, padding=real)
    batched = {n for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.ndim > 2}
    row = {n: x[:1] if n in batched else x for n, x in inputs.items()}
    alone, _ = kernel.module.forward(**part(row, own.start, own.stop))
    assert_close("padded row", alone[0], both[0, own])
    whole, _ = kernel.module.forward(**inputs)
    assert_close("other row", whole[1], both[1])


@each_example
@pytest.mark.parametrize("padded", (False, True), ids=("real", "padded"))
@pytest.mark.parametrize("run", ("forward", "reference"))
@pytest.mark.parametrize("cuts", ((40,), (3, 5, 8), tuple(range(1, 80)), (0, 79), (64, 66)))
def test_split_with_carried_state_is_unsplit(
    name: str, example: str, cuts: tuple[int, ...], run: str, padded: bool
) -> None:
    kernel = Kernel(name, example)
    T = 80
    inputs = kernel.inputs(T, B=3)
    if padded:
        real = torch.ones(3, T, dtype=torch.bool)
        real[0, :6], real[1, :73] = False, False
        inputs["padding"] = real
    function = getattr(kernel.module, run)
    whole, end = kernel.module.reference(**inputs, output_final_state=True)
    state, outputs = None, []
    bounds = [c for c in (0, *cuts, T) if c]
    for start, stop in zip([0, *bounds], bounds):
        o, state = function(
            **part(inputs, start, stop), initial_state=state, output_final_state=True
        )
        outputs.append(o)
    assert_close("o", whole, torch.cat(outputs, dim=1))
    if not padded:  # entries of a state that are void may hold anything
        for one, other in zip(tensors(end), tensors(state), strict=True):
            assert_close("state", one, other)


@each_example
def test_gradients_flow_through_a_carried_state(name: str, example: str) -> None:
    kernel = Kernel(name, example)
    T, cut = 75, 41
    inputs = kernel.inputs(T)

    def halves(**given: Any) -> tuple[torch.Tensor, None]:
        first, state = kernel.module.forward(**part(given, 0, cut), output_final_state=True)
        second, _ = kernel.module.forward(**part(given, cut, T), initial_state=state)
        return torch.cat([first, second], dim=1), None

    do = torch.randn(inputs["q"].shape[:3] + inputs["v"].shape[3:], dtype=torch.float64)
    expected = gradients(kernel.module.reference, inputs, do, torch.float64)
    for leaf, grad in gradients(halves, inputs, do, torch.float32).items():
        assert_close(f"d{leaf}", expected[leaf], grad)


@each_example
@pytest.mark.parametrize("t", (1, 63, 64, 100))
def test_causality_is_bit_exact(name: str, example: str, t: int) -> None:
    kernel = Kernel(name, example)
    inputs = kernel.inputs(130, dtype=torch.float32)
    before, _ = kernel.module.forward(**inputs)
    for leaf in ("q", "k", "v"):
        inputs[leaf] = inputs[leaf].clone()
        inputs[leaf][:, t] += 3.0
    after, _ = kernel.module.forward(**inputs)
    exactly("outputs before the change", before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


@each_example
def test_a_hundred_runs_are_equal_and_inputs_untouched(name: str, example: str) -> None:
    kernel = Kernel(name, example)
    inputs = kernel.inputs(70, dtype=torch.float32)
    kept = cast(inputs, torch.float32)
    do = torch.randn(inputs["q"].shape[:3] + inputs["v"].shape[3:])
    first = gradients(kernel.module.forward, inputs, do, torch.float32)
    o, _ = kernel.module.forward(**inputs)
    for _ in range(99):
        exactly("o", o, kernel.module.forward(**inputs)[0])
    for _ in range(9):
        for leaf, grad in gradients(kernel.module.forward, inputs, do, torch.float32).items():
            exactly(f"d{leaf}", first[leaf], grad)
    for leaf, x in leaves(kept).items():
        exactly(leaf, x, inputs[leaf])


@pytest.mark.parametrize("name", registry.names("kernels"))
def test_a_thousand_tokens_and_odd_heads_match_the_reference(name: str) -> None:
    kernel = Kernel(name, next(iter(registry.load("kernels", name).EXAMPLES)))
    inputs = kernel.inputs(1000, B=1, H=4, G=2, K=60, V=20)
    expected, state = kernel.module.reference(**inputs, output_final_state=True)
    got, got_state = kernel.module.forward(**cast(inputs, torch.float32), output_final_state=True)
    assert_close("o", expected, got)
    for one, other in zip(tensors(state), tensors(got_state), strict=True):
        assert_close("state", one, other)
    do = torch.randn(expected.shape, dtype=torch.float64)
    right = gradients(kernel.module.reference, inputs, do, torch.float64)
    for leaf, grad in gradients(kernel.module.forward, inputs, do, torch.float32).items():
        assert_close(f"d{leaf}", right[leaf], grad)


@each_example
def test_no_output_is_memory_that_nobody_wrote(name: str, example: str) -> None:
    kernel = Kernel(name, example)
    inputs = {**kernel.inputs(70, B=3, dtype=torch.float32), "padding": ragged(3, 70)}
    do = torch.randn(inputs["q"].shape[:3] + inputs["v"].shape[3:])
    clean, _ = kernel.module.forward(**inputs, output_final_state=True)
    clean_grads = gradients(kernel.module.forward, inputs, do, torch.float32)
    with poison_empty():
        o, state = kernel.module.forward(**inputs, output_final_state=True)
        grads = gradients(kernel.module.forward, inputs, do, torch.float32)
    exactly("o", clean, o)
    for x in tensors(state):
        assert torch.isfinite(x).all()
    for leaf, grad in grads.items():
        exactly(f"d{leaf}", clean_grads[leaf], grad)


@each_example
def test_strided_inputs(name: str, example: str) -> None:
    kernel = Kernel(name, example)
    inputs = kernel.inputs(67, dtype=torch.float32)
    expected, _ = kernel.module.forward(**inputs)

    def strided(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x], dim=-1).transpose(1, 2).contiguous().transpose(1, 2)[..., 0]

    for leaf in ("q", "k", "v"):
        inputs[leaf] = strided(inputs[leaf])
        assert not inputs[leaf].is_contiguous()
    assert_close("o", expected, kernel.module.forward(**inputs)[0])
    do = torch.randn(expected.shape, dtype=torch.float64)
    expected_grads = gradients(kernel.module.reference, inputs, do, torch.float64)
    for leaf, grad in gradients(kernel.module.forward, inputs, do, torch.float32).items():
        assert_close(f"d{leaf}", expected_grads[leaf], grad)


@each_example
def test_bfloat16_is_at_most_twice_as_wrong_as_plain_torch(name: str, example: str) -> None:
    kernel = Kernel(name, example)
    inputs = cast(kernel.inputs(130), torch.bfloat16)
    exact = cast(inputs, torch.float64)  # the same rounded values
    expected, _ = kernel.module.reference(**exact)
    plain, _ = kernel.module.reference(**inputs)
    got, _ = kernel.module.forward(**inputs)
    assert got.dtype == torch.bfloat16
    assert error_ratio(expected, got) <= 2 * error_ratio(expected, plain)
    do = torch.randn(expected.shape, dtype=torch.float64).bfloat16()
    right = gradients(kernel.module.reference, exact, do.double(), torch.float64)
    rough = gradients(kernel.module.reference, inputs, do, torch.bfloat16)
    for leaf, grad in gradients(kernel.module.forward, inputs, do, torch.bfloat16).items():
        bound = max(2 * error_ratio(right[leaf], rough[leaf]), 2**-8)
        assert error_ratio(right[leaf], grad) <= bound, leaf


@each_example
def test_fast_paths_say_whether_they_can_run(name: str, example: str) -> None:
    kernel = Kernel(name, example)
    inputs = kernel.inputs(8, dtype=torch.float32)
    assert kernel.module.PATHS
    for path in kernel.module.PATHS:
        reason = kernel.module.unsupported(path, **inputs)
        assert isinstance(reason, str)
        if reason:
            with pytest.raises(KernelUnavailable, match=path):
                kernel.module.forward(**inputs, path=path)
        else:
            kernel.module.forward(**inputs, path=path)
    with pytest.raises(UnknownName, match="reference"):
        kernel.module.forward(**inputs, path="nosuch")


def test_a_skipped_path_says_why_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="morph.kernels")
    for _ in range(2):
        assert _checks.pick("anop", None, {"fast": "no GPU is visible."}) == "reference"
        assert _checks.pick("anop", None, {"fast": "no GPU is visible.", "plain": ""}) == "plain"
    assert [r.getMessage() for r in caplog.records] == [
        "anop: not taking the fast path: no GPU is visible."
    ]


@each_example
def test_wrong_shapes_are_refused_with_their_sizes(name: str, example: str) -> None:
    kernel = Kernel(name, example)
    good = kernel.inputs(6, dtype=torch.float32)
    B, T, H, K = good["q"].shape
    G, V = good["v"].shape[2:]
    wrong = {
        "q": torch.zeros(B, T, H + 1, K),
        "k": torch.zeros(B, T, G, K + 1),
        "v": torch.zeros(B, T + 1, G, V),
        "padding": torch.ones(B, T - 1, dtype=torch.bool),
    }
    for leaf, x in wrong.items():
        with pytest.raises(ValueError, match=str(list(x.shape)).replace("[", r"\[")):
            kernel.module.forward(**{**good, leaf: x})
    with pytest.raises(ValueError, match="float64"):
        kernel.module.forward(**{**good, "v": good["v"].double()})
    with pytest.raises(ValueError, match="int64"):
        kernel.module.forward(**{**good, **{n: good[n].long() for n in "qkv"}})
    with pytest.raises(ValueError, match="bool"):
        kernel.module.forward(**good, padding=torch.ones(B, T))


@each_example
def test_costs_are_counted(name: str, example: str) -> None:
    module, options = Kernel(name, example).module, Kernel(name, example).options
    sizes = {"B": 1, "H": 4, "G": 2, "K": 8, "V": 8}
    for count in (module.flops, module.bytes):
        short, long = (count(T=t, **sizes, **options) for t in (64, 128))
        assert isinstance(short, int) and 0 < short < long


@pytest.mark.gpu
@each_example
@pytest.mark.parametrize("path", (None, "chunked", "banded"))
def test_on_a_gpu_it_is_the_same(name: str, example: str, path: str | None) -> None:
    """The path that is picked there, and the plain torch one, in float32 without TF32."""
    kernel = Kernel(name, example)
    if path is not None and path not in kernel.module.PATHS:
        pytest.skip(f"{name} has no {path} path")
    inputs = kernel.inputs(150)
    expected, state = kernel.module.reference(**inputs, output_final_state=True)
    there = {
        n: x.cuda() if isinstance(x, torch.Tensor) else x
        for n, x in cast(inputs, torch.float32).items()
    }
    got, got_state = kernel.module.forward(**there, output_final_state=True, path=path)
    assert_close("o", expected, got.cpu())
    for one, other in zip(tensors(state), tensors(got_state), strict=True):
        assert_close("state", one, other.cpu())
    do = torch.randn(expected.shape, dtype=torch.float64)
    right = gradients(kernel.module.reference, inputs, do, torch.float64)

    def run(**given: Any) -> Any:
        return kernel.module.forward(**given, path=path)

    for leaf, grad in gradients(run, there, do.cuda(), torch.float32).items():
        if right[leaf].abs().max() > 1e-12:
            assert_close(f"d{leaf}", right[leaf], grad.cpu())
