"""How a recogniser hears one utterance: its spectrogram, the alignment of its text, and attention weights, in an npz.

The report draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..models.ctc_decode import align, greedy
from ..models.speech import SpeechEncoder
from ..nn.attention import AttentionFn
from ..record import RecordWriter
from .audio import Utterances

if TYPE_CHECKING:
    from jaxtyping import Float

NAME, ARTIFACT = "hearing", "hearing.npz"
_HEADS = 2  # of the first, the middle and the last block
_LOOKED_AT = 16  # utterances


def hear(
    model: SpeechEncoder, features: Float[Tensor, "frames mels"], *, blocks: Sequence[int], heads: Sequence[int]
) -> tuple[Float[Tensor, "positions vocab_size"], Float[Tensor, "blocks heads positions positions"]]:
    """Log-probabilities of one utterance, and attention weights A = attention(q, k, I), in float32.

    What an attention gives for the identity as its values is its weights, whatever attention it is.

    Args:
        model: an encoder, which is not touched.
        features: (frames, mels), on any device.
        blocks, heads: whose weights, by number.
    """
    seen: list[Tensor] = []
    twin = SpeechEncoder(replace(model.config, packing=False))
    twin.load_state_dict(model.state_dict())
    twin.to(next(model.parameters()).device).eval()

    def watched(attend: AttentionFn) -> AttentionFn:
        def watch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            seqlen = v.shape[1]
            identity = torch.eye(seqlen, dtype=v.dtype, device=v.device)[None, :, None]
            weights = attend(q, k, identity.expand(*v.shape[:3], seqlen).contiguous(), **options)
            # (heads, positions, positions)
            seen.append(weights[0].transpose(0, 1)[list(heads)])
            return attend(q, k, v, **options)

        return watch

    for block in (twin.blocks[i] for i in blocks):
        attention: Any = block.attention
        attention.attention_fn = watched(attention.attention_fn)
    features = features.to(next(model.parameters()).device)
    with torch.no_grad():
        logits, _ = twin(features[None], torch.tensor([len(features)], device=features.device))
    return logits[0].log_softmax(-1), torch.stack(seen)


def write_hearing(writer: RecordWriter, model: SpeechEncoder, data: Utterances, *, step: int) -> None:
    """Write how `model` hears an utterance as arrays beside the records, and a record that names them.

        features (frames, mels)                         what it is given
        path (positions,)                               which character of the text a position says, -1 none
        said, heard ()                                  the text, and the best path's
        maps (blocks, heads, positions, positions)      attention weights, a row for each query
        blocks, heads                                   their numbers

    The utterance is that of median length of the first ones that can be used; nothing is written if none can.

    Args:
        writer: of the run's records.
        model: in eval mode.
        data: what there is.
        step: of the record.
    """
    usable = [(*sample, i) for i in range(min(_LOOKED_AT, len(data))) if (sample := data[i]) is not None]
    if not usable:
        return
    lengths = sorted(len(features) for features, _, _ in usable)
    features, tokens, number = next(each for each in usable if len(each[0]) == lengths[len(lengths) // 2])
    depth = len(model.blocks)
    blocks, heads = sorted({0, depth // 2, depth - 1}), range(min(_HEADS, model.config.nheads))
    log_probs, maps = hear(model, features, blocks=blocks, heads=heads)
    heard = data.config.decode(greedy(log_probs[None], torch.tensor([len(log_probs)]))[0])
    np.savez_compressed(
        writer.path.with_name(ARTIFACT),
        features=features.numpy().astype(np.float16),
        path=align(log_probs, tokens).numpy(),
        said=np.array(data.utterances[number].text),
        heard=np.array(heard),
        maps=maps.cpu().numpy().astype(np.float16),
        blocks=np.array(blocks),
        heads=np.array(heads),
    )
    writer.write(NAME, step=step, artifact=ARTIFACT)
