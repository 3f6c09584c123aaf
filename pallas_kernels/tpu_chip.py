"""The TPU that a kernel is being traced for: generation, VMEM, matrix unit, compiler parameters.

    chip = tpu_chip.current()                          # inside a kernel's door, at trace time
    with tpu_chip.for_generation("v6e"):               # for a chip that is not here
        jax.jit(kernel).trace(...).lower().compile()

Three places trace a kernel: a TPU (the chip is the default device), ahead of time for a chip that
is not here, and the TPU interpreter on a CPU. The last two say which chip they mean by
`for_generation`, an abstract device of JAX's, which `jax.jit` knows of: what was traced for one
generation is never taken for another. Where nothing is said, it is `DEFAULT`.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.jax_settings import unchecked

LANES, SUBLANES = 128, 8  # of a vector register, 32 bits each
DEFAULT = "v5e"
# Left of VMEM for what Mosaic and XLA keep there themselves.
VMEM_RESERVED = 1 << 20
SMEM_BYTES = 1 << 20  # on every generation
SMEM_OF_COMPILER = 4 << 10  # of it, for what is in no list of a kernel's
SMEM_RESERVED = 64 << 10  # for what kernels and compiler have there beside lists and tables


@dataclasses.dataclass(frozen=True)
class TpuChip:
    """What a kernel may want to know of the chip, for one TensorCore.

    Attributes:
        generation: "v4", "v5e", "v5p", "v6e" or "7x", as `attnsel_jax.platforms` names them.
        kind: as JAX prints the device.
        num_cores: TensorCores of one JAX device; "parallel" grid dimensions are split among them.
        vmem_bytes: on-chip vector memory.
        mxu: rows and columns of a matrix unit.
        has_bf16_vectors: the vector and transcendental units compute in bfloat16, two a lane.
        float8: the one of 4 exponent bits that the matrix unit takes beside an operand in bfloat16,
            as it takes float8_e5m2; it is unpacked in one instruction, too. None = it takes none.
    """

    generation: str
    kind: str
    num_cores: int
    vmem_bytes: int
    mxu: int
    has_bf16_vectors: bool
    float8: str | None


# VMEM and matrix units as `pltpu.get_tpu_info` has them.
CHIPS = {
    "v4": TpuChip("v4", "TPU v4", 2, 16 << 20, 128, False, None),
    "v5e": TpuChip("v5e", "TPU v5 lite", 1, 128 << 20, 128, False, "float8_e4m3b11fnuz"),
    "v5p": TpuChip("v5p", "TPU v5", 2, 64 << 20, 128, False, "float8_e4m3b11fnuz"),
    "v6e": TpuChip("v6e", "TPU v6 lite", 1, 128 << 20, 256, True, "float8_e4m3b11fnuz"),
    "7x": TpuChip("7x", "TPU7x", 1, 64 << 20, 256, True, "float8_e4m3fn"),
}
_BY_VERSION = {
    pltpu.ChipVersion.TPU_V4: "v4",
    pltpu.ChipVersion.TPU_V5E: "v5e",
    pltpu.ChipVersion.TPU_V5P: "v5p",
    pltpu.ChipVersion.TPU_V6E: "v6e",
    pltpu.ChipVersion.TPU_7X: "7x",
}


def current() -> TpuChip:
    """The chip that is traced for.

    Raises:
        ValueError: it is a TPU that these kernels do not know.
    """
    if not pltpu.is_tpu_device():
        return CHIPS[DEFAULT]
    info = pltpu.get_tpu_info()
    if info.chip_version not in _BY_VERSION:
        raise ValueError(
            f"generation is {info.chip_version}, must be one of {', '.join(CHIPS)}: use a backend "
            f"without Pallas kernels (XLA)"
        )
    return dataclasses.replace(CHIPS[_BY_VERSION[info.chip_version]], num_cores=info.num_cores)


class SmemError(ValueError):
    """A call's lists and tables are more than SMEM holds."""


@contextlib.contextmanager
def for_generation(generation: str) -> Iterator[TpuChip]:
    """Everything traced inside is traced for one core, or pair of cores, of this generation.

    Raises:
        ValueError: no such generation is known.
    """
    if generation not in CHIPS:
        raise ValueError(f"generation is {generation!r}, must be one of {', '.join(CHIPS)}")
    chip = CHIPS[generation]
    device = jax.sharding.AbstractDevice(chip.kind, chip.num_cores, "tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield chip


def pallas_call(
    kernel: Callable[..., None], *, written: Sequence[int] = (), **options: Any
) -> Callable[..., Any]:
    """`pl.pallas_call`, whose calls a `jax.vmap` makes one after another.

    Pallas' own rule adds a dimension to the grid and to every block, which Mosaic refuses where an
    array stays in HBM or SMEM.

    Args:
        kernel: as Pallas has it.
        written: operands into whose blocks it writes: they stay in HBM. XLA puts small ones into
            VMEM, where a block is no copy but the operand itself, and the last one goes on past
            its end (read off libtpu 0.0.52's code).
        options: of `pl.pallas_call`.

    Returns:
        the call; it raises `SmemError` where its lists and tables are more than SMEM holds.
    """
    call = pl.pallas_call(kernel, **options)

    def with_written_ones_in_hbm(*operands: jax.Array) -> Any:
        _check_smem(options["name"], options.get("grid_spec"), operands)
        return call(
            *(
                pltpu.with_memory_space_constraint(x, pltpu.HBM) if i in written else x
                for i, x in enumerate(operands)
            )
        )

    return jax.custom_batching.sequential_vmap(unchecked(with_written_ones_in_hbm))


def _check_smem(name: str, grid_spec: Any, operands: Sequence[jax.Array]) -> None:
    """Refuses what the compiler would, which names neither argument nor way out."""
    if grid_spec is None:
        return
    lists = [x.shape for x in operands[: grid_spec.num_scalar_prefetch]]
    specs = zip(grid_spec.in_specs, operands[grid_spec.num_scalar_prefetch :], strict=True)
    lists += [x.shape for spec, x in specs if spec.memory_space == pltpu.SMEM]
    scratch = jax.tree.leaves(grid_spec.scratch_shapes)
    lists += [x.shape for x in scratch if getattr(x, "memory_space", None) == pltpu.SMEM]
    needed, most = sum(map(_smem_bytes, lists)), SMEM_BYTES - SMEM_OF_COMPILER
    if needed > most:
        raise SmemError(
            f"{name} wants {needed} bytes of a TPU's SMEM for what it lists by token, sequence and "
            f"head, must want at most {most}: call with fewer of them at a time, or use XLA"
        )


def _smem_bytes(shape: Sequence[int]) -> int:
    """Of 32-bit numbers, in registers of up to 8 rows of 128."""
    *rows, columns = (1, *shape)
    rows = math.prod(rows)
    tall = min(SUBLANES, 1 << (rows - 1).bit_length())
    return 4 * -(-rows // tall) * tall * -(-columns // LANES) * LANES


def compiler_params(
    dimension_semantics: Sequence[str],
    *,
    vmem_bytes: int | None = None,
    checks_bounds: bool = True,
) -> pltpu.CompilerParams:
    """Mosaic's parameters for a kernel on the chip that is traced for.

    Args:
        dimension_semantics: "parallel" (any order, may be split among cores) or "arbitrary" (in
            order), for each dimension of the grid.
        vmem_bytes: VMEM that the kernel may use; None = all that there is.
        checks_bounds: whether every copy's address is checked as it starts.
    """
    limit = current().vmem_bytes - VMEM_RESERVED
    return pltpu.CompilerParams(
        dimension_semantics=tuple(dimension_semantics),
        vmem_limit_bytes=limit if vmem_bytes is None else min(vmem_bytes, limit),
        disable_bounds_checks=not checks_bounds,
    )
