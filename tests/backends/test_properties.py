"""What sigmoid attention must be exactly, whatever the backend: sums, permutations, prefixes, limits, dropout bits."""

from __future__ import annotations

import math

import pytest
import torch
from backends.here import NAMES, double, interpret_in_tiles
from rounding import assert_rounded

from flashsigmoid import sigmoid_attention
from flashsigmoid.backends import blocked
from flashsigmoid.backends.philox import keep_mask, philox4x32, threshold
from flashsigmoid.functional import sigmoid_attention_shard
from flashsigmoid.testing import make_qkv

pytestmark = pytest.mark.parametrize("backend", NAMES)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_two_key_halves_add_up_to_the_whole(backend, causal, dropout_p) -> None:
    q, k, v, _ = make_qkv(2, 20, 33, 4, 2, 8, **double(backend))
    slopes, seed = torch.rand(4, **double(backend)), torch.tensor([2**62 + 17])
    common = {"sigmoid_bias": -3.0, "causal": causal, "alibi_slopes": slopes, "window_size": (15, 9)}
    common |= {"dropout_p": dropout_p, "seed": seed, "backend": backend}
    whole = sigmoid_attention_shard(q, k, v, q_offset=13, **common)
    cut = 14
    first = sigmoid_attention_shard(q, k[:, :cut], v[:, :cut], q_offset=13, **common)
    second = sigmoid_attention_shard(q, k[:, cut:], v[:, cut:], q_offset=13 - cut, origin=(0, 0, 0, cut), **common)
    assert_rounded(first + second, whole)


def test_query_batch_and_head_shards_are_slices_of_the_whole(backend) -> None:
    q, k, v, _ = make_qkv(3, 30, 40, 4, 4, 8, **double(backend))
    common = {
        "sigmoid_bias": -3.0,
        "causal": True,
        "dropout_p": 0.5,
        "seed": torch.tensor([99]),
        "backend": backend,
    }
    whole = sigmoid_attention_shard(q, k, v, q_offset=10, **common)
    part = sigmoid_attention_shard(
        q[1:2, 7:20, 2:], k[1:2, :, 2:], v[1:2, :, 2:], q_offset=17, origin=(1, 2, 7, 0), **common
    )
    assert_rounded(part, whole[1:2, 7:20, 2:])


def test_permuting_keys_changes_nothing(backend) -> None:
    q, k, v, _ = make_qkv(1, 17, 50, 2, 2, 16, **double(backend))
    order = torch.randperm(50)
    out = sigmoid_attention(q, k, v, backend=backend)
    assert_rounded(sigmoid_attention(q, k[:, order], v[:, order], backend=backend), out)


def test_a_causal_prefix_does_not_see_the_future(backend) -> None:
    q, k, v, _ = make_qkv(2, 64, 64, 2, 2, 16)
    call = {"sigmoid_bias": -4.0, "causal": True, "backend": backend}
    before = sigmoid_attention(q, k, v, **call)
    k, v = k.clone(), v.clone()
    k[:, 40:], v[:, 40:] = 1e4, -1e4
    assert torch.equal(sigmoid_attention(q, k, v, **call)[:, :40], before[:, :40])


def test_zeroing_a_value_row_masks_its_key_exactly(backend) -> None:
    q, k, v, dout = make_qkv(1, 9, 30, 2, 1, 8, **double(backend))
    keep = torch.rand(30) < 0.6
    bias = torch.tensor(-2.0, **double(backend))
    results = []
    for keys, values in ((k, v * keep[:, None, None]), (k[:, keep], v[:, keep])):
        leaves = [x.detach().requires_grad_() for x in (q, keys, values, bias)]
        out = sigmoid_attention(*leaves[:3], sigmoid_bias=leaves[3], backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    masked, removed = results
    for name, a, b in zip(
        ("out", "dq", "db"), (masked[i] for i in (0, 1, 4)), (removed[i] for i in (0, 1, 4)), strict=True
    ):
        assert_rounded(a, b, name=name)
    for masked_grad, removed_grad in zip(masked[2:3], removed[2:3], strict=True):
        assert_rounded(masked_grad[:, keep], removed_grad)
        assert not masked_grad[:, ~keep].any()


def test_one_row_does_not_depend_on_its_batch(backend) -> None:
    q, k, v, _ = make_qkv(4, 20, 20, 2, 2, 8)
    alone = sigmoid_attention(q[2:3], k[2:3], v[2:3], backend=backend)
    assert_rounded(sigmoid_attention(q, k, v, backend=backend)[2:3], alone)


def test_rows_that_see_nothing_are_zero_with_zero_gradient(backend) -> None:
    q, k, v, dout = make_qkv(1, 5, 2, 1, 1, 8)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = sigmoid_attention(*leaves, causal=True, backend=backend)
    assert not out[:, :3].any()
    assert out[:, 3:].all()
    dq = torch.autograd.grad(out, leaves, dout)[0]
    assert not dq[:, :3].any()
    assert dq[:, 3:].all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_empty_sizes_give_zeros_and_zero_gradients(backend, shape) -> None:
    batch, seqlen_q, seqlen_k = shape
    q, k, v, dout = make_qkv(batch, seqlen_q, seqlen_k, 2, 1, 8)
    bias = torch.zeros(2, requires_grad=True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = sigmoid_attention(*leaves, sigmoid_bias=bias, causal=True, backend=backend)
    assert out.shape == (batch, seqlen_q, 2, 8)
    assert not out.any()
    for leaf, grad in zip((*leaves, bias), torch.autograd.grad(out, (*leaves, bias), dout), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


def test_no_keys_and_the_default_bias(backend) -> None:
    q, k, v, _ = make_qkv(1, 3, 0, 2, 2, 8)
    assert not sigmoid_attention(q, k, v, backend=backend).any()


def test_limits_of_the_bias(backend) -> None:
    q, k, v, dout = make_qkv(1, 6, 7, 1, 1, 8, **double(backend))
    bias = torch.tensor(-math.inf, **double(backend), requires_grad=True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = sigmoid_attention(*leaves, sigmoid_bias=bias, backend=backend)
    grads = torch.autograd.grad(out, (*leaves, bias), dout)
    assert not out.any()
    assert not any(grad.any() for grad in grads)
    everything = sigmoid_attention(q, k, v, sigmoid_bias=1e4, backend=backend)
    assert_rounded(everything, v.sum(1, keepdim=True).expand_as(everything))


def test_one_key(backend) -> None:
    q, k, v, _ = make_qkv(1, 3, 1, 1, 1, 4, **double(backend))
    weight = torch.sigmoid((q * k).sum(-1, keepdim=True) / 2.0)  # -log(1) = 0
    assert_rounded(sigmoid_attention(q, k, v, backend=backend), weight * v)


def test_any_strides(backend) -> None:
    q, k, v, dout = make_qkv(2, 33, 21, 4, 4, 16)
    expected = sigmoid_attention(q, k, v, causal=True, backend=backend)
    qkv = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)] + [v.flip(-1).contiguous().flip(-1)]
    wide = torch.zeros(2, 33, 4, 32)
    wide[..., ::2] = q
    qkv[0] = wide[..., ::2]
    assert not qkv[0].is_contiguous()
    out = sigmoid_attention(*qkv, causal=True, backend=backend)
    assert out.is_contiguous()
    assert_rounded(out, expected)
    leaf = q.clone().requires_grad_()
    grads = [
        torch.autograd.grad(sigmoid_attention(leaf, k, v, backend=backend), leaf, d)[0]
        for d in (torch.ones_like(dout), torch.ones(1, 1, 1, 1).expand_as(dout))
    ]
    assert_rounded(*grads)


def test_dropout_keeps_the_stated_share_and_rescales(backend, monkeypatch) -> None:
    interpret_in_tiles(monkeypatch, 16, 8192)
    q, k, v, _ = make_qkv(1, 1, 200_000, 1, 1, 4)
    weight = sigmoid_attention(
        torch.zeros_like(q), k, torch.ones_like(v), sigmoid_bias=0.0, dropout_p=0.3, backend=backend
    )
    # 100,000 in the mean, with a standard deviation of 0.5 sqrt(n 0.3 / 0.7) = 146
    assert abs(weight.mean().item() - 100_000) < 5 * 146


def test_dropout_comes_from_torchs_generator(backend) -> None:
    q, k, v, _ = make_qkv(1, 8, 8, 2, 2, 8)

    def draw() -> torch.Tensor:
        return sigmoid_attention(q, k, v, dropout_p=0.5, backend=backend)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


def test_dropout_bits_are_the_same_in_every_tile_size(backend, monkeypatch) -> None:
    q, k, v, _ = make_qkv(2, 50, 70, 2, 2, 8, **double(backend))
    call = {
        "sigmoid_bias": 0.0,
        "q_offset": 0,
        "dropout_p": 0.5,
        "seed": torch.tensor([-7]),
        "backend": backend,
    }
    expected = sigmoid_attention_shard(q, k, v, **call | {"backend": "reference"})
    for block in (3, 17, 64):
        monkeypatch.setattr(blocked, "_tile", lambda problem, block=block: (block, block + 2))
        interpret_in_tiles(monkeypatch, {3: 16, 17: 32, 64: 64}[block], 16)
        assert_rounded(sigmoid_attention_shard(q, k, v, **call), expected)


def test_philox_known_answers(backend) -> None:
    """The known-answer vectors of the Random123 distribution (kat_vectors, philox4x32 with 10 rounds)."""
    del backend
    full = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((full,) * 4, (full, full), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in cases:
        seed = key[0] | key[1] << 32
        seed = seed - 2**64 if seed >= 2**63 else seed
        words = philox4x32(torch.tensor(seed), tuple(torch.tensor(c) for c in counter))
        assert tuple(int(word) for word in words) == expected


def test_keep_mask_is_a_function_of_global_indices_only(backend) -> None:
    del backend
    seed = torch.tensor([12345])
    whole = keep_mask(seed, 0.5, (0, 0, 0, 0), (3, 4, 20, 31))
    part = keep_mask(seed, 0.5, (1, 2, 5, 9), (2, 2, 7, 13))
    assert torch.equal(part, whole[1:3, 2:4, 5:12, 9:22])
    assert threshold(0.5) == 2**31


@pytest.mark.parametrize("sigmoid", ["auto", "exact", "fast"])
def test_not_a_number_is_seen_by_those_who_see_it(backend, sigmoid) -> None:
    q, k, v, _ = make_qkv(1, 20, 20, 2, 2, 8)
    call = {"causal": True, "sigmoid": sigmoid, "backend": backend}
    clean = sigmoid_attention(q, k, v, **call)
    dirty = q.clone()
    dirty[:, 6] = math.nan
    out = sigmoid_attention(dirty, k, v, **call)
    assert out[:, 6].isnan().all()
    rest = [i for i in range(20) if i != 6]
    assert_rounded(out[:, rest], clean[:, rest])
    dirty = k.clone()
    dirty[:, 13] = math.nan
    out = sigmoid_attention(q, dirty, v, **call)
    assert out[:, 13:].isnan().all()
    assert_rounded(out[:, :13], clean[:, :13])
