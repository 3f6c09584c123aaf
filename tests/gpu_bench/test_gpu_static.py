"""Reading ptxas's reports and machine code; a real kernel where the compiler is installed."""

import pytest

from benchmarks.gpu import page
from benchmarks.gpu.static import measuring, ptxas, sass
from benchmarks.gpu.works import WORKS
from benchmarks.work import named

PTXAS = """
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas info    : Function properties for attend
    112 bytes stack frame, 104 bytes spill stores, 116 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function 'merge' for 'sm_90a'
ptxas info    : Function properties for merge
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers
"""
# One loop of 64 x 128 x 16 products with exponentials, inside an outer loop that has a branch.
SASS = """
.text.attend:
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   IADD3 R3, R3, 0x1, RZ ;
.L_x_0:
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/                   MUFU.EX2 R5, R5 ;
        /*0040*/                   MUFU.EX2 R6, R6 ;
        /*0050*/                   FFMA R7, R7, R8, R9 ;
        /*0060*/               @P0 BRA `(.L_x_0) ;
        /*0070*/                   STG.E R1, R2 ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
        /*00a0*/                   NOP ;
"""


def test_ptxas_s_report_is_read_and_its_warnings_are_faults():
    found = ptxas.read_ptxas(PTXAS)
    attend, merge = found["attend"], found["merge"]
    assert (attend.registers, attend.stack, attend.static_smem) == (168, 112, 1024)
    assert (attend.spill_stores, attend.spill_loads) == (104, 116)
    assert (merge.registers, merge.spill_stores) == (40, 0)
    assert attend.faults == (ptxas.SERIALISED,)


def test_the_innermost_loop_with_matrix_work_is_found_and_bounded():
    kernel = sass.read_sass(SASS, 9)["attend"]
    assert kernel.code.instructions == 10
    (loop,) = kernel.loops
    assert loop.code.instructions == 5
    assert loop.code.tensor == {"HGMMA.64x128x16": 1}
    assert loop.code.mix["ex2"] == 2
    clocks = 2 * 64 * 128 * 16 / 4096
    assert loop.overlapped == 1.0
    assert loop.alone == pytest.approx(clocks / (clocks + 2 * sass.MUFU_CLOCKS))


def test_a_chip_whose_rate_is_not_known_has_no_bound():
    (loop,) = sass.read_sass(SASS, 10)["attend"].loops
    assert (loop.overlapped, loop.alone) == (None, None)


@pytest.mark.parametrize(
    ("name", "flops"),
    [("HGMMA.64x256x16.F32", 2 * 64 * 256 * 16), ("QGMMA.64x64x32.F32", 2 * 64 * 64 * 32),
     ("HMMA.16816.F32.BF16", 4 * 2 * 16 * 8 * 16), ("FFMA", 0)],
)  # fmt: skip
def test_operations_of_an_instruction(name, flops):
    assert sass.tensor_flops(name) == flops


def test_works_are_named_and_unknown_ones_are_refused():
    assert named(WORKS, ["paged_decode_1x"]) == [
        w for n, w in WORKS.items() if "paged_decode_1x" in n
    ]
    with pytest.raises(
        ValueError, match="work is 'sparsely', must be, or begin, one of dense_d128"
    ):
        named(WORKS, ["sparsely"])


def test_operations_are_counted_as_the_rivals_count_them():
    work = WORKS["dense_d128_full_4x4096_h16_16"]
    assert work.flops == 4 * 4 * 16 * 4096 * 4096 * 128
    causal = WORKS["dense_d128_causal_4x4096_h16_16"]
    assert causal.flops == pytest.approx(work.flops / 2, rel=1e-3)
    assert WORKS["dense_d128_full_4x4096_h16_16_grad"].flops == 3.5 * work.flops


def test_a_real_kernel_of_jax_s_compiles_and_is_read():
    try:
        measuring.check_compiler()
    except ValueError as error:
        pytest.skip(str(error))
    work = WORKS["dense_d128_full_4x4096_h16_16"]
    found = measuring.compile_and_read(work, "jax attention_mgpu", "h200", {"block_kv": 128})
    assert found.verdict == measuring.COMPILED, found.reason
    (kernel,) = found.kernels
    assert (kernel.resources.registers, kernel.threads, found.faults) == (168, 384, [])
    (row,) = page.static_rows([found.to_json()])
    assert len(row) == len(page.STATIC_COLUMNS)
    assert "HGMMA.64x128x16" in row[page.STATIC_COLUMNS.index("tensor")]
