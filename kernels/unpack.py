"""Four codes of a P16 word (formats.py) to four numbers: the jit helpers that every kernel over P16 shares.

`unpack(words, DTYPE, ASM)` takes int16 words of any shape and returns four tensors of that shape in DTYPE, one for each
plane of nibbles, holding the codes 0..15, which fp16, bf16 and fp32 hold exactly. Neighbouring words stay neighbouring
numbers, so words that were loaded in a matrix operand's order leave as operands, without a shuffle.

ASM is `Chip.asm` (chips.py). By inline assembly a pair of words costs 9 to 11 instructions for 8 numbers: NVIDIA, sm_80
and later, fp16 and bf16. The portable way costs about three times that and serves AMD, sm_75 and the interpreter, also
in fp32.
"""

import triton
import triton.language as tl


@triton.jit
def _unpack_fp16_asm(words):
    # A nibble or-ed into the low mantissa bits of 1024 (0x6400) makes 1024 + q; one bit position higher, 1024 + 16 q.
    # lop3's 0xEA is (a & b) | c.
    return tl.inline_asm_elementwise(
        asm="""{
        .reg .b32 high, magic, sixteenth, offset;
        mov.b32 magic, 0x64006400;
        mov.b32 sixteenth, 0x2c002c00;
        mov.b32 offset, 0xd400d400;
        shr.b32 high, $4, 8;
        lop3.b32 $0, $4, 0x000f000f, magic, 0xEA;
        lop3.b32 $1, $4, 0x00f000f0, magic, 0xEA;
        lop3.b32 $2, high, 0x000f000f, magic, 0xEA;
        lop3.b32 $3, high, 0x00f000f0, magic, 0xEA;
        sub.f16x2 $0, $0, magic;
        fma.rn.f16x2 $1, $1, sixteenth, offset;
        sub.f16x2 $2, $2, magic;
        fma.rn.f16x2 $3, $3, sixteenth, offset;
        }""",
        constraints="=&r,=&r,=&r,=&r,r",
        args=[words],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _unpack_bf16_asm(words):
    # bf16 has 7 mantissa bits: 128 (0x4300) takes one nibble and no second, so every plane is shifted into place.
    # Subtraction of bf16 pairs needs sm_90; a fused multiply-add by one does it on sm_80.
    return tl.inline_asm_elementwise(
        asm="""{
        .reg .b32 shifted, magic, one, offset;
        mov.b32 magic, 0x43004300;
        mov.b32 one, 0x3f803f80;
        mov.b32 offset, 0xc300c300;
        lop3.b32 $0, $4, 0x000f000f, magic, 0xEA;
        shr.b32 shifted, $4, 4;
        lop3.b32 $1, shifted, 0x000f000f, magic, 0xEA;
        shr.b32 shifted, $4, 8;
        lop3.b32 $2, shifted, 0x000f000f, magic, 0xEA;
        shr.b32 shifted, $4, 12;
        lop3.b32 $3, shifted, 0x000f000f, magic, 0xEA;
        fma.rn.bf16x2 $0, $0, one, offset;
        fma.rn.bf16x2 $1, $1, one, offset;
        fma.rn.bf16x2 $2, $2, one, offset;
        fma.rn.bf16x2 $3, $3, one, offset;
        }""",
        constraints="=&r,=&r,=&r,=&r,r",
        args=[words],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _plane(words, J: tl.constexpr, DTYPE: tl.constexpr):
    code = (words >> (4 * J)) & 15
    if DTYPE == tl.float16:  # the same trick as above: no conversion instruction
        return (code | 0x6400).to(tl.float16, bitcast=True) - 1024.0
    else:
        return code.to(tl.float32).to(DTYPE)


@triton.jit
def unpack(words, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The four planes of int16 words, each of the words' shape, in DTYPE."""
    if ASM:
        if DTYPE == tl.float16:
            return _unpack_fp16_asm(words)
        else:
            return _unpack_bf16_asm(words)
    else:
        return _plane(words, 0, DTYPE), _plane(words, 1, DTYPE), _plane(words, 2, DTYPE), _plane(words, 3, DTYPE)
