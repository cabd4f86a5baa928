"""Architectures from transformers and diffusers: their own classes, with seeded weights.

`LIBRARY[name].build()` gives the model and the arguments of one call, small enough for a test;
`build(scale="bench")` gives them at the width, depth and length that `effc bench` times.  Where a
size may vary from call to call (`dynamic`), `build(sizes[1])` gives the same model's arguments at
a second size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

Scale: TypeAlias = Literal["test", "bench"]


@dataclass(frozen=True)
class Architecture:
    """How to make a model and its inputs.

    `inputs(size, scale)` are keyword arguments; `size` is a batch or a length, and the dimension of
    each argument that it sets is in `dynamic`.  `sizes` are two for tests to try; neither equals
    another size.  `bench` is the one that is timed.
    """

    make: Callable[[Scale], nn.Module]
    inputs: Callable[[int, Scale], dict[str, Tensor]]
    sizes: tuple[int, int]
    dynamic: Mapping[str, int] = field(default_factory=dict)
    bench: int = 1

    def build(
        self, size: int | None = None, *, scale: Scale = "test"
    ) -> tuple[nn.Module, tuple, dict[str, Any]]:
        """Model in eval mode, positional and keyword arguments; the same each time."""
        torch.manual_seed(0)
        model = self.make(scale).eval().requires_grad_(False)
        _perturb(model)
        return model, (), self.arguments(size, scale=scale)

    def arguments(self, size: int | None = None, *, scale: Scale = "test") -> dict[str, Any]:
        """Keyword arguments of one call, at the scale's own size or the one given."""
        torch.manual_seed(1)
        return self.inputs(size or (self.bench if scale == "bench" else self.sizes[0]), scale)

    def mark_dynamic(self, arguments: Mapping[str, Tensor]) -> None:
        """Tell torch.compile that the size varies."""
        for name, axis in self.dynamic.items():
            torch._dynamo.mark_dynamic(arguments[name], axis)


def _perturb(model: nn.Module) -> None:
    """Move every parameter off its start: norms of 1, biases and gates of 0 would hide errors."""
    for p in model.parameters():
        p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.02))
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.normal_(std=0.1)
        elif name.endswith("running_var"):
            b.uniform_(0.5, 1.5)


# ------------------------------------------------------------------ transformers

VOCABULARY = {"test": 199, "bench": 8192}


def _llama(scale: Scale) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, inner, layers, heads = {"test": (64, 172, 2, 4), "bench": (1024, 2816, 8, 16)}[scale]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY[scale],
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings={"test": 64, "bench": 1024}[scale],
            use_cache=scale == "test",
        )
    )


def _gpt2(scale: Scale) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    width, layers, heads = {"test": (48, 2, 4), "bench": (768, 6, 12)}[scale]
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY[scale],
            n_positions={"test": 64, "bench": 1024}[scale],
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=scale == "test",
        )
    )


def _bert(scale: Scale) -> nn.Module:
    from transformers import BertConfig, BertModel

    width, layers, heads, inner = {"test": (48, 2, 4, 96), "bench": (512, 6, 8, 2048)}[scale]
    return BertModel(
        BertConfig(
            vocab_size=VOCABULARY[scale],
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=inner,
            max_position_embeddings={"test": 64, "bench": 512}[scale],
        )
    )


def _mobilenet(scale: Scale) -> nn.Module:
    from transformers import MobileNetV1Config, MobileNetV1ForImageClassification

    image, depth, labels = {"test": (64, 0.25, 7), "bench": (224, 1.0, 1001)}[scale]
    return MobileNetV1ForImageClassification(
        MobileNetV1Config(image_size=image, depth_multiplier=depth, num_labels=labels)
    )


def _image(batch: int, scale: Scale) -> dict[str, Tensor]:
    side = {"test": 64, "bench": 224}[scale]
    return {"pixel_values": torch.rand(batch, 3, side, side)}


def _tokens(length: int, scale: Scale) -> dict[str, Tensor]:
    batch = {"test": 2, "bench": 1}[scale]
    return {"input_ids": torch.randint(0, VOCABULARY[scale], (batch, length))}


def _masked_tokens(length: int, scale: Scale) -> dict[str, Tensor]:
    tokens = _tokens(length, scale)
    mask = torch.ones_like(tokens["input_ids"])
    mask[-1, length // 2 :] = 0
    return {**tokens, "attention_mask": mask}


# ------------------------------------------------------------------ diffusers


def _dit(scale: Scale) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    heads, head, layers, side = {"test": (4, 12, 2, 8), "bench": (8, 64, 6, 32)}[scale]
    return DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=side,
        num_embeds_ada_norm=10,
    )


def _dit_inputs(batch: int, scale: Scale) -> dict[str, Tensor]:
    side = {"test": 8, "bench": 32}[scale]
    return {
        "hidden_states": torch.randn(batch, 4, side, side),
        "timestep": torch.randint(0, 1000, (batch,)),
        "class_labels": torch.randint(0, 10, (batch,)),
    }


def _flux(scale: Scale) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    double, single, heads = {"test": (1, 2, 4), "bench": (2, 4, 8)}[scale]
    channels, text, pooled = {"test": (16, 32, 24), "bench": (64, 768, 768)}[scale]
    axes: tuple[int, int, int] = {"test": (4, 6, 6), "bench": (16, 24, 24)}[scale]
    return FluxTransformer2DModel(
        in_channels=channels,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=sum(axes),
        num_attention_heads=heads,
        joint_attention_dim=text,
        pooled_projection_dim=pooled,
        guidance_embeds=True,
        axes_dims_rope=axes,
    )


def _flux_inputs(batch: int, scale: Scale) -> dict[str, Tensor]:
    side, words = {"test": (4, 7), "bench": (16, 64)}[scale]
    channels, text, pooled = {"test": (16, 32, 24), "bench": (64, 768, 768)}[scale]
    steps = torch.arange(side)
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)
    image_ids = torch.cat([torch.zeros(side * side, 1), grid.reshape(side * side, 2)], 1)
    return {
        "hidden_states": torch.randn(batch, side * side, channels),
        "encoder_hidden_states": torch.randn(batch, words, text),
        "pooled_projections": torch.randn(batch, pooled),
        "timestep": torch.rand(batch),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(words, 3),
        "guidance": torch.full((batch,), 3.5),
    }


def _unet(scale: Scale) -> nn.Module:
    from diffusers import UNet2DConditionModel

    side, widths, text = {"test": (16, (16, 32), 24), "bench": (32, (128, 256), 512)}[scale]
    return UNet2DConditionModel(
        sample_size=side,
        block_out_channels=widths,
        layers_per_block=1,
        cross_attention_dim=text,
        attention_head_dim=8,
        norm_num_groups={"test": 8, "bench": 32}[scale],
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def _unet_inputs(batch: int, scale: Scale) -> dict[str, Tensor]:
    side, words, text = {"test": (16, 7, 24), "bench": (32, 64, 512)}[scale]
    return {
        "sample": torch.randn(batch, 4, side, side),
        "timestep": torch.randint(0, 1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, words, text),
    }


def _wan(scale: Scale) -> nn.Module:
    from diffusers import WanTransformer3DModel

    heads, head, layers, inner = {"test": (4, 12, 2, 96), "bench": (8, 64, 4, 2048)}[scale]
    channels, text, frequencies = {"test": (4, 24, 32), "bench": (16, 512, 256)}[scale]
    return WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head,
        in_channels=channels,
        out_channels=channels,
        text_dim=text,
        freq_dim=frequencies,
        ffn_dim=inner,
        num_layers=layers,
        rope_max_seq_len={"test": 32, "bench": 64}[scale],
    )


def _wan_inputs(batch: int, scale: Scale) -> dict[str, Tensor]:
    channels, side, words, text = {"test": (4, 8, 7, 24), "bench": (16, 32, 64, 512)}[scale]
    return {
        "hidden_states": torch.randn(batch, channels, 2, side, side),
        "timestep": torch.randint(0, 1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, words, text),
    }


def _vae(scale: Scale) -> nn.Module:
    from diffusers import AutoencoderKL

    widths, groups, side = {"test": ((8, 16), 4, 16), "bench": ((64, 128), 32, 64)}[scale]
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=widths,
        norm_num_groups=groups,
        sample_size=side,
    )


def _vae_inputs(batch: int, scale: Scale) -> dict[str, Tensor]:
    side = {"test": 16, "bench": 64}[scale]
    return {"sample": torch.rand(batch, 3, side, side)}


# ------------------------------------------------------------------ ours


def _rlfn(scale: Scale) -> nn.Module:
    from ..rlfn.model import RLFN

    channels, blocks = {"test": (16, 2), "bench": (52, 6)}[scale]
    return RLFN(channels=channels, blocks=blocks)


def _rlfn_inputs(batch: int, scale: Scale) -> dict[str, Tensor]:
    height, width = {"test": (24, 32), "bench": (64, 64)}[scale]
    return {"x": torch.rand(batch, 3, height, width) * 255}


def _batch(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 0)


LIBRARY: dict[str, Architecture] = {
    "llama": Architecture(_llama, _tokens, (12, 19), {"input_ids": 1}, bench=128),
    "gpt2": Architecture(_gpt2, _tokens, (12, 19), {"input_ids": 1}, bench=256),
    "bert": Architecture(
        _bert, _masked_tokens, (12, 19), {"input_ids": 1, "attention_mask": 1}, bench=512
    ),
    "dit": Architecture(
        _dit, _dit_inputs, (3, 5), _batch("hidden_states", "timestep", "class_labels")
    ),
    "flux": Architecture(
        _flux,
        _flux_inputs,
        (3, 5),
        _batch(
            "hidden_states",
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
            "guidance",
        ),
    ),
    "sd-unet": Architecture(
        _unet, _unet_inputs, (3, 5), _batch("sample", "timestep", "encoder_hidden_states")
    ),
    "wan": Architecture(
        _wan, _wan_inputs, (3, 5), _batch("hidden_states", "timestep", "encoder_hidden_states")
    ),
    "vae": Architecture(_vae, _vae_inputs, (2, 3), {"sample": 0}),
    "mobilenet-v1": Architecture(_mobilenet, _image, (2, 3), {"pixel_values": 0}),
    "rlfn": Architecture(_rlfn, _rlfn_inputs, (2, 3), {"x": 0}),
}
"""The last is this repository's own; the first seven cover the operators of current models."""
