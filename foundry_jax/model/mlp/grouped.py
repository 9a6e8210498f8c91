"""Products of sorted rows with the matrix of the group each row belongs to: x[r] @ w[group of r].

Rows lie sorted by group, without gaps. They are computed in windows: `window` consecutive rows that start inside one
group, times that group's matrix. A group's last window reaches into the next group, whose own windows come later and
overwrite what it wrote there. So at most `window` rows a group are computed in vain, whatever the number of groups.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax


@flax.struct.dataclass
class Groups:
    """Where each of E groups lies among sorted rows, and the W windows that cover them in order of their rows.

    Arrays that are multiplied have P rows: those of all groups, then as many spare ones as the last window may need.
    Spare rows may hold anything finite; theirs is what no one reads.
    """

    sizes_E: jax.Array
    starts_E: jax.Array
    first_window_E: jax.Array
    group_W: jax.Array
    start_W: jax.Array  # first row of the window
    stop_W: jax.Array  # the first row after its group; start_W == stop_W: the window is not needed
    window: int = flax.struct.field(pytree_node=False)
    num_rows: int = flax.struct.field(pytree_node=False)  # P

    def computed(self, row_M: jax.Array, group_M: jax.Array) -> jax.Array:
        """Returns whether the product of a row with the matrix of a group is really made."""
        offset_M = row_M - self.starts_E[group_M]
        window_M = self.first_window_E[group_M] + offset_M // self.window
        inside_M = (offset_M >= 0) & (offset_M < self.sizes_E[group_M])
        return inside_M & (window_M < self.group_W.shape[0])


def arrange(sizes_E: jax.Array, num_rows: int) -> Groups:
    """Returns the groups of num_rows sorted rows; sizes_E sums to num_rows."""
    E = sizes_E.shape[0]
    window = window_size(num_rows, E, jax.default_backend())
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    windows_E = (sizes_E + window - 1) // window
    last_E = jnp.cumsum(windows_E)
    index_W = jnp.arange(num_windows(num_rows, E, window), dtype=jnp.int32)
    group_W = jnp.sum(last_E[None, :] <= index_W[:, None], axis=1, dtype=jnp.int32)
    used_W, group_W = group_W < E, jnp.minimum(group_W, E - 1)
    start_W = starts_E[group_W] + (index_W - (last_E - windows_E)[group_W]) * window
    stop_W = (starts_E + sizes_E)[group_W]
    return Groups(
        sizes_E=sizes_E,
        starts_E=starts_E,
        first_window_E=last_E - windows_E,
        group_W=group_W,
        start_W=jnp.where(used_W, start_W, num_rows),
        stop_W=jnp.where(used_W, stop_W, num_rows),
        window=window,
        num_rows=num_rows + window,
    )


def num_windows(num_rows: int, num_groups: int, window: int) -> int:
    """Returns the largest number of windows that num_rows rows in up to num_groups groups can need."""
    groups = min(num_groups, num_rows)
    return (num_rows + groups * (window - 1)) // window


# What one window costs besides its rows, in rows: reading and packing its matrix, adding to its gradient. CPU: measured
# (an MLP of 8192 rows with 8 times 3 matrices of 384 x 512 takes 1.41, 1.24, 1.12, 1.07 of the time of the batched
# product with windows of 64, 128, 256, 512; 2 cores, jax 0.10.2, 2026-11). Others: reckoned from the arithmetic and
# memory rates of an H100, not measured.
WINDOW_COST = {"cpu": 28, "gpu": 400, "tpu": 400}


def window_size(num_rows: int, num_groups: int, backend: str) -> int:
    """Returns the power of two nearest to the cheapest size, at least 8.

    n rows in E groups need about n / window + E / 2 windows, each of which costs window + c rows; the best window is
    sqrt(2 c n / E).
    """
    best = math.sqrt(2 * WINDOW_COST.get(backend, WINDOW_COST["gpu"]) * num_rows / num_groups)
    return 1 << max(3, round(math.log2(best)))


def grouped_matmul(x_PD: jax.Array, w_EDF: jax.Array, groups: Groups, implementation: str | None = None) -> jax.Array:
    """Returns y_PF, row r being x[r] @ w[group of r]; the rows after the last group are undefined.

    A row's result does not depend, bit for bit, on which other rows there are (tested on CPU).
    """
    return IMPLEMENTATIONS[implementation or _default(jax.default_backend())](x_PD, w_EDF, groups)


def _default(backend: str) -> str:
    return {"cpu": "loop", "tpu": "ragged"}.get(backend, "batched")


@jax.custom_vjp
def _loop(x_PD, w_EDF, groups):
    """One window after another, so that no matrix is copied; an unneeded window is skipped.

    For XLA:CPU, which runs lax.ragged_dot as dense products of all rows with all matrices.
    """
    return _loop_rows(x_PD, w_EDF, groups, transpose=False)


def _loop_forward(x_PD, w_EDF, groups):
    return _loop_rows(x_PD, w_EDF, groups, transpose=False), (x_PD, w_EDF, groups)


def _loop_backward(residuals, dy_PF):
    x_PD, w_EDF, groups = residuals
    return (
        _loop_rows(dy_PF, w_EDF, groups, transpose=True),
        _loop_matrices(x_PD, dy_PF, groups).astype(w_EDF.dtype),
        None,
    )


_loop.defvjp(_loop_forward, _loop_backward)


def _loop_rows(x_PD, w_EDF, groups, *, transpose):
    """Returns y_PF; with transpose y_PD from x_PF."""

    def step(y_PF, inputs):
        group, start, stop = inputs

        def multiply():
            w_DF = lax.dynamic_index_in_dim(w_EDF, group, keepdims=False)
            x_MD = lax.dynamic_slice_in_dim(x_PD, start, groups.window)
            return x_MD @ (w_DF.T if transpose else w_DF)

        y_MF = lax.cond(start < stop, multiply, lambda: jnp.zeros((groups.window, y_PF.shape[1]), y_PF.dtype))
        return lax.dynamic_update_slice_in_dim(y_PF, y_MF, start, axis=0), None

    width = w_EDF.shape[1 if transpose else 2]
    return lax.scan(step, jnp.zeros((x_PD.shape[0], width), x_PD.dtype), _steps(groups))[0]


def _loop_matrices(x_PD, dy_PF, groups):
    """Returns the gradient of w_EDF in float32, added up in place."""
    D, F = x_PD.shape[1], dy_PF.shape[1]

    def step(dw_EDF, inputs):
        group, start, stop = inputs

        def multiply():
            x_MD = lax.dynamic_slice_in_dim(x_PD, start, groups.window)
            dy_MF = lax.dynamic_slice_in_dim(dy_PF, start, groups.window)
            inside_M = start + jnp.arange(groups.window, dtype=start.dtype) < stop
            dy_MF = jnp.where(inside_M[:, None], dy_MF, jnp.zeros_like(dy_MF))
            return jnp.matmul(x_MD.T, dy_MF, preferred_element_type=jnp.float32)

        dw_DF = lax.cond(start < stop, multiply, lambda: jnp.zeros((D, F), jnp.float32))
        dw_DF = dw_DF + lax.dynamic_index_in_dim(dw_EDF, group, keepdims=False)
        return lax.dynamic_update_index_in_dim(dw_EDF, dw_DF, group, axis=0), None

    return lax.scan(step, jnp.zeros((groups.sizes_E.shape[0], D, F), jnp.float32), _steps(groups))[0]


def _steps(groups):
    return groups.group_W, groups.start_W, groups.stop_W


@jax.custom_vjp
def _batched(x_PD, w_EDF, groups):
    """All windows as one batched product with copies of their matrices.

    For GPUs, where a loop leaves most of the device idle, and where XLA computes lax.ragged_dot as dense products of
    all rows with all matrices unless experimental flags say otherwise (jax 0.10.2). Not timed on one.
    """
    return _batched_rows(x_PD, w_EDF, groups)


def _batched_forward(x_PD, w_EDF, groups):
    return _batched_rows(x_PD, w_EDF, groups), (x_PD, w_EDF, groups)


def _batched_backward(residuals, dy_PF):
    x_PD, w_EDF, groups = residuals
    inside_WM = groups.start_W[:, None] + jnp.arange(groups.window, dtype=jnp.int32)[None, :] < groups.stop_W[:, None]
    dy_WMF = _windows(dy_PF, groups)
    dy_WMF = jnp.where(inside_WM[..., None], dy_WMF, jnp.zeros_like(dy_WMF))
    dw_WDF = jnp.einsum("WMD,WMF->WDF", _windows(x_PD, groups), dy_WMF, preferred_element_type=jnp.float32)
    dw_EDF = jax.ops.segment_sum(dw_WDF, groups.group_W, w_EDF.shape[0], indices_are_sorted=True)
    return _batched_rows(dy_PF, jnp.swapaxes(w_EDF, 1, 2), groups), dw_EDF.astype(w_EDF.dtype), None


_batched.defvjp(_batched_forward, _batched_backward)


def _batched_rows(x_PD, w_EDF, groups):
    y_WMF = _windows(x_PD, groups) @ w_EDF[groups.group_W]
    row_P = jnp.arange(x_PD.shape[0], dtype=jnp.int32)
    group_P = jnp.sum((groups.starts_E + groups.sizes_E)[None, :] <= row_P[:, None], axis=1, dtype=jnp.int32)
    group_P = jnp.minimum(group_P, w_EDF.shape[0] - 1)
    offset_P = row_P - groups.starts_E[group_P]
    return y_WMF[groups.first_window_E[group_P] + offset_P // groups.window, offset_P % groups.window]


def _windows(x_PD, groups):
    """Returns x_WMD."""
    row_WM = groups.start_W[:, None] + jnp.arange(groups.window, dtype=jnp.int32)[None, :]
    return x_PD.at[row_WM].get(mode="promise_in_bounds")


def _ragged(x_PD, w_EDF, groups):
    """For TPUs, which have an instruction for it. Not timed on one."""
    return lax.ragged_dot(x_PD, w_EDF, groups.sizes_E)


IMPLEMENTATIONS = {"loop": _loop, "batched": _batched, "ragged": _ragged}


def over_shards(function, *args):
    """Returns function mapped over the first axis of all args: the parts of a batch that lie on different devices.

    A single part is not mapped but called: XLA:CPU turns the slices of a mapped loop into slower gathers.
    """
    if jax.tree.leaves(args)[0].shape[0] == 1:
        first = jax.tree.map(lambda x: x[0], args)
        return jax.tree.map(lambda y: y[None], function(*first))
    return jax.vmap(function)(*args)


@jax.custom_vjp
def take_rows(x_XD: jax.Array, index_Y: jax.Array, readers_XR: jax.Array) -> jax.Array:
    """Returns x[index] as y_YD; readers_XR says which (at most R) rows of y are read from each row of x, -1: none.

    Its gradient is a gather too: a scatter that adds in no fixed order would make runs on a GPU differ.
    """
    return x_XD.at[index_Y].get(mode="promise_in_bounds")


def _take_rows_forward(x_XD, index_Y, readers_XR):
    return take_rows(x_XD, index_Y, readers_XR), readers_XR


def _take_rows_backward(readers_XR, dy_YD):
    dy_XRD = dy_YD.at[jnp.maximum(readers_XR, 0)].get(mode="promise_in_bounds")
    return jnp.sum(jnp.where(readers_XR[..., None] >= 0, dy_XRD, jnp.zeros_like(dy_XRD)), axis=1), None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)
