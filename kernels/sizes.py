"""Constants of the formats and of the kernels, and the memory that kernels ask for: what planning needs to know.

Imports nothing, so that a plan is made without torch. Each kernel's module takes its own from here.
"""

from __future__ import annotations

# Formats (formats.py)
BLOCK_ROWS = 256  # of a 4-bit matrix
CODES_PER_WORD = 4
WEIGHT_GROUPS = (32, 64, 128)
KV_GROUP = 64
FUSED_GROUP = 64  # columns that a fused product takes at least: smaller groups are dequantised

# Decode attention on a GPU (attention_decode.py)
MIN_SPLIT_TOKENS = 128  # a split costs its partial result, about as many bytes as 4 tokens' K and V in P16
MAX_SPLITS = 64
WARPS_PER_SM = 16  # programs an H200's multiprocessor holds at 128 registers a thread
MAX_SMS = 304  # of the largest chip that the kernels are compiled for
SEGMENTS = 3  # that a sequence's cache is in at most: full pages, the open one, the newest token

# The CPU's kernels (cpu/)
LANES = 16  # fp32 numbers of a vector, and of a cache line
MAX_THREADS = 128  # that kernels run on and have scratch for
CHUNK = 32  # tokens between two looks at the softmax's state
PANEL_BYTES = 2 << 20  # of dequantised weights at a time; 8 MiB halve the product's speed
WIDEN_BYTES = 16 << 20  # of fp32 rows that a 16-bit matrix is widened to at a time


def kv_width(head_dim: int) -> int:
    """Numbers of a head as a 4-bit cache holds them: a power of two, in whole groups."""
    return max(KV_GROUP, 1 << (head_dim - 1).bit_length())


# Products on the CPU


def widened_rows(columns: int) -> int:
    """Rows of a 16-bit matrix that are widened to fp32 at a time."""
    return max(1, WIDEN_BYTES // (4 * columns))


def panel_blocks(columns: int) -> int:
    """Row blocks of a 4-bit matrix of `columns` padded columns that are dequantised at a time."""
    return max(1, PANEL_BYTES // (4 * columns * BLOCK_ROWS))


# Decode attention


def gpu_decode_bytes(num_seqs: int, num_heads: int, num_kv_heads: int, head_dim: int, max_tokens: int) -> int:
    """Bound of the partial results of attention over SEGMENTS segments of at most `max_tokens` tokens together.

    Each partial result has its log-sum-exp beside it, and starts at a multiple of 256 bytes.
    """
    splits = min(max(max_tokens // MIN_SPLIT_TOKENS, 1), MAX_SPLITS)
    parts = max(num_seqs, min(num_seqs * splits, WARPS_PER_SM * MAX_SMS // num_kv_heads))
    return SEGMENTS * parts * num_heads * (head_dim + 64) * 4


def gpu_sparse_bytes(num_seqs: int, num_heads: int, max_tokens: int, max_keep: int) -> int:
    """Bytes that sparse attention takes on top: every score, and place and score of what is kept, twice."""
    return num_seqs * num_heads * (4 * max_tokens + 24 * (max_keep + 1))


def cpu_decode_bytes(num_seqs: int, num_heads: int, head_dim: int, threads: int = MAX_THREADS) -> int:
    """Bytes of workspace with which the CPU's `decode_attention` allocates no more, whatever the cache's format."""
    rows, width = num_seqs * num_heads, kv_width(head_dim)
    return fp32_bytes(rows * width, rows * width, rows, rows, threads * decode_scratch(width, num_heads))


def cpu_sparse_bytes(
    num_seqs: int, num_heads: int, head_dim: int, max_tokens: int, max_keep: int, threads: int = MAX_THREADS
) -> int:
    """Return the same of `sparse_decode_attention`, over `max_tokens` of a sequence, `max_keep` the largest of keep."""
    rows, width = num_seqs * num_heads, kv_width(head_dim)
    picks = rows * min(max_tokens, max_keep + 1)
    scratch = threads * sparse_scratch(width, max_tokens)
    return fp32_bytes(num_seqs, rows * width, rows * width, rows * max_tokens, picks, rows, rows, scratch)


def decode_scratch(width: int, num_heads: int) -> int:
    """Numbers of a thread's scratch: tokens widened, their tables, a chunk's weights of heads that share K and V."""
    return CHUNK * (2 * width + num_heads)


def sparse_scratch(width: int, longest: int) -> int:
    """Numbers of a thread's scratch: tokens widened and their tables, or keys of a head's scores; whole lines."""
    return line_aligned(max(CHUNK * 2 * width, longest))


def line_aligned(numbers: int) -> int:
    """Numbers rounded up to whole cache lines."""
    return -(-numbers // LANES) * LANES


def fp32_bytes(*sizes: int) -> int:
    """Bytes of fp32 vectors one behind the other, each at a cache line."""
    return 4 * sum(map(line_aligned, sizes))
