"""SigmoidAttention and its softmax twin written out a second time, in loops over heads."""

from __future__ import annotations

import math

import torch

DIM, NHEADS = 24, 4


def rms(x, weight, eps=1e-5):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def turned(x, base):
    """RoPE by complex numbers: token t turns (x_i, x_{i + d/2}) by t * base ** (-2 i / d)."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    angle = torch.arange(x.shape[1])[:, None] * torch.tensor([base ** (-i / half) for i in range(half)], dtype=x.dtype)
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((pairs.real, pairs.imag), -1)


def visible(i, j, causal=False, window_size=(None, None)):
    left, right = window_size
    return not ((causal and j > i) or (left is not None and j < i - left) or (right is not None and j > i + right))


def written_out(module, x, options, weights_of_scores):
    """The module's docstring in plain loops over heads; weights_of_scores(scores, head, keep) gives A."""
    nheads_k, head_dim = module.nheads_k, module.head_dim
    q = module.q_proj(x).view(*x.shape[:2], NHEADS, head_dim)
    k = module.k_proj(x).view(*x.shape[:2], nheads_k, head_dim)
    v = module.v_proj(x).view(*x.shape[:2], nheads_k, head_dim)
    if options.get("qk_norm", True):
        q, k = rms(q, module.q_norm.weight), rms(k, module.k_norm.weight)
    if options.get("position") == "rope":
        base = options.get("rope_base", 10_000.0)
        q, k = turned(q, base), turned(k, base)
    seqlen = x.shape[1]
    sees = {key: options[key] for key in ("causal", "window_size") if key in options}
    keep = torch.tensor([[visible(i, j, **sees) for j in range(seqlen)] for i in range(seqlen)])
    distance = torch.tensor([[abs(i - j) for j in range(seqlen)] for i in range(seqlen)])
    heads = []
    for h in range(NHEADS):
        h_k = h // (NHEADS // nheads_k)
        scores = q[:, :, h] @ k[:, :, h_k].mT / math.sqrt(head_dim)
        if options.get("position") == "alibi":
            scores = scores - 2.0 ** (-8.0 * (h + 1) / NHEADS) * distance
        out = weights_of_scores(scores, h, keep) @ v[:, :, h_k]
        heads.append(rms(out, module.out_norm.weight, 1e-12) if options.get("out_norm") else out)
    out = torch.cat(heads, -1)
    if options.get("gate"):
        out = out * module.gate_proj(x).sigmoid()
    return module.out_proj(out)


def slope_bias(h, n, causal):
    """-log of the sum over a row of what ALiBi leaves of a weight: its last row of causal ones, else its middle one."""
    slope = 2.0 ** (-8.0 * (h + 1) / NHEADS)
    here = n - 1 if causal else (n - 1) // 2
    # float32, as the op gets it
    return torch.tensor(-math.log(sum(math.exp(-slope * abs(here - j)) for j in range(n)))).item()


def sigmoid_weights(module, options):
    def weights(scores, h, keep):
        b = options.get("sigmoid_bias")
        mode = options.get("bias_mode", "fixed")
        if mode == "learnable":
            b = module.sigmoid_bias
        elif mode == "per_head":
            b = module.sigmoid_bias[h]
        elif options.get("alibi_bias"):
            b = slope_bias(h, round(math.exp(-b)), options.get("causal", False))
        elif b is None:
            b = -math.log(scores.shape[-1])
        return torch.sigmoid(scores + b) * keep

    return weights


def softmax_weights(scores, h, keep):
    return scores.masked_fill(~keep, -math.inf).softmax(-1)
