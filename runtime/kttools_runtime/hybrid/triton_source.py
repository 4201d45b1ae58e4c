"""The body of the Triton kernel; imported by triton_kernels.py where Triton is installed."""

# mypy: ignore-errors
import triton.language as tl


def slots_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    row_scale_ptr,
    slots_ptr,
    out_ptr,
    num_rows,
    code_bytes,
    num_groups,
    x_stride,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    IS_INT4: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """One program: ROWS outputs of one row of x. Low nibbles meet even inputs, high ones odd inputs."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1)
    is_row = row < num_rows
    slot = tl.load(slots_ptr + pair)
    if slot >= 0:
        total = tl.zeros((ROWS,), tl.float32)
        first = (slot * num_rows + row).to(tl.int64)
        for start in range(0, COLUMNS, INPUTS):
            if IS_INT4:
                byte = start // 2 + tl.arange(0, INPUTS // 2)
                is_byte = byte < code_bytes
                mask = is_row[:, None] & is_byte[None, :]
                both = tl.load(codes_ptr + first[:, None] * code_bytes + byte[None, :], mask=mask, other=0)
                group = first[:, None] * num_groups + (2 * byte // GROUP)[None, :]
                scale = tl.load(scale_ptr + group, mask=mask, other=0).to(tl.float32)
                zero = tl.load(zero_ptr + group, mask=mask, other=0).to(tl.float32)
                low = (both & 15).to(tl.float32) * scale - zero
                high = (both >> 4).to(tl.float32) * scale - zero
                at = x_ptr + pair * x_stride + 2 * byte
                even = tl.load(at, mask=2 * byte < COLUMNS, other=0.0).to(tl.float32)
                odd = tl.load(at + 1, mask=2 * byte + 1 < COLUMNS, other=0.0).to(tl.float32)
                total += tl.sum(low * even[None, :] + high * odd[None, :], axis=1)
            else:
                k = start + tl.arange(0, INPUTS)
                is_input = k < COLUMNS
                mask = is_row[:, None] & is_input[None, :]
                weight = tl.load(codes_ptr + first[:, None] * code_bytes + k[None, :], mask=mask, other=0)
                value = tl.load(x_ptr + pair * x_stride + k, mask=is_input, other=0.0).to(tl.float32)
                total += tl.sum(weight.to(tl.float32) * value[None, :], axis=1)
        if HAS_SCALE:
            total *= tl.load(row_scale_ptr + first, mask=is_row, other=0.0)
        tl.store(out_ptr + pair * num_rows + row, total, mask=is_row)
    else:
        tl.store(out_ptr + pair * num_rows + row, tl.zeros((ROWS,), tl.float32), mask=is_row)
