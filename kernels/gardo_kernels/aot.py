"""``python -m gardo_kernels.aot``: compile every Triton kernel without a GPU.

Launches are recorded, not run: the ``triton`` module of each op calls its launchers with CPU
tensors, and each recorded signature is compiled for each architecture. Prints registers and spilled
bytes per kernel; a spill is an error.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gardo_kernels import ops

ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


class Launch(NamedTuple):
    """One recorded launch: what Triton would specialise the kernel on."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    num_warps: int

    @property
    def name(self) -> str:
        """Kernel name, the dtypes of its pointers and its flags."""
        pointers = [t[1:] for _, t in self.signature if t.startswith("*")]
        dtypes = "/".join(dict.fromkeys(pointers))
        flags = ",".join(n.lower() for n, v in self.constants if v is True)
        return f"{self.kernel.__name__.strip('_')}[{dtypes}]" + (f" {flags}" if flags else "")


class Compiled(NamedTuple):
    """Resources of one kernel on one architecture."""

    name: str
    arch: int
    registers: int
    spilled: int  # bytes stored and loaded
    shared: int  # bytes


def record() -> list[Launch]:
    """The launches of every op, dtype and option, without repetition."""
    launches: dict[Launch, None] = {}
    with _recording(launches):
        for module in ops.modules("triton"):
            for dtype in DTYPES:
                module.call_every_form(dtype)
    return list(launches)


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile for ``sm_{arch}`` and read the resources from the assembler's report."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    position = {name: i for i, name in enumerate(launch.kernel.arg_names)}
    constants = dict(launch.constants)
    signature = {**dict(launch.signature), **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        fn=launch.kernel,
        signature={name: signature[name] for name in launch.kernel.arg_names},
        constexprs={(position[name],): value for name, value in constants.items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": launch.num_warps})
    registers, spilled = _resources(compiled.asm["ptx"], arch)
    return Compiled(launch.name, arch, registers, spilled, compiled.metadata.shared)


def main(argv: list[str] | None = None) -> int:
    """Compile everything and print a table; 1 if any kernel spills."""
    parser = argparse.ArgumentParser(prog="python -m gardo_kernels.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), metavar="SM")
    arguments = parser.parse_args(argv)
    spilling = 0
    print(f"{'registers':>9} {'spills':>6} {'shared':>7}  arch    kernel")
    for launch in record():
        for arch in arguments.arch:
            result = compile_launch(launch, arch)
            spilling += result.spilled > 0
            print(
                f"{result.registers:9} {result.spilled:6} {result.shared:7}  sm_{arch:<5}"
                f"{result.name}",
                flush=True,
            )
    print(f"{spilling} kernels spill" if spilling else "no kernel spills")
    return 1 if spilling else 0


@contextmanager
def _recording(launches: dict[Launch, None]) -> Iterator[None]:
    from gardo_kernels import triton_helpers as common

    def keep(
        kernel: Any,
        programs: int,
        device: torch.device,
        *args: Any,
        num_warps: int = common.NUM_WARPS,
        **meta: Any,
    ) -> None:
        launches[_specialise(kernel, args, meta, num_warps)] = None

    original = common.launch
    common.launch = keep
    try:
        yield
    finally:
        common.launch = original


def _specialise(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any], num_warps: int) -> Launch:
    """As Triton does: ones are constants; pointers and multiples of 16 are marked divisible."""
    signature, constants, divisible = [], list(meta.items()), []
    for name, value in zip(kernel.arg_names, args, strict=False):
        if isinstance(value, torch.Tensor):
            signature.append((name, _POINTERS[value.dtype]))
            divisible.append(name)
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        elif value == 1:
            constants.append((name, 1))
        else:
            signature.append((name, "i32" if value < 2**31 else "i64"))
            if value % 16 == 0:
                divisible.append(name)
    return Launch(kernel, tuple(signature), tuple(constants), tuple(divisible), num_warps)


def _resources(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and spilled bytes, as reported by the assembler that Triton ships."""
    from triton import knobs

    tool = (knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas).path
    gpu = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        report = subprocess.run(
            [tool, "-v", f"--gpu-name={gpu}", str(source), "-o", str(source.with_suffix(".cubin"))],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    registers, spills = _REGISTERS.search(report), _SPILLS.search(report)
    if registers is None or spills is None:
        raise RuntimeError(f"ptxas reported no resource usage: {report!r}")
    return int(registers[1]), int(spills[1]) + int(spills[2])


if __name__ == "__main__":
    sys.exit(main())
