"""What attention does inside a model, measured: norms, row mass, sinks. Recording is training's business."""

from .probes import AttentionProbe as AttentionProbe
from .probes import attention_norm as attention_norm
from .probes import probe_attention as probe_attention
from .probes import row_mass as row_mass
from .probes import sdpa_weights as sdpa_weights
from .probes import sink_mass as sink_mass
from .probes import softmax_weights as softmax_weights
