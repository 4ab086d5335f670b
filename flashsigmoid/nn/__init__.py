"""Modules around the op: attention, its softmax twin, norms, feed-forwards, positions, blocks."""

from .attention import SigmoidAttention as SigmoidAttention
from .attention import SoftmaxAttention as SoftmaxAttention
from .attention import softmax_attention as softmax_attention
from .block import Block as Block
from .mlp import MLP as MLP
from .mlp import SwiGLU as SwiGLU
from .multihead import MultiheadAttention as MultiheadAttention
from .norm import LayerScale as LayerScale
from .norm import RMSNorm as RMSNorm
from .position import CAPE as CAPE
from .position import RotaryEmbedding as RotaryEmbedding
from .position import alibi_bias as alibi_bias
from .position import alibi_slopes as alibi_slopes
from .position import sincos_positions as sincos_positions
