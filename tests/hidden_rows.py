"""Rows all of whose keys a bias hides by -1e9, as left padding does under a causal mask.

Float32 has no room for a logit beside -1e9: what such a row gives is even over its keys. The oracle
has room; that the queries of such rows are 0 makes its weights even, too.
"""

import jax
import jax.numpy as jnp
import numpy as np

from attnsel_jax import oracle
from attnsel_jax.problems.dense_inputs import dense_inputs

SHAPE = {"head_size": 64, "causal": True, "bias": (False, False, False, True)}


def check_hidden_rows(kernel, *, hidden, atol, far=-1e9, wrt=("q", "k", "v", "bias"), **options):
    """Holds a kernel's out and gradients to the oracle's, where the first keys are hidden."""
    rng = np.random.default_rng(0)
    arguments = dense_inputs(rng, **SHAPE | options)
    q, bias = np.array(arguments["q"]), np.array(arguments["bias"], np.float32)
    q[:, :hidden], bias[..., :hidden] = 0, far
    arguments |= {"q": q, "bias": bias}
    attended = oracle.attend_dense(**arguments)
    dout = rng.standard_normal(attended.out.shape).astype(q.dtype)
    dlse = rng.standard_normal(attended.lse.shape).astype(np.float32)
    floats = {name: jnp.asarray(arguments[name]) for name in wrt}
    rest = {name: x for name, x in arguments.items() if name not in floats}

    @jax.jit
    def everything(floats, dout, dlse):
        (out, lse), pull_back = jax.vjp(lambda x: kernel(**x, **rest), floats)
        return out, lse, pull_back((dout, dlse))[0]

    out, lse, gradients = everything(floats, dout, dlse)
    wanted = oracle.attend_dense_gradients(dout, dlse, **arguments).values
    np.testing.assert_allclose(lse, attended.lse, rtol=1e-5, atol=atol)
    np.testing.assert_allclose(np.asarray(out, np.float64), attended.out, rtol=0.02, atol=atol)
    for name in wrt:
        mine = np.asarray(gradients[name], np.float64)
        np.testing.assert_allclose(mine, wanted[name], rtol=0.02, atol=atol, err_msg=name)
