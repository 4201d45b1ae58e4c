"""The fingerprint of a bundle's model, from its config and the routers in its shards alone."""

from pathlib import Path

from torch import Tensor

from kttools.families import Role, canonical_tensors
from kttools_runtime.config import ModelConfig
from kttools_runtime.expert_table import model_fingerprint
from kttools_runtime.shards import ShardWeights

ROUTER_ROLES = (Role.ROUTER, Role.ROUTER_BIAS)


def bundle_fingerprint(config: ModelConfig, shard_files: list[Path]) -> str:
    """What Model.fingerprint() will say of the bundle (see model_fingerprint). Raises CorruptFileError."""
    shards = ShardWeights(shard_files, {})
    routers: dict[int, tuple[Tensor, ...]] = {}
    for spec in canonical_tensors(config):
        if spec.role in ROUTER_ROLES and ".mlp.gate." in spec.name:  # not the gate of a shared expert
            layer = int(spec.name.split(".")[2])
            routers[layer] = (*routers.get(layer, ()), shards.tensor(spec.name, spec.shape))
    return model_fingerprint(config, routers)
