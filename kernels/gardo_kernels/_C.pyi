"""Types of the compiled core (csrc/bindings.cpp); addresses are `Tensor.data_ptr()`, 0 is null."""

has_openmp: bool

def shape_rewards(
    *,
    proxy: int,
    aux: int,
    group_ids: int,
    distance: int,
    num_samples: int,
    num_aux: int,
    fraction: float,
    advantage_norm: int,
    gate_mode: int,
    scope: int,
    num_threads: int,
    advantage: int,
    uncertainty: int,
    gate: int,
    threshold: int,
    mean_uncertainty: int,
) -> None: ...
