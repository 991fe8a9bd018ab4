"""Compile every Triton kernel for a GPU that need not be there; run by test_triton.py.

The interpreter takes more than the compiler does.
"""

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clipattr.sparse import triton_bags, triton_topk

TYPES = {
    "lists": "*i64",
    "lengths": "*i32",
    "indices": "*i64",
    "values": "*fp32",
    "index": "*i64",
    "starts": "*i64",
    "bags": "*i32",
    "sums": "*fp32",
    "total": "*fp32",
    "left": "*fp32",
    "products": "*fp32",
    "n_latents": "i32",
    "k": "i32",
    "width": "i32",
}
BAGS: dict[str, Any] = {"PAIRS": triton_bags.PAIRS, "WIDTH": triton_bags.MAX_WIDTH}
CHUNKS: dict[str, Any] = {**BAGS, "CHUNK": triton_bags.CHUNK}
DOT: dict[str, Any] = {**BAGS, "PAIRS": triton_bags.DOT_PAIRS}


def compile_for_h100(kernel: Any, number: str, n_warps: int, **constants: Any) -> None:
    """Of 16-bit or 32-bit numbers."""
    types = {**TYPES, "pre": number, "matrix": number, "right": number}
    types = {name: kind for name, kind in types.items() if name not in constants}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": n_warps}
    )
    assert len(compiled.asm["cubin"]) > 0


def main() -> None:
    """Each kernel, with the constants that it is started with."""
    for number in ("*bf16", "*fp32"):
        for k in (1, 64, triton_topk.MAX_K):
            sizes = triton_topk.sizes_for(k)
            compile_for_h100(
                triton_topk.list_candidates,
                number,
                sizes.list_warps,
                GROUPS=sizes.groups,
                BLOCK=triton_topk.BLOCK,
                CAPACITY=sizes.capacity,
            )
            compile_for_h100(
                triton_topk.sort_candidates, number, sizes.sort_warps, CAPACITY=sizes.capacity
            )
        for has_chunks in (False, True):
            compile_for_h100(triton_bags.sum_heads, number, 4, **CHUNKS, HAS_CHUNKS=has_chunks)
        compile_for_h100(triton_bags.sum_chunks, number, 4, **CHUNKS)
        compile_for_h100(triton_bags.dot_pairs, number, 4, **DOT)
    # A number that is 1 is a constant to Triton. One column is what a bias has.
    one = {"width": 1, "WIDTH": 1}
    compile_for_h100(triton_bags.sum_heads, "*fp32", 4, **CHUNKS | one, HAS_CHUNKS=True)
    compile_for_h100(triton_bags.sum_chunks, "*fp32", 4, **CHUNKS | one)
    compile_for_h100(triton_bags.dot_pairs, "*fp32", 4, **DOT | one)
    capacity = {"k": 1, "CAPACITY": 2}
    compile_for_h100(triton_topk.sort_candidates, "*fp32", 1, **capacity)
    compile_for_h100(
        triton_topk.list_candidates, "*fp32", 4, **capacity, GROUPS=1024, BLOCK=1024, n_latents=1
    )


if __name__ == "__main__":
    sys.exit(main())
