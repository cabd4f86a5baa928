"""Architectures from transformers and diffusers: their own classes, small, with seeded weights.

`LIBRARY[name].build()` gives the model and the arguments of one call.  Where a size may vary from
call to call (`dynamic`), `build(sizes[1])` gives the same model's arguments at a second size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """How to make a model and its inputs.

    `inputs(size)` are keyword arguments; `size` is a batch or a length, and the dimension of each
    argument that it sets is in `dynamic`.  `sizes` are two to try; neither equals another size.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    sizes: tuple[int, int]
    dynamic: Mapping[str, int] = field(default_factory=dict)

    def build(self, size: int | None = None) -> tuple[nn.Module, tuple, dict[str, Any]]:
        """Model in eval mode, positional and keyword arguments; the same each time."""
        torch.manual_seed(0)
        model = self.make().eval().requires_grad_(False)
        _perturb(model)
        return model, (), self.arguments(size)

    def arguments(self, size: int | None = None) -> dict[str, Any]:
        """Keyword arguments of one call, at the first of `sizes` or the one given."""
        torch.manual_seed(1)
        return self.inputs(size or self.sizes[0])

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


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=199,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=199,
            n_positions=64,
            n_embd=48,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=199,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=64,
        )
    )


def _mobilenet() -> nn.Module:
    from transformers import MobileNetV1Config, MobileNetV1ForImageClassification

    return MobileNetV1ForImageClassification(
        MobileNetV1Config(image_size=64, depth_multiplier=0.25, num_labels=7)
    )


def _tokens(length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 199, (2, length))}


def _masked_tokens(length: int) -> dict[str, Tensor]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    return {**_tokens(length), "attention_mask": mask}


# ------------------------------------------------------------------ diffusers


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )


def _dit_inputs(batch: int) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8),
        "timestep": torch.randint(0, 1000, (batch,)),
        "class_labels": torch.randint(0, 10, (batch,)),
    }


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def _flux_inputs(batch: int) -> dict[str, Tensor]:
    grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1)
    image_ids = torch.cat([torch.zeros(16, 1), grid.reshape(16, 2)], 1)
    return {
        "hidden_states": torch.randn(batch, 16, 16),
        "encoder_hidden_states": torch.randn(batch, 7, 32),
        "pooled_projections": torch.randn(batch, 24),
        "timestep": torch.rand(batch),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(7, 3),
        "guidance": torch.full((batch,), 3.5),
    }


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def _unet_inputs(batch: int) -> dict[str, Tensor]:
    return {
        "sample": torch.randn(batch, 4, 16, 16),
        "timestep": torch.randint(0, 1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, 7, 24),
    }


def _wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=96,
        num_layers=2,
        rope_max_seq_len=32,
    )


def _wan_inputs(batch: int) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(batch, 4, 2, 8, 8),
        "timestep": torch.randint(0, 1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, 7, 24),
    }


def _vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=16,
    )


# ------------------------------------------------------------------ ours


def _rlfn() -> nn.Module:
    from ..rlfn.model import RLFN

    return RLFN(channels=16, blocks=2)


def _batch(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 0)


LIBRARY: dict[str, Architecture] = {
    "llama": Architecture(_llama, _tokens, (12, 19), {"input_ids": 1}),
    "gpt2": Architecture(_gpt2, _tokens, (12, 19), {"input_ids": 1}),
    "bert": Architecture(_bert, _masked_tokens, (12, 19), {"input_ids": 1, "attention_mask": 1}),
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
    "vae": Architecture(
        _vae, lambda n: {"sample": torch.rand(n, 3, 16, 16)}, (2, 3), {"sample": 0}
    ),
    "mobilenet-v1": Architecture(
        _mobilenet,
        lambda n: {"pixel_values": torch.rand(n, 3, 64, 64)},
        (2, 3),
        {"pixel_values": 0},
    ),
    "rlfn": Architecture(_rlfn, lambda n: {"x": torch.rand(n, 3, 24, 32) * 255}, (2, 3), {"x": 0}),
}
"""The last is this repository's own; the first seven cover the operators of current models."""
