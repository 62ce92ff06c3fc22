"""The projector as one op: every way through it against the composed reference, values and gradients; layouts, compilation, bad calls."""

from __future__ import annotations

import pytest
import torch
from projector_cases import CASES, NAMES, check, make, run
from torch import Tensor

from llava_fast.kernels import registry
from llava_fast.kernels.projector import _project, _project_backward, project

INDICES = ("source", "rows", "text_rows", "token_ids")


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, weights: torch.dtype) -> None:
    """The error against fp64 is at most twice that of torch in the same dtypes, plus a rounding of the largest value."""
    check(case, torch.float32, weights, "cpu")


def test_narrow_features() -> None:
    check("average", torch.bfloat16, torch.bfloat16, "cpu")


@pytest.mark.parametrize("case", ["mixed", "max", "linear pooled"])
def test_gradcheck_of_the_reference(case: str) -> None:
    arguments = make(case, torch.float64, E=2, D=3)
    leaves = {key: arguments[key].requires_grad_() for key in NAMES if arguments[key] is not None}
    assert torch.autograd.gradcheck(lambda *t: project(**{**arguments, **dict(zip(leaves, t, strict=True))}), tuple(leaves.values()))


@pytest.mark.parametrize("frozen", [("embedding",), ("features", "w1", "b1", "newline"), ("features", "w1", "b1", "w2", "b2")])
@pytest.mark.parametrize("case", ["average", "max"])
def test_only_what_is_trained_gets_a_gradient(case: str, frozen: tuple[str, ...]) -> None:
    arguments = make(case, torch.float32)
    everything = run(arguments, "cpu")
    leaves = {key: arguments[key].clone().requires_grad_(key not in frozen) for key in NAMES}
    out = project(**{**arguments, **leaves})
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().float())
    for key, leaf in leaves.items():
        assert (leaf.grad is None) if key in frozen else torch.equal(leaf.grad, everything[key]), key


@pytest.mark.parametrize("case", CASES)
def test_same_bits_twice_and_on_two_threads(case: str) -> None:
    arguments = make(case, torch.float32)
    expected, before = run(arguments, "cpu"), torch.get_num_threads()
    torch.set_num_threads(2)
    again = run(arguments, "cpu")
    torch.set_num_threads(before)
    for key in ("out", "embedding", *(["newline"] if arguments["newline"] is not None else [])):  # products of torch's may split anew
        assert torch.equal(again[key], expected[key]), key
    for key, value in run(arguments, "cpu").items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("case", ["plain", "mixed", "max", "linear pooled"])
def test_opcheck(case: str) -> None:
    a = make(case, torch.float32)
    leaves = [None if a[key] is None else a[key].requires_grad_() for key in NAMES]
    maps = (
        [cells for _, cells, _ in a["resamples"]],
        [n for _, _, size in a["resamples"] for n in size],
        ",".join(m for m, _, _ in a["resamples"]),
    )
    indices = a["source"], a["rows"], a["text_rows"], a["token_ids"]
    arguments = (*leaves, *indices, *maps, a["act"] or "", "cpu")
    torch.library.opcheck(_project, arguments)
    with torch.no_grad():
        out, pre, table = _project(*arguments)
    detached = [None if leaf is None else leaf.detach() for leaf in leaves]
    needs = [leaf is not None for leaf in leaves]
    backward = (torch.randn_like(out), detached[0], detached[1], detached[3], pre, table, *indices, *maps, a["act"] or "", needs, 11)
    torch.library.opcheck(_project_backward, (*backward, torch.float32, "cpu"))


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_compiles_without_graph_breaks(implementation: str) -> None:
    arguments = make("average", torch.float32)
    leaves = [arguments[key].requires_grad_() for key in NAMES]

    def step(*tensors: Tensor) -> Tensor:
        return project(**{**arguments, **dict(zip(NAMES, tensors, strict=True))}).sin().sum()

    torch.compiler.reset()
    with registry.use(projector=implementation):
        expected = torch.autograd.grad(step(*leaves), leaves)
        compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for ours, theirs in zip(compiled, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_text_no_pictures_and_strides() -> None:
    a = make("average", torch.float32)
    V = len(a["rows"])
    only = {**a, "rows": torch.arange(V), "text_rows": torch.empty(0, dtype=torch.int64), "token_ids": torch.zeros(V, dtype=torch.int64)}
    none = {**make("plain", torch.float32), "features": torch.empty(0, 24), "rows": torch.empty(0, dtype=torch.int64)}
    none |= {"text_rows": torch.arange(3), "token_ids": torch.tensor([1, 1, 4])}
    wide = {**a, "features": torch.stack([a["features"], a["features"]], 1)[:, 0], "w1": a["w1"].t().contiguous().t()}
    for arguments in (only, none, wide):
        ours, theirs = run(arguments, "cpu"), run(arguments, "reference")
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["average", "max", "plain"])
def test_indices_with_strides(case: str) -> None:
    a = make(case, torch.float32)
    apart = {key: None if a[key] is None else torch.stack([a[key], torch.zeros_like(a[key])], -1)[..., 0] for key in INDICES}
    apart["resamples"] = tuple((mode, cells.transpose(1, 2).contiguous().transpose(1, 2), size) for mode, cells, size in a["resamples"])
    for key, ours in run({**a, **apart}, "cpu").items():
        assert torch.equal(ours, run(a, "cpu")[key]), key


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(75, 23)}, r"expected features \[M, 24\] for w1 \[40, 24\], got torch.float32 \[75, 23\]"),
        ({"w2": torch.zeros(40, 24)}, r"expected w2 \[40, 40\] for w1 \[40, 24\], got \[40, 24\]"),
        ({"newline": torch.zeros(39)}, r"expected newline \[40\]"),
        ({"embedding": torch.zeros(11, 39)}, r"expected an embedding table \[vocabulary, 40\], got \[11, 39\]"),
        ({"text_rows": torch.arange(30)}, "share out 91 rows .* got 60 rows, 30 text rows, 60 sources and 75 view rows"),
        ({"source": None}, "got 60 rows, 31 text rows, no source and 75 view rows"),
        ({"act": "relu"}, "act must be one of gelu, .* got 'relu'"),
        ({"rows": torch.zeros(60, dtype=torch.int32)}, "expected int64 rows, got torch.int32"),
        ({"rows": torch.full((60,), 91)}, "rows must be 0 to 90, got 91 to 91"),
        ({"source": torch.full((60,), 84)}, "source must be 0 to 83, got 84 to 84"),
        ({"token_ids": torch.full((91,), -1)}, "token_ids must be 0 to 10, got -1 to -1"),
        ({"w2": torch.zeros(40, 40, device="meta")}, "one device, got cpu and meta"),
        ({"rows": torch.zeros(60, dtype=torch.int64, device="meta")}, "one device, got cpu and meta"),
        ({"resamples": (("average", torch.zeros(2, 5, 5, dtype=torch.int64), (0, 1)),)}, r"average pooling cannot make maps of \(0, 1\)"),
        ({"resamples": (("average", torch.zeros(2, 5, 5, dtype=torch.int32), (2, 2)),)}, "got torch.int32"),
        ({"resamples": (("median", torch.zeros(2, 5, 5, dtype=torch.int64), (2, 2)),)}, "got 'median'"),
    ],
)
def test_bad_arguments(change: dict, message: str, implementation: str) -> None:
    with registry.use(projector=implementation), pytest.raises(ValueError, match=message):
        project(**{**make("average", torch.float32), **change})
