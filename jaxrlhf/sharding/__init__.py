"""Device mesh, sharding rules, and placement of arrays.

The mesh has four axes. Rows of a batch are split over `replica`, `data` and `fsdp`; parameters over `fsdp` (each device
keeps a shard and gathers when needed) and `tensor` (each device computes its share of heads, mlp columns and
vocabulary). `replica` differs from `data` only in where its devices are: across hosts or slices of a TPU. Gradients and
Adam's moments are sharded like their parameters, because their paths end in the parameter's path.
"""

from jaxrlhf.sharding.mesh import (
    AXES,
    ROW_AXES,
    Platform,
    arrange,
    available,
    check_heads,
    check_rows,
    device_memory,
    is_here,
    make_mesh,
    mesh_sizes,
    on_devices,
    platform,
    row_shards,
)
from jaxrlhf.sharding.placement import (
    HOST,
    ROWS,
    check_host_memory,
    element_indices,
    fetch,
    place,
    put_rows,
    put_whole,
    rows_shape,
    to_device,
    to_host,
)
from jaxrlhf.sharding.rules import (
    BOTH,
    RULES,
    axes_of,
    constrain,
    path_of,
    rule_of,
    shardings,
    spec,
    undivided,
    with_shardings,
)
