"""What a binary must be like, whatever the device that it is for."""

from __future__ import annotations

from typing import Any

from fastattn.gpu.config_tables import is_since_39
from jobs import Job, Target

# Rows of a tile from which on Hopper uses its wide products.
WIDE_ROWS = 64

# What is spilled at the smallest tile there is: rows of 256 float32, or of 128 beside a tile of dS that is
# summed up, do not fit into 255 registers with the gradients they are added to. Right, slow, and no more than
# these bytes.
SPILLED = {
    ("key_gradient_kernel", "float32", 256): 448,
    ("query_gradient_kernel", "float32", 256): 260,
    ("bias_gradient_kernel", "float32", 256): 384,
    ("key_gradient_kernel", "float32", 128): 16,
    ("query_gradient_kernel", "float32", 128): 8,
    ("bias_gradient_kernel", "float32", 128): 16,
}
# Triton 3.9 needs a few registers more for three products of TF32 of 128 columns: of tiles from 16 x 16 to
# 64 x 16, by 1 to 16 warps, none has enough. Most is spilled on sm90 (keys) and sm100 (biases).
SPILLED_39 = SPILLED | {
    ("key_gradient_kernel", "float32", 128): 24,
    ("query_gradient_kernel", "float32", 128): 24,
    ("bias_gradient_kernel", "float32", 128): 48,
}


def faults(record: dict[str, Any], job: Job, target: Target, version: str) -> list[str]:
    """What is wrong with a kernel that this version of Triton compiled, in words."""
    allowed = SPILLED_39 if is_since_39(version) else SPILLED
    instructions, found = record["instructions"], []
    if record["spilled"] > allowed.get((record["kernel"], job.dtype, job.case.head_dim), 0):
        registers = record.get("spilled registers", "some")
        found.append(f"{registers} registers are spilled to {record['spilled']} bytes of local memory")
    elif not record["spilled"] and (instructions.get("LDL") or instructions.get("STL")):
        found.append("local memory is read or written")
    if record["shared"] > target.shared_kib * 1024:
        found.append(f"{record['shared']} bytes of shared memory, of {target.shared_kib * 1024}")
    waits, wide = instructions.get("WARPGROUP.DEPBAR", 0), instructions.get("HGMMA", 0)
    if job.launcher == "forward" and not job.dropout_p and 2 * waits > wide > 0:
        found.append(f"{wide} products are waited for {waits} times: one after another")
    if record.get("too wide"):
        found.append(f"a thread holds columns of a product that others hold, too: {record['too wide']}")
    if "PRECISION" in record["options"]:
        wanted = products(record, job, target)
        if wanted and not any(instructions.get(name) for name in wanted):
            found.append(f"no {' or '.join(wanted)} among {instructions}")
    return found


def products(record: dict[str, Any], job: Job, target: Target) -> tuple[str, ...]:
    """The instructions of which one must be there for the products of a kernel."""
    if target.backend == "hip":
        return ("v_mfma",)
    if record["options"]["PRECISION"] == "ieee" and job.dtype == "float32":
        return ()  # no matrix unit has them
    rows = record["options"].get("BLOCK_M", 0)
    if target.name == "sm90" and rows >= WIDE_ROWS and job.dtype != "float32":
        return ("HGMMA",)
    return ("HMMA", "HGMMA", "UTCHMMA")
