"""Weights on their way to L2 while the kernel ahead still runs: adapters do not change within a step, so nothing that a
kernel waits for has a part in them. On Hopper one thread asks for a whole row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch_rows(rows, used, width):
    """Ask L2 for the first `width` elements at each of the pointers `rows`, 16-byte aligned, where `used`.

    A hint: what is asked for need not come, and the last few bytes are not asked for.
    """
    num_bytes = width * (rows.dtype.element_ty.primitive_bitwidth // 8) // 16 * 16
    # A tensor smaller than the program lies in its first threads, and once more in those behind them.
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred is_first, is_used;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.lt.u32 is_first, thread, $3;
            setp.gt.s32 is_used, $2, 0;
            and.pred is_used, is_used, is_first;
            @is_used cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r,r",
        [rows.to(tl.int64), tl.where(used, num_bytes, 0), rows.shape[0]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
