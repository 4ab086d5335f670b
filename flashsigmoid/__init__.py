"""Sigmoid attention for PyTorch: out = sigmoid(q k^T / sqrt(d) + b) v with b = -log n (arXiv:2409.04431)."""

from . import nn as nn
from . import testing as testing
from .backends.problem import BackendUnsupported as BackendUnsupported
from .functional import explain as explain
from .functional import sigmoid_attention as sigmoid_attention
from .functional import sigmoid_attention_fp8 as sigmoid_attention_fp8
from .functional import sigmoid_attention_varlen as sigmoid_attention_varlen
from .kvcache import sigmoid_attention_with_kvcache as sigmoid_attention_with_kvcache
from .kvcache import sigmoid_attention_with_prefix as sigmoid_attention_with_prefix

__version__ = "0.1.0"
