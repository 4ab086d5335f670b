"""timm's Vision Transformers with sigmoid attention: an attention layer for them, a configuration, a builder.

No training and no images. Parameters have timm's names and shapes, so that its pretrained weights load.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import timm
import torch
from safetensors import SafetensorError
from timm.layers.attention import Attention
from timm.layers.drop import DropPath, drop_path
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from .. import nn as ours
from ..nn.attention import AttentionFn
from ..nn.config import check_layer_scale, check_types

if TYPE_CHECKING:
    from jaxtyping import Float


class VisionAttention(Attention):
    """timm's multi-head attention with sigmoid in place of softmax: the same parameters, arguments and layout.

        q, k, v = W_qkv x       per head; q and k normalised if qk_norm
        out = W_o N(A v),       A = sigmoid(t q k^T / sqrt(head_dim) + b)

    with t = 1, or a parameter of every head that starts there: exp(log_temperature), and N nothing, or an RMSNorm of
    every head as in `nn.SigmoidAttention` with out_norm.

    It is what timm takes as `attn_layer`; `integrations.timm` makes one of an attention that is already there.

    Attributes:
        kind: "sigmoid", or "softmax" for the twin.
        sigmoid_bias: b; None: -log of the number of tokens of each call.
        attention_fn: called as `nn.SigmoidAttention` calls its own; None: `sigmoid_attention`, or torch's SDPA for
            the twin.
    """

    log_temperature: nn.Parameter | None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.configure()

    def configure(
        self,
        kind: Literal["sigmoid", "softmax"] = "sigmoid",
        sigmoid_bias: float | None = None,
        bias_mode: Literal["fixed", "learnable", "per_head"] = "fixed",
        attention_fn: AttentionFn | None = None,
        learnable_temperature: bool = False,
        out_norm: bool = False,
    ) -> None:
        """Set the attributes anew: b fixed, or one parameter, or one of every head, that starts at sigmoid_bias.

        Raises:
            ValueError: a word is not one of those, sigmoid_bias is NaN or +inf, or a parameter lacks its initial value.
        """
        check_settings(kind, sigmoid_bias, bias_mode)
        self.kind, self.attention_fn = kind, attention_fn
        device = self.qkv.weight.device
        temperature = nn.Parameter(torch.zeros(self.num_heads, device=device)) if learnable_temperature else None
        self.register_parameter("log_temperature", temperature)
        self.out_norm = ours.RMSNorm(self.head_dim, eps=1e-12).to(device) if out_norm else nn.Identity()
        self._parameters.pop("sigmoid_bias", None)
        if bias_mode == "fixed":
            self.sigmoid_bias: float | Tensor | None = sigmoid_bias
            return
        self.__dict__.pop("sigmoid_bias", None)
        shape = () if bias_mode == "learnable" else (self.num_heads,)
        initial = torch.full(shape, float(sigmoid_bias or 0.0), device=device)
        self.sigmoid_bias = nn.Parameter(initial)

    @property
    def nheads_k(self) -> int:
        """Key and value heads; query head h reads key head h // (num_heads // nheads_k)."""
        return (self.qkv.out_features // self.head_dim - self.num_heads) // 2

    def share_keys(self, nheads_k: int) -> None:
        """Leave this many key and value heads: of every group of query heads the first head's.

        W_qkv then has dim + 2 nheads_k head_dim rows, where timm's has 3 dim.

        Raises:
            ValueError: nheads_k is no divisor of the heads that are there.
        """
        here = self.nheads_k
        if nheads_k < 1 or here % nheads_k:
            raise ValueError(f"nheads_k must be a divisor of the key heads, {here}, got {nheads_k}")
        for name, parameter in list(self.qkv.named_parameters()):
            q, k, v = parameter.detach().unflatten(0, (-1, self.head_dim)).split([self.num_heads, here, here])
            kept = torch.cat([q, *(heads[:: here // nheads_k] for heads in (k, v))])
            setattr(self.qkv, name, nn.Parameter(kept.flatten(0, 1)))
        self.qkv.out_features = (self.num_heads + 2 * nheads_k) * self.head_dim

    def forward(
        self, x: Float[Tensor, "batch seqlen dim"], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Float[Tensor, "batch seqlen dim"]:
        """Attention of x to itself.

        Args:
            x: (batch, seqlen, dim).
            attn_mask: bool, True for a token that may be attended to, the same for all queries: broadcastable to
                (batch, 1, 1, seqlen). Default: all.
            is_causal: token i sees tokens up to i. Default: False.

        Raises:
            ValueError: attn_mask is not bool, or differs between queries.
        """
        # (batch, seqlen, nheads or nheads_k, head_dim)
        heads = [self.num_heads, self.nheads_k, self.nheads_k]
        q, k, v = self.qkv(x).unflatten(-1, (sum(heads), self.head_dim)).split(heads, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.log_temperature is not None:  # a factor of q is one of the scores, whatever computes them
            q = q * self.log_temperature.exp()[:, None]
        q, k = q.to(v.dtype), k.to(v.dtype)
        b = self.sigmoid_bias
        if isinstance(b, Tensor) and b.numel() == 1:  # FSDP2 takes no scalars
            b = b.reshape(())
        options: dict[str, Any] = {"sigmoid_bias": b, "scale": self.scale, "causal": is_causal}
        options["dropout_p"] = self.attn_drop.p if self.training else 0.0
        if attn_mask is not None:
            keep = _key_mask(attn_mask, x)
            if self.kind == "softmax":
                options["key_mask"] = keep
            else:  # no denominator: zeroing a key's value masks it exactly
                v = v * keep[:, :, None, None]
                if b is None:
                    options["sigmoid_bias"] = ours.attention.kept_keys_bias(keep, q.dtype).expand(-1, self.num_heads)
        attend = self.attention_fn
        if attend is None:
            attend = ours.attention.sigmoid_attention if self.kind == "sigmoid" else ours.attention.softmax_attention
        out = self.norm(self.out_norm(attend(q, k, v, **options)).to(v.dtype).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def extra_repr(self) -> str:
        bias = "learnable" if isinstance(self.sigmoid_bias, Tensor) else self.sigmoid_bias
        return f"kind={self.kind!r}, nheads_k={self.nheads_k}, sigmoid_bias={bias}"


def check_settings(kind: str, sigmoid_bias: float | None, bias_mode: str) -> None:
    """What `VisionAttention.configure` takes.

    Raises:
        ValueError: a word is not one of those, or a parameter lacks its initial value.
    """
    if kind not in ("sigmoid", "softmax"):
        raise ValueError(f"kind must be 'sigmoid' or 'softmax', got {kind!r}")
    if bias_mode not in ("fixed", "learnable", "per_head"):
        raise ValueError(f"bias_mode must be 'fixed', 'learnable' or 'per_head', got {bias_mode!r}")
    if sigmoid_bias is not None and not sigmoid_bias < math.inf:  # NaN too
        raise ValueError(f"sigmoid_bias must be a number below +inf, or None, got {sigmoid_bias}")
    if bias_mode != "fixed" and sigmoid_bias is None:
        raise ValueError(
            f"sigmoid_bias must be given with bias_mode={bias_mode!r}, where it is the initial value, got None"
        )


def _key_mask(attn_mask: Tensor, x: Tensor) -> Tensor:
    """(batch, seqlen) of a mask that is the same for every head and query."""
    seqlen = x.shape[1]
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    fits = shape[:3] in {(1, 1, 1), (x.shape[0], 1, 1)} and shape[-1] == seqlen
    if attn_mask.dtype != torch.bool or not fits:
        raise ValueError(
            f"attn_mask must be bool, of shape (batch, 1, 1, seqlen) = ({x.shape[0]}, 1, 1, {seqlen}), "
            f"got {attn_mask.dtype} {tuple(attn_mask.shape)}"
        )
    return attn_mask.reshape(shape[0], seqlen).expand(x.shape[0], -1)


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Everything that shapes a Vision Transformer. The twin is dataclasses.replace(config, attention="softmax").

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    name: str = "vit_base_patch16_224"  # any timm model that is a VisionTransformer
    num_classes: int = 1000  # 0: no head
    img_size: int | None = None  # pixels a side; None: the model's
    patch_size: int | None = None  # pixels a side; None: the model's
    in_chans: int = 3  # of an image
    dim: int | None = None  # channels, a multiple of nheads; None: the model's
    depth: int | None = None  # blocks; None: the model's
    nheads: int | None = None  # None: the model's
    nheads_k: int | None = None  # key and value heads, a divisor of nheads; 1: multi-query; None: nheads
    attention: Literal["sigmoid", "softmax"] = "sigmoid"  # the one field in which a pair differs
    sigmoid_bias: float | None = None  # b; None: -log of the tokens at img_size
    bias_mode: Literal["fixed", "learnable", "per_head"] = "fixed"
    learnable_temperature: bool = False  # a factor of the scores for every head, which starts at 1
    out_norm: bool = False  # RMSNorm of what each head gives, for which b can be lower, as -log n - 3
    layer_scale: float | None = 1e-4  # initial factor per channel on each branch; None: no LayerScale
    qk_norm: bool = True
    position: Literal["learned", "sincos"] = "learned"
    pool: Literal["token", "avg"] = "token"  # class token, or the mean over patches without one
    drop_path: float = 0.0  # stochastic depth of the last block, in [0, 1)
    # timm's weights of this name, true, or a file of such; what they lack starts fresh: for them to keep their meaning,
    # layer_scale and qk_norm must be as they had them, mostly none and false
    pretrained: bool | str = False

    def __post_init__(self) -> None:
        check_types(self)
        for field, allowed in (
            ("attention", ("sigmoid", "softmax")),
            ("bias_mode", ("fixed", "learnable", "per_head")),
            ("position", ("learned", "sincos")),
            ("pool", ("token", "avg")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {allowed}, got {getattr(self, field)!r}")
        for field in ("img_size", "patch_size", "in_chans", "dim", "depth", "nheads", "nheads_k"):
            size = getattr(self, field)
            if size is not None and not (type(size) is int and size > 0):
                raise ValueError(f"{field} must be a positive integer, got {size!r}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {self.num_classes}")
        check_layer_scale(self.layer_scale)
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")
        if self.sigmoid_bias is not None and not self.sigmoid_bias < math.inf:
            raise ValueError(f"sigmoid_bias must be a number below inf, or None, got {self.sigmoid_bias}")
        for field in ("dim", "depth", "nheads", "nheads_k"):
            if self.pretrained and (size := getattr(self, field)) is not None:
                raise ValueError(f"{field} must be None with pretrained weights, whose own it is, got {size}")
        if not timm.is_model(self.name):
            near = difflib.get_close_matches(self.name, timm.list_models("vit*"), n=3)
            such = ", ".join(near) or "vit_base_patch16_224"
            raise ValueError(f"name must be a model of timm, such as {such}, got {self.name}")


def build_vit(config: ViTConfig, *, attention_fn: AttentionFn | None = None) -> VisionTransformer:
    """timm's Vision Transformer of this shape, with our attention in every block.

    b is -log of the number of tokens at the configured image size, class token included, unless it is given; a
    learnable one starts there.

    Args:
        config: its shape.
        attention_fn: called instead of the config's attention; see `nn.SigmoidAttention`.

    Raises:
        ValueError: the name is no VisionTransformer, or its constructor refuses a field; patches do not fill the image,
            which is said where a size is given; pretrained weights are not
            there, are another model's, or have what the config leaves out.

    Source: arXiv:2409.04431 (b = -log n; LayerScale 1e-4 and QK-norm for vision).
    """
    chosen = {
        "img_size": config.img_size,
        "patch_size": config.patch_size,
        "embed_dim": config.dim,
        "depth": config.depth,
        "num_heads": config.nheads,
    }
    options: dict[str, Any] = {key: value for key, value in chosen.items() if value is not None}
    options |= {"class_token": config.pool == "token", "global_pool": config.pool, "qk_norm": config.qk_norm}
    # 0 is none; timm takes None for what the name has, as DeiT-III and DINOv2 have a LayerScale
    options |= {"init_values": config.layer_scale or 0.0, "drop_path_rate": config.drop_path}
    if config.position == "sincos":
        options["no_embed_class"] = True
    create: Callable[..., nn.Module] = timm.create_model
    try:
        model = create(
            config.name,
            num_classes=config.num_classes,
            in_chans=config.in_chans,
            attn_layer=VisionAttention,
            **options,
        )
    except (TypeError, AssertionError) as error:
        raise ValueError(f"name must be a VisionTransformer of timm that takes these fields, {error}") from error
    attentions = [module for module in model.modules() if isinstance(module, VisionAttention)]
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"name must be a VisionTransformer of timm, got {config.name}, a {type(model).__name__}")
    if not attentions:
        raise ValueError(
            f"name must be a VisionTransformer of timm whose blocks take another attention, got {config.name}, "
            f"of {type(model.blocks[0]).__name__}"
        )
    (size, _), (patch, _) = model.patch_embed.img_size, model.patch_embed.patch_size
    if (config.img_size or config.patch_size) and size % patch:  # the rim would be dropped
        raise ValueError(f"img_size must be a multiple of patch_size, got {size} and {patch}")
    if config.pretrained:
        _load_pretrained(model, config)
    if config.position == "sincos":
        _fix_positions(model)
    b = -math.log(tokens(model)) if config.sigmoid_bias is None else config.sigmoid_bias
    for attention in attentions:
        attention.configure(
            config.attention, b, config.bias_mode, attention_fn, config.learnable_temperature, config.out_norm
        )
        if config.nheads_k is not None:
            attention.share_keys(config.nheads_k)
    return model


def _load_pretrained(model: VisionTransformer, config: ViTConfig) -> None:
    """Put timm's weights, which timm's loader has fitted to the image's size and channels, into a model of ours.

    They stay without a class token, a last norm, a head and a pooling where the model has none of that shape.
    """
    options: dict[str, Any] = {"img_size": config.img_size, "patch_size": config.patch_size}
    if isinstance(config.pretrained, str):
        is_npz = config.pretrained.endswith(".npz")
        options["pretrained_cfg_overlay"] = {"file": config.pretrained, "custom_load": is_npz}
    options = {key: value for key, value in options.items() if value is not None}
    try:
        theirs = timm.create_model(config.name, pretrained=True, in_chans=config.in_chans, **options)
    except (RuntimeError, OSError, SafetensorError, KeyError) as error:
        what = config.pretrained if isinstance(config.pretrained, str) else config.name
        reason = (str(error) or type(error).__name__).partition("\n")[0]
        raise ValueError(f"pretrained weights must be there and be those of the model, got {what}: {reason}") from error
    state = model.state_dict()
    for name, x in theirs.state_dict().items():
        if name == "pos_embed" and name in state:  # prefix tokens come first, and may be fewer or more
            rows = min(x.shape[1], state[name].shape[1])
            state[name][:, -rows:] = x[:, -rows:]
        elif name in state and state[name].shape == x.shape:
            state[name].copy_(x)
        elif not name.startswith(("cls_token", "pos_embed", "norm.", "fc_norm.", "head", "attn_pool.")):
            raise ValueError(
                f"the model must have a place for each pretrained weight, as by layer_scale and qk_norm, "
                f"got none for {name}"
            )


def tokens(model: VisionTransformer) -> int:
    """Tokens of an image of the model's own size: patches, class token and registers."""
    return cast(int, model.patch_embed.num_patches) + model.num_prefix_tokens


def initial_bias(config: ViTConfig) -> float:
    """b of `build_vit`, or what a learnable one begins with: the config's, else -log of the tokens of an image."""
    if config.sigmoid_bias is not None:
        return config.sigmoid_bias
    with torch.device("meta"):
        return -math.log(tokens(build_vit(replace(config, pretrained=False))))


class DropPathOfPart(DropPath):
    """timm's stochastic depth in a process that has some images of a batch: it draws for all of them.

    Args:
        like: the module of one process.
        place: number of its first image in the batch, how many it has, and how many the batch.
    """

    def __init__(self, like: DropPath, place: Callable[[], tuple[int, int, int]]) -> None:
        super().__init__(like.drop_prob, like.scale_by_keep)
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        """(images, ...), or the images of one view after another, of which some are zero and the others scaled up."""
        if not self.training or not self.drop_prob:
            return x
        start, count, total = self.place()
        ones = x.new_ones(len(x) // count * total, *(1,) * (x.dim() - 1))
        drawn = drop_path(ones, self.drop_prob, True, self.scale_by_keep)
        return x * drawn.unflatten(0, (-1, total))[:, start : start + count].flatten(0, 1)


def share_drop_path(model: nn.Module, place: Callable[[], tuple[int, int, int]]) -> None:
    """Put `DropPathOfPart` in the place of every `DropPath` of a model."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, DropPath):
                setattr(module, name, DropPathOfPart(child, place))


def layer_groups(model: VisionTransformer, *, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer in which early layers learn more slowly.

        lr_scale = layer_decay ^ (blocks + 1 - layer),   layer = 0 of the embeddings, 1, 2, ... of the blocks

    so that the head has 1. Vectors and scalars are not decayed.

    Args:
        model: whose parameters.
        weight_decay: of the matrices.
        layer_decay: factor from a layer to the one before it, in (0, 1].

    Source: arXiv:2106.08254 (fine-tuning of BEiT), arXiv:2111.06377 (of MAE).
    """
    return param_groups_layer_decay(model, weight_decay=weight_decay, layer_decay=layer_decay)


def _fix_positions(model: VisionTransformer) -> None:
    """Positions as sines and cosines of the patches' rows and columns, which are not trained."""
    height, width = cast(tuple[int, int], model.patch_embed.grid_size)
    if model.embed_dim % 4:
        raise ValueError(f"dim must be a multiple of 4 for position='sincos', got {model.embed_dim}")
    assert model.pos_embed is not None
    if model.pos_embed.shape[1] != height * width:
        raise ValueError(
            f"position='sincos' must be of a model whose positions are those of patches alone, got one with "
            f"{model.pos_embed.shape[1]} for {height * width} patches"
        )
    table = build_sincos2d_pos_embed([height, width], dim=model.embed_dim, interleave_sin_cos=False)
    with torch.no_grad():
        if not model.pos_embed.is_meta:
            model.pos_embed.copy_(table.reshape(1, height * width, -1))
    model.pos_embed.requires_grad_(False)
