"""Quantised checkpoints of other tools, as values of our types in place of a model's float weights.

    effc.compile(model, weights="model.gguf", example_inputs=...)
    effc.decoder(model, weights="folder/of/safetensors")

    read("model.gguf")                  what a file holds, by transformers' names
    load(model, checkpoint)             a module's parameters become the numbers it stands for
    with_checkpoint(graph, checkpoint)  a graph computes with its codes

A checkpoint is the model: it is put in place before the first pass, and errors of passes are
measured against it. So it is an argument of `compile` and no pass: a pass would be judged by its
distance from weights that nobody asked for, would teach later ones those, and a recipe's text would
hold a path of one machine. The module gets the same numbers in float, because it runs itself where
a graph does not: in training, where a gradient is asked for, and for calls that cannot be taken.
Codes are read once: a parameter that is changed later does not change them.

What maps, and how exactly (`decode` of what is read, beside the format's own dequantisation):

| format | type | |
|---|---|---|
| GGUF Q4_0, Q5_0, Q8_0 | int4, int5, i8 by 32, scale f16 | equal |
| GGUF Q4_1, Q5_1 | uint4, uint5 by 32, scale f16, zero f32 | float32 rounding |
| GGUF Q3_K, Q6_K | int3, int6 by 16, scale f32 | equal |
| GGUF Q2_K, Q4_K, Q5_K | uint2 by 16, uint4 and uint5 by 32, scale and zero f32 | rounding |
| GGUF TQ1_0, TQ2_0 | int2 by 256, scale f16 | equal |
| GGUF F16, BF16, F32, F64 | dense | equal |
| GPTQ v1 and v2, 2, 3, 4 and 8 bits | uint4 with zeros, or int4 where it is symmetric | equal |
| AWQ gemm | uint4 with zeros, or int4 | equal |
| compressed-tensors pack-quantized, int-quantized | int2, int4, i8 by group or row | equal |

Equal: bit for bit in float32. Rounding: the format adds a minimum, scale * code + low, where ours
subtracts a zero, scale * (code - zero), and zero = -low / scale is rounded: within 2^-22 of |w| +
|low|. A K-quant's scales are products of two numbers, which float32 holds exactly; they take 32
bits a group where the file has 6 and shares: Q4_K is 6.0 bits an element here and 4.5 there.
`parts="f16"` rounds scales and zeros to float16, 5.0 bits, and moves a weight by up to 2^-10 of
|w| + |low|; Q4_1 then takes the 5.0 bits of the file.

What does not map, each refused with its reason (`unmapped="dense"` reads GGUF's and act-order's
as dense numbers):

- GGUF IQ1 to IQ4, MXFP4, NVFP4: levels come from a table and are not evenly spaced.
- GGUF of an architecture other than llama, qwen2, qwen3: how its tensors differ from those of
  transformers is not known here.
- GPTQ with act-order: the columns of a group are not neighbours.
- GPTQ in Marlin's layout, AWQ gemv: words are laid out for one kernel.
- compressed-tensors with float codes (fp8, nvfp4), of 3, 5, 6 and 7 bits, with scales by block.
- bitsandbytes (nf4 and fp4 levels come from a table), HQQ, AQLM, QuIP#, SpQR, EETQ.

Activations stay float whatever a file says of them: name `quantize-activations` in the recipe.
"""

from .checkpoint import Checkpoint, load, placed, with_checkpoint
from .read import read

__all__ = ["Checkpoint", "load", "placed", "read", "with_checkpoint"]
