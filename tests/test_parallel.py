import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from l2m_jax.parallel import Placement, rows_split_as, split_rows


def test_rows_are_split_only_where_asked_for():
    mesh = Mesh(np.array(jax.devices()[:4]), ("devices",), axis_types=(AxisType.Auto,))
    columns = jax.device_put(
        jnp.arange(32.0).reshape(8, 4), NamedSharding(mesh, PartitionSpec(None, "devices"))
    )

    def split(x):
        with rows_split_as(NamedSharding(mesh, PartitionSpec("devices"))):
            return split_rows(x)

    assert jax.jit(split)(columns).sharding.spec == PartitionSpec("devices")
    assert jax.jit(lambda x: split_rows(x))(columns).sharding.spec == PartitionSpec(None, "devices")
    np.testing.assert_array_equal(jax.jit(split)(columns), np.arange(32.0).reshape(8, 4))


@pytest.mark.parametrize("mapping", ["pmap", "fsdp"])
def test_placed_weights_have_buffers_of_their_own(mapping):
    placement = Placement(mapping, tuple(jax.devices()[:4]))
    host = {"w": np.zeros((8, 4), np.float32)}
    placed = jax.block_until_ready(placement.place(host))
    again = jax.block_until_ready(placement.place({"w": jnp.zeros((8, 4))}))
    host["w"][:] = 1
    assert (placement.to_host(placed)["w"] == 0).all() and (placement.to_host(again)["w"] == 0).all()
