"""What attention does inside a model, measured: norms, row mass, sinks. Records and files are training's business."""

from .probes import AttentionProbe as AttentionProbe
from .probes import probe_attention as probe_attention
from .weights import attention_norm as attention_norm
from .weights import effective_keys as effective_keys
from .weights import row_mass as row_mass
from .weights import saturation as saturation
from .weights import sdpa_weights as sdpa_weights
from .weights import sink_mass as sink_mass
from .weights import softmax_weights as softmax_weights
