"""MLPS: what each token computes on its own; ROUTERS: which experts it is sent to, if a layer has several MLPs.

Both are looked up by name: config.mlp names the activation of every MLP, of the experts too, config.moe the router.
"""

from foundry_jax.model.mlp.activation import GEGLU, GEGLU_TANH, GELU, GELU_TANH, GLU, RELU2, SWIGLU
from foundry_jax.model.mlp.router import Sigmoid, Softmax, SoftmaxUnnormalized

MLPS = {
    "swiglu": SWIGLU,
    "geglu": GEGLU,
    "geglu_tanh": GEGLU_TANH,
    "glu": GLU,
    "gelu": GELU,
    "gelu_tanh": GELU_TANH,
    "relu2": RELU2,
}

ROUTERS = {
    "none": None,
    "softmax": Softmax,
    "softmax_unnormalized": SoftmaxUnnormalized,
    "sigmoid": Sigmoid,
}
