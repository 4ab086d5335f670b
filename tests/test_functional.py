"""The public op: what it refuses and in which words, what explain says, and how it lives with torch's machinery."""

from __future__ import annotations

import math

import pytest
import torch
from backends.here import FUSED, NAMES
from replay import assert_replayed
from rounding import assert_rounded
from torch.utils._python_dispatch import TorchDispatchMode

from flashsigmoid import BackendUnsupported, explain, sigmoid_attention
from flashsigmoid.backends import blocked, op
from flashsigmoid.functional import sigmoid_attention_shard
from flashsigmoid.testing import Options, assert_within_budget, compute, make_qkv, oracle, witness

Q, K, V, DOUT = make_qkv(2, 5, 7, 4, 2, 8)


def test_defaults_are_the_papers() -> None:
    out = sigmoid_attention(Q, K, V)
    assert_rounded(out, sigmoid_attention(Q, K, V, sigmoid_bias=-math.log(7), scale=8**-0.5))


BAD = [
    ({"q": Q[0]}, r"q must be a dense tensor \(batch, seqlen, nheads, head_dim\), got \(5, 4, 8\)"),
    ({"v": 3}, r"v must be a dense tensor .*, got int"),
    (
        {"q": Q.int(), "k": K.int(), "v": V.int()},
        r"q, k, v must share one dtype of float16.*, got torch.int32",
    ),
    ({"k": K.half()}, r"q, k, v must share one dtype .* got torch.float32, torch.float16, torch.float32"),
    ({"k": K.to("meta")}, r"q, k, v must be on one device, got cpu, meta, cpu"),
    ({"k": K[:1]}, r"k must share batch and head_dim of q, got q \(2, 5, 4, 8\) and k \(1, 7, 2, 8\)"),
    ({"k": K[..., :4]}, r"k must share batch and head_dim of q, got .* k \(2, 7, 2, 4\)"),
    (
        {"v": V[:, :6]},
        r"v must share batch, seqlen and nheads of k, got k \(2, 7, 2, 8\) and v \(2, 6, 2, 8\)",
    ),
    ({"q": Q[:, :, :3]}, r"nheads must be a positive multiple of nheads_k, got nheads=3, nheads_k=2"),
    ({"q": Q[:, :, :0]}, r"nheads must be a positive multiple of nheads_k, got nheads=0"),
    ({"v": V[..., :0]}, r"head_dim and head_dim_v must be at least 1, got 8 and 0"),
    ({"sigmoid_bias": math.nan}, r"sigmoid_bias must be a number below \+inf, got nan"),
    ({"sigmoid_bias": math.inf}, r"sigmoid_bias must be a number below \+inf, got inf"),
    ({"sigmoid_bias": -1e39}, r"sigmoid_bias must be within float32's 3.403e\+38, got -1e\+39"),
    ({"scale": 10**400}, r"scale must be within float32's 3.403e\+38, got 1000"),
    ({"sigmoid_bias": "log"}, r"sigmoid_bias must be a number, got 'log'"),
    ({"sigmoid_bias": torch.zeros(3)}, r"sigmoid_bias must have shape .*, got \(3,\) for q \(2, 5, 4, 8\)"),
    ({"sigmoid_bias": torch.zeros(2, 4, 7)}, r"sigmoid_bias must have shape .*, got \(2, 4, 7\)"),
    (
        {"sigmoid_bias": torch.zeros(4, dtype=torch.int64)},
        r"sigmoid_bias must be float16, .*, got torch.int64",
    ),
    (
        {"sigmoid_bias": torch.zeros(4, device="meta")},
        r"sigmoid_bias must be on the device of q, cpu, got meta",
    ),
    ({"alibi_slopes": 0.5}, r"alibi_slopes must be a tensor, got float"),
    (
        {"alibi_slopes": torch.zeros(())},
        r"alibi_slopes must have shape \(nheads,\) or \(batch, nheads\), got \(\)",
    ),
    ({"alibi_slopes": torch.zeros(2)}, r"alibi_slopes must have shape .*, got \(2,\)"),
    ({"scale": math.inf}, r"scale must be finite, got inf"),
    ({"scale": None, "causal": 1}, r"causal must be True or False, got 1"),
    ({"window_size": 3}, r"window_size must be \(left, right\), got 3"),
    ({"window_size": (1, 2, 3)}, r"window_size must be \(left, right\), got \(1, 2, 3\)"),
    (
        {"window_size": (-1, -1)},
        r"window_size must be non-negative integers, None for unlimited, got \(-1, -1\)",
    ),
    ({"window_size": (1.5, None)}, r"window_size must be non-negative integers, .*, got \(1.5, None\)"),
    ({"window_size": (2**63, None)}, r"window_size must be below 2\*\*63, got \(9223372036854775808, None\)"),
    ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
    ({"dropout_p": -0.1}, r"dropout_p must be in \[0, 1\), got -0.1"),
    ({"dropout_p": math.nan}, r"dropout_p must be in \[0, 1\), got nan"),
    ({"sigmoid": "tanh"}, r"sigmoid must be one of auto, exact, fast, got 'tanh'"),
    ({"backend": "cuda"}, r"backend must be one of auto, hopper, triton, blocked, reference, got 'cuda'"),
]


@pytest.mark.parametrize("function", [sigmoid_attention, explain])
@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_one_clear_error(function, change, message) -> None:
    call = {"q": Q, "k": K, "v": V} | change
    with pytest.raises(ValueError, match=f"^{message}"):
        function(call.pop("q"), call.pop("k"), call.pop("v"), **call)


def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.as_nested_tensor([Q[0], Q[1]], layout=torch.jagged)
    with pytest.raises(ValueError, match="q must be a dense tensor"):
        sigmoid_attention(nested, K, V)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": None}, r"seed is required when dropout_p > 0, got seed=None, dropout_p=0.1"),
        ({"seed": 3}, r"seed must be an int64 tensor of one element, got 3"),
        ({"seed": torch.tensor([1, 2])}, r"seed must be an int64 tensor of one element, got \(2,\) torch.int64"),
        ({"seed": torch.tensor([1.5])}, r"seed must be an int64 tensor of one element, got \(1,\) torch.float32"),
        ({"origin": (0, 0, 0, -1)}, r"origin must be four indices .* from 0 to 2\*\*32 - 1, got \(0, 0, 0, -1\)"),
        ({"origin": (0, 0, 0, 2**32)}, r"origin must be four indices .*, got \(0, 0, 0, 4294967296\)"),
        ({"origin": (0, 0, 0)}, r"origin must be four indices .*, got \(0, 0, 0\)"),
        ({"origin": (0, 0, 0, 0.5)}, r"origin must be four indices .*, got \(0, 0, 0, 0.5\)"),
        ({"q_offset": 1.5}, r"q_offset must be an integer, got 1.5"),
        ({"q_offset": True}, r"q_offset must be an integer, got True"),
        ({"sigmoid_bias": None}, r"sigmoid_bias is required of a block, .* got None"),
        ({"dropout_p": "a"}, r"dropout_p must be a number, got 'a'"),
    ],
)
def test_a_bad_shard_is_one_clear_error(change, message) -> None:
    call = {"sigmoid_bias": 0.0, "q_offset": 0, "dropout_p": 0.1, "seed": torch.tensor([1])} | change
    with pytest.raises(ValueError, match=f"^{message}"):
        sigmoid_attention_shard(Q, K, V, **call)


def test_explain_names_the_choice_and_the_reasons() -> None:
    chosen = explain(Q, K, V, causal=True, sigmoid="fast")
    assert (chosen.backend, set(chosen.reasons)) == ("blocked", {"hopper", "triton", "reference"})
    assert str(chosen).splitlines() == [
        "backend: blocked",
        "formula: exact: torch.sigmoid in float32; sigmoid='fast' changes nothing here",
        "not hopper: the device must be of compute capability 9.0, got cpu",
        "not triton: device must be a GPU, got cpu",
        "not reference: O(seqlen_q * seqlen_k) memory: it runs only when asked for, backend='reference'",
    ]
    asked = explain(Q.double(), K.double(), V.double(), backend="reference")
    assert (asked.backend, asked.formula) == ("reference", "exact: torch.sigmoid in float64")
    assert asked.reasons == {
        "hopper": "the device must be of compute capability 9.0, got cpu",
        "triton": "dtype must be float16, bfloat16 or float32, got float64",
        "blocked": "backend='reference' was asked for",
    }


def test_a_named_backend_that_cannot_says_why(monkeypatch) -> None:
    from flashsigmoid.backends import blocked

    monkeypatch.setattr(
        blocked, "unsupported", lambda problem, direction: f"needs head_dim 64, got head_dim={problem.head_dim}"
    )
    message = "blocked: needs head_dim 64, got head_dim=8"
    others = "hopper: the device must be of compute capability 9.0, got cpu; triton: device must be a GPU, got cpu"
    for backend, reason in (("blocked", message), ("auto", f"{others}; {message}")):
        with pytest.raises(BackendUnsupported, match=reason):
            sigmoid_attention(Q, K, V, backend=backend)


def samples():
    """Arguments of flashsigmoid::fwd that reach each optional tensor and each scalar."""
    q, k, v, _ = make_qkv(2, 5, 7, 4, 2, 8, 6)
    bias, slopes, seed = torch.randn(2, 4, 5), torch.rand(4), torch.tensor([7])
    leaf = [x.requires_grad_() for x in (q, k, v)]
    tail, sums = (((0, 0, 0, 0), "auto", None, None, needed, "blocked") for needed in (False, True))
    dense = (None, None)  # no cu_seqlens
    yield (*leaf, None, None, None, *dense, -2.0, None, False, None, None, None, 0.0, *tail)
    yield (*leaf, None, None, None, *dense, None, 0.3, True, None, None, None, 0.0, *tail)
    yield (*leaf, None, torch.rand(4), None, *dense, -1.0, None, True, None, None, None, 0.0, *tail)
    yield (*leaf, bias.requires_grad_(), slopes.requires_grad_(), None, *dense, None, 0.3, True, 3, 1, 0, 0.0, *sums)
    yield (
        *leaf,
        torch.zeros(4, requires_grad=True),
        None,
        seed,
        *dense,
        None,
        None,
        False,
        None,
        None,
        1,
        0.5,
        *sums,
    )


@pytest.mark.parametrize("is_compiled", [False, True])
def test_sums_are_asked_for_exactly_where_a_gradient_is(is_compiled, monkeypatch) -> None:
    """And whoever is told that nobody asks, and somebody does, gets an error and no zeros."""
    seen = []
    backward = blocked.backward

    def watched(problem, *args):
        seen.append(problem.needs_sums)
        return backward(problem, *args)

    monkeypatch.setattr(blocked, "backward", watched)
    q, k, v, dout = make_qkv(1, 5, 7, 2, 2, 8)
    slopes, leaf = torch.tensor([0.5, 0.25]), q.requires_grad_()
    attend = torch.compile(sigmoid_attention, backend="aot_eager") if is_compiled else sigmoid_attention
    torch.autograd.grad(attend(leaf, k, v, alibi_slopes=slopes, backend="blocked"), leaf, dout)
    both = (leaf, slopes.requires_grad_())
    grads = torch.autograd.grad(attend(leaf, k, v, alibi_slopes=slopes, backend="blocked"), both, dout)
    assert seen == [False, True]
    expected = torch.autograd.grad(sigmoid_attention(leaf, k, v, alibi_slopes=slopes, backend="reference"), both, dout)
    for grad, exact in zip(grads, expected, strict=True):
        assert_rounded(grad, exact)
    monkeypatch.setattr(op, "needs_sums", lambda *sides: False)
    with pytest.raises(RuntimeError, match="invalid gradient"):
        torch.autograd.grad(sigmoid_attention(leaf, k, v, alibi_slopes=slopes, backend="blocked"), both, dout)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("index", range(5))
def test_opcheck_forward(index) -> None:
    torch.library.opcheck(torch.ops.flashsigmoid.fwd.default, list(samples())[index])


@pytest.mark.parametrize("index", range(5))
def test_opcheck_backward(index) -> None:
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in list(samples())[index]]
    torch.library.opcheck(torch.ops.flashsigmoid.bwd.default, (torch.randn(2, 5, 4, 6), *args))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", [{}, {"causal": True, "window_size": (3, None)}, {"dropout_p": 0.25}])
def test_compiles_whole_forward_and_backward(dynamic, options) -> None:
    torch.compiler.reset()  # the variants before this one count towards dynamo's limit of recompilations

    def call(q, k, v, bias, slopes):
        return sigmoid_attention(q * 2, k, v, sigmoid_bias=bias, alibi_slopes=slopes, **options).sin()

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (7, 9):
        q, k, v, dout = make_qkv(2, 5, seqlen, 4, 2, 8)
        leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(4), torch.rand(4))]
        results = []
        for function in (call, compiled):
            torch.manual_seed(1)
            out = function(*leaves)
            results.append((out, *torch.autograd.grad(out, leaves, dout)))
        for eager, traced in zip(*results, strict=True):
            assert_rounded(traced, eager)


def test_compiles_with_the_default_bias_and_a_changing_length() -> None:
    compiled = torch.compile(sigmoid_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen in (3, 5, 11):
        q, k, v, _ = make_qkv(1, seqlen, seqlen, 2, 2, 8)
        assert_rounded(compiled(q, k, v, causal=True), sigmoid_attention(q, k, v, causal=True))


@pytest.mark.parametrize("backend", FUSED)
def test_double_backward_is_right_or_one_clear_error(backend) -> None:
    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    (dq,) = torch.autograd.grad(sigmoid_attention(*leaves, backend=backend).sum(), leaves[0], create_graph=True)
    with pytest.raises(BackendUnsupported, match="double backward needs backend='reference'"):
        dq.sum().backward()
    (dq,) = torch.autograd.grad(sigmoid_attention(*leaves, backend="reference").sum(), leaves[0], create_graph=True)
    dq.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


def test_forward_mode_is_right_or_one_clear_error() -> None:
    def call(q, k, v, **options):
        return sigmoid_attention(q, k, v, causal=True, **options)

    def product(**options):
        return torch.func.jvp(lambda *x: call(*x, **options), (Q, K, V), (Q.sin(), K.cos(), V.exp()))[1]

    for transform in (product, lambda: torch.func.jvp(lambda v: call(Q, K, v), (V,), (V,))):
        with pytest.raises(BackendUnsupported, match="forward-mode derivatives need backend='reference'"):
            transform()
    step = 1e-6
    moved = [(x.double() + sign * step * dx.double()) for sign in (1, -1) for x, dx in
             ((Q, Q.sin()), (K, K.cos()), (V, V.exp()))]  # fmt: skip
    expected = (call(*moved[:3]) - call(*moved[3:])) / (2 * step)
    # the difference's own error is step^2 / 6 and 1e-16 / step
    assert_rounded(product(backend="reference").double(), expected, dtype=torch.float32)


@pytest.mark.parametrize("backend", FUSED)
def test_vmap_is_a_loop(backend) -> None:
    def call(q):
        return sigmoid_attention(q, K, V, causal=True, backend=backend)

    q = torch.stack([Q, Q.flip(0)])
    assert_rounded(torch.vmap(call)(q), torch.stack([call(each) for each in q]))


class Seen(TorchDispatchMode):
    """The names of the operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_op_and_a_plain_call_computes_the_same() -> None:
    """Plain calls go past the dispatcher; whoever listens to it hears the op, in the backward too."""
    leaves = [x.requires_grad_() for x in (*make_qkv(2, 9, 11, 4, 2, 8)[:3], torch.randn(4))]
    dout = torch.randn(2, 9, 4, 8)

    def call() -> list[torch.Tensor]:
        out = sigmoid_attention(*leaves[:3], sigmoid_bias=leaves[3], causal=True, backend="blocked")
        return [out, *torch.autograd.grad(out, leaves, dout)]

    plain = call()
    assert "_Attention" in type(plain[0].grad_fn).__name__
    with Seen() as seen:
        listened = call()
    assert [name for name in seen.names if "flashsigmoid" in name] == [
        "flashsigmoid.fwd.default", "flashsigmoid.bwd.default",
    ]  # fmt: skip
    for a, b in zip(plain, listened, strict=True):
        assert torch.equal(a, b)


def test_an_input_changed_before_the_backward_is_an_error() -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 5, 7, 2, 1, 8)[:3])
    changed = k * 1.0
    out = sigmoid_attention(q, changed, v)
    changed.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_function_transforms_are_right_or_one_clear_error() -> None:
    """grad, vjp, gradients of each sample by vmap of grad, of tensors and of a bias; no second derivative."""
    q, k, v, dout = make_qkv(3, 5, 7, 2, 1, 8, dtype=torch.float64)
    bias = torch.randn(2, dtype=torch.float64)

    def call(q, k, v, bias):
        return sigmoid_attention(q, k, v, sigmoid_bias=bias, causal=True)

    def loss(q, k, v, bias, dout):
        return (call(q, k, v, bias) * dout).sum()

    def grads(q, k, v, bias, dout):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
        return torch.autograd.grad(loss(*leaves, dout), leaves)

    expected = grads(q, k, v, bias, dout)
    _, pull = torch.func.vjp(call, q, k, v, bias)
    for found in (torch.func.grad(loss, (0, 1, 2, 3))(q, k, v, bias, dout), pull(dout)):
        for a, b in zip(found, expected, strict=True):
            assert_rounded(a, b)
    samples = [x.unsqueeze(1) for x in (q, k, v, dout)]
    each = torch.vmap(torch.func.grad(loss, (0, 1, 2, 3)), in_dims=(0, 0, 0, None, 0))
    found = each(*samples[:3], bias, samples[3])
    for index in range(3):
        alone = grads(*(x[index] for x in samples[:3]), bias, samples[3][index])
        for a, b in zip(found, alone, strict=True):
            assert_rounded(a[index], b)
    with pytest.raises(BackendUnsupported, match="double backward needs backend='reference'"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q, k, v, bias, dout).sum())(q)


def test_gradients_of_a_transform_compile_by_the_reference() -> None:
    grad = torch.func.grad(lambda q: sigmoid_attention(q, K, V, backend="reference").square().sum())
    torch.compiler.reset()
    assert torch.equal(torch.compile(grad, fullgraph=True, backend="eager")(Q), grad(Q))


@pytest.mark.parametrize("backend", NAMES)
def test_only_wanted_gradients(backend) -> None:
    """Of one tensor alone what it is beside the others, to the bit."""
    tensors = [Q, K, V, torch.randn(4) - 2.0, torch.rand(4)]

    def grads(wanted: set[int]) -> tuple[torch.Tensor, ...]:
        leaves = [x.clone().requires_grad_(index in wanted) for index, x in enumerate(tensors)]
        q, k, v, bias, slopes = leaves
        out = sigmoid_attention(q, k, v, sigmoid_bias=bias, alibi_slopes=slopes, causal=True, backend=backend)
        assert out.requires_grad == bool(wanted)
        return torch.autograd.grad(out, [leaves[index] for index in sorted(wanted)], DOUT) if wanted else ()

    everything = grads(set(range(5)))
    assert grads(set()) == ()
    for index in range(5):
        (alone,) = grads({index})
        assert torch.equal(alone, everything[index]), index


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_autocast_runs_in_its_dtype(backend) -> None:
    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    with torch.autocast("cpu", torch.bfloat16):
        out = sigmoid_attention(leaves[0], leaves[1].bfloat16(), leaves[2], backend=backend)
    assert out.dtype == torch.bfloat16
    expected = sigmoid_attention(*(x.bfloat16() for x in leaves), backend=backend)
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert leaves[0].grad is not None
    assert leaves[0].grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert sigmoid_attention(*(x.double() for x in leaves), backend=backend).dtype == torch.float64
        with pytest.raises(ValueError, match=r"q, k, v must share one dtype .*, got torch.int32, torch.bfloat16,"):
            sigmoid_attention(Q.int(), K, V)
        with pytest.raises(ValueError, match=r"k must be a dense tensor .*, got NoneType"):
            sigmoid_attention(Q, None, V)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("backend", NAMES)
def test_activation_checkpointing_replays_dropout(backend) -> None:
    def call(q, k, v):
        return sigmoid_attention(q, k, v, dropout_p=0.5, backend=backend)

    assert_replayed(call, (Q, K, V), DOUT)


def test_meta_tensors_give_the_shape() -> None:
    out = sigmoid_attention(*(x.to("meta") for x in (Q, K, V[..., :6])))
    assert (out.device.type, out.shape) == ("meta", (2, 5, 4, 6))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_any_number_of_threads(causal, threads) -> None:
    """torch's matrix products round differently with the number of threads, and so do we: inside the budget."""
    tensors = make_qkv(2, 600, 700, 4, 2, 16)
    options = Options(causal=causal, sigmoid_bias=-math.log(700))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = compute(*tensors, backend="blocked", **options)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    expected, seen = oracle(*tensors, **options), witness(*tensors, **options)
    for name, result in actual.items():
        assert_within_budget(name, result, expected[name], seen[name])


def test_models_of_several_biases_compile():
    """From the second number on a compiler traces a symbol for it."""
    torch.compiler.reset()
    q, k, v, _ = make_qkv(1, 5, 5, 2, 2, 8)
    compiled = torch.compile(sigmoid_attention, fullgraph=True, backend="eager")
    for b, scale in ((-1.0, 0.5), (-2.0, 0.25), (-3.0, 0.125)):
        expected = sigmoid_attention(q, k, v, sigmoid_bias=b, scale=scale)
        assert_rounded(compiled(q, k, v, sigmoid_bias=b, scale=scale), expected)
