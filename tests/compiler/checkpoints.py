"""Small models and the files that other tools would write of them."""

import json

import numpy as np
import torch

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def tiny_llama(seed=0, **more):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    net = LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": True, **more}))
    return net.eval().requires_grad_(False)


def codes_of(w, bits, group, zero=True, seed=0):
    """Some codes [N, K], scales and zeros [N, G] that stand for a matrix like w, zeros from 0 on."""
    made = torch.Generator().manual_seed(seed)
    n, k = w.shape
    groups = -(-k // group)
    codes = torch.randint(0, 1 << bits, (n, k), generator=made)
    zeros = torch.randint(1, 1 << bits, (n, groups), generator=made)
    if not zero:
        zeros = torch.full((n, groups), 1 << bits - 1)
    scales = (torch.rand(n, groups, generator=made) * 0.01 + 0.001).half()
    return codes, scales, zeros


def meant(codes, scales, zeros, group):
    """float32 numbers, column by column."""
    of = torch.arange(codes.shape[1]) // group
    return (codes - zeros[:, of]).float() * scales.float()[:, of]


def bits_down(values, bits):
    """Rows of values as streams of bits, 32 to a word, lowest first: ints of Python, no tricks."""
    rows = []
    for row in values.tolist():
        number = sum(int(v) << bits * i for i, v in enumerate(row))
        words = [(number >> 32 * i) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))]
        rows.append(np.array(words, np.uint32).view(np.int32))
    return torch.from_numpy(np.stack(rows))


def gptq_tensors(codes, scales, zeros, bits, v2, g_idx):
    return {
        "qweight": bits_down(codes.T.T, bits).T.contiguous(),
        "qzeros": bits_down((zeros if v2 else zeros - 1).T, bits),
        "scales": scales.T.contiguous(),
        "g_idx": g_idx.to(torch.int32),
    }


AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def awq_words(values):
    """[rows, columns]: eight columns to a word, in AWQ's order."""
    order = [8 * j + o for j in range(values.shape[1] // 8) for o in AWQ]
    return bits_down(values[:, order], 4)


def awq_tensors(codes, scales, zeros):
    return {
        "qweight": awq_words(codes.T), "qzeros": awq_words(zeros.T),
        "scales": scales.T.contiguous(),
    }  # fmt: skip


def compressed_tensors(codes, scales, zeros, bits):
    """Offset codes in words along a row; zeros likewise along a column; None: symmetric."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (32 // bits)))
    found = {
        "weight_packed": bits_down(padded, bits), "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }  # fmt: skip
    if zeros is not None:
        down = torch.nn.functional.pad(zeros.T, (0, -zeros.shape[0] % (32 // bits)))
        found["weight_zero_point"] = bits_down(down, bits).T.contiguous()
    return found


def write_folder(path, net, told, pack):
    """A model's folder whose linear layers but the head are what `pack(name, weight)` gives."""
    from safetensors.torch import save_file

    path.mkdir(exist_ok=True)
    tensors = {}
    for key, p in net.named_parameters():
        stem, _, last = key.rpartition(".")
        if stem.endswith("_proj") and last == "weight":
            tensors |= {f"{stem}.{n}": t.contiguous() for n, t in pack(stem, p).items()}
        else:
            tensors[key] = p.detach().clone()
    save_file(tensors, path / "model.safetensors")
    config = json.loads(net.config.to_json_string())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    return path


def write_gguf(path, net, kind, arch="llama", **fields):
    """A model as llama.cpp converts it: rows of q and k for RoPE on adjacent pairs."""
    import gguf

    from effc.interop.gguf_file import NAMES, OUTER

    inner = {v: k for k, v in NAMES.items()}
    outer = {v: k for k, v in OUTER.items()}
    config = net.config
    file = gguf.GGUFWriter(path, arch)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_vocab_size(config.vocab_size)
    for key, p in net.named_parameters():
        stem, _, last = key.rpartition(".")
        value = p.detach()
        if stem in outer:
            name = f"{outer[stem]}.{last}"
        else:
            _, _, i, part = stem.split(".", 3)
            name = f"blk.{i}.{inner[part]}.{last}"
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            if arch == "llama" and inner[part] in heads:
                halves = value.unflatten(0, (heads[inner[part]], 2, -1))
                value = halves.transpose(1, 2).reshape(value.shape)
        if value.dim() < 2:
            file.add_tensor(name, value.numpy())
        else:
            of = gguf.GGMLQuantizationType[kind]
            file.add_tensor(name, gguf.quantize(value.contiguous().numpy(), of), raw_dtype=of)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path
