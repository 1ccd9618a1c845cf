"""Chips: what is published about the accelerators that an audit compiles for.

An audit needs two figures of a chip, the bytes that fit and the bytes a second that
move, and for a GPU also what its compiler asks of the device: XLA chooses launch
dimensions and fusions by them. All are those of the makers' public pages, named beside
each figure; where a page gives GB, it is 1e9 bytes, GiB 2**30. What fits is the chip's
memory; a runtime keeps part of it for itself.

Sources:

- [v4], [v5e], [v5p], [v6e], [tpu7x]: docs.cloud.google.com/tpu/docs/v4 and so on, the
  table of key specifications.
- [A100]: NVIDIA A100 80GB datasheet; NVIDIA A100 Tensor Core GPU Architecture
  whitepaper (V1.0), table 4.
- [H100]: NVIDIA H100 datasheet, column SXM; NVIDIA H100 Tensor Core GPU Architecture
  whitepaper, table 3. [H200]: NVIDIA H200 datasheet, column SXM.
- [B200]: NVIDIA HGX B200 datasheet; [DGX]: NVIDIA DGX B200 datasheet, 1,440 GB and
  64 TB/s for eight; SMs and clock as NVIDIA's driver reports them, from the B200
  description in OpenXLA's xla/tools/hlo_opt/gpu_specs.
- [CUDA]: CUDA C++ Programming Guide, "Compute Capabilities", table "Technical
  Specifications per Compute Capability".
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 10**9
GIB = 2**30
KIB = 2**10


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
      kind: as topology names have it, such as ``"v5p"``.
      memory_bytes: memory of one device; 0 where nothing is known (CPU).
      bandwidth: bytes a second between that memory and the chip; 0 if unknown.
      devices: JAX devices a chip.
      config: libtpu's name of the chip's configuration; empty for its default.
      target: how XLA's GPU compiler describes the device, a ``GpuTargetConfigProto``
        in text form; empty for what is no GPU.
    """

    kind: str
    memory_bytes: int
    bandwidth: int
    devices: int = 1
    config: str = ""
    target: str = ""


def _gpu(
    kind: str,
    *,
    name: str,
    memory: int,
    bandwidth: int,
    capability: tuple[int, int],
    cores: int,
    fpus: int,
    l2: int,
    clock_ghz: float,
    shared_kib: int,
) -> Chip:
    """A GPU; what all of compute capability 8.0 to 10.0 have in common is here."""
    # [CUDA]: threads and registers per block and SM, shared memory: 48 KiB a block
    # without opting in, all of an SM's but one KiB with it; limits of a grid.
    target = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: {48 * KIB}
  shared_memory_per_block_optin: {(shared_kib - 1) * KIB}
  shared_memory_per_core: {shared_kib * KIB}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: {cores}
  fpus_per_core: {fpus}
  clock_rate_ghz: {clock_ghz}
  l2_cache_size: {l2}
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""
    return Chip(kind, memory, bandwidth, target=target)


TPUS = {
    chip.kind: chip
    for chip in (
        # [v4]: 32 GiB, 1200 GBps; both TensorCores run as one device.
        Chip("v4", 32 * GIB, 1200 * GB, config="megacore"),
        # [v5e]: 16 GB, 819 GBps.
        Chip("v5e", 16 * GB, 819 * GB),
        # [v5p]: 95 GB, 2765 GBps; both TensorCores run as one device.
        Chip("v5p", 95 * GB, 2765 * GB),
        # [v6e]: 32 GB, 1638 GBps.
        Chip("v6e", 32 * GB, 1638 * GB),
        # [tpu7x]: 192 GiB, 7380 GBps a chip; two TensorCores, each a device.
        Chip("tpu7x", 96 * GIB, 3690 * GB, devices=2),
    )
}

GPUS = {
    chip.kind: chip
    for chip in (
        _gpu(
            "a100",
            name="NVIDIA A100-SXM4-80GB",
            memory=80 * GB,  # [A100] datasheet: 80 GB HBM2e
            bandwidth=2039 * GB,  # [A100] datasheet: 2,039 GB/s
            capability=(8, 0),  # [CUDA]
            cores=108,  # [A100] table 4: SMs
            fpus=64,  # [A100] table 4: FP32 cores a SM
            l2=40 * KIB * KIB,  # [A100] table 4: 40 MB
            clock_ghz=1.41,  # [A100] table 4: boost clock
            shared_kib=164,  # [CUDA]
        ),
        _gpu(
            "h100",
            name="NVIDIA H100 80GB HBM3",
            memory=80 * GB,  # [H100] datasheet: 80 GB
            bandwidth=3350 * GB,  # [H100] datasheet: 3.35 TB/s
            capability=(9, 0),  # [CUDA]
            cores=132,  # [H100] table 3: SMs, SXM5
            fpus=128,  # [H100] table 3: FP32 cores a SM
            l2=50 * KIB * KIB,  # [H100] table 3: 50 MB
            clock_ghz=1.98,  # the driver's maximum, as in OpenXLA's description
            shared_kib=228,  # [CUDA]
        ),
        _gpu(
            "h200",
            name="NVIDIA H200",
            memory=141 * GB,  # [H200]: 141 GB
            bandwidth=4800 * GB,  # [H200]: 4.8 TB/s
            capability=(9, 0),  # [CUDA]
            cores=132,  # the die of the H100
            fpus=128,
            l2=50 * KIB * KIB,
            clock_ghz=1.98,
            shared_kib=228,
        ),
        _gpu(
            "b200",
            name="NVIDIA B200",
            memory=180 * GB,  # [DGX]: 1,440 GB for eight
            bandwidth=8000 * GB,  # [DGX]: 64 TB/s for eight
            capability=(10, 0),  # [CUDA]
            cores=148,  # [B200]
            fpus=128,  # [CUDA]: FP32 results a clock and SM
            l2=126 * KIB * KIB,  # CUDA Blackwell Tuning Guide: 126 MB
            clock_ghz=1.965,  # [B200]
            shared_kib=228,  # [CUDA]
        ),
    )
}

CPU = Chip("cpu", 0, 0)
